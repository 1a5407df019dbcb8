"""Keep a run folder: config.json, versions.json, log.txt, metrics.jsonl, tensorboard/.

Nothing in it is overwritten by a restart except config.json, and that only when every changed field
may change between runs. With several processes the first one writes.
"""

import errno
import fcntl
import importlib.metadata
import json
import logging
import logging.handlers
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import json_files
from checkpoints import whole_steps
from checks import writing
from configs import base
from run_lib import devices
from version import VERSION

logger = logging.getLogger("fokker")
LOG_BYTES = 10_000_000
STATISTICS = "standardization.npz"  # what standardises real values and contexts
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("jax", "jaxlib", "flax", "optax", "diffrax", "orbax-checkpoint", "numpy")
# Sections and fields that fix what the parameters mean; the rest may change between runs.
FIXED = ("data", "model", "training.sde", "training.continuous", "optim.optimizer", "deq",
         "classifier")  # fmt: skip
FREE = (
    "model.ema_rate", "model.dropout", "model.num_scales", "model.dtype", "model.remat",
    "data.num_test", "data.path", "data.test_ids", "deq.n_iters", "deq.ema_rate",
    "deq.num_times", "deq.init_from", "classifier.n_iters", "classifier.ema_rate",
    "classifier.dropout",
)  # fmt: skip


