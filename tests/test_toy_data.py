"""Mixtures: density against NumPy, score against autodiff and Bayes' rule, moments of samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal

from sde_lib import VESDE, VPSDE, LinearVESDE, SubVPSDE
from toy_data import Mixture, gaussian, weighted_points

SDES = [VPSDE(), SubVPSDE(), VESDE(), LinearVESDE(5.0)]
every_sde = pytest.mark.parametrize("sde", SDES, ids=lambda sde: type(sde).__name__)
WEIGHTS = np.asarray([0.2, 0.5, 0.3])
MEANS = np.asarray([[1.0, 0.0, 2.0, 0.5], [-1.0, 0.5, 0.0, 1.0], [0.0, -2.0, 1.0, 1.0]])
VARIANCES = np.asarray([0.25, 0.1, 0.5])


def mixture(shape=(4,)):
    means = jnp.asarray(MEANS.reshape(3, *shape))
    return Mixture(jnp.asarray(WEIGHTS), means, jnp.asarray(VARIANCES))


def points():
    return weighted_points(jnp.asarray(WEIGHTS), jnp.asarray(MEANS))


def states(number=6):
    rng = np.random.default_rng(0)
    t = jnp.asarray(np.linspace(0.05, 1.0, number))
    return jnp.asarray(rng.standard_normal((number, 4))), t


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("sde", [VPSDE(), LinearVESDE()], ids=str)
def test_density_at_time_zero_is_the_density_of_the_data(sde):
    x = states()[0]
    components = [
        w * multivariate_normal(m, v).pdf(np.asarray(x))
        for w, m, v in zip(WEIGHTS, MEANS, VARIANCES, strict=True)
    ]
    log_p = mixture().log_prob(x, jnp.zeros(6), sde)
    np.testing.assert_allclose(log_p, np.log(sum(components)), rtol=1e-12)


@pytest.mark.usefixtures("x64")
@every_sde
def test_density_at_time_t_is_the_convolution(sde):
    """p_t(x) = E p(x | x0) over Gaussian x0, by Gauss–Hermite quadrature in one dimension."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    x, t = jnp.asarray([[0.7]]), jnp.asarray([0.8])
    alpha, sigma = float(sde.alpha(t)[0]), float(sde.sigma(t)[0])
    x0 = -0.4 + np.sqrt(0.3) * nodes
    kernel = np.exp(-0.5 * ((0.7 - alpha * x0) / sigma) ** 2) / (np.sqrt(2 * np.pi) * sigma)
    expected = np.log(np.sum(weights * kernel) / np.sqrt(2 * np.pi))
    log_p = gaussian(jnp.asarray([-0.4]), 0.3).log_prob(x, t, sde)
    assert float(log_p[0]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.usefixtures("x64")
@every_sde
@pytest.mark.parametrize("data", [mixture, points], ids=["mixture", "points"])
def test_score_is_gradient_of_log_density(data, sde):
    law, (x, t) = data(), states()
    gradient = jax.grad(lambda y: jnp.sum(law.log_prob(y, t, sde)))(x)
    np.testing.assert_allclose(law.score(x, t, sde), gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("x64")
@every_sde
def test_score_of_points_is_tweedies_formula(sde):
    """s = (α E[x0 | x_t] − x_t)/σ², the posterior a finite sum over the points."""
    x, t = states()
    alpha, sigma = (np.asarray(c(t)) for c in (sde.alpha, sde.sigma))
    for b in range(6):
        squares = ((np.asarray(x[b]) - alpha[b] * MEANS) ** 2).sum(axis=1)
        log_posterior = np.log(WEIGHTS) - squares / (2 * sigma[b] ** 2)
        posterior = np.exp(log_posterior - log_posterior.max())
        x0_mean = (posterior / posterior.sum()) @ MEANS
        expected = (alpha[b] * x0_mean - np.asarray(x[b])) / sigma[b] ** 2
        score = points().score(x[b : b + 1], t[b : b + 1], sde)[0]
        np.testing.assert_allclose(score, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_images_and_vectors_have_the_same_law():
    sde, (x, t) = VPSDE(), states()
    images = mixture((2, 2))
    np.testing.assert_allclose(
        images.log_prob(x.reshape(6, 2, 2), t, sde), mixture().log_prob(x, t, sde), rtol=1e-14
    )
    np.testing.assert_allclose(
        images.score(x.reshape(6, 2, 2), t, sde).reshape(6, 4),
        mixture().score(x, t, sde),
        rtol=1e-13,
    )
    assert images.sample(jax.random.key(0), 3).shape == (3, 2, 2)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("data", [mixture, points], ids=["mixture", "points"])
def test_samples_have_the_moments_of_the_mixture(data):
    n = 20_000
    x = np.asarray(data().sample(jax.random.key(0), n))
    variances = np.asarray(data().variances)
    mean = WEIGHTS @ MEANS
    second = np.einsum("k,ki,kj->ij", WEIGHTS, MEANS, MEANS) + WEIGHTS @ variances * np.eye(4)
    outer = np.einsum("bi,bj->bij", x, x)
    assert np.all(np.abs(x.mean(axis=0) - mean) < 4 * x.std(axis=0) / np.sqrt(n))
    assert np.all(np.abs(outer.mean(axis=0) - second) < 4 * outer.std(axis=0) / np.sqrt(n))


@pytest.mark.usefixtures("x64")
def test_weighted_points_are_drawn_with_their_weights():
    n = 20_000
    x = np.asarray(points().sample(jax.random.key(1), n))
    values, counts = np.unique(x, axis=0, return_counts=True)
    order = np.lexsort(MEANS.T[::-1])
    np.testing.assert_array_equal(values, MEANS[order])
    expected = WEIGHTS[order]
    error = np.sqrt(expected * (1 - expected) / n)
    assert np.all(np.abs(counts / n - expected) < 4 * error)
