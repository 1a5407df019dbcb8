"""Tensors of a PyTorch file (`torch.save`, zip format) as NumPy arrays, without PyTorch.

The file is a zip archive: `*/data.pkl` describes nested containers, `*/data/<key>` holds the raw
bytes of each storage. The description is a pickle, a language that can call any function: here it
may call the names below, all of them this file's own, and whatever else it asks for is an
error before anything runs.
Format: pytorch.org/docs, notes on serialization.
"""

import collections
import math
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

STORAGES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "<i1",
    "ByteStorage": "<u1",
    "BoolStorage": "?",
}


class _Callable:
    """The base of what a description may call; it holds no state, so that no file can change it."""

    __slots__ = ()


class _Tensor(_Callable):
    """The array that torch._utils._rebuild_tensor_v2 describes."""

    __slots__ = ()

    def __call__(
        self, storage: np.ndarray, offset: int, shape: tuple, stride: tuple, *_: Any
    ) -> np.ndarray:
        """A copy of the view; each number of the storage is used at most once."""
        numbers = (offset, *shape, *stride)
        if len(shape) != len(stride) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError(f"a tensor has offset {offset}, shape {shape}, stride {stride}")
        last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        if 0 not in shape and (last >= storage.size or math.prod(shape) > storage.size):
            raise ValueError(f"a tensor of shape {shape} lies outside its storage")
        strides = [s * storage.itemsize for s in stride]
        view = np.lib.stride_tricks.as_strided(storage[offset:], shape, strides, writeable=False)
        return np.array(view)


class _Parameter(_Callable):
    """The tensor inside a torch.nn.Parameter."""

    __slots__ = ()

    def __call__(self, tensor: np.ndarray, *_: Any) -> np.ndarray:
        """Return the tensor, and ignore all other arguments."""
        return tensor


class _StorageType(str):
    """NumPy dtype of a type of storage."""

    __slots__ = ()


NAMES = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor(),
    ("torch._utils", "_rebuild_parameter"): _Parameter(),
    **{("torch", name): _StorageType(dtype) for name, dtype in STORAGES.items()},
}


class _Reader(pickle.Unpickler):
    """Unpickler of one archive that knows the names above and no others."""

    def __init__(self, archive: zipfile.ZipFile, description: str) -> None:
        super().__init__(archive.open(description))
        self._archive, self._folder = archive, description.removesuffix("data.pkl")
        self._storages: dict[tuple[str, str], np.ndarray] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in NAMES:
            raise ValueError(f"it asks for {module}.{name}, which no tensor needs")
        return NAMES[module, name]

    def persistent_load(self, reference: Any) -> np.ndarray:
        kind, storage_type, key, _, size = reference
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            raise ValueError(f"unknown reference {kind!r}")
        if (key, storage_type) not in self._storages:
            dtype = np.dtype(str(storage_type))
            member = self._archive.getinfo(f"{self._folder}data/{key}")
            if member.file_size != size * dtype.itemsize:
                raise ValueError(f"storage {key} has {member.file_size} bytes for {size} {dtype}")
            self._storages[key, storage_type] = np.frombuffer(self._archive.read(member), dtype)
        return self._storages[key, storage_type]


# What the two libraries raise for damaged files.
DAMAGES = (
    pickle.UnpicklingError, ValueError, KeyError, TypeError, AttributeError, IndexError, EOFError,
    NotImplementedError, RuntimeError, MemoryError, OverflowError, zlib.error,
)  # fmt: skip


def read(path: Path) -> Any:
    """The containers of the file, with arrays in place of tensors.

    Raises:
        ValueError: the file is damaged, of the format before PyTorch 1.6, or asks for anything but
            tensors and containers.
    """

    def refuse(reason: Any) -> NoReturn:
        raise ValueError(f"{path} is no PyTorch checkpoint that can be read: {reason}") from None

    try:
        with zipfile.ZipFile(path) as archive:
            packed = [m.filename for m in archive.infolist() if m.compress_type]
            if packed:
                refuse(f"{packed[0]} is compressed, which PyTorch does not do")
            damaged = archive.testzip()
            if damaged is not None:
                refuse(f"{damaged} is damaged")
            names = [n for n in archive.namelist() if n.split("/")[1:] == ["data.pkl"]]
            if len(names) != 1:
                refuse("the archive has no data.pkl")
            return _Reader(archive, names[0]).load()
    except zipfile.BadZipFile as error:
        refuse(f"{error} (truncated, or written before PyTorch 1.6: save it anew)")
    except DAMAGES as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        refuse(error)
