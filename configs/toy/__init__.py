"""Experiments on toy data."""
