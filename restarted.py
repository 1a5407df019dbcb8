"""An SDE from a later time on, and times by their ratio of noise to signal.

n(t) = σ²/α²,   d log n = (g²/σ²) dt
"""

import dataclasses

import jax.numpy as jnp

from sde_base import Variable
from sde_lib import SDE, Time


@dataclasses.dataclass(frozen=True)
class Restarted(SDE):
    """An SDE from the state of time t0 on: x_t = α' x_{t0} + σ' z, with the drift and g of `base`.

    α' = α/α_{t0},   σ'² = σ² − α'² σ_{t0}²,   e^W = σ²/α² − σ_{t0}²/α_{t0}²
    """

    base: SDE
    start: float

    @property
    def T(self) -> float:
        """Return the largest time T of `base`."""
        return self.base.T

    @property
    def prior_std(self) -> float:
        """Return the standard deviation of the prior of `base`."""
        return self.base.prior_std

    @property
    def ode_variable(self) -> Variable:
        """Return the variable of `base` in whose root the ODE takes its steps."""
        return self.base.ode_variable

    def drift_coefficient(self, t: Time) -> Time:
        """Return the drift coefficient a(t) of `base`."""
        return self.base.drift_coefficient(t)

    def g2(self, t: Time) -> Time:
        """Return the squared diffusion coefficient g²(t) of `base`."""
        return self.base.g2(t)

    def alpha(self, t: Time) -> Time:
        """Return the mean coefficient α' = α/α_{t0} of x_t given x_{t0}."""
        return self.base.alpha(t) / self.base.alpha(jnp.full_like(t, self.start))

    def sigma(self, t: Time) -> Time:
        """σ' = α √(σ²/α² − σ_{t0}²/α_{t0}²)."""
        return self.base.alpha(t) * jnp.exp(0.5 * self.cumulative_weight(t))

    def cumulative_weight(self, t: Time) -> Time:
        """W = log(n − n_{t0}), n = σ²/α² the ratio of noise to signal."""
        return jnp.log(noise_to_signal(self.base, t) - self._start(t))

    def time_of_weight(self, w: Time) -> Time:
        """n = e^W + n_{t0}."""
        return time_of_noise(self.base, jnp.exp(w) + self._start(w))

    def _start(self, like: Time) -> Time:
        return noise_to_signal(self.base, jnp.full_like(like, self.start))


def noise_to_signal(sde: SDE, t: Time) -> Time:
    """Return the ratio of noise to signal, n(t) = σ²/α²."""
    return (sde.sigma(t) / sde.alpha(t)) ** 2


def time_of_noise(sde: SDE, n: Time) -> Time:
    """Inverse of `noise_to_signal`: d log n = g²/σ² dt, so W = log n up to a constant."""
    end = jnp.full_like(n, sde.T)
    constant = sde.cumulative_weight(end) - jnp.log(noise_to_signal(sde, end))
    return sde.time_of_weight(jnp.log(n) + constant)
