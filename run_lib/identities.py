"""Name what a stored figure belongs to: which data, parameters, settings and training.

`identity.json` of a run folder names its training and its data. `identities.json` of a folder of
results lists what its reported figures are of. A figure of anything else stays where it is stored,
but is neither used again nor reported.
"""

import dataclasses
import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax

import checksums
import json_files
import real_arrays
from checkpoints import whole_steps
from records import Row, Table, is_intact, with_checksum
from run_lib import devices, folder
from run_lib.experiment import Experiment

RUN, CURRENT = "identity.json", "identities.json"
# Fields of `model` that neither the value of the network nor its samples depend on.
WITHOUT_EFFECT = ("ema_rate", "dropout", "remat")
# Fields of `data` that decide what a split consists of.
SIZES = {
    "train": ("num_train", "num_validation"),
    "validation": ("num_train", "num_validation"),
    "test": ("num_test",),
}
GRACE_S = 1.0  # that the others have to end by themselves: the first one serves them
Identified = TypeVar("Identified", Row, Table)
logger = logging.getLogger("fokker")


class Figure(NamedTuple):
    """All that a figure depends on, with digests of parameters, data and settings."""

    kind: str  # model, baseline or samples
    step: int
    split: str  # that is evaluated, or that samples are compared with
    parameters: str  # of the network; of a baseline, the data that it is fitted on
    data: str  # of the split
    settings: str

    @property
    def identity(self) -> str:
        """A digest of all."""
        return _digest(self)

    def replaces(self, other: "Figure") -> bool:
        """Say whether the other figure is of something that is gone, now that this one is there."""
        if self.kind != other.kind:
            return False
        network = self.step == other.step and self.parameters != other.parameters
        data = self.split == other.split and self.data != other.data
        return network or data or self.settings != other.settings


def of_model(experiment: Experiment, params: Any, step: int) -> Figure:
    """The identity of likelihoods of `eval.dataset` under these parameters."""
    split = experiment.settings.eval.dataset
    data = experiment.dataset.digests[split]
    parameters, settings = checksums.digest(params), settings_digest(experiment)
    return Figure("model", step, split, parameters, data, settings)


def of_baselines(experiment: Experiment, step: int) -> Figure:
    """The identity of likelihoods under models that are fitted on the training data."""
    split, digests = experiment.settings.eval.dataset, experiment.dataset.digests
    settings = settings_digest(experiment)
    return Figure("baseline", step, split, digests["train"], digests[split], settings)


def of_samples(model: Figure, split: str = "", data: str = "") -> Figure:
    """The identity of samples of a network, or of figures that compare them with a split."""
    return model._replace(kind="samples", split=split, data=data)


def settings_digest(experiment: Experiment) -> str:
    """Digest the settings that figures depend on, beside protocols, parameters and data."""
    settings = experiment.settings
    model = settings.resolved()["model"]
    parts = (part for part in (settings.network, settings.sde, settings.head) if part is not None)
    defaults = {f.name: f.default for part in parts for f in dataclasses.fields(part)}
    data, training = settings.data, settings.training
    skipped = set(WITHOUT_EFFECT)
    if training.continuous and settings.model.time_label not in ("level", "reverse_index"):
        skipped.add("num_scales")  # then it is the number of steps of a sampler, no more
    real = {"standardize": data.standardize, "cell_width": data.cell_width}
    return _digest(
        # Without defaults, so that a field that a later version adds changes no identity.
        {k: v for k, v in model.items() if k not in skipped and v != defaults.get(k)},
        (training.sde, training.continuous),
        (data.levels, data.centered, data.logit, *((data.context,) if data.context else ())),
        settings.seed,
        *([real] if real != {"standardize": "none", "cell_width": ()} else []),
        *_ends(experiment),
    )


def _ends(experiment: Experiment) -> list[Any]:
    """The ends of real values, however they are written; nothing where there are none."""
    if experiment.levels is not None:
        return []
    found = real_arrays.ends(experiment.settings.data, experiment.dataset.shape)
    return (
        [] if found is None else [{"ends": [str(found.lower.tolist()), str(found.upper.tolist())]}]
    )


def _digest(*parts: Any) -> str:
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def current(target: Path) -> dict[str, Figure] | None:
    """Return the reported figures of a folder by identity; None where nothing is known.

    Of an earlier training in the same run folder nothing is reported.
    """
    path = target / CURRENT
    if not path.exists():
        return None
    found = _read(path)
    if found["run"] != _run_of(target.parent):
        return {}
    return {identity: Figure(**fields) for identity, fields in found["figures"].items()}


def reported(target: Path, rows: Iterable[Identified]) -> list[Identified]:
    """Those of the rows, or of the tables of rows, whose figures are reported."""
    known = current(target)
    return [row for row in rows if known is None or row["identity"] in known]


