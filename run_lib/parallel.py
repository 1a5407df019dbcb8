"""The one place that maps over devices: `jax.pmap`, and the splitting of batches over them.

Functions of one device see [B/devices, ...] and the axis name "batch"; nothing below this file has
a [devices, B, ...] shape. Each process feeds its own devices.
"""

import importlib
import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from run_lib.settings import TrainingConfig
from streams import Host

PyTree = Any
AXIS_NAME = "batch"
START_S = 300.0  # for the slowest process to read its data
DAY_S = 86_400.0
_meetings = itertools.count()  # no point of meeting has the name of another


def host() -> Host:
    """This process among all of the run."""
    return Host(jax.process_index(), jax.process_count())


def is_first() -> bool:
    """Whether this process is the one that writes what is written once."""
    return jax.process_index() == 0


def check_batch_size(batch_size: int, field: str) -> None:
    """Every device gets the same number of examples."""
    if batch_size % jax.device_count():
        raise ValueError(
            f"{field}={batch_size}: must be a multiple of the {jax.device_count()} devices"
        )


def check_training_batch(training: TrainingConfig) -> None:
    """Every device gets the same number of examples, in whole microbatches.

    Raises:
        ValueError: it cannot; names the field.
    """
    check_batch_size(training.batch_size, "training.batch_size")
    if training.microbatch:
        check_batch_size(training.microbatch, "training.microbatch")


def wait_for_all(name: str, *, seconds: float = DAY_S) -> None:
    """Return when every process has come to this point; at once with one process.

    By JAX's coordination service, which hears of a process that dies and lets the others end. A
    collective of devices gives up after 30 s on CPU, however alive the others are.

    Args:
        name: of the point; all processes come to the same ones in the same order.
        seconds: after which the others are given up, with a JaxRuntimeError.
    """
    if jax.process_count() > 1:
        client = importlib.import_module("jax._src.distributed").global_state.client
        client.wait_at_barrier(f"{name} {next(_meetings)}", round(1000 * seconds))


def told_by_all(name: str, text: str) -> list[str]:
    """What every process passes, in the order of the processes; waits for the slowest to start.

    Args:
        name: of what is told; all processes tell the same things in the same order.
        text: of this process.
    """
    if jax.process_count() == 1:
        return [text]
    client = importlib.import_module("jax._src.distributed").global_state.client
    key, limit = f"fokker/{name} {next(_meetings)}", round(1000 * START_S)
    client.key_value_set(f"{key}/{jax.process_index()}", text)
    found = [
        client.blocking_key_value_get(f"{key}/{index}", limit)
        for index in range(jax.process_count())
    ]
    wait_for_all(f"{key}, read", seconds=START_S)  # the first one keeps the texts until then
    return found


def of_first_process(values: np.ndarray) -> np.ndarray:
    """What the first process passes, an array of the same shape in all of them."""
    if jax.process_count() == 1:
        return values
    return np.asarray(multihost_utils.broadcast_one_to_all(values))


def to_global(tree: PyTree) -> PyTree:
    """Values that every process holds, as arrays over the devices of all, which Orbax can write."""
    if jax.process_count() == 1:
        return tree
    mesh = Mesh(np.asarray(jax.devices()), AXIS_NAME)
    return multihost_utils.host_local_array_to_global_array(tree, mesh, PartitionSpec())


def split(batch: PyTree, axis: int = 0) -> PyTree:
    """Spread the batch axis over the local devices: [..., B, ...] → [..., D, B/D, ...]."""
    devices = jax.local_device_count()

    def split_leaf(leaf: np.ndarray) -> np.ndarray:
        shape = leaf.shape
        return leaf.reshape(*shape[:axis], devices, shape[axis] // devices, *shape[axis + 1 :])

    return jax.tree.map(split_leaf, batch)


def put(batch: PyTree, axis: int = 0) -> PyTree:
    """`split`, and the transfer to the devices begun."""
    mesh = Mesh(np.asarray(jax.local_devices()), AXIS_NAME)
    places = NamedSharding(mesh, PartitionSpec(*(None,) * axis, AXIS_NAME))
    return jax.device_put(split(batch, axis), places)


def replicate(tree: PyTree) -> PyTree:
    """The same values on every local device; what is on the devices of all processes stays so."""
    if any(isinstance(x, jax.Array) and not x.is_fully_addressable for x in jax.tree.leaves(tree)):
        return tree
    mesh = Mesh(np.asarray(jax.local_devices()), AXIS_NAME)
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


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
