"""The ELBO against closed forms of Gaussian data, right and wrong scores, and its λ-family."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elbo import ESTIMATORS, elbo, gap_factor, prior_term, published_elbo
from likelihood import Divergence
from sde_lib import SDES, VPSDE
from toy_data import gaussian

pytestmark = pytest.mark.usefixtures("compiled_at_o0", "x64")
D, N = 3, 20_000
EXACT, PROBE, NORMAL = Divergence("exact"), Divergence("rademacher"), Divergence("gaussian")


def keys(number, seed=0):
    return jax.random.split(jax.random.key(seed), number)


@functools.cache
def law(variance, d=D):
    return gaussian(jnp.zeros((d,)), variance)


@functools.partial(jax.jit, static_argnames=("name", "sde", "data", "num_times", "divergence"))
def estimate(name, sde, data, x, keys, kappa, *, num_times=1, divergence=PROBE):
    """The estimator for the score κ s*, s* the exact score of the data."""
    score_fn = lambda y, t: kappa * data.score(y, t, sde)  # noqa: E731
    return ESTIMATORS[name](score_fn, sde, x, keys, num_times=num_times, divergence=divergence)


def many(name, sde, variance, x, kappa=1.0, **options):
    """`N` estimates at one point x, each of one draw."""
    tiled = jnp.tile(jnp.asarray(x)[None], (N, 1))
    return np.asarray(estimate(name, sde, law(variance, len(x)), tiled, keys(N), kappa, **options))


def within(values, expected):
    return abs(values.mean() - expected) < 4 * values.std() / math.sqrt(len(values)) + 1e-12


def gaussian_elbo(variance, x):
    """log N(x; 0, S) + ½ d log v_T + ½ (1/v_T − 1)(u_T‖x‖² + d(1 − u_T)), u_T = α_T², VP."""
    u = math.exp(-10.05)
    v, d, square = 1.0 + (variance - 1.0) * u, len(x), float(np.sum(np.square(x)))
    log_normal = -0.5 * (d * math.log(2 * math.pi * variance) + square / variance)
    return log_normal + 0.5 * d * math.log(v) + 0.5 * (1 / v - 1) * (u * square + d * (1 - u))


@pytest.mark.parametrize(
    ("variance", "printed"), [(0.25, -1.572374), (1.0, -3.651816), (4.0, -5.731257)]
)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_exact_score_gives_the_log_likelihood(name, variance, printed):
    x = math.sqrt(variance) * np.asarray([0.3, -0.7, 1.1])
    expected = gaussian_elbo(variance, x)
    np.testing.assert_allclose(expected, printed, atol=1e-6)
    for divergence in (EXACT, PROBE, NORMAL):
        assert within(many(name, VPSDE(), variance, x, divergence=divergence), expected)


def quadrature(sde, variance, kappa, square, d):
    """ELBO at ‖x‖² = square for the score −κ y/v, its integral by Gauss–Legendre in r, t = r²."""
    nodes, weights = np.polynomial.legendre.leggauss(400)
    r = 0.5 * math.sqrt(sde.T) * (1.0 + nodes)
    t = jnp.asarray(r**2)
    alpha2, sigma2 = np.asarray(sde.alpha(t)) ** 2, np.asarray(sde.sigma(t)) ** 2
    v, g2, a = alpha2 * variance + sigma2, np.asarray(sde.g2(t)), sde.drift_coefficient(t)
    mean_square = alpha2 * square + d * sigma2
    h = 0.5 * g2 * kappa**2 * mean_square / v**2 - g2 * kappa * d / v - d * np.asarray(a)
    x = jnp.full((1, d), math.sqrt(square / d))
    return float(prior_term(sde, x)[0]) - math.sqrt(sde.T) * float(weights @ (r * h))


@pytest.mark.parametrize("sde_name", SDES)
@pytest.mark.parametrize("kappa", [0.0, 0.8, 1.2])
def test_estimators_are_unbiased_for_wrong_scores_and_all_sdes(sde_name, kappa):
    sde = SDES[sde_name]()
    x, variance = np.asarray([0.8, -0.5]), 0.5
    expected = quadrature(sde, variance, kappa, float(x @ x), 2)
    for name in ESTIMATORS:
        assert within(many(name, sde, variance, x, kappa), expected), name


def test_zero_network_has_its_closed_form():
    """−½ d log 2π − ½(u_T‖x‖² + d σ_T²) − ½ d B_T."""
    x = np.asarray([0.8, -0.5])
    u = math.exp(-10.05)
    expected = -math.log(2 * math.pi) - 0.5 * (u * 0.89 + 2 * (1 - u)) - 10.05
    assert within(many("published", VPSDE(), 1.0, x, 0.0), expected)
    low = many("low_variance", VPSDE(), 1.0, x, 0.0)
    assert within(low, expected)


def test_several_draws_keep_the_mean_and_stratification_lowers_the_variance():
    x = np.asarray([0.8, -0.5])
    expected = quadrature(VPSDE(), 0.5, 0.8, float(x @ x), 2)
    one = many("low_variance", VPSDE(), 0.5, x, 0.8)
    eight = many("low_variance", VPSDE(), 0.5, x, 0.8, num_times=8)
    assert within(eight, expected)
    assert eight.var() < one.var() / 8
    published = many("published", VPSDE(), 0.5, x, 0.8, num_times=8)
    assert within(published, expected)
    ratio = published.var() * 8 / many("published", VPSDE(), 0.5, x, 0.8).var()
    assert abs(ratio - 1.0) < 0.2


def test_control_variate_and_closed_forms_lower_the_variance_a_hundredfold():
    """d = 16, exact score at a fixed x: published standard deviation 33.3, here below 3.33 × 2."""
    x = np.random.default_rng(0).standard_normal(16)
    published = many("published", VPSDE(), 1.0, x)
    low = many("low_variance", VPSDE(), 1.0, x)
    assert 28 < published.std() < 39
    assert low.std() < 0.2 * published.std()


def wrong_score_bound(kappa, lmbd, variance=4.0):
    """E ELBO_λ = E log q_0 − KL(q_T ‖ π) − factor × ½ ∫ g² (1 − κ)²/v dt, in one dimension."""
    u = math.exp(-10.05)
    v = 1.0 + (variance - 1.0) * u
    entropy = -0.5 * (math.log(2 * math.pi * variance) + 1.0)
    kl = 0.5 * (v - 1.0 - math.log(v))
    # ∫ β/v dt = ∫ dB / (1 + (S − 1) e^{−B}) = log((e^{B_T} + S − 1)/S)
    fisher = 0.5 * (1 - kappa) ** 2 * math.log((math.exp(10.05) + variance - 1.0) / variance)
    return entropy - kl - gap_factor(lmbd) * fisher


@pytest.mark.parametrize(
    ("kappa", "lmbd", "printed"),
    [
        (1.0, 0.0, -2.112086), (1.0, 0.9, -2.112086), (0.9, 0.0, -2.155405), (1.1, 0.0, -2.155405),
        (0.9, 0.5, -2.160820), (0.9, -1.0, -2.160820), (0.9, 0.9, -2.243126),
        (0.9, 0.99, -3.216833), (0.9, -10.0, -2.253858),
    ],
)  # fmt: skip
def test_table_of_wrong_scores_over_the_family(kappa, lmbd, printed):
    np.testing.assert_allclose(wrong_score_bound(kappa, lmbd), printed, atol=2e-6)


@pytest.mark.parametrize("kappa", [0.9, 1.1])
def test_estimates_at_lambda_zero_are_those_of_the_table(kappa):
    x = 2.0 * jax.random.normal(jax.random.key(3), (N, 1))
    for name in ESTIMATORS:
        values = np.asarray(estimate(name, VPSDE(), law(4.0, 1), x, keys(N), kappa, num_times=4))
        assert within(values, wrong_score_bound(kappa, 0.0))


def model_log_likelihood(kappa, lmbd, variance=4.0, steps=200_000):
    """E_{q_0} log p of member λ with the score κ s*: a Gaussian, its variance by Runge–Kutta.

    dW/dτ = 2 m W + (1 − λ) β,  m = −(1 − λ/2) κ β/v + β/2, from W = 1 at τ = 0.
    """
    tau = np.linspace(0.0, 1.0, steps + 1)
    t = 1.0 - tau
    beta = 0.1 + 19.9 * t
    v = 1.0 + (variance - 1.0) * np.exp(-(0.1 * t + 9.95 * t**2))
    m = -(1 - 0.5 * lmbd) * kappa * beta / v + 0.5 * beta
    # Linear equation: W(1) = e^{2M(1)} + ∫ e^{2(M(1) − M)} (1 − λ) β dτ.
    dtau = 1.0 / steps
    big_m = np.concatenate([[0.0], np.cumsum(0.5 * (m[1:] + m[:-1]) * dtau)])
    source = np.exp(2 * (big_m[-1] - big_m)) * (1 - lmbd) * beta
    w = math.exp(2 * big_m[-1]) + float(np.sum(0.5 * (source[1:] + source[:-1]) * dtau))
    return -0.5 * (math.log(2 * math.pi * w) + variance / w)


@pytest.mark.parametrize(
    ("lmbd", "printed"),
    [(0.0, -2.123638), (0.5, -2.138275), (0.9, -2.208082), (0.99, -2.249792), (-1.0, -2.118345),
     (-10.0, -2.115297)],
)  # fmt: skip
def test_the_bound_is_below_the_likelihood_of_every_member(lmbd, printed):
    exact = model_log_likelihood(0.9, lmbd)
    np.testing.assert_allclose(exact, printed, atol=5e-6)
    assert wrong_score_bound(0.9, lmbd) < exact


def test_factor_of_the_gap():
    assert gap_factor(0.0) == 1.0
    assert gap_factor(1.0) == math.inf
    np.testing.assert_allclose(gap_factor(-2.0), 1.0 + 4.0 / 12.0, rtol=1e-12)
    with pytest.raises(ValueError, match=r"lmbd=1.5: need λ <= 1"):
        gap_factor(1.5)


def test_noise_of_an_example_depends_on_its_key_only():
    sde, data = VPSDE(), law(1.0, 2)
    x = jax.random.normal(jax.random.key(0), (6, 2))
    score_fn = lambda y, t: data.score(y, t, sde)  # noqa: E731
    for method in (elbo, published_elbo):
        whole = method(score_fn, sde, x, keys(6), num_times=3, divergence=PROBE)
        part = method(score_fn, sde, x[2:4], keys(6)[2:4], num_times=3, divergence=PROBE)
        np.testing.assert_allclose(whole[2:4], part, rtol=1e-12)
