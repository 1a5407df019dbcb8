"""Residual of the score Fokker–Planck equation, for every SDE with drift f = a(t) x.

    ∂t s = ∇ₓ[½ g² (div s + ‖s‖²) − ⟨f, s⟩ − div f]

    gradient form     eps   = ∂t s − ∇ₓ[½ g² (vᵀHv + ‖s‖²) − a ⟨x, s⟩]
    advective form    eps_c = ∂t s + a s + H(a x − g² s) − ½ g² D²s[v, v]
    scalar            L[s]  = ½ g² (vᵀHv + ‖s‖²) − a ⟨x, s⟩ − a d

v is a probe with E[v vᵀ] = I, for which E[vᵀHv] = div s and E D²s[v, v] = Δs. The forms are equal
where s is a gradient. ∂t is exact: finite differences in t leave [0, T] and amplify dropout noise.
A score of other data has residual zero: the equation makes scores consistent, it does not fit data.
Reference: Lai et al. 2023, https://arxiv.org/abs/2210.04296, eq. (7).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from operators import Batched, PerExample, dimension, inner, scale, squared_norm
from parameterization import ScoreFn
from sde_lib import SDE
from taylor import along_curve


def _potential(
    score: Batched, hv: Batched, x: Batched, t: PerExample, v: Batched, sde: SDE
) -> PerExample:
    """½ g² (vᵀHv + ‖s‖²) − a ⟨x, s⟩."""
    spread = 0.5 * sde.g2(t) * (inner(v, hv) + squared_norm(score))
    return spread - sde.drift_coefficient(t) * inner(x, score)


def gradient_residual(
    score_fn: ScoreFn, sde: SDE, x: Batched, t: PerExample, v: Batched
) -> tuple[Batched, Batched]:
    """(s, eps), about five forward passes: s, Hv and ∂t s share one linearisation."""

    def total_potential(y: Batched) -> tuple[Float[Array, ""], tuple[Batched, Batched]]:
        score, tangent_map = jax.linearize(score_fn, y, t)
        hv = tangent_map(v, jnp.zeros_like(t))
        dt_score = tangent_map(jnp.zeros_like(y), jnp.ones_like(t))
        return jnp.sum(_potential(score, hv, y, t, v, sde)), (score, dt_score)

    gradient, (score, dt_score) = jax.grad(total_potential, has_aux=True)(x)
    return score, dt_score - gradient


def advective_residual(
    score_fn: ScoreFn, sde: SDE, x: Batched, t: PerExample, v: Batched
) -> tuple[Batched, Batched]:
    """(s, eps_c) by one Taylor sweep: eps_c = a s − ½ g² d²/dh² s(γ(h)) at h = 0.

    γ(h) = (x + h v + ½ h² ẍ, t + ½ h² ẗ) with ẍ = 2 s − 2 a x/g² and ẗ = −2/g².
    """
    a, g2 = sde.drift_coefficient(t), sde.g2(t)
    score = score_fn(x, t)  # the value that the sweep computes, too: compiled once
    curve_x = 2.0 * score - scale(2.0 * a / g2, x)
    curve = (x, t), (v, jnp.zeros_like(t)), (curve_x, -2.0 / g2)
    _, _, second = along_curve(score_fn, *curve)
    return score, scale(a, score) - scale(0.5 * g2, second)


FORMS = {"gradient": gradient_residual, "advective": advective_residual}


def scalar_term(score_fn: ScoreFn, sde: SDE, x: Batched, t: PerExample, v: Batched) -> PerExample:
    """L[s] with the div f = a d that the published code leaves out; E_{q_t} L[∇log q_t] = 0."""
    score, hv = jax.jvp(lambda y: score_fn(y, t), (x,), (v,))
    return _potential(score, hv, x, t, v, sde) - dimension(x) * sde.drift_coefficient(t)


def asymmetry(score_fn: ScoreFn, x: Batched, t: PerExample, v: Batched) -> PerExample:
    """‖Hv − Hᵀv‖², unbiased for ‖H − Hᵀ‖_F²; zero where s is a gradient."""
    field = lambda y: score_fn(y, t)  # noqa: E731
    _, hv = jax.jvp(field, (x,), (v,))
    _, transpose = jax.vjp(field, x)
    return squared_norm(hv - transpose(v)[0])
