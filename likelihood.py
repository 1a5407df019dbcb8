"""Log-likelihoods of a score model, per example, in nats of the model space.

    ODE      dx/dt = f − ½ g² s,   log p(x) = log π(x_T) + ∫ (a d − ½ g² div s) dt
    bound    −log p(x) ≤ KL(q(x_T|x) ‖ π) + ½ ∫ g² E‖s − ∇log q(x_t|x)‖² dt − E log p(x | x_{t_min})

with decoder p(x | x_{t_min}) = N((x_{t_min} + σ² s)/α, σ²/α²). The ODE starts at the data at t_min.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from losses import first_order_residual
from ode import Solver
from operators import (
    PROBES,
    Batched,
    Field,
    PerExample,
    dimension,
    fold_in_all,
    gaussian,
    inner,
    squared_norm,
    value_and_divergence,
    value_and_probed_divergence,
)
from parameterization import ScoreFn
from sde_lib import SDE
from time_sampling import Importance, Uniform


@dataclasses.dataclass(frozen=True)
class Divergence:
    """How div s is computed: 'exact' (d tangents), or probes 'rademacher' | 'gaussian'."""

    kind: str = "rademacher"
    num_probes: int = 1

    def __post_init__(self) -> None:
        allowed = ["exact", *sorted(PROBES)]
        if self.kind not in allowed:
            raise ValueError(f"divergence={self.kind!r}: allowed {allowed}")
        if self.num_probes < 1:
            raise ValueError(f"num_probes={self.num_probes}: need at least 1")

    def draw(self, keys: Key[Array, " b"], x: Batched) -> Float[Array, "b p *d"]:
        """Probes of every example, fixed over a solve; no probes (p = 0) when exact."""
        if self.kind == "exact":
            return jnp.zeros((x.shape[0], 0, *x.shape[1:]), x.dtype)
        draws = [PROBES[self.kind](fold_in_all(keys, i), x) for i in range(self.num_probes)]
        return jnp.stack(draws, axis=1)

    def __call__(
        self, field: Field, x: Batched, probes: Float[Array, "b p *d"]
    ) -> tuple[Batched, PerExample]:
        """(s, div s or its unbiased estimate)."""
        if self.kind == "exact":
            return value_and_divergence(field, x)
        return value_and_probed_divergence(field, x, jnp.moveaxis(probes, 1, 0))


class OdeLikelihood(NamedTuple):
    """Result of `ode_log_likelihood`, one entry per example.

    Attributes:
        log_p: in nats.
        latent: x_T.
        nfe: evaluations of s and div s.
        converged: whether T was reached.
        error: estimate of |error| of log_p in nats, to first order; NaN where steps are adaptive.
    """

    log_p: PerExample
    latent: Batched
    nfe: Int[Array, " b"]
    converged: Bool[Array, " b"]
    error: PerExample


def ode_log_likelihood(
    score_fn: ScoreFn,
    sde: SDE,
    x: Batched,
    keys: Key[Array, " b"],
    *,
    t_min: float,
    solver: Solver,
    divergence: Divergence,
) -> OdeLikelihood:
    """log p(x) of the probability-flow ODE from t_min to T, in nats.

    div f = a d is exact, so only div s is probed. Reference: Song et al. 2021,
    https://arxiv.org/abs/2011.13456, eq. (39); Chen et al. 2018, https://arxiv.org/abs/1806.07366.
    """
    d = dimension(x)

    def field(t: PerExample, state: tuple, probes: Array) -> tuple[Batched, PerExample]:
        x_t, _ = state
        score, div_score = divergence(lambda y: score_fn(y, t), x_t, probes)
        div_drift = d * sde.drift_coefficient(t) - 0.5 * sde.g2(t) * div_score
        return sde.ode_drift(score, x_t, t), div_drift / d

    # The log-determinant per dimension: its error then counts in the unit of one coordinate.
    start = (x, jnp.zeros(x.shape[:1], x.dtype))
    probes = divergence.draw(keys, x)
    end = solver.integrate(field, t_min, sde.T, start, probes)
    latent, log_det = end.state
    log_p = sde.prior_logp(latent) + d * log_det
    error_x, error_log_det = end.error
    error = jnp.abs(d * error_log_det - inner(latent, error_x) / sde.prior_std**2)
    return OdeLikelihood(log_p, latent, end.nfe, end.converged, error)


class Bound(NamedTuple):
    """The three terms of −log p(x) ≤ prior + diffusion + reconstruction, in nats per example."""

    prior: PerExample
    diffusion: PerExample
    reconstruction: PerExample

    @property
    def nll(self) -> PerExample:
        """The bound on −log p(x)."""
        return self.prior + self.diffusion + self.reconstruction


def variational_bound(
    score_fn: ScoreFn,
    sde: SDE,
    x: Batched,
    keys: Key[Array, " b"],
    *,
    proposal: Uniform | Importance,
    num_times: int,
) -> Bound:
    """Unbiased estimate of the variational bound with `num_times` stratified times per example.

    ½ g²‖s − ∇log q(x_t|x)‖² = ½ (g²/σ²) ‖σ s + z‖², weighted by 1/p(t).
    Reference: Song et al. 2021, https://arxiv.org/abs/2101.09258, theorem 3; Kingma et al. 2021,
    https://arxiv.org/abs/2107.00630, eq. (11) for the three terms.
    """
    t_min = jnp.full(x.shape[:1], proposal.t_min, x.dtype)
    keys_times, keys_end = fold_in_all(keys, 0), fold_in_all(keys, 1)

    def term(number: Int[Array, ""]) -> PerExample:
        keys_now = jax.vmap(lambda k: jax.random.split(jax.random.fold_in(k, number)))(keys_times)
        u = jax.vmap(lambda k: jax.random.uniform(k, (), x.dtype))(keys_now[:, 0])
        t = proposal.quantile((number.astype(x.dtype) + u) / num_times)
        z = gaussian(keys_now[:, 1], x)
        weight = sde.g2(t) / sde.sigma(t) ** 2 / proposal.density(t)
        return 0.5 * weight * _residual_square(score_fn, sde, x, t, z)

    diffusion = jnp.mean(jax.lax.map(term, jnp.arange(num_times)), axis=0)
    reconstruction = reconstruction_nll(score_fn, sde, x, t_min, gaussian(keys_end, x))
    return Bound(sde.prior_kl(x), diffusion, reconstruction)


def reconstruction_nll(
    score_fn: ScoreFn, sde: SDE, x: Batched, t: PerExample, z: Batched
) -> PerExample:
    """−log N(x; (x_t + σ² s)/α, σ²/α²) at x_t = α x + σ z; x − mean = −(σ/α)(σ s + z)."""
    log_std = jnp.log(sde.sigma(t)) - jnp.log(sde.alpha(t))
    square = _residual_square(score_fn, sde, x, t, z)
    return dimension(x) * (0.5 * math.log(2 * math.pi) + log_std) + 0.5 * square


def _residual_square(
    score_fn: ScoreFn, sde: SDE, x: Batched, t: PerExample, z: Batched
) -> PerExample:
    """‖e1‖² − κ(t)(‖z‖² − d), e1 = σ s + z: unbiased for E‖e1‖², whatever the score.

    κ = (α²/(α² + σ²))² is the coefficient of z in e1, squared, for data of unit variance; the
    control variate removes the noise of ‖z‖² where the score cannot know z.
    """
    residual = first_order_residual(score_fn, x, t, z, sde)
    signal, noise = sde.alpha(t) ** 2, sde.sigma(t) ** 2
    kappa = (signal / (signal + noise)) ** 2
    return squared_norm(residual) - kappa * (squared_norm(z) - dimension(x))
