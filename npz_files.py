"""Arrays in .npz and .npy files: written as a whole or not at all, read without pickle.

A file is written beside its place and renamed, so a process that is killed leaves the old file or
the new one, never half of one. Every way in which a file from outside can be damaged ends in one
sentence that names the file and the array.
"""

import os
import zipfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

Arrays = dict[str, np.ndarray]
MAGIC = b"\x93NUMPY"


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
    """Say whether a file is an .npz archive up to its end, where its table of contents is."""
    return path.is_file() and zipfile.is_zipfile(path)


def read(path: Path, keys: Collection[str], also: Collection[str] | None = None) -> Arrays:
    """Arrays of a file, in memory; objects, which need pickle, are refused.

    Args:
        path: the file.
        keys: arrays that it must have.
        also: arrays that are read if they are there; None: all of them.

    Raises:
        ValueError: the file is absent, of another kind or damaged, or lacks one of the keys; names
            the path and the array.
    """
    if not is_whole(path):
        raise ValueError(f"{path} {_what_it_is(path, keys)}")
    with _damages(str(path)):
        archive = zipfile.ZipFile(path)
    with archive:
        with _damages(str(path)):
            for member in archive.infolist():
                archive.open(member).close()  # compares its name, which is stored twice
                if member.comment:  # NumPy writes none; a damaged length hides the next members
                    raise zipfile.BadZipFile(f"{member.filename} has a comment")
        return _arrays(archive, path, keys, also)


@contextmanager
def _damages(name: str) -> Iterator[None]:
    """A block in which a damaged file raises a ValueError that names what is read.

    Errors of the file system, which name the file themselves, are passed on.
    """
    try:
        yield
    except Exception as error:  # what zipfile, zlib and NumPy raise for damages is not documented
        if isinstance(error, OSError) and error.filename is not None:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name} is damaged and cannot be read: {reason:.200}") from None


def names(path: Path) -> list[str]:
    """Names of the arrays of a whole file."""
    with zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def _arrays(
    archive: zipfile.ZipFile, path: Path, keys: Collection[str], also: Collection[str] | None
) -> Arrays:
    found = {n.removesuffix(".npy"): n for n in archive.namelist() if n.endswith(".npy")}
    missing = [key for key in keys if key not in found]
    if missing:
        raise ValueError(f"{path} lacks {missing}; its keys are {sorted(found)}")
    wanted = found if also is None else [key for key in found if key in {*keys, *also}]
    return {key: _array(archive, found[key], f"{key} of {path}") for key in wanted}


def read_array(path: Path) -> np.ndarray:
    """The array of an .npy file, in memory.

    Raises:
        ValueError: the file is absent, of another kind or damaged, or holds objects.
    """
    if not is_array(path):
        raise ValueError(f"{path} {_what_it_is(path, ())}")
    return _checked(lambda: path.open("rb"), path.stat().st_size, str(path))


def is_array(path: Path) -> bool:
    """Say whether this is an .npy file, by its first bytes."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _array(archive: zipfile.ZipFile, member: str, name: str) -> np.ndarray:
    """One array of an archive."""
    with _damages(name):
        size = archive.getinfo(member).file_size
    return _checked(lambda: archive.open(member), size, name)


def _checked(opened: Callable[[], IO[bytes]], size: int, name: str) -> np.ndarray:
    """An array, whose header must say what its bytes have room for and whose checksum must fit."""
    with _damages(name):
        with opened() as file:
            shape, dtype = _header(file)
            size = size - file.tell()
        if not dtype.hasobject:
            if size != dtype.itemsize * np.prod(shape, dtype=object):
                raise ValueError(f"{size} bytes for {dtype} {shape}")
            with opened() as file:
                array = np.lib.format.read_array(file, allow_pickle=False)
                file.read(1)  # at the end of a member of an archive its checksum is compared
            return array
    raise ValueError(f"{name} holds objects of Python, which are not read: store numbers instead")


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """(shape, type) that an array says of itself."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    return shape, dtype


def _what_it_is(path: Path, keys: Collection[str]) -> str:
    """Say what is there in place of an archive, and what to do."""
    arrays = ", ".join(f"{key}=..." for key in keys)
    if path.is_dir():
        return "is a folder: need an .npz file"
    if not path.exists():
        return "does not exist"
    if not path.is_file():
        return "is no file that can be read twice, as a pipe: need an .npz file"
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        return "is empty (0 bytes): write it again"
    if start.startswith(b"PK"):
        size = path.stat().st_size
        return f"is truncated: {size} bytes without the end of the archive; copy it again"
    if start.startswith(MAGIC):
        return f"is a single array (.npy): need an archive, by np.savez(FILE, {arrays})"
    if all(byte >= 32 or byte in b"\t\n\r" for byte in start):
        return f"is a text, as .csv: need an archive of arrays, by np.savez(FILE, {arrays})"
    return f"is no .npz file: need an archive of arrays, by np.savez(FILE, {arrays})"
