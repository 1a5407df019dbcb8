"""The loop of any training: data, steps, metrics, checkpoints; resumes where it was."""

import contextlib
import dataclasses
import logging
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import train_state
from checkpoints import Checkpoints
from run_lib import build, folder, interruption, memory, parallel
from run_lib.profiling import Profile
from run_lib.settings import Settings
from streams import Batch, Dataset, ahead
from train_state import TrainState

logger = logging.getLogger("fokker")
MAX_WAITING = 2  # dispatches beside the one that runs: a stop waits for all of them
NumpyMetrics = dict[str, np.ndarray]
PyTree = Any


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained, and what is due beside the steps."""

    name: str
    n_iters: int
    n_jitted_steps: int
    ema_rate: float
    # (parameters, key, part of the batch, *frozen) → (loss, metrics)
    loss_fn: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
    frozen: tuple[PyTree, ...]  # what the loss needs beside its parameters
    held_out: Callable[[PyTree], dict[str, float]]  # of the moving average
    snapshot: Callable[[PyTree, int], None]  # (moving average, step)


class Trainer:
    """One run of a task: its state, and what happens at which step."""

    def __init__(
        self,
        settings: Settings,
        dataset: Dataset,
        task: Task,
        state: TrainState,
        checkpoints: Checkpoints,
    ) -> None:
        self.settings, self.dataset, self.task = settings, dataset, task
        self.key, self.checkpoints = parallel.replicate(build.keys(settings)["train"]), checkpoints
        self.state, self.step = parallel.replicate(state), int(state.step)
        self.step_fn = self._mapped_step(settings.training.microbatch)
        self.metrics = PendingMetrics()
        num_params = sum(leaf.size for leaf in jax.tree.leaves(self.state.params))
        logger.info(
            "%s: %s, %d parameters, %d device(s), from step %d to %d",
            checkpoints.directory.parent, task.name, num_params, jax.device_count(),
            self.step, task.n_iters,
        )  # fmt: skip

    def _mapped_step(self, microbatch: int) -> Callable[..., tuple[TrainState, Any]]:
        """(state, key, batches, *frozen) → (state, metrics) over all devices."""
        task, settings = self.task, self.settings
        batch_size = settings.training.batch_size
        step_fn = train_state.train_step(
            task.loss_fn,
            settings.optim.chain(task.n_iters),
            task.ema_rate,
            build.AXIS_NAME,
            num_microbatches=batch_size // (microbatch or batch_size),
        )
        dispatch = train_state.single_step if task.n_jitted_steps == 1 else train_state.many_steps
        return parallel.map_over_devices(
            dispatch(step_fn),
            in_axes=(None, None, 1, *(None for _ in task.frozen)),
            out_axes=None,
            donate_argnums=(0,),
        )

    def run(self) -> None:
        """Take all remaining steps; everything is due at the last one.

        Raises:
            ValueError: the step needs more memory than a device has; says what would fit.
            Interrupted: the process was asked to stop; the state is saved.
            FloatingPointError: a value was not finite.
        """
        workdir, started = self.checkpoints.directory.parent, False
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(interruption.saving())
            stack.callback(self.checkpoints.close)
            progress = stack.enter_context(
                contextlib.closing(Progress(self.step, self.task.n_iters, "step"))
            )
            make = folder.MetricsWriter if parallel.is_first() else folder.NoMetrics
            writer = stack.enter_context(contextlib.closing(make(workdir, self.step)))
            traced = self.settings.training.profile_steps if parallel.is_first() else 0
            profile = stack.enter_context(contextlib.closing(Profile(workdir / "profile", traced)))
            stack.callback(stop.steps_are_over)
            for first, batches in self.batches():
                arguments = (self.state, self.key, batches, *self.task.frozen)
                if not started:
                    logger.info("compiling the step")
                    self.check_memory(arguments)
                started = True
                self.state, metrics = self.step_fn(*arguments)
                self.step = first + len(batches["mask"])
                self.metrics.add(first, metrics)
                self.events(writer, progress)
                profile.after(self.step, self.state)
                if stop.asked():
                    self.metrics.check()  # waits for the steps that were dispatched
                    stop.steps_are_over()
                    self.save()
                    break

    def check_memory(self, arguments: tuple[Any, ...]) -> None:
        """Compile the step, say what it needs, and refuse what the devices do not have."""

        def compiled(step_fn: Callable[..., Any]) -> Any:
            return step_fn.lower(*arguments).compile()

        need, limit = memory.needed(compiled(self.step_fn)), memory.available()
        if need is None or limit is None:
            return
        text = f"a step takes {need.total / memory.GIB:.2f} GiB of the {limit / memory.GIB:.2f} GiB"
        if need.total <= limit:
            logger.info("%s of each device", text)
            return
        training, devices = self.settings.training, jax.device_count()
        size = training.batch_size
        advice = memory.microbatch_that_fits(
            need,
            training.microbatch or size,
            [n for n in range(devices, size, devices) if size % n == 0],
            lambda n: compiled(self._mapped_step(n)),
            limit,
        )
        raise ValueError(f"{text} of a device: {advice}. What saves memory: {memory.LEVERS}")

    def batches(self) -> Iterator[tuple[int, Batch]]:
        """(first step, batches [n, D, B/D, ...] on their way to the devices)."""
        return ahead(self._groups())

    def _groups(self) -> Iterator[tuple[int, Batch]]:
        """Batches of the steps up to the next multiple of n_jitted_steps, again and again."""
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
        while first < self.task.n_iters:
            to_multiple = self.task.n_jitted_steps - first % self.task.n_jitted_steps
            count = min(to_multiple, self.task.n_iters - first)
            group = [next(stream) | {"noise_id": noise_id} for _ in range(count)]
            stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *group)
            yield first, parallel.put(stacked, axis=1)
            first += count

    def events(self, writer: folder.MetricsWriter, progress: "Progress") -> None:
        """Whatever is due at this step."""
        training, last = self.settings.training, self.step == self.task.n_iters

        def due(every: int) -> bool:
            return self.step % every == 0 or last

        if due(training.log_freq):
            means = self.metrics.flush()
            writer.write(self.step, "train", means)
            progress.update(self.step, means)
        if due(training.eval_freq):
            values = self.task.held_out(self.state.ema_params)
            writer.write(self.step, "held_out", values)
            progress.message(f"step {self.step}: held-out {_text(values)}")
        if due(training.snapshot_freq_for_preemption) or due(training.snapshot_freq):
            self.save()
        if due(training.snapshot_freq):
            self.task.snapshot(self.state.ema_params, self.step)

    def save(self) -> None:
        """Checkpoint, but never a state that follows a value that was not finite."""
        self.metrics.check()
        self.checkpoints.save(parallel.to_global(self.state))


class HeldOut:
    """An objective without dropout on the first held-out examples, same noise every time."""

    def __init__(
        self,
        per_example: Callable[..., tuple[jax.Array, dict[str, jax.Array]]],
        settings: Settings,
        dataset: Dataset,
        frozen: tuple[PyTree, ...],
    ) -> None:
        self.key, self.frozen = build.keys(settings)["held_out"], frozen
        in_axes = (None, None, 0, *(None for _ in frozen))

        def means(params: PyTree, key: jax.Array, batch: Batch, *frozen: PyTree) -> PyTree:
            values, parts = per_example(params, key, batch, *frozen)
            sums = jax.tree.map(
                lambda v: jnp.sum(jnp.where(batch["mask"], v, 0.0)), {"loss": values, **parts}
            )
            sums, count = jax.lax.psum((sums, jnp.sum(batch["mask"])), build.AXIS_NAME)
            return jax.tree.map(lambda total: total / count, sums)

        self._means = parallel.map_over_devices(means, in_axes=in_axes, out_axes=None)
        batch_size = settings.training.batch_size
        batches = dataset.eval_batches(
            dataset.held_out, batch_size=batch_size, host=parallel.host()
        )
        noise_id = np.arange(batch_size, dtype=np.int32)[parallel.host().part(batch_size)]
        self._batch = parallel.put(next(batches) | {"noise_id": noise_id})

    def __call__(self, params: PyTree) -> dict[str, float]:
        """Means over the examples of all processes."""
        found = self._means(params, self.key, self._batch, *self.frozen)
        return {name: float(value) for name, value in found.items()}


class PendingMetrics:
    """Metrics still on the device; fetched and checked at the next log or checkpoint."""

    def __init__(self) -> None:
        self._pending: list[tuple[int, Any]] = []
        self._fetched: list[NumpyMetrics] = []

    def add(self, first_step: int, metrics: Any) -> None:
        """Metrics [n] of steps first_step, first_step + 1, ...; waits for those of long ago."""
        self._pending.append((first_step, metrics))
        if len(self._pending) > MAX_WAITING:
            jax.block_until_ready(self._pending[-1 - MAX_WAITING][1])

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


def _text(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in values.items())


class Progress:
    """A bar with rate and time left on a terminal, plain lines otherwise.

    The rate counts from the first update on: what comes before it is compilation.
    """

    def __init__(self, first: int, last: int, unit: str) -> None:
        self.step, self.last, self.unit = first, last, unit
        shown = sys.stderr.isatty() and parallel.is_first()
        self.bar = tqdm(total=last, initial=first, unit=unit) if shown else None
        self.spoken: float | None = None

    def update(self, step: int, values: dict[str, float]) -> None:
        """Show the step, its rate and the time left; without a terminal at most every 10 s."""
        now, before = time.monotonic(), self.spoken
        if self.bar is not None:
            if before is None:
                self.bar.unpause()
            self.bar.set_postfix(values, refresh=False)
            self.bar.update(step - self.bar.n)
        elif before is not None and now - before < 10.0 and step < self.last:
            return
        else:
            logger.info("%s %d/%d, %s%s", self.unit, step, self.last, _text(values),
                        "" if before is None else self._rate(step, now - before))  # fmt: skip
        self.step, self.spoken = step, now

    def _rate(self, step: int, seconds: float) -> str:
        """Speed since the last line, and how long what is left takes at it."""
        rate = (step - self.step) / max(seconds, 1e-9)
        left = f", {(self.last - step) / rate:.0f} s left" if rate > 0.0 else ""
        return f", {rate:.1f} {self.unit}s/s{left}"

    def message(self, text: str) -> None:
        """A line of its own."""
        if self.bar is not None:
            self.bar.clear()
        logger.info(text)

    def close(self) -> None:
        """Leave the terminal tidy."""
        if self.bar is not None:
            self.bar.close()
