"""Experiments, one file each: a delta over `base.py`."""
