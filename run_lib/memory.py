"""What a compiled step needs of a device's memory, and what to do if that is not there."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

GIB = 2**30
LEVERS = (
    "training.microbatch, model.remat=block or keep_convs, model.dtype=bfloat16, "
    "training.high_order_fraction, training.fp_fraction, training.batch_size, more devices"
)


def needed(compiled: Any) -> int | None:
    """Bytes on one device: arguments, results and temporaries; None where XLA does not tell."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    kept = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return kept + found.temp_size_in_bytes


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


def smaller(batch_size: int, devices: int, now: int) -> Iterator[int]:
    """Microbatches below the present one that divide the batch evenly, largest first."""
    for size in range(now - 1, 0, -1):
        if batch_size % size == 0 and size % devices == 0:
            yield size


def that_fits(candidates: Iterator[int], compile_with: Callable[[int], Any], limit: int) -> str:
    """The first microbatch whose compiled step fits, as advice."""
    for size in candidates:
        try:
            need = needed(compile_with(size))
        except ValueError:  # a fraction of this microbatch has no whole number of examples
            continue
        if need is not None and need <= limit:
            return f"training.microbatch={size} fits ({need / GIB:.2f} GiB)"
    return "no training.microbatch fits"
