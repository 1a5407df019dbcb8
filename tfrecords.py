"""Random access to the records of TFRecord files, without reading the files as a whole.

    record = length (uint64) · checksum (4 bytes) · data (length bytes) · checksum (4 bytes)

Opening reads the lengths only: a seek per record.
Format: tensorflow.org/tutorials/load_data/tfrecord.
"""

import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

HEADER, FOOTER = 12, 4


def _positions(path: Path) -> list[tuple[int, int]]:
    """(start, length) of the data of every record of a file."""
    found, size = [], path.stat().st_size
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
            found.append((at + HEADER, length))
            at += HEADER + length + FOOTER
    return found


class Records:
    """The records of some files, numbered through."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        found = [_positions(path) for path in self.paths]
        self._file = np.repeat(np.arange(len(found)), [len(part) for part in found])
        self._place = np.asarray([place for part in found for place in part], np.int64).reshape(
            -1, 2
        )

    def name(self, number: int) -> str:
        """The file of a record and its number there."""
        file = self._file[number]
        return f"record {number - np.searchsorted(self._file, file)} of {self.paths[file]}"

    def __len__(self) -> int:
        return len(self._file)

    def __getitem__(self, ids: np.ndarray) -> list[bytes]:
        """The records of these numbers."""
        handles: dict[int, int] = {}
        try:
            for number in np.unique(self._file[ids]):
                handles[number] = os.open(self.paths[number], os.O_RDONLY)
            rows = zip(self._file[ids], self._place[ids].tolist(), strict=True)
            return [os.pread(handles[file], length, start) for file, (start, length) in rows]
        finally:
            for handle in handles.values():
                os.close(handle)
