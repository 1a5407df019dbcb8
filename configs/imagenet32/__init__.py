"""Experiments on ImageNet 32 with heads."""
