"""Measure where a score is wrong: its errors at given times, one value per example.

    dsm, frobenius, trace, third      terms of orders 1–3 (see `terms`)
    r_fp        ‖eps‖/√d              residual of the score Fokker–Planck equation
    curl, slope ‖Hv − Hᵀv‖², ‖Hv‖²    asymmetry = E curl/E slope

and, with s* = ∇log q_t of a known law and s_ode = ∇log p_t of the probability-flow ODE's density,

    fisher        g²‖s − s*‖²         ELBO gap = ½ ∫ E fisher dt
    fisher_ode    g²‖s_ode − s*‖²
    self          g²‖s_ode − s‖²      zero where the model is the score of its own ODE
    kl_rate       g²⟨s − s*, s_ode − s*⟩
    jacobian      ‖H − ∂s*/∂x‖_F²

    KL(q_{t_min} ‖ p) = KL(q_T ‖ π) + ½ ∫ E kl_rate dt        p the density of the ODE at t_min

Reference: Lu et al. 2022, https://arxiv.org/abs/2206.08265, theorem 3.1; Lai et al. 2023,
https://arxiv.org/abs/2210.04296, section 4.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from fokker_planck import curl_and_slope, gradient_residual
from high_order import HighOrder
from ode import Solver
from operators import (
    PROBES,
    Batched,
    PerExample,
    dimension,
    fold_in_all,
    inner,
    squared_norm,
    value_and_divergence,
    value_and_jacobian,
)
from parameterization import ScoreFn
from sde_lib import SDE
from terms import Point, Terms
from toy_data import Law

SMALL = 8  # dimensions up to which traces and residuals are exact
Curves = dict[str, PerExample]


def error_curves(score_fn: ScoreFn, sde: SDE, point: Point) -> Curves:
    """Compute the curves that need no known law of the data.

    Above 8 dimensions they take one probe, and r_fp is then biased upwards.
    """
    x, t, keys = point.x, point.t, point.keys
    small = dimension(x) <= SMALL
    terms = Terms(estimator="exact" if small else "probe", high_order=HighOrder(3))
    curves = terms.parts(score_fn, sde, point)
    v = PROBES["rademacher"](fold_in_all(keys, 0), x)
    eps = exact_residual(score_fn, sde, x, t) if small else _probed_residual(score_fn, sde, x, t, v)
    curl, slope = curl_and_slope(score_fn, x, t, v)
    return curves | {
        "r_fp": jnp.sqrt(squared_norm(eps) / dimension(x)),
        "curl": curl,
        "slope": slope,
    }


def exact_residual(score_fn: ScoreFn, sde: SDE, x: Batched, t: PerExample) -> Batched:
    """eps by its d probes √d e_i, over which vᵀHv averages to div s."""
    d = dimension(x)
    basis = jnp.sqrt(jnp.asarray(d, x.dtype)) * jnp.eye(d, dtype=x.dtype)

    def along(e: Float[Array, " n"]) -> Batched:
        v = jnp.broadcast_to(e.reshape(x.shape[1:]), x.shape)
        return _probed_residual(score_fn, sde, x, t, v)

    return jnp.mean(jax.lax.map(along, basis), axis=0)


def _probed_residual(score_fn: ScoreFn, sde: SDE, x: Batched, t: PerExample, v: Batched) -> Batched:
    return gradient_residual(score_fn, sde, x, t, v).residual


class OdeScore(NamedTuple):
    """log p_t(x) of the probability-flow ODE and its gradient, one entry per example."""

    log_p: PerExample
    score: Batched
    converged: Bool[Array, " b"]


def ode_score(
    score_fn: ScoreFn, sde: SDE, x: Batched, t: Float[Array, ""] | float, solver: Solver
) -> OdeScore:
    """s_ode = ∇log p_t(x) by differentiating the ODE likelihood: its tangents go along.

    With x_T = φ(x): log p = log π(x_T) + ∫ div and ∇log p = (∂φ/∂x)ᵀ∇log π(x_T) + ∫ ∇div; d
    tangents, for small d only.
    """
    d, batch_size = dimension(x), x.shape[0]

    def field(t: PerExample, state: tuple, args: None) -> tuple:
        del args
        x_t, _, columns, _ = state

        def flow(y: Batched) -> tuple[Batched, PerExample]:
            score, div = value_and_divergence(lambda u: score_fn(u, t), y)
            return sde.ode_drift(score, y, t), d * sde.drift_coefficient(t) - 0.5 * sde.g2(t) * div

        (drift, div), tangent_map = jax.linearize(flow, x_t)
        along = jax.vmap(tangent_map, in_axes=1, out_axes=1)(columns)
        return drift, div, *along

    zero = jnp.zeros((batch_size,), x.dtype)
    identity = jnp.eye(d, dtype=x.dtype).reshape(1, d, *x.shape[1:])
    columns = jnp.broadcast_to(identity, (batch_size, *identity.shape[1:]))
    start = (x, zero, columns, jnp.zeros((batch_size, d), x.dtype))
    found = solver.integrate(field, t, sde.T, start, None, sde.ode_variable)
    end, log_det, columns, slopes = found.state
    axes = tuple(range(2, columns.ndim))
    pulled = jnp.sum(columns * end[:, None], axis=axes) / sde.prior_std**2
    score = (slopes - pulled).reshape(x.shape)
    return OdeScore(sde.prior_logp(end) + log_det, score, found.converged)


def truth_curves(score_fn: ScoreFn, sde: SDE, point: Point, law: Law, own: OdeScore) -> Curves:
    """Compare the score with that of the known law of the data.

    `own` is `ode_score` at the same points.
    """
    x, t = point.x, point.t
    score, jacobian = value_and_jacobian(lambda y: score_fn(y, t), x)
    true, true_jacobian = value_and_jacobian(lambda y: law.score(y, t, sde), x)
    g2, gap, own_gap = sde.g2(t), score - true, own.score - true
    return {
        "fisher": g2 * squared_norm(gap),
        "fisher_ode": g2 * squared_norm(own_gap),
        "self": g2 * squared_norm(own.score - score),
        "kl_rate": g2 * inner(gap, own_gap),
        "jacobian": squared_norm(jacobian - true_jacobian),
    }


def time_grid(t_min: float, end: float, number: int) -> tuple[Array, Array]:
    """Midpoints of equal cells of r in t = t_min + (T − t_min) r², and the weights of ∫ dt."""
    r = (jnp.arange(number, dtype=float) + 0.5) / number
    return t_min + (end - t_min) * r**2, (end - t_min) * 2.0 * r / number
