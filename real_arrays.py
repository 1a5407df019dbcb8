"""Real values of any shape: what arrays of them must be, and the data set that they make.

An array of uint8 is one of images with grey levels, which have a likelihood in bits/dim. All other
numbers are real values, integers too: they have a density, in nats per unit. A density can grow
without limit where values repeat, as integers and rounded numbers do; `data.cell_width` says that
they are known to within a cell.
"""

import dataclasses
import logging
import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import marginals
import npz_files
from checks import FieldError, require
from dequantization import Reals
from image_arrays import as_classes
from splits import DataConfig, Origin, Rows, assembled
from standardization import Range
from streams import Context, Dataset, Finite, Shape

REPEATED = 0.05  # share of the values of a coordinate that occur more than once, to be warned of
LOOKED_AT = 10_000  # training examples that repeated values are looked for in
MOST_COORDINATES = 100  # ... and coordinates
RESOLUTION = 1e-3  # standard deviations; what float32 cannot tell apart must be closer
NAMED = 8  # coordinates in a message
LARGEST = 1e37  # end of a range
CHUNK = 1000  # examples
KINDS = {  # of `data.standardize`, in words
    "none": "as they are",
    "coordinate": "every coordinate standardised",
    "whiten": "whitened",
}
logger = logging.getLogger("fokker")


def is_real(array: np.ndarray | npz_files.Part) -> bool:
    """Say whether an array holds real values, not grey levels, bits or what is no number."""
    return array.dtype.kind in "iuf" and array.dtype != np.uint8


def real_set(
    config: DataConfig,
    rows: dict[str, Rows],
    origin: Origin,
    context: Context | None = None,
    columns: tuple[str, ...] = (),
) -> Dataset:
    """The data set of real values, float32.

    Args:
        config: the section; its fields of images have no effect.
        rows: of the splits "train" and "test".
        origin: where they are from.
        context: what the context of the rows is; floats are standardised here.
        columns: names of the coordinates of vectors.

    Raises:
        ValueError: a value is not finite, a coordinate is constant in the training split or too
            fine for float32, or a field does not fit; names example, coordinate and remedy.
    """
    train = rows["train"].x
    shape = train.shape[1:] or (1,)
    allowed = f"0 for real values: {rows['train'].name} is {train.dtype} (grey levels are uint8)"
    require(config.image_size == 0, "data.image_size", config.image_size, allowed)
    splits = {name: _split(part, shape) for name, part in rows.items()}
    flips = not config.random_flip or len(shape) == 3
    require(flips, "data.random_flip", config.random_flip, f"False for examples of shape {shape}")
    text = f"{origin.text}; real values, {KINDS[config.standardize]}"
    found = assembled(config, shape, splits, Origin(text, origin.left_out), None)
    found = dataclasses.replace(found, columns=columns, context=context)
    _check_coordinates(config, found)
    if context is None:
        return found
    if context.classes:
        _check_classes(found)
        return found
    return with_scaled_context(found)


def _split(rows: Rows, shape: Shape) -> Finite:
    """A split of finite float32 numbers of that shape."""
    name, x = rows.name, rows.x.reshape(len(rows.x), 1) if rows.x.ndim == 1 else rows.x
    if not is_real(x) or x.size == 0:
        raise ValueError(f"{name} is {x.dtype} {x.shape}: need numbers [n, *d], not empty")
    if x.shape[1:] != shape:
        raise ValueError(f"{name} has examples {x.shape[1:]}: need {shape}, as those of x_train")
    if not isinstance(x, npz_files.Part):  # the whole was checked
        check_finite(name, x)
    if not npz_files.is_mapped(x):
        x = np.ascontiguousarray(x, np.float32)
    return Finite(len(x), partial(_float32, x), labels=rows.labels, context=rows.context)


def _float32(array: np.ndarray | npz_files.Part, ids: np.ndarray) -> np.ndarray:
    """Those examples of an array as a batch has them."""
    return np.asarray(npz_files.taken(array, ids), np.float32)


def check_finite(name: str, array: np.ndarray | npz_files.Part) -> None:
    """Refuse what is NaN, infinite, or beyond float32.

    Raises:
        ValueError: there is such a value; names the first one.
    """
    most, first = np.finfo(np.float32).max, 0
    for chunk in npz_files.chunks(array):
        if not _is_within(chunk, most):
            place = np.argwhere(~(np.abs(chunk) <= most))[0]
            value, place[0] = chunk[tuple(place)], place[0] + first
            raise ValueError(
                f"value {place.tolist()} of {name}, counted from 0, is {value}: need finite "
                "numbers in float32; remove such examples or fill them"
            )
        first += len(chunk)


