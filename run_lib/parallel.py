"""The one place that maps over devices: `jax.pmap`, and the splitting of batches over them.

Functions of one device see [B/devices, ...] and the axis name "batch"; nothing below this file has
a [devices, B, ...] shape. Each process feeds its own devices.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from run_lib.build import AXIS_NAME
from streams import Host

PyTree = Any


def host() -> Host:
    """This process among all of the run."""
    return Host(jax.process_index(), jax.process_count())


def check_batch_size(batch_size: int, field: str) -> None:
    """Every device gets the same number of examples."""
    if batch_size % jax.device_count():
        raise ValueError(
            f"{field}={batch_size}: must be a multiple of the {jax.device_count()} devices"
        )


def wait_for_all(name: str) -> None:
    """Return when every process has come to the point of this name; at once with one process."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def of_first_process(values: np.ndarray) -> np.ndarray:
    """What the first process passes, an array of the same shape in all of them."""
    if jax.process_count() == 1:
        return values
    return np.asarray(multihost_utils.broadcast_one_to_all(values))


def split(batch: PyTree, axis: int = 0) -> PyTree:
    """Spread the batch axis over the local devices: [..., B, ...] → [..., D, B/D, ...]."""
    devices = jax.local_device_count()

    def split_leaf(leaf: np.ndarray) -> np.ndarray:
        shape = leaf.shape
        return leaf.reshape(*shape[:axis], devices, shape[axis] // devices, *shape[axis + 1 :])

    return jax.tree.map(split_leaf, batch)


def join(tree: PyTree) -> PyTree:
    """Undo `split` of results: [D, B/D, ...] → host arrays [B, ...]."""
    return jax.tree.map(lambda leaf: np.asarray(leaf).reshape(-1, *leaf.shape[2:]), tree)


def map_over_devices(
    function: Callable[..., PyTree],
    *,
    in_axes: tuple[int | None, ...],
    out_axes: int | None,
    donate_argnums: tuple[int, ...] = (),
) -> Callable[..., PyTree]:
    """`jax.pmap` of a function of one device; an axis of None is replicated.

    A replicated result must be equal on all devices (the function takes the mean over the axis).
    """
    return jax.pmap(
        function,
        axis_name=AXIS_NAME,
        in_axes=in_axes,
        out_axes=out_axes,
        donate_argnums=donate_argnums,
    )