def declare(target: Path, figures: Iterable[Figure]) -> None:
    """From now on these figures of a folder of results are reported, and those they replace not."""
    if not devices.is_first():
        return
    kept = current(target) or {}
    if (target / CURRENT).exists() and not kept:
        logger.info("%s: figures of an earlier training are kept and not reported", target)
    for figure in figures:
        for identity, other in list(kept.items()):
            if figure.replaces(other):
                del kept[identity]
                _say_replaced(target, other, figure)
        kept[figure.identity] = figure
    content = {identity: figure._asdict() for identity, figure in kept.items()}
    _write(target / CURRENT, {"run": _run_of(target.parent), "figures": content})


def _say_replaced(target: Path, old: Figure, new: Figure) -> None:
    changed = [
        f"{name} {before}, now {now}"
        for name, before, now in zip(Figure._fields, old, new, strict=True)
        if before != now and name in ("parameters", "data", "settings")
    ]
    logger.info(
        "%s: figures of step %d (%s) are of other %s; they are kept and not reported",
        target, old.step, old.kind, ", ".join(changed),
    )  # fmt: skip


def claim(experiment: Experiment, workdir: Path) -> None:
    """Name the training and the data of a run folder, or see that they are still the same.

    A folder without a checkpoint begins a training of its own. A folder of an older version is
    taken to be of the data that are there now.

    Raises:
        ValueError: the data are not those that the checkpoints were trained on.
    """
    path, begun = workdir / RUN, bool(whole_steps(workdir))
    now = _data(experiment)
    if not begun or not path.exists():
        if begun:
            logger.info("%s is missing (an older version): written for the data of now", path)
        else:
            _set_aside(workdir)
        _write(path, {"run": secrets.token_hex(8), "data": now})
        return
    content = _read(path)
    if content["data"] is None:  # of an import, which reads no data
        _write(path, content | {"data": now})
        return
    lines = [
        f"{name}: {_named(content['data'][name])} then, {_named(now[name])} now"
        for name in now.keys() & content["data"].keys()
        if _is_replaced(content["data"][name], now[name])
    ]
    if lines:
        raise ValueError(
            f"the data are not those that {workdir} was made with: {'; '.join(sorted(lines))}. "
            "Bring those back, or use another --workdir"
        )


def _set_aside(workdir: Path) -> None:
    """Move the pictures of an earlier training, whose checkpoints are gone, out of the report."""
    pictures = [*workdir.glob("*.png"), *workdir.glob("samples")]
    if not pictures or not devices.is_first():
        return
    target = workdir / f"earlier-{_run_of(workdir)[:8] or 'unnamed'}"
    target.mkdir(exist_ok=True)
    for path in pictures:
        os.replace(path, target / path.name)
    logger.info(
        "moved %s of an earlier training to %s", ", ".join(p.name for p in pictures), target
    )


def claim_import(workdir: Path) -> None:
    """Name the training of a run folder that gets its first checkpoint from elsewhere."""
    if not whole_steps(workdir):
        _set_aside(workdir)
        _write(workdir / RUN, {"run": secrets.token_hex(8), "data": None})


def _run_of(workdir: Path) -> str:
    """The name of the training in a run folder; of an older version it has none."""
    path = workdir / RUN
    return _read(path)["run"] if path.exists() else ""


def _write(path: Path, content: dict[str, Any]) -> None:
    folder.write_json(path, with_checksum(content))


def _read(path: Path) -> dict[str, Any]:
    """Read a file of this module, and check that it is intact.

    Raises:
        ValueError: the file is damaged.
    """
    content = json_files.read(path)
    if not (isinstance(content, dict) and is_intact(content)):
        raise ValueError(f"{path} is damaged: delete it, and the same command writes it anew")
    return content


def _data(experiment: Experiment) -> dict[str, dict[str, Any]]:
    """Size and digest of every split, and the fields that cut it."""
    fields, dataset = dataclasses.asdict(experiment.settings.data), experiment.dataset
    return {
        name: {
            "digest": digest,
            "n": dataset.size(name),
            "cut": [fields[field] for field in SIZES[name]],
        }
        for name, digest in dataset.digests.items()
    }


def _is_replaced(then: dict[str, Any], now: dict[str, Any]) -> bool:
    """Say whether the content of a split has changed although its settings have not."""
    return then["cut"] == now["cut"] and then["digest"] != now["digest"]


def agree(experiment: Experiment, command: dict[str, str]) -> None:
    """See that all processes have the same command, config and data, before they compute together.

    Raises:
        ValueError: one has others; names it and what differs.
    """
    if jax.process_count() == 1:
        return
    config = experiment.settings.resolved()
    config["data"].pop("path")  # the same data may be elsewhere on another machine
    mine = {"command": command, "config": config, "digest of the data": experiment.dataset.digests}
    told = [json.loads(text) for text in devices.told_by_all("identity", json.dumps(mine))]
    lines = [
        f"{name}: {ours!r} in process 0, {theirs!r} in process {number}"
        for number, other in enumerate(told)
        for name, (ours, theirs) in folder.differences(told[0], other).items()
    ]
    if lines:
        if devices.is_first():
            time.sleep(GRACE_S)
        raise ValueError(
            f"the processes of this run were started with different configs or data: "
            f"{'; '.join(lines)}"
        )


def _named(split: dict[str, Any]) -> str:
    return f"{split['n'] or 'endless'} examples, digest {split['digest']}"
