"""Evidence lower bound of the plug-in reverse SDE, and of its λ-family.

    ELBO(x) = E[log π(x_T) | x] − ∫₀ᵀ E[h(x_t, t)] dt,   h = ½ g²‖s‖² + g² div s − a d
    E ELBO_λ = E log q_0 − KL(q_T ‖ π) − (1 − λ/2)²/(1 − λ) × ½ ∫ g² E‖s − ∇log q_t‖² dt

In the drift parameterisation h = ½‖drift‖² + div(g drift − f). No term is singular at t = 0, so no
smallest time and no reconstruction is needed: where σ(0) = 0 the bound is that of x itself, for VE
it is the mean bound of x + σ(0) z. The variance of the estimate comes from the chi-square noise
of ‖x_t‖² at large g². The control variate c(t)(‖x_t‖² − α²‖x‖² − σ² d), c = ½ g²/(α² + σ²)²,
removes this noise. It is zero on average for any score, so the estimate stays unbiased.
Reference: Huang et al. 2021, https://arxiv.org/abs/2106.02808, theorem 4 and appendix C.
"""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Key

from checks import require
from likelihood import Divergence
from operators import (
    Batched,
    PerExample,
    dimension,
    fold_in_all,
    squared_norm,
    standard_normal,
)
from parameterization import ScoreFn
from sde_lib import SDE
from time_sampling import Debias, draws


def published_elbo(
    score_fn: ScoreFn,
    sde: SDE,
    x: Batched,
    keys: Key[Array, " b"],
    *,
    num_times: int,
    divergence: Divergence,
) -> PerExample:
    """Mean of `num_times` independent draws of the published estimator, in nats.

    One uniform t, one x_t, one probe and one independent x_T each; f goes through the probe, too.
    """
    probe = dataclasses.replace(divergence, num_probes=1)

    def draw(keys: Key[Array, "b 2"], u: PerExample) -> PerExample:
        keys = keys[:, 0]
        t, end = sde.T * u, jnp.full_like(u, sde.T)
        x_t = sde.perturb(x, t, standard_normal(fold_in_all(keys, 0), x))
        x_end = sde.perturb(x, end, standard_normal(fold_in_all(keys, 1), x))

        def flow(y: Batched) -> Batched:
            return sde.reverse_drift(score_fn(y, t), y, t)  # f − g² s

        drift, div = probe(flow, x_t, probe.draw(fold_in_all(keys, 2), x))
        square = squared_norm(sde.f(x_t, t) - drift) / sde.g2(t)  # g²‖s‖²
        return sde.prior_logp(x_end) - sde.T * (0.5 * square - div)

    found = draws(draw, keys, num_times, x.dtype, stratified=False, smallest=_smallest(x))
    return jnp.mean(found, axis=0)


def elbo(
    score_fn: ScoreFn,
    sde: SDE,
    x: Batched,
    keys: Key[Array, " b"],
    *,
    num_times: int,
    divergence: Divergence,
    t_eps: float = 1e-3,
) -> PerExample:
    """The same mean with less variance, in nats.

    Prior term and div f in closed form, `num_times` stratified times of the truncated law p(t) ∝
    g²/σ², weighted by 1/p(t), and the control variate.
    """
    proposal, d = Debias(sde, t_eps), dimension(x)

    def draw(keys: Key[Array, "b 2"], u: PerExample) -> PerExample:
        keys = keys[:, 0]
        t = proposal.quantile(u)
        x_t = sde.perturb(x, t, standard_normal(fold_in_all(keys, 0), x))
        probes = divergence.draw(fold_in_all(keys, 2), x)
        score, div = divergence(lambda y: score_fn(y, t), x_t, probes)
        g2, variance = sde.g2(t), sde.alpha(t) ** 2 + sde.sigma(t) ** 2
        integrand = g2 * (0.5 * squared_norm(score) + div) - d * sde.drift_coefficient(t)
        variate = 0.5 * g2 / variance**2 * sde.centred_norm(x, x_t, t)
        return -(integrand - variate) / proposal.density(t)

    found = draws(draw, keys, num_times, x.dtype, smallest=_smallest(x))
    return prior_term(sde, x) + jnp.mean(found, axis=0)


def prior_term(sde: SDE, x: Batched) -> PerExample:
    """E[log π(x_T) | x] = −½ d log(2π σ_π²) − ½ (α_T²‖x‖² + d σ_T²)/σ_π²."""
    end = jnp.full(x.shape[:1], sde.T, x.dtype)
    spread = sde.alpha(end) ** 2 * squared_norm(x) + dimension(x) * sde.sigma(end) ** 2
    log_scale = 0.5 * dimension(x) * math.log(2 * math.pi * sde.prior_std**2)
    return -log_scale - 0.5 * spread / sde.prior_std**2


def gap_factor(lmbd: float) -> float:
    """(1 − λ/2)²/(1 − λ) = 1 + λ²/(4(1 − λ)): the gap of member λ over that of λ = 0.

    Smallest at λ = 0; infinite at λ = 1, where the ODE has an exact likelihood instead.

    Raises:
        ValueError: λ > 1, which is no member of the family.
    """
    require(lmbd <= 1.0, "sampling.lmbd", lmbd, "λ <= 1")
    return math.inf if lmbd == 1.0 else (1.0 - 0.5 * lmbd) ** 2 / (1.0 - lmbd)


ESTIMATORS = {"published": published_elbo, "low_variance": elbo}


def _smallest(x: Batched) -> float:
    """u = 0 would give t = 0, where σ may be 0."""
    return float(jnp.finfo(x.dtype).epsneg)
