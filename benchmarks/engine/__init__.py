"""How fast the engine is without a server: see ``benchmarks/README.md``."""