def _is_within(array: np.ndarray, most: np.floating) -> bool:
    """Say whether all numbers are finite and not beyond `most`."""
    with np.errstate(invalid="ignore"):
        return bool((np.abs(array) <= most).all())


def with_classes(rows: dict[str, Rows], origin: Origin) -> tuple[dict[str, Rows], Origin]:
    """The rows with the y of every split for classes, if they are such; else without them."""
    found = [r for r in rows.values() if r.labels is not None]
    fit = all(r.labels.dtype.kind in "iu" and r.labels.ndim == 1 for r in found)
    if fit:
        labels = {n: as_classes(f"y beside {r.name}", r.labels, len(r.x)) for n, r in rows.items()}
    else:
        labels = dict.fromkeys(rows)
        origin = dataclasses.replace(origin, left_out=(*origin.left_out, "y, no classes"))
    return {name: r._replace(labels=labels[name]) for name, r in rows.items()}, origin


def with_context(rows: dict[str, Rows]) -> tuple[dict[str, Rows], Context | None]:
    """The rows with their context, and what it is: classes of integers [n], else floats.

    Raises:
        ValueError: one split has none, or has another shape, or it holds no finite numbers.
    """
    there = {name: r.context for name, r in rows.items() if r.context is not None}
    if not there:
        return rows, None
    shapes = {a.shape[1:] for a in there.values()}
    numbers = all(a.dtype.kind in "iuf" for a in there.values())
    if len(there) < len(rows) or len(shapes) > 1 or not numbers:
        found = {name: f"{a.dtype} {a.shape}" for name, a in there.items()}
        raise ValueError(f"the context is {found}: need numbers [n, *c], alike in both splits")
    for name, a in there.items():
        check_finite(f"the context beside {rows[name].name}", a)
    if shapes == {()} and all(a.dtype.kind in "iu" for a in there.values()):
        kept = {
            n: as_classes(f"context beside {rows[n].name}", a, len(a)) for n, a in there.items()
        }
        context = Context((), 1 + int(max(a.max() for a in kept.values())))
    else:
        kept = {
            name: _as_floats(a).reshape(len(a), *(a.shape[1:] or (1,))) for name, a in there.items()
        }
        context = Context(kept["train"].shape[1:])
    return {name: r._replace(context=kept[name]) for name, r in rows.items()}, context


def _as_floats(array: np.ndarray) -> np.ndarray:
    """Integers as floats, since integers mean classes; floats as they are."""
    return array.astype(np.float64) if array.dtype.kind in "iu" else array


def cell_widths(config: DataConfig, shape: Shape) -> np.ndarray | None:
    """The widths of the cells of real values, [*shape]; None where all are continuous.

    Raises:
        FieldError: there are neither one nor as many as the last axis has.
    """
    widths = config.cell_width
    if not any(widths):
        return None
    allowed = f"one number, or {shape[-1]} of them, one for each column"
    require(len(widths) in (1, shape[-1]), "data.cell_width", widths, allowed)
    return np.broadcast_to(np.asarray(widths, np.float64), shape)


def ends(config: DataConfig, shape: Shape) -> Range | None:
    """The ends of the coordinates, [*shape]; None where none has any.

    Raises:
        FieldError: there are neither one nor as many as the last axis has, or no room between.
    """
    found = []
    for field, missing in (("lower", -np.inf), ("upper", np.inf)):
        given = getattr(config, field) or (None,)
        allowed = f"one number, or {shape[-1]} of them or None, one for each column"
        require(len(given) in (1, shape[-1]), f"data.{field}", given, allowed)
        fits = all(end is None or abs(end) <= LARGEST for end in given)
        require(fits, f"data.{field}", given, f"at most {LARGEST:g} in float32")
        numbers = np.array([missing if end is None else end for end in given], np.float64)
        found.append(np.broadcast_to(numbers, shape))
    lower, upper = found
    allowed = f"more than data.lower={config.lower}"
    require(bool((lower < upper).all()), "data.upper", config.upper, allowed)
    return Range(lower, upper) if np.isfinite(found).any() else None


