"""Which checkpoints of a run folder are evaluated, and their parameters."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

import datasets
from checkpoints import Checkpoints
from checks import require
from run_lib import build, folder, parallel
from run_lib.settings import EvalConfig, Settings
from streams import Dataset
from train_state import TrainState

logger = logging.getLogger("fokker")
POLL_S = 5.0


def checkpoints_of(
    settings: Settings, workdir: Path, eval_folder: str
) -> Iterator[tuple[int, Dataset, Any, Path]]:
    """(step, data, moving average of the parameters, folder of results) of every checkpoint.

    The folder is this process's alone until the last one is done.

    Raises:
        ValueError: the folder has no checkpoint, or was made with another model, SDE or data.
    """
    folder.plain_name(eval_folder, "--eval_folder")
    steps = checkpoint_steps(settings, workdir)
    ignore = ("eval", "sampling", "optim", "deq", "data.num_train")
    folder.reconcile(workdir, settings.resolved(), ignore=ignore)
    folder.same_examples(workdir / eval_folder, settings.resolved())
    parallel.check_batch_size(settings.eval.batch_size, "eval.batch_size")
    dataset = datasets.load(settings.data)
    parallel.wait_for_all("data", seconds=parallel.START_S)
    _check_split(settings.eval, dataset)
    target = workdir / eval_folder
    with folder.alone(target):
        folder.write_json(target / "config.json", settings.resolved())
        for wanted in steps or [None]:
            state = load_state(settings, dataset, workdir, wanted)
            yield int(state.step), dataset, state.ema_params, target


def _check_split(config: EvalConfig, dataset: Dataset) -> None:
    """The split that is to be evaluated is there, and has as many examples as are asked for."""
    allowed = f"one of {sorted(dataset.splits)} (data.num_validation makes a validation split)"
    require(config.dataset in dataset.splits, "eval.dataset", config.dataset, allowed)
    size, number = dataset.size(config.dataset), config.num_examples
    allowed = f"0 (all) to {size}, the examples of the {config.dataset} split"
    require(size is None or number <= size, "eval.num_examples", number, allowed)


def checkpoint_steps(settings: Settings, workdir: Path) -> list[int]:
    """Steps to evaluate, begin_ckpt..end_ckpt × snapshot_freq; none said: the latest.

    Waits up to `eval.wait_s` seconds for those that training has yet to write.
    """
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
    return _wanted(settings)


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
    config = settings.eval
    every = settings.training.snapshot_freq
    return [k * every for k in range(max(config.begin_ckpt, 1), config.end_ckpt + 1)]


def _missing(settings: Settings, workdir: Path, available: list[int]) -> str:
    """What there is to complain of; empty when all that is wanted is there."""
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


def load_state(settings: Settings, dataset: Dataset, workdir: Path, step: int | None) -> TrainState:
    """The score network at a checkpoint; None: at the latest that can be read."""
    model = build.score_model(settings)

    def fresh() -> TrainState:
        return build.train_state(settings, model.init(jax.random.key(0), dataset.shape))

    checkpoints = Checkpoints(workdir)
    try:
        like = jax.eval_shape(fresh)
        return checkpoints.read_latest(like) if step is None else checkpoints.restore(step, like)
    finally:
        checkpoints.close()


def load_parameters(settings: Settings, dataset: Dataset, workdir: Path, step: int) -> Any:
    """The moving average of the score network's parameters at a checkpoint."""
    return load_state(settings, dataset, workdir, step).ema_params
