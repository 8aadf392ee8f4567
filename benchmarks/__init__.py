"""Paired measurements of our code against what it replaces; see ``benchmarks/README.md``."""
