"""Experiments on mnist data."""
