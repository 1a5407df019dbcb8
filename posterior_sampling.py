"""Samples of p(x | y), y = A x + γ n, from a score of p(x): three approximations.

    x̂ = (x_t + σ² s)/α = E[x0 | x_t],   J = ∂x̂/∂x_t,   V = (σ²/α) J = Cov[x0 | x_t]
    p̃(y | x_t) = N(y; A x̂, S),   S = γ² I + A V Aᵀ
    ∇ log p̃ = Jᵀ Aᵀ S⁻¹ (y − A x̂)                     with V held fixed

    replacement      the known part is replaced by its noised copy at every level
    dps              x ← x' − ζ ∇‖y − A x̂‖ after every predictor step
    moment matching  any sampler with the score s + ∇ log p̃

They are biased for every number of steps; `twisted` has the remedy. A sum of a score and a guidance
is in general the score of no density: the density of its probability-flow ODE is not the model's.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from checks import one_of, require
from measurements import Measured, Measurement
from operators import (
    Batched,
    PerExample,
    fold_in_all,
    scale,
    squared_norm,
    standard_normal,
)
from parameterization import ScoreFn
from sampling import Grid, PredictorCorrector, Sampler, Samples
from sde_lib import SDE

Apply = Callable[[Array], Array]  # a linear map of measurements


# Guidance: score functions that any sampler takes.


def classifier_guided(
    score_fn: ScoreFn, log_prob: Callable[[Batched, PerExample], PerExample], weight: float
) -> ScoreFn:
    """s + w ∇ log p(c | x_t).

    For w = 1 and the true p(c | x_t) it is the score of p(x_t | c). Otherwise it is the score of no
    diffused density, and the density of its ODE is not the model's.
    Reference: Dhariwal & Nichol 2021, https://arxiv.org/abs/2105.05233.

    Args:
        score_fn: s(x, t).
        log_prob: (x, t) ↦ log p(c | x_t) of every example, [B].
        weight: w.
    """

    def guided(x: Batched, t: PerExample) -> Batched:
        gradient = jax.grad(lambda y: log_prob(y, t).sum())(x)
        return score_fn(x, t) + weight * gradient

    return guided


def classifier_free(conditional: ScoreFn, unconditional: ScoreFn, weight: float) -> ScoreFn:
    """s + w (s_c − s), the unconditional score s and the conditional one s_c.

    w = 0 is the score of p(x), w = 1 that of p(x | c). For other w it is the score of no diffused
    density (https://arxiv.org/abs/2408.09000), and the density of its ODE is not the model's.
    Reference: Ho & Salimans 2022, https://arxiv.org/abs/2207.12598.
    """

    def guided(x: Batched, t: PerExample) -> Batched:
        s = unconditional(x, t)
        return s + weight * (conditional(x, t) - s)

    return guided


# The law of y given x_t by its first two moments.


class Twist(NamedTuple):
    """At (x, t): the score s, the guidance ∇ log p̃(y | x_t), and log p̃(y | x_t) in nats, [B]."""

    score: Batched
    guidance: Batched
    log_likelihood: PerExample

    def denoised(self, sde: SDE, x: Batched, t: PerExample) -> Batched:
        """E[x0 | x_t, y] ≈ (x + σ² (s + guidance))/α."""
        s = self.score + self.guidance
        return scale(1.0 / sde.alpha(t), x + scale(sde.sigma(t) ** 2, s))


def exact_covariance(
    apply: Apply, residual: Float[Array, "b m"], noise: float
) -> tuple[Float[Array, "b m"], PerExample]:
    """(S⁻¹ r, log N(r; 0, S)), S = γ² I + M with all columns of M = A V Aᵀ; for small m only.

    M is made symmetric, and its negative eigenvalues, which no covariance has but that of a network
    may, are set to zero.
    """
    number = residual.shape[1]

    def column(e: Float[Array, " m"]) -> Float[Array, "b m"]:
        return apply(jnp.broadcast_to(e[None], residual.shape))

    columns = jnp.moveaxis(jax.lax.map(column, jnp.eye(number, dtype=residual.dtype)), 0, 2)
    values, vectors = jnp.linalg.eigh(0.5 * (columns + jnp.swapaxes(columns, 1, 2)))
    variance = noise**2 + jnp.maximum(values, 0.0)
    along = jnp.einsum("bij,bi->bj", vectors, residual)
    return jnp.einsum("bij,bj->bi", vectors, along / variance), _log_normal(along, variance)


def row_sums(
    apply: Apply, residual: Float[Array, "b m"], noise: float
) -> tuple[Float[Array, "b m"], PerExample]:
    """(S⁻¹ r, log N(r; 0, S)), S = γ² I + diag(A V Aᵀ 1): one tangent for any m.

    Exact where A V Aᵀ is diagonal. Where no entry of it is negative, the diagonal matrix of the row
    sums is at least as large as it, so that the guidance is too weak and never too strong. Negative
    sums are set to zero.
    Reference: Boys et al. 2023, https://arxiv.org/abs/2310.06721, section 3.
    """
    variance = noise**2 + jnp.maximum(apply(jnp.ones_like(residual)), 0.0)
    return residual / variance, _log_normal(residual, variance)


COVARIANCES = {"exact": exact_covariance, "row_sums": row_sums}


def _log_normal(x: Float[Array, "b m"], variance: Float[Array, "b m"]) -> PerExample:
    """log N(x; 0, diag(variance)) of every example."""
    return -0.5 * jnp.sum(x**2 / variance + jnp.log(2.0 * math.pi * variance), axis=1)


@dataclasses.dataclass(frozen=True, eq=False)
class MomentMatching:
    """p̃(y | x_t) = N(y; A x̂, γ² I + A V Aᵀ) and its gradient in x_t, V held fixed.

    Both are exact for Gaussian data. V = (σ²/α²)(I + σ² H) by products with the Jacobian H of the
    score, from one linearisation.
    Reference: Boys et al. 2023, https://arxiv.org/abs/2310.06721; Rozet et al. 2024,
    https://arxiv.org/abs/2405.13712.

    Attributes:
        measurement: A and γ > 0.
        y: [B, *m], one for every example.
        covariance: `exact` (m tangents) or `row_sums` (one).
    """

    measurement: Measurement
    y: Measured
    covariance: str = "exact"

    def __post_init__(self) -> None:
        one_of("covariance", self.covariance, COVARIANCES)
        allowed = "more than 0: where y leaves no freedom, its density is infinite"
        require(self.measurement.noise > 0.0, "sampling.noise", self.measurement.noise, allowed)

    def __call__(self, score_fn: ScoreFn, sde: SDE, x: Batched, t: PerExample) -> Twist:
        """Score, guidance and log p̃ at (x, t)."""
        alpha, variance, a = sde.alpha(t), sde.sigma(t) ** 2, self.measurement
        score, jacobian = jax.linearize(lambda v: score_fn(v, t), x)
        transposed = jax.linear_transpose(jacobian, x)
        mean = scale(1.0 / alpha, x + scale(variance, score))
        residual = self.y - a.forward(mean)

        def apply(u: Float[Array, "b m"]) -> Float[Array, "b m"]:
            v = a.transpose(u.reshape(residual.shape))
            v = scale(variance / alpha**2, v + scale(variance, jacobian(v)))
            return a.forward(v).reshape(u.shape)

        flat = residual.reshape(len(x), -1)
        solved, log_likelihood = COVARIANCES[self.covariance](apply, flat, a.noise)
        back = a.transpose(solved.reshape(residual.shape))
        guidance = scale(1.0 / alpha, back + scale(variance, transposed(back)[0]))
        return Twist(score, guidance, log_likelihood)

    def guided(self, score_fn: ScoreFn, sde: SDE) -> ScoreFn:
        """s + ∇ log p̃(y | x_t); the density of its ODE is not the model's."""

        def posterior_score(x: Batched, t: PerExample) -> Batched:
            found = self(score_fn, sde, x, t)
            return found.score + found.guidance

        return posterior_score


@dataclasses.dataclass(frozen=True, eq=False)
class Guided:
    """A sampler that is given the score s + ∇ log p̃(y | x_t).

    Its samples have the law p(x | y) for Gaussian data, and about that otherwise: ∇ log p̃ is not
    the gradient of log p(y | x_t) where x0 given x_t is far from Gaussian.

    Attributes:
        sampler: any sampler of p(x).
        matching: gives the guidance.
    """

    sampler: Sampler
    matching: MomentMatching

    def __call__(
        self, score_fn: ScoreFn, sde: SDE, keys: Key[Array, " b"], like: Batched
    ) -> Samples:
        """One sample per key and measurement, of the shape of `like`."""
        return self.sampler(self.matching.guided(score_fn, sde), sde, keys, like)


# Predictor–corrector samplers that know y.


@dataclasses.dataclass(frozen=True, eq=False)
class Replacement(PredictorCorrector):
    """After every predictor and corrector the measured part is that of α y + σ A z, z ~ N(0, I).

    x ← x + A⁺ (α y + σ A z − A x) at the level that x is at; the published code noises to the level
    before the predictor's step. At the end the measured part is y: the noise of y is not known to
    this method. The part that is not measured only sees y through the score, so that the samples
    are biased for every number of steps.
    Reference: Song et al. 2021, https://arxiv.org/abs/2011.13456, appendix I.

    Attributes:
        measurement: A.
        y: [B, *m], one for every sample.
    """

    measurement: Measurement = dataclasses.field(kw_only=True)
    y: Measured = dataclasses.field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        some = self.measurement.number < math.prod(self.measurement.shape)
        allowed = "another method where everything is measured: nothing would be left to sample"
        require(some, "sampling.task_method", "replacement", allowed)

    def __call__(
        self, score_fn: ScoreFn, sde: SDE, keys: Key[Array, " b"], like: Batched
    ) -> Samples:
        """One sample per key and measurement, of the shape of `like`."""
        found = super().__call__(score_fn, sde, keys, like)
        return found._replace(x=self._replaced(found.x, self.y))

    def correct(
        self, score_fn: ScoreFn, sde: SDE, keys: Key[Array, " b"], x: Batched, t: PerExample
    ) -> Batched:
        """Corrector steps, then the replacement."""
        x = super().correct(score_fn, sde, keys, x, t)
        return self._noised(sde, fold_in_all(keys, self.n_steps_each), x, t)

    def predict(
        self,
        score_fn: ScoreFn,
        sde: SDE,
        keys: Key[Array, " b"],
        x: Batched,
        t: PerExample,
        grid: Grid,
    ) -> Batched:
        """A predictor step, then the replacement."""
        x = super().predict(score_fn, sde, keys, x, t, grid)
        return self._noised(sde, fold_in_all(keys, 1), x, t - grid.dt)

    def _noised(self, sde: SDE, keys: Key[Array, " b"], x: Batched, t: PerExample) -> Batched:
        z = self.measurement.forward(standard_normal(keys, x))
        return self._replaced(x, scale(sde.alpha(t), self.y) + scale(sde.sigma(t), z))

    def _replaced(self, x: Batched, known: Measured) -> Batched:
        return x + self.measurement.pseudo_inverse(known - self.measurement.forward(x))


@dataclasses.dataclass(frozen=True, eq=False)
class DiffusionPosteriorSampling(PredictorCorrector):
    """After every predictor step from t: x ← x' + ζ Jᵀ Aᵀ r/‖r‖, r = y − A x̂(x_t): V = 0.

    The size ζ of the step is that of the paper. It depends neither on γ nor on g² dt: with other
    numbers of levels y has another weight, and no law is approached as they grow. With the Bayesian
    weight g² dt/γ² in its place the steps would be unstable for small γ.
    Reference: Chung et al. 2022, https://arxiv.org/abs/2209.14687, algorithm 1.

    Attributes:
        measurement: A.
        y: [B, *m], one for every sample.
        step: ζ.
    """

    measurement: Measurement = dataclasses.field(kw_only=True)
    y: Measured = dataclasses.field(kw_only=True)
    step: float = dataclasses.field(kw_only=True, default=1.0)

    def predict(
        self,
        score_fn: ScoreFn,
        sde: SDE,
        keys: Key[Array, " b"],
        x: Batched,
        t: PerExample,
        grid: Grid,
    ) -> Batched:
        """A predictor step and a step towards the measurement."""
        gradient = jax.grad(lambda v: self._misfit(score_fn, sde, v, t).sum())(x)
        after = super().predict(score_fn, sde, keys, x, t, grid)
        return after - self.step * gradient

    def _misfit(self, score_fn: ScoreFn, sde: SDE, x: Batched, t: PerExample) -> PerExample:
        """Return ‖y − A x̂‖ of every example."""
        mean = scale(1.0 / sde.alpha(t), x + scale(sde.sigma(t) ** 2, score_fn(x, t)))
        return jnp.sqrt(squared_norm(self.y - self.measurement.forward(mean)))
