"""What a `fit` of `DensityModel` or `DensityEnsemble` needs beside a run.

The examples that it keeps out of training and the file that holds all of them, its folder, its seed
and its progress.
"""

import contextlib
import logging
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import npz_files
from checkpoints import whole_steps
from checks import require

HELD_OUT = 0.1  # share of the examples by which the best of the checkpoints is chosen
MOST_HELD_OUT = 2000  # examples
LARGEST_SEED = 2**32 - 1
FOLDER = "fokker-"  # of a model without a folder of its own: the start of its name
logger = logging.getLogger("fokker")


def parts(number: int, count: int, seed: int) -> list[np.ndarray]:
    """Numbers of examples, drawn at random: disjoint parts of equal size, a tenth at most."""
    each = min(max(round(HELD_OUT * number), 1), number // count, MOST_HELD_OUT)
    drawn = np.random.default_rng([seed, 0, 0, 4]).permutation(number)
    return [np.sort(drawn[k * each : (k + 1) * each]) for k in range(count)]


def divided(X: np.ndarray, context: np.ndarray | None, held_out: np.ndarray) -> npz_files.Arrays:
    """The arrays of data.npz: for training, and to choose the checkpoint by."""
    allowed = f"numbers of some, not all, of the {len(X)} examples, each once"
    fits = held_out.ndim == 1 and held_out.dtype.kind in "iu" and 0 < len(held_out) < len(X)
    fits = fits and held_out.min() >= 0 and held_out.max() < len(X)
    fits = fits and len(np.unique(held_out)) == len(held_out)
    require(fits, "held_out", held_out.tolist(), allowed)
    parts = {"train": np.setdiff1d(np.arange(len(X)), held_out), "test": np.sort(held_out)}
    arrays = {"x": X} | ({} if context is None else {"context": np.asarray(context)})
    for name, array in arrays.items():
        require(len(array) == len(X), name, array.shape, f"one for each of {len(X)} examples")
    return {f"{name}_{part}": a[ids] for name, a in arrays.items() for part, ids in parts.items()}


def keep(path: Path, arrays: npz_files.Arrays) -> None:
    """Write data.npz, or see that it holds the same: those of another model are not lost."""
    if path.exists() and whole_steps(path.parent):
        stored = npz_files.read(path, ())
        same = stored.keys() == arrays.keys() and all(
            np.array_equal(stored[name], array) for name, array in arrays.items()
        )
        allowed = "a new folder, as this one holds a model of other data or of another random_state"
        require(same, "workdir", str(path.parent), allowed)
    npz_files.write(path, arrays)


def folder_of(owner: Any, workdir: str | Path | None) -> Path:
    """Return the folder of a model: the one it was given, else one that ends with the model."""
    folder = Path(workdir or tempfile.mkdtemp(prefix=FOLDER)).absolute()
    if workdir is None:
        weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    return folder


def check_seed(seed: object, largest: int) -> None:
    """Refuse a random_state that is no number for a seed."""
    fits = isinstance(seed, int | np.integer) and 0 <= seed <= largest
    require(bool(fits), "random_state", seed, f"a whole number, 0 to {largest}")


def plain(value: Any) -> Any:
    """A value without the types of NumPy, whose texts are no values of fields."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return tuple(map(plain, value)) if isinstance(value, list | tuple) else value


@contextlib.contextmanager
def told() -> Iterator[None]:
    """A block in which what the program says is written."""
    handler, level, propagate = logging.StreamHandler(), logger.level, logger.propagate
    if not logger.hasHandlers():
        logger.addHandler(handler)
        logger.propagate = False  # libraries may add a handler to the root meanwhile
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.propagate = propagate
        logger.removeHandler(handler)
