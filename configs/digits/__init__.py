"""Experiments on handwritten digits."""
