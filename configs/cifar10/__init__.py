"""Experiments on CIFAR-10 with heads."""
