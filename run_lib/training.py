"""Training of the score network: its objective, where it starts from, snapshots, imports."""

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import datasets
import importers
import plotting
from checkpoints import Checkpoints
from checks import path_of, require
from losses import NUM_BINS, mean_loss
from operators import fold_in_each
from run_lib import build, folder, parallel, report
from run_lib.sampling_loop import Generator
from run_lib.settings import Settings
from run_lib.trainer import HeldOut, Task, Trainer
from streams import Dataset
from train_state import TrainState

logger = logging.getLogger("fokker")


def train(settings: Settings, workdir: Path) -> None:
    """Train to `training.n_iters` steps, from the latest checkpoint of the folder if there is one.

    Raises:
        ValueError: a config field or the data are not usable.
        FloatingPointError: a loss or gradient was not finite; the last good checkpoint stays.
        Interrupted: the process was asked to stop; the state is saved.
    """
    parallel.check_training_batch(settings.training)
    dataset = datasets.load(settings.data)
    parallel.wait_for_all("data", seconds=parallel.START_S)
    check(settings, dataset)
    folder.reconcile(workdir, settings.resolved(), ignore=("eval", "sampling", "deq"))
    with folder.alone(workdir):
        trainer = score_trainer(settings, dataset, workdir)
        folder.write_json(workdir / "config.json", settings.resolved())
        folder.write_json(workdir / "versions.json", folder.versions())
        trainer.run()
    if parallel.is_first():
        report.write(workdir)


def check(settings: Settings, dataset: Dataset) -> None:
    """Build and trace what is needed late, so that its errors come before anything is written."""
    build.likelihood_tools(settings)
    build.check_head(settings, dataset)
    if settings.eval.elbo:
        build.check_elbo(settings)
    model, sampler = build.score_model(settings), build.sampler(settings)
    training = settings.training
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
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), dataset.shape))
    per_example = build.per_example_loss(settings, dataset, train=True)
    jax.eval_shape(per_example, params, jax.random.key(0), batch)

    def sample(ids: jax.Array) -> jax.Array:
        params = model.init(jax.random.key(0), dataset.shape)
        like = jnp.zeros((2, *dataset.shape))
        keys = fold_in_each(jax.random.key(0), ids)
        return sampler(model.score(params), settings.sde, keys, like).x

    jax.eval_shape(jax.vmap(sample, axis_name=build.AXIS_NAME), jnp.zeros((1, 2), jnp.int32))


def score_trainer(settings: Settings, dataset: Dataset, workdir: Path) -> Trainer:
    """The training of the score network in a run folder, from where it is."""
    checkpoints = Checkpoints(workdir, keep_every=settings.training.snapshot_freq)
    state = start(settings, dataset, checkpoints, workdir)
    return Trainer(settings, dataset, score_task(settings, dataset, workdir), state, checkpoints)


def score_task(settings: Settings, dataset: Dataset, workdir: Path) -> Task:
    """The training objective, the held-out loss and snapshots of samples."""
    keys, batch_size = build.keys(settings), settings.training.batch_size
    generate = Generator(settings, dataset, keys["snapshot"], batch_size)

    def snapshot(ema_params: Any, step: int) -> None:
        """Samples, as samples/step_<step>.png; training goes on without."""
        try:
            samples = generate(ema_params, 64)
        except FloatingPointError as error:
            logger.warning("no snapshot at step %d: %s", step, error)
            return
        if parallel.is_first():
            path = workdir / "samples" / f"step_{step:07d}.png"
            plotting.save_samples(path, samples, dataset.levels)

    return Task(
        name=settings.model.name,
        n_iters=settings.training.n_iters,
        n_jitted_steps=settings.training.n_jitted_steps,
        ema_rate=settings.model.ema_rate,
        loss_fn=mean_loss(build.per_example_loss(settings, dataset, train=True)),
        frozen=(),
        held_out=HeldOut(
            build.per_example_loss(settings, dataset, train=False), settings, dataset, ()
        ),
        snapshot=snapshot if settings.training.snapshot_sampling else None,
    )


def start(
    settings: Settings, dataset: Dataset, checkpoints: Checkpoints, workdir: Path
) -> TrainState:
    """The state to go on from: the latest checkpoint, else a given one, else a fresh one.

    A given one is `training.init_from` or, as the published codes promise, the latest file in
    `checkpoints-meta/` of the run folder.

    Raises:
        ValueError: a checkpoint does not fit the network, or the given one has all steps already.
    """
    steps, source = checkpoints.steps(), given_checkpoint(settings, workdir)
    shape = dataset.shape
    if steps:
        if source is not None:
            logger.warning("%s has checkpoints of its own: %s is not used", workdir, source)
        return checkpoints.restore_latest(jax.eval_shape(lambda: fresh_state(settings, shape)))
    if source is None:
        params = build.score_model(settings).init(build.keys(settings)["init"], shape)
        return build.train_state(settings, build.with_prior(settings, dataset, params))
    state, last = given_state(settings, shape, source), settings.training.n_iters
    allowed = f"more than the {int(state.step)} steps that {source} has already"
    require(int(state.step) < last, "training.n_iters", last, allowed)
    return state


def fresh_state(settings: Settings, shape: tuple[int, ...]) -> TrainState:
    """The state before the first step, of a head before it has seen data."""
    params = build.score_model(settings).init(build.keys(settings)["init"], shape)
    return build.train_state(settings, params)


def given_state(settings: Settings, shape: tuple[int, ...], source: Path) -> TrainState:
    """The state of a published checkpoint, or the latest of another run folder.

    Raises:
        ValueError: it cannot be read or does not fit the network.
    """
    if source.is_dir():
        free = ("data", "seed", "eval", "sampling", "deq")
        folder.reconcile(source, settings.resolved(), ignore=free)
        state = _latest_of(source, fresh_state(settings, shape))
    else:
        like = jax.eval_shape(lambda: fresh_state(settings, shape))
        state = importers.load(source, build.score_model(settings), shape, like)
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


def shape_of(settings: Settings) -> tuple[int, ...]:
    """Of one example; the data are read only where the config leaves it to them."""
    data = settings.data
    size = (data.image_size, data.image_size, data.num_channels)
    return size if data.image_size else datasets.load(data).shape


def import_checkpoint(settings: Settings, workdir: Path) -> None:
    """Write the checkpoint that training would start from as one of this run folder.

    Raises:
        ValueError: no checkpoint is given or it does not fit, or the folder has checkpoints.
    """
    source = given_checkpoint(settings, workdir)
    if source is None:
        raise ValueError(
            "training.init_from='': say which checkpoint to import, a Flax file, a .pth or a run "
            f"folder (or put it into {workdir / 'checkpoints-meta'})"
        )
    state = given_state(settings, shape_of(settings), source)
    folder.write_import(workdir, settings.resolved(), state, settings.training.snapshot_freq)
