"""Training of the variational dequantiser of a trained score network, in a folder of its own.

`<workdir>/<deq_folder>/` is a run folder like any other: config.json, checkpoints/, metrics.jsonl.
"""

import contextlib
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import checksums
import flow_importer
import json_files
import train_state
from checkpoints import Checkpoints, whole_steps
from checks import path_of, require
from losses import dequantizer_loss, mean_loss
from run_lib import devices, folder, identities, image_check, loading, training
from run_lib.experiment import Experiment
from run_lib.trainer import HeldOut, Task, Trainer
from train_state import TrainState

logger = logging.getLogger("fokker")
INIT_IMAGES = 128  # of the batch that scales and biases start from


def train_dequantizer(
    experiment: Experiment, workdir: str | Path, deq_folder: str = "flowpp_dequantizer"
) -> TrainState:
    """Train to `deq.n_iters` steps against the latest checkpoint of the score network, frozen.

    A training that goes on keeps the checkpoint that it began with. Returns the last state.

    Raises:
        ValueError: there is no such checkpoint, or a config field or the data are not usable.
        FloatingPointError: a loss or gradient was not finite; the last good checkpoint stays.
    """
    settings, workdir = experiment.settings, Path(workdir)
    target = _folder(workdir, deq_folder)
    check(experiment, workdir, deq_folder)
    score_step = _score_step(workdir, target)
    score_params = loading.load_parameters(experiment, workdir, score_step)
    score = {"score_step": score_step, "score_parameters": checksums.digest(score_params)}
    _check_same_score(target, score)
    identities.claim(experiment, workdir)
    with folder.alone(target):
        kept = Checkpoints(target, keep_every=settings.training.snapshot_freq)
        state, task = _start(experiment, kept), _task(experiment, score_params)
        trainer = Trainer(experiment, task, state, kept)
        if trainer.step < task.n_iters:
            image_check.check(experiment.dataset)
        identities.claim(experiment, target)
        folder.write_json(target / "config.json", settings.resolved())
        folder.write_json(target / "versions.json", folder.versions() | score)
        trainer.run()
    return trainer.state


def check(
    experiment: Experiment, workdir: Path, deq_folder: str, earlier: Collection[str] = ()
) -> None:
    """Check what the training needs; modes before it may still make the score network.

    Raises:
        ValueError: something is missing or does not fit.
    """
    config, target = experiment.settings.resolved(), _folder(workdir, deq_folder)
    devices.check_training_batch(experiment.settings.training)
    folder.reconcile(workdir, config, ignore=("eval", "sampling", "optim", "deq", "classifier"))
    if not {"train", "import"} & set(earlier):
        _score_step(workdir, target)
    experiment.dequantizer  # noqa: B018 (data that can have none are refused)
    folder.reconcile(target, config, ignore=("eval", "sampling", "training"))


def _score_step(workdir: Path, target: Path) -> int:
    """Step of the score network: the one that training began with, else the latest.

    Raises:
        ValueError: there is none.
    """
    steps = loading.steps_in(workdir)
    if not steps:
        raise ValueError(f"no checkpoint in {workdir / 'checkpoints'}: run --mode=train first")
    before = _begun_with(target).get("score_step")
    if before not in (None, *steps):
        logger.warning(
            "the dequantiser in %s began with step %d of the score network, which is gone; it goes "
            "on with step %d", target, before, steps[-1],
        )  # fmt: skip
    return before if before in steps else steps[-1]


def _begun_with(target: Path) -> dict[str, Any]:
    """versions.json of a training of the dequantiser that has a checkpoint."""
    path = target / "versions.json"
    begun = path.exists() and whole_steps(target)
    return json_files.read(path) if begun else {}


def _check_same_score(target: Path, score: dict[str, Any]) -> None:
    """Refuse to go on against other parameters of the same step.

    Raises:
        ValueError: says both digests.
    """
    before = _begun_with(target)
    then, now = before.get("score_parameters"), score["score_parameters"]
    if before.get("score_step") == score["score_step"] and then not in (None, now):
        raise ValueError(
            f"the dequantiser in {target} began with other parameters of the score network at step "
            f"{score['score_step']}: {then} then, {now} now. Use another --deq_folder"
        )


def _folder(workdir: Path, deq_folder: str) -> Path:
    path = workdir / folder.plain_name(deq_folder, "--deq_folder", taken=("eval",))
    if (path / "rows.jsonl").exists():
        raise ValueError(f"--deq_folder={deq_folder!r}: {path} has results of an evaluation")
    return path


