"""A data set as deterministic batches {image, index, mask}, and context where there is one.

    position p of the endless training stream:  epoch e = p ÷ n,  example π_e(p mod n);
    batch k: positions kB, …, (k + 1)B − 1;     host h of H: its rows hB/H, …, (h + 1)B/H − 1.

Batch k is a pure function of (seed, k): a run resumes at any step, on any number of hosts, with
the batches it would have seen. Toy sets can also be fresh samples for ever. Which examples a batch
has is decided here; a split of files is read and decoded ahead by a pipeline of its own.
"""

import collections
import dataclasses
import hashlib
import itertools
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from checks import one_of, require
from toy_data import Law

Batch = dict[str, np.ndarray]
Examples = Callable[[np.ndarray], np.ndarray]  # ids [b] → examples [b, *shape]
Pipeline = Callable[[Iterator["Chosen"]], Iterator[np.ndarray]]  # batches of ids → of examples
Wanted = Callable[[np.ndarray], bool]  # of the ids of the examples of a batch
Shape = tuple[int, ...]
Source = str | tuple[Path, ...]  # a description, or files
T = TypeVar("T")
Sampler = Callable[[np.random.Generator, int], np.ndarray]  # (rng, n) → float32 [n, *shape]
DIGITS = 16  # of a digest, hexadecimal
READ_BYTES = 2**30  # of files that are known by their content; larger ones by size and time
logger = logging.getLogger("fokker")


@dataclasses.dataclass(frozen=True)
class Context:
    """Densities are conditioned on this: one of `classes`, or floats of a shape.

    A batch holds classes as int32 [b], floats as float32 [b, *shape], standardised where the mean
    and the scale of the training split are there.
    """

    shape: Shape  # of one example; () for a class
    classes: int = 0  # 0: floats
    names: tuple[str, ...] = ()  # of the classes, or of the floats, where they are known
    mean: np.ndarray | None = dataclasses.field(default=None, compare=False)  # of floats, [*shape]
    scale: np.ndarray | None = dataclasses.field(default=None, compare=False)

    def describe(self) -> str:
        """A few words for the line that describes the data."""
        if self.classes:
            return f"one of {self.classes} classes"
        return f"floats {self.shape}{'' if self.mean is None else ', standardised'}"

    def standardized(self, given: np.ndarray) -> np.ndarray:
        """Bring a context as the user has it, [n] or [n, *shape], to what a batch holds."""
        if self.mean is None:
            return given
        return ((given - self.mean) / self.scale).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Host:
    """One process of a run, which reads its own part of every global batch."""

    index: int = 0
    count: int = 1

    def part(self, batch_size: int) -> slice:
        """Rows of a global batch that belong to this host."""
        require(0 <= self.index < self.count, "the host", self, "0 <= index < count")
        divides = batch_size >= 1 and batch_size % self.count == 0
        require(divides, "batch_size", batch_size, f"a positive multiple of {self.count} host(s)")
        size = batch_size // self.count
        return slice(self.index * size, (self.index + 1) * size)


