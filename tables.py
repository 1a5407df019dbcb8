"""Tables: columns by name from .csv and .parquet files, and the examples that they make.

A column is one of numbers, or of text if any of its entries is no number. Modelled columns hold
numbers. The context of an example is a vector, of numbers and of one coordinate for each text that
a column may have, or a class: that of a single column of text, or of one named as `name:class`.
"""

import csv
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from checks import FieldError, choose, require
from splits import Rows
from streams import Context

if TYPE_CHECKING:
    import pyarrow

Columns = dict[str, np.ndarray]  # float64, NaN where missing, or texts
MISSING = frozenset(("", "na", "n/a", "nan", "null", "none", "?"))
DELIMITERS = ",;\t|"
CLASS = ":class"


def read(path: Path) -> Columns:
    """The columns of a table, in order.

    Raises:
        ValueError: the file is absent, damaged, of another kind or has no rows; names the line.
    """
    require(path.exists(), "data.path", str(path), "an existing table, .csv or .parquet")
    require(path.is_file(), "data.path", str(path), "a file, .csv or .parquet")
    if path.suffix in (".npz", ".npy"):
        raise FieldError("data.path", str(path), "arrays are read by data.dataset='npz'")
    columns = _parquet(path) if path.suffix == ".parquet" else _csv(path)
    if not columns or not len(next(iter(columns.values()))):
        raise ValueError(f"{path} has no rows: need at least two, below a line of names")
    return columns


def _csv(path: Path) -> Columns:
    """Columns of a text with one example in each line; without names they are 1, 2, …."""
    lines, delimiter = _lines(path)
    names = [name.strip() for name in lines[0]]
    if all(_is_number(name) for name in names):
        names = [str(number + 1) for number in range(len(names))]
    else:
        lines = lines[1:]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{path} has several columns of the names {twice}: need different ones")
    for number, line in enumerate(lines):
        if len(line) != len(names):
            raise ValueError(
                f"{path}: row {number + 1} has {len(line)} entries, but there are {len(names)} "
                f"columns, divided by {delimiter!r}"
            )
    entries = zip(*lines, strict=True) if lines else ((),) * len(names)
    return {name: _typed(list(column)) for name, column in zip(names, entries, strict=True)}


def _lines(path: Path) -> tuple[list[list[str]], str]:
    """The entries of all lines that have some, and what divides them."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        delimiter = max(DELIMITERS, key=text.partition("\n")[0].count)
        lines = [line for line in csv.reader(text.splitlines(), delimiter=delimiter) if line]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from None
    except csv.Error as error:
        raise ValueError(f"{path} is no table: {error}") from None
    if not lines:
        raise ValueError(f"{path} is empty")
    return lines, delimiter


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _typed(entries: list[str]) -> np.ndarray:
    """Numbers, NaN where they are missing; texts if one of the entries is no number."""
    entries = [entry.strip() for entry in entries]
    there = [entry for entry in entries if entry.lower() not in MISSING]
    if not all(map(_is_number, there)):
        return np.array(entries, np.str_)
    return np.array([_number(entry) for entry in entries], np.float64)


def _number(entry: str) -> float:
    return np.nan if entry.lower() in MISSING else float(entry)


def _parquet(path: Path) -> Columns:
    """Columns of a .parquet file."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise ValueError(
            f"{path}: .parquet needs pyarrow: pip install pyarrow, or a .csv"
        ) from None
    try:
        table = parquet.ParquetFile(path).read()
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is damaged or no .parquet file: {reason:.200}") from None
    return {name: _of_arrow(table.column(name)) for name in table.column_names}


def _of_arrow(column: "pyarrow.ChunkedArray") -> np.ndarray:
    """Numbers, NaN where they are missing; texts of all other types."""
    entries = column.to_pylist()
    if all(entry is None or isinstance(entry, int | float) for entry in entries):
        return np.array([np.nan if entry is None else entry for entry in entries], np.float64)
    return _typed(["" if entry is None else str(entry) for entry in entries])


class Table(NamedTuple):
    """The examples of a table, what their context is, and the names of columns."""

    rows: Rows
    context: Context | None
    columns: tuple[str, ...]  # names of the coordinates
    left_out: tuple[str, ...]


