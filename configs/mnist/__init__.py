"""Experiments on MNIST."""
