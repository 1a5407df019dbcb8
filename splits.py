"""The `data` section of a config, and the splits of a data set that its fields ask for.

A split is drawn with generators of their own, the same for every seed: a run with another seed is
evaluated on the same examples.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

import npz_files
import standardization
from checks import one_of, path_of, require
from streams import Chosen, Dataset, Finite, Shape

VALIDATION, TEST = 3, 4  # last words of the seeds; 1 and 2 are those of the points of toy sets


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The `data` section of the config; toy sets and real values ignore the image fields."""

    dataset: str  # a name in DATASETS, in any case
    path: str  # a file of arrays or a table, an image folder, or a tfds folder ('' = where tfds is)
    image_size: int  # height = width; 0 = as stored
    num_channels: int
    levels: int  # grey levels: values are 0, …, levels − 1
    random_flip: bool  # flip training images left–right with probability ½
    centered: bool
    uniform_dequantization: bool
    logit: bool
    num_train: int  # the first so many examples; 0 = all (toy sets: fresh samples for ever)
    num_test: int  # the first so many examples; 0 = all (toy sets: at least 1)
    num_validation: int = 0  # training examples, drawn at random, that are a split of their own
    category: str = ""  # of lsun, as church_outdoor
    validation_fraction: float = 0.0  # in place of num_validation: of the training examples
    test_fraction: float = 0.1  # of all examples, where the file has no test split
    test_ids: str = ""  # a file with the test examples, counted from 0, in place of the fraction
    columns: str = ""  # of a table, with commas; '' = all but the context columns
    context_columns: str = ""  # of a table: what the densities are conditioned on
    standardize: str = "none"  # real values: a name in standardization.KINDS
    cell_width: tuple[float, ...] = ()  # real values: of the cells they are known to lie in
    lower: tuple[float | None, ...] = ()  # real values: the ends of their range; None: no end
    upper: tuple[float | None, ...] = ()
    context: str = ""  # of p(x | c): class, or values (arrays of an npz); '': none

    def __post_init__(self) -> None:
        one_of("standardize", self.standardize, standardization.KINDS)
        fraction = self.test_fraction
        require(0.0 < fraction < 1.0, "test_fraction", fraction, "more than 0 and less than 1")
        fraction = self.validation_fraction
        require(0.0 <= fraction < 1.0, "validation_fraction", fraction, "0 <= fraction < 1")
        fits = all(0.0 <= width < np.inf for width in self.cell_width)
        require(fits, "cell_width", self.cell_width, "widths of 0 (continuous) or more")
        for field in ("lower", "upper"):
            ends = getattr(self, field)
            fits = all(end is None or np.isfinite(end) for end in ends)
            require(fits, field, ends, "finite numbers, or None where a column has no end")


class Rows(NamedTuple):
    """Examples x [n, *d], and what stands beside them: classes and context, if there are any."""

    name: str  # of x, in messages
    x: np.ndarray | npz_files.Part
    labels: np.ndarray | None = None
    context: np.ndarray | None = None

    def only(self, ids: np.ndarray) -> "Rows":
        """Return the rows of those examples."""
        beside = (None if array is None else array[ids] for array in (self.labels, self.context))
        return Rows(self.name, npz_files.part(self.x, ids), *beside)


@dataclasses.dataclass(frozen=True)
class Origin:
    """The words for where a data set comes from, how it is split, and what of it is left out."""

    text: str
    left_out: tuple[str, ...] = ()


def assembled(
    config: DataConfig,
    shape: Shape,
    splits: dict[str, Finite],
    origin: Origin,
    levels: int | None,
) -> Dataset:
    """The data set of the first num_train and num_test examples (0: all) of the splits."""
    left_out = list(origin.left_out)

    def first(name: str, n: int) -> Finite:
        split = splits[name]
        require(0 <= n <= split.size, f"data.num_{name}", n, f"0 (all) to {split.size}")
        n = n or split.size
        if n < split.size:
            left_out.append(f"{split.size - n} {name} by data.num_{name}")
        labels = None if split.labels is None else split.labels[:n]
        context = None if split.context is None else split.context[:n]
        return dataclasses.replace(split, size=n, labels=labels, context=context)

    train, test = first("train", config.num_train), first("test", config.num_test)
    validation = splits.get("validation")
    if validation is None:
        train, validation = _held_out(config, train)
    else:
        for field in ("num_validation", "validation_fraction"):
            value = getattr(config, field)
            require(value == 0, f"data.{field}", value, "0, as there is a validation split")
    train = dataclasses.replace(train, flip=config.random_flip)
    return Dataset(
        config.dataset.lower(), shape, levels, train, test, validation=validation,
        source=origin.text, left_out=tuple(left_out),
    )  # fmt: skip


