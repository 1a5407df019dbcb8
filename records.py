"""Per-example evaluation rows: append, know what is missing, mean ± standard error.

A row is one JSON object on one line of `rows.jsonl`, identified by its key (estimator, protocol,
step, split, index, repeat, identity). The identity is a digest of the parameters, the data and the
settings that the value depends on. With several processes each has a file of its own,
`rows-<h>.jsonl`; all are read. Lines are appended batch by batch, so a killed evaluation loses at
most the batch in flight. The disk is made to keep them once a second and by `sync`: a power cut may
cost the last ones. Every row ends with a checksum. A half-written last line, damaged rows, and rows
of older versions, which lack the identity, are left out on reading, and evaluated anew.
"""

import functools
import itertools
import json
import logging
import math
import os
import sys
import time
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

import json_lines
from checks import writing

Row = dict[str, Any]
GROUP = ("estimator", "protocol", "step", "split", "identity")  # the fields that a table shares
KEY = ("estimator", "protocol", "step", "split", "index", "repeat", "identity")
CHECKSUM = "crc32"
SYNC = 1.0  # seconds between two waits for the disk
_group_of, _key_of = itemgetter(*GROUP), itemgetter(*KEY)
Key = tuple
logger = logging.getLogger("fokker")


class Summary(NamedTuple):
    """Mean over examples of the mean over repeats, its standard error, and the counts."""

    mean: float
    standard_error: float
    examples: int
    repeats: int


class Running:
    """Mean and standard error over examples of the mean over repeats, renewed by each new row."""

    def __init__(self) -> None:
        self.rows = 0
        self._examples: dict[int, tuple[float, int]] = {}  # sum and number of the repeats
        self._total = self._squares = 0.0  # over examples, of their means and of the squares

    def add(self, index: int, value: float) -> None:
        """Take a row of an example."""
        total, number = self._examples.get(index, (0.0, 0))
        before, now = total / max(number, 1), (total + value) / (number + 1)
        self._examples[index] = total + value, number + 1
        self._total += now - before
        self._squares += now**2 - before**2
        self.rows += 1

    def so_far(self, name: str) -> dict[str, float]:
        """Mean and standard error for the log of what is under way."""
        n = len(self._examples)
        mean = self._total / n
        variance = max(self._squares - n * mean**2, 0.0) / (n - 1) if n > 1 else math.nan
        return {name: mean, "s.e.": math.sqrt(variance / n)}


class _Column:
    """The values of one field, in an array of numbers as long as all are numbers of one kind.

    Kinds: integers, floats, equally long lists of floats; a list of objects for anything else.
    """

    def __init__(self, absent: int) -> None:
        """Begin with as many rows that lack the field."""
        self._values: array | list = [ABSENT] * absent
        self._width: int | None = None  # of lists of floats in one array

    def extend(self, new: list[Any]) -> None:
        """Take the values of the next rows; ABSENT where they have none."""
        if not len(self):
            self._begin(new[0])
        if self._width is None:
            flat = new
        else:
            alike = {type(one) is list and len(one) for one in new} == {self._width}
            flat = list(itertools.chain.from_iterable(new)) if alike else [ABSENT]
        if not self._takes(flat):
            self._values, self._width, flat = list(self), None, new
        if isinstance(self._values, list):  # equal texts are one object
            flat = [sys.intern(one) if type(one) is str else one for one in flat]
        self._values.extend(flat)

    def _takes(self, new: list[Any]) -> bool:
        """Say whether all of these are numbers of the kind of the array."""
        if isinstance(self._values, list):
            return True
        if self._values.typecode == "d":
            return set(map(type, new)) == {float}
        return set(map(type, new)) == {int} and -(2**63) <= min(new) <= max(new) < 2**63

    def _begin(self, first: Any) -> None:
        """Choose the kind of the first value."""
        if type(first) is list and first:
            self._values, self._width = array("d"), len(first)
        elif type(first) in TYPES:
            self._values = array(TYPES[type(first)])

    def __len__(self) -> int:
        return len(self._values) // (self._width or 1)

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Any:
        if self._width is None:
            return self._values[number]
        return list(self._values[number * self._width : (number + 1) * self._width])

    def is_complete(self) -> bool:
        """Say whether every row has the field."""
        return not isinstance(self._values, list) or ABSENT not in self._values

    def as_array(self) -> np.ndarray:
        """All values, [n] or [n, width]."""
        found = np.asarray(self._values, object if isinstance(self._values, list) else None)
        return found if self._width is None else found.reshape(len(self), self._width)


