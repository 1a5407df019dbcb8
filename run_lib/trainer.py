"""The loop of any training: data, steps, metrics, checkpoints; resumes where it was."""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import train_state
from checkpoints import Checkpoints
from run_lib import devices, interruption
from run_lib.experiment import Experiment
from run_lib.metrics import MetricsWriter, NoMetrics, PendingMetrics, Profile, Progress, as_text
from streams import Batch, ahead
from train_state import TrainState

logger = logging.getLogger("fokker")
PyTree = Any


@dataclasses.dataclass(frozen=True)
class Task:
    """A training task: what is trained, and what is due beside the steps."""

    name: str
    n_iters: int
    n_jitted_steps: int
    ema_rate: float
    # (parameters, key, part of the batch, *frozen) → (loss, metrics)
    loss_fn: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
    frozen: tuple[PyTree, ...]  # what the loss needs beside its parameters
    held_out: Callable[[PyTree], dict[str, float]]  # of the moving average
    snapshot: Callable[[PyTree, int], None] | None  # (moving average, step)


class Trainer:
    """One run of a task: its state, and what happens at which step."""

    def __init__(
        self, experiment: Experiment, task: Task, state: TrainState, checkpoints: Checkpoints
    ) -> None:
        self.settings, self.dataset, self.task = experiment.settings, experiment.dataset, task
        self.key, self.checkpoints = devices.replicate(experiment.keys["train"]), checkpoints
        self.state, self.step = devices.replicate(state), int(state.step)
        self.step_fn = self._mapped_step(self.settings.training.microbatch)
        self.metrics = PendingMetrics()
        self.num_params = sum(leaf.size for leaf in jax.tree.leaves(self.state.params))
        logger.info(
            "%s: %s, %d parameters, %d device(s), from step %d to %d",
            checkpoints.directory.parent, task.name, self.num_params, jax.device_count(),
            self.step, task.n_iters,
        )  # fmt: skip

    def _mapped_step(self, microbatch: int) -> jax.stages.Wrapped:
        """(state, key, batches, *frozen) → (state, metrics) over all devices."""
        task, settings = self.task, self.settings
        batch_size = settings.training.batch_size
        step_fn = train_state.train_step(
            task.loss_fn,
            settings.optim.chain(task.n_iters),
            task.ema_rate,
            devices.AXIS_NAME,
            num_microbatches=batch_size // (microbatch or batch_size),
        )
        dispatch = train_state.single_step if task.n_jitted_steps == 1 else train_state.many_steps
        return devices.map_over_devices(
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
        workdir = self.checkpoints.directory.parent
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(interruption.saving())
            stack.callback(self.checkpoints.close)
            progress = stack.enter_context(
                contextlib.closing(Progress(self.step, self.task.n_iters, "step"))
            )
            make = MetricsWriter if devices.is_first() else NoMetrics
            writer = stack.enter_context(contextlib.closing(make(workdir, self.step)))
            traced = self.settings.training.profile_steps if devices.is_first() else 0
            profile = stack.enter_context(contextlib.closing(Profile(workdir / "profile", traced)))
            stack.callback(stop.steps_are_over)
            for number, (first, batches) in enumerate(self.batches()):
                arguments = (self.state, self.key, batches, *self.task.frozen)
                if number == 0:
                    self.compile_steps(arguments, progress)
                if number == 1:  # the first dispatch also loads its program
                    jax.block_until_ready(self.state)
                began = time.monotonic()
                self.state, metrics = self.step_fn(*arguments)
                self.step = first + self._count(first)
                if number == 1:
                    jax.block_until_ready(self.state)
                    progress.estimate(self.step, self.step - first, time.monotonic() - began)
                self.metrics.add(range(first, self.step), metrics)
                self.events(writer, progress)
                profile.after(self.step, self.state)
                if stop.asked():
                    self.metrics.check()  # waits for the steps that were dispatched
                    stop.steps_are_over()
                    self.save()
                    break

    def compile_steps(self, arguments: tuple[Any, ...], progress: Progress) -> None:
        """Compile what will be dispatched."""
        with progress.compiling("the training step"):
            self.check_memory(arguments)
        devices.wait_for_all("compiled")  # the first step is a collective of devices

    def check_memory(self, arguments: tuple[Any, ...]) -> None:
        """Compile the step, say what it needs, and refuse what the devices do not have."""

        def compiled(step_fn: jax.stages.Wrapped) -> Any:
            return step_fn.lower(*arguments).compile()

        need, limit = devices.needed(compiled(self.step_fn)), devices.available()
        if need is None or limit is None:
            return
        text = (
            f"a step takes {need.total / devices.GIB:.2f} GiB of the {limit / devices.GIB:.2f} GiB"
        )
        if need.total <= limit:
            logger.info("%s of each device", text)
            return
        training, count = self.settings.training, jax.device_count()
        size = training.batch_size
        advice = devices.microbatch_that_fits(
            need,
            training.microbatch or size,
            [n for n in range(count, size, count) if size % n == 0],
            lambda n: compiled(self._mapped_step(n)),
            limit,
        )
        raise ValueError(f"{text} of a device: {advice}. What saves memory: {devices.LEVERS}")

    def _count(self, step: int) -> int:
        """Number of steps from this one to the next multiple of n_jitted_steps, or to the last."""
        to_multiple = self.task.n_jitted_steps - step % self.task.n_jitted_steps
        return min(to_multiple, self.task.n_iters - step)

    def batches(self) -> Iterator[tuple[int, Batch]]:
        """(first step, batches [n, D, B/D, ...] on their way to the devices)."""
        return ahead(self._groups())

    def _groups(self) -> Iterator[tuple[int, Batch]]:
        """Batches of the steps up to the next multiple of n_jitted_steps, again and again.

        Fewer are filled up with empty ones.
        """
        training = self.settings.training
        stream = self.dataset.train_batches(
            batch_size=training.batch_size,
            seed=self.settings.seed,
            first_step=self.step,
            host=devices.host(),
        )
        noise_id = np.arange(training.batch_size, dtype=np.int32)
        noise_id = noise_id[devices.host().part(training.batch_size)]
        first = self.step
        while first < self.task.n_iters:
            count = self._count(first)
            group = [next(stream) | {"noise_id": noise_id} for _ in range(count)]
            empty = jax.tree.map(np.zeros_like, group[0])
            group += [empty] * (self.task.n_jitted_steps - count)
            stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *group)
            yield first, devices.put(stacked, axis=1)
            first += count

    def events(self, writer: NoMetrics, progress: Progress) -> None:
        """Whatever is due at this step."""
        training, last = self.settings.training, self.step == self.task.n_iters

        def due(every: int) -> bool:
            return self.step % every == 0 or last

        if due(training.log_freq):
            means = self.metrics.flush()
            writer.write(self.step, "train", means)
            progress.update(self.step, means)
        if due(training.eval_freq):
            with progress.compiling("the held-out loss"):
                values = self.task.held_out(self.state.ema_params)
            writer.write(self.step, "held_out", values)
            progress.message(f"step {self.step}: held-out {as_text(values)}")
        if due(training.snapshot_freq_for_preemption) or due(training.snapshot_freq):
            self.save()
        if self.task.snapshot is not None and due(training.snapshot_freq):
            with progress.compiling("the sampler of snapshots"):
                self.task.snapshot(self.state.ema_params, self.step)

    def save(self) -> None:
        """Checkpoint, but never a state that follows a value that was not finite."""
        self.metrics.check()
        self.checkpoints.save(devices.to_global(self.state))


