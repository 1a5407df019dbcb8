"""Define the linear diffusions dx = a(t) x dt + g(t) dw: x_t = α(t) x0 + σ(t) z, z ~ N(0, I).

    a = d log α/dt,   g² = dσ²/dt − 2 a σ²,   W(t) = ∫ g²/σ² dt (the density of the likelihood
    proposal).

An SDE is a frozen dataclass of floats: hashable, so it can be a static argument of `jax.jit`. Times
are arrays [B] (or scalars) in [0, T]; states are [B, *d].
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from checks import FieldError, require
from operators import Batched, PerExample, dimension, scale, squared_norm, standard_normal

Time = Float[Array, "*t"]


class Variable(NamedTuple):
    """A growing function c(t) and its inverse; the ODE is integrated in a root of c."""

    name: str
    of_time: Callable[[Time], Time]
    time_of: Callable[[Time], Time]


TIME = Variable("t", lambda t: t, lambda c: c)


@dataclasses.dataclass(frozen=True)
class SDE:
    """A linear SDE. Subclasses give the scalar functions; everything else follows from them."""

    @property
    def T(self) -> float:
        """Largest time; the prior is the law at T."""
        return 1.0

    @property
    def prior_std(self) -> float:
        """Standard deviation of the prior N(0, prior_std² I)."""
        return 1.0

    @property
    def ode_variable(self) -> Variable:
        """In whose root the probability-flow ODE is smoothest, as measured: `ode`."""
        return TIME

    @property
    def has_chain(self) -> bool:
        """Return whether `discretize` has a chain of its own levels (DDPM, SMLD), not a step dt."""
        return type(self).discretize is not SDE.discretize

    def drift_coefficient(self, t: Time) -> Time:
        """a(t) of the drift f(x, t) = a(t) x."""
        raise NotImplementedError

    def g2(self, t: Time) -> Time:
        """Squared diffusion coefficient g²(t)."""
        raise NotImplementedError

    def rate(self, t: Time) -> Time:
        """g²/σ², the likelihood weight of ‖σ s + z‖², and dW/dt."""
        return self.g2(t) / self.sigma(t) ** 2

    def alpha(self, t: Time) -> Time:
        """Mean coefficient α(t) of x_t given x0."""
        raise NotImplementedError

    def sigma(self, t: Time) -> Time:
        """Standard deviation σ(t) of x_t given x0."""
        raise NotImplementedError

    def cumulative_weight(self, t: Time) -> Time:
        """W(t), an antiderivative of g²/σ²."""
        raise NotImplementedError

    def time_of_weight(self, w: Time) -> Time:
        """Return the time t with W(t) = w, the inverse of `cumulative_weight`."""
        raise NotImplementedError

    def velocity_share(self, t: Time) -> Time:
        """(d log σ²/dt)/(g²/σ²) = 1 + 2aσ²/g²; α² for VP."""
        return 1.0 + 2.0 * self.drift_coefficient(t) / self.rate(t)

    def time_of_sigma(self, sigma: Time) -> Time:
        """Return the time t at which σ(t) has the given value."""
        raise NotImplementedError

    def g(self, t: Time) -> Time:
        """Diffusion coefficient g = √(g²)."""
        return jnp.sqrt(self.g2(t))

    def f(self, x: Batched, t: PerExample) -> Batched:
        """Return the drift a(t) x, shape [B, *d]."""
        return scale(self.drift_coefficient(t), x)

    def perturb(self, x0: Batched, t: PerExample, z: Batched) -> Batched:
        """x_t = α(t) x0 + σ(t) z."""
        return scale(self.alpha(t), x0) + scale(self.sigma(t), z)

    def centred_norm(self, x0: Batched, x_t: Batched, t: PerExample) -> PerExample:
        """‖x_t‖² − α²‖x0‖² − d σ², of mean zero given x0: a control variate, shape [B]."""
        mean_square = self.alpha(t) ** 2 * squared_norm(x0)
        return squared_norm(x_t) - mean_square - dimension(x0) * self.sigma(t) ** 2

    def reverse_drift(
        self, score: Batched, x: Batched, t: PerExample, lmbd: float = 0.0
    ) -> Batched:
        """Drift f − (1 − λ/2) g² s of the λ-family, in the direction of growing t.

        λ = 0 is the reverse SDE, λ = 1 the probability-flow ODE; the diffusion is √(1 − λ) g.
        Reference: Huang et al. 2021, https://arxiv.org/abs/2106.02808, appendix C.
        """
        return self.f(x, t) - scale((1.0 - 0.5 * lmbd) * self.g2(t), score)

    def ode_drift(self, score: Batched, x: Batched, t: PerExample) -> Batched:
        """Drift f − ½ g² s of the probability-flow ODE (Song et al. 2021, eq. 13)."""
        return self.reverse_drift(score, x, t, lmbd=1.0)

    def prior_sample(self, keys: Key[Array, " b"], like: Batched) -> Batched:
        """x_T ~ N(0, prior_std² I), example b from keys[b]."""
        return self.prior_std * standard_normal(keys, like)

    def prior_logp(self, x: Batched) -> PerExample:
        """log π(x) in nats, shape [B]."""
        d = dimension(x)
        log_normaliser = d * (0.5 * math.log(2 * math.pi) + math.log(self.prior_std))
        return -0.5 * squared_norm(x) / self.prior_std**2 - log_normaliser

    def prior_kl(self, x0: Batched) -> PerExample:
        """KL(q(x_T | x0) ‖ π) in nats, shape [B]."""
        t = jnp.full(x0.shape[:1], self.T, x0.dtype)
        variance_ratio = (self.sigma(t) / self.prior_std) ** 2
        mean_term = squared_norm(scale(self.alpha(t), x0)) / self.prior_std**2
        d = dimension(x0)
        return 0.5 * (mean_term + d * (variance_ratio - 1.0 - jnp.log(variance_ratio)))

    def discretize(
        self, x: Batched, t: PerExample, dt: float, num_steps: int
    ) -> tuple[Batched, PerExample]:
        """One forward step x' = x + F + G z of the discrete chain: (F, G). Euler–Maruyama here."""
        del num_steps
        return dt * self.f(x, t), jnp.sqrt(dt) * self.g(t)

    def chain(self, num_scales: int) -> "SDE":
        """The same with α and σ of the discrete chain of N levels; VP and VE only."""
        allowed = f"True: {type(self).__name__} has no chain; VPSDE (DDPM) and VESDE (SMLD) have"
        raise FieldError("training.continuous", False, f"need {allowed}")

    def langevin_alpha(self, t: PerExample, num_steps: int) -> PerExample:
        """Factor 1 − β_i (VP, sub-VP) or 1 (VE) of the corrector's step size."""
        del num_steps
        return jnp.ones_like(t)

    def ancestral(
        self, score: Batched, x: Batched, t: PerExample, num_steps: int
    ) -> tuple[Batched, PerExample]:
        """Mean and standard deviation of the ancestral step; VP and VE only."""
        allowed = (
            f"'reverse_diffusion' or 'euler_maruyama': {type(self).__name__} has no chain; VPSDE "
            "and VESDE have"
        )
        raise FieldError("sampling.predictor", "ancestral_sampling", f"need {allowed}")


