"""Any number of samples from a checkpoint, batch by batch over the devices, kept in shards.

A shard `<first>-<last>.npz` holds samples first, …, last (`samples`; `nfe`, the evaluations of the
network; `identity`, a digest of parameters and settings). It is written as a whole, by the one host
that drew it, and sample i depends on (key, i) only: an interrupted run draws the samples that no
shard holds, in batches of any size.
"""

import dataclasses
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

import json_files
import npz_files
from operators import fold_in_each
from run_lib import devices, folder
from run_lib.experiment import Experiment

logger = logging.getLogger("fokker")


class Source(Protocol):
    """A source draws the samples of shards."""

    batch_size: int

    @property
    def protocol(self) -> dict[str, Any]:
        """Say what fixes the law of the samples and their noise, beside the network."""

    def batch(self, params: Any, ids: np.ndarray, end: int) -> npz_files.Arrays:
        """Arrays by name, `samples` among them: rows of those consecutive ids that are below end.

        Raises:
            FloatingPointError: a sample is not finite.
        """


@dataclasses.dataclass
class Generator:
    """Samples as the data are: uint8 images or real points.

    Sample i depends on (key, i) only, and given a context on that of example i of a split; but for
    the `langevin` corrector, whose step size is a mean over the batch.
    """

    experiment: Experiment
    key: jax.Array
    batch_size: int
    split: str = "test"  # whose contexts, in order, the samples of p(x | c) have

    def __post_init__(self) -> None:
        sampler, model = self.experiment.sampler, self.experiment.sampled_model
        shape = self.experiment.dataset.shape

        def generate(params: Any, key: jax.Array, batch: dict) -> tuple[jax.Array, jax.Array]:
            like = jnp.zeros((batch["ids"].shape[0], *shape), jnp.float32)
            score_fn = model.score(params, context=batch["context"])
            samples = sampler(score_fn, model.sde, fold_in_each(key, batch["ids"]), like)
            return samples.x, samples.nfe

        self._mapped = devices.map_over_devices(generate, in_axes=(None, None, 0), out_axes=0)
        self._encoding = self.experiment.encoding

    def __call__(self, params: Any, number: int) -> np.ndarray:
        """Samples 0, …, number − 1; raises as `batch` does."""
        size = whole_batch(self.batch_size, number, jax.local_device_count())
        batches = [
            self.batch(params, np.arange(first, first + size), number)["samples"]
            for first in range(0, number, size)
        ]
        return np.concatenate(batches)

    @property
    def protocol(self) -> dict[str, Any]:
        """Say what fixes the law of the samples and their noise, beside the network."""
        return protocol(self.experiment)

    def batch(self, params: Any, ids: np.ndarray, end: int) -> npz_files.Arrays:
        """`samples` and `nfe` of those consecutive ids that are below `end`; all are drawn.

        Raises:
            FloatingPointError: a sample is not finite (the solver ran out of steps, or the network
                is not usable yet); names the samples.
        """
        context = self.experiment.dataset.contexts(self.split, ids)
        split = devices.split({"ids": ids.astype(np.int32), "context": context})
        x, nfe = (y[ids < end] for y in devices.join(self._mapped(params, self.key, split)))
        check_finite(x, ids)
        return {"samples": np.asarray(self._encoding.decode(jnp.asarray(x))), "nfe": nfe}


def check_finite(x: np.ndarray, ids: np.ndarray) -> None:
    """Refuse samples that are not finite; x holds those of the first so many ids.

    Raises:
        FloatingPointError: one is not; names the samples.
    """
    bad = np.flatnonzero(~np.isfinite(x.reshape(len(x), int(np.prod(x.shape[1:])))).all(axis=1))
    if bad.size:
        raise FloatingPointError(
            f"{bad.size} of samples {ids[0]} to {ids[0] + len(x) - 1} are not finite (first: "
            f"{(ids[0] + bad[:5]).tolist()}); raise sampling.rtol and sampling.atol, or use "
            "sampling.method='pc'"
        )


