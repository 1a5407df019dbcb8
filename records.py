"""Per-example evaluation rows: append, know what is missing, mean ± standard error.

A row is one JSON object on one line of `rows.jsonl`, identified by its key (estimator, protocol,
step, split, index, repeat, identity). The identity is a digest of the parameters, the data and the
settings that the value depends on. With several processes each has a file of its own,
`rows-<h>.jsonl`; all are read. Lines are appended and flushed to disk batch by batch, so a killed
evaluation loses at most the batch in flight. Every row ends with a checksum. A half-written last
line, damaged rows, and rows of older versions, which lack the identity, are left out on reading,
and evaluated anew.
"""

import functools
import json
import logging
import math
import os
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import json_lines

Row = dict[str, Any]
KEY = ("estimator", "protocol", "step", "split", "index", "repeat", "identity")
CHECKSUM = "crc32"
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


class Records:
    """The rows of one evaluation folder; process `host` appends to its own file."""

    def __init__(self, folder: Path, host: int = 0) -> None:
        self.path = folder / (f"rows-{host}.jsonl" if host else "rows.jsonl")
        self.rows: dict[Key, Row] = {}
        for path in sorted(folder.glob("rows*.jsonl")):
            self._read(path)

    def _read(self, path: Path) -> None:
        older = 0
        for row in json_lines.read(path, _is_row):
            if row.pop(CHECKSUM, None) is None:
                older += 1
            else:
                self.rows[key_of(row)] = row
        if older:
            _say_older(path, older)
        if path == self.path:
            _cut_half_a_line(path)

    def append(self, rows: Iterable[Row]) -> list[Row]:
        """Write new rows to disk; rows that are already there are left as they are.

        Returns:
            The rows that are new.
        """
        new = {key_of(row): row for row in rows}
        new = {key: row for key, row in new.items() if key not in self.rows}
        for key, row in new.items():
            if not math.isfinite(row["value"]):
                raise ValueError(f"row {key} of {self.path}: value={row['value']} is not finite")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(with_checksum(row)) + "\n" for row in new.values())
            file.flush()
            os.fsync(file.fileno())
        self.rows |= new
        return list(new.values())

    def missing(self, rows: Iterable[Row]) -> list[Row]:
        """Those rows, given by their key fields, that are not there yet."""
        return [row for row in rows if key_of(row) not in self.rows]

    def select(self, **fields: Any) -> list[Row]:
        """Rows in which every given field has the given value."""
        return [r for r in self.rows.values() if all(r[k] == v for k, v in fields.items())]


def _is_row(row: Row) -> bool:
    return is_older(row) or is_intact(row)


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
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)


def key_of(row: Row) -> Key:
    """The identity of a row."""
    return tuple(row[field] for field in KEY)


def by(rows: Iterable[Row], *fields: str) -> dict[Any, list[Row]]:
    """Rows in groups of equal fields; the key is the value of one field, or a tuple of several."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        key = tuple(row[field] for field in fields)
        groups.setdefault(key if len(fields) > 1 else key[0], []).append(row)
    return groups


def example_means(rows: Iterable[Row], field: str = "value") -> dict[int, float]:
    """The mean over repeats of every example, by its index."""
    by_example: dict[int, list[float]] = {}
    for row in rows:
        by_example.setdefault(row["index"], []).append(row[field])
    return {index: sum(v) / len(v) for index, v in by_example.items()}


def largest_share(rows: list[Row]) -> float:
    """The largest draw of a bound over Σ|value| of its rows; 0 where rows do not tell."""
    total = math.fsum(abs(row["value"]) for row in rows)
    return max((row.get("largest", 0.0) for row in rows), default=0.0) / total if total else 0.0


def summarize(rows: list[Row], field: str = "value") -> Summary:
    """Mean ± s.e. over examples; the repeats of an example are averaged first.

    The examples are the independent draws: repeats share their image, so they do not count as n.
    """
    values = list(example_means(rows, field).values())
    n = len(values)
    if n == 0:
        raise ValueError("no rows to summarize")
    mean = math.fsum(values) / n
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1) if n > 1 else math.nan
    repeats = min(Counter(row["index"] for row in rows).values())
    return Summary(mean, math.sqrt(variance / n), n, repeats)