class _Coordinates(NamedTuple):
    """The words for coordinates of examples."""

    shape: Shape
    columns: tuple[str, ...]

    def name(self, number: int) -> str:
        """That of the coordinate with this number in the flattened example."""
        if self.columns:
            return self.columns[number]
        place = np.unravel_index(number, self.shape)
        return str(number) if len(self.shape) == 1 else str(tuple(map(int, place)))

    def names(self, numbers: np.ndarray) -> str:
        """Name several coordinates in one phrase."""
        more = f" and {len(numbers) - NAMED} more" if len(numbers) > NAMED else ""
        kind = ("column" if self.columns else "coordinate") + "s" * (len(numbers) > 1)
        return f"{kind} {', '.join(map(self.name, numbers[:NAMED]))}{more}"


def _check_coordinates(config: DataConfig, data: Dataset) -> None:
    """Refuse a coordinate of the training split without a density, and warn of repeated values."""
    words = _Coordinates(data.shape, data.columns)
    widths = cell_widths(config, data.shape)
    widths = np.zeros(math.prod(data.shape)) if widths is None else np.ravel(widths)
    train = data.finite("train")
    found = marginals.moments(_chunks(train), full=False)
    low, high = _range(train)
    constant = np.flatnonzero((low == high) & (widths == 0.0))
    if constant.size:
        raise ValueError(
            f"{words.names(constant)}: constant in the training split, {low[constant[0]]:g} in "
            "float32, where a density is infinite; leave out what is constant"
            f"{' by data.columns' if data.columns else ''}, or give it a data.cell_width"
        )
    spread = np.sqrt(found.variances + widths**2 / 12.0)
    step = np.finfo(np.float32).eps * np.maximum(np.abs(low), np.abs(high))
    coarse = np.flatnonzero(step > RESOLUTION * spread)
    if coarse.size:
        raise ValueError(
            f"{words.names(coarse)}: values up to {high[coarse[0]]:g} with a standard deviation of "
            f"{spread[coarse[0]]:.3g} are too close for float32; subtract a constant, as their "
            f"mean {found.mean[coarse[0]]:g}"
        )
    _check_repeats(data, words, widths)
    if known := ends(config, data.shape):
        _check_distances(words, known, low, high, spread)
        for name in data.splits:
            _check_range(data.finite(name), name, words, known, widths.reshape(data.shape))


def _check_distances(
    words: _Coordinates, known: Range, low: np.ndarray, high: np.ndarray, spread: np.ndarray
) -> None:
    """Refuse ends so far from the data that float32 cannot tell the distances apart."""
    distances = high - np.ravel(known.lower), np.ravel(known.upper) - low
    nearest = np.minimum(*distances)
    nearest = np.where(np.isfinite(nearest), nearest, 0.0)
    far = np.flatnonzero(np.finfo(np.float32).eps * nearest > RESOLUTION * spread)
    if far.size:
        raise ValueError(
            f"{words.names(far)}: data.lower or data.upper is {nearest[far[0]]:g} away from values "
            f"with a standard deviation of {spread[far[0]]:.3g}, too far for float32; leave out an "
            "end that is never reached"
        )


def _check_range(
    split: Finite, name: str, words: _Coordinates, known: Range, widths: np.ndarray
) -> None:
    """Refuse values whose cells reach an end of their range."""
    first, encoding = 0, Reals(None, widths, known)
    for chunk in _chunks(split):
        x = chunk.reshape(-1, *words.shape)
        fits = encoding.holds_cells(x)
        if not fits.all():
            row, number = np.argwhere(~fits.reshape(len(x), -1))[0]
            low, high = np.ravel(known.lower)[number], np.ravel(known.upper)[number]
            cells = " and their cells" if np.ravel(widths)[number] else ""
            limits = [f"above data.lower, {low:g}"] if np.isfinite(low) else []
            limits += [f"below data.upper, {high:g}"] if np.isfinite(high) else []
            raise ValueError(
                f"{words.names(np.array([number]))} is {chunk[row, number]:g} in example "
                f"{first + row} of the {name} split: need values{cells} {' and '.join(limits)}"
            )
        first += len(x)


def _chunks(split: Finite) -> Iterator[np.ndarray]:
    """The examples, some at a time, flattened."""
    for first in range(0, split.size, CHUNK):
        ids = np.arange(first, min(first + CHUNK, split.size))
        yield split.examples(ids).reshape(len(ids), -1)