def _held_out(config: DataConfig, train: Finite) -> tuple[Finite, Finite | None]:
    """Training and validation split: the latter is drawn at random, the same for every seed.

    Examples are often in order, by class or by writer: the last of them are like no others.
    """
    number = config.num_validation
    require(0 <= number < train.size, "data.num_validation", number, f"0 to {train.size - 1}")
    if config.validation_fraction:
        allowed = f"0 with data.validation_fraction={config.validation_fraction}"
        require(number == 0, "data.num_validation", number, allowed)
        number = part_of(train.size, config.validation_fraction, "data.validation_fraction")
    if number == 0:
        return train, None
    rest, validation = drawn(train.size, number, VALIDATION)
    return _only(train, rest), _only(train, validation)


def part_of(size: int, fraction: float, field: str) -> int:
    """The number of examples that are this fraction of so many, at least one and not all."""
    require(size >= 2, field, fraction, f"at least 2 examples to divide, not {size}")
    return min(max(round(fraction * size), 1), size - 1)


def drawn(size: int, number: int, word: int) -> tuple[np.ndarray, np.ndarray]:
    """(the rest, so many that are drawn at random) of 0, …, size − 1, both in order."""
    order = np.random.default_rng([0, 0, 0, word]).permutation(size)
    return np.sort(order[number:]), np.sort(order[:number])


def _only(split: Finite, chosen: np.ndarray) -> Finite:
    """The chosen examples of a split."""
    labels = None if split.labels is None else split.labels[chosen]
    context = None if split.context is None else split.context[chosen]
    pipeline = split.pipeline

    def read(asked: Iterator[Chosen]) -> Iterator[np.ndarray]:
        return pipeline(one._replace(ids=chosen[one.ids]) for one in asked)

    return dataclasses.replace(
        split,
        size=len(chosen),
        examples=lambda ids: split.examples(chosen[ids]),
        labels=labels,
        chosen=chosen,
        context=context,
        pipeline=pipeline and read,
    )


def divided(
    config: DataConfig, whole: Rows, test_ids: np.ndarray | None, origin: Origin
) -> tuple[dict[str, Rows], Origin]:
    """Training and test rows of examples that are not split, and how they were chosen.

    Args:
        config: its `test_ids` names a file of ids, else `test_fraction` are drawn at random.
        whole: all of them.
        test_ids: those of the file of the data, which the field `test_ids` replaces.
        origin: where they are from.

    Raises:
        ValueError: ids are no integers 0, …, n − 1, twice there, none or all.
    """
    train, test, text = _division(config, len(whole.x), test_ids)
    words = dataclasses.replace(origin, text=f"{origin.text}, {text}")
    return {"train": whole.only(train), "test": whole.only(test)}, words


def _division(
    config: DataConfig, size: int, given: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, str]:
    """(training ids, test ids, how they are chosen in words) of so many examples."""
    if config.test_ids:
        path = path_of("data.test_ids", config.test_ids)
        given, name = _ids_in(path), f"data.test_ids={config.test_ids!r}"
        text = f"the test examples are those of {path}"
    elif given is not None:
        name, text = "the array test_ids", "the test examples are its array test_ids"
    else:
        number = part_of(size, config.test_fraction, "data.test_fraction")
        return *drawn(size, number, TEST), _at_random(config.test_fraction)
    ids = np.ravel(given)
    if ids.dtype.kind not in "iu" or ids.size == 0 or ids.min() < 0 or ids.max() >= size:
        found = f"{ids.dtype} {ids.min()} to {ids.max()}" if ids.size else "nothing"
        raise ValueError(f"{name} holds {found}: need integers, 0 to {size - 1}")
    chosen = np.unique(ids)
    if not len(chosen) == len(ids) < size:
        raise ValueError(f"{name} holds an example twice, or all {size} of them")
    return np.setdiff1d(np.arange(size), chosen), chosen, text


def _at_random(fraction: float) -> str:
    return f"{100 * fraction:.3g} % of its examples, drawn at random, for the test"


def _ids_in(path: Path) -> np.ndarray:
    """Integers of an .npy file, or of a text with spaces or lines between them."""
    if path.suffix == ".npy":
        return npz_files.read_array(path)
    require(path.is_file(), "data.test_ids", str(path), "an existing file, .npy or text")
    try:
        return np.array([int(word) for word in path.read_text(encoding="utf-8").split()], np.int64)
    except ValueError as error:
        raise ValueError(f"data.test_ids={str(path)!r} is no list of integers: {error}") from None
