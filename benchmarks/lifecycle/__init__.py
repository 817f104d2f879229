"""What it costs that adapters come and go: see ``benchmarks/README.md``."""