def _task(experiment: Experiment, score_params: Any) -> Task:
    """The bound in bits/dim under the noise of the flow."""
    settings = experiment.settings
    per_example = dequantizer_loss(
        experiment.dequantizer,
        experiment.model,
        experiment.proposal,
        num_times=settings.deq.num_times,
    )
    return Task(
        name="dequantiser",
        n_iters=settings.deq.n_iters,
        n_jitted_steps=1,  # a flow of convolutions gains nothing from more
        ema_rate=settings.deq.ema_rate,
        loss_fn=mean_loss(per_example),
        frozen=(score_params,),
        held_out=HeldOut(per_example, experiment, (score_params,)),
        snapshot=None,
    )


def _start(experiment: Experiment, kept: Checkpoints) -> TrainState:
    """The latest checkpoint, else `deq.init_from`, else a fresh state."""
    settings = experiment.settings
    if kept.steps():
        return kept.restore_latest(_state_like(experiment))
    if settings.deq.init_from:
        state = given_state(experiment)
        allowed = f"more than the {int(state.step)} steps of deq.init_from"
        require(
            int(state.step) < settings.deq.n_iters, "deq.n_iters", settings.deq.n_iters, allowed
        )
        return state
    batches = experiment.dataset.train_batches(
        batch_size=INIT_IMAGES, seed=settings.seed, first_step=0
    )
    image = jnp.asarray(next(batches)["image"])
    params = experiment.dequantizer.init(experiment.keys["dequantizer"], image)
    return train_state.create(params, settings.optim.chain(settings.deq.n_iters))


def _state_like(experiment: Experiment) -> TrainState:
    """Shapes and dtypes of the state."""
    settings = experiment.settings

    def fresh() -> TrainState:
        image = jnp.zeros((1, *experiment.shape), jnp.float32)
        params = settings.deq.flow.init(jax.random.key(0), image, image)["params"]
        return train_state.create(params, settings.optim.chain(settings.deq.n_iters))

    return jax.eval_shape(fresh)


def given_state(experiment: Experiment) -> TrainState:
    """The state of a published dequantiser, `deq.init_from`."""
    source = path_of("deq.init_from", experiment.settings.deq.init_from)
    state = flow_importer.load(source, _state_like(experiment))
    logger.info("starting from %s, step %d", source, int(state.step))
    return state


def import_given(
    experiment: Experiment, workdir: str | Path, deq_folder: str = "flowpp_dequantizer"
) -> None:
    """Write `deq.init_from` and `training.init_from`, those that are given, as checkpoints here.

    Raises:
        ValueError: none is given, one cannot be read or does not fit, or a folder has checkpoints.
    """
    settings, workdir = experiment.settings, Path(workdir)
    target = _folder(workdir, deq_folder)
    if settings.deq.init_from:
        state = given_state(experiment)
        training.write_import(target, settings.resolved(), state, settings.training.snapshot_freq)
    if settings.training.init_from or not settings.deq.init_from:
        training.import_checkpoint(experiment, workdir)


def check_given(experiment: Experiment, workdir: Path) -> None:
    """Check that there is a checkpoint to import.

    Raises:
        ValueError: none is given.
    """
    if not experiment.settings.deq.init_from:
        training.source_of(experiment.settings, workdir)


def check_dequantizer(experiment: Experiment, workdir: Path, deq_folder: str) -> Path:
    """The folder of a trained dequantiser.

    Raises:
        ValueError: there is none, or the data can have none.
    """
    experiment.dequantizer  # noqa: B018 (data that can have none are refused)
    target = _folder(workdir, deq_folder)
    if not loading.steps_in(target):
        raise ValueError(
            f"eval.dequantization='variational': no dequantiser in {target}: run --mode=train_deq "
            "with this --workdir first"
        )
    return target


def load_dequantizer(experiment: Experiment, workdir: Path, deq_folder: str) -> tuple[Any, str]:
    """(moving average of the latest checkpoint, its name for the protocol).

    Raises:
        ValueError: there is none.
    """
    target = check_dequantizer(experiment, workdir, deq_folder)
    folder.reconcile(
        target,
        experiment.settings.resolved(),
        ignore=("eval", "sampling", "training", "optim", "data.num_train"),
    )
    with contextlib.closing(Checkpoints(target)) as kept:
        state = kept.read_latest(_state_like(experiment))
    found = state.ema_params
    return found, f"{deq_folder} step {int(state.step)} {checksums.digest(found)[:6]}"
