"""Report a run while it goes on: metrics.jsonl, TensorBoard, progress, traces."""

import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar
from tqdm import tqdm

import json_lines
from checks import writing
from json_lines import is_count, is_number
from run_lib import devices, folder

logger = logging.getLogger("fokker")
FILE = "metrics.jsonl"  # of a run folder, or of the folder of a dequantiser
MAX_WAITING = 2  # dispatches beside the one that runs: a stop waits for all of them
FIRST_DISPATCH = 3  # the ones before compile and fill the queues
NumpyMetrics = dict[str, np.ndarray]


class NoMetrics:
    """A writer that writes nothing, because another process writes the metrics."""

    def __init__(self, workdir: Path, first_step: int) -> None:
        """Take the same arguments as a writer that writes."""

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        """Do nothing with the values."""

    def close(self) -> None:
        """Do nothing, since no file is open."""


class MetricsWriter(NoMetrics):
    """Scalars by step, to metrics.jsonl and TensorBoard.

    A resumed run starts at the step of its checkpoint: later lines of a killed run are dropped
    first, so that metrics.jsonl holds each step once.
    """

    def __init__(self, workdir: Path, first_step: int) -> None:
        self._path = workdir / FILE
        self._path.touch()
        _cut_after(self._path, first_step)
        self._file = self._path.open("a", encoding="utf-8")
        (workdir / "tensorboard").mkdir(exist_ok=True)
        # Not SummaryWriter, whose thread ends, and then the training waits, when the disk is full.
        self._events = EventsWriter(str(workdir / "tensorboard" / "events"))
        begin = SessionLog(status=SessionLog.START)  # TensorBoard forgets what it has from here on
        self._events.write_event(
            Event(wall_time=time.time(), step=first_step + 1, session_log=begin)
        )

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        """One line of metrics.jsonl and one TensorBoard point per value."""
        now = time.time()
        row = {"step": step, "split": split, "time": now, **values}
        with writing(self._path):
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        with writing(self._path.with_name("tensorboard")):
            for name, value in values.items():
                summary = scalar(f"{split}/{name}", value)
                self._events.write_event(Event(wall_time=now, step=step, summary=summary))
            self._events.flush()

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        self._events.close()


def _cut_after(path: Path, step: int) -> None:
    """Write the file anew without later steps, damaged lines and half a line at the end."""
    rows = (row for row in json_lines.read(path, _is_metrics) if row["step"] <= step)
    folder.replace_file(path, (json.dumps(row) + "\n" for row in rows))


def _is_metrics(row: dict[str, Any], _: bytes) -> bool:
    """Say whether a row has a step, a split, and nothing but numbers beside them."""
    values = (value for name, value in row.items() if name != "split")
    known = is_count(row.get("step")) and row.get("split") in ("train", "held_out")
    return known and all(map(is_number, values))


def read_metrics(workdir: Path) -> Iterator[dict[str, Any]]:
    """Rows of metrics.jsonl, one at a time; damaged lines are left out and said."""
    path = workdir / FILE
    if path.exists():
        yield from json_lines.read(path, _is_metrics)


class PendingMetrics:
    """Metrics still on the device; fetched and checked at the next log or checkpoint."""

    def __init__(self) -> None:
        self._pending: list[tuple[range, Any]] = []
        self._fetched: list[NumpyMetrics] = []

    def add(self, steps: range, metrics: Any) -> None:
        """Metrics of these steps, the first of [n]; waits for those of long ago."""
        self._pending.append((steps, metrics))
        if len(self._pending) > MAX_WAITING:
            jax.block_until_ready(self._pending[-1 - MAX_WAITING][1])

    def check(self) -> None:
        """Fetch all that is pending.

        Raises:
            FloatingPointError: one of them is not finite; names the step and the metric.
        """
        for steps, metrics in self._pending:
            found = jax.device_get(metrics)
            fetched = {name: values[: len(steps)] for name, values in found.items()}
            for name, values in fetched.items():
                bad = np.flatnonzero(~np.isfinite(values))
                if bad.size:
                    raise FloatingPointError(
                        f"{name} = {values[bad[0]]} at step {steps[bad[0]]} (steps "
                        f"{self._pending[0][0][0]} to {steps[-1]} were in flight); "
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


def as_text(values: dict[str, float]) -> str:
    """The values with their names, in one line."""
    return ", ".join(f"{name} {value:.4f}" for name, value in values.items())


def duration(seconds: float) -> str:
    """The time in the unit that suits it.

    >>> duration(80), duration(800), duration(40_000)
    ('80 s', '13 min', '11.1 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class Progress:
    """A bar with rate and time left on a terminal, plain lines otherwise."""

    def __init__(self, first: int, last: int, unit: str) -> None:
        self.step, self.last, self.unit = first, last, unit
        shown = sys.stderr.isatty() and devices.is_first()
        self.bar = tqdm(total=last, initial=first, unit=unit) if shown else None
        self.spoken = time.monotonic()
        self._compiled: set[str] = set()

    @contextlib.contextmanager
    def compiling(self, what: str) -> Iterator[None]:
        """A block that compiles when it first runs: then that is said, and its time not counted."""
        if what in self._compiled:
            yield
            return
        self._compiled.add(what)
        self.message(f"compiling {what}")
        began = time.monotonic()
        yield
        self.spoken += time.monotonic() - began
        if self.bar is not None:
            self.bar.unpause()

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
        place, shown = f"{self.unit} {step}/{self.last}", as_text(values)
        speed = f"{rate:.1f} {self.unit}s/s, {duration(left)} left"
        logger.info("%s", ", ".join(filter(None, (place, shown, speed))))

    def estimate(self, step: int, count: int, seconds: float) -> None:
        """Say at a step how long the rest takes, when the `count` steps before took `seconds`."""
        left = self.last - step
        if left > 0:
            text = f"{left} more {self.unit}s take about {duration(left * seconds / count)}"
            self.message(f"{text}, without evaluations and checkpoints")

    def message(self, text: str) -> None:
        """A line of its own."""
        if self.bar is not None:
            self.bar.clear()
        logger.info(text)

    def close(self) -> None:
        """Leave the terminal tidy."""
        if self.bar is not None:
            self.bar.close()


class Profile:
    """Traces `num_steps` steps into a folder; nothing for none."""

    def __init__(self, folder: Path, num_steps: int) -> None:
        self.folder, self.num_steps = folder, num_steps
        self._dispatches = 0
        self._until: int | None = None  # the step at which the trace ends

    def after(self, step: int, state: Any) -> None:
        """To be called after every dispatch with the step and state that it leads to."""
        self._dispatches += 1
        if self._until is not None and step >= self._until:
            jax.block_until_ready(state)
            self.close()
        elif self.num_steps and self._dispatches == FIRST_DISPATCH:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self.folder)
            self._until = step + self.num_steps

    def close(self) -> None:
        """Write what has been traced."""
        if self._until is None and self.num_steps:
            logger.warning("no trace: training ended before dispatch %d", FIRST_DISPATCH)
        if self._until is not None:
            self._until, self.num_steps = None, 0
            jax.profiler.stop_trace()
            logger.info("trace in %s: tensorboard --logdir=%s", self.folder, self.folder)
