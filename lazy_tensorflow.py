"""TensorFlow, imported when it is first needed, without GPUs and without its messages."""

import functools
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager


@functools.cache
def tensorflow() -> types.ModuleType:
    """The module, which never sees a GPU."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with _quiet():
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")
        tf.config.list_logical_devices()  # starts its runtime, which complains of absent GPUs
    tf.get_logger().setLevel("ERROR")  # its advice to those who write programs
    return tf


@contextmanager
def _quiet() -> Iterator[None]:
    """A block in which nothing reaches the terminal, not even what C++ libraries write."""
    sys.stderr.flush()
    terminal, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(terminal, 2)
        os.close(terminal)
        os.close(nowhere)
