"""The diffusions by name: VP, sub-VP, VE, linear VE and the linear path (on `sde_base.SDE`).

    VP       dx = −½β x dt + √β dw                      σ² = 1 − e^{−B},  B = ∫ β dt,  α = e^{−B/2}
    sub-VP   dx = −½β x dt + √(β (1 − e^{−2B})) dw      σ = 1 − e^{−B}
    VE       dx = σ √(2 ln(σmax/σmin)) dw               σ = σmin (σmax/σmin)^t,  α = 1
    linear VE  dx = σmax √(2t) dw,  σ = t σmax,  α = 1;   linear path  x_t = (1 − t) x0 + t z

`SDES` has them by the names of `training.sde`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from checks import require
from operators import Batched, PerExample, scale
from sde_base import SDE, Time, Variable, chain_index


@dataclasses.dataclass(frozen=True)
class _LinearBeta(SDE):
    """The base of VP and sub-VP, with the rate β(t) = β0 + t(β1 − β0) and B(t) = ∫₀ᵗ β."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        allowed = f"0 < beta_min < beta_max={self.beta_max}"
        require(0.0 < self.beta_min < self.beta_max, "beta_min", self.beta_min, allowed)

    def beta(self, t: Time) -> Time:
        """Return the rate β(t) = β0 + t(β1 − β0)."""
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def integral_beta(self, t: Time) -> Time:
        """B(t) = β0 t + ½ t² (β1 − β0)."""
        return t * (self.beta_min + 0.5 * t * (self.beta_max - self.beta_min))

    def time_of_integral_beta(self, b: Time) -> Time:
        """Inverse of B: t = 2B/(β0 + √(β0² + 2(β1 − β0)B)), without cancellation at small B."""
        slope = self.beta_max - self.beta_min
        return 2.0 * b / (self.beta_min + jnp.sqrt(self.beta_min**2 + 2.0 * slope * b))

    def drift_coefficient(self, t: Time) -> Time:
        """Return the drift coefficient a = −β/2."""
        return -0.5 * self.beta(t)

    def alpha(self, t: Time) -> Time:
        """Return the mean coefficient α = e^{−B/2}."""
        return jnp.exp(-0.5 * self.integral_beta(t))

    def chain_beta(self, t: PerExample, num_steps: int) -> PerExample:
        """β_i of the discrete chain: β_i = linspace(β0/N, β1/N, N)[i], i = ⌊t(N − 1)/T⌋."""
        allowed = f"β_N = beta_max/N < 1 of the chain, so more than {self.beta_max} steps"
        require(self.beta_max < num_steps, "model.num_scales", num_steps, allowed)
        betas = jnp.linspace(self.beta_min, self.beta_max, num_steps, dtype=t.dtype) / num_steps
        return betas[chain_index(t, num_steps, self.T)]

    def langevin_alpha(self, t: PerExample, num_steps: int) -> PerExample:
        """Return the factor 1 − β_i of the corrector's step size."""
        return 1.0 - self.chain_beta(t, num_steps)


