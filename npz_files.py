"""Arrays in .npz files: written as a whole or not at all, read without pickle.

A file is written beside its place and renamed, so a process that is killed leaves the old file or
the new one, never half of one.
"""

import os
import zipfile
import zlib
from pathlib import Path

import numpy as np

Arrays = dict[str, np.ndarray]


def write(path: Path, arrays: Arrays) -> None:
    """Write the arrays by name; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def is_whole(path: Path) -> bool:
    """Whether this is an .npz file up to its last byte, where its table of contents is."""
    return path.is_file() and zipfile.is_zipfile(path)


def read(path: Path, keys: tuple[str, ...]) -> Arrays:
    """All arrays of a file, in memory; objects that would need pickle are refused.

    Raises:
        ValueError: the file is absent, damaged, or lacks one of the keys; names the path.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    if not is_whole(path):
        raise ValueError(f"{path} ({path.stat().st_size} bytes) is not a whole .npz file")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    missing = [key for key in keys if key not in arrays]
    if missing:
        raise ValueError(f"{path} lacks {missing}; its keys are {sorted(arrays)}")
    return arrays
