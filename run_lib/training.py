"""The training loop: data, steps, metrics, checkpoints, snapshots; resumes where it was."""

import dataclasses
import logging
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import datasets
import importers
import plotting
import train_state
from checkpoints import Checkpoints
from losses import mean_loss
from operators import fold_in_each
from run_lib import build, folder, parallel, report
from run_lib.sampling_loop import Generator
from run_lib.settings import Settings, require
from streams import Batch, Dataset
from train_state import TrainState

logger = logging.getLogger("fokker")
NumpyMetrics = dict[str, np.ndarray]


def train(settings: Settings, workdir: Path) -> None:
    """Train to `training.n_iters` steps, from the latest checkpoint of the folder if there is one.

    Raises:
        ValueError: a config field or the data are not usable.
        FloatingPointError: a loss or gradient was not finite; the last good checkpoint stays.
    """
    parallel.check_batch_size(settings.training.batch_size, "training.batch_size")
    dataset = datasets.load(settings.data)
    check(settings, dataset)
    folder.reconcile(workdir, settings.resolved(), ignore=("eval", "sampling"))
    trainer = Trainer(settings, dataset, workdir)
    folder.write_json(workdir / "config.json", settings.resolved())
    folder.write_json(workdir / "versions.json", folder.versions())
    trainer.run()
    report.write(workdir)


