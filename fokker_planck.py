"""The score Fokker–Planck equation as a regulariser, for every SDE with drift f = a(t) x.

    ∂t s = ∇ₓ[½ g² (div s + ‖s‖²) − ⟨f, s⟩ − div f]

    gradient form     eps   = ∂t s − ∇ₓ[½ g² (vᵀHv + ‖s‖²) − a ⟨x, s⟩]
    advective form    eps_c = ∂t s + a s + H(a x − g² s) − ½ g² D²s[v, v]
    scalar            L[s]  = ½ g² (vᵀHv + ‖s‖²) − a ⟨x, s⟩ − a d
    regulariser       α E w(t) (‖eps‖/√d)^m + β E w(t) (|L|/d)^m,   t uniform

v is a probe with E[v vᵀ] = I, for which E[vᵀHv] = div s and E D²s[v, v] = Δs. The forms are equal
where s is a gradient. ∂t is exact: finite differences in t leave [0, T] and amplify dropout noise.
The score of other data has residual zero, too: the equation makes scores consistent, but it
does not fit them to the data.
L is ∂t log q_t for the true score: zero on average, not everywhere, so β > 0 is biased.
Reference: Lai et al. 2023, https://arxiv.org/abs/2210.04296, eq. (7).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from checks import one_of, require
from operators import Batched, PerExample, dimension, inner, scale, squared_norm
from parameterization import ScoreFn
from sde_lib import SDE
from taylor import along_curve


class Derivatives(NamedTuple):
    """The derivatives of a score at (x, t) that the residual needs, along one probe v."""

    score: Batched
    hv: Batched
    third: Batched | None  # ∇ₓ(vᵀHv) or D²s[v, v]
    residual: Batched | None  # eps or eps_c


def gradient_residual(
    score_fn: ScoreFn, sde: SDE, x: Batched, t: PerExample, v: Batched, *, third: bool = False
) -> Derivatives:
    """eps, about five forward passes: s, Hv and ∂t s share one linearisation.

    With `third`, ∇ₓ(vᵀHv) is returned, too; it takes a second reverse pass.
    """
    a, half_g2 = sde.drift_coefficient(t), 0.5 * sde.g2(t)

    def potentials(y: Batched) -> tuple[tuple[PerExample, PerExample], tuple[Batched, ...]]:
        score, tangent_map = jax.linearize(score_fn, y, t)
        hv = tangent_map(v, jnp.zeros_like(t))
        dt_score = tangent_map(jnp.zeros_like(y), jnp.ones_like(t))
        rest = half_g2 * squared_norm(score) - a * inner(y, score)
        return (inner(v, hv), rest), (score, hv, dt_score)

    _, pull, (score, hv, dt_score) = jax.vjp(potentials, x, has_aux=True)
    one, zero = jnp.ones_like(t), jnp.zeros_like(t)
    if not third:
        (gradient,) = pull((half_g2, one))
        return Derivatives(score, hv, None, dt_score - gradient)
    (cubic,), (rest,) = pull((one, zero)), pull((zero, one))
    return Derivatives(score, hv, cubic, dt_score - scale(half_g2, cubic) - rest)


def advective_residual(
    score_fn: ScoreFn, sde: SDE, x: Batched, t: PerExample, v: Batched, *, third: bool = False
) -> Derivatives:
    """eps_c = a s − ½ g² d²/dh² s(γ(h)) at h = 0, by one Taylor sweep.

    γ(h) = (x + h v + ½ h² ẍ, t + ½ h² ẗ) with ẍ = 2 s − 2 a x/g² and ẗ = −2/g². With `third`,
    D²s[v, v] is returned, too: the same sweep with ẍ = 0, ẗ = 0.
    """
    a, g2 = sde.drift_coefficient(t), sde.g2(t)
    straight = (jnp.zeros_like(x), jnp.zeros_like(t))

    def accelerations(score: Batched) -> list[tuple[Batched, PerExample]]:
        characteristic = (2.0 * score - scale(2.0 * a / g2, x), -2.0 / g2)
        return [characteristic, straight] if third else [characteristic]

    velocity = (v, jnp.zeros_like(t))
    score, hv, seconds = along_curve(score_fn, (x, t), velocity, accelerations)
    residual = scale(a, score) - scale(0.5 * g2, seconds[0])
    return Derivatives(score, hv, seconds[1] if third else None, residual)


FORMS = {"gradient": gradient_residual, "advective": advective_residual}


def scalar_term(
    score: Batched, hv: Batched, x: Batched, t: PerExample, v: Batched, sde: SDE
) -> PerExample:
    """L[s] with the div f = a d that the published code leaves out; E_{q_t} L[∇log q_t] = 0."""
    a = sde.drift_coefficient(t)
    spread = 0.5 * sde.g2(t) * (inner(v, hv) + squared_norm(score))
    return spread - a * inner(x, score) - dimension(x) * a


def curl_and_slope(
    score_fn: ScoreFn, x: Batched, t: PerExample, v: Batched
) -> tuple[PerExample, PerExample]:
    """‖Hv − Hᵀv‖² and ‖Hv‖², unbiased for ‖H − Hᵀ‖_F² and ‖H‖_F².

    The first is zero where s is a gradient; the ratio of their means is the asymmetry of s.
    """
    field = lambda y: score_fn(y, t)  # noqa: E731
    _, hv = jax.jvp(field, (x,), (v,))
    _, transpose = jax.vjp(field, x)
    return squared_norm(hv - transpose(v)[0]), squared_norm(hv)


# w(t) of a quantity that is measured in units of `unit`, raised to the power m.
Weight = Callable[[PerExample, SDE, PerExample, float], PerExample]
WEIGHTS: dict[str, Weight] = {
    "constant": lambda t, sde, unit, m: jnp.ones_like(t),
    "convention": lambda t, sde, unit, m: sde.g(t),
    "ll": lambda t, sde, unit, m: sde.g2(t),
    "dimensionless": lambda t, sde, unit, m: unit**-m,
}
SCALAR_FP = {"True": (False, True), "False": (True, False), "both": (True, True)}


@dataclasses.dataclass(frozen=True)
class FokkerPlanck:
    """The regulariser: its terms, their weights, and how and how often they are estimated.

    Attributes:
        alpha: of the vector term; 0 leaves it out.
        beta: of the scalar term; 0 leaves it out.
        scalar_fp: 'True' scalar term alone, 'False' vector term alone, 'both'.
        weight: w(t): constant 1, convention g, ll g², or dimensionless, which measures eps in units
            of g²/2σ³ and L in units of g²/2σ² (the only one that is bounded as t → 0).
        m: exponent of the norms, > 0.
        form: "gradient" or "advective".
        num_probes: 1, whose ‖eps‖² is biased by the variance of the probe, or 2, whose ⟨eps₁, eps₂⟩
            is unbiased (m = 2 only).
        fraction: of the batch, 1/n.
        every: steps from one evaluation to the next.
    """

    alpha: float = 0.0
    beta: float = 0.0
    scalar_fp: str = "both"
    weight: str = "ll"
    m: float = 2.0
    form: str = "gradient"
    num_probes: int = 1
    fraction: float = 1.0
    every: int = 1

    def __post_init__(self) -> None:
        one_of("training.scalar_fp", self.scalar_fp, SCALAR_FP)
        one_of("training.fp_wgt_type", self.weight, WEIGHTS)
        one_of("training.fp_form", self.form, FORMS)
        for name in ("alpha", "beta"):
            require(getattr(self, name) >= 0, f"training.{name}", getattr(self, name), "0 or more")
        off = {"True": ("beta", self.alpha), "False": ("alpha", self.beta)}.get(self.scalar_fp)
        empty = off and off[1] > 0 and getattr(self, off[0]) == 0
        allowed = f"training.{off[0]} > 0 with it, as no term is left, or 'both'" if off else ""
        require(not empty, "training.scalar_fp", self.scalar_fp, allowed)
        require(self.m > 0, "training.m", self.m, "a positive exponent")
        one_of("training.fp_probes", self.num_probes, (1, 2))
        fits = self.num_probes == 1 or self.m == 2
        allowed = (
            f"1, or training.m=2, not {self.m}: ⟨eps₁, eps₂⟩ may be negative and estimates the "
            "square only"
        )
        require(fits, "training.fp_probes", self.num_probes, allowed)
        require(self.every >= 1, "training.fp_every", self.every, "at least 1")

    @property
    def vector(self) -> bool:
        """Say whether the vector term takes part."""
        return SCALAR_FP[self.scalar_fp][0] and self.alpha > 0

    @property
    def scalar(self) -> bool:
        """Say whether the scalar term takes part."""
        return SCALAR_FP[self.scalar_fp][1] and self.beta > 0

    @property
    def names(self) -> list[str]:
        """Names of the parts."""
        return ["fp"] * self.vector + ["fp_scalar"] * self.scalar

    def parts(
        self,
        found: Sequence[tuple[Batched, Derivatives]],
        x: Batched,
        t: PerExample,
        sde: SDE,
    ) -> dict[str, PerExample]:
        """Unweighted (‖eps‖/√d)^m as `fp` and (|L|/d)^m as `fp_scalar`, from (probe, derivatives).

        Two probes: ⟨eps₁, eps₂⟩/d and L₁ L₂/d².
        """
        (v, first), (w, last) = found[0], found[-1]
        d, parts = dimension(x), {}
        if self.vector:
            parts["fp"] = _power(inner(first.residual, last.residual) / d, self.m / 2)
        if self.scalar:
            one = scalar_term(first.score, first.hv, x, t, v, sde) / d
            two = scalar_term(last.score, last.hv, x, t, w, sde) / d
            parts["fp_scalar"] = _power(one * two, self.m / 2)
        return parts

    def weighted(self, parts: dict[str, PerExample], t: PerExample, sde: SDE) -> PerExample:
        """w(t) (α fp + β fp_scalar)."""
        rate, total = 0.5 * sde.rate(t), jnp.zeros_like(t)
        weight = WEIGHTS[self.weight]
        if self.vector:
            unit = rate / sde.sigma(t)
            total = total + self.alpha * weight(t, sde, unit, self.m) * parts["fp"]
        if self.scalar:
            total = total + self.beta * weight(t, sde, rate, self.m) * parts["fp_scalar"]
        return total


def _power(square: PerExample, exponent: float) -> PerExample:
    """square^exponent, with derivative zero at zero also for exponents below one."""
    if exponent == 1.0:
        return square
    positive = square > 0.0
    return jnp.where(positive, jnp.where(positive, square, 1.0) ** exponent, 0.0)
