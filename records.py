"""Per-example evaluation rows: append, know what is missing, mean ± standard error.

A row is one JSON object on one line of `rows.jsonl`, identified by its key (estimator, protocol,
step, split, index, repeat). With several processes each has a file of its own, `rows-<h>.jsonl`;
all are read. Lines are appended and flushed to disk batch by batch, so a killed
evaluation loses at most the batch in flight; a half-written last line is dropped on reading. JSON
lines need no library to read and survive a kill at any byte.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]
KEY = ("estimator", "protocol", "step", "split", "index", "repeat")
Key = tuple


class Summary(NamedTuple):
    """Mean over examples of the mean over repeats, its standard error, and the counts."""

    mean: float
    standard_error: float
    examples: int
    repeats: int

    def so_far(self, name: str) -> dict[str, float]:
        """Mean and standard error for the log of what is under way."""
        return {name: self.mean, "s.e.": self.standard_error}


class Records:
    """The rows of one evaluation folder; process `host` appends to its own file."""

    def __init__(self, folder: Path, host: int = 0) -> None:
        self.path = folder / (f"rows-{host}.jsonl" if host else "rows.jsonl")
        self.rows: dict[Key, Row] = {}
        for path in sorted(folder.glob("rows*.jsonl")):
            self._read(path)

    def _read(self, path: Path) -> None:
        content = path.read_bytes()
        complete, _, rest = content.rpartition(b"\n")
        for number, line in enumerate(complete.splitlines(), 1):
            try:
                row = json.loads(line)
                self.rows[key_of(row)] = row
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number} is no row: {error!r}") from None
        if rest and path == self.path:  # so that the next append starts on a line of its own
            with path.open("r+b") as file:
                file.truncate(len(content) - len(rest))

    def append(self, rows: Iterable[Row]) -> None:
        """Write new rows to disk; rows that are already there are left as they are."""
        new = {key_of(row): row for row in rows}
        new = {key: row for key, row in new.items() if key not in self.rows}
        for key, row in new.items():
            if not math.isfinite(row["value"]):
                raise ValueError(f"row {key} of {self.path}: value={row['value']} is not finite")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in new.values())
            file.flush()
            os.fsync(file.fileno())
        self.rows |= new

    def missing(self, rows: Iterable[Row]) -> list[Row]:
        """Those rows, given by their key fields, that are not there yet."""
        return [row for row in rows if key_of(row) not in self.rows]

    def select(self, **fields: Any) -> list[Row]:
        """Rows in which every given field has the given value."""
        return [r for r in self.rows.values() if all(r[k] == v for k, v in fields.items())]


def key_of(row: Row) -> Key:
    """The identity of a row."""
    return tuple(row[field] for field in KEY)


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
