"""JSON files, read whole or refused by name."""

import json
from pathlib import Path
from typing import Any


def read(path: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        ValueError: it is no JSON, as after a damage; names the file and the place.
        OSError: it cannot be opened; names the file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of JSON or UTF-8, or nested without end
        raise ValueError(f"{path} is damaged, or no JSON file: {error}") from None
