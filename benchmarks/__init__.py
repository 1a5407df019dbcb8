"""Measurements: `python -m benchmarks.<name>`; each prints one table."""
