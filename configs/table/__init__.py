"""Experiments on tables and arrays of real values."""