@dataclasses.dataclass(frozen=True)
class VPSDE(_LinearBeta):
    """Variance-preserving SDE: dx = −½β(t) x dt + √β(t) dw, σ² = 1 − e^{−B}.

    Reference: Song et al. 2021, https://arxiv.org/abs/2011.13456, eq. (11).
    """

    def g2(self, t: Time) -> Time:
        """Return the squared diffusion coefficient g² = β."""
        return self.beta(t)

    def sigma(self, t: Time) -> Time:
        """σ = √(1 − e^{−B})."""
        return jnp.sqrt(-jnp.expm1(-self.integral_beta(t)))

    def cumulative_weight(self, t: Time) -> Time:
        """W = log(e^B − 1) = B + log(1 − e^{−B})."""
        b = self.integral_beta(t)
        return b + jnp.log(-jnp.expm1(-b))

    def time_of_weight(self, w: Time) -> Time:
        """B = log(1 + e^W)."""
        return self.time_of_integral_beta(jax.nn.softplus(w))

    def velocity_share(self, t: Time) -> Time:
        """Return the ratio (d log σ²/dt)/(g²/σ²) = α²."""
        return self.alpha(t) ** 2

    def time_of_sigma(self, sigma: Time) -> Time:
        """B = −log(1 − σ²)."""
        return self.time_of_integral_beta(-jnp.log1p(-(sigma**2)))

    def discretize(
        self, x: Batched, t: PerExample, dt: float, num_steps: int
    ) -> tuple[Batched, PerExample]:
        """DDPM chain: F = (√(1 − β_i) − 1) x, G = √β_i (Ho et al. 2020)."""
        del dt
        beta = self.chain_beta(t, num_steps)
        return scale(jnp.sqrt(1.0 - beta) - 1.0, x), jnp.sqrt(beta)

    def ancestral(
        self, score: Batched, x: Batched, t: PerExample, num_steps: int
    ) -> tuple[Batched, PerExample]:
        """Mean (x + β_i s)/√(1 − β_i), std √β_i."""
        beta = self.chain_beta(t, num_steps)
        return scale(jax.lax.rsqrt(1.0 - beta), x + scale(beta, score)), jnp.sqrt(beta)

    def chain(self, num_scales: int) -> "DDPMChain":
        """The chain of DDPM."""
        return DDPMChain(self.beta_min, self.beta_max, num_scales)


@dataclasses.dataclass(frozen=True)
class DDPMChain(VPSDE):
    """VP with α_i² = Π_{k ≤ i} (1 − β_k), σ_i² = 1 − α_i² at i = ⌊t (N − 1)/T⌋, β_k of the chain.

    Networks of the discrete objective were trained on this chain. a and g² are those of the VP SDE.
    Reference: Ho et al. 2020, https://arxiv.org/abs/2006.11239, eq. (4).
    """

    num_scales: int = 1000

    def log_alpha2(self, t: Time) -> Time:
        """Return log α_i² at the level i of t."""
        grid = jnp.linspace(0.0, self.T, self.num_scales, dtype=t.dtype)
        logs = jnp.cumsum(jnp.log1p(-self.chain_beta(grid, self.num_scales)))
        return logs[chain_index(t, self.num_scales, self.T)]

    def alpha(self, t: Time) -> Time:
        """Return the mean coefficient α_i at the level i of t."""
        return jnp.exp(0.5 * self.log_alpha2(t))

    def sigma(self, t: Time) -> Time:
        """Return the standard deviation σ_i at the level i of t."""
        return jnp.sqrt(-jnp.expm1(self.log_alpha2(t)))


@dataclasses.dataclass(frozen=True)
class SubVPSDE(_LinearBeta):
    """Sub-VP SDE: dx = −½β x dt + √(β(1 − e^{−2B})) dw, σ = 1 − e^{−B}.

    Reference: Song et al. 2021, https://arxiv.org/abs/2011.13456, appendix B.
    """

    def g2(self, t: Time) -> Time:
        """g² = β (1 − e^{−2B}) = β σ (1 + α²).

        One expm1 for σ and g: XLA on CPU (jax 0.10 to 0.12) confuses two of them that it fuses
        with a sum.
        """
        return self.beta(t) * self.sigma(t) * (1.0 + self.alpha(t) ** 2)

    def sigma(self, t: Time) -> Time:
        """σ = 1 − e^{−B}."""
        return -jnp.expm1(-self.integral_beta(t))

    def cumulative_weight(self, t: Time) -> Time:
        """W = 2 log(2 sinh(B/2)) = B + 2 log(1 − e^{−B})."""
        b = self.integral_beta(t)
        return b + 2.0 * jnp.log(-jnp.expm1(-b))

    def time_of_weight(self, w: Time) -> Time:
        """B = 2 asinh(½ e^{W/2})."""
        return self.time_of_integral_beta(2.0 * jnp.arcsinh(0.5 * jnp.exp(0.5 * w)))

    def velocity_share(self, t: Time) -> Time:
        """Return the ratio (d log σ²/dt)/(g²/σ²) = 2α²/(1 + α²)."""
        signal = self.alpha(t) ** 2
        return 2.0 * signal / (1.0 + signal)

    def time_of_sigma(self, sigma: Time) -> Time:
        """B = −log(1 − σ)."""
        return self.time_of_integral_beta(-jnp.log1p(-sigma))


