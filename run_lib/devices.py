"""Devices and processes: how they find each other, the one `jax.pmap`, what a step needs of them.

Functions of one device see [B/devices, ...] and the axis name "batch"; nothing below this file has
a [devices, B, ...] shape. Each process feeds its own devices.
"""

import contextlib
import ctypes
import gc
import importlib
import importlib.util
import itertools
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from checks import require
from run_lib.sections import TrainingConfig
from streams import Host

logger = logging.getLogger("fokker")
PyTree = Any
AXIS_NAME = "batch"
START_S = 300.0  # for the slowest process to read its data
DAY_S = 86_400.0
PATIENCE_S = 60.0  # after which a process that is waited for is named
_meetings = itertools.count()  # no point of meeting has the name of another


def host() -> Host:
    """This process among all of the run."""
    return Host(jax.process_index(), jax.process_count())


def is_first() -> bool:
    """Say whether this is the first process, which writes what is written once."""
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
    collective of devices gives up after 30 s on CPU, however alive the others are. Lines of the log
    name a process that does not come, the first one after a minute.

    Args:
        name: of the point; all processes come to the same ones in the same order.
        seconds: after which the others are given up, with a JaxRuntimeError.
    """
    if jax.process_count() > 1:
        _meet(name, "here", seconds)


def told_by_all(name: str, text: str) -> list[str]:
    """Return the texts of all processes, in their order; wait for the slowest to start.

    Args:
        name: of what is told; all processes tell the same things in the same order.
        text: of this process.
    """
    if jax.process_count() == 1:
        return [text]
    return _meet(name, text, START_S)


def _client() -> Any:
    """JAX's client of the coordination service, which it has no public name for."""
    return importlib.import_module("jax._src.distributed").global_state.client


def _meet(name: str, text: str, seconds: float) -> list[str]:
    """Tell the other processes a text, wait until all have told one, and return them in order."""
    key, until = f"fokker/{name} {next(_meetings)}", time.monotonic() + seconds
    _client().key_value_set(f"{key}/{jax.process_index()}", text)
    found = [_text(f"{key}/{i}", name, i, until) for i in range(jax.process_count())]
    # The first process keeps the texts: it goes on when all have read them.
    _client().wait_at_barrier(key, round(1000 * max(until - time.monotonic(), 1.0)))
    return found


def _text(key: str, name: str, index: int, until: float) -> str:
    """Wait for the text of a process, and name the process while it does not come.

    Raises:
        JaxRuntimeError: there is none at this time, or the service has ended.
    """
    patience, began = PATIENCE_S, time.monotonic()
    while True:
        left = max(until - time.monotonic(), 1.0)
        try:
            return _client().blocking_key_value_get(key, round(1000 * min(left, patience)))
        except jax.errors.JaxRuntimeError as error:
            if left <= patience or not str(error).startswith("DEADLINE_EXCEEDED"):
                raise
        waited = time.monotonic() - began
        logger.info("waiting for process %d at %r for %.0f s", index, name, waited)
        patience *= 2.0


def of_first_process(values: np.ndarray) -> np.ndarray:
    """Return in every process the values of the first one; all pass arrays of the same shape."""
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
) -> jax.stages.Wrapped:
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


# How processes find each other.

# Number of processes of this launch, as the launchers tell it.
LAUNCHERS = {"Slurm": "SLURM_STEP_NUM_TASKS", "Open MPI": "OMPI_COMM_WORLD_SIZE"}
ADDRESS_OF_OPEN_MPI = "OMPI_MCA_orte_hnp_uri"  # told by versions up to 4; by this JAX finds it
CONNECT_S = 300  # until all processes must have come
SILENCE_S = 60  # after which a process counts as dead, and all others end


