"""The rows of quality.json: figures of whole sets of samples, one per step, metric and protocol."""

import logging
from pathlib import Path
from typing import Any

import json_files
from records import is_intact, is_older, with_checksum
from run_lib import folder, identities

FILE = "quality.json"
KEY = ("step", "metric", "protocol", "n_samples", "reference", "n_reference", "identity")
HEADER = ("step", "metric", "value", "n", "reference", "evaluations", "protocol")
Row = dict[str, Any]
logger = logging.getLogger("fokker")


def read(eval_folder: Path) -> list[Row]:
    """All rows that are reported, in order."""
    whole = [row for row in _stored(eval_folder) if not is_older(row)]
    return identities.reported(eval_folder, whole)


def add(eval_folder: Path, rows: list[Row]) -> None:
    """Add rows, in the place of older ones of the same key."""
    both = [*_stored(eval_folder), *map(with_checksum, rows)]
    everything = {tuple(row.get(field, "") for field in KEY): row for row in both}
    folder.write_json(eval_folder / FILE, [everything[key] for key in sorted(everything)])


def _stored(eval_folder: Path) -> list[Row]:
    """All rows of the file but damaged ones, which are said."""
    path = eval_folder / FILE
    rows = json_files.read(path) if path.exists() else []
    found = [row for row in rows if is_older(row) or is_intact(row)]
    if len(found) < len(rows):
        logger.warning("%s: %d damaged rows are left out", path, len(rows) - len(found))
    return found


def cells(row: Row) -> list[str]:
    """The columns of `HEADER` as text."""
    error = "" if row["error"] is None else f" ± {row['error']:.2g} ({row['error_is']})"
    return [
        str(row["step"]),
        row["metric"],
        f"{row['value']:.5g}{error}",
        str(row["n_samples"]),
        f"{row['reference']}, n = {row['n_reference']}" if row["reference"] else "",
        f"{row['nfe']:.0f} (max {row['max_nfe']})",
        row["protocol"],
    ]
