"""Real values brought to the whole line, to zero mean and unit variance, and back.

    v = log(x − a) − log(b − x), without the logarithm of an end that a coordinate lacks
    log|dv/dx| = log(b − a) − log(x − a) − log(b − x), likewise; v = x without ends

    y = A (x − m),   log p_x(x) = log p_y(A (x − m)) + log|det A|
    coordinate   A = D⁻¹,           D = diag s, the standard deviations
    whiten       A = R^{-1/2} D⁻¹,  R the correlation matrix, R^{-1/2} its symmetric root

m, s and R are those of the training split. Neither kind depends on the units of the coordinates.
The symmetric root is unique, and of all whitenings its y_j correlates most with x_j.
Reference: Kessy et al. 2018, https://arxiv.org/abs/1512.00809 (ZCA-cor).
"""

import dataclasses
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

import marginals
from checks import choose, require
from operators import Batched, PerExample

Shape = tuple[int, ...]
SMALLEST = 1e-6  # eigenvalue of the correlations: below, float32 does not resolve its axis


@dataclasses.dataclass(frozen=True, eq=False)
class Range:
    """The open range (a, b) of every coordinate, mapped to the whole line: x ↔ v.

    A density that stops at a sharp end becomes a smooth one: the uniform law becomes the logistic.
    The ends are those in float32, which data and samples have.
    Reference: Stan Reference Manual, section 10 (constrained parameters and their Jacobians).

    Attributes:
        lower: a, [*d]; −inf where there is none.
        upper: b, [*d]; inf where there is none.
    """

    lower: np.ndarray
    upper: np.ndarray

    def __post_init__(self) -> None:
        for name in ("lower", "upper"):
            ends = getattr(self, name).astype(np.float32).astype(np.float64)
            object.__setattr__(self, name, ends)

    def apply(self, x: Batched) -> Batched:
        """Return v; infinite at an end, NaN beyond."""
        above, below = self._logs(x)
        return jnp.where(self._has_ends[None], above - below, x)

    def log_det(self, x: Batched) -> PerExample:
        """Return Σ_j log|dv_j/dx_j|, in nats."""
        above, below = self._logs(x)
        width = np.where(self._has_both, self.upper - self.lower, 1.0)
        slope = jnp.asarray(np.log(width), x.dtype)[None] - above - below
        return jnp.sum(slope.reshape(len(x), -1), axis=1)

    def invert(self, v: Batched) -> Batched:
        """Return x, between the ends."""
        lower, upper = (np.where(np.isfinite(e), e, 0.0) for e in (self.lower, self.upper))
        start, stop = jnp.asarray(lower, v.dtype)[None], jnp.asarray(upper, v.dtype)[None]
        # From the nearer end, so that small distances keep their digits.
        part = (stop - start) * jax.nn.sigmoid(-jnp.abs(v))
        between = jnp.where(v > 0.0, stop - part, start + part)
        outside = jnp.where(np.isfinite(self.lower)[None], start + jnp.exp(v), stop - jnp.exp(-v))
        x = jnp.where(self._has_both[None], between, jnp.where(self._has_ends[None], outside, v))
        return self.clip(x)

    def clip(self, x: Batched) -> Batched:
        """The nearest numbers within the range, a step of the dtype away from its ends."""
        low, high = (
            self.lower + _steps(self.lower, x.dtype),
            self.upper - _steps(self.upper, x.dtype),
        )
        return jnp.clip(x, jnp.asarray(low, x.dtype)[None], jnp.asarray(high, x.dtype)[None])

    def holds(self, x: np.ndarray) -> np.ndarray:
        """Say which numbers [b, *d] lie between the ends, bool."""
        return (self.lower[None] < x) & (x < self.upper[None])

    def touches(self, x: np.ndarray) -> np.ndarray:
        """Say the same, if an end itself is allowed; the rounding of an end does not count."""
        low = self.lower - _steps(self.lower, np.float32)
        return (low[None] <= x) & (x <= (self.upper + _steps(self.upper, np.float32))[None])

    @property
    def _has_both(self) -> np.ndarray:
        return np.isfinite(self.lower) & np.isfinite(self.upper)

    @property
    def _has_ends(self) -> np.ndarray:
        return np.isfinite(self.lower) | np.isfinite(self.upper)

    def _logs(self, x: Batched) -> tuple[Batched, Batched]:
        """(log(x − a), log(b − x)), 0 for an end that is not there."""

        def log_of(end: np.ndarray, sign: float) -> Batched:
            there = np.isfinite(end)
            gap = sign * (x - jnp.asarray(np.where(there, end, 0.0), x.dtype)[None])
            return jnp.log(jnp.where(there[None], gap, 1.0))

        return log_of(self.lower, 1.0), log_of(self.upper, -1.0)