def check_time(field: str, t: float, sde: SDE, *, positive: bool) -> None:
    """Raise a FieldError unless 0 ≤ t < T, and t > 0 where it must be."""
    fits = 0.0 <= t < sde.T and not (positive and t == 0.0)
    require(fits, field, t, f"0 {'<' if positive else '<='} t < T = {sde.T}")


MOST_LEVELS = 1_000_000


def chain_tolerance(num_steps: int) -> float:
    """Return by how many cells rounding may lower the index of a time on the grid.

    Times T − k dt in float32 err by up to 1.3e-7 N cells.

    Raises:
        FieldError: the chain is so long that float32 does not tell its levels apart.
    """
    allowed = (
        f"at most {MOST_LEVELS} levels, which times in float32 tell apart, or a predictor without "
        "a chain: 'euler_maruyama'"
    )
    require(num_steps <= MOST_LEVELS, "model.num_scales", num_steps, allowed)
    return max(2e-4, 2e-7 * num_steps)


def chain_index(t: PerExample, num_steps: int, T: float) -> Int[Array, " b"]:
    """⌊t (N − 1)/T⌋, index of t in a discrete chain of N steps.

    Times that lie on the grid up to their rounding count as on it.
    """
    return jnp.floor(t * (num_steps - 1) / T + chain_tolerance(num_steps)).astype(jnp.int32)
