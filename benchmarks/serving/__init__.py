"""How fast the server answers under load: see ``benchmarks/README.md``."""
