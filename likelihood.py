"""Log-likelihoods of a score model, per example, in nats of the model space.

    ODE      dx/dt = f − ½ g² s,   log p(x) = log π(x_T) + ∫ (a d − ½ g² div s) dt
    bound    −log p(x) ≤ KL(q(x_T|x) ‖ π) + ½ ∫ g² E‖s − ∇log q(x_t|x)‖² dt − E log p(x | x_{t_min})
    K draws  −log p(x) ≤ −E log (1/K) Σ_k p(x_k)/q(x_k | x), smaller for larger K

The decoder p(x | x_{t_min}) is that of the head (`heads`), or N((x_{t_min} + σ² s)/α, σ²/α² I).
The ODE starts at the data at t_min (as published), or at x_{t_min}, the noised data, with
`noised_start`. The discrete bound is that of integers k themselves, without dequantisation: x is
the value of k, and the last term −E log P(k | x_{t_min}).
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from checks import one_of, positive
from dequantization import Draw
from high_order import first_order_residual
from ode import Solver
from operators import (
    PROBES,
    Batched,
    Field,
    PerExample,
    dimension,
    fold_in_all,
    inner,
    scale,
    squared_norm,
    standard_normal,
    value_and_divergence,
    value_and_probed_divergence,
)
from parameterization import DecoderFn, ScoreFn
from sde_lib import SDE
from time_sampling import Importance, Uniform, draws


@dataclasses.dataclass(frozen=True)
class Divergence:
    """The way to compute div s: 'exact' (d tangents), or probes 'rademacher' | 'gaussian'."""

    kind: str = "rademacher"
    num_probes: int = 1

    def __post_init__(self) -> None:
        one_of("divergence", self.kind, ["exact", *PROBES])
        positive(num_probes=self.num_probes)

    def draw(self, keys: Key[Array, " b"], x: Batched) -> Float[Array, "b p *d"]:
        """Probes of every example, fixed over a solve; no probes (p = 0) when exact."""
        if self.kind == "exact":
            return jnp.zeros((x.shape[0], 0, *x.shape[1:]), x.dtype)
        draws = [PROBES[self.kind](fold_in_all(keys, i), x) for i in range(self.num_probes)]
        return jnp.stack(draws, axis=1)

    def __call__(
        self, field: Field, x: Batched, probes: Float[Array, "b p *d"]
    ) -> tuple[Batched, PerExample]:
        """(s, div s or its unbiased estimate)."""
        if self.kind == "exact":
            return value_and_divergence(field, x)
        return value_and_probed_divergence(field, x, jnp.moveaxis(probes, 1, 0))


class OdeLikelihood(NamedTuple):
    """Result of `ode_log_likelihood`, one entry per example.

    Attributes:
        log_p: in nats.
        latent: x_T.
        nfe: evaluations of s and div s.
        converged: whether T was reached.
        error: estimate of |error| of log_p in nats, to first order; NaN where steps are adaptive.
    """

    log_p: PerExample
    latent: Batched
    nfe: Int[Array, " b"]
    converged: Bool[Array, " b"]
    error: PerExample


def ode_log_likelihood(
    score_fn: ScoreFn,
    sde: SDE,
    x: Batched,
    keys: Key[Array, " b"],
    *,
    t_min: float,
    solver: Solver,
    divergence: Divergence,
) -> OdeLikelihood:
    """log p(x) of the probability-flow ODE from t_min to T, in nats.

    div f = a d is exact, so only div s is probed. Reference: Song et al. 2021,
    https://arxiv.org/abs/2011.13456, eq. (39); Chen et al. 2018, https://arxiv.org/abs/1806.07366.
    """
    d = dimension(x)

    def field(t: PerExample, state: tuple, probes: Array) -> tuple[Batched, PerExample]:
        x_t, _ = state
        score, div_score = divergence(lambda y: score_fn(y, t), x_t, probes)
        div_drift = d * sde.drift_coefficient(t) - 0.5 * sde.g2(t) * div_score
        return sde.ode_drift(score, x_t, t), div_drift / d

    # The log-determinant per dimension: its error then counts in the unit of one coordinate.
    start = (x, jnp.zeros(x.shape[:1], x.dtype))
    probes = divergence.draw(keys, x)
    end = solver.integrate(field, t_min, sde.T, start, probes, sde.ode_variable)
    latent, log_det = end.state
    log_p = sde.prior_logp(latent) + d * log_det
    error_x, error_log_det = end.error
    error = jnp.abs(d * error_log_det - inner(latent, error_x) / sde.prior_std**2)
    return OdeLikelihood(log_p, latent, end.nfe, end.converged, error)


def noised_start(
    decoder: DecoderFn, sde: SDE, draw: Draw, keys: Key[Array, " b"], t_min: float
) -> Draw:
    """x_t = α x + σ z at t_min, and log q(x|k) + log q(x_t|x) − log p(x|x_t), p the decoder.

    −log p(x) ≤ E[−log p_t(x_t) + log q(x_t|x) − log p(x|x_t)]; the difference of the last two is
    −log [p(x|x_t)/N(x_t/α; x, σ²/α² I)] − d log α.
    """
    t, z = jnp.full(draw.x.shape[:1], t_min, draw.x.dtype), standard_normal(keys, draw.x)
    x_t = sde.perturb(draw.x, t, z)
    change = decoder(draw.x, x_t, t) + dimension(x_t) * jnp.log(sde.alpha(t))
    return Draw(x_t, draw.log_q - change)


def gaussian_decoder(score_fn: ScoreFn, sde: SDE) -> DecoderFn:
    """The log ratio of the decoder N((x_t + σ² s)/α, σ²/α² I), in nats.

    (x0, x_t, t) ↦ ½(‖z‖² − ‖σ s + z‖²) with z = (x_t − α x0)/σ.
    """

    def log_ratio(x0: Batched, x: Batched, t: PerExample) -> PerExample:
        score = scale(sde.sigma(t), score_fn(x, t))
        z = scale(1.0 / sde.sigma(t), x - scale(sde.alpha(t), x0))
        return -inner(score, 0.5 * score + z)

    return log_ratio


def importance_average(
    log_weight: Callable[[Int[Array, ""]], tuple[PerExample, Any]], number: int
) -> tuple[PerExample, Any]:
    """(log (1/K) Σ_k w_k, the other results of all k) from k ↦ (log w_k, others), one k at a time.

    Reference: Burda et al. 2016, https://arxiv.org/abs/1509.00519, eq. (8).
    """
    if number == 1:
        value, others = log_weight(jnp.zeros((), jnp.int32))
        return value, jax.tree.map(lambda leaf: leaf[None], others)
    values, others = jax.lax.map(log_weight, jnp.arange(number, dtype=jnp.int32))
    return jax.nn.logsumexp(values, axis=0) - math.log(number), others


class Bound(NamedTuple):
    """The three terms of −log p(x) ≤ prior + diffusion + start, in nats per example.

    `start` is the reconstruction −E log p(x | x_{t_min}), or the entropy of q(x_{t_min} | x).
    `strata` are the parts of the integral, one for each time, whose sum is `diffusion`.
    """

    prior: PerExample
    strata: Float[Array, "n b"]
    start: PerExample

    @property
    def diffusion(self) -> PerExample:
        """The integral from t_min to T."""
        return jnp.sum(self.strata, axis=0)

    @property
    def largest(self) -> PerExample:
        """The largest part of one draw. If tails are heavy, it dominates a mean over examples."""
        return jnp.max(jnp.abs(self.strata), axis=0)

    @property
    def nll(self) -> PerExample:
        """The bound on −log p(x)."""
        return self.prior + self.diffusion + self.start


def variational_bound(
    score_fn: ScoreFn,
    sde: SDE,
    x: Batched,
    keys: Key[Array, " b"],
    *,
    proposal: Uniform | Importance,
    num_times: int,
    divergence: Divergence | None = None,
    decoder: DecoderFn | None = None,
    offset: bool = True,
) -> Bound:
    """Unbiased estimate of the variational bound with `num_times` stratified times per example.

    ½ g²‖s − ∇log q(x_t|x)‖² = ½ (g²/σ²) ‖σ s + z‖², weighted by 1/p(t).

    Args:
        score_fn: the score of the model.
        sde: of x_t given x.
        x: data, [B, *d].
        keys: one per example.
        proposal: law of the times; its t_min is the smallest time of the integral.
        num_times: draws of (t, z) per example.
        divergence: None for the form above (denoising); else the implicit form
            E‖σ s + z‖² = E[σ²‖s‖² + 2σ² div s] + d, whose divergence this object computes.
        decoder: of the head, as `ScoreModel.decoder`; None for the Gaussian one.
        offset: True for a bound on −log p(x); False for one on E −log p_{t_min}(x_{t_min}), which
            lacks the way from x_{t_min} to x (as published without offset).

    Reference: Song et al. 2021, https://arxiv.org/abs/2101.09258, theorem 3; Kingma et al. 2021,
    https://arxiv.org/abs/2107.00630, eq. (11) for the three terms.
    """

    def square(x_t: Batched, t: PerExample, z: Batched, keys: Key[Array, " b"]) -> PerExample:
        if divergence is None:
            return _residual_square(score_fn, sde, x_t, t, z)
        probes = divergence.draw(keys, x)
        return _implicit_square(score_fn, sde, x, x_t, t, divergence, probes)

    strata = _strata(square, sde, x, fold_in_all(keys, 0), proposal, num_times)
    t_min = jnp.full(x.shape[:1], proposal.t_min, x.dtype)
    start = 0.5 * dimension(x) * (1.0 + math.log(2 * math.pi) + 2.0 * jnp.log(sde.sigma(t_min)))
    if offset:
        x_t = sde.perturb(x, t_min, standard_normal(fold_in_all(keys, 1), x))
        decoder = decoder or gaussian_decoder(score_fn, sde)
        # ½‖z‖² of log N(x_t/α; x, σ²/α² I) is replaced by its mean.
        start = start - dimension(x) * jnp.log(sde.alpha(t_min)) - decoder(x, x_t, t_min)
    return Bound(sde.prior_kl(x), strata, start)


def discrete_bound(
    score_fn: ScoreFn,
    log_probability: DecoderFn,
    sde: SDE,
    x: Batched,
    keys: Key[Array, " b"],
    *,
    distance: float,
    proposal: Uniform | Importance,
    num_times: int,
) -> Bound:
    """Unbiased estimate of the bound on −log P(k), x the values of integers k without noise.

    Args:
        score_fn: the score of the model.
        log_probability: as `HeadModel.log_probability`.
        sde: of x_t given x.
        x: values of the levels, [B, *d].
        keys: one per example.
        distance: of two neighbouring values, for the control variate; larger noise hides the level.
        proposal: law of the times; its t_min is the smallest time of the integral.
        num_times: draws of (t, z) per example.

    Reference: Kingma et al. 2021, https://arxiv.org/abs/2107.00630, eq. (11).
    """

    def square(x_t: Batched, t: PerExample, z: Batched, keys: Key[Array, " b"]) -> PerExample:
        del keys
        known = _noise_share(sde, t, distance**2 / 12.0) * _centred_square(z)
        return _residual_square(score_fn, sde, x_t, t, z) + known

    strata = _strata(square, sde, x, fold_in_all(keys, 0), proposal, num_times)
    t_min = jnp.full(x.shape[:1], proposal.t_min, x.dtype)
    x_t = sde.perturb(x, t_min, standard_normal(fold_in_all(keys, 1), x))
    return Bound(sde.prior_kl(x), strata, -log_probability(x, x_t, t_min))


def cell_shares(edges: np.ndarray, width: float) -> np.ndarray:
    """½ ∫ E(σ s + z)² dW for one coordinate that is uniform in a cell, between log(σ/α) = edges.

    This is the part of the integral of a bound that the noise in a cell costs, in nats: x_t tells
    where in its cell x lies, which says nothing about the level. With J the Fisher information of
    y/τ, y = x0 + τ z, E(σ s + z)² = 1 − J.

    Args:
        edges: log(σ/α) at the ends of n bins, growing.
        width: of the cell, in model space.

    Returns:
        [n]. Their sum over all noise levels is log h less the reconstruction, −∞ for edges that
        go to −∞.
    """
    shares = []
    for low, high in itertools.pairwise(edges):
        nodes, weights = np.polynomial.legendre.leggauss(8)
        log_tau = 0.5 * (high - low) * nodes + 0.5 * (high + low)
        costs = np.asarray([1.0 - _cell_information(width / math.exp(v)) for v in log_tau])
        shares.append(0.5 * (high - low) * float(weights @ costs))  # dW = 2 d log τ
    return np.asarray(shares)


def _cell_information(w: float) -> float:
    """J = ∫ (φ(a) − φ(b))²/(w (Φ(b) − Φ(a))) dy of U[−w/2, w/2] + N(0, 1), a, b = ∓w/2 − y."""
    from scipy.special import ndtr  # here, since not every run needs it

    distance = np.linspace(-10.0, min(10.0, 0.5 * w), 2001)  # of y from the nearer edge, inwards
    far = w - distance
    phi = (np.exp(-0.5 * distance**2) - np.exp(-0.5 * far**2)) / math.sqrt(2.0 * math.pi)
    mass = ndtr(distance) - ndtr(-far)
    return float(2.0 * np.trapezoid(phi**2 / (w * np.maximum(mass, 1e-300)), distance))


def _strata(
    square: Callable[[Batched, PerExample, Batched, Key[Array, " b"]], PerExample],
    sde: SDE,
    x: Batched,
    keys: Key[Array, " b"],
    proposal: Uniform | Importance,
    num_times: int,
) -> Float[Array, "n b"]:
    """½ (g²/σ²) square(x_t, t, z, keys)/p(t)/n, one row for each of n stratified times."""

    def term(keys: Key[Array, "b 2"], u: PerExample) -> PerExample:
        t, z = proposal.quantile(u), standard_normal(keys[:, 0], x)
        weight = sde.rate(t) / proposal.density(t) / num_times
        return 0.5 * weight * square(sde.perturb(x, t, z), t, z, keys[:, 1])

    return draws(term, keys, num_times, x.dtype)


def _implicit_square(
    score_fn: ScoreFn, sde: SDE, x: Batched, x_t: Batched, t: PerExample,
    divergence: Divergence, probes: Float[Array, "b p *d"],
) -> PerExample:  # fmt: skip
    """σ²‖s‖² + 2σ² div s + d at x_t, with the mean of ‖σ s + z‖² (Hyvärinen 2005).

    Less the control variate c (‖x_t‖² − α²‖x‖² − σ² d), c = (σ²/(α² + σ²))²/σ²: the square of the
    score of unit-variance data.
    """
    score, div_score = divergence(lambda y: score_fn(y, t), x_t, probes)
    signal, noise = sde.alpha(t) ** 2, sde.sigma(t) ** 2
    variate = noise / (signal + noise) ** 2 * sde.centred_norm(x, x_t, t)
    return noise * (squared_norm(score) + 2.0 * div_score) + dimension(x) - variate


def _residual_square(
    score_fn: ScoreFn, sde: SDE, x_t: Batched, t: PerExample, z: Batched
) -> PerExample:
    """‖e1‖² − κ(‖z‖² − d), e1 = σ s + z: unbiased for E‖e1‖², whatever the score.

    The control variate, with κ of data of unit variance, removes the noise of ‖z‖² where the score
    cannot know z.
    """
    residual = first_order_residual(score_fn(x_t, t), sde.sigma(t), z)
    return squared_norm(residual) - _noise_share(sde, t, 1.0) * _centred_square(z)


def _noise_share(sde: SDE, t: PerExample, variance: float) -> PerExample:
    """κ = (α²v/(α²v + σ²))², the square of the coefficient of z in e1 for data of variance v."""
    signal = variance * sde.alpha(t) ** 2
    return (signal / (signal + sde.sigma(t) ** 2)) ** 2


def _centred_square(z: Batched) -> PerExample:
    """‖z‖² − d, of mean zero."""
    return squared_norm(z) - dimension(z)