def examples(path: Path, columns: str, context_columns: str) -> Table:
    """The examples of a table.

    Args:
        path: the file.
        columns: names of the modelled columns, with commas; '': all but those of the context.
        context_columns: names of those that the densities are conditioned on; '': none.

    Raises:
        ValueError: a name is unknown, a modelled column holds text, or a value is missing or not
            finite; names column and row, counted from 1 below the names.
    """
    table = read(path)
    given = _names(context_columns)
    plain = [_without_mark(name, table) for name in given]
    for name in plain:
        choose(table, name, "data.context_columns")
    modelled = _names(columns) or [name for name in table if name not in plain]
    for name in modelled:
        choose(table, name, "data.columns")
    both = sorted(set(modelled) & set(plain))
    require(not both, "data.columns", columns, f"columns other than those of the context, {both}")
    require(len(modelled) > 0, "data.columns", columns, "a column besides those of the context")
    _check_numbers(table, modelled, columns)
    for name in (*modelled, *plain):
        _check_entries(path, name, table[name])
    context = None if not given else _context(table, given, plain)
    x = np.stack([table[name] for name in modelled], axis=1)
    rows = Rows(f"{path}", x, context=None if context is None else context[0])
    left_out = tuple(f"column {name}" for name in table if name not in (*modelled, *plain))
    return Table(rows, context and context[1], tuple(modelled), left_out)


def _names(text: str) -> list[str]:
    """Names with commas between them; one that has a comma itself is quoted."""
    return [name.strip() for name in next(csv.reader([text], skipinitialspace=True), [])]


def _without_mark(name: str, table: Columns) -> str:
    return name if name in table else name.removesuffix(CLASS)


def _check_numbers(table: Columns, modelled: list[str], given: str) -> None:
    """Refuse modelled columns of text."""
    texts = [name for name in modelled if table[name].dtype.kind == "U"]
    if not texts:
        return
    first = table[texts[0]]
    row = next(i for i, entry in enumerate(first) if not _is_number(entry))
    numbers = ",".join(name for name in modelled if name not in texts)
    groups = ",".join(name for name in texts if _names_groups(table[name]))
    advice = f", data.context_columns={groups} conditions on it" if groups else ""
    raise FieldError(
        "data.columns", given,
        f"need columns of numbers, but there is text in {', '.join(texts)} (row {row + 1} of "
        f"{texts[0]}: {str(first[row])!r}); data.columns={numbers} leaves text out{advice}",
    )  # fmt: skip


def _check_entries(path: Path, name: str, column: np.ndarray) -> None:
    """Refuse entries that are missing or not finite."""
    if column.dtype.kind == "U":
        bad = np.array([entry.lower() in MISSING for entry in column])
    else:
        bad = ~np.isfinite(column)
    if bad.any():
        row = int(np.argmax(bad))
        infinite = column.dtype.kind == "f" and np.isinf(column[row])
        raise ValueError(
            f"{path}: row {row + 1} of column {name} is {'infinite' if infinite else 'missing'}, "
            f"as {bad.sum()} of its {len(column)} entries: remove such rows, fill them, or leave "
            "the column out by data.columns"
        )


def _context(table: Columns, given: list[str], plain: list[str]) -> tuple[np.ndarray, Context]:
    """Classes int32 [n] or floats float64 [n, c], and what they are."""
    marked = [name for name, bare in zip(given, plain, strict=True) if name != bare]
    if len(given) == 1 and (marked or table[plain[0]].dtype.kind == "U"):
        return _classes(plain[0], table[plain[0]])
    allowed = "one column with ':class' and no other: a context is a class or a vector"
    require(not marked, "data.context_columns", ",".join(given), allowed)
    parts, names = [], []
    for name in plain:
        column = table[name]
        if column.dtype.kind == "U":
            known = _groups(name, column)
            parts.append(column[:, None] == known[None])
            names += [f"{name}={text}" for text in known]
        else:
            parts.append(column[:, None])
            names.append(name)
    floats = np.concatenate(parts, axis=1, dtype=np.float64)
    return floats, Context((len(names),), names=tuple(names))


def _names_groups(column: np.ndarray) -> bool:
    """Say whether a column has few enough different entries to be those of classes."""
    return 2 <= len(np.unique(column)) <= len(column) / 2


def _groups(name: str, column: np.ndarray) -> np.ndarray:
    """The different entries of a column, in order."""
    known = np.unique(column)
    allowed = f"columns that name groups, not {len(known)} different ones in {len(column)} rows"
    require(_names_groups(column), "data.context_columns", name, allowed)
    return known


def _classes(name: str, column: np.ndarray) -> tuple[np.ndarray, Context]:
    """Classes 0, 1, … in the order of the entries of a column of text or integers."""
    if column.dtype.kind == "f":
        whole = bool((column == np.round(column)).all())
        require(whole, "data.context_columns", f"{name}{CLASS}", "integers or text for classes")
        column = column.astype(np.int64)
    known = _groups(name, column)
    classes = np.searchsorted(known, column).astype(np.int32)
    return classes, Context((), len(known), names=tuple(map(str, known)))