def _steps(ends: np.ndarray, dtype: np.typing.DTypeLike) -> np.ndarray:
    """The distance from an end to the next number that is not subnormal; 0 where it is missing."""
    kind, size = np.finfo(dtype), np.abs(np.where(np.isfinite(ends), ends, 0.0))
    return np.where(np.isfinite(ends), np.maximum(size * float(kind.eps), float(kind.tiny)), 0.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Affine:
    """y = A (x − m) for x [B, *d]; A is diagonal, [*d], or a matrix of the flattened x, [n, n].

    Attributes:
        mean: m, [*d].
        matrix: A.
        inverse: A⁻¹, of the same shape.
        log_det: log|det A|.
    """

    mean: np.ndarray
    matrix: np.ndarray
    inverse: np.ndarray
    log_det: float

    def apply(self, x: Batched) -> Batched:
        """Return y = A (x − m)."""
        return self._times(self.matrix, x - jnp.asarray(self.mean, x.dtype)[None])

    def invert(self, y: Batched) -> Batched:
        """Return x = A⁻¹ y + m."""
        return self._times(self.inverse, y) + jnp.asarray(self.mean, y.dtype)[None]

    def _times(self, matrix: np.ndarray, x: Batched) -> Batched:
        """The product with a matrix, or a diagonal."""
        a = jnp.asarray(matrix, x.dtype)
        if a.shape == self.mean.shape:
            return a[None] * x
        flat = x.reshape(x.shape[0], a.shape[0])
        return jnp.matmul(flat, a.T, precision=jax.lax.Precision.HIGHEST).reshape(x.shape)


def coordinate(found: marginals.Moments, shape: Shape) -> Affine:
    """Zero mean and unit variance of every coordinate.

    Raises:
        FieldError: a coordinate is constant.
    """
    scale = _deviations(found)
    mean, matrix, inverse = (a.reshape(shape) for a in (found.mean, 1.0 / scale, scale))
    return Affine(mean, matrix, inverse, -float(np.log(scale).sum()))


def whiten(found: marginals.Moments, shape: Shape) -> Affine:
    """Zero mean and unit covariance.

    Raises:
        FieldError: the coordinates are linearly dependent.
    """
    scale = _deviations(found)
    correlations = found.covariance / np.outer(scale, scale)
    values, basis = np.linalg.eigh(correlations)
    allowed = (
        f"'coordinate' or 'none': of the {len(values)} coordinates in {found.number} training "
        f"examples {int(np.sum(values < SMALLEST))} follow from the others"
    )
    require(values[0] >= SMALLEST, "data.standardize", "whiten", allowed)
    root, back = ((basis * values**power) @ basis.T for power in (-0.5, 0.5))
    log_det = -float(np.log(scale).sum() + 0.5 * np.log(values).sum())
    return Affine(found.mean.reshape(shape), root / scale, scale[:, None] * back, log_det)


def _deviations(found: marginals.Moments) -> np.ndarray:
    """Return the standard deviations of the coordinates, [n]."""
    variances = found.variances
    constant = np.flatnonzero(~(variances > 0.0))
    allowed = f"'none': coordinates {constant[:5].tolist()} are constant in the training split"
    require(constant.size == 0, "data.standardize", "coordinate or whiten", allowed)
    return np.sqrt(variances)


KINDS: dict[str, Callable[[marginals.Moments, Shape], Affine] | None] = {
    "none": None, "coordinate": coordinate, "whiten": whiten,
}  # fmt: skip


def fitted(
    kind: str, batches: Iterable[np.ndarray], shape: Shape, widths: np.ndarray | None
) -> Affine | None:
    """The affine map of a kind, from the training data; None for "none".

    Args:
        kind: a name in KINDS.
        batches: the training data [b, *shape], without noise in their cells.
        shape: of an example.
        widths: of the cells, [*shape]; by the law of total variance noise in them adds w²/12.

    Raises:
        FieldError: a coordinate is constant, or "whiten" has dependent or too many coordinates.
    """
    make = choose(KINDS, kind, "data.standardize")
    if make is None:
        return None
    full, n = make is whiten, math.prod(shape)
    allowed = f"'coordinate' for more than {marginals.MAX_COVARIANCE} coordinates, here {n}"
    require(not full or n <= marginals.MAX_COVARIANCE, "data.standardize", kind, allowed)
    found = marginals.moments(batches, full=full)
    if widths is not None:
        noise = np.ravel(widths) ** 2 / 12.0
        found = found._replace(covariance=found.covariance + (np.diag(noise) if full else noise))
    return make(found, shape)
