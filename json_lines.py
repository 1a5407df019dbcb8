"""Files of one JSON object per line: they need no library to read, and survive a kill at any byte.

A line that is damaged, by a power cut or on the disk, is left out and said with its number. Half a
line at the end is that of a writer that was killed, or is still writing.
"""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson

logger = logging.getLogger("fokker")
Row = dict[str, Any]


def read(path: Path, is_row: Callable[[Row, bytes], bool]) -> Iterator[Row]:
    """The objects of a file, one at a time, without those for which `is_row` is false.

    `is_row` is given the object and its line.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            row = _object(line)
            if row is not None and is_row(row, line):
                yield row
            else:
                logger.warning("%s: line %d is damaged and is left out", path, number)


def text_of(row: Row) -> bytes:
    """The JSON of an object."""
    try:
        found = orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY)
    except orjson.JSONEncodeError:  # of text that is not Unicode, as the name of a file may be
        return json.dumps(row).encode()
    return json.dumps(row).encode() if b"null" in found else found  # as it is of a NaN


def _object(line: bytes) -> Row | None:
    try:
        found = orjson.loads(line)
    except ValueError:
        found = _with_nan(line)
    return found if isinstance(found, dict) else None


def _with_nan(line: bytes) -> Any:
    """The value of a line that may hold NaN, which JSON does not know; None if it is damaged."""
    try:
        return json.loads(line.decode())
    except (ValueError, RecursionError):  # of JSON or UTF-8; of a line of brackets
        return None


def is_count(value: Any) -> bool:
    """Say whether a value can be a number of steps, of an example or of a repeat."""
    return type(value) is int and 0 <= value < 2**63


def is_number(value: Any) -> bool:
    """Say whether a value is a real number that a float can hold."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)
