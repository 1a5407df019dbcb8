"""What a compiled step needs of a device's memory, and what to do if that is not there."""

import contextlib
import ctypes
import gc
import importlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax

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
        """Both."""
        return self.kept + self.temporary


def needed(compiled: Any) -> Need | None:
    """What a compiled step needs; None where XLA does not tell."""
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
