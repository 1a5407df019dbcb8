"""Random access to the records of TFRecord files, without reading the files as a whole.

    record = length (uint64) · checksum (4 bytes) · data (length bytes) · checksum (4 bytes)

A checksum is the CRC-32C of what is before it, rotated and shifted. Where the records are is found
once, by a seek per record, and kept in a cache of the user. The checksum of the data is compared
whenever a record is read.
Format: tensorflow.org/tutorials/load_data/tfrecord.
"""

import hashlib
import os
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from checks import user_cache

HEADER, FOOTER = 12, 4
MANY = 1000  # records of a file whose places are worth keeping
MASK = 0xA282EAD8  # of the format


def _checksum(data: bytes) -> int:
    """Compute the checksum that the format stores beside some bytes."""
    import google_crc32c

    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + MASK) & 0xFFFFFFFF


def _kept_at(path: Path) -> Path:
    """Say where the places of the records of a file are kept, as long as it stays the same."""
    stat = path.stat()
    told = f"{path.absolute()} {stat.st_size} {stat.st_mtime_ns}"
    return user_cache() / f"records-{hashlib.sha256(told.encode()).hexdigest()[:32]}.npy"


def _places(path: Path) -> np.ndarray:
    """(start, length) of the data of every record of a file, int64 [n, 2]."""
    kept = _kept_at(path)
    try:
        return np.load(kept, allow_pickle=False)
    except (OSError, ValueError):  # there is none, or half a file
        found = np.asarray(_positions(path), np.int64).reshape(-1, 2)
    if len(found) >= MANY:
        _keep(found, kept)
    return found


def _keep(places: np.ndarray, kept: Path) -> None:
    """Write them as a whole or not at all; without a place to write, they are found again."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=kept.parent, suffix=".tmp", delete=False) as file:
            np.save(file, places)
        os.replace(file.name, kept)
    except OSError:
        return


def _positions(path: Path) -> list[tuple[int, int]]:
    """(start, length) of the data of every record of a file."""
    found: list[tuple[int, int]] = []
    size = path.stat().st_size
    with path.open("rb") as file:
        at = 0
        while at < size:
            file.seek(at)
            header = file.read(HEADER)
            length = struct.unpack("<Q", header[:8])[0] if len(header) == HEADER else size
            if at + HEADER + length + FOOTER > size:
                raise ValueError(
                    f"{path} ends within record {len(found)}: truncated, or no TFRecord"
                )
            if struct.unpack("<I", header[8:])[0] != _checksum(header[:8]):
                raise ValueError(f"{path}: the length of record {len(found)} is damaged")
            found.append((at + HEADER, length))
            at += HEADER + length + FOOTER
    return found


class Records:
    """The records of some files, numbered through."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        found = [_places(path) for path in self.paths]
        self._file = np.repeat(np.arange(len(found)), [len(part) for part in found])
        self._place = np.concatenate([np.zeros((0, 2), np.int64), *found])

    def name(self, number: int) -> str:
        """The file of a record and its number there."""
        file = self._file[number]
        return f"record {number - np.searchsorted(self._file, file)} of {self.paths[file]}"

    def __len__(self) -> int:
        return len(self._file)

    def __getitem__(self, ids: np.ndarray) -> list[bytes]:
        """The records of these numbers; a ValueError names one whose checksum is another."""
        handles: dict[int, int] = {}
        try:
            for number in np.unique(self._file[ids]):
                handles[number] = os.open(self.paths[number], os.O_RDONLY)
            return [self._read(number, handles[self._file[number]]) for number in ids]
        finally:
            for handle in handles.values():
                os.close(handle)

    def _read(self, number: int, handle: int) -> bytes:
        start, length = self._place[number].tolist()
        content = os.pread(handle, length + FOOTER, start)
        data, stored = content[:length], content[length:]
        if len(stored) < FOOTER or struct.unpack("<I", stored)[0] != _checksum(data):
            raise ValueError(f"{self.name(number)} is damaged: its checksum does not fit")
        return data
