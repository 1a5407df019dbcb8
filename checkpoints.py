"""Checkpoints of a run folder: asynchronous, atomic, resumed automatically (Orbax).

`checkpoints/<step>/` holds one TrainState. Kept: the two latest, and for ever every multiple of
`training.snapshot_freq`, of its value now or of that when the checkpoint was written. What a killed
run has left beside these is deleted when training starts. A checkpoint that cannot be read moves to
`checkpoints-damaged/` when training goes on from the one before it.
"""

import logging
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import checkpoint_managers as policies

import checksums
import json_files
from train_state import TrainState, equal_moments

logger = logging.getLogger("fokker")
MARGIN = 1_000_000  # bytes beside a checkpoint: metrics, log
KEPT_EVERY = "kept_every"
TEMPORARY = ".orbax-checkpoint-tmp"  # in the name of a checkpoint that is not wholly written
NOT_OF_FILES = (MemoryError, jax.errors.JaxRuntimeError)  # of devices, or of another process


class LostProcessError(RuntimeError):
    """Another process of the run did not come to a checkpoint that all write."""


class DamagedError(ValueError):
    """A checkpoint cannot be read back."""


class MisfitError(ValueError):
    """A checkpoint is of another network."""


def _is_of_processes(error: BaseException | None) -> bool:
    """Say whether an error comes from waiting for other processes: JAX's own, or a timeout."""
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError | TimeoutError):
            return True
        error = error.__cause__ or error.__context__
    return False


def whole_steps(workdir: Path) -> list[int]:
    """Steps with a complete checkpoint in a run folder as it shows them, ascending."""
    return sorted(int(p.name) for p in _folder(workdir).glob("[0-9]*") if p.name.isdecimal())


