"""Load a config from a file with `get_config`, or from the config.json of a run.

Fields are changed by texts, as the command line gives them: `section.field` and `value`.
"""

import ast
import importlib.util
import re
import traceback
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import json_files
from checks import FieldError, nearest, one_of, require
from configs import base

FOLLOWS = ("model.centered",)  # in config.json, but other fields say what it is
KINDS = "a .py file that has get_config(), or the config.json of a run folder"
PROGRAM = Path(base.__file__).parents[1]  # where configs/ lies


def load(name: str) -> ConfigDict:
    """The config of a file; its fields are locked.

    A file that does not exist is looked for beside the program, which has configs/ of its own.

    Raises:
        FieldError: the file is absent or of another kind, or running it fails; names the line.
    """
    path = Path(name)
    path = path if path.is_file() else PROGRAM / path
    require(path.is_file(), "--config", name, f"an existing file: {KINDS}")
    require(path.suffix in (".py", ".json"), "--config", name, KINDS)
    config = _of_run(path) if path.suffix == ".json" else _of_python(path)
    config.lock()
    return config


def _of_python(path: Path) -> ConfigDict:
    spec = importlib.util.spec_from_file_location("experiment_config", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        found = module.get_config() if hasattr(module, "get_config") else None
    except Exception as error:  # a foreign file can raise anything
        raise FieldError("--config", str(path), _reason(path, error)) from error
    require(hasattr(module, "get_config"), "--config", str(path), KINDS)
    is_config = isinstance(found, ConfigDict)
    require(is_config, "--config", str(path), f"a ConfigDict from get_config(), not {found!r:.60}")
    return found


def _reason(path: Path, error: Exception) -> str:
    """Say in one line what went wrong, and in which line of the file."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else 0
    what = " ".join(str(error).split())
    return f"line {line}: {type(error).__name__}: {what}"


def _of_run(path: Path) -> ConfigDict:
    """The config that a run has written; fields that are newer than the run have their defaults."""
    values, config = json_files.read(path), base.get_config().lock()
    is_config = isinstance(values, dict) and all(
        isinstance(part, dict) for name, part in values.items() if name != "seed"
    )
    require(is_config, "--config", str(path), KINDS)
    for name, part in values.items():
        one_of("config section", name, config.keys())
        if name == "seed":
            config.seed = part
            continue
        for field, value in part.items():
            if f"{name}.{field}" not in FOLLOWS:
                _set(config, f"{name}.{field}", tuple(value) if isinstance(value, list) else value)
    return config


def change(config: ConfigDict, name: str, text: str) -> Any:
    """Give the field `section.field` the value that the text says; returns it.

    `None`, and '' where a text cannot be meant, give the default: that of configs/base.py, which in
    `model` is that of the class that has the field.

    Raises:
        FieldError: there is no such field, or the text is none of its values.
    """
    kind, default = _kind_and_default(name, text)
    unset = text == "None" or (text == "" and not (kind is str and isinstance(default, str)))
    value = default if unset else _parsed(name, text, kind)
    _set(config, name, value)
    return value


def _kind_and_default(name: str, text: str) -> tuple[type, Any]:
    section, _, field = name.rpartition(".")
    defaults = base.get_config()
    parent = defaults.get(section) if section else defaults
    found = isinstance(parent, ConfigDict) and field in parent
    if not found or isinstance(parent[field], ConfigDict):
        raise FieldError(name, text, f"the config has no such field{nearest(name, _names())}")
    return parent.get_type(field), parent[field]


def _names() -> list[str]:
    """Every field of a config, with its section."""
    defaults = base.get_config()
    parts = {name: part for name, part in defaults.items() if isinstance(part, ConfigDict)}
    return ["seed", *(f"{name}.{field}" for name, part in parts.items() for field in part)]


def _parsed(name: str, text: str, kind: type) -> Any:
    """The value of a text."""
    if kind is str:
        return text
    if kind is bool:
        one_of(name, text.lower(), ("true", "false", "1", "0"))
        return text.lower() in ("true", "1")
    if kind is tuple:
        try:
            value = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            raise FieldError(name, text, "need numbers, as 1,2,2") from None
        return tuple(value) if isinstance(value, list | tuple) else (value,)
    try:
        return kind(text)
    except ValueError:
        allowed = "a whole number, as 1000" if kind is int else "a number"
        raise FieldError(name, text, f"need {allowed}") from None


def _set(config: ConfigDict, name: str, value: Any) -> None:
    """Set a field that the config has, to a value of its type."""
    section, _, field = name.rpartition(".")
    try:
        parent = config[section] if section else config
        parent[field] = value
    except (AttributeError, KeyError):
        raise FieldError(
            name, value, f"the config has no such field{nearest(name, _names())}"
        ) from None
    except TypeError:
        kind = parent.get_type(field).__name__
        raise FieldError(name, value, f"need a value of type {kind}") from None


FIELD = re.compile(r"--?(no)?config\.(.+)", re.DOTALL)


def separate(arguments: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """(fields of the config as (name, text), the other arguments) of a command line.

    A field is `--config.section.field=value`, the same with a space, or for True and False
    `--config.section.field` and `--noconfig.section.field`.
    """
    fields: list[tuple[str, str]] = []
    others: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "--":
            return fields, [*others, argument, *rest]
        match = FIELD.fullmatch(argument)
        if match is None:
            others.append(argument)
            continue
        name, equals, text = match[2].partition("=")
        if match[1]:
            text = "False"
        elif not equals:
            is_flag = not rest or rest[0].startswith("--") or _is_boolean(name)
            text = "True" if is_flag else rest.pop(0)
        fields.append((name, text))
    return fields, others


def _is_boolean(name: str) -> bool:
    return name in _names() and _kind_and_default(name, "")[0] is bool
