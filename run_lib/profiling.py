"""A trace of some training steps, to be opened in TensorBoard or Perfetto."""

import logging
from pathlib import Path
from typing import Any

import jax

logger = logging.getLogger("fokker")
FIRST_DISPATCH = 3  # the ones before compile and fill the queues


class Profile:
    """Traces `num_steps` steps into a folder; nothing for none."""

    def __init__(self, folder: Path, num_steps: int) -> None:
        self.folder, self.num_steps = folder, num_steps
        self._dispatches, self._until = 0, None

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