def _folder(workdir: Path) -> Path:
    return (workdir / "checkpoints").absolute()


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
        workdir: the run folder.
        keep_every: of a run that writes here, and that alone does so: the multiples that it keeps.
            What a killed one has left is deleted.
    """

    def __init__(self, workdir: Path, *, keep_every: int | None = None) -> None:
        self.directory, self._keep_every = _folder(workdir), keep_every
        kept = [policies.LatestN(2)]
        if keep_every is not None:
            if jax.process_index() == 0:  # the others wait for it where they open the folder
                self._delete_left_over()
            kept.append(policies.EveryNSteps(keep_every))
        steps = self._whole()
        latest = [step for step in steps[-2:] if self._is_multiple(step)]
        kept.append(policies.CustomSteps(steps[:-2] + latest))
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            enable_async_checkpointing=True,
        )
        self._manager = self._open()

    def _whole(self) -> list[int]:
        return whole_steps(self.directory.parent)

    def _delete_left_over(self) -> None:
        """Half-written and half-deleted checkpoints, and those that were to be deleted next."""
        for path in self.directory.glob(f"*{TEMPORARY}*"):
            shutil.rmtree(path)
        for step in self._whole()[:-2]:
            if not (self._metadata_path(step).exists() and self._is_kept(step)):
                shutil.rmtree(self.directory / str(step))

    def _is_kept(self, step: int) -> bool:
        """Say whether a checkpoint that is none of the latest stays, as those of older code do."""
        known = KEPT_EVERY in self._metadata(step)
        return not known or self._is_multiple(step) or step % self._keep_every == 0

    def _is_multiple(self, step: int) -> bool:
        """Say whether the run that wrote this checkpoint meant to keep it for ever."""
        every = self._metadata(step).get(KEPT_EVERY)
        return type(every) is int and every > 0 and step % every == 0

    def _metadata_path(self, step: int) -> Path:
        return self.directory / str(step) / "_CHECKPOINT_METADATA"

    def _metadata(self, step: int) -> dict[str, Any]:
        """Read what was written beside the state; return {} where that cannot be read."""
        try:
            found = json_files.read(self._metadata_path(step))
            return dict(found.get("custom_metadata") or {})
        except (OSError, ValueError, AttributeError):
            return {}

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self.directory, options=self._options, item_handlers=checksums.Handler()
        )

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending; waits for a write under way."""
        self._wait()
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState) -> None:
        """Start writing `state` under its own step; returns before the write has finished.

        Raises:
            OSError: this write, or the one before, failed; the earlier checkpoints are whole.
            LostProcessError: another process did not come to it.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self._wait()
        self._check_space(state)
        with self._writing():
            self._manager.save(
                step,
                args=checksums.Save(state),
                custom_metadata={checksums.KEY: checksums.FILE, KEPT_EVERY: self._keep_every},
            )

    def _check_space(self, state: TrainState) -> None:
        """Before anything is written: libraries tell a full disk by hundreds of lines.

        Twice the state, since Orbax holds the parts of each process beside the whole for a while.
        """
        need = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + MARGIN
        free = shutil.disk_usage(self.directory).free
        if free < need:
            raise self._not_written(
                OSError(f"{free / 1e6:.1f} MB are free, {need / 1e6:.1f} MB are asked for")
            )

    def _wait(self) -> None:
        with self._writing():
            self._manager.wait_until_finished()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A block that names what went wrong with a write."""
        try:
            yield
        except NOT_OF_FILES:
            raise
        except Exception as error:
            if jax.process_count() > 1 and _is_of_processes(error):
                raise LostProcessError(str(error)) from error
            raise self._not_written(error) from error

    def _not_written(self, error: Exception) -> OSError:
        """Orbax and TensorStore have no common class of errors for a disk that refuses."""
        reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        return OSError(
            f"a checkpoint could not be written to {self.directory} (disk full?): {reason[:300]}. "
            f"Whole checkpoints: {self._whole()}; the same command continues from the last of them"
        )

    def holds(self, state: TrainState) -> bool:
        """Say whether the checkpoint of this step has these numbers.

        Of a checkpoint of older code, which has no checksums, it is taken to be true.
        """
        saved = self._checksums(int(state.step))
        return saved is None or saved == checksums.of(state)

    def restore(
        self, step: int, like: TrainState, only: Collection[str] | None = None
    ) -> TrainState:
        """The state saved at `step`, with the structure, shapes and dtypes of `like`.

        Args:
            step: of the checkpoint.
            like: shapes and dtypes of the state.
            only: the fields that are read; the others stay those of `like`. None: all.

        Raises:
            ValueError: there is no such checkpoint.
            MisfitError: it does not fit `like`; names the leaves.
            DamagedError: its files cannot be read, or give other values than were saved.
        """
        steps = self.steps()
        if step not in steps:
            raise ValueError(f"no checkpoint of step {step} in {self.directory}: there are {steps}")
        with self._reading(step):
            written = self._written_shapes(step)
            written |= self._written_law(step, like, written)
        wanted, like = like, _with_law_as_written(like, written)
        with self._reading(step):
            if written != _shapes(like):
                self._check_shapes(step, like)
            fields = {name: vars(like)[name] for name in only or vars(like)}
            found = self._read(step, fields)
            self._compare(step, found)
            return _with_law_as_wanted(like.replace(**found), wanted)

    def _read(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        """The fields of a state, without those that are newer than the checkpoint."""
        saved = {leaf["key_metadata"][0]["key"] for leaf in self._written_leaves(step)}
        # On all devices there are now, which may be others than those that wrote it.
        everywhere = NamedSharding(Mesh(np.asarray(jax.devices()), "all"), PartitionSpec())
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
            {name: part for name, part in like.items() if name in saved},
        )
        how = checksums.Restore(
            abstract, ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=True
        )
        return self._manager.restore(step, args=how)

    def _compare(self, step: int, fields: dict[str, Any]) -> None:
        """Values that are not those that were saved: nothing else tells of a flipped bit."""
        saved = self._checksums(step)
        if saved is None:
            return
        wrong = [
            leaf
            for leaf, found in checksums.of(fields).items()
            if leaf not in saved
            or (found != saved[leaf] and found.split()[0] == saved[leaf].split()[0])
        ]
        if wrong:
            raise ValueError(f"the values of {', '.join(wrong[:8])} are not those that were saved")

    def _checksums(self, step: int) -> dict[str, str] | None:
        """Of the leaves when they were saved; None of older code. ValueError: they are damaged."""
        metadata = json_files.read(self._metadata_path(step)).get("custom_metadata") or {}
        return checksums.read(self._item(step), metadata)

    def _item(self, step: int) -> Path:
        return self.directory / str(step) / "default"

    def _written_shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        """From Orbax's own file: of the part that one device wrote, so that of one is the whole.

        Equal to what is wanted, nothing more is to be asked: TensorStore loses 0.7 MB of memory
        with each answer about shapes.
        """
        return {
            ".".join(key["key"] for key in leaf["key_metadata"]): tuple(
                leaf["value_metadata"].get("write_shape", "unknown")  # in an older Orbax
            )
            for leaf in self._written_leaves(step)
            if not leaf["value_metadata"]["skip_deserialize"]  # an empty node
        }

    def _written_law(self, step: int, like: TrainState, written: dict) -> dict:
        """The shape of what an adaptive law had learned, where it is not plainly that of `like`.

        Of a state on several devices Orbax's own file has the shape of the part that one wrote.
        """
        wanted = None if like.time_law is None else tuple(like.time_law.shape)
        if "time_law" not in written or written["time_law"] == wanted:
            return {}
        return {"time_law": _shapes(self._manager.item_metadata(step).tree)["time_law"]}

    def _written_leaves(self, step: int) -> list[dict[str, Any]]:
        """Read Orbax's own description of every leaf and of every empty node."""
        return list(json_files.read(self._item(step) / "_METADATA")["tree_metadata"].values())

    def _check_shapes(self, step: int, like: TrainState) -> None:
        """Before the restore, which tells a misfit by hundreds of lines of cancelled reads."""
        saved, wanted = _shapes(self._manager.item_metadata(step).tree), _shapes(like)
        wrong = [
            f"{leaf}: saved {saved.get(leaf, 'nothing')}, wanted {wanted.get(leaf, 'nothing')}"
            for leaf in sorted(saved.keys() | wanted.keys())
            if saved.get(leaf) != wanted.get(leaf)
        ]
        if wrong:
            raise MisfitError(
                f"{self.directory / str(step)} does not fit, {len(wrong)} leaves differ: "
                + "; ".join(wrong[:8])
                + ". Use the network and the version that wrote it (config.json and versions.json "
                "of its run folder say which), or train anew in another --workdir"
            )

    @contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """A block that names what went wrong with a read."""
        try:
            yield
        except (MisfitError, *NOT_OF_FILES):
            raise
        except Exception as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
            raise DamagedError(
                f"{self.directory / str(step)} cannot be read: {reason[:300]}"
            ) from error

    def read_latest(self, like: TrainState, only: Collection[str] | None = None) -> TrainState:
        """The newest state that can be read; those that cannot are told of. Arguments: `restore`.

        Raises:
            ValueError: it does not fit `like`, or none can be read.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self.restore(step, like, only)
            except DamagedError as error:
                logger.error("%s. The one before it is used", error)
        raise ValueError(
            f"no checkpoint of {steps} in {self.directory} can be read: use another --workdir"
        )

    def restore_latest(self, like: TrainState) -> TrainState:
        """`read_latest`, to go on from: newer ones, all unreadable, move aside, none is deleted."""
        state = self.read_latest(like)
        newer = [step for step in self.steps() if step > int(state.step)]
        for step in newer:
            self._move_aside(step)
        if newer:
            self._manager.close()
            self._manager = self._open()
        return state

    def _move_aside(self, step: int) -> None:
        """Out of the way, so that training can write this step again."""
        folder = self.directory.with_name("checkpoints-damaged")
        folder.mkdir(exist_ok=True)
        number = sum(1 for _ in folder.glob(f"{step}*"))
        target = folder / (f"{step}.{number}" if number else str(step))
        if jax.process_index() == 0:
            os.replace(self.directory / str(step), target)
            logger.error("moved %s to %s", self.directory / str(step), target)

    def close(self) -> None:
        """Wait until everything is on disk; OSError as `save`."""
        self._wait()
        self._manager.close()


def _with_law_as_written(like: TrainState, written: dict[str, tuple[int, ...]]) -> TrainState:
    """Return `like` with an adaptive law of the shape that was written, or with none."""
    shape = written.get("time_law")
    law = None if shape is None else jax.ShapeDtypeStruct(shape, np.float32)
    return like.replace(time_law=law)


def _with_law_as_wanted(state: TrainState, wanted: TrainState) -> TrainState:
    """An adaptive law that the checkpoint knows nothing of starts anew; another needs nothing."""
    if wanted.time_law is None:
        return state.replace(time_law=None)
    if state.time_law is None or state.time_law.shape != wanted.time_law.shape:
        return state.replace(time_law=np.asarray(equal_moments()))
    return state


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shape of every leaf."""
    return {path: tuple(leaf.shape) for path, leaf in checksums.by_path(tree).items()}