ABSENT = object()
TYPES = {int: "q", float: "d"}
WAITING = 1000  # rows of a table that are not yet in its columns


class Table(Sequence[Row]):
    """The rows of one estimator, protocol, step, split and identity, held in columns.

    `table[i]` is a row, `table["step"]` one of the shared fields.
    """

    def __init__(self, shared: Row) -> None:
        self.shared = shared
        self._columns: dict[str, _Column] = {}
        self._there: dict[int, set[int]] = {}  # repeat → examples
        self._number = 0
        self._waiting: list[Row] = []

    def __len__(self) -> int:
        return self._number

    @overload
    def __getitem__(self, which: int) -> Row: ...
    @overload
    def __getitem__(self, which: slice) -> list[Row]: ...
    @overload
    def __getitem__(self, which: str) -> Any: ...
    def __getitem__(self, which: int | slice | str) -> Any:
        if isinstance(which, str):
            return self.shared[which]
        if isinstance(which, slice):
            return [self[number] for number in range(self._number)[which]]
        place = range(self._number)[which]
        found = {name: column[place] for name, column in self._settled().items()}
        return self.shared | {name: value for name, value in found.items() if value is not ABSENT}

    def has(self, index: int, repeat: int) -> bool:
        """Say whether there is a row of this example and repeat."""
        return index in self._there.get(repeat, ())

    def has_repeat(self, repeat: int) -> bool:
        """Say whether there is a row of this repeat."""
        return bool(self._there.get(repeat))

    def lacks(self, indices: Iterable[int], repeat: int) -> bool:
        """Say whether one of these examples has no row of this repeat."""
        return not self._there.get(repeat, set()).issuperset(indices)

    def add(self, row: Row) -> None:
        """Take a row of this table; one that is there already stays."""
        index, there = row["index"], self._there.setdefault(row["repeat"], set())
        if index in there:
            return
        there.add(index)
        self._waiting.append(row)
        self._number += 1
        if len(self._waiting) == WAITING:
            self._settled()

    def _settled(self) -> dict[str, _Column]:
        """The columns, when those rows that waited have come into them."""
        new, self._waiting = self._waiting, []
        for name in dict.fromkeys(itertools.chain.from_iterable(new)):
            if name not in self.shared and name not in self._columns:
                self._columns[name] = _Column(self._number - len(new))
        for name, column in self._columns.items() if new else ():
            column.extend([row.get(name, ABSENT) for row in new])
        return self._columns

    def present(self, field: str) -> list[Any]:
        """The values of a field in the rows that have it."""
        return [value for value in self._settled().get(field, ()) if value is not ABSENT]

    def knows(self, field: str) -> bool:
        """Say whether there are rows and all have the field."""
        columns = self._settled()
        return field in columns and columns[field].is_complete()

    def column(self, field: str) -> np.ndarray:
        """The values of a field, [n] or [n, width]."""
        return self._settled()[field].as_array() if self._number else np.empty(0)


def present(rows: Sequence[Row], field: str) -> list[Any]:
    """The values of a field in the rows that have it."""
    if isinstance(rows, Table):
        return rows.present(field)
    return [row[field] for row in rows if field in row]


