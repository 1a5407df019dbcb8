"""The one form in which a mistake of the user is told.

    section.field=value: need what is allowed; what to do

Networks, solvers and SDEs know no section of the config: they name their field, and the code that
builds them from a section adds its name by `in_section`.
"""

import difflib
import math
import os
import tempfile
import typing
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class FieldError(ValueError):
    """A field has a value that is not allowed.

    Attributes:
        field: its name, with the section once that is known.
        value: what it has.
        allowed: what it may have, and what to do.
    """

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(f"{field}={value!r}: {allowed}")
        self.field, self.value, self.allowed = field, value, allowed


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """A block that writes a file: an error that names none, as of a full disk, gets its name."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def in_section(name: str) -> Iterator[None]:
    """A block, or a function, whose fields belong to this section of the config.

    Raises:
        FieldError: one was raised inside; a field without section gets this one.
    """
    try:
        yield
    except FieldError as error:
        if not error.field.replace("[", "").replace("]", "").isidentifier():
            raise  # it has its section
        raise FieldError(f"{name}.{error.field}", error.value, error.allowed) from None


def require(condition: bool, field: str, value: object, allowed: str) -> None:
    """Raise a FieldError that says what is allowed, unless the condition holds."""
    if not condition:
        raise FieldError(field, value, f"need {allowed}")


def one_of(field: str, value: Any, known: Collection[Any]) -> None:
    """Raise a FieldError that lists the known values, unless the value is one of them."""
    if value not in known:
        allowed = sorted(known)
        raise FieldError(field, value, f"allowed {allowed}{nearest(str(value), allowed)}")


def choose(table: Mapping[str, T], name: str, field: str) -> T:
    """The entry of a table by its name; an unknown name lists the known ones."""
    one_of(field, name, table.keys())
    return table[name]


def nearest(name: str, known: Collection[Any]) -> str:
    """A question that proposes the most similar known names; empty where none is similar."""
    close = difflib.get_close_matches(name, sorted(map(str, known)), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def positive(**fields: int) -> None:
    """Raise a FieldError unless every field is an integer of at least 1."""
    for field, value in fields.items():
        fits = isinstance(value, int) and value >= 1
        require(fits, field, value, "an integer of at least 1")


def rate(field: str, value: float) -> None:
    """Raise a FieldError unless 0 <= value < 1."""
    require(0.0 <= value < 1.0, field, value, f"0 <= {field} < 1")


def path_of(field: str, text: str) -> Path:
    """The path that a text names, with a home folder in place of ~.

    Raises:
        FieldError: the text is no UTF-8, or there is no such home folder.
    """
    of_type(field, text, str)
    try:
        return Path(text).expanduser()
    except RuntimeError:  # of pathlib, where the system knows no such user
        raise FieldError(field, text, "need the ~ of a user that exists") from None


def user_cache() -> Path:
    """The folder for files that the program can make again; it need not exist yet."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given, "fokker")
    try:
        return Path.home() / ".cache" / "fokker"
    except RuntimeError:  # of pathlib, for a user without a home folder
        return Path(tempfile.gettempdir(), "fokker")


LARGEST = 2**31 - 1  # of integers: steps and indices are int32


def of_type(field: str, value: Any, kind: Any) -> None:
    """Raise a FieldError unless the value has the type of its field.

    A float may be given as an integer, but is never NaN; an integer lies within 32 bits; a string
    can be written as UTF-8.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is bool:
        require(isinstance(value, bool), field, value, "True or False")
    elif kind is int:
        fits = number and isinstance(value, int) and abs(value) <= LARGEST
        require(fits, field, value, f"an integer, at most {LARGEST}")
    elif kind is float:
        require(number and not math.isnan(value), field, value, "a number")
    elif kind is str:
        require(isinstance(value, str) and _is_text(value), field, value, "a text in UTF-8")
    else:  # tuple[float, ...] or tuple[float | None, ...]
        require(isinstance(value, tuple), field, value, "numbers in parentheses, as (0.0, 1.0)")
        members = typing.get_args(kind)[0]
        for member in value:
            if member is not None or members is float:
                of_type(field, member, float)


def _is_text(value: str) -> bool:
    """Say whether a text is UTF-8 without the byte zero, which no file name may have."""
    return "\0" not in value and value.encode(errors="replace").decode() == value
