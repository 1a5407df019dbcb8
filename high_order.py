"""Score matching of orders 1, 2 and 3: residuals of the score and of its two derivatives.

With e1 = σ s + z, ℓ = stop_gradient(e1), H = ∂s/∂x and a probe v with E[v vᵀ] = I:

    A v = σ² H v + v − (ℓ·v) ℓ              parts ‖A v‖²/d² (frobenius), (v·A v)²/d² (trace)
    C = σ³ ∇ₓ(vᵀHv) + (ℓ·v)² ℓ − (σ² vᵀĤv + ‖v‖²) ℓ − 2(ℓ·v)(σ² Ĥv + v)      part ‖C‖²/d³

and exactly, for small d:

    A = σ² H + I − ℓℓᵀ                      parts ‖A‖_F²/d², (tr A)²/d²
    C = σ³ ∇tr H + (‖ℓ‖² − tr(σ²Ĥ + I)) ℓ − 2(σ²Ĥ + I) ℓ                      part ‖C‖²/d³

Hats are detached, like ℓ: the error bounds of orders 2 and 3 hold for given lower-order estimates.
Reference: Lu et al. 2022, https://arxiv.org/abs/2206.08265, theorems 3.2 and 3.3.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from checks import one_of, require
from operators import (
    Batched,
    PerExample,
    dimension,
    expand,
    inner,
    scale,
    squared_norm,
    value_hvp_and_directional,
    value_hvp_and_gradient,
)

Parts = dict[str, PerExample]


def first_order_residual(score: Batched, sigma: PerExample, z: Batched) -> Batched:
    """e1 = σ s + z at x_t = α x0 + σ z.

    Reference: Vincent 2011; Song et al. 2021, https://arxiv.org/abs/2011.13456, eq. (7).
    """
    return scale(sigma, score) + z


def second_order_residual(e1: Batched, hv: Batched, v: Batched, sigma: PerExample) -> Batched:
    """A v = σ² H v + v − (ℓ·v) ℓ, ℓ = e1 detached (Lu et al. 2022, theorem 3.2)."""
    ell = jax.lax.stop_gradient(e1)
    return scale(sigma**2, hv) + v - scale(inner(ell, v), ell)


def third_order_residual(
    e1: Batched, hv: Batched, third: Batched, v: Batched, sigma: PerExample
) -> Batched:
    """C = σ³ third + (ℓ·v)² ℓ − (σ² vᵀĤv + ‖v‖²) ℓ − 2(ℓ·v)(σ²Ĥv + v), third = ∇ₓ(vᵀHv).

    Only `third` carries a gradient (Lu et al. 2022, theorem 3.3).
    """
    ell, hv = jax.lax.stop_gradient((e1, hv))
    along = inner(ell, v)
    shifted = scale(sigma**2, hv) + v  # (σ²Ĥ + I) v
    radial = along**2 - inner(v, shifted)
    return scale(sigma**3, third) + scale(radial, ell) - 2.0 * scale(along, shifted)


def second_order_matrix(
    e1: Batched, jacobian: Float[Array, "b n n"], sigma: PerExample
) -> Float[Array, "b n n"]:
    """A = σ² H + I − ℓℓᵀ."""
    ell = jax.lax.stop_gradient(e1).reshape(jacobian.shape[:2])
    identity = jnp.eye(jacobian.shape[-1], dtype=jacobian.dtype)[None]
    return expand(sigma**2, jacobian) * jacobian + identity - ell[:, :, None] * ell[:, None, :]


def third_order_vector(
    e1: Batched,
    jacobian: Float[Array, "b n n"],
    trace_gradient: Batched,
    sigma: PerExample,
) -> Batched:
    """C = σ³ ∇tr H + (‖ℓ‖² − tr(σ²Ĥ + I)) ℓ − 2(σ²Ĥ + I) ℓ."""
    ell, jacobian = jax.lax.stop_gradient((e1, jacobian))
    flat = ell.reshape(jacobian.shape[:2])
    h_ell = jnp.einsum("bij,bj->bi", jacobian, flat).reshape(ell.shape)
    trace = sigma**2 * jnp.trace(jacobian, axis1=1, axis2=2) + dimension(ell)
    shifted = scale(sigma**2, h_ell) + ell
    return scale(sigma**3, trace_gradient) + scale(squared_norm(ell) - trace, ell) - 2.0 * shifted


THIRD_ORDER_FORMS: dict[str, Callable] = {
    "gradient": value_hvp_and_gradient,
    "directional": value_hvp_and_directional,
}


@dataclasses.dataclass(frozen=True)
class HighOrder:
    """The parts of orders 2 and 3 that are added to the loss, and their weights.

    Attributes:
        order: 2 or 3; order 3 contains order 2.
        second_order_weight: of frobenius_weight × frobenius + trace_weight × trace.
        frobenius_weight: of the Frobenius part within order 2; 0 leaves the quadratic form alone,
            the second order of Zheng et al. 2023, https://arxiv.org/abs/2305.03935, eq. (25): with
            the velocity F, tr A = −α (σ tr ∂F/∂x − α(d − ‖F − F*‖²)). They use a probe only for
            tr ∂F/∂x. Here a probe gives v·Av, which has (v·(F − F*))² in place of ‖F − F*‖².
        trace_weight: of the trace part within order 2.
        third_order_weight: of the third part.
        third_order_form: of the third part by probes, "gradient" ∇ₓ(vᵀHv), or "directional"
            D²s[v, v], equal where H is symmetric and cheaper.
        fraction: of the batch, 1/n.
    """

    order: int
    second_order_weight: float = 1.0
    frobenius_weight: float = 1.0
    trace_weight: float = 1.0
    third_order_weight: float = 1.0
    third_order_form: str = "gradient"
    fraction: float = 1.0

    def __post_init__(self) -> None:
        allowed = "1, 2 or 3"
        require(self.order in (2, 3), "training.score_matching_order", self.order, allowed)
        one_of("training.third_order_form", self.third_order_form, THIRD_ORDER_FORMS)
        names = ("second_order_weight", "frobenius_weight", "trace_weight", "third_order_weight")
        for name in names:
            require(getattr(self, name) >= 0, f"training.{name}", getattr(self, name), "0 or more")

    @property
    def names(self) -> list[str]:
        """Names of the parts."""
        return ["frobenius", "trace"] + ["third"] * (self.order == 3)

    def parts(
        self, e1: Batched, hv: Batched, third: Batched | None, v: Batched, sigma: PerExample
    ) -> Parts:
        """Unweighted parts by one probe v.

        Args:
            e1: σ s + z.
            hv: H v.
            third: ∇ₓ(vᵀHv) or D²s[v, v], for order 3.
            v: the probe.
            sigma: σ(t).
        """
        d = float(dimension(e1))  # d³ of an image is beyond int32
        a_v = second_order_residual(e1, hv, v, sigma)
        parts = {"frobenius": squared_norm(a_v) / d**2, "trace": inner(v, a_v) ** 2 / d**2}
        if self.order == 3:
            parts["third"] = squared_norm(third_order_residual(e1, hv, third, v, sigma)) / d**3
        return parts

    def exact_parts(
        self,
        e1: Batched,
        jacobian: Float[Array, "b n n"],
        trace_gradient: Batched | None,
        sigma: PerExample,
    ) -> Parts:
        """Unweighted parts from H and, for order 3, ∇ₓ tr H."""
        d = float(dimension(e1))  # d³ of an image is beyond int32
        matrix = second_order_matrix(e1, jacobian, sigma)
        trace = jnp.trace(matrix, axis1=1, axis2=2)
        parts = {"frobenius": squared_norm(matrix) / d**2, "trace": trace**2 / d**2}
        if self.order == 3:
            vector = third_order_vector(e1, jacobian, trace_gradient, sigma)
            parts["third"] = squared_norm(vector) / d**3
        return parts

    def weighted(self, parts: Parts) -> PerExample:
        """λ2 (λF frobenius + λtr trace) + λ3 third."""
        second = self.frobenius_weight * parts["frobenius"] + self.trace_weight * parts["trace"]
        total = self.second_order_weight * second
        if self.order == 3:
            total = total + self.third_order_weight * parts["third"]
        return total
