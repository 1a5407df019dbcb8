"""Heads compute what the noised value of a coordinate says about it; the rest is learned.

The noise of a diffusion is independent per coordinate. So for any law of the data, with y = x_t/α
and τ = σ/α,

    p(x0_j | x_t) ∝ N(y_j; x0_j, τ²) r_j(x0_j),      r_j(x0_j) = p(x0_j | x_t without coordinate j)

The first factor is known. A network gives numbers for the second, a mixture r_j = Σ_k π_k c_k of
components of known shape. The score follows with π and c held fixed:

    σ s_j = Σ_k p_k u_k,   p = softmax_k(log π_k + ℓ_k),   ℓ_k = log ∫ c_k(v) N(y_j; v, τ²) dv,
    u_k = τ ∂ℓ_k/∂y

| head  | data                               | c_k           | ℓ_k                                 |
| cells | integers with noise in their cells | U[e_k, e_k+h] | log(Φ((e_k+h−y)/τ) − Φ((e_k−y)/τ))  |
| atoms | integers as they are               | δ(value k)    | −(value k − y)²/(2τ²)               |

`real_heads` has those of real values. At the zero start of the network r_j is the marginal law of
the training data, the `prior` (from `marginals`): the model starts as the independent model of the
data, which is exact where coordinates are independent, at every time and for every SDE.

The decoder of a head is log p(x0 | x_t) = Σ_j log r_j(x0_j) + log N(y_j; x0_j, τ²) − log ρ_j(y_j),
ρ_j(y) = Σ_k π_k e^{ℓ_k}; of atoms it is the categorical law log p_k.

Reference: the decoder of atoms with π = 1/L is that of Kingma et al. 2021,
https://arxiv.org/abs/2107.00630, eq. (11).
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import marginals
from checks import require
from operators import Batched, PerExample, expand, scale
from sde_lib import SDE
from tails import hazard, log_tail

Arrays = dict[str, Any]  # the arrays of a head: `prior`, fixed, and what is learned beside it
Outputs = Float[Array, "b *d k"]
Shape = tuple[int, ...]
LOG_2PI = math.log(2.0 * math.pi)
WINDOW = 14  # cells on either side of y with exact masses: 7 τ at τ = 2h
SPAN = 2 * WINDOW + 1  # so many levels, or fewer, have exact masses in all cells
MATRIX_START = 0.05  # of the matrix that levels share: larger, and high noise governs the training


def cell_terms(
    m: Float[Array, "b *d k"], w: Float[Array, "b *ones"]
) -> tuple[Float[Array, "b *d k"], Float[Array, "b *d k"]]:
    """(log(Φ(m + w/2) − Φ(m − w/2)), τ ∂/∂y of it) of cells of width w τ centred at y + m τ.

    The mass is computed from the tail that the cell lies in, so that nothing cancels. For cells
    narrower than w = eps^{1/6} (.07 in float32, .0025 in float64) the difference would cancel.
    Gaussians of the same variance take their place, see `narrow_terms`.
    """
    threshold = float(jnp.finfo(m.dtype).eps) ** (1.0 / 6.0)
    is_narrow = w < threshold
    log_narrow, u_narrow = narrow_terms(m, w)
    safe = jnp.where(is_narrow, 1.0, w)
    sign = jnp.where(m >= 0, 1.0, -1.0).astype(m.dtype)
    near, far = sign * m - 0.5 * safe, sign * m + 0.5 * safe
    log_near = log_tail(near)
    drop = log_tail(far) - log_near  # log Q(far) − log Q(near) < 0
    part = -jnp.expm1(drop)
    u = sign * (hazard(near) - hazard(far) * jnp.exp(drop)) / part
    return (
        jnp.where(is_narrow, log_narrow, log_near + jnp.log(part)),
        jnp.where(is_narrow, u_narrow, u),
    )


def narrow_terms(
    m: Float[Array, "b *d k"], w: Float[Array, "b *ones"] | float
) -> tuple[Float[Array, "b *d k"], Float[Array, "b *d k"]]:
    """Do what `cell_terms` does, with Gaussians of the variance w²/12 in the place of the cells.

    This neglects the fourth cumulant −w⁴/120. The error of the log-mass is w⁴/2880 |m⁴ − 6m² + 3|.
    That of its derivative is w⁴/720 |m³ − 3m|, at τ = 2h (w = ½) 8.7e-5 |m³ − 3m|. For w = 0 the
    cells are points, and the first result is the logarithm of the density φ(m).
    """
    variance = 1.0 + w**2 / 12.0
    log_density = -0.5 * (m**2 / variance + jnp.log(variance) + LOG_2PI)
    is_point = isinstance(w, float) and w == 0.0
    return log_density if is_point else log_density + jnp.log(w), m / variance


def _noise(x: Batched, t: PerExample, sde: SDE) -> tuple[Batched, PerExample]:
    """(y = x/α, τ = σ/α)."""
    alpha = sde.alpha(t)
    return scale(1.0 / alpha, x), sde.sigma(t) / alpha


def total(values: Batched) -> PerExample:
    """Sum over the coordinates of every example."""
    return jnp.sum(values, axis=tuple(range(1, values.ndim)))


def _at(rows: Outputs, index: Int[Array, "b *d"]) -> Batched:
    return jnp.take_along_axis(rows, index[..., None], axis=-1)[..., 0]


@dataclasses.dataclass(frozen=True)
class Levels:
    """A head of L levels at equal distances: the logits of the law that `Cells` and `Atoms` share.

    Up to 29 levels the network gives all logits. For more levels it gives `rank` features, a and b
    for each coordinate. With a learned [rank, L] matrix that all coordinates share,

        log π_k = prior_k + features · matrix_k + g a v_k − ½ b̃ v_k²,
        v_k = (value_k − y)/√(τ² + h²),   b̃ = softplus(b − 3) − softplus(−3)

    so that a narrow law around y needs no large numbers. The first two rows of the matrix start as
    the lowest and the highest level, the others as a discrete cosine transform, all of them small.
    A matrix that starts large gives the features so much weight at high noise that their gradient
    governs the network, and what neighbours say at lower noise is learned late. A gain g above 1
    lets a, which moves the law along, learn faster than the rest.

    The network sees x/√(α² + σ²), which has about unit size at every time for every SDE. It also
    sees the posterior of the independent model, p(level j | x_t,j) ∝ prior × noise: up to 29 levels
    all probabilities, for more levels the mean and the probabilities of the lowest and the highest
    level. In this posterior τ is at least h/8, at which the level is almost known.

    Attributes:
        levels: L.
        low: the lower end of the first cell (cells), or the first value (atoms), in model space.
        high: the upper end of the last cell, or the last value.
        rank: features per coordinate, for more than 29 levels.
        gain: g, for more than 29 levels.
    """

    levels: int
    low: float
    high: float
    rank: int = 16
    gain: float = 1.0

    def __post_init__(self) -> None:
        require(self.rank >= 2, "rank", self.rank, "at least 2")
        require(self.gain > 0.0, "gain", self.gain, "more than 0")

    @property
    def width(self) -> float:
        """h, the width of a cell or the distance of two values."""
        raise NotImplementedError

    @property
    def outputs(self) -> int:
        """Numbers that the network gives per coordinate."""
        return self.levels if self.levels <= SPAN else self.rank + 2

    def arrays(self, shape: Shape) -> Arrays:
        """The arrays before the training data are seen: a uniform prior."""
        dtype = jnp.result_type(float)
        rows = shape if marginals.by_position(shape, self.levels) else shape[-1:]
        found = {"prior": jnp.full((*rows, self.levels), -math.log(self.levels), dtype)}
        if self.levels > SPAN:
            phase = (jnp.arange(self.levels, dtype=dtype) + 0.5) * math.pi / self.levels
            order = jnp.arange(1, self.rank - 1, dtype=dtype)
            ends = 3.0 * jnp.eye(self.levels, dtype=dtype)[jnp.asarray([0, self.levels - 1])]
            waves = math.sqrt(2.0) * jnp.cos(order[:, None] * phase[None, :])
            found["matrix"] = MATRIX_START * jnp.concatenate([ends, waves])
        return found

    def prior(self, shape: Shape, batches: Iterable[np.ndarray]) -> Array:
        """log π of batches of integers [b, *d]: the smoothed histogram, by position or channel."""
        number = marginals.counts(batches, self.levels)
        if not marginals.by_position(shape, self.levels):
            number = marginals.pooled(number)
        return jnp.asarray(marginals.log_histogram(number), jnp.result_type(float))

    def inputs(
        self, arrays: Arrays, x: Batched, t: PerExample, sde: SDE
    ) -> tuple[Batched, Outputs]:
        """(x/√(α² + σ²), what the posterior of the prior says): the input of the network."""
        y, tau = _noise(x, t, sde)
        y, tau = jnp.clip(y, self.low, self.high), jnp.maximum(tau, 0.125 * self.width)
        m, _ = self.position(y, tau, self._every(y))
        # The nearest value is at most 4 τ away: without the maximum taken off nothing underflows.
        weight = jnp.exp(_spread_prior(arrays["prior"], m) - 0.5 * m**2)
        if self.levels <= SPAN:
            features = weight / jnp.sum(weight, axis=-1, keepdims=True)
        else:
            total_and_mean = self._sums(weight)
            ends = jnp.stack([weight[..., 0], weight[..., -1], total_and_mean[..., 1]], axis=-1)
            features = ends / total_and_mean[..., :1]
        return scale((sde.alpha(t) ** 2 + sde.sigma(t) ** 2) ** -0.5, x), features

    def logits(self, arrays: Arrays, net: Outputs, y: Batched, tau: PerExample) -> Outputs:
        """log π + constant, [B, *d, L]."""
        if self.levels <= SPAN:
            return _spread_prior(arrays["prior"], net) + net
        # a v − ½ b̃ v² = value (a + b̃ y/u)/u − ½ value² b̃/u² + constant, u² = τ² + h²: as a product
        # of matrices its gradient costs a tenth of that of sums over the levels.
        unit = expand(jax.lax.rsqrt(tau**2 + self.width**2), y)
        bend = (jax.nn.softplus(net[..., -1] - 3.0) - math.log1p(math.exp(-3.0))) * unit**2
        local = [self.gain * net[..., -2] * unit + bend * y, -0.5 * bend]
        numbers = jnp.concatenate([net[..., :-2], jnp.stack(local, axis=-1)], axis=-1)
        values = self._values(jnp.arange(self.levels, dtype=y.dtype))
        rows = jnp.concatenate([arrays["matrix"], jnp.stack([values, values**2])])
        return _spread_prior(arrays["prior"], net) + _product(numbers, rows)

    def index(self, x0: Batched) -> Int[Array, "b *d"]:
        """The level of noise-free or dequantised data."""
        raise NotImplementedError

    def position(
        self, y: Batched, tau: PerExample, levels: Array
    ) -> tuple[Outputs, Float[Array, "b *ones"]]:
        """Values (cells: centres) of levels from y in units of τ; their distance in these."""
        m = (self._values(levels) - y[..., None]) / expand(tau, y[..., None])
        return m, expand(self.width / tau, m)

    def _sums(self, weight: Outputs) -> Outputs:
        """Σ_k weight_k (1, value_k), [B, *d, 2], as a product of matrices."""
        values = self._values(jnp.arange(self.levels, dtype=weight.dtype))
        return _product(weight, jnp.stack([jnp.ones_like(values), values], axis=1))

    def _every(self, y: Batched) -> Float[Array, "*ones l"]:
        levels = jnp.arange(self.levels, dtype=y.dtype)
        return jnp.expand_dims(levels, tuple(range(y.ndim)))

    def _values(self, levels: Array) -> Array:
        """Value, or centre of the cell, of each level."""
        return self.low + levels * self.width


@dataclasses.dataclass(frozen=True)
class Cells(Levels):
    """r_j = Σ_k π_k U[e_k, e_k + h], e_k = low + k h: integers that are dequantised uniformly.

    Up to 29 levels the masses of all cells are exact. For more levels they are exact in a window
    around y where τ < 2h (cells beyond 7 τ weigh less than e^{−24}). Where τ ≥ 2h, Gaussians of the
    variance of the cells take their place; `narrow_terms` gives the error.
    """

    @property
    def width(self) -> float:
        """The width h of a cell."""
        return (self.high - self.low) / self.levels

    def score(self, arrays: Arrays, net: Outputs, x: Batched, t: PerExample, sde: SDE) -> Batched:
        """s of x: [B, *d] at t: [B], from the output of the network [B, *d, outputs]."""
        y, tau = _noise(x, t, sde)
        mean, _ = self.mean_and_log_mass(self.logits(arrays, net, y, tau), y, tau)
        return scale(1.0 / sde.sigma(t), mean)

    def log_ratio(
        self, arrays: Arrays, net: Outputs, x0: Batched, x: Batched, t: PerExample, sde: SDE
    ) -> PerExample:
        """Σ_j log r_j(x0_j)/ρ_j(y_j) in nats: the decoder less log N(y; x0, τ² I)."""
        y, tau = _noise(x, t, sde)
        logits = self.logits(arrays, net, y, tau)
        _, log_mass = self.mean_and_log_mass(logits, y, tau)
        return total(_at(logits, self.index(x0)) - log_mass)

    def known_noise(self, x0: Batched, x: Batched, t: PerExample, sde: SDE) -> Batched:
        """E[z | x_t, the cell of x0] = −σ ∇ log q(x_t | cell), at x = x_t.

        As the target of score matching it gives the same expected gradient as z, with less noise,
        because the place of x0 in its cell is integrated out.
        """
        y, tau = _noise(x, t, sde)
        m, w = self.position(y, tau, self.index(x0)[..., None].astype(y.dtype))
        return -cell_terms(m, w)[1][..., 0]

    def index(self, x0: Batched) -> Int[Array, "b *d"]:
        """The cell of x0."""
        k = jnp.floor((x0 - self.low) / self.width).astype(jnp.int32)
        return jnp.clip(k, 0, self.levels - 1)

    def mean_and_log_mass(
        self, logits: Outputs, y: Batched, tau: PerExample
    ) -> tuple[Batched, Batched]:
        """(σ s, log Σ_k exp(logit_k) P(y + τ z in cell k)), per coordinate."""
        if self.levels <= SPAN:
            return mixed(logits, *cell_terms(*self.position(y, tau, self._every(y))))
        limit = 2.0 * self.width
        coarse_tau, fine_tau = jnp.maximum(tau, limit), jnp.minimum(tau, limit)
        coarse = self._coarse(logits, y, coarse_tau)
        start = jnp.clip(self.index(jax.lax.stop_gradient(y)) - WINDOW, 0, self.levels - SPAN)
        span = jnp.expand_dims(jnp.arange(SPAN, dtype=start.dtype), tuple(range(start.ndim)))
        window = start[..., None] + span
        near = jnp.take_along_axis(logits, window, axis=-1)
        fine = mixed(near, *cell_terms(*self.position(y, fine_tau, window.astype(y.dtype))))
        is_coarse = expand(tau, y) >= limit
        mean, log_mass = (jnp.where(is_coarse, a, b) for a, b in zip(coarse, fine, strict=True))
        return mean, log_mass

    def _coarse(self, logits: Outputs, y: Batched, tau: PerExample) -> tuple[Batched, Batched]:
        """`mixed` of the `narrow_terms` of all cells; the sums are products of matrices."""
        m, w = self.position(y, tau, self._every(y))
        terms, _ = narrow_terms(m, w)
        joint = logits + terms
        largest = jax.lax.stop_gradient(jnp.max(joint, axis=-1, keepdims=True))
        sums = self._sums(jnp.exp(joint - largest))
        gap = sums[..., 1] / sums[..., 0] - y
        slope = gap / (expand(tau, y) * (1.0 + w[..., 0] ** 2 / 12.0))
        return slope, jnp.log(sums[..., 0]) + largest[..., 0]

    def _values(self, levels: Array) -> Array:
        """Centres of the cells."""
        return self.low + (levels + 0.5) * self.width


@dataclasses.dataclass(frozen=True)
class Atoms(Levels):
    """r_j = Σ_k π_k δ(value k): integers without dequantisation.

    The posterior of a level is the categorical law softmax_k(log π_k − (y − y_k)²/(2τ²)), which is
    the decoder of the discrete bound.
    """

    @property
    def width(self) -> float:
        """The distance of two values."""
        return (self.high - self.low) / (self.levels - 1)

    def score(self, arrays: Arrays, net: Outputs, x: Batched, t: PerExample, sde: SDE) -> Batched:
        """s of x: [B, *d] at t: [B], from the output of the network [B, *d, outputs]."""
        y, tau = _noise(x, t, sde)
        terms, m = self._points(y, tau)
        mean, _ = mixed(self.logits(arrays, net, y, tau), terms, m)
        return scale(1.0 / sde.sigma(t), mean)

    def log_probability(
        self, arrays: Arrays, net: Outputs, x0: Batched, x: Batched, t: PerExample, sde: SDE
    ) -> PerExample:
        """Σ_j log P(level of x0_j | x_t) in nats."""
        y, tau = _noise(x, t, sde)
        terms, _ = self._points(y, tau)
        log_p = jax.nn.log_softmax(self.logits(arrays, net, y, tau) + terms, axis=-1)
        return total(_at(log_p, self.index(x0)))

    def index(self, x0: Batched) -> Int[Array, "b *d"]:
        """The level of the value x0."""
        k = jnp.round((x0 - self.low) / self.width).astype(jnp.int32)
        return jnp.clip(k, 0, self.levels - 1)

    def _points(self, y: Batched, tau: PerExample) -> tuple[Outputs, Outputs]:
        """`narrow_terms` of all values, which are points and have no width."""
        return narrow_terms(self.position(y, tau, self._every(y))[0], 0.0)


def mixed(logits: Outputs, terms: Outputs, u: Outputs) -> tuple[Batched, Batched]:
    """(Σ_k p_k u_k, log Σ_k exp(logit_k + term_k)), p = softmax(logits + terms)."""
    joint = logits + terms
    return jnp.sum(jax.nn.softmax(joint, axis=-1) * u, axis=-1), jax.nn.logsumexp(joint, axis=-1)


def _product(rows: Array, matrix: Array) -> Array:
    """rows · matrix without the coarse arithmetic that accelerators take by default."""
    return jnp.matmul(rows, matrix, precision=jax.lax.Precision.HIGHEST)


def _spread_prior(prior: Array, like: Outputs) -> Array:
    """The prior of positions [*d, L], or of channels [C, L], with the axes that it lacks."""
    return jnp.expand_dims(prior, tuple(range(like.ndim - prior.ndim)))