class HeldOut:
    """An objective without dropout on the first held-out examples, same noise every time."""

    def __init__(
        self,
        per_example: Callable[..., tuple[jax.Array, dict[str, jax.Array]]],
        experiment: Experiment,
        frozen: tuple[PyTree, ...],
    ) -> None:
        self.key, self.frozen = experiment.keys["held_out"], frozen
        in_axes = (None, None, 0, *(None for _ in frozen))

        def means(params: PyTree, key: jax.Array, batch: Batch, *frozen: PyTree) -> PyTree:
            values, parts = per_example(params, key, batch, *frozen)
            sums = jax.tree.map(
                lambda v: jnp.sum(jnp.where(batch["mask"], v, 0.0)), {"loss": values, **parts}
            )
            sums, count = jax.lax.psum((sums, jnp.sum(batch["mask"])), devices.AXIS_NAME)
            return jax.tree.map(lambda total: total / count, sums)

        self._means = devices.map_over_devices(means, in_axes=in_axes, out_axes=None)
        dataset, batch_size = experiment.dataset, experiment.settings.training.batch_size
        batches = dataset.eval_batches(dataset.held_out, batch_size=batch_size, host=devices.host())
        noise_id = np.arange(batch_size, dtype=np.int32)[devices.host().part(batch_size)]
        self._batch = devices.put(next(batches) | {"noise_id": noise_id})

    def __call__(self, params: PyTree) -> dict[str, float]:
        """Means over the examples of all processes."""
        found = self._means(params, self.key, self._batch, *self.frozen)
        return {name: float(value) for name, value in found.items()}
