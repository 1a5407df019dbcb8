"""Read arrays from a file: x, classes y and contexts, as two splits or as one to be divided.

.npz   x_train and x_test, or x (x_train) alone, and perhaps test_ids, the examples for the test
       y_train, y_test or y: classes;   context_train, context_test or context
.npy   x
"""

from pathlib import Path

import numpy as np

import npz_files
from checks import FieldError, require
from real_arrays import check_finite, is_real
from splits import DataConfig, Origin, Rows, divided


def stored_rows(config: DataConfig, path: Path) -> tuple[dict[str, Rows], Origin]:
    """The rows of "train" and "test", as stored or as they are divided, and where they are from.

    Raises:
        ValueError: the file is absent, damaged or lacks x, or `data.test_ids` does not fit it.
    """
    if path.suffix in (".csv", ".tsv", ".parquet"):
        raise FieldError("data.path", str(path), "tables are read by data.dataset='table'")
    try:
        arrays = {"x": npz_files.read_array(path)} if npz_files.is_array(path) else _archive(path)
    except ValueError as error:
        raise ValueError(f"data.path: {error}") from None
    left_out = tuple(f"array {name}" for name, array in arrays.items() if array is None)
    if "x_test" in arrays:
        require(config.test_ids == "", "data.test_ids", config.test_ids, f"'': {path} has x_test")
        rows = {split: _rows(path, arrays, f"_{split}") for split in ("train", "test")}
        return rows, Origin(f"arrays x_train and x_test of {path}", left_out)
    whole = _rows(path, arrays, "_train" if "x_train" in arrays else "")
    if is_real(whole.x):
        check_finite(whole.name, whole.x)  # as they are numbered in the file
    return divided(config, whole, arrays.get("test_ids"), Origin(f"{path}", left_out))


def _archive(path: Path) -> dict[str, np.ndarray | None]:
    """The arrays of an archive that are known; None for the others."""
    names = npz_files.names(path) if npz_files.is_whole(path) else []
    wanted: tuple[str, ...]
    more: tuple[str, ...]
    if "x_test" in names or not {"x", "x_train"} & set(names):
        wanted, more = ("_train", "_test"), ()
    else:
        wanted, more = ("_train",) if "x_train" in names else ("",), ("test_ids",)
    keys = [f"x{split}" for split in wanted]
    beside = [f"{kind}{split}" for kind in ("y", "context") for split in wanted]
    return dict.fromkeys(names) | npz_files.read(path, keys, [*beside, *more])


def _rows(path: Path, arrays: dict[str, np.ndarray | None], split: str) -> Rows:
    x, y, context = (arrays.get(f"{kind}{split}") for kind in ("x", "y", "context"))
    if not x.ndim:
        raise ValueError(f"x{split} of {path} is a single number: need examples [n, *d]")
    for kind, array in (("y", y), ("context", context)):
        if array is not None and (not array.ndim or len(array) != len(x)):
            raise ValueError(
                f"{kind}{split} of {path} is {array.dtype} {array.shape}: need one for each image "
                f"or example of x{split}, {len(x)}"
            )
    return Rows(f"x{split} of {path}", x, y, context)
