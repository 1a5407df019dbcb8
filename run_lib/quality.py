"""The rows of quality.json: figures of whole sets of samples, one per step, metric and protocol."""

from pathlib import Path
from typing import Any

import json_files
from run_lib import folder

FILE = "quality.json"
KEY = ("step", "metric", "protocol", "n_samples", "reference", "n_reference")
HEADER = ("step", "metric", "value", "n", "reference", "evaluations", "protocol")
Row = dict[str, Any]


def read(eval_folder: Path) -> list[Row]:
    """All rows, in order."""
    path = eval_folder / FILE
    return json_files.read(path) if path.exists() else []


def add(eval_folder: Path, rows: list[Row]) -> None:
    """Add rows, in the place of older ones of the same key."""
    everything = {tuple(row[field] for field in KEY): row for row in [*read(eval_folder), *rows]}
    folder.write_json(eval_folder / FILE, [everything[key] for key in sorted(everything)])


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