def connect(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
    """Join the other processes; a process alone does nothing. Before the first use of a device.

    By the three arguments, else by what Slurm, Open MPI or a Cloud TPU tell; then the arguments
    stay empty.

    If some never come, JAX aborts those that did (code 134).

    Raises:
        ValueError: an argument is missing or out of range, or nobody answers at its address.
    """
    given = {"num_processes": num_processes, "process_id": process_id}
    if coordinator:
        _check_addresses(coordinator, **given)
        if process_id > 0:
            _wait_for(coordinator)
        elif num_processes > 1:
            logger.info(
                "waiting up to %d s for %d processes at %s", CONNECT_S, num_processes, coordinator
            )
        _initialize(f"--coordinator={coordinator}", coordinator_address=coordinator, **given)
        return
    for name, value in given.items():
        require(value is None, f"--{name}", value, "--coordinator=HOST:PORT with it")
    if name := _launcher():
        _initialize(name)


def _check_addresses(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
    host, _, port = coordinator.rpartition(":")
    require(bool(host) and port.isdecimal(), "--coordinator", coordinator, "HOST:PORT")
    require((num_processes or 0) >= 1, "--num_processes", num_processes, "at least 1")
    inside = process_id is not None and 0 <= process_id < num_processes
    require(inside, "--process_id", process_id, f"0 to {num_processes - 1}")


def _wait_for(coordinator: str) -> None:
    """Until process 0 listens: JAX would abort where it does not."""
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + CONNECT_S
    while True:
        try:
            return socket.create_connection((host.strip("[]"), int(port)), timeout=5.0).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"--coordinator={coordinator}: process 0 did not answer in {CONNECT_S} s: "
                    f"started with the same address, port open? {error}"
                ) from None
        time.sleep(0.2)


def _launcher() -> str:
    """Name the launcher of several processes; return an empty text where this one is alone."""
    for name, variable in LAUNCHERS.items():
        if int(os.environ.get(variable, "1")) > 1:
            if name == "Open MPI" and ADDRESS_OF_OPEN_MPI not in os.environ:
                raise ValueError("Open MPI 5 tells no address: pass --coordinator=HOST:PORT")
            return name
    devices = ("/dev/accel0", "/dev/vfio/0")  # of older and newer generations
    on_tpu = importlib.util.find_spec("libtpu") and any(map(os.path.exists, devices))
    several = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return "Cloud TPU" if on_tpu or several else ""


def _initialize(source: str, **arguments: Any) -> None:
    try:
        jax.distributed.initialize(
            initialization_timeout=CONNECT_S, heartbeat_timeout_seconds=SILENCE_S, **arguments
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{source}: the processes of this run did not find each other in {CONNECT_S} s; same "
            f"command on all, port open? {str(error).splitlines()[0]}"
        ) from None


def describe() -> str:
    """One line about this process."""
    which = f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}"
    kind = jax.local_devices()[0].device_kind
    return f"{which}: {jax.local_device_count()} of {jax.device_count()} device(s), {kind}"


# Memory.

GIB = 2**30
M_ARENA_MAX = -8  # malloc.h
NUM_TRIES = 3  # each is a compilation, of minutes for a large network
LEVERS = (
    "training.microbatch, model.remat=block or keep_convs, model.dtype=bfloat16, "
    "training.high_order_fraction, training.fp_fraction, training.batch_size, more devices"
)


class Need(NamedTuple):
    """Bytes on one device: what stays (state, batch, frozen parameters) and what a step borrows."""

    kept: int
    temporary: int

    @property
    def total(self) -> int:
        """Return the sum of both, in bytes."""
        return self.kept + self.temporary


def needed(compiled: Any) -> Need | None:
    """Return the bytes that a compiled step needs; None where XLA does not tell."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    kept = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return Need(kept, found.temp_size_in_bytes)


def one_arena() -> None:
    """Keep glibc from one heap per thread; called before threads start.

    Compilation frees memory in threads that may never run again, whose heaps would keep it: after
    twelve trainings and evaluations in one process 263 MB are left instead of 299.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").mallopt(M_ARENA_MAX, 1)


def release() -> None:
    """Between modes: drop compiled programs, and give their pages back to the system.

    jax.clear_caches forgets one cache, whose keys hold the vector field of every ODE ever compiled.
    """
    jax.clear_caches()
    with contextlib.suppress(ImportError, AttributeError):  # private: another JAX may not have it
        importlib.import_module("jax._src.api_util").donation_vector.cache_clear()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def available() -> int | None:
    """Bytes of one device; on CPU, this process's share of the main memory."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    if jax.default_backend() != "cpu":
        return None
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text(encoding="ascii").strip()).isdecimal():
        total = min(total, int(text))
    return total // jax.local_device_count()


def microbatch_that_fits(
    need: Need, now: int, sizes: Iterable[int], compile_with: Callable[[int], Any], limit: int
) -> str:
    """Advice: the largest microbatch whose compiled step fits, of the few that are tried.

    Tried are those that fit if what a step borrows is proportional to its microbatch.

    Args:
        need: of the present microbatch.
        now: that microbatch.
        sizes: what divides the batch evenly.
        compile_with: microbatch → compiled step; ValueError where the microbatch has no meaning.
        limit: bytes of a device.
    """
    smaller = sorted((size for size in sizes if size < now), reverse=True)
    likely = [size for size in smaller if need.kept + need.temporary * size / now <= limit]
    tried = []
    for size in likely[:NUM_TRIES]:
        try:
            found = needed(compile_with(size))
        except ValueError:  # a fraction of this microbatch has no whole number of examples
            continue
        if found is not None and found.total <= limit:
            return f"training.microbatch={size} fits ({found.total / GIB:.2f} GiB)"
        tried.append(size)
    return f"training.microbatch alone does not help (tried {tried})"
