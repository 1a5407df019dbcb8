"""Laws with exact density and score under any SDE: toy data and the oracle of the tests.

    x0 ~ Σ_k w_k N(m_k, v_k I)   ⇒   x_t ~ Σ_k w_k N(α m_k, (α² v_k + σ²) I)
    x0 ~ 1/K Σ_k U(c_k + [−h, h]^d)   ⇒
    p_t(x) = 1/K Σ_k Π_i [Φ((x_i − α(c_ki − h))/σ) − Φ((x_i − α(c_ki + h))/σ)]/(2αh)

One component of a mixture is a Gaussian; v_k = 0 is a set of weighted points.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr
from jaxtyping import Array, Float, Key

from operators import Batched, PerExample, expand
from sde_lib import SDE


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """Σ_k w_k N(m_k, v_k I) on R^shape.

    Attributes:
        weights: [K], summing to one.
        means: [K, *d].
        variances: [K], v_k ≥ 0.
    """

    weights: Float[Array, " k"]
    means: Float[Array, "k *d"]
    variances: Float[Array, " k"]

    def log_components(self, x: Batched, t: PerExample, sde: SDE) -> Float[Array, "b k"]:
        """log(w_k N(x; α m_k, (α² v_k + σ²) I))."""
        return self._log_components(_gap(x, t, sde, self.means), self._variance(t, sde))

    def log_data(self, x: Batched) -> PerExample:
        """log q_0(x), the density of the data, in nats; v_k > 0."""
        gap = x[:, None] - self.means[None]
        return jax.nn.logsumexp(self._log_components(gap, self.variances[None]), axis=1)

    def log_prob(self, x: Batched, t: PerExample, sde: SDE) -> PerExample:
        """log p_t(x) in nats."""
        return jax.nn.logsumexp(self.log_components(x, t, sde), axis=1)

    def score(self, x: Batched, t: PerExample, sde: SDE) -> Batched:
        """∇ log p_t(x) = Σ_k r_k (α m_k − x)/(α² v_k + σ²), r the responsibilities."""
        share = _responsibilities(self.log_components(x, t, sde)) / self._variance(t, sde)
        gap = _gap(x, t, sde, self.means)
        shares = share.reshape(*share.shape, *(1,) * (gap.ndim - 2))
        return -jnp.sum(shares * gap, axis=1)

    def sample(self, key: Key[Array, ""], number: int) -> Batched:
        """`number` draws of x0, [number, *d]."""
        key_component, key_noise = jax.random.split(key)
        k = jax.random.choice(key_component, self.weights.shape[0], (number,), p=self.weights)
        z = jax.random.normal(key_noise, (number, *self.means.shape[1:]), self.means.dtype)
        return self.means[k] + expand(jnp.sqrt(self.variances[k]), z) * z

    def _log_components(
        self, gap: Float[Array, "b k *d"], variance: Float[Array, "b_or_1 k"]
    ) -> Float[Array, "b k"]:
        squares = jnp.sum(gap**2, axis=tuple(range(2, gap.ndim)))
        log_normal = squares / variance + self.means[0].size * jnp.log(2 * math.pi * variance)
        return jnp.log(self.weights)[None] - 0.5 * log_normal

    def _variance(self, t: PerExample, sde: SDE) -> Float[Array, "b k"]:
        return (sde.alpha(t) ** 2)[:, None] * self.variances[None] + (sde.sigma(t) ** 2)[:, None]


def gaussian(mean: Float[Array, "*d"], variance: float) -> Mixture:
    """N(mean, variance I) as a mixture of one."""
    dtype = mean.dtype
    return Mixture(jnp.ones((1,), dtype), mean[None], jnp.full((1,), variance, dtype))


def weighted_points(weights: Float[Array, " k"], points: Float[Array, "k *d"]) -> Mixture:
    """A law on finitely many points, for which E[· | x_t] is a finite sum."""
    return Mixture(weights, points, jnp.zeros_like(weights))


@dataclasses.dataclass(frozen=True, eq=False)
class Boxes:
    """1/K Σ_k U(c_k + [−h, h]^d): uniform on disjoint boxes of R^shape.

    For σ(t) > 0. Value and score are exact to 1e-6 in float32 however many σ away from a box.

    Attributes:
        centers: [K, *d], c_k, in every pair some coordinate at least 2h apart.
        half_width: h > 0.
    """

    centers: Float[Array, "k *d"]
    half_width: float

    def log_data(self, x: Batched) -> PerExample:
        """log q_0(x) = −log K − d log 2h inside the boxes, −∞ outside, in nats."""
        gap = jnp.abs(x[:, None] - self.centers[None])
        inside = jnp.all(gap <= self.half_width, axis=tuple(range(2, gap.ndim))).any(axis=1)
        volume = self.centers.shape[0] * (2.0 * self.half_width) ** self.centers[0].size
        return jnp.where(inside, -math.log(volume), -jnp.inf).astype(x.dtype)

    def log_prob(self, x: Batched, t: PerExample, sde: SDE) -> PerExample:
        """log p_t(x) in nats."""
        log_box, _ = self._each(x, t, sde)
        return jax.nn.logsumexp(log_box, axis=1) - math.log(self.centers.shape[0])

    def score(self, x: Batched, t: PerExample, sde: SDE) -> Batched:
        """∇ log p_t(x) = Σ_k r_k ∇ log p_t(x | box k), r the responsibilities."""
        log_box, gradient = self._each(x, t, sde)
        share = _responsibilities(log_box)
        shares = share.reshape(*share.shape, *(1,) * (gradient.ndim - 2))
        return jnp.sum(shares * gradient, axis=1)

    def sample(self, key: Key[Array, ""], number: int) -> Batched:
        """`number` draws of x0, [number, *d]."""
        key_box, key_place = jax.random.split(key)
        k = jax.random.randint(key_box, (number,), 0, self.centers.shape[0])
        shape, dtype = (number, *self.centers.shape[1:]), self.centers.dtype
        place = jax.random.uniform(key_place, shape, dtype, -self.half_width, self.half_width)
        return self.centers[k] + place

    def _each(
        self, x: Batched, t: PerExample, sde: SDE
    ) -> tuple[Float[Array, "b k"], Float[Array, "b k *d"]]:
        """log p_t(x | box k) and its gradient."""
        gap = _gap(x, t, sde, self.centers)
        left = gap < 0.0
        distance = jnp.where(left, -gap, gap)  # |gap|, with the slope at 0 that `left` says
        edge = expand(sde.alpha(t) * self.half_width, gap)
        sigma = expand(sde.sigma(t), gap)
        log_mass, slope = _log_mass_and_slope((distance - edge) / sigma, edge / sigma)
        log_box = jnp.sum(log_mass - jnp.log(2.0 * edge), axis=tuple(range(2, gap.ndim)))
        return log_box, jnp.where(left, -slope, slope) / sigma


Law = Mixture | Boxes


def _responsibilities(log_components: Float[Array, "b k"]) -> Float[Array, "b k"]:
    """Return the softmax over k of the log components.

    Far away the derivatives of the logarithms are huge; without those of the largest they are
    moderate.
    """
    largest = jnp.max(log_components, axis=1, keepdims=True)
    return jax.nn.softmax(log_components - largest, axis=1)


def _gap(
    x: Batched, t: PerExample, sde: SDE, centers: Float[Array, "k *d"]
) -> Float[Array, "b k *d"]:
    """x_b − α c_k."""
    return x[:, None] - expand(sde.alpha(t), x[:, None]) * centers[None]


Pair = tuple[Array, Array]


@jax.jit
def _log_mass_and_slope(a: Array, w: Array) -> Pair:
    """log Z = log ∫ φ from a to b = a + 2w, a + w ≥ 0, and its slope −(φ(a) − φ(b))/Z in a.

    Nothing cancels, nor in derivatives.
    """
    narrow = w * jnp.maximum(a + w, 1.0) < 1.0

    def where(taken: Array, branch: Callable[[Array, Array], Pair]) -> Pair:
        # Elsewhere the branch sees a harmless place: a NaN of its own would reach the gradient.
        return branch(jnp.where(taken, a, 0.0), jnp.where(taken, w, 1.0))

    pairs = zip(where(narrow, _narrow), where(~narrow, _wide), strict=True)
    log_mass, slope = (jnp.where(narrow, *pair) for pair in pairs)
    return log_mass, slope


def _wide(a: Array, w: Array) -> Pair:
    """Z = 1 − φ(a) R(−a) − φ(b) R(b) if a < 0, else φ(a) [R(a) − φ(b)/φ(a) R(b)]."""
    b, inside = a + 2.0 * w, a < 0.0
    near, far = _mills(jnp.stack([jnp.where(inside, -a, a), b]))
    change = jnp.expm1(-2.0 * w * (a + w))  # φ(b)/φ(a) − 1
    far = (1.0 + change) * far
    log_unit = jnp.where(inside, 0.0, _log_phi(a))  # outside, Z and φ(a) are in units of φ(a)
    phi = jnp.where(inside, jnp.exp(_log_phi(a)), 1.0)
    mass = jnp.where(inside, 1.0 - phi * (near + far), near - far)
    return jnp.log(mass) + log_unit, phi * change / mass


def _narrow(a: Array, w: Array) -> Pair:
    """Z = 2w φ(v) mean of e^{−sv − s²/2} over |s| ≤ w, v = a + w, by 8 nodes as |s v| < 1."""
    v = a + w
    nodes, weights = np.polynomial.legendre.leggauss(8)
    halves = (weights / 2.0).tolist()
    places = [s * w for s in nodes.tolist()]
    terms = [c * jnp.exp(-s * (v + 0.5 * s)) for s, c in zip(places, halves, strict=True)]
    mean, first = sum(terms), sum(s * term for s, term in zip(places, terms, strict=True))
    return jnp.log(2.0 * w) + _log_phi(v) + jnp.log(mean), -v - first / mean


def _log_phi(z: Array) -> Array:
    return -0.5 * (z**2 + math.log(2.0 * math.pi))


def _mills(z: Array) -> Array:
    """R(z) = (1 − Φ(z))/φ(z) = E[z/(z² + S²)], S ~ N(0, 1), z ≥ 0; by Gauss–Hermite from z = 4 on.

    There 32 nodes are exact to 1e-16. Below, 1/φ magnifies the rounding of z² by z²/2, at most 8.
    """
    small, large = jnp.where(z < 4.0, z, 0.0), jnp.where(z < 4.0, 4.0, z)
    nodes, weights = np.polynomial.hermite_e.hermegauss(32)
    rule = zip(nodes[16:].tolist(), (weights[16:] / weights[16:].sum()).tolist(), strict=True)
    mean = sum(c / (large + s**2 / large) for s, c in rule)
    return jnp.where(z < 4.0, ndtr(-small) * jnp.exp(-_log_phi(small)), mean)


# Σ_k w_k N(m_k, v_k) on the line: the toy of Lu et al. 2022, https://arxiv.org/abs/2206.08265
# (code: mog; its list "stds" holds variances).
MOG1D_WEIGHTS = (0.3, 0.3, 0.4)
MOG1D_MEANS = (-2 / 7, -6 / 7, 4 / 7)
MOG1D_VARIANCES = (0.1 / 49, 0.1 / 49, 1 / 49)


def mog1d() -> Mixture:
    """0.3 N(−2/7, 0.1/49) + 0.3 N(−6/7, 0.1/49) + 0.4 N(4/7, 1/49), shape (1,)."""
    means = jnp.asarray(MOG1D_MEANS)[:, None]
    return Mixture(jnp.asarray(MOG1D_WEIGHTS), means, jnp.asarray(MOG1D_VARIANCES))


def mixture() -> Mixture:
    """Eight equally likely N(m_k, 0.2² I), m_k at the angles kπ/4 of the circle of radius 2."""
    angle = 0.25 * math.pi * jnp.arange(8.0)
    means = 2.0 * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)
    return Mixture(jnp.full(8, 0.125), means, jnp.full(8, 0.2**2))


def checkerboard() -> Boxes:
    """The squares 2[i, i + 1] × 2[j, j + 1] of [−4, 4]² with i + j even."""
    squares = [(i, j) for i in range(-2, 2) for j in range(-2, 2) if (i + j) % 2 == 0]
    return Boxes(2.0 * jnp.asarray(squares, float) + 1.0, 1.0)


# The exact law of a data set, by its name in `datasets`.
LAWS: dict[str, Callable[[], Law]] = {f.__name__: f for f in (mog1d, mixture, checkerboard)}
