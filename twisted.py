"""Samples of p(x | y) by twisted sequential Monte Carlo, and log p(y).

    p(x_s | x_t) = N((x_t + q s)/c, v I),  c = α_t/α_s,  q = σ_t² − c² σ_s²,  v = q σ_s/σ_t
    r(x_s | x_t) = N((x_t + q (s + ∇ log p̃))/c, v I)                            (the proposal)
    w_s = p(x_s | x_t) p̃(y | x_s)/(r(x_s | x_t) p̃(y | x_t)),   w_T = p̃(y | x_T)

p̃(y | x_t) is that of moment matching. Whatever it is, the mean weights multiply to an unbiased
estimate of p(y) under the model of N levels, and the particles have the law p(x | y) as K grows.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from checks import require
from measurements import Measured, Measurement
from operators import Batched, PerExample, fold_in_all, inner, squared_norm, standard_normal
from parameterization import ScoreFn
from posterior_sampling import MomentMatching, Twist
from sde_base import check_time
from sde_lib import SDE


class Population(NamedTuple):
    """Weighted particles of R independent runs at t_min.

    Attributes:
        x: [R, K, *d], E[x0 | x_t, y] of every particle.
        log_weights: [R, K], not normalised.
        log_evidence: [R], log of an unbiased estimate of p(y) under the discretised model, in nats.
        smallest_ess: [R], the smallest effective number of particles at any level.
    """

    x: Float[Array, "r k *d"]
    log_weights: Float[Array, "r k"]
    log_evidence: Float[Array, " r"]
    smallest_ess: Float[Array, " r"]


class WeighedSamples(NamedTuple):
    """Samples as those of any sampler, and of each the log p̂(y) of its run, in nats."""

    x: Batched
    nfe: Int[Array, " r"]
    log_evidence: Float[Array, " r"]


class _Cloud(NamedTuple):
    """The state of all runs at one level; x and twist hold R K particles, run by run."""

    x: Batched
    twist: Twist
    log_weights: Float[Array, "r k"]
    log_evidence: Float[Array, " r"]
    smallest_ess: Float[Array, " r"]


@dataclasses.dataclass(frozen=True, eq=False)
class TwistedSampler:
    """K particles per sample from T to t_min, N levels equally spaced in W = ∫ g²/σ² dt.

    Particles are resampled (systematically) where their effective number falls below K/2.
    The mean of p(x_s | x_t) is E[x_s | x_t]. Its variance lies between q σ_s²/σ_t², that of data on
    one point, and q, that of wide data under VE: the geometric mean has a third of the error in
    log p(y) of either.
    Reference: Wu et al. 2023, https://arxiv.org/abs/2306.17775, algorithm 1.

    Attributes:
        measurement: A and γ > 0.
        y: [R, *m], one for every run.
        num_steps: N ≥ 2.
        t_min: the last level.
        particles: K ≥ 2.
        covariance: that of p̃.
    """

    measurement: Measurement
    y: Measured
    num_steps: int
    t_min: float
    particles: int
    covariance: str = "exact"

    def __post_init__(self) -> None:
        require(self.num_steps >= 2, "model.num_scales", self.num_steps, "at least 2 steps")
        require(self.particles >= 2, "sampling.particles", self.particles, "at least 2")

    def __call__(
        self, score_fn: ScoreFn, sde: SDE, keys: Key[Array, " r"], like: Batched
    ) -> WeighedSamples:
        """One sample per key and measurement, of the shape of `like`: one particle of each run."""
        found = self.run(score_fn, sde, keys, like)
        choose = jax.vmap(jax.random.categorical)
        chosen = choose(fold_in_all(keys, 2 * self.num_steps), found.log_weights)
        x = jax.vmap(lambda particles, k: particles[k])(found.x, chosen)
        nfe = jnp.full(chosen.shape, self.num_steps * self.particles)
        return WeighedSamples(x, nfe, found.log_evidence)

    def run(self, score_fn: ScoreFn, sde: SDE, keys: Key[Array, " r"], like: Batched) -> Population:
        """The particles of one run per key; `like` [R, *d] tells shape and dtype of an example."""
        check_time("sampling.smallest_time", self.t_min, sde, positive=True)
        y = jnp.repeat(self.y, self.particles, axis=0)
        twist = MomentMatching(self.measurement, y, self.covariance)
        times = self._times(sde, like)
        many = jnp.repeat(like, self.particles, axis=0)

        def advance(cloud: _Cloud, level: tuple) -> tuple[_Cloud, None]:
            k, t, s = level
            cloud = self._resampled(fold_in_all(keys, 2 * k), cloud)
            z = self._normal(fold_in_all(keys, 2 * k + 1), many)
            x, log_ratio = _propose(cloud, sde, t, s, z)
            found = twist(score_fn, sde, x, jnp.full(x.shape[:1], s))
            change = log_ratio + found.log_likelihood - cloud.twist.log_likelihood
            weights = cloud.log_weights + change.reshape(cloud.log_weights.shape)
            return cloud._replace(x=x, twist=found, log_weights=weights), None

        x = sde.prior_std * self._normal(fold_in_all(keys, 2 * self.num_steps + 1), many)
        found = twist(score_fn, sde, x, jnp.full(x.shape[:1], times[0]))
        cloud = self._start(x, found, len(keys))
        levels = jnp.arange(self.num_steps - 1), times[:-1], times[1:]
        cloud, _ = jax.lax.scan(advance, cloud, levels)
        return self._finish(cloud, sde, times[-1])

    def _times(self, sde: SDE, like: Batched) -> Float[Array, " n"]:
        """From T to t_min, equally spaced in W."""
        ends = jnp.asarray([sde.T, self.t_min], like.dtype)
        first, last = sde.cumulative_weight(ends)
        w = jnp.linspace(first, last, self.num_steps, dtype=like.dtype)
        return sde.time_of_weight(w).at[jnp.asarray([0, -1])].set(ends)

    def _normal(self, keys: Key[Array, " r"], many: Batched) -> Batched:
        """z ~ N(0, I) of every particle, the K of run r from keys[r]."""
        by_run = jnp.zeros((len(keys), self.particles, *many.shape[1:]), many.dtype)
        return standard_normal(keys, by_run).reshape(many.shape)

    def _start(self, x: Batched, found: Twist, runs: int) -> _Cloud:
        weights = found.log_likelihood.reshape(runs, self.particles)
        most = jnp.full((runs,), self.particles, x.dtype)
        return _Cloud(x, found, weights, jnp.zeros_like(most), most)

    def _resampled(self, keys: Key[Array, " r"], cloud: _Cloud) -> _Cloud:
        """The cloud, resampled in the runs whose effective number of particles is below K/2."""
        ess = effective_number(cloud.log_weights)
        low = ess < 0.5 * self.particles
        drawn = jax.vmap(systematic)(keys, cloud.log_weights)
        own = jnp.arange(self.particles, dtype=drawn.dtype)
        chosen = jnp.where(low[:, None], drawn, own[None])
        first = self.particles * jnp.arange(len(low), dtype=drawn.dtype)
        flat = (first[:, None] + chosen).reshape(-1)
        mean = _log_mean(cloud.log_weights)
        return _Cloud(
            cloud.x[flat],
            Twist(*(leaf[flat] for leaf in cloud.twist)),
            jnp.where(low[:, None], 0.0, cloud.log_weights),
            cloud.log_evidence + jnp.where(low, mean, 0.0),
            jnp.minimum(cloud.smallest_ess, ess),
        )

    def _finish(self, cloud: _Cloud, sde: SDE, t_min: Float[Array, ""]) -> Population:
        x = cloud.twist.denoised(sde, cloud.x, jnp.full(cloud.x.shape[:1], t_min))
        ess = jnp.minimum(cloud.smallest_ess, effective_number(cloud.log_weights))
        evidence = cloud.log_evidence + _log_mean(cloud.log_weights)
        by_run = x.reshape(*cloud.log_weights.shape, *x.shape[1:])
        return Population(by_run, cloud.log_weights, evidence, ess)


def _propose(
    cloud: _Cloud, sde: SDE, t: Float[Array, ""], s: Float[Array, ""], z: Batched
) -> tuple[Batched, PerExample]:
    """(x_s ~ r(· | x_t), log p(x_s | x_t) − log r(x_s | x_t)).

    The means differ by δ = q ∇ log p̃/c, and x_s = mean + √v z, so that the logarithm is
    −‖δ‖²/(2v) − ⟨z, δ⟩/√v.
    """
    c, ratio = sde.alpha(t) / sde.alpha(s), sde.sigma(s) / sde.sigma(t)
    q = sde.sigma(t) ** 2 - (c * sde.sigma(s)) ** 2
    std = jnp.sqrt(q * ratio)
    shift = (q / c) * cloud.twist.guidance
    x = (cloud.x + q * cloud.twist.score) / c + shift + std * z
    return x, -0.5 * squared_norm(shift) / std**2 - inner(z, shift) / std


def effective_number(log_weights: Float[Array, "r k"]) -> Float[Array, " r"]:
    """(Σ w)²/Σ w² of every run."""
    total = jax.nn.logsumexp(log_weights, axis=1)
    return jnp.exp(2.0 * total - jax.nn.logsumexp(2.0 * log_weights, axis=1))


def systematic(key: Key[Array, ""], log_weights: Float[Array, " k"]) -> Int[Array, " k"]:
    """Indices of K draws: as many of particle i as points (j + u)/K fall into its share of [0, 1].

    Particle i is taken ⌊K w_i⌋ or ⌈K w_i⌉ times, K w_i in the mean.
    """
    number = len(log_weights)
    edges = jnp.cumsum(jax.nn.softmax(log_weights))
    dtype = log_weights.dtype
    points = (jnp.arange(number, dtype=dtype) + jax.random.uniform(key, (), dtype)) / number
    return jnp.minimum(jnp.searchsorted(edges, points, side="right"), number - 1)


def _log_mean(log_weights: Float[Array, "r k"]) -> Float[Array, " r"]:
    return jax.nn.logsumexp(log_weights, axis=1) - math.log(log_weights.shape[1])


def combine_evidence(log_evidence: Float[Array, " r"]) -> tuple[float, float]:
    """(log of the mean of p̂(y) over independent runs, its standard error by the delta method)."""
    number, largest = len(log_evidence), log_evidence.max()
    ratio = jnp.exp(log_evidence - largest)
    error = ratio.std(ddof=1) / ratio.mean() / math.sqrt(number) if number > 1 else math.nan
    return float(largest + jnp.log(ratio.mean())), float(error)
