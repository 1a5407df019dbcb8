"""Tails of the standard normal law, with derivatives that are accurate wherever they are taken.

    Q(x) = 1 − Φ(x),    λ(x) = φ(x)/Q(x) = −d log Q/dx  (the hazard),    dλ/dx = λ (λ − x)

Far in the tail λ = x + 1/x − 2/x³ + 10/x⁵ − 74/x⁷ + 706/x⁹ − …, where exp(−x²/2 − log Q) would lose
all digits in float32.
Reference: Abramowitz and Stegun 1964, Handbook of Mathematical Functions, 26.2.12.
"""

import math

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr
from jaxtyping import Array, Float

Real = Float[Array, "*s"]
FAR = {jnp.dtype(jnp.float32): 10.0, jnp.dtype(jnp.float64): 20.0}  # from here on the series


@jax.custom_jvp
def log_tail(x: Real) -> Real:
    """log Q(x)."""
    return log_ndtr(-x)


@jax.custom_jvp
def hazard(x: Real) -> Real:
    """λ(x) = φ(x)/Q(x), about x for large x."""
    return _split(x)[0]


@jax.custom_jvp
def excess(x: Real) -> Real:
    """λ(x) − x > 0, about 1/x for large x."""
    return _split(x)[1]


def _split(x: Real) -> tuple[Real, Real]:
    """(λ, λ − x), by definition or by the series."""
    far = FAR[x.dtype]
    near = jnp.minimum(x, far)
    direct = jnp.exp(-0.5 * near**2 - 0.5 * math.log(2.0 * math.pi) - log_ndtr(-near))
    inverse = 1.0 / jnp.maximum(x, far)
    square = inverse**2
    series = 1.0 + square * (-2.0 + square * (10.0 + square * (-74.0 + square * 706.0)))
    series = inverse * series
    is_near = x < far
    return jnp.where(is_near, direct, x + series), jnp.where(is_near, direct - x, series)


@log_tail.defjvp
def _log_tail_jvp(primals: tuple[Real], tangents: tuple[Real]) -> tuple[Real, Real]:
    (x,), (dx,) = primals, tangents
    return log_tail(x), -hazard(x) * dx


@hazard.defjvp
def _hazard_jvp(primals: tuple[Real], tangents: tuple[Real]) -> tuple[Real, Real]:
    (x,), (dx,) = primals, tangents
    value = hazard(x)
    return value, value * excess(x) * dx


@excess.defjvp
def _excess_jvp(primals: tuple[Real], tangents: tuple[Real]) -> tuple[Real, Real]:
    (x,), (dx,) = primals, tangents
    return excess(x), (hazard(x) * excess(x) - 1.0) * dx
