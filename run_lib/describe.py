"""Every field of a config with its meaning, its default and what it is set to: `--describe`.

The meanings are the comments of configs/base.py, of which each field has one: beside it, above it,
or both. A comment that ends with a colon heads the fields below it.
"""

import ast
import dataclasses
import io
import textwrap
import tokenize
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs import base
from run_lib.folder import flatten

WIDTH = 100
VALUE, MEANING = 33, 48  # columns in which they begin


@dataclasses.dataclass(frozen=True)
class Field:
    """A field as configs/base.py describes it."""

    section: str  # '' for the seed
    name: str
    default: Any
    heading: str  # of the fields that it stands among; '' where there is none
    meaning: str

    @property
    def dotted(self) -> str:
        """The name with its section, as on the command line."""
        return f"{self.section}.{self.name}".lstrip(".")


def fields() -> list[Field]:
    """Every field of a config, in the order of configs/base.py."""
    source = Path(base.__file__).read_text(encoding="utf-8")
    beside, above = _comments(source)
    defaults = dict(flatten(base.get_config().to_dict()))
    found = []
    for function in ast.parse(source).body:
        if not isinstance(function, ast.FunctionDef):
            continue
        last, heading = function.lineno, ""
        for section, name, start, end in _places(function):
            lines = [above[i] for i in range(last + 1, start) if i in above]
            while any(line.endswith(":") for line in lines):
                heading = lines.pop(0)
            meaning = " ".join([*lines, beside.get(end, "")]).strip()
            default = defaults.get(f"{section}.{name}".lstrip("."))
            found.append(Field(section, name, default, heading, meaning))
            last = end
    return [field for field in found if field.dotted in defaults]


def _comments(source: str) -> tuple[dict[int, str], dict[int, str]]:
    """Comments by line: those beside code, and those on lines of their own."""
    beside: dict[int, str] = {}
    above: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = token.line.lstrip().startswith("#")
            (above if alone else beside)[token.start[0]] = token.string.lstrip("# ")
    return beside, above


def _places(function: ast.FunctionDef) -> Iterator[tuple[str, str, int, int]]:
    """(section, name, first line, last line) of what a function of configs/base.py sets."""
    for node in ast.walk(function):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant):
                    yield function.name.lstrip("_"), str(key.value), key.lineno, value.end_lineno
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            yield "", node.targets[0].attr, node.lineno, node.end_lineno


def table(config: ConfigDict, source: str, changed: Collection[str] = ()) -> str:
    """Every field with its value and its meaning, at most 100 columns wide, section by section.

    Args:
        config: as it would be run.
        source: where it comes from.
        changed: the names of the fields that the command line has set.
    """
    values, before = dict(flatten(config.to_dict())), None
    lines = textwrap.wrap(
        f"Every field of {source}. The mark * stands before a field that this config sets, the "
        "mark > before one that the command line sets; the default of configs/base.py follows its "
        "meaning. In the section model, None stands for the default of the network, head or SDE.",
        WIDTH,
    )
    for field in fields():
        lines += _titles(field, before)
        lines += _lines(field, values[field.dotted], by_command=field.dotted in changed)
        before = field
    return "\n".join(lines) + "\n"


def _titles(field: Field, before: Field | None) -> list[str]:
    """Give the lines above a field that begins a section, or another group of its fields."""
    new = before is None or field.section != before.section
    other = field.heading != ("" if new else before.heading)
    title = ["", *([field.section] if field.section else [])] if new else []
    return title + ([f"    {field.heading}"] if other else [])


def _lines(field: Field, value: Any, *, by_command: bool) -> list[str]:
    """One field: its mark, name and value, and beside them, or below, its meaning."""
    mark = ">" if by_command else "*" if value != field.default else " "
    start = f"  {mark} {field.name}".ljust(VALUE) + f"{value!r}"
    meaning = field.meaning + (f" (default {field.default!r})" if mark != " " else "")
    lines = textwrap.wrap(meaning, WIDTH - MEANING)
    if len(start) < MEANING and lines:
        start += " " * (MEANING - len(start)) + lines.pop(0)
    return [start, *(" " * MEANING + line for line in lines)]


def markdown() -> str:
    """Compose the page docs/reference/fields.md."""
    lines = [
        "# Fields of a config",
        "",
        "Every field can be set on the command line, as `--config.training.batch_size=64`.",
        "`None` gives a field its default again. In the section `model`, a field without a",
        "default belongs to some of the networks, SDEs or heads, which have defaults of their",
        "own. This page is made from `configs/base.py` by `python -m run_lib.describe`;",
        "`main.py --config=... --describe` shows the values of a config.",
    ]
    before: Field | None = None
    for field in fields():
        new = before is None or field.section != before.section
        if new:
            lines += ["", f"## `{field.section}`" if field.section else "## The whole"]
        other = field.heading != ("" if new else before.heading)
        if other:
            lines += ["", field.heading.replace("|", "\\|")]
        if new or other:
            lines += ["", "| field | default | meaning |", "|---|---|---|"]
        meaning = field.meaning.replace("|", "\\|")
        default = "" if field.default is None else f"`{field.default!r}`"
        lines.append(f"| `{field.name}` | {default} | {meaning} |")
        before = field
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    path = Path(__file__).resolve().parents[1] / "docs" / "reference" / "fields.md"
    path.write_text(markdown(), encoding="utf-8")
