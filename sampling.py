"""Samplers: predictor–corrector, the λ-family of reverse SDEs, and the probability-flow ODE.

    predictor    x ← x − F̃ + G̃ z           one step of a discretised reverse SDE
    corrector    x ← x + ε s + √(2ε) z       Langevin steps at fixed t
    λ-family     x ← x − δ[f − (1 − λ/2) g² s] + √((1 − λ) δ) g z,   λ ≤ 1
    ODE          dx/dt = f − ½ g² s          adaptive, per-example steps
    denoising    E[x0 | x_t] = (x + σ² s)/α  as the last step of each (Tweedie)

The noise of sample i at step k is a function of (keys[i], k) only.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from checks import one_of, require
from ode import Solver
from operators import Batched, PerExample, fold_in_all, scale, squared_norm, standard_normal
from parameterization import ScoreFn
from sde_base import chain_tolerance, check_time
from sde_lib import SDE

FIELD = "sampling.smallest_time"


class Grid(NamedTuple):
    """A step needs two numbers of the time grid: its spacing dt and the steps N of the chain."""

    dt: float
    num_steps: int


Update = tuple[Batched, Batched]  # (x with noise, x before the noise)


def euler_maruyama(
    score: Batched, x: Batched, t: PerExample, z: Batched, sde: SDE, grid: Grid, lmbd: float
) -> Update:
    """Euler–Maruyama step of size dt, backwards in time; λ = 1 is Euler on the ODE."""
    mean = x - grid.dt * sde.reverse_drift(score, x, t, lmbd)
    return mean + scale(jnp.sqrt((1.0 - lmbd) * grid.dt) * sde.g(t), z), mean


def reverse_diffusion(
    score: Batched, x: Batched, t: PerExample, z: Batched, sde: SDE, grid: Grid, lmbd: float
) -> Update:
    """Reverse of the discrete chain: F̃ = F − (1 − λ/2) G² s (Song et al. 2021, appendix E)."""
    drift, diffusion = sde.discretize(x, t, grid.dt, grid.num_steps)
    mean = x - drift + scale((1.0 - 0.5 * lmbd) * diffusion**2, score)
    return mean + scale(jnp.sqrt(1.0 - lmbd) * diffusion, z), mean


def ancestral_sampling(
    score: Batched, x: Batched, t: PerExample, z: Batched, sde: SDE, grid: Grid, lmbd: float
) -> Update:
    """Ancestral step of DDPM (VP) or SMLD (VE); λ must be 0."""
    allowed = "sampling.probability_flow=False with it: it has no deterministic form"
    require(lmbd == 0.0, "sampling.predictor", "ancestral_sampling", allowed)
    mean, std = sde.ancestral(score, x, t, grid.num_steps)
    return mean + scale(std, z), mean


PREDICTORS = {
    "euler_maruyama": euler_maruyama,
    "reverse_diffusion": reverse_diffusion,
    "ancestral_sampling": ancestral_sampling,
    "none": None,
}


def langevin_step_size(
    score: Batched, z: Batched, t: PerExample, sde: SDE, axis_name: str | None
) -> PerExample:
    """(mean‖z‖/mean‖s‖)², means over the whole batch, on all devices of `axis_name`."""
    del sde
    norms = jnp.sqrt(squared_norm(z)).mean(), jnp.sqrt(squared_norm(score)).mean()
    z_norm, score_norm = jax.lax.pmean(norms, axis_name) if axis_name else norms
    return jnp.ones_like(t) * (z_norm / score_norm) ** 2


def annealed_step_size(
    score: Batched, z: Batched, t: PerExample, sde: SDE, axis_name: str | None
) -> PerExample:
    """σ(t)², annealed Langevin dynamics."""
    del score, z, axis_name
    return sde.sigma(t) ** 2


CORRECTORS = {"langevin": langevin_step_size, "ald": annealed_step_size, "none": None}


def corrector_step(
    step_size: Callable[..., PerExample],
    score: Batched,
    x: Batched,
    t: PerExample,
    z: Batched,
    sde: SDE,
    *,
    num_steps: int,
    snr: float,
    axis_name: str | None = None,
) -> Update:
    """x + ε s + √(2ε) z, ε = 2 (1 − β_i) snr² × step_size (Song et al. 2021, algorithms 4, 5)."""
    size = step_size(score, z, t, sde, axis_name)
    epsilon = 2.0 * sde.langevin_alpha(t, num_steps) * snr**2 * size
    mean = x + scale(epsilon, score)
    return mean + scale(jnp.sqrt(2.0 * epsilon), z), mean


def denoise(score_fn: ScoreFn, sde: SDE, x: Batched, t: PerExample) -> Batched:
    """E[x0 | x_t] = (x_t + σ² s)/α."""
    return scale(1.0 / sde.alpha(t), x + scale(sde.sigma(t) ** 2, score_fn(x, t)))


class Samples(NamedTuple):
    """Samples in model space and the number of score evaluations of each."""

    x: Batched
    nfe: Int[Array, " b"]


def _times(value: Float[Array, ""] | float, x: Batched) -> PerExample:
    return jnp.full(x.shape[:1], value, x.dtype)


def _check_sampler(t_min: float, num_steps: int, noise_removal: bool) -> None:
    # The score of VP and sub-VP does not exist at t = 0.
    allowed = "False, or sampling.smallest_time > 0"
    require(not noise_removal or t_min != 0.0, "sampling.noise_removal", noise_removal, allowed)
    require(num_steps >= 2, "model.num_scales", num_steps, "at least 2 steps")


@dataclasses.dataclass(frozen=True)
class PredictorCorrector:
    """N noise levels from T to t_min: corrector, then predictor, at each; denoising at the last.

    Differs from the published loop in that the predictor's step is the spacing of the grid, so it
    ends at t_min, and in that the last level denoises instead of stepping past t_min.
    Reference: Song et al. 2021, https://arxiv.org/abs/2011.13456, algorithm 1.
    """

    predictor: str
    corrector: str
    num_steps: int
    t_min: float
    snr: float = 0.16
    n_steps_each: int = 1
    probability_flow: bool = False
    noise_removal: bool = True
    axis_name: str | None = None

    def __post_init__(self) -> None:
        _check_sampler(self.t_min, self.num_steps, self.noise_removal)
        for field, table in (("predictor", PREDICTORS), ("corrector", CORRECTORS)):
            one_of(f"sampling.{field}", getattr(self, field), table)
        allowed = "another predictor, or another sampling.corrector than 'none'"
        both = self.predictor == self.corrector == "none"
        require(not both, "sampling.predictor", self.predictor, allowed)

    def __call__(
        self, score_fn: ScoreFn, sde: SDE, keys: Key[Array, " b"], like: Batched
    ) -> Samples:
        """One sample per key, of the shape of `like`."""
        check_time(FIELD, self.t_min, sde, positive=False)
        self._check_chain(sde)
        grid = Grid((sde.T - self.t_min) / (self.num_steps - 1), self.num_steps)

        def level(k: Int[Array, ""], x: Batched) -> Batched:
            t = _times(sde.T - k.astype(like.dtype) * grid.dt, x)
            keys_now = jax.vmap(lambda key: jax.random.fold_in(key, k))(keys)
            x = self.correct(score_fn, sde, fold_in_all(keys_now, 0), x, t)
            return self.predict(score_fn, sde, fold_in_all(keys_now, 1), x, t, grid)

        x = sde.prior_sample(fold_in_all(keys, self.num_steps + 1), like)
        x = jax.lax.fori_loop(0, self.num_steps - 1, level, x)
        t_min = _times(self.t_min, x)
        x = self.correct(score_fn, sde, fold_in_all(keys, self.num_steps), x, t_min)
        if self.noise_removal:
            x = denoise(score_fn, sde, x, t_min)
        return Samples(x, jnp.full(x.shape[:1], self.evaluations()))

    def _check_chain(self, sde: SDE) -> None:
        """A chain has N levels from T to 0; stopping early would take some of them twice."""
        uses_chain = self.predictor in ("reverse_diffusion", "ancestral_sampling") and sde.has_chain
        if not uses_chain:
            return
        fits = self.t_min * (self.num_steps - 1) + chain_tolerance(self.num_steps) < 1.0
        allowed = (
            f"less than 1/(N − 1), the last level of the chain of {self.predictor!r}, for "
            f"N = model.num_scales={self.num_steps}; or fewer levels, or 'euler_maruyama'"
        )
        require(fits, "sampling.smallest_time", self.t_min, allowed)

    def evaluations(self) -> int:
        """Score evaluations of one sample."""
        corrections = self.num_steps * self.n_steps_each * (self.corrector != "none")
        predictions = (self.num_steps - 1) * (self.predictor != "none")
        return corrections + predictions + self.noise_removal

    def correct(
        self, score_fn: ScoreFn, sde: SDE, keys: Key[Array, " b"], x: Batched, t: PerExample
    ) -> Batched:
        """`n_steps_each` corrector steps at t."""
        step_size = CORRECTORS[self.corrector]
        for i in range(self.n_steps_each if step_size else 0):
            z = standard_normal(fold_in_all(keys, i), x)
            x, _ = corrector_step(
                step_size, score_fn(x, t), x, t, z, sde,
                num_steps=self.num_steps, snr=self.snr, axis_name=self.axis_name,
            )  # fmt: skip
        return x

    def predict(
        self,
        score_fn: ScoreFn,
        sde: SDE,
        keys: Key[Array, " b"],
        x: Batched,
        t: PerExample,
        grid: Grid,
    ) -> Batched:
        """One predictor step from t."""
        predictor = PREDICTORS[self.predictor]
        if predictor is None:
            return x
        lmbd = 1.0 if self.probability_flow else 0.0
        return predictor(score_fn(x, t), x, t, standard_normal(keys, x), sde, grid, lmbd)[0]


@dataclasses.dataclass(frozen=True)
class ReverseSDE:
    """Euler–Maruyama on the λ-family, N equal steps from T to t_min.

    λ = 0 is the reverse SDE, λ = 1 Euler on the ODE, λ < 0 noisier than the forward process.
    Reference: Huang et al. 2021, https://arxiv.org/abs/2106.02808, appendix C.
    """

    num_steps: int
    t_min: float
    lmbd: float = 0.0
    noise_removal: bool = True

    def __post_init__(self) -> None:
        _check_sampler(self.t_min, self.num_steps, self.noise_removal)
        allowed = "λ <= 1: the diffusion is √(1 − λ) g"
        require(self.lmbd <= 1.0, "sampling.lmbd", self.lmbd, allowed)

    def __call__(
        self, score_fn: ScoreFn, sde: SDE, keys: Key[Array, " b"], like: Batched
    ) -> Samples:
        """One sample per key, of the shape of `like`."""
        x = self.trajectory(score_fn, sde, keys, like, (self.num_steps,))[0]
        if self.noise_removal:
            x = denoise(score_fn, sde, x, _times(self.t_min, x))
        return Samples(x, jnp.full(x.shape[:1], self.num_steps + self.noise_removal))

    def trajectory(
        self,
        score_fn: ScoreFn,
        sde: SDE,
        keys: Key[Array, " b"],
        like: Batched,
        stops: tuple[int, ...],
    ) -> Float[Array, "n b *d"]:
        """x after each of these growing numbers of steps (0: the draw from the prior)."""
        check_time(FIELD, self.t_min, sde, positive=False)
        grid = Grid((sde.T - self.t_min) / self.num_steps, self.num_steps)

        def step(k: Int[Array, ""], x: Batched) -> Batched:
            t = _times(sde.T - k.astype(like.dtype) * grid.dt, x)
            z = standard_normal(jax.vmap(lambda key: jax.random.fold_in(key, k))(keys), x)
            return euler_maruyama(score_fn(x, t), x, t, z, sde, grid, self.lmbd)[0]

        def advance(x: Batched, ends: tuple[Array, Array]) -> tuple[Batched, Batched]:
            x = jax.lax.fori_loop(*ends, step, x)
            return x, x

        start = sde.prior_sample(fold_in_all(keys, self.num_steps + 1), like)
        ends = jnp.asarray((0, *stops[:-1])), jnp.asarray(stops)
        return jax.lax.scan(advance, start, ends)[1]


@dataclasses.dataclass(frozen=True)
class OdeSampler:
    """Probability-flow ODE from T to t_min with per-example error control."""

    solver: Solver
    t_min: float
    noise_removal: bool = True

    def __call__(
        self, score_fn: ScoreFn, sde: SDE, keys: Key[Array, " b"], like: Batched
    ) -> Samples:
        """One sample per key, of the shape of `like`; NaN where the solver ran out of steps."""
        check_time(FIELD, self.t_min, sde, positive=True)

        def field(t: PerExample, x: Batched, args: None) -> Batched:
            del args
            return sde.ode_drift(score_fn(x, t), x, t)

        latent = sde.prior_sample(keys, like)
        ends = (sde.T, self.t_min)
        found = self.solver.integrate(field, *ends, latent, None, sde.ode_variable)
        x = scale(jnp.where(found.converged, 1.0, jnp.nan).astype(latent.dtype), found.state)
        if self.noise_removal:
            x = denoise(score_fn, sde, x, _times(self.t_min, x))
        return Samples(x, found.nfe + int(self.noise_removal))


Sampler = PredictorCorrector | ReverseSDE | OdeSampler
