"""Random access to the records of ArrayRecord files, in which tensorflow-datasets may keep a set.

The library compares a checksum of every chunk that it reads.
Format: github.com/google/array_record.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np


class ArrayRecords:
    """The records of some files, numbered through."""

    def __init__(self, paths: Sequence[Path]) -> None:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self.paths = list(paths)
        try:
            self._source = ArrayRecordDataSource([str(path) for path in paths])
        except RuntimeError as error:
            raise ValueError(f"{paths[0]} and others are no ArrayRecords: {error}") from None

    def name(self, number: int) -> str:
        """The number of a record in all of these files."""
        return f"record {number} of {self.paths[0].parent}"

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, ids: np.ndarray) -> list[bytes]:
        """The records of these numbers; a ValueError names one that is damaged."""
        try:
            return self._source.__getitems__([int(number) for number in ids])
        except RuntimeError:
            return [self._one(int(number)) for number in ids]

    def _one(self, number: int) -> bytes:
        try:
            return self._source.__getitems__([number])[0]
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{self.name(number)} is damaged: {reason:.200}") from None
