"""The examples that `DensityModel` keeps out of training, and the file that holds all of them."""

from pathlib import Path

import numpy as np

import npz_files
from checkpoints import whole_steps
from checks import require

HELD_OUT = 0.1  # share of the examples by which the best of the checkpoints is chosen
MOST_HELD_OUT = 2000  # examples


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
