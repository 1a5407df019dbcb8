"""Training of the score network: its objective, where it starts from, snapshots, imports."""

import logging
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import importers
import json_files
import npz_files
import plotting
from checkpoints import Checkpoints, whole_steps
from checks import path_of, require
from losses import NUM_BINS, mean_loss
from operators import fold_in_each
from run_lib import devices, folder, identities, image_check, page
from run_lib.experiment import Experiment
from run_lib.sampling_loop import Generator
from run_lib.settings import Settings
from run_lib.trainer import HeldOut, Task, Trainer
from train_state import TrainState

logger = logging.getLogger("fokker")


def train(experiment: Experiment, workdir: str | Path) -> TrainState:
    """Train to `training.n_iters` steps, from the latest checkpoint of the folder if there is one.

    Returns the last state: `experiment.model.score(state.ema_params)` is the trained score.

    Raises:
        ValueError: a config field or the data are not usable.
        FloatingPointError: a loss or gradient was not finite; the last good checkpoint stays.
        Interrupted: the process was asked to stop; the state is saved.
    """
    settings, workdir = experiment.settings, Path(workdir)
    check(experiment, workdir)
    with folder.alone(workdir):
        trainer = score_trainer(experiment, workdir)
        if trainer.step < trainer.task.n_iters:
            image_check.check(experiment.dataset)
        identities.claim(experiment, workdir)
        folder.write_json(workdir / "config.json", settings.resolved())
        folder.write_json(workdir / "versions.json", folder.versions())
        _tell_about(experiment, workdir, trainer)
        if devices.is_first() and (found := experiment.statistics()):
            npz_files.write(workdir / folder.STATISTICS, found)
        trainer.run()
    if devices.is_first():
        page.write(workdir)
    return trainer.state


def _tell_about(experiment: Experiment, workdir: Path, trainer: Trainer) -> None:
    """about.json: data, network and command, and the day on which the training began."""
    path, today = workdir / page.ABOUT, time.strftime("%Y-%m-%d")
    about = {
        "data": experiment.dataset.describe(),
        "network": experiment.settings.model.name,
        "parameters": trainer.num_params,
        "begun": json_files.read(path)["begun"] if path.exists() else today,
        "command": folder.command(),
    }
    folder.write_json(path, about)


def check(experiment: Experiment, workdir: Path) -> None:
    """Build and trace what the training needs late, so that its errors come first.

    Raises:
        ValueError: something does not fit, or the folder was made with another config.
    """
    settings, dataset = experiment.settings, experiment.dataset
    training = settings.training
    devices.check_training_batch(training)
    experiment.solver, experiment.divergence, experiment.proposal  # noqa: B018
    experiment.check_head()
    if settings.eval.elbo:
        experiment.check_elbo()
    model, sampler = experiment.model, experiment.sampler
    size = training.microbatch or training.batch_size
    rows = jax.ShapeDtypeStruct((size // jax.device_count(),), jnp.int32)
    batch = {
        "image": jax.ShapeDtypeStruct(
            (*rows.shape, *dataset.shape), jnp.float32 if dataset.levels is None else jnp.uint8
        ),
        "noise_id": rows,
        "step": jax.ShapeDtypeStruct((), jnp.int32),
        "time_law": jax.ShapeDtypeStruct((2, NUM_BINS), jnp.float32),
    }
    if (known := dataset.contexts(dataset.held_out, np.zeros(1, int))) is not None:
        batch["context"] = jax.ShapeDtypeStruct((*rows.shape, *known.shape[1:]), known.dtype)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), dataset.shape))
    per_example = experiment.per_example_loss(train=True)
    jax.eval_shape(per_example, params, jax.random.key(0), batch)

    def sample(ids: jax.Array) -> jax.Array:
        params = model.init(jax.random.key(0), dataset.shape)
        like = jnp.zeros((2, *dataset.shape))
        keys = fold_in_each(jax.random.key(0), ids)
        return sampler(model.score(params), settings.sde, keys, like).x

    jax.eval_shape(jax.vmap(sample, axis_name=devices.AXIS_NAME), jnp.zeros((1, 2), jnp.int32))
    folder.reconcile(workdir, settings.resolved(), ignore=("eval", "sampling", "deq", "classifier"))


def score_trainer(experiment: Experiment, workdir: Path) -> Trainer:
    """The training of the score network in a run folder, from where it is."""
    checkpoints = Checkpoints(workdir, keep_every=experiment.settings.training.snapshot_freq)
    state = start(experiment, checkpoints, workdir)
    return Trainer(experiment, score_task(experiment, workdir), state, checkpoints)