def check(settings: Settings, dataset: Dataset) -> None:
    """Build and trace what is needed late, so that its errors come before anything is written."""
    build.likelihood_tools(settings)
    if settings.eval.elbo:
        build.check_elbo(settings)
    model, sampler = build.score_model(settings), build.sampler(settings)
    rows = jax.ShapeDtypeStruct((settings.training.batch_size // jax.device_count(),), jnp.int32)
    batch = {
        "image": jax.ShapeDtypeStruct(
            (*rows.shape, *dataset.shape), jnp.float32 if dataset.levels is None else jnp.uint8
        ),
        "noise_id": rows,
        "step": jax.ShapeDtypeStruct((), jnp.int32),
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


class Trainer:
    """One run: its state, and what happens at which step."""

    def __init__(self, settings: Settings, dataset: Dataset, workdir: Path) -> None:
        self.settings, self.dataset, self.workdir = settings, dataset, workdir
        self.keys = build.keys(settings)
        self.checkpoints = Checkpoints(workdir, keep_every=settings.training.snapshot_freq)
        optimizer = settings.optim.chain(settings.training.n_iters)
        self.state = start(settings, dataset.shape, self.checkpoints, workdir)
        self.step = int(self.state.step)
        loss_fn = mean_loss(build.per_example_loss(settings, dataset, train=True))
        step_fn = train_state.train_step(
            loss_fn, optimizer, settings.model.ema_rate, build.AXIS_NAME
        )
        single = settings.training.n_jitted_steps == 1
        dispatch = train_state.single_step if single else train_state.many_steps
        self.step_fn = parallel.map_over_devices(
            dispatch(step_fn),
            in_axes=(None, None, 1),
            out_axes=None,
            donate_argnums=(0,),
        )
        self.held_out = HeldOutLoss(settings, dataset, self.keys["held_out"])
        self.generate = Generator(
            settings, dataset, self.keys["snapshot"], settings.training.batch_size
        )
        self.metrics = PendingMetrics()
        num_params = sum(leaf.size for leaf in jax.tree.leaves(self.state.params))
        logger.info(
            "%s: %s, %d parameters, %d device(s), from step %d to %d",
            workdir, settings.model.name, num_params, jax.device_count(),
            self.step, settings.training.n_iters,
        )  # fmt: skip

    def run(self) -> None:
        """Take all remaining steps; everything is due at the last one."""
        writer = folder.MetricsWriter(self.workdir, self.step)
        progress = Progress(self.step, self.settings.training.n_iters)
        try:
            for first, batches in self.batches():
                self.state, metrics = self.step_fn(self.state, self.keys["train"], batches)
                self.step = first + len(batches["mask"])
                self.metrics.add(first, metrics)
                self.events(writer, progress)
        finally:
            progress.close()
            writer.close()
            self.checkpoints.close()

    def batches(self) -> Iterator[tuple[int, Batch]]:
        """(first step, batches [n, D, B/D, ...]), each up to a multiple of n_jitted_steps."""
        training = self.settings.training
        stream = self.dataset.train_batches(
            batch_size=training.batch_size,
            seed=self.settings.seed,
            first_step=self.step,
            host=parallel.host(),
        )
        noise_id = np.arange(training.batch_size, dtype=np.int32)
        noise_id = noise_id[parallel.host().part(training.batch_size)]
        first = self.step
        while first < training.n_iters:
            to_multiple = training.n_jitted_steps - first % training.n_jitted_steps
            count = min(to_multiple, training.n_iters - first)
            group = [next(stream) | {"noise_id": noise_id} for _ in range(count)]
            stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *group)
            yield first, parallel.split(stacked, axis=1)
            first += count

    def events(self, writer: folder.MetricsWriter, progress: "Progress") -> None:
        """Whatever is due at this step."""
        training, last = self.settings.training, self.step == self.settings.training.n_iters

        def due(every: int) -> bool:
            return self.step % every == 0 or last

        if due(training.log_freq):
            means = self.metrics.flush()
            writer.write(self.step, "train", means)
            progress.update(self.step, means)
        if due(training.eval_freq):
            values = self.held_out(self.state.ema_params)
            writer.write(self.step, "held_out", values)
            progress.message(f"step {self.step}: held-out {_text(values)}")
        if due(training.snapshot_freq_for_preemption) or due(training.snapshot_freq):
            self.save()
        if due(training.snapshot_freq) and training.snapshot_sampling:
            self.snapshot()

    def save(self) -> None:
        """Checkpoint, but never a state that follows a value that was not finite."""
        self.metrics.check()
        self.checkpoints.save(self.state)

    def snapshot(self) -> None:
        """Samples of the moving average, as samples/step_<step>.png; training goes on without."""
        try:
            samples = self.generate(self.state.ema_params, 64)
        except FloatingPointError as error:
            logger.warning("no snapshot at step %d: %s", self.step, error)
            return
        path = self.workdir / "samples" / f"step_{self.step:07d}.png"
        plotting.save_samples(path, samples, self.dataset.levels)


def start(
    settings: Settings, shape: tuple[int, ...], checkpoints: Checkpoints, workdir: Path
) -> TrainState:
    """The state to go on from: the latest checkpoint, else a given one, else a fresh one.

    A given one is `training.init_from` or, as the published codes promise, the latest file in
    `checkpoints-meta/` of the run folder.

    Raises:
        ValueError: a checkpoint does not fit the network, or the given one has all steps already.
    """
    steps, source = checkpoints.steps(), given_checkpoint(settings, workdir)
    if steps:
        if source is not None:
            logger.warning("%s has checkpoints of its own: %s is not used", workdir, source)
        return checkpoints.restore(steps[-1], fresh_state(settings, shape))
    if source is None:
        return fresh_state(settings, shape)
    state, last = given_state(settings, shape, source), settings.training.n_iters
    allowed = f"more than the {int(state.step)} steps that {source} has already"
    require(int(state.step) < last, "training.n_iters", last, allowed)
    return state


def fresh_state(settings: Settings, shape: tuple[int, ...]) -> TrainState:
    """The state before the first step."""
    params = build.score_model(settings).init(build.keys(settings)["init"], shape)
    return train_state.create(params, settings.optim.chain(settings.training.n_iters))


def given_state(settings: Settings, shape: tuple[int, ...], source: Path) -> TrainState:
    """The state of a published checkpoint, or the latest of another run folder.

    Raises:
        ValueError: it cannot be read or does not fit the network.
    """
    if source.is_dir():
        free = ("data", "seed", "eval", "sampling")
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
        return Path(settings.training.init_from).expanduser()
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
        return others.restore(steps[-1], like)
    finally:
        others.close()


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
    data = settings.data
    size = (data.image_size, data.image_size, data.num_channels)
    shape = size if data.image_size else datasets.load(data).shape
    state = given_state(settings, shape, source)
    there = sorted(path.name for path in (workdir / "checkpoints").glob("[0-9]*"))
    if there == [str(int(state.step))]:
        logger.info("%s holds step %s already", workdir, there[0])
        return
    if there:
        raise ValueError(f"{workdir / 'checkpoints'} is not empty: use another --workdir")
    folder.write_json(workdir / "config.json", settings.resolved())
    folder.write_json(workdir / "versions.json", folder.versions())
    checkpoints = Checkpoints(workdir, keep_every=settings.training.snapshot_freq)
    checkpoints.save(state)
    checkpoints.close()
    logger.info("wrote %s", checkpoints.directory / str(int(state.step)))


class PendingMetrics:
    """Metrics still on the device; fetched and checked at the next log or checkpoint."""

    def __init__(self) -> None:
        self._pending: list[tuple[int, Any]] = []
        self._fetched: list[NumpyMetrics] = []

    def add(self, first_step: int, metrics: Any) -> None:
        """Metrics [n] of steps first_step, first_step + 1, ..."""
        self._pending.append((first_step, metrics))

    def check(self) -> None:
        """Fetch all that is pending.

        Raises:
            FloatingPointError: one of them is not finite; names the step and the metric.
        """
        for first_step, metrics in self._pending:
            fetched = jax.device_get(metrics)
            for name, values in fetched.items():
                bad = np.flatnonzero(~np.isfinite(values))
                if bad.size:
                    raise FloatingPointError(
                        f"{name} = {values[bad[0]]} at step {first_step + bad[0]} (steps "
                        f"{self._pending[0][0]} to {first_step + len(values) - 1} were in flight); "
                        "training stops, the last checkpoint is from before it. Lower optim.lr, "
                        "lengthen optim.warmup or lower optim.grad_clip"
                    )
            self._fetched.append(fetched)
        self._pending.clear()

    def flush(self) -> dict[str, float]:
        """Means since the last flush."""
        self.check()
        names = self._fetched[0]
        means = {
            name: float(np.mean(np.concatenate([f[name] for f in self._fetched]))) for name in names
        }
        self._fetched.clear()
        return means


@dataclasses.dataclass
class HeldOutLoss:
    """The training objective without dropout on the first test examples, same noise every time."""

    settings: Settings
    dataset: Dataset
    key: jax.Array

    def __post_init__(self) -> None:
        per_example = build.per_example_loss(self.settings, self.dataset, train=False)
        self._mapped: Callable = parallel.map_over_devices(
            per_example, in_axes=(None, None, 0), out_axes=0
        )
        batch_size = self.settings.training.batch_size
        batches = self.dataset.eval_batches("test", batch_size=batch_size, host=parallel.host())
        self._batch = next(batches)
        noise_id = np.arange(batch_size, dtype=np.int32)[parallel.host().part(batch_size)]
        self._split = parallel.split(self._batch | {"noise_id": noise_id})

    def __call__(self, params: Any) -> dict[str, float]:
        """Means over this host's examples."""
        values, parts = parallel.join(self._mapped(params, self.key, self._split))
        mask = self._batch["mask"]
        return {name: float(v[mask].mean()) for name, v in {"loss": values, **parts}.items()}


def _text(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in values.items())


class Progress:
    """A bar with rate and time left on a terminal, plain lines otherwise."""

    def __init__(self, first: int, last: int) -> None:
        self.step, self.last = first, last
        self.bar = tqdm(total=last, initial=first, unit="step") if sys.stderr.isatty() else None
        self.spoken = time.monotonic()

    def update(self, step: int, values: dict[str, float]) -> None:
        """Show the step, its rate and the time left; without a terminal at most every 10 s."""
        if self.bar is not None:
            self.bar.set_postfix(values, refresh=False)
            self.bar.update(step - self.bar.n)
            return
        now = time.monotonic()
        if now - self.spoken < 10.0 and step < self.last:
            return
        rate = (step - self.step) / (now - self.spoken)  # of the steps since the last line
        left = (self.last - step) / rate
        self.step, self.spoken = step, now
        logger.info(
            "step %d/%d, %s, %.1f steps/s, %.0f s left", step, self.last, _text(values), rate, left
        )

    def message(self, text: str) -> None:
        """A line of its own."""
        if self.bar is not None:
            self.bar.clear()
        logger.info(text)

    def close(self) -> None:
        """Leave the terminal tidy."""
        if self.bar is not None:
            self.bar.close()
