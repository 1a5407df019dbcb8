"""Checkpoints of a run folder: asynchronous, atomic, resumed automatically (Orbax).

`checkpoints/<step>/` holds one TrainState. Kept: the two latest, and every multiple of
`training.snapshot_freq` for ever.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train_state import TrainState


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, workdir: Path, *, keep_every: int | None = None) -> None:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2,
            keep_period=keep_every,
            enable_async_checkpointing=True,
        )
        self.directory = (workdir / "checkpoints").absolute()
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_handlers=ocp.StandardCheckpointHandler()
        )

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending; waits for a write under way."""
        self._manager.wait_until_finished()
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState) -> None:
        """Start writing `state` under its own step; returns before the write has finished."""
        step = int(state.step)
        if step not in self._manager.all_steps():
            self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state saved at `step`, with the structure, shapes and dtypes of `like`.

        Raises:
            ValueError: there is no such checkpoint, or it does not fit `like`; names the leaves.
        """
        steps = self.steps()
        if step not in steps:
            raise ValueError(f"no checkpoint of step {step} in {self.directory}: there are {steps}")
        saved, wanted = _shapes(self._manager.item_metadata(step).tree), _shapes(like)
        wrong = [
            f"{leaf}: saved {saved.get(leaf, 'nothing')}, wanted {wanted.get(leaf, 'nothing')}"
            for leaf in sorted(saved.keys() | wanted.keys())
            if saved.get(leaf) != wanted.get(leaf)
        ]
        if wrong:
            raise ValueError(
                f"{self.directory / str(step)} does not fit, {len(wrong)} leaves differ: "
                + "; ".join(wrong[:8])
            )
        # On all devices there are now, which may be others than those that wrote it.
        everywhere = NamedSharding(Mesh(np.asarray(jax.devices()), "all"), PartitionSpec())
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), like
        )
        return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))

    def close(self) -> None:
        """Wait until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shape of every leaf by its path, as params.Dense_0.kernel."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape)
        for path, leaf in leaves
    }