def _range(split: Finite) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest value of every coordinate, float64."""
    pairs = [(x.min(axis=0), x.max(axis=0)) for x in _chunks(split)]
    low, high = (np.stack(part).astype(np.float64) for part in zip(*pairs, strict=True))
    return low.min(axis=0), high.max(axis=0)


def _check_repeats(data: Dataset, words: _Coordinates, widths: np.ndarray) -> None:
    """Warn of coordinates whose values repeat, and refuse cells that overlap."""
    chosen = np.unique(np.linspace(0, len(widths) - 1, MOST_COORDINATES).astype(int))
    values = marginals.first(_chunks(data.finite("train")), LOOKED_AT)[:, chosen]
    gaps = {}
    for column, number in enumerate(chosen):
        share, gap = repeats(values[:, column])
        width, error = (
            widths[number],
            4 * np.finfo(np.float32).eps * np.abs(values[:, column]).max(),
        )
        if width > 0.0 and gap < (1.0 - 1e-3) * width - error:
            allowed = f"at most {gap:.4g}, the distance of values, for {words.name(number)}"
            raise FieldError("data.cell_width", float(width), f"need {allowed}: its cells overlap")
        if width == 0.0 and share > REPEATED:
            gaps[int(number)] = gap
    if gaps:
        _warn_of_repeats(data, words, widths, gaps, values)


def repeats(values: np.ndarray) -> tuple[float, float]:
    """(share of the values that occur more than once, smallest distance of two that differ).

    The distance has no more digits than float32 gives it.
    """
    distinct, counts = np.unique(values, return_counts=True)
    gaps = np.diff(distinct.astype(np.float64))
    share = counts[counts > 1].sum() / len(values)
    if not gaps.size:
        return share, math.inf
    gap = float(gaps.min())
    rounding = float(2.0 * np.finfo(np.float32).eps * float(np.abs(values).max()))
    error = max(rounding, 1e-6 * gap)
    rounded = (float(f"{gap:.{digits}g}") for digits in range(1, 8))
    return share, next((r for r in rounded if abs(r - gap) <= error), gap)


def _warn_of_repeats(
    data: Dataset,
    words: _Coordinates,
    widths: np.ndarray,
    gaps: dict[int, float],
    values: np.ndarray,
) -> None:
    """One line with the coordinates and what to do."""
    if data.columns:
        wanted = [f"{gaps.get(j, width):.4g}" for j, width in enumerate(widths)]
        remedy = f"data.cell_width={','.join(wanted)}"
    else:
        remedy = f"data.cell_width={min(gaps.values()):.4g}"
    grey = np.abs(values * 255.0 - np.round(values * 255.0)).max() < 1e-3
    images = len(data.shape) in (2, 3) and grey and values.min() >= 0.0 and values.max() <= 1.0
    instead = "; np.uint8(np.round(255 * x)) makes grey levels of them" if images else ""
    logger.warning(
        "%s: more than %d %% of the values occur more than once. A density can be raised there "
        "without limit, so its figures may mean nothing; %s says that a value is known to within "
        "its cell%s",
        words.names(np.array(list(gaps))), 100 * REPEATED, remedy, instead,
    )  # fmt: skip


def _check_classes(data: Dataset) -> None:
    """Warn of classes that training does not see."""
    known = np.unique(data.finite("train").context)
    for name in data.splits:
        other = np.setdiff1d(data.finite(name).context, known)
        if other.size:
            logger.warning(
                "classes %s of the %s split have no training example, so their densities are "
                "those of the start",
                [data.context.names[k] if data.context.names else int(k) for k in other], name,
            )  # fmt: skip


def with_scaled_context(data: Dataset) -> Dataset:
    """The data set with the context at zero mean and unit variance in the training split.

    A constant number keeps its scale: the deviation of equal values is not always 0, but rounding.
    """
    given = data.finite("train").context.astype(np.float64)
    mean, constant = given.mean(axis=0), given.min(axis=0) == given.max(axis=0)
    scale = np.where(constant, 1.0, given.std(axis=0))
    if constant.any():
        places = np.flatnonzero(constant)[:10].tolist()
        logger.warning("the context says nothing in places %s: constant in training", places)
    context = dataclasses.replace(data.context, mean=mean, scale=scale)
    finite = {name: data.finite(name) for name in data.splits}
    splits: dict[str, Any] = {
        name: dataclasses.replace(split, context=context.standardized(split.context))
        for name, split in finite.items()
    }
    return dataclasses.replace(data, context=context, **splits)