def values(rows: Sequence[Row], field: str) -> np.ndarray:
    """The values of a field that all rows have, [n] or [n, width]."""
    if isinstance(rows, Table):
        return rows.column(field)
    return np.asarray([row[field] for row in rows])


class Records:
    """The rows of one evaluation folder; process `host` appends to its own file."""

    def __init__(self, folder: Path, host: int = 0) -> None:
        self.path = folder / (f"rows-{host}.jsonl" if host else "rows.jsonl")
        self._tables: dict[tuple, Table] = {}
        self._synced = 0.0  # when the disk last had all rows
        self._appended = False
        for path in sorted(folder.glob("rows*.jsonl"), reverse=True):  # of equal keys the first is
            self._read(path)  # taken: that of the first process

    def _read(self, path: Path) -> None:
        older = 0
        for row in json_lines.read(path, _is_row):
            if row.pop(CHECKSUM, None) is None:
                older += 1
            else:
                self._table_of(row).add(row)
        if older:
            _say_older(path, older)

    def _table_of(self, row: Row) -> Table:
        key = _group_of(row)
        if key not in self._tables:
            self._tables[key] = Table(dict(zip(GROUP, key, strict=True)))
        return self._tables[key]

    def table(self, shared: Row) -> Table:
        """The rows with these values of the shared fields; an empty table where there are none."""
        return self._table_of(shared)

    def tables(self, **shared: Any) -> list[Table]:
        """All tables whose shared fields have these values, in the order of their first rows."""
        return [
            table
            for table in self._tables.values()
            if len(table) and all(table[name] == value for name, value in shared.items())
        ]

    @property
    def rows(self) -> dict[Key, Row]:
        """Every row by its key, as dictionaries: for few rows."""
        return {key_of(row): row for table in self._tables.values() for row in table}

    def append(self, rows: Iterable[Row]) -> list[Row]:
        """Write new rows to disk; rows that are already there are left as they are.

        Returns:
            The rows that are new.
        """
        new = self.missing({key_of(row): row for row in rows}.values())
        for row in new:
            if not math.isfinite(row["value"]):
                raise ValueError(
                    f"row {key_of(row)} of {self.path}: value={row['value']} is not finite"
                )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self._appended:
            _cut_half_a_line(self.path)
            self._appended = True
        with writing(self.path), self.path.open("ab") as file:
            file.writelines(map(_line, new))
            file.flush()
            if time.monotonic() - self._synced >= SYNC:
                os.fsync(file.fileno())
                self._synced = time.monotonic()
        for row in new:
            self._table_of(row).add(row)
        return new

    def sync(self) -> None:
        """Wait until the disk has all rows."""
        if self.path.is_file():
            with writing(self.path), self.path.open("ab") as file:
                os.fsync(file.fileno())

    def missing(self, rows: Iterable[Row]) -> list[Row]:
        """Those rows, given by their key fields, that are not there yet."""
        return [row for row in rows if not self._table_of(row).has(row["index"], row["repeat"])]


def stored(folder: Path) -> list[Table]:
    """The tables of an evaluation folder, to read only: files are parsed again where they changed.

    A report, its figures and its summaries are made from the same rows one after another.
    """
    paths = sorted(folder.glob("rows*.jsonl"))
    states = [(path, path.stat()) for path in paths]
    known_by = tuple((path, s.st_size, s.st_mtime_ns, s.st_ino) for path, s in states)
    return list(_parsed(folder, known_by))


@functools.lru_cache(maxsize=1)
def _parsed(folder: Path, known_by: tuple[tuple, ...]) -> tuple[Table, ...]:
    del known_by
    return tuple(Records(folder).tables())


def _is_row(row: Row, line: bytes) -> bool:
    return _is_intact_line(line) or is_older(row)


def _line(row: Row) -> bytes:
    """The line of a row, with the CRC-32 of its text without checksum."""
    text = json_lines.text_of(_without_checksum(row) if CHECKSUM in row else row)
    return b'%b, "%b": "%08x"}\n' % (text[:-1], CHECKSUM.encode(), zlib.crc32(text))