@dataclasses.dataclass(frozen=True)
class VESDE(SDE):
    """Variance-exploding SDE with geometric σ(t) = σmin (σmax/σmin)^t.

    σ keeps its published value σmin at t = 0, although the variance added since t = 0 is σ² −
    σmin².
    Reference: Song et al. 2021, https://arxiv.org/abs/2011.13456, eq. (9) and appendix C.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        allowed = f"0 < sigma_min < sigma_max={self.sigma_max}"
        require(0.0 < self.sigma_min < self.sigma_max, "sigma_min", self.sigma_min, allowed)

    @property
    def prior_std(self) -> float:
        """Return the standard deviation σmax of the prior."""
        return self.sigma_max

    @property
    def ode_variable(self) -> Variable:
        """σ. Equal steps in t are equal in log σ: too many lie where σ is far below the data."""
        return Variable("σ", self.sigma, self.time_of_sigma)

    @property
    def log_ratio(self) -> float:
        """Return the logarithm ln(σmax/σmin)."""
        return math.log(self.sigma_max / self.sigma_min)

    def drift_coefficient(self, t: Time) -> Time:
        """Return the drift coefficient a = 0."""
        return jnp.zeros_like(t)

    def alpha(self, t: Time) -> Time:
        """Return the mean coefficient α = 1."""
        return jnp.ones_like(t)

    def sigma(self, t: Time) -> Time:
        """σ = σmin (σmax/σmin)^t.

        By a power, which is good to 1.3e-7 in float32: e^{t ln(σmax/σmin)} has the rounding error
        of its exponent, 9e-7, and the embedding of log σ multiplies it.
        """
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def g2(self, t: Time) -> Time:
        """g² = 2 ln(σmax/σmin) σ²."""
        return 2.0 * self.log_ratio * self.sigma(t) ** 2

    def cumulative_weight(self, t: Time) -> Time:
        """W = 2 ln(σmax/σmin) t."""
        return 2.0 * self.log_ratio * t

    def time_of_weight(self, w: Time) -> Time:
        """t = W/(2 ln(σmax/σmin))."""
        return w / (2.0 * self.log_ratio)

    def time_of_sigma(self, sigma: Time) -> Time:
        """Return the time t = ln(σ/σmin)/ln(σmax/σmin) of a noise level σ."""
        return jnp.log(sigma / self.sigma_min) / self.log_ratio

    def chain_variances(self, t: PerExample, num_steps: int) -> tuple[PerExample, PerExample]:
        """(σ_i², σ_{i−1}²) of the geometric chain, σ_{−1} = 0, i = ⌊t(N − 1)/T⌋."""
        index = chain_index(t, num_steps, self.T)
        grid = jnp.linspace(0.0, self.T, num_steps, dtype=t.dtype)
        variances = self.sigma(grid) ** 2
        previous = jnp.where(index == 0, 0.0, variances[jnp.maximum(index - 1, 0)])
        return variances[index], previous

    def chain(self, num_scales: int) -> "VESDE":
        """The chain of SMLD: its levels are σ at i T/(N − 1)."""
        del num_scales
        return self

    def discretize(
        self, x: Batched, t: PerExample, dt: float, num_steps: int
    ) -> tuple[Batched, PerExample]:
        """SMLD chain: F = 0, G = √(σ_i² − σ_{i−1}²)."""
        del dt
        current, previous = self.chain_variances(t, num_steps)
        return jnp.zeros_like(x), jnp.sqrt(current - previous)

    def ancestral(
        self, score: Batched, x: Batched, t: PerExample, num_steps: int
    ) -> tuple[Batched, PerExample]:
        """Mean x + (σ_i² − σ_{i−1}²) s, variance σ_{i−1}²(σ_i² − σ_{i−1}²)/σ_i²."""
        current, previous = self.chain_variances(t, num_steps)
        gap = current - previous
        return x + scale(gap, score), jnp.sqrt(previous * gap / current)


@dataclasses.dataclass(frozen=True)
class LinearVESDE(SDE):
    """Variance-exploding SDE with linear σ(t) = t σmax; g² = 2 t σmax².

    Reference: Lu et al. 2022, https://arxiv.org/abs/2206.08265 (code: linear VE).
    """

    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        require(self.sigma_max > 0.0, "sigma_max", self.sigma_max, "more than 0")

    @property
    def prior_std(self) -> float:
        """Return the standard deviation σmax of the prior."""
        return self.sigma_max

    def drift_coefficient(self, t: Time) -> Time:
        """Return the drift coefficient a = 0."""
        return jnp.zeros_like(t)

    def alpha(self, t: Time) -> Time:
        """Return the mean coefficient α = 1."""
        return jnp.ones_like(t)

    def sigma(self, t: Time) -> Time:
        """σ = t σmax."""
        return t * self.sigma_max

    def g2(self, t: Time) -> Time:
        """g² = 2 t σmax²."""
        return 2.0 * t * self.sigma_max**2

    def cumulative_weight(self, t: Time) -> Time:
        """W = 2 log t."""
        return 2.0 * jnp.log(t)

    def time_of_weight(self, w: Time) -> Time:
        """Return the time t = e^{W/2} of a weight W."""
        return jnp.exp(0.5 * w)

    def time_of_sigma(self, sigma: Time) -> Time:
        """Return the time t = σ/σmax of a noise level σ."""
        return sigma / self.sigma_max


@dataclasses.dataclass(frozen=True)
class LinearPath(SDE):
    """The linear path x_t = (1 − t) x0 + t z of flow matching and rectified flow, as an SDE.

    dx = −x/(1 − t) dt + √(2t/(1 − t)) dw up to T < 1, where W(T) = log(σ²/α²) = 10: at t = 1 the
    drift has a pole. The drift of its probability-flow ODE is E[z − x0 | x_t]; the flow-matching
    loss is ‖u − (z − x0)‖² = ‖e1‖²/α² for u = f − ½g²s.
    Reference: Lipman et al. 2023, https://arxiv.org/abs/2210.02747; Liu et al. 2023,
    https://arxiv.org/abs/2209.03003.
    """

    end: float = 1.0 / (1.0 + math.exp(-5.0))

    def __post_init__(self) -> None:
        allowed = "0 < end < 1: the drift has a pole at 1"
        require(0.0 < self.end < 1.0, "end", self.end, allowed)

    @property
    def T(self) -> float:
        """Return the largest time, which is below 1."""
        return self.end

    @property
    def prior_std(self) -> float:
        """Return the standard deviation σ(T) of the prior."""
        return self.end

    def drift_coefficient(self, t: Time) -> Time:
        """a = −1/(1 − t)."""
        return -1.0 / (1.0 - t)

    def alpha(self, t: Time) -> Time:
        """α = 1 − t."""
        return 1.0 - t

    def sigma(self, t: Time) -> Time:
        """Return the standard deviation σ = t."""
        return t

    def g2(self, t: Time) -> Time:
        """g² = 2t/(1 − t)."""
        return 2.0 * t / (1.0 - t)

    def cumulative_weight(self, t: Time) -> Time:
        """W = 2 log(t/(1 − t))."""
        return 2.0 * (jnp.log(t) - jnp.log1p(-t))

    def time_of_weight(self, w: Time) -> Time:
        """t = 1/(1 + e^{−W/2})."""
        return jax.nn.sigmoid(0.5 * w)

    def velocity_share(self, t: Time) -> Time:
        """Return the ratio (d log σ²/dt)/(g²/σ²) = α."""
        return 1.0 - t

    def time_of_sigma(self, sigma: Time) -> Time:
        """Return the time t = σ of a noise level σ."""
        return sigma


SDES = {
    "vpsde": VPSDE,
    "subvpsde": SubVPSDE,
    "vesde": VESDE,
    "linearvesde": LinearVESDE,
    "linear": LinearPath,
}
