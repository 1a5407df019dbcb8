"""Choose the checkpoints of a run folder that are evaluated, and load their parameters."""

import logging
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from checkpoints import Checkpoints
from checks import require
from run_lib import devices, folder, identities
from run_lib.experiment import Experiment
from run_lib.sections import EvalConfig
from run_lib.settings import Settings
from streams import Dataset

logger = logging.getLogger("fokker")
POLL_S = 5.0


def checkpoints_of(
    experiment: Experiment, workdir: Path, eval_folder: str
) -> Iterator[tuple[int, Any, Path]]:
    """(step, moving average of the parameters, folder of results) of every checkpoint.

    The folder is this process's alone until the last one is done.

    Raises:
        ValueError: the folder has no checkpoint, or was made with another model, SDE or data.
    """
    settings, target = experiment.settings, workdir / eval_folder
    check(experiment, workdir, eval_folder)
    reconcile(experiment, workdir)
    identities.claim(experiment, workdir)
    folder.same_seed(target, settings.seed)
    with folder.alone(target):
        folder.write_json(target / "config.json", settings.resolved())
        for step, params in parameters_of(experiment, workdir):
            yield step, params, target


def reconcile(experiment: Experiment, workdir: Path) -> None:
    """Compare the config with that of the run folder, in what its checkpoints depend on.

    Raises:
        ValueError: they are of another model or SDE.
    """
    ignore: tuple[str, ...] = ("eval", "sampling", "optim", "deq", "classifier")
    if not experiment.is_standardized:
        ignore += ("data.num_train",)
    folder.reconcile(workdir, experiment.settings.resolved(), ignore=ignore)


def parameters_of(experiment: Experiment, workdir: Path) -> Iterator[tuple[int, Any]]:
    """(step, moving average of the parameters) of every checkpoint that the config asks for."""
    for wanted in _wanted(experiment.settings) or [None]:
        yield load_average(experiment, workdir, wanted)


def check(
    experiment: Experiment, workdir: Path, eval_folder: str, earlier: Collection[str] = ()
) -> None:
    """Check what an evaluation of checkpoints needs; modes before it may still make these.

    Raises:
        ValueError: the checkpoints are not there, the folder of results is another's, the data lack
            the split, or the devices cannot share a batch.
    """
    config = experiment.settings.eval
    folder.results_folder(workdir, eval_folder)
    check_checkpoints(experiment.settings, workdir, earlier)
    devices.check_batch_size(config.batch_size, "eval.batch_size")
    _check_split(config, experiment.dataset)


def check_checkpoints(settings: Settings, workdir: Path, earlier: Collection[str] = ()) -> None:
    """The checkpoints are there that are asked for, or modes before will make them.

    Raises:
        ValueError: they are not, and will not be.
    """
    if "train" in earlier:
        _check_after_training(settings)
    elif "import" not in earlier:
        _wait_for_checkpoints(settings, workdir)


def _check_split(config: EvalConfig, dataset: Dataset) -> None:
    """The split that is to be evaluated is there, and has as many examples as are asked for."""
    allowed = f"one of {sorted(dataset.splits)} (data.num_validation makes a validation split)"
    require(config.dataset in dataset.splits, "eval.dataset", config.dataset, allowed)
    size, number = dataset.size(config.dataset), config.num_examples
    allowed = f"0 (all) to {size}, the examples of the {config.dataset} split"
    require(size is None or number <= size, "eval.num_examples", number, allowed)


def _check_after_training(settings: Settings) -> None:
    """Check that a training that comes first will leave the checkpoints that are asked for."""
    training, config = settings.training, settings.eval
    last = max(_wanted(settings), default=0)
    allowed = (
        f"at most {training.n_iters // training.snapshot_freq}, as training ends at step "
        f"{training.n_iters} and keeps each {training.snapshot_freq}th"
    )
    require(last <= training.n_iters, "eval.end_ckpt", config.end_ckpt, allowed)


def _wait_for_checkpoints(settings: Settings, workdir: Path) -> None:
    """Wait up to `eval.wait_s` seconds for the checkpoints that training has yet to write."""
    deadline = time.monotonic() + settings.eval.wait_s
    while True:
        available = steps_in(workdir)
        missing = _missing(settings, workdir, available)
        left = deadline - time.monotonic()
        if not missing or left <= 0.0:
            break
        logger.info("waiting up to %.0f s: %s", left, missing)
        time.sleep(min(POLL_S, left))
    if missing:
        raise ValueError(missing)


def steps_in(workdir: Path) -> list[int]:
    """Steps of the complete checkpoints of a folder; none where the folder does not exist."""
    if not (workdir / "checkpoints").is_dir():
        return []
    checkpoints = Checkpoints(workdir)
    try:
        return checkpoints.steps()
    finally:
        checkpoints.close()


def _wanted(settings: Settings) -> list[int]:
    """Steps to evaluate, begin_ckpt..end_ckpt × snapshot_freq; none said: the latest."""
    config = settings.eval
    every = settings.training.snapshot_freq
    return [k * every for k in range(max(config.begin_ckpt, 1), config.end_ckpt + 1)]


def _missing(settings: Settings, workdir: Path, available: list[int]) -> str:
    """Say which of the wanted checkpoints are missing; return an empty text if none is."""
    if not available:
        return (
            f"no checkpoint in {(workdir / 'checkpoints').absolute()}: run --mode=train with this "
            "--workdir first"
        )
    absent = sorted(set(_wanted(settings)) - set(available))
    if not absent:
        return ""
    config, every = settings.eval, settings.training.snapshot_freq
    return (
        f"eval.begin_ckpt={config.begin_ckpt}, eval.end_ckpt={config.end_ckpt} times "
        f"training.snapshot_freq={every}: no checkpoint of steps {absent}; there are {available}"
    )


def load_average(experiment: Experiment, workdir: Path, step: int | None) -> tuple[int, Any]:
    """(step, moving average of the score network's parameters) of a checkpoint.

    Nothing else of it is read. With None it is the latest checkpoint that can be read.
    """
    checkpoints, wanted = Checkpoints(workdir), ("step", "ema_params")
    try:
        like = experiment.state_like
        if step is None:
            state = checkpoints.read_latest(like, wanted)
        else:
            state = checkpoints.restore(step, like, wanted)
        return int(state.step), state.ema_params
    finally:
        checkpoints.close()


def load_parameters(experiment: Experiment, workdir: Path, step: int) -> Any:
    """The moving average of the score network's parameters at a checkpoint."""
    return load_average(experiment, workdir, step)[1]