def flatten(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a nested dict as (dotted name, value)."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted names whose values differ, as (old, new); None where a field is absent."""
    before, after = dict(flatten(old)), dict(flatten(new))
    names = sorted(before.keys() | after.keys())
    pairs = {name: (before.get(name), after.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def is_fixed(name: str) -> bool:
    """Say whether changing this field would make the parameters of a run mean something else."""
    under = any(name == f or name.startswith(f + ".") for f in FIXED)
    return under and name not in FREE


def trained_otherwise(
    workdir: Path, config: dict[str, Any], free: Collection[str] = (), *, with_seed: bool = False
) -> list[str]:
    """Say which settings of its training a run folder had, where they are others now.

    Args:
        workdir: the run folder; without a checkpoint there is nothing to say.
        config: the resolved config of this start.
        free: names of fields that may differ.
        with_seed: the seed is one of the settings.
    """
    path = workdir / "config.json"
    if not path.exists() or not whole_steps(workdir):
        return []
    before, now = json_files.read(path), json.loads(json.dumps(config))
    known = dict(flatten(before))  # a field that the folder lacks is newer than it
    compared = ("training", "optim", "model", *(["seed"] if with_seed else []))
    return [
        f"{name}: {old!r} in {path}, now {new!r}"
        for name, (old, new) in differences(before, now).items()
        if name.split(".")[0] in compared and name in known
        if name not in free
    ]


def reconcile(workdir: Path, config: dict[str, Any], *, ignore: tuple[str, ...] = ()) -> None:
    """Compare a config with the one of the run folder, log what differs, refuse what may not.

    Args:
        workdir: the run folder; nothing happens while it has no checkpoint.
        config: the resolved config of this start.
        ignore: sections and fields that do not concern this start.

    Raises:
        ValueError: a field differs that would corrupt the run; names all of them.
    """
    path = workdir / "config.json"
    if not path.exists() or not whole_steps(workdir):
        return
    before = json_files.read(path)
    # A field of the data that the folder lacks is newer, and its default is what was done before.
    before["data"] = base.get_config().data.to_dict() | before["data"]
    before = json.loads(json.dumps(before))
    changed = differences(before, json.loads(json.dumps(config)))
    changed = {k: v for k, v in changed.items() if not {k, k.split(".")[0]} & set(ignore)}
    lines = [f"{name}: {old!r} in {path}, now {new!r}" for name, (old, new) in changed.items()]
    # Of the model a field that the folder lacks is newer than it; another one shows in its name.
    known = dict(flatten(before))
    levels = () if config["training"]["continuous"] else ("model.num_scales",)
    refused = [
        line
        for name, line in zip(changed, lines, strict=True)
        if name in known and (is_fixed(name) or name in levels)
    ]
    if refused:
        raise ValueError(
            "this run folder was made with another config; these fields may not change:\n  "
            + "\n  ".join(refused)
            + "\nUse another --workdir, or the old values."
        )
    for line in lines:
        logger.info("config field changed: %s", line)


def same_seed(eval_folder: Path, seed: int) -> None:
    """The noise of an example depends on the seed: refuse to mix two of them in a folder.

    Raises:
        ValueError: the folder has rows of another seed.
    """
    path = eval_folder / "config.json"
    if not path.exists() or not (eval_folder / "rows.jsonl").exists():
        return
    before = json_files.read(path).get("seed", seed)
    if before != seed:
        raise ValueError(
            f"{eval_folder} has rows of another seed: {before} then, now {seed}. Use another "
            "--eval_folder, or the old seed"
        )


def plain_name(name: str, flag: str, taken: tuple[str, ...] = ()) -> str:
    """The name of a folder in the run folder that is none of the run folder's own.

    Raises:
        ValueError: it is a path, or taken.
    """
    own = (
        "checkpoints",
        "checkpoints-meta",
        "checkpoints-damaged",
        "samples",
        "tensorboard",
        "profile",
        "classifier",
        "lock",
        *taken,
    )
    if Path(name).name != name or name in ("", "..", *own):
        raise ValueError(f"{flag}={name!r}: need the plain name of a folder, other than {own}")
    return name


def results_folder(workdir: Path, name: str, deq_folder: str = "") -> Path:
    """The folder of results of that name.

    Raises:
        ValueError: it is a path, or has checkpoints, as the folder of a dequantiser.
    """
    path = workdir / plain_name(name, "--eval_folder")
    if name == deq_folder or (path / "checkpoints").exists():
        raise ValueError(
            f"--eval_folder={name!r}: {path} is for the checkpoints of a dequantiser; need another "
            "folder for results"
        )
    return path


HELD: ContextVar[frozenset[Path]] = ContextVar("HELD", default=frozenset())  # by this thread


@contextmanager
def alone(where: Path) -> Iterator[None]:
    """A block that only one run executes at a time in a folder; the lock goes with its process.

    Within the block the same thread may ask for it again.

    Raises:
        ValueError: another process is at it; names it.
    """
    where = where.absolute()
    if not devices.is_first() or where in HELD.get():
        yield
        return
    where.mkdir(parents=True, exist_ok=True)
    with (where / "lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise ValueError(
                f"{where} is in use by {owner}: wait for it, stop it, or use another folder"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            logger.warning("%s: this file system has no locks; start one run here at a time", where)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        token = HELD.set(HELD.get() | {where})
        try:
            yield
        finally:
            HELD.reset(token)


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old or the new file, also after a power cut."""
    if not devices.is_first():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, [json.dumps(content, indent=2) + "\n"])


def replace_file(path: Path, lines: Iterable[str]) -> None:
    """Write a file that holds the old text or the new one, whatever happens meanwhile."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path), temporary.open("w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def versions() -> dict[str, str]:
    """Versions of Fokker, Python and the libraries, and the git commit ('unknown' outside git)."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    own = {"fokker": VERSION, "git_commit": git_commit()}
    return own | {"python": platform.python_version()} | found


def command() -> str:
    """The command line that runs this process; empty in a notebook or a program of the user."""
    name = Path(sys.argv[0]).name
    start = {"main.py": ["python", "main.py"], "fokker": ["fokker"]}.get(name)
    return shlex.join([*start, *sys.argv[1:]]) if start else ""


def git_commit(root: Path = ROOT) -> str:
    """Commit of the code, with '+' if files differ from it.

    It is 'unknown' outside git, and for a copy of the code inside another repository.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        own = Path(git("rev-parse", "--show-toplevel")).samefile(root)
        return git("describe", "--always", "--dirty=+") if own else "unknown"
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def log_to(workdir: Path) -> None:
    """Append the project's log records to log.txt of this folder alone, beside the terminal.

    From 10 MB on the text goes to log.txt.1, and so on to log.txt.4.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    for old in [h for h in logger.handlers if isinstance(h, logging.FileHandler)]:
        logger.removeHandler(old)
        old.close()
    handler = logging.handlers.RotatingFileHandler(
        workdir / "log.txt", maxBytes=LOG_BYTES, backupCount=4, encoding="utf-8"
    )
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