def score_task(experiment: Experiment, workdir: Path) -> Task:
    """The training objective, the held-out loss and snapshots of samples."""
    settings = experiment.settings
    key, batch_size = experiment.keys["snapshot"], settings.training.batch_size
    generate = Generator(experiment, key, batch_size, "train")

    def snapshot(ema_params: Any, step: int) -> None:
        """Samples, as samples/step_<step>.png; training goes on without."""
        try:
            samples = generate(ema_params, 64)
        except FloatingPointError as error:
            logger.warning("no snapshot at step %d: %s", step, error)
            return
        if devices.is_first():
            path = workdir / "samples" / f"step_{step:07d}.png"
            plotting.save_samples(path, samples, experiment.dataset.levels)

    return Task(
        name=settings.model.name,
        n_iters=settings.training.n_iters,
        n_jitted_steps=settings.training.n_jitted_steps,
        ema_rate=settings.model.ema_rate,
        loss_fn=mean_loss(experiment.per_example_loss(train=True)),
        frozen=(),
        held_out=HeldOut(experiment.per_example_loss(train=False), experiment, ()),
        snapshot=snapshot if settings.training.snapshot_sampling else None,
    )


def start(experiment: Experiment, checkpoints: Checkpoints, workdir: Path) -> TrainState:
    """The state to go on from: the latest checkpoint, else a given one, else a fresh one.

    A given one is `training.init_from` or, as the published codes promise, the latest file in
    `checkpoints-meta/` of the run folder.

    Raises:
        ValueError: a checkpoint does not fit the network, or the given one has all steps already.
    """
    settings, steps = experiment.settings, checkpoints.steps()
    source = given_checkpoint(settings, workdir)
    if steps:
        if source is not None:
            logger.warning("%s has checkpoints of its own: %s is not used", workdir, source)
        return checkpoints.restore_latest(experiment.state_like)
    if source is None:
        params = experiment.with_prior(experiment.initial_parameters())
        return experiment.train_state(params)
    state, last = given_state(experiment, source), settings.training.n_iters
    allowed = f"more than the {int(state.step)} steps that {source} has already"
    require(int(state.step) < last, "training.n_iters", last, allowed)
    return state


def given_state(experiment: Experiment, source: Path) -> TrainState:
    """The state of a published checkpoint, or the latest of another run folder.

    Raises:
        ValueError: it cannot be read or does not fit the network.
    """
    like = experiment.state_like
    if source.is_dir():
        free = ("data", "seed", "eval", "sampling", "deq", "classifier")
        folder.reconcile(source, experiment.settings.resolved(), ignore=free)
        state = _latest_of(source, like)
    else:
        state = importers.load(source, experiment.model, experiment.shape, like)
    logger.info("starting from %s, step %d", source, int(state.step))
    return state


def given_checkpoint(settings: Settings, workdir: Path) -> Path | None:
    """A checkpoint or run folder from elsewhere to start from."""
    if settings.training.init_from:
        return path_of("training.init_from", settings.training.init_from)
    published = [p for p in (workdir / "checkpoints-meta").glob("checkpoint*") if p.is_file()]
    return max(published, key=lambda p: (_last_number(p.stem), p.name), default=None)


def _last_number(name: str) -> int:
    digits = name.rpartition("_")[2]
    return int(digits) if digits.isdecimal() else -1


def _latest_of(run: Path, like: TrainState) -> TrainState:
    """The latest checkpoint of another run folder."""
    if not (run / "checkpoints").is_dir():
        raise ValueError(f"training.init_from={str(run)!r}: the folder has no checkpoints/")
    others = Checkpoints(run)
    try:
        steps = others.steps()
        if not steps:
            raise ValueError(f"training.init_from={str(run)!r}: the folder has no checkpoint")
        return others.read_latest(like)
    finally:
        others.close()


def import_checkpoint(experiment: Experiment, workdir: Path) -> None:
    """Write the checkpoint that training would start from as one of this run folder.

    Raises:
        ValueError: no checkpoint is given or it does not fit, or the folder has checkpoints.
    """
    settings = experiment.settings
    source = source_of(settings, workdir)
    state = given_state(experiment, source)
    write_import(workdir, settings.resolved(), state, settings.training.snapshot_freq)


def source_of(settings: Settings, workdir: Path) -> Path:
    """The checkpoint or run folder to import.

    Raises:
        ValueError: none is given.
    """
    source = given_checkpoint(settings, workdir)
    if source is None:
        raise ValueError(
            "training.init_from='': say which checkpoint to import, a Flax file, a .pth or a run "
            f"folder (or put it into {workdir / 'checkpoints-meta'})"
        )
    return source


def write_import(
    workdir: Path, config: dict[str, Any], state: TrainState, snapshot_freq: int
) -> None:
    """A state from elsewhere as the only checkpoint of a run folder.

    Raises:
        ValueError: the folder has other checkpoints, or another process is at it.
    """
    step, there = int(state.step), whole_steps(workdir)
    if there not in ([], [step]):
        raise ValueError(f"{workdir / 'checkpoints'} is not empty: use another --workdir")
    with (
        folder.alone(workdir),
        closing(Checkpoints(workdir, keep_every=snapshot_freq)) as checkpoints,
    ):
        if there and not checkpoints.holds(state):
            raise ValueError(
                f"{workdir / 'checkpoints' / str(step)} holds other numbers: use another --workdir"
            )
        if there:
            logger.info("%s holds step %d already", workdir, step)
            return
        identities.claim_import(workdir)
        folder.write_json(workdir / "config.json", config)
        folder.write_json(workdir / "versions.json", folder.versions())
        checkpoints.save(state)
    logger.info("wrote %s", checkpoints.directory / str(step))