def whole_batch(batch_size: int, number: int, devices: int) -> int:
    """The batch size, no larger than what all devices need for so many samples."""
    return -(-min(batch_size, number) // devices) * devices


class Shard(NamedTuple):
    """A file with rows first, …, last."""

    first: int
    last: int
    path: Path


def shard_path(where: Path, first: int, last: int) -> Path:
    """The name of a shard."""
    return where / f"{first:08d}-{last:08d}.npz"


def shards(where: Path) -> list[Shard]:
    """The whole shards of a folder, in order."""
    found = []
    for path in filter(npz_files.is_whole, where.glob("*-*.npz")):
        first, last = map(int, path.stem.split("-"))
        found.append(Shard(first, last, path))
    return sorted(found)


def sampling_protocol(experiment: Experiment, *, of_evaluation: bool = True) -> str:
    """Say in one line what fixes the law of the samples, beside the network.

    The samples of an evaluation have the contexts of its examples.
    """
    fields = dataclasses.asdict(experiment.sampler)
    fields |= fields.pop("solver", {})
    words = [experiment.settings.sampling.method, fields.pop("name", "")]
    words += ["denoised" if fields.pop("noise_removal") else "not denoised"]
    fields.pop("axis_name", None)
    words += [f"{name} {value}" for name, value in fields.items()]
    if of_evaluation and (given := experiment.given_name):
        words += [f"given {given} of {experiment.settings.eval.dataset}"]
    return ", ".join(filter(None, words))


def check_samples(now: dict[str, Any], where: Path) -> None:
    """Refuse to add to samples of another sampler or seed.

    Raises:
        ValueError: the folder has such samples.
    """
    then = _protocol_of(where)
    if not shards(where) or not then:
        return
    then.pop("identity", None)
    if then != now:
        raise ValueError(
            f"{where} has samples of another sampler or seed, {then}; now {now}. Use another "
            "--eval_folder, or delete that folder"
        )


def _protocol_of(where: Path) -> dict[str, Any]:
    """protocol.json of a folder of samples."""
    path = where / "protocol.json"
    return json_files.read(path) if path.exists() else {}


def protocol(experiment: Experiment) -> dict[str, Any]:
    """Say what fixes the samples of an evaluation, beside the network."""
    return {"sampler": sampling_protocol(experiment), "seed": experiment.settings.seed}


def _set_aside(where: Path, identity: str) -> None:
    """Rename a folder that has samples of another network."""
    before = _protocol_of(where).get("identity", "unknown")
    if before == identity or not shards(where):
        return
    name = f"{where.name}-of-{before}"
    number = sum(1 for _ in where.parent.glob(f"{name}*"))
    target = where.with_name(f"{name}.{number}" if number else name)
    os.replace(where, target)
    logger.info("samples of other parameters, or an older version, are now in %s", target)


def draw(generate: Source, params: Any, where: Path, number: int, identity: str) -> None:
    """Draw the samples among 0, …, number − 1 that no shard holds, each batch saved as it comes.

    Args:
        generate: draws them.
        params: of the network.
        where: the folder of the shards; one with samples of another identity is renamed.
        number: of samples.
        identity: of the figures of this network.
    """
    check_samples(generate.protocol, where)
    host = devices.host()
    if devices.is_first():
        _set_aside(where, identity)
        folder.write_json(where / "protocol.json", generate.protocol | {"identity": identity})
    missing = devices.of_first_process(_missing(where, number))
    size = whole_batch(generate.batch_size, number, jax.device_count())
    for first, end in _ranges(missing, size):
        ids = (first + np.arange(size))[host.part(size)]
        arrays = generate.batch(params, ids, end)
        if count := len(arrays["samples"]):
            path = shard_path(where, ids[0], ids[0] + count - 1)
            npz_files.write(path, arrays | {"identity": np.asarray(identity)})
        logger.info("samples %d to %d of %d are in %s", first, end - 1, number, where)
    devices.wait_for_all(f"samples {where}")


def _missing(where: Path, number: int) -> np.ndarray:
    """Mark which of the first `number` samples no shard holds, bool [number].

    The first process deletes damaged shards, so that their samples are drawn again.
    """
    missing = np.ones(number, bool)
    for shard in shards(where):
        missing[shard.first : shard.last + 1] = False
    for path in where.glob("*-*.npz") if devices.is_first() else ():
        if not npz_files.is_whole(path):
            logger.info("%s is damaged and drawn again", path)
            path.unlink()
    return missing


def _ranges(missing: np.ndarray, size: int) -> Iterator[tuple[int, int]]:
    """Consecutive missing ids as [first, end), at most `size` long."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], missing, [False]]).astype(np.int8)))
    for start, stop in edges.reshape(-1, 2):
        for first in range(start, stop, size):
            yield int(first), int(min(first + size, stop))


def read(where: Path, number: int, within: str = "") -> Iterator[dict[str, np.ndarray]]:
    """The arrays of the shards in order, cut to rows 0, …, number − 1.

    `within`: a folder beside the shards whose files of the same names are read instead.

    Raises:
        ValueError: a file is damaged or of another network, or rows are missing.
    """
    expected, identity = 0, _protocol_of(where).get("identity")
    for shard in shards(where):
        if shard.first != expected or shard.first >= number:
            break
        expected = shard.last + 1
        path = where / within / shard.path.name
        arrays = npz_files.read(path, ("identity",))
        if str(arrays.pop("identity")) != identity:
            raise ValueError(f"{path} is not of {identity}, the samples of this folder: delete it")
        yield {key: y[: number - shard.first] for key, y in arrays.items()}
    if expected < number:
        raise ValueError(
            f"{where} has no row {expected}: the same command with --mode=eval adds it"
        )
