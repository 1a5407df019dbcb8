"""SIGTERM and SIGINT: what is under way is saved, and the process ends with a code of its own.

Outside training everything is safe to end at any moment (rows, samples and checkpoints are written
whole), so there a signal ends the process at once. Training asks for time to save by `saving()`: a
step, or a snapshot beside it, may take GRACE_S more. A second signal ends the process at once, too.
"""

import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np

from run_lib import devices

logger = logging.getLogger("fokker")
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: the same command continues
GRACE_S = 25.0  # for the step under way to end
SAME_S = 0.5  # within which a signal is the one before: `timeout` and batch systems send it twice
SIGNALS = (signal.SIGTERM, signal.SIGINT)
AGAIN = "the same command continues from the last checkpoint, row or sample"


class Interrupted(Exception):
    """The process was asked to stop, and the state is saved."""


class _Watch:
    """A thread that hears of signals also while the main thread compiles or computes."""

    def __init__(self) -> None:
        self.requested = threading.Event()
        self.saved = threading.Event()
        self.can_save = False
        self._heard_at = 0.0
        self._reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, daemon=True, name="signals").start()

    def _listen(self) -> None:
        while True:
            number = os.read(self._reader, 1)[0]
            if number in SIGNALS:
                self._heard(signal.Signals(number).name)

    def _heard(self, name: str) -> None:
        if not self.can_save:
            _end(f"{name}: stopped; {AGAIN}")
        if self.requested.is_set():
            if time.monotonic() - self._heard_at < SAME_S:
                return
            _end(f"{name} again: stopped without saving; {AGAIN}")
        logger.warning("%s: saving after the step under way, then the end", name)
        self._heard_at = time.monotonic()
        self.requested.set()
        threading.Thread(target=self._wait, daemon=True, name="grace").start()

    def _wait(self) -> None:
        if not self.saved.wait(GRACE_S):
            _end(f"no step has ended within {GRACE_S:.0f} s: stopped without saving; {AGAIN}")


_watch: _Watch | None = None


def watch() -> None:
    """From now on signals are heard; called by the main program, again when handlers were taken."""
    global _watch
    _watch = _watch or _Watch()
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)


def _end(message: str) -> None:
    """The end of the process, whatever the main thread does and the disk has no room for."""
    try:
        logger.warning(message)
        for handler in logger.handlers:
            handler.flush()
        sys.stderr.flush()
    finally:
        os._exit(EXIT_INTERRUPTED)


class Stop:
    """The question whether to stop, asked at every step of a block that saves."""

    def __init__(self) -> None:
        self._agreement = Agreement()

    def asked(self) -> bool:
        """To be called after every dispatch; all processes hear of it at the same one."""
        return self._agreement(self._requested())

    def steps_are_over(self) -> None:
        """Lift the time limit: what is written from now on may take as long as it needs."""
        if _watch is not None:
            _watch.saved.set()

    def in_the_end(self) -> bool:
        """Say, after the last step, whether any process was asked to stop."""
        return self._agreement.now(self._requested())

    def _requested(self) -> bool:
        return _watch is not None and _watch.requested.is_set()


@contextmanager
def saving() -> Iterator[Stop]:
    """A block that saves when it is asked to stop.

    Raises:
        Interrupted: at the end of the block, if so.
    """
    stop = Stop()
    if _watch is not None:
        _watch.saved.clear()
        _watch.can_save = True
    try:
        yield stop
    finally:
        stop.steps_are_over()
        if _watch is not None:
            _watch.can_save = False
    if stop.in_the_end():  # asked last, so that no signal is lost between the question and the end
        raise Interrupted(f"stopped and saved; {AGAIN}")


class Agreement:
    """A vote on whether any process says yes; all processes learn it at the same call.

    An all-reduce that is read two calls later, so that no process waits for its devices; with one
    process nothing at all.
    """

    DELAY = 2

    def __init__(self) -> None:
        self._votes: deque[jax.Array] = deque()
        self._any = devices.map_over_devices(
            lambda vote: jax.lax.pmax(vote, devices.AXIS_NAME), in_axes=(0,), out_axes=None
        )

    def __call__(self, vote: bool) -> bool:
        """Take a vote, and say whether any process said yes two calls ago."""
        if jax.process_count() == 1:
            return vote
        self._votes.append(self._cast(vote))
        return len(self._votes) > self.DELAY and bool(self._votes.popleft())

    def now(self, vote: bool) -> bool:
        """Say whether any process says yes now; wait for all of them."""
        return vote if jax.process_count() == 1 else bool(self._cast(vote))

    def _cast(self, vote: bool) -> jax.Array:
        return self._any(np.full(jax.local_device_count(), vote, np.int32))
