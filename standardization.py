"""Real values brought to zero mean and unit variance, and back.

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
from operators import Batched

Shape = tuple[int, ...]
SMALLEST = 1e-6  # eigenvalue of the correlations: below, float32 does not resolve its axis


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
