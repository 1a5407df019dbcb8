"""Experiments on digits data."""
