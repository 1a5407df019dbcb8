"""Training of the variational dequantiser of a trained score network, in a folder of its own.

`<workdir>/<deq_folder>/` is a run folder like any other: config.json, checkpoints/, metrics.jsonl.
"""

import hashlib
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import datasets
import flow_importer
import json_files
import train_state
from checkpoints import Checkpoints
from checks import path_of, require
from losses import dequantizer_loss, mean_loss
from run_lib import build, folder, loading, parallel, training
from run_lib.settings import Settings
from run_lib.trainer import HeldOut, Task, Trainer
from streams import Dataset
from train_state import TrainState

logger = logging.getLogger("fokker")
INIT_IMAGES = 128  # of the batch that scales and biases start from


def train_dequantizer(settings: Settings, workdir: Path, deq_folder: str) -> None:
    """Train to `deq.n_iters` steps against the latest checkpoint of the score network, frozen.

    A training that goes on keeps the checkpoint that it began with.

    Raises:
        ValueError: there is no such checkpoint, or a config field or the data are not usable.
        FloatingPointError: a loss or gradient was not finite; the last good checkpoint stays.
    """
    parallel.check_training_batch(settings.training)
    target = _folder(workdir, deq_folder)
    ignore = ("eval", "sampling", "optim", "deq")
    folder.reconcile(workdir, settings.resolved(), ignore=ignore)
    score_step = _score_step(workdir, target)
    dataset = datasets.load(settings.data)
    parallel.wait_for_all("data", seconds=parallel.START_S)
    build.dequantizer(settings, dataset)
    folder.reconcile(target, settings.resolved(), ignore=("eval", "sampling", "training"))
    score_params = loading.load_parameters(settings, dataset, workdir, score_step)
    with folder.alone(target):
        checkpoints = Checkpoints(target, keep_every=settings.training.snapshot_freq)
        state, task = _start(settings, dataset, checkpoints), _task(settings, dataset, score_params)
        trainer = Trainer(settings, dataset, task, state, checkpoints)
        folder.write_json(target / "config.json", settings.resolved())
        folder.write_json(target / "versions.json", folder.versions() | {"score_step": score_step})
        trainer.run()


def _score_step(workdir: Path, target: Path) -> int:
    """Step of the score network: the one that training began with, else the latest.

    Raises:
        ValueError: there is none.
    """
    steps, path = loading.steps_in(workdir), target / "versions.json"
    if not steps:
        raise ValueError(f"no checkpoint in {workdir / 'checkpoints'}: run --mode=train first")
    begun = path.exists() and loading.steps_in(target)
    before = json_files.read(path).get("score_step") if begun else None
    if before not in (None, *steps):
        logger.warning(
            "the dequantiser in %s began with step %d of the score network, which is gone; it goes "
            "on with step %d", target, before, steps[-1],
        )  # fmt: skip
    return before if before in steps else steps[-1]


def _folder(workdir: Path, deq_folder: str) -> Path:
    return workdir / folder.plain_name(deq_folder, "--deq_folder", taken=("eval",))


def _task(settings: Settings, dataset: Dataset, score_params: Any) -> Task:
    """The bound in bits/dim under the noise of the flow."""
    per_example = dequantizer_loss(
        build.dequantizer(settings, dataset),
        build.score_model(settings),
        build.likelihood_tools(settings).proposal,
        num_times=settings.deq.num_times,
    )
    return Task(
        name="dequantiser",
        n_iters=settings.deq.n_iters,
        n_jitted_steps=1,  # a flow of convolutions gains nothing from more
        ema_rate=settings.deq.ema_rate,
        loss_fn=mean_loss(per_example),
        frozen=(score_params,),
        held_out=HeldOut(per_example, settings, dataset, (score_params,)),
        snapshot=None,
    )


def _start(settings: Settings, dataset: Dataset, checkpoints: Checkpoints) -> TrainState:
    """The latest checkpoint, else `deq.init_from`, else a fresh state."""
    steps = checkpoints.steps()
    if steps:
        return checkpoints.restore_latest(_shapes(settings, dataset.shape))
    if settings.deq.init_from:
        state = given_state(settings, dataset.shape)
        allowed = f"more than the {int(state.step)} steps of deq.init_from"
        require(
            int(state.step) < settings.deq.n_iters, "deq.n_iters", settings.deq.n_iters, allowed
        )
        return state
    batches = dataset.train_batches(batch_size=INIT_IMAGES, seed=settings.seed, first_step=0)
    image = jnp.asarray(next(batches)["image"])
    params = build.dequantizer(settings, dataset).init(build.keys(settings)["dequantizer"], image)
    return train_state.create(params, settings.optim.chain(settings.deq.n_iters))


def _shapes(settings: Settings, shape: tuple[int, ...]) -> TrainState:
    """Shapes of the state."""

    def fresh() -> TrainState:
        image = jnp.zeros((1, *shape), jnp.float32)
        params = settings.deq.flow.init(jax.random.key(0), image, image)["params"]
        return train_state.create(params, settings.optim.chain(settings.deq.n_iters))

    return jax.eval_shape(fresh)


def given_state(settings: Settings, shape: tuple[int, ...]) -> TrainState:
    """The state of a published dequantiser, `deq.init_from`."""
    source = path_of("deq.init_from", settings.deq.init_from)
    state = flow_importer.load(source, _shapes(settings, shape))
    logger.info("starting from %s, step %d", source, int(state.step))
    return state


def import_given(settings: Settings, workdir: Path, deq_folder: str) -> None:
    """Write `deq.init_from` and `training.init_from`, those that are given, as checkpoints here.

    Raises:
        ValueError: none is given, one cannot be read or does not fit, or a folder has checkpoints.
    """
    target = _folder(workdir, deq_folder)
    if settings.deq.init_from:
        state = given_state(settings, training.shape_of(settings))
        folder.write_import(target, settings.resolved(), state, settings.training.snapshot_freq)
    if settings.training.init_from or not settings.deq.init_from:
        training.import_checkpoint(settings, workdir)


def load_dequantizer(
    settings: Settings, dataset: Dataset, workdir: Path, deq_folder: str
) -> tuple[Any, str]:
    """(moving average of the latest checkpoint, its name for the protocol).

    Raises:
        ValueError: there is none.
    """
    build.dequantizer(settings, dataset)  # data that can have none are refused first
    target = _folder(workdir, deq_folder)
    steps = loading.steps_in(target)
    if not steps:
        raise ValueError(
            f"eval.dequantization='variational': no dequantiser in {target}: run --mode=train_deq "
            "with this --workdir first"
        )
    folder.reconcile(
        target,
        settings.resolved(),
        ignore=("eval", "sampling", "training", "optim", "data.num_train"),
    )
    checkpoints = Checkpoints(target)
    try:
        state = checkpoints.read_latest(_shapes(settings, dataset.shape))
    finally:
        checkpoints.close()
    found = state.ema_params
    return found, f"{deq_folder} step {int(state.step)} {_fingerprint(found)}"


def _fingerprint(params: Any) -> str:
    """Six hexadecimal digits of the numbers: another training with as many steps shows."""
    leaves = jax.device_get(jax.tree.leaves(params))
    return hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves)).hexdigest()[:6]
