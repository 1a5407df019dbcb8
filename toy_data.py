"""Mixtures with exact density and score under any SDE: toy data and the oracle of the tests.

    x0 ~ Σ_k w_k N(m_k, v_k I)   ⇒   x_t ~ Σ_k w_k N(α m_k, (α² v_k + σ²) I)

One component is a Gaussian; v_k = 0 is a set of weighted points.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
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
        variance = self._variance(t, sde)
        gap = self._gap(x, t, sde)
        d = self.means[0].size
        squares = jnp.sum(gap**2, axis=tuple(range(2, gap.ndim)))
        log_normal = -0.5 * (squares / variance + d * jnp.log(2 * math.pi * variance))
        return jnp.log(self.weights)[None] + log_normal

    def log_prob(self, x: Batched, t: PerExample, sde: SDE) -> PerExample:
        """log p_t(x) in nats."""
        return jax.nn.logsumexp(self.log_components(x, t, sde), axis=1)

    def score(self, x: Batched, t: PerExample, sde: SDE) -> Batched:
        """∇ log p_t(x) = Σ_k r_k (α m_k − x)/(α² v_k + σ²), r the responsibilities."""
        share = jax.nn.softmax(self.log_components(x, t, sde), axis=1) / self._variance(t, sde)
        gap = self._gap(x, t, sde)
        shares = share.reshape(*share.shape, *(1,) * (gap.ndim - 2))
        return -jnp.sum(shares * gap, axis=1)

    def sample(self, key: Key[Array, ""], number: int) -> Batched:
        """`number` draws of x0, [number, *d]."""
        key_component, key_noise = jax.random.split(key)
        k = jax.random.choice(key_component, self.weights.shape[0], (number,), p=self.weights)
        z = jax.random.normal(key_noise, (number, *self.means.shape[1:]), self.means.dtype)
        return self.means[k] + expand(jnp.sqrt(self.variances[k]), z) * z

    def _variance(self, t: PerExample, sde: SDE) -> Float[Array, "b k"]:
        return (sde.alpha(t) ** 2)[:, None] * self.variances[None] + (sde.sigma(t) ** 2)[:, None]

    def _gap(self, x: Batched, t: PerExample, sde: SDE) -> Float[Array, "b k *d"]:
        centers = expand(sde.alpha(t), x[:, None]) * self.means[None]
        return x[:, None] - centers


def gaussian(mean: Float[Array, "*d"], variance: float) -> Mixture:
    """N(mean, variance I) as a mixture of one."""
    dtype = mean.dtype
    return Mixture(jnp.ones((1,), dtype), mean[None], jnp.full((1,), variance, dtype))


def weighted_points(weights: Float[Array, " k"], points: Float[Array, "k *d"]) -> Mixture:
    """A law on finitely many points, for which E[· | x_t] is a finite sum."""
    return Mixture(weights, points, jnp.zeros_like(weights))
