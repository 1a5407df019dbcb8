"""CRC-32 of every leaf of a state: written beside a checkpoint, compared when it is read."""

import hashlib
import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

import json_files

FILE = "crc32.json"  # in the folder of Orbax's item
KEY = "crc32"  # in the metadata of a checkpoint: FILE, or the checksums themselves in an older one


def by_path(tree: Any) -> dict[str, Any]:
    """Every leaf by its path, as params.Dense_0.kernel."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def of(tree: Any) -> dict[str, str]:
    """Dtype and CRC-32 of every leaf: read back as another dtype, it is not to be compared."""
    arrays = {path: np.ascontiguousarray(leaf) for path, leaf in by_path(tree).items()}
    with ThreadPoolExecutor() as threads:  # zlib leaves Python's lock
        sums = threads.map(lambda array: zlib.crc32(array.view(np.uint8).data), arrays.values())
        named = zip(arrays.items(), sums, strict=True)
        return {path: f"{array.dtype} {crc:08x}" for (path, array), crc in named}


def digest(tree: Any) -> str:
    """Sixteen hexadecimal digits of the checksums of all leaves: equal for equal numbers."""
    text = json.dumps(of(tree), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Handler(ocp.PyTreeCheckpointHandler):
    """Orbax's handler of trees, which also writes the checksums of the leaves.

    The caller waits until the leaves are on the host. The thread that writes computes the
    checksums. Their file gets its final name together with the values, or never.
    """

    async def async_save(self, directory: Any, args: "Save") -> list[ocp.future.Future]:
        """Fetch the leaves to the host, then return the writes that are under way."""
        writes = list(await super().async_save(directory, args=args) or [])
        if jax.process_index() == 0:
            # Where this is a view, JAX does not give the memory of the leaf to the next step.
            tree = jax.tree.map(np.asarray, args.item)
            write = self._write(directory, tree)
            writes.append(ocp.future.CommitFutureAwaitingContractedSignals(write, name="checksums"))
        return writes

    async def _write(self, directory: Any, tree: Any) -> None:
        (directory / FILE).write_text(json.dumps(of(tree)))


@ocp.args.register_with_handler(Handler, for_save=True)
class Save(ocp.args.PyTreeSave):
    """The tree that a `Handler` saves; Orbax finds the handler by the type of its arguments."""


@ocp.args.register_with_handler(Handler, for_restore=True)
class Restore(ocp.args.PyTreeRestore):
    """The tree that a `Handler` restores, by shapes and dtypes."""


def read(folder: Path, metadata: dict[str, Any]) -> dict[str, str] | None:
    """The checksums of all leaves of a checkpoint; None where older code has written none.

    Args:
        folder: of Orbax's item.
        metadata: of the checkpoint. It says that they have a file, or holds them.

    Raises:
        ValueError: their file is damaged.
        OSError: it is lost, or cannot be opened.
    """
    found = metadata.get(KEY)
    return json_files.read(folder / FILE) if found == FILE else found