@lru_cache(maxsize=2)  # a batch that crosses an epoch needs two
def _epoch(seed: int, epoch: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Permutation of one epoch and the coin of every place in it."""
    coins = np.random.default_rng([seed, epoch, 1]).random(size) < 0.5
    return np.random.default_rng([seed, epoch]).permutation(size), coins


class Chosen(NamedTuple):
    """The examples of one batch, before they are read."""

    ids: np.ndarray  # int64 [b], in the split
    flipped: np.ndarray  # bool [b], left–right
    mask: np.ndarray  # bool [b], False for padding, which follows the examples

    def to_read(self) -> "Chosen":
        """Without the padding; at least one, so that there is something to fill a batch with."""
        number = max(int(self.mask.sum()), 1)
        return Chosen(*(part[:number] for part in self))


@dataclasses.dataclass(frozen=True)
class Finite:
    """A split of `size` examples, in memory or decoded on demand: `examples` maps ids to them.

    `pipeline` gives the examples of one batch after another, read ahead; None: they are taken from
    `examples` in turn.

    `labels` are their classes 0, 1, …, int [size], where they are known; no model sees them.
    `context` is what the model does see beside them: int32 [size] or float32 [size, *c].
    `known_by` is what the digest is of where the examples are not in memory: a description of
    generated ones, the files of others; `chosen` says which of these examples the split has, if it
    has only some.
    """

    size: int
    examples: Examples
    flip: bool = False
    labels: np.ndarray | None = None
    known_by: Source = ""
    chosen: np.ndarray | None = None
    context: np.ndarray | None = None
    pipeline: Pipeline | None = None

    def digest(self) -> str:
        """Hexadecimal digits that differ where size, examples, labels or context differ."""
        found = hashlib.sha256(f"{self.size}".encode())
        if not self.known_by:
            for first in range(0, self.size, 1000):
                ids = np.arange(first, min(first + 1000, self.size))
                found.update(np.ascontiguousarray(self.examples(ids)).data)
        else:
            found.update(_digest_of(self.known_by).encode())
            if self.chosen is not None:
                found.update(np.ascontiguousarray(self.chosen, np.int64).data)
        if self.labels is not None:
            found.update(np.ascontiguousarray(self.labels, np.int64).data)
        if self.context is not None:
            found.update(b"context" + np.ascontiguousarray(self.context).tobytes())
        return found.hexdigest()[:DIGITS]

    def training_batches(
        self, first_step: int, *, seed: int, batch_size: int, part: slice
    ) -> Iterator[Batch]:
        """Rows `part` of batches `first_step`, … of the shuffled, endless stream."""
        choose = partial(self.shuffled, seed=seed, batch_size=batch_size, part=part)
        return self._batches(map(choose, itertools.count(first_step)))

    def ordered_batches(
        self, *, batch_size: int, part: slice, wanted: Wanted | None = None
    ) -> Iterator[Batch]:
        """Rows `part` of all batches in order; past the end the last example, masked, index −1.

        A batch is not read where `wanted` is false of the examples of its rows.
        """
        first = range(0, self.size, batch_size)
        batches = (self._in_order(n + _rows(batch_size, part)) for n in first)
        return self._batches(b for b in batches if wanted is None or wanted(b.ids[b.mask]))

    def shuffled(self, step: int, *, seed: int, batch_size: int, part: slice) -> Chosen:
        """The examples of batch `step` of the shuffled stream."""
        positions = step * batch_size + _rows(batch_size, part)
        ids, coins = np.empty(len(positions), np.int64), np.empty(len(positions), bool)
        epochs, places = np.divmod(positions, self.size)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            order, heads = _epoch(seed, int(epoch), self.size)
            ids[here], coins[here] = order[places[here]], heads[places[here]]
        return Chosen(ids, coins & self.flip, np.ones(len(ids), bool))

    def _in_order(self, positions: np.ndarray) -> Chosen:
        """The examples at these places of the split."""
        ids = np.minimum(positions, self.size - 1)
        return Chosen(ids, np.zeros(len(ids), bool), positions < self.size)

    def _batches(self, chosen: Iterator[Chosen]) -> Iterator[Batch]:
        """The batches of these examples, which the pipeline may ask for ahead of time."""
        asked: collections.deque[Chosen] = collections.deque()

        def ask() -> Iterator[Chosen]:
            for one in chosen:
                asked.append(one)
                yield one.to_read()

        for image in (self.pipeline or self._in_turn)(ask()):
            ids, _, mask = asked.popleft()
            if len(image) < len(ids):
                image = image[np.minimum(np.arange(len(ids)), len(image) - 1)]
            index = np.where(mask, ids, -1).astype(np.int32)
            yield {"image": image, "index": index, "mask": mask} | self._context(ids)

    def _in_turn(self, asked: Iterator[Chosen]) -> Iterator[np.ndarray]:
        """The examples, read one batch after another."""
        for ids, flipped, _ in asked:
            image = self.examples(ids)
            if flipped.any():
                image = np.where(flipped[:, None, None, None], image[:, :, ::-1], image)
            yield image

    def _context(self, ids: np.ndarray) -> Batch:
        """The context of these examples, if there is one."""
        if self.context is None:
            return {}
        found = self.context[ids]
        return {"context": found.astype(np.float32) if found.dtype.kind == "f" else found}


@dataclasses.dataclass(frozen=True)
class Fresh:
    """An endless training split: new samples in every batch, numbered as they come."""

    sampler: Sampler
    size: None = None
    known_by: str = ""

    def digest(self) -> str:
        """Hexadecimal digits of the description."""
        return hashlib.sha256(f"endless {self.known_by}".encode()).hexdigest()[:DIGITS]

    def training_batches(
        self, first_step: int, *, seed: int, batch_size: int, part: slice
    ) -> Iterator[Batch]:
        """Rows `part` of batches `first_step`, …; every host draws the whole batches."""
        for step in itertools.count(first_step):
            image = self.sampler(np.random.default_rng([seed, 0, step]), batch_size)[part]
            number = step * batch_size + _rows(batch_size, part)
            index = (number % 2**31).astype(np.int32)  # an int32 that cannot be taken for padding
            yield {"image": image, "index": index, "mask": np.ones(len(index), bool)}


def _rows(batch_size: int, part: slice) -> np.ndarray:
    """The numbers of the rows of a batch that belong to a host."""
    return np.arange(batch_size)[part]


def is_known_by_content(source: Source) -> bool:
    """Say whether files are few enough bytes to be read at every start; so is a description."""
    return isinstance(source, str) or sum(p.stat().st_size for p in source) <= READ_BYTES


def _digest_of(source: Source) -> str:
    """Digest a description, or files by their content and their paths below a common folder.

    Where there are too many bytes to read at every start, size and time of change stand for the
    content.
    """
    if isinstance(source, str):
        return hashlib.sha256(source.encode()).hexdigest()
    found, root = hashlib.sha256(), os.path.commonpath([path.parent for path in source])
    stats = [path.stat() for path in source]
    by_content = is_known_by_content(source)
    if not by_content:
        total = sum(stat.st_size for stat in stats)
        logger.info("%.1f GB below %s are known by path, size and time", total / 1e9, root)
    for path, stat in zip(source, stats, strict=True):
        found.update(f"{os.path.relpath(path, root)} {stat.st_size} ".encode())
        found.update(path.read_bytes() if by_content else f"{int(stat.st_mtime)}".encode())
    return found.hexdigest()


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, computed two ahead in a thread that ends with this generator."""
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
    end: Any = object()
    try:
        waiting = collections.deque(pool.submit(next, items, end) for _ in range(2))
        while (ready := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, items, end))
            yield ready
    finally:
        pool.shutdown(cancel_futures=True)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A train and a test split, and perhaps one for validation.

    A batch is {image [b, *shape], index int32 [b], mask bool [b]}, with a context besides them
    {context [b, *c]}.

    Images are uint8 in 0, …, levels − 1; real values are float32 and have levels None. `index` is
    the id in the split (−1 for padding), or the running number of a fresh sample (mod 2³¹). `law`
    is the exact law of the points of both splits, where it is known. `source` says where the
    examples come from and how they are split, `left_out` what is there and is not used.
    """

    name: str
    shape: Shape
    levels: int | None
    train: Finite | Fresh
    test: Finite
    law: Law | None = None
    validation: Finite | None = None
    source: str = ""
    left_out: tuple[str, ...] = ()
    context: Context | None = None
    columns: tuple[str, ...] = ()  # names of the coordinates of vectors, where they are known

    def describe(self) -> str:
        """One line: the source, the number of examples of every split, and what is left out."""
        sizes = [f"{s.size or 'endless'} {name}" for name, s in self.splits.items()]
        left_out = f"; left out: {', '.join(self.left_out)}" if self.left_out else ""
        given = f", given {self.context.describe()}" if self.context else ""
        return f"data {self.name}: {self.source}; {', '.join(sizes)} examples{given}{left_out}"

    @cached_property
    def digests(self) -> dict[str, str]:
        """Hexadecimal digits of each split that differ where anything in it differs.

        They depend on shape, kind of values, examples and labels, not on where the data are.
        """
        kind = f"{self.shape} {self.levels} "
        return {
            name: hashlib.sha256((kind + split.digest()).encode()).hexdigest()[:DIGITS]
            for name, split in self.splits.items()
        }

    @property
    def held_out(self) -> str:
        """The split that training watches: validation where there is one, else test."""
        return "test" if self.validation is None else "validation"

    @property
    def splits(self) -> dict[str, Finite | Fresh]:
        """Those there are, by name."""
        found = {"train": self.train, "test": self.test}
        return found if self.validation is None else found | {"validation": self.validation}

    def _split(self, name: str) -> Finite | Fresh:
        one_of("split", name, self.splits)
        return self.splits[name]

    def finite(self, name: str) -> Finite:
        """Return the split of this name, which must have a number of examples.

        Raises:
            ValueError: there is no such split, or it is endless.
        """
        split = self._split(name)
        if not isinstance(split, Finite):
            raise ValueError(f"split={name!r} of {self.name} is endless: set data.num_train > 0")
        return split

    def size(self, split: str) -> int | None:
        """Number of examples; None for an endless stream."""
        return self._split(split).size

    def examples(self, split: str, ids: np.ndarray) -> np.ndarray:
        """Those examples of a finite split, unaugmented."""
        return self.finite(split).examples(ids)

    def contexts(self, split: str, ids: np.ndarray) -> np.ndarray | None:
        """The contexts of those examples of a finite split, counted over and over; None without."""
        if self.context is None:
            return None
        data = self.finite(split)
        return data.context[np.asarray(ids) % data.size]

    def train_batches(
        self, *, batch_size: int, seed: int, first_step: int, host: Host = Host()
    ) -> Iterator[Batch]:
        """This host's rows of batches first_step, …, for ever; ValueError for bad arguments."""
        require(0 <= seed < 2**32, "seed", seed, "0 <= seed < 2**32")
        require(first_step >= 0, "first_step", first_step, "at least 0")
        part = host.part(batch_size)
        if self.train.size is not None and batch_size > self.train.size:
            logger.warning(
                "batch_size=%d is more than the %d training examples: a batch holds some twice",
                batch_size, self.train.size,
            )  # fmt: skip
        batches = self.train.training_batches(
            first_step, seed=seed, batch_size=batch_size, part=part
        )
        return ahead(batches)

    def eval_batches(
        self, split: str, *, batch_size: int, host: Host = Host(), wanted: Wanted | None = None
    ) -> Iterator[Batch]:
        """This host's rows of the split, once, in order, unaugmented.

        Args:
            split: its name.
            batch_size: over all hosts.
            host: this one.
            wanted: whether a batch with these examples is read at all; None: all are.

        Raises:
            ValueError: the split is endless, or the hosts cannot share a batch.
        """
        data, part = self.finite(split), host.part(batch_size)
        return ahead(data.ordered_batches(batch_size=batch_size, part=part, wanted=wanted))
