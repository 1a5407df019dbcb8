"""The tiny run as a config file, for processes of their own."""

from tests.tiny import config as get_config

__all__ = ["get_config"]
