"""What single operations cost, each in a module that runs by itself: see ``benchmarks/README.md``."""