def _is_intact_line(line: bytes) -> bool:
    """Say whether a line is as it was written: without reading its text anew."""
    text, _, checksum = line.rpartition(b', "%b": "' % CHECKSUM.encode())
    return checksum == b'%08x"}\n' % zlib.crc32(text + b"}")


def with_checksum(row: Row) -> Row:
    """The row with the CRC-32 of its text."""
    content = _without_checksum(row)
    return content | {CHECKSUM: _checksum(content)}


def is_intact(row: Row) -> bool:
    """Say whether a row is as it was when its checksum was taken."""
    return row.get(CHECKSUM) == _checksum(_without_checksum(row))


def is_older(row: Row) -> bool:
    """Say whether a row was written before rows had identities and checksums."""
    return row.keys() >= set(KEY) - {"identity"} and not row.keys() & {"identity", CHECKSUM}


def _without_checksum(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != CHECKSUM}


def _checksum(row: Row) -> str:
    return f"{zlib.crc32(json.dumps(row).encode()):08x}"


@functools.cache  # once for each file
def _say_older(path: Path, number: int) -> None:
    logger.warning(
        "%s: %d rows of an older version do not say which parameters and data they are of; they "
        "stay in the file, and are computed anew and not reported",
        path, number,
    )  # fmt: skip


def _cut_half_a_line(path: Path) -> None:
    """So that the next append starts on a line of its own."""
    if not path.is_file():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)


def key_of(row: Row) -> Key:
    """The identity of a row."""
    return _key_of(row)


def example_means(rows: Sequence[Row], field: str = "value") -> dict[int, float]:
    """The mean over repeats of every example, by its index."""
    if not len(rows):
        return {}
    examples, _, means = _by_example(values(rows, "index"), values(rows, field))
    return dict(zip(examples.tolist(), means.tolist(), strict=True))


def _by_example(index: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(examples, number of the repeats, means over them [n, ...]), in order of the examples.

    They depend on the values, not on the order in which these came.
    """
    order = np.lexsort((np.reshape(found, (len(found), -1))[:, 0], index))
    examples, first, number = np.unique(index[order], return_index=True, return_counts=True)
    sums = np.add.reduceat(found[order].astype(np.float64), first, axis=0)
    return examples, number, sums / np.reshape(number, (-1, *[1] * (found.ndim - 1)))


def largest_share(rows: Sequence[Row]) -> float:
    """The largest draw of a bound over Σ|value| of its rows; 0 where rows do not tell."""
    total = float(np.abs(values(rows, "value")).sum()) if len(rows) else 0.0
    return max(present(rows, "largest"), default=0.0) / total if total else 0.0


def summarize(rows: Sequence[Row], field: str = "value") -> Summary:
    """Mean ± s.e. over examples; the repeats of an example are averaged first.

    The examples are the independent draws: repeats share their image, so they do not count as n.
    """
    if not len(rows):
        raise ValueError("no rows to summarize")
    return summarize_values(values(rows, "index"), values(rows, field))


def summarize_values(index: np.ndarray, found: np.ndarray) -> Summary:
    """The same of values [n] and of their examples [n]."""
    examples, number, means = _by_example(index, found)
    mean, error = _mean_and_error(means)
    return Summary(float(mean), float(error), len(examples), int(number.min()))


def summarize_columns(index: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean, standard error), [width] each, of every column of values [n, width]."""
    return _mean_and_error(_by_example(index, found)[2])


def _mean_and_error(means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean, standard error) over the first axis."""
    n, mean = len(means), means.mean(axis=0)
    square = ((means - mean) ** 2).sum(axis=0)
    return mean, np.sqrt(square / (n - 1) / n) if n > 1 else np.full_like(mean, np.nan)
