"""Choose what a command runs: its config, run folder and modes, each of which has a default."""

import dataclasses
import os
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from checks import path_of, require
from run_lib import config_files, folder

CONFIG = "configs/digits/vp.py"
MODES = "train,eval"
RUNS = "runs"
LONGEST = 100  # characters of the name of a run folder that is made up
NOT_OF_TRAINING = ("eval", "sampling", "deq", "classifier")  # their fields make no other training


@dataclasses.dataclass(frozen=True)
class Choices:
    """A command runs these modes with this config in this folder.

    Attributes:
        source: the file of the config.
        config: the config of that file, with the changes of the command line.
        changed: the fields that the command line has set, with their values.
        workdir: the run folder.
        modes: names of modes, separated by commas.
        by_default: the flags that the command line left out, as they were taken.
    """

    source: str
    config: ConfigDict
    changed: dict[str, Any]
    workdir: Path
    modes: str
    by_default: str


def choices(
    source: str | None, workdir: str | None, modes: str | None, fields: Iterable[str] = ()
) -> Choices:
    """Complete what a command says by defaults; None stands for what it does not say.

    Without a config, that of the run folder is taken, else the handwritten digits. Without a run
    folder, that of the config's name is taken, and of the fields that the command line changes.

    Args:
        source: the file of the config.
        workdir: the run folder.
        modes: names of modes, separated by commas.
        fields: fields of the config to change, as `section.field=value`.

    Raises:
        FieldError: there is no such config, field or value.
    """
    where = None if workdir is None else path_of("--workdir", workdir)
    file = _config_of(where) if source is None else source
    config = config_files.load(file)
    pairs = [field.partition("=") for field in fields]
    changed = {name: config_files.change(config, name, text) for name, _, text in pairs}
    if where is None:
        differences = folder.differences(config_files.load(file).to_dict(), config.to_dict())
        where = folder_of(file, {name: new for name, (_, new) in differences.items()})
    chosen = {"config": (source, file), "workdir": (workdir, where), "mode": (modes, MODES)}
    by_default = " ".join(f"--{k}={new}" for k, (given, new) in chosen.items() if given is None)
    return Choices(file, config, changed, where, MODES if modes is None else modes, by_default)


def _config_of(workdir: Path | None) -> str:
    """The config of a run folder that has one, else that of the handwritten digits."""
    if workdir is None or not (workdir / "config.json").is_file():
        return CONFIG
    return str(workdir / "config.json")


def folder_of(source: str, changed: Mapping[str, Any]) -> Path:
    """The run folder runs/NAME of a config and of the fields that differ from it.

    NAME is the path of the config without configs/, as digits_vp, and then every field that makes
    another training, as digits_vp-score_matching_order=3: so that no run goes on with what another
    has begun.

    Raises:
        FieldError: the config is the config.json of a run, which tells no name.
    """
    allowed = f"a run folder, as {Path(source).parent}, where --config is a config.json"
    require(Path(source).suffix != ".json", "--workdir", None, allowed)
    inside = Path(os.path.relpath(source)).with_suffix("").parts
    parts = Path(os.path.abspath(source)).with_suffix("").parts[1:] if ".." in inside else inside
    fields = [
        f"{name.rpartition('.')[2]}={_plain(value)}"
        for name, value in changed.items()
        if name.partition(".")[0] not in NOT_OF_TRAINING
    ]
    name = "-".join(["_".join(parts[parts[0] == "configs" and len(parts) > 1 :]), *fields])
    if len(name) > LONGEST:
        name = f"{name[: LONGEST - 9]}-{zlib.crc32(name.encode()):08x}"
    return Path(RUNS, name)


def _plain(value: Any) -> str:
    """The value of a field as a part of a file's name."""
    return re.sub(r"[^\w.+-]+", "_", str(value)).strip("_")
