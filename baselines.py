"""Trivial models, the least that a trained one has to beat: log densities in nats, per example.

    uniform     log P(k) = −d log L
    histogram   log P(k) = Σ_j log π_{h(j), k_j},   h(j) the position j, or its channel
    Gaussian    log N(x; μ, C) = −½‖W(x − μ)‖² + log|det W| − ½ d log 2π,   WᵀW = C⁻¹
                C = (n S + c diag τ)/(n + c) + diag ν

`marginals` takes the statistics n, μ, S and π from the training data, this file fits and applies
the models, `dequantization` turns nats into bits/dim, and `run_lib.baseline_estimators` makes of
each an estimator whose rows stand beside those of the network.

Shrinkage: S, of maximum likelihood, is joined by c = 5 examples without correlation, as many as
smooth a histogram, of variances τ. Pixels share a unit, so theirs is the mean variance of all,
τ_j = tr S/d: one that is constant in training may still vary. Real coordinates have units of their
own, and C must scale with them: τ_j = S_jj. The ν_j > 0 is what the data cannot say: the variance
of the noise of dequantisation (`Pixels.moments_of_cells`), or a step of float32. So C ≥ diag ν is
never singular. Measured on test images, c = 0, 1, 5, 20: digits 2.909, 2.911, 2.929, 3.000
bits/dim, parts of MNIST 5.53, 5.39, 5.45, 5.60 and CIFAR-10 5.89, 5.16, 5.01, 5.13.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

import marginals
from operators import Batched, PerExample, dimension, squared_norm

Images = UInt8[Array, "b *d"]


def log_uniform(image: Images, levels: int) -> PerExample:
    """log P(k) = −d log L, in nats [B]; log2 L bits/dim."""
    return jnp.full(image.shape[:1], -dimension(image) * math.log(levels))


def histograms_of(shape: tuple[int, ...], levels: int) -> Int[np.ndarray, "*d"]:
    """h(j) of every coordinate: its number, or where these are too many that of its channel.

    Vectors have one channel.
    """
    if marginals.by_position(shape, levels):
        return np.arange(math.prod(shape)).reshape(shape)
    return np.broadcast_to(np.arange(shape[-1]) if len(shape) > 1 else 0, shape)


def fit_histogram(
    batches: Iterable[np.ndarray], shape: tuple[int, ...], levels: int
) -> Float[np.ndarray, "h l"]:
    """log π of every histogram of `histograms_of`, smoothed by `marginals.log_histogram`."""
    number = int(histograms_of(shape, levels).max()) + 1
    found = marginals.counts((batch.reshape(-1, number) for batch in batches), levels)
    return marginals.log_histogram(found)


def log_histogram(
    log_pi: Float[Array, "h l"], histogram: Int[np.ndarray, "*d"], image: Images
) -> PerExample:
    """log P(k) = Σ_j log π_{h(j), k_j}, in nats [B]."""
    return jnp.sum(log_pi[histogram[None], image], axis=tuple(range(1, image.ndim)))


class Gaussian(NamedTuple):
    """N(μ, C) as mean [*d], W with WᵀW = C⁻¹, [d, *d] or its diagonal [*d], and log|det W|."""

    mean: jax.Array | np.ndarray
    whitening: jax.Array | np.ndarray
    log_det: jax.Array | np.ndarray


def fit_pixels(
    found: marginals.Moments, noise: Float[np.ndarray, " n"], shape: tuple[int, ...]
) -> Gaussian:
    """The Gaussian of dequantised data.

    By the law of total variance its S + diag ν is Cov E[y | k] + diag E Var[y | k].

    Args:
        found: moments of the means E[y | k] of the cells.
        noise: ν, the mean over the data of the variances Var[y | k], [n].
        shape: of an example, of n coordinates.
    """
    variances = found.variances
    return _fit(found, np.full_like(variances, variances.mean()), noise, shape)


def fit_reals(found: marginals.Moments, shape: tuple[int, ...]) -> Gaussian:
    """The Gaussian of real values; ν_j = h²/12 with h = 2⁻²³ max(|μ_j|, 1), a step of float32."""
    step = np.finfo(np.float32).eps * np.maximum(np.abs(found.mean), 1.0)
    return _fit(found, found.variances, step**2 / 12.0, shape)


def _fit(
    found: marginals.Moments, target: np.ndarray, noise: np.ndarray, shape: tuple[int, ...]
) -> Gaussian:
    """C = (n S + c diag τ)/(n + c) + diag ν, inverted."""
    weight = marginals.SMOOTHING / (found.number + marginals.SMOOTHING)
    mean, added = found.mean.reshape(shape), weight * target + noise
    if found.covariance.ndim == 1:
        whitening = 1.0 / np.sqrt((1.0 - weight) * found.covariance + added)
        return Gaussian(mean, whitening.reshape(shape), np.log(whitening).sum())
    lower = np.linalg.cholesky((1.0 - weight) * found.covariance + np.diag(added))
    whitening = np.linalg.solve(lower, np.eye(len(lower)))
    log_det = -np.log(np.diagonal(lower)).sum()
    return Gaussian(mean, whitening.reshape(-1, *shape), log_det)


def log_gaussian(fitted: Gaussian, x: Batched) -> PerExample:
    """log N(x; μ, C) in nats [B]."""
    whitening, gap = jnp.asarray(fitted.whitening), x - fitted.mean[None]
    if whitening.ndim == gap.ndim:
        axes = tuple(range(1, gap.ndim))
        white = jnp.tensordot(gap, whitening, (axes, axes), precision=jax.lax.Precision.HIGHEST)
    else:
        white = gap * whitening[None]
    constant = jnp.asarray(fitted.log_det - 0.5 * dimension(x) * math.log(2.0 * math.pi))
    return constant - 0.5 * squared_norm(white)
