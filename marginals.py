"""Describe single coordinates and pairs of the training data by histograms, moments and mixtures.

    histogram   π_jk = (n_jk + c g_k)/(n + c),   g_k = (Σ_j n_jk + 1)/(n d + L)
    moments     μ_j = E x_j,   C_ij = E (x_i − μ_i)(x_j − μ_j)
    mixture     x_j ~ Σ_m π_jm N(μ_jm, s_jm²), by expectation–maximisation for every j by itself
    slope       B of x ≈ a + φ B, by ridge regression on the numbers φ of a context

They are the priors of the heads (`heads`) and the trivial baselines (`baselines`). All are taken in
one stream over the data, in float64; mixtures and slopes of at most 10,000 examples of it.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

SMOOTHING = 5.0  # examples that the pooled histogram counts for, at every position
MAX_ENTRIES = 2**20  # of a histogram by position; larger ones are pooled over the positions
EMPTY = 0.01  # examples that every component of a mixture has at least
MAX_COVARIANCE = 4000  # dimensions with a full covariance
FITTED = 5000  # examples that mixtures and slopes are fitted to, or up to twice as many
BLOCK = 500  # coordinates whose regression is computed at a time
PENALTIES = np.geomspace(1e-3, 1e5, 17)  # of a ridge regression


def counts(batches: Iterable[np.ndarray], levels: int) -> np.ndarray:
    """Count how often each coordinate has each level, int64 [*d, levels].

    Args:
        batches: integers 0, …, levels − 1, arrays [b, *d].
        levels: number of levels.

    Raises:
        ValueError: there is no batch.
    """
    total, shape = None, ()
    for batch in batches:
        shape, n = batch.shape[1:], math.prod(batch.shape[1:])
        places = batch.reshape(len(batch), n).astype(np.int64) + levels * np.arange(n)
        found = np.bincount(places.ravel(), minlength=n * levels)
        total = found if total is None else total + found
    if total is None:
        raise ValueError("the training split has no example to count")
    return total.reshape(*shape, levels)


def pooled(number: np.ndarray) -> np.ndarray:
    """Counts [H, W, C, L] or [n, L] summed over all axes but channels and levels, [C, L] or [L]."""
    return number.sum(axis=tuple(range(max(number.ndim - 2, 1))))


def by_position(shape: tuple[int, ...], levels: int) -> bool:
    """Say whether examples of this shape get a histogram per position, not one per channel."""
    return math.prod(shape) * levels <= MAX_ENTRIES


def log_histogram(number: np.ndarray, smoothing: float = SMOOTHING) -> np.ndarray:
    """log π_jk of counts [*d, L]: smoothed towards the histogram of all coordinates, never zero."""
    everywhere = number.reshape(-1, number.shape[-1]).sum(axis=0) + 1.0
    everywhere = everywhere / everywhere.sum()
    examples = number.sum(axis=-1, keepdims=True)
    return np.log((number + smoothing * everywhere) / (examples + smoothing))


class Moments(NamedTuple):
    """Number of examples, mean [n] and covariance [n, n], or variances [n] for large n."""

    number: int
    mean: np.ndarray
    covariance: np.ndarray

    @property
    def variances(self) -> np.ndarray:
        """The diagonal of the covariance, [n]."""
        full = self.covariance.ndim == 2
        return np.diagonal(self.covariance).copy() if full else self.covariance


def moments(batches: Iterable[np.ndarray], *, full: bool) -> Moments:
    """Mean and covariance of arrays [b, *d], flattened to n coordinates.

    Args:
        batches: the data.
        full: with all pairs; else the variances alone.

    Raises:
        ValueError: there is no batch.
    """
    number, shift = 0, None
    first: np.ndarray | float = 0.0
    second: np.ndarray | float = 0.0
    for batch in batches:
        flat = batch.reshape(len(batch), -1).astype(np.float64)
        shift = flat.mean(axis=0) if shift is None else shift  # against cancellation
        flat = flat - shift
        number += len(flat)
        first = first + flat.sum(axis=0)
        second = second + (flat.T @ flat if full else np.square(flat).sum(axis=0))
    if shift is None:
        raise ValueError("the training split has no example to take moments of")
    mean = first / number
    covariance = second / number - (np.outer(mean, mean) if full else np.square(mean))
    return Moments(number, shift + mean, covariance)


class Mixtures(NamedTuple):
    """One mixture per coordinate: log weights, means and standard deviations, each [n, M]."""

    log_weights: np.ndarray
    means: np.ndarray
    deviations: np.ndarray


def mixtures(values: np.ndarray, components: int, *, floor: float, rounds: int = 60) -> Mixtures:
    """A mixture of Gaussians for every column of values [b, n], by expectation–maximisation.

    The start is deterministic: means at quantiles. No standard deviation falls below `floor`; to
    the statistics of every component the whole column adds 1/100 of an example, so none is empty.

    Reference: Dempster et al. 1977, Maximum likelihood from incomplete data via the EM algorithm.
    """
    x = values.astype(np.float64)[:, :, None]  # [b, n, 1]
    levels = (np.arange(components) + 0.5) / components
    means = np.quantile(values.astype(np.float64), levels, axis=0).T
    center, spread = x.mean(axis=0), np.maximum(x.var(axis=0), floor**2)
    variances = np.maximum(spread / components**2, floor**2) * np.ones_like(means)
    weights = np.full_like(means, 1.0 / components)
    for _ in range(rounds):
        logs = np.log(weights) - 0.5 * ((x - means) ** 2 / variances + np.log(variances))
        share = np.exp(logs - logs.max(axis=2, keepdims=True))
        share /= share.sum(axis=2, keepdims=True)
        mass = share.sum(axis=0) + EMPTY
        means = ((share * x).sum(axis=0) + EMPTY * center) / mass
        squares = (share * (x - means) ** 2).sum(axis=0)
        squares = squares + EMPTY * (spread + (center - means) ** 2)
        variances = np.maximum(squares / mass, floor**2)
        weights = mass / mass.sum(axis=1, keepdims=True)
    return Mixtures(np.log(weights), means, np.sqrt(variances))


def slope(rows: Iterable[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """B [n, d] of the regression x ≈ a + φ B, by least squares with a penalty λ_j |B_j|².

    The columns of φ have unit variance for the penalty. For every coordinate j of x, λ_j is the one
    of `PENALTIES` with the least error on examples that are left out one by one.

    Args:
        rows: batches of (x [b, *d], φ [b, n]).

    Reference: Hoerl and Kennard 1970, Ridge regression.
    """
    from sklearn.linear_model import RidgeCV

    numbers = 0

    def flat() -> Iterator[np.ndarray]:
        nonlocal numbers
        for x, known in rows:
            numbers = known.shape[1]
            yield np.concatenate([x.reshape(len(x), -1), known], axis=1)

    together = evenly(flat(), FITTED)
    values, known = np.split(together, [together.shape[1] - numbers], axis=1)
    known = known.astype(np.float64)
    if len(values) < 2:
        return np.zeros((numbers, values.shape[1]))
    scale = known.std(axis=0)
    scale = np.where(scale > 0.0, scale, 1.0)
    fit = RidgeCV(PENALTIES, alpha_per_target=True)
    parts = [
        np.atleast_2d(fit.fit(known / scale, values[:, k : k + BLOCK].astype(np.float64)).coef_)
        for k in range(0, values.shape[1], BLOCK)
    ]
    return np.concatenate(parts).T / scale[:, None]


def first(batches: Iterable[np.ndarray], number: int) -> np.ndarray:
    """The first so many examples, or all where there are fewer."""
    found, there = [], 0
    for batch in batches:
        found.append(batch)
        there += len(batch)
        if there >= number:
            break
    return np.concatenate(found)[:number]


def evenly(batches: Iterable[np.ndarray], number: int) -> np.ndarray:
    """Take every k-th example, k = 1, 2, 4, …, so that at most 2 × number are taken of all parts.

    Raises:
        ValueError: there is no batch.
    """
    every, seen, found = 1, 0, []
    for batch in batches:
        found.append(batch[-seen % every :: every])
        seen += len(batch)
        if sum(map(len, found)) > 2 * number:
            found, every = [np.concatenate(found)[::2]], 2 * every
    if not found:
        raise ValueError("the training split has no example to fit a prior to")
    return np.concatenate(found)
