"""Arrays in .npz and .npy files: written as a whole or not at all, read without pickle.

A file is written beside its place and renamed, so a process that is killed leaves the old file or
the new one, never half of one. Every way in which a file from outside can be damaged ends in one
sentence that names the file and the array.

An array of `MAPPED` bytes or more that is stored as it is, as by np.savez and np.save, stays in the
file: it is an np.memmap, so that all processes of a machine share one copy. In an archive its
checksum is compared before it is used. `taken` and `chunks` read from it without keeping it in
memory, and `part` chooses examples of it without reading them.
"""

import math
import mmap
import os
import struct
import weakref
import zipfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from checks import writing

Arrays = dict[str, np.ndarray]
MAGIC = b"\x93NUMPY"
MAPPED = 2**28  # bytes of an array that is not read into memory
READ = 2**24  # bytes of a file that are read at once
LOCAL_HEADER = struct.Struct("<26x2H")  # of a member of an archive: length of its name, of more
# The file of every map, and its state before the checksum was compared.
_mapped: weakref.WeakKeyDictionary[mmap.mmap, tuple[Path, tuple[int, int, int]]]
_mapped = weakref.WeakKeyDictionary()


def write(path: Path, arrays: dict[str, Any]) -> None:
    """Write arrays, or what np.asarray makes arrays of, by name; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with writing(path), temporary.open("wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def is_whole(path: Path) -> bool:
    """Say whether a file is an .npz archive up to its end, where its table of contents is."""
    return path.is_file() and zipfile.is_zipfile(path)


def read(path: Path, keys: Collection[str], also: Collection[str] | None = None) -> Arrays:
    """Arrays of a file; objects, which need pickle, are refused.

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
    """The array of an .npy file.

    Raises:
        ValueError: the file is absent, of another kind or damaged, or holds objects.
    """
    if not is_array(path):
        raise ValueError(f"{path} {_what_it_is(path, ())}")
    with path.open("rb") as whole:

        def opened() -> IO[bytes]:
            file = open(whole.fileno(), "rb", closefd=False)
            file.seek(0)
            return file

        return _checked(opened, os.fstat(whole.fileno()).st_size, str(path), whole, 0)


def is_array(path: Path) -> bool:
    """Say whether this is an .npy file, by its first bytes."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _array(archive: zipfile.ZipFile, member: str, name: str) -> np.ndarray:
    """One array of an archive."""
    with _damages(name):
        info = archive.getinfo(member)
        start = None
        if info.compress_type == zipfile.ZIP_STORED:
            archive.fp.seek(info.header_offset)
            lengths = LOCAL_HEADER.unpack(archive.fp.read(LOCAL_HEADER.size))
            start = info.header_offset + LOCAL_HEADER.size + sum(lengths)
    return _checked(lambda: archive.open(member), info.file_size, name, archive.fp, start)


def _checked(
    opened: Callable[[], IO[bytes]], size: int, name: str, whole: IO[bytes], start: int | None
) -> np.ndarray:
    """An array, whose header must say what its bytes have room for and whose checksum must fit.

    `start` is where it begins in the open file `whole`; None: it is not stored there as it is.
    """
    with _damages(name):
        state = _state(os.fstat(whole.fileno()))  # before anything is compared
        with opened() as file:
            shape, order, dtype = _header(file)
            header = file.tell()
            size = size - header
        if not dtype.hasobject:
            if size != dtype.itemsize * np.prod(shape, dtype=object):
                raise ValueError(f"{size} bytes for {dtype} {shape}")
            with opened() as file:  # at the end of a member of an archive its checksum is compared
                by_examples = order == "C" or len(shape) == 1  # the numbers of one are together
                if start is not None and size >= MAPPED and by_examples:
                    while start > 0 and file.read(READ):  # an .npy file has no checksum
                        pass
                    mapped = np.memmap(whole, dtype, "r", start + header, shape, order)
                    _mapped[_map_of(mapped)] = Path(whole.name).absolute(), state
                    return mapped
                array = np.lib.format.read_array(file, allow_pickle=False)
                file.read(1)
            return array
    raise ValueError(f"{name} holds objects of Python, which are not read: store numbers instead")


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], Literal["F", "C"], np.dtype]:
    """(shape, order, type) that an array says of itself."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, is_fortran, dtype = np.lib.format.read_array_header_2_0(file)
    return shape, "F" if is_fortran else "C", dtype


class Part:
    """Some examples of an array that stays in its file: shape and type are known, none is read."""

    def __init__(self, whole: np.ndarray, ids: np.ndarray) -> None:
        self.whole, self.ids = whole, ids
        self.dtype, self.shape = whole.dtype, (len(ids), *whole.shape[1:])
        self.ndim, self.size = whole.ndim, math.prod(self.shape)
        self.nbytes = self.size * self.dtype.itemsize

    def __len__(self) -> int:
        return len(self.ids)

    def reshape(self, size: int, *shape: int) -> "Part":
        """Return the same examples in another shape."""
        return Part(self.whole.reshape(len(self.whole), *shape), self.ids)


def part(array: np.ndarray | Part, ids: np.ndarray) -> np.ndarray | Part:
    """Those examples of an array: in memory if it is, else in the file."""
    if isinstance(array, Part):
        return Part(array.whole, array.ids[ids])
    return Part(array, ids) if is_mapped(array) else array[ids]


def is_mapped(array: np.ndarray | Part) -> bool:
    """Say whether an array, or a part of one, stays in its file."""
    return isinstance(array, Part) or _map_of(array) is not None


def taken(array: np.ndarray | Part, ids: np.ndarray) -> np.ndarray:
    """Those examples of an array, in memory; the pages of a file that were read are given back.

    Raises:
        ValueError: the file was written anew since its checksum was compared.
    """
    if isinstance(array, Part):
        ids, array = array.ids[ids], array.whole
    _check_unchanged(array)
    found = np.asarray(array[ids])
    _give_back(array)
    return found


def chunks(array: np.ndarray | Part) -> Iterator[np.ndarray]:
    """All examples of an array in turn, about `READ` bytes at a time."""
    number = max(READ * len(array) // max(array.nbytes, 1), 1)
    for first in range(0, len(array), number):
        if isinstance(array, Part):
            yield taken(array, np.arange(first, min(first + number, len(array))))
        else:
            yield array[first : first + number]
            _give_back(array)


def _map_of(array: np.ndarray | None) -> mmap.mmap | None:
    """The map of a file that an array is a view of; None for one in memory."""
    while isinstance(array, np.ndarray):
        array = array.base
    return array if isinstance(array, mmap.mmap) else None


def _check_unchanged(array: np.ndarray) -> None:
    """Refuse a file whose time or size is another: what is in it now was never checked."""
    found = _map_of(array)
    if found is None:
        return
    path, then = _mapped[found]
    if not (path.exists() and _state(path.stat()) == then):
        raise ValueError(f"{path} has changed while it was in use: start again")


def _state(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino


def _give_back(array: np.ndarray) -> None:
    """Let the system take the pages of a file, which else count as memory of this process."""
    if (found := _map_of(array)) is not None:
        found.madvise(mmap.MADV_DONTNEED)


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
