"""ODE log-likelihood and variational bound against closed forms and quadrature, every SDE."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dequantization import Draw
from likelihood import (
    Bound,
    Divergence,
    gaussian_decoder,
    importance_average,
    noised_start,
    ode_log_likelihood,
    variational_bound,
)
from ode import Solver
from restarted import Restarted, noise_to_signal, time_of_noise
from sde_base import Variable
from sde_lib import (
    VESDE,
    VPSDE,
    LinearPath,
    LinearVESDE,
    SubVPSDE,
)
from time_sampling import Importance, Uniform
from toy_data import Mixture, gaussian

# Linear VE from 2e-3 to 3: with its published σmax = 50 the tests would only take longer.
CASES = [(VPSDE(), 1e-5), (SubVPSDE(), 1e-2), (VESDE(), 1e-5), (LinearVESDE(3.0), 2e-3)]
every_sde = pytest.mark.parametrize(
    ("sde", "t_min"), CASES, ids=[type(sde).__name__ for sde, _ in CASES]
)
EXACT = Solver("dopri8", 1e-12, 1e-12)
D, N, V0 = 2, 4000, 0.49


def mixture():
    means = jnp.asarray([[1.0, 0.0], [-1.0, 0.5], [0.0, -2.0]])
    return Mixture(jnp.asarray([0.2, 0.5, 0.3]), means, jnp.asarray([0.25, 0.1, 0.5]))


def keys(number, seed=0):
    return jax.random.split(jax.random.key(seed), number)


def integral(function, t_min, end=1.0):
    """∫ over [t_min, end] by Gauss–Legendre on half decades; `function` maps an array of times."""
    nodes, weights = np.polynomial.legendre.leggauss(24)
    edges = np.geomspace(t_min, 0.9 * end, 12)
    edges = np.asarray([*edges, 0.98 * end, end])
    half = np.diff(edges)[:, None] / 2
    t = (edges[:-1, None] + half * (1.0 + nodes)).ravel()
    return float(np.sum((half * weights).ravel() * np.asarray(function(jnp.asarray(t)))))


def within(values, expected, errors=4.0):
    """The mean of the values agrees with `expected` within so many standard errors or rounding."""
    values = np.asarray(values)
    rounding = 1e-11 * max(1.0, abs(expected))
    return abs(values.mean() - expected) < errors * values.std() / np.sqrt(len(values)) + rounding


def ode(law, sde, x, t_min, divergence, solver=EXACT, seed=0):
    @jax.jit
    def solve(x, keys):
        return ode_log_likelihood(
            lambda y, t: law.score(y, t, sde), sde, x, keys,
            t_min=t_min, solver=solver, divergence=divergence,
        )  # fmt: skip

    return solve(x, keys(x.shape[0], seed))


@pytest.mark.usefixtures("x64")
@every_sde
def test_ode_likelihood_of_a_gaussian(sde, t_min):
    """x_T = x √(v_T/v), log p = log π(x_T) + ½ d ln(v_T/v); one probe: H = −I/v is exact."""
    x, v0 = 0.6 * jax.random.normal(jax.random.key(1), (3, 2, 2)), 0.36
    t = jnp.asarray([t_min, 1.0])
    v_min, v_end = np.asarray(sde.alpha(t) ** 2 * v0 + sde.sigma(t) ** 2)
    law = gaussian(jnp.zeros((2, 2)), v0)
    result = ode(law, sde, x, t_min, Divergence("rademacher"), Solver("dopri8", 1e-11, 1e-11))
    latent = np.asarray(x) * np.sqrt(v_end / v_min)
    square = (latent**2).sum(axis=(1, 2)) / sde.prior_std**2
    expected = -0.5 * square - 2.0 * np.log(2 * np.pi * sde.prior_std**2)
    expected += 2.0 * np.log(v_end / v_min)
    np.testing.assert_allclose(result.latent, latent, rtol=1e-8)
    np.testing.assert_allclose(result.log_p, expected, rtol=1e-8)
    assert bool(jnp.all(result.converged))


@pytest.mark.usefixtures("x64")
@every_sde
def test_ode_transports_the_density_of_a_mixture(sde, t_min):
    """With the true law at T in place of the prior, log p is that of the mixture at t_min."""
    law = mixture()
    x = law.sample(jax.random.key(0), 4)
    result = ode(law, sde, x, t_min, Divergence("exact"))
    end, begin = jnp.ones((4,)), jnp.full((4,), t_min)
    log_p = result.log_p - sde.prior_logp(result.latent) + law.log_prob(result.latent, end, sde)
    np.testing.assert_allclose(log_p, law.log_prob(x, begin, sde), rtol=0, atol=1e-9)


@pytest.mark.usefixtures("x64")
def test_the_linear_path_is_vp_at_other_times():
    """Between equal ratios of noise to signal the ODE takes x/α the same way, in the same volume.

    And with the true law at T for the prior, each log p is that of the mixture at t_min.
    """
    law, vp, t_vp = mixture(), VPSDE(), 1e-3
    ratio = float(jnp.sqrt(noise_to_signal(vp, jnp.asarray(vp.T))))
    linear = LinearPath(ratio / (1.0 + ratio))
    t_linear = float(time_of_noise(linear, noise_to_signal(vp, jnp.asarray(t_vp))))
    y = law.sample(jax.random.key(0), 4)
    found = []
    for sde, t in ((vp, t_vp), (linear, t_linear)):
        first, last = (sde.alpha(jnp.asarray(s)) for s in (t, sde.T))
        result = ode(law, sde, first * y, t, Divergence("exact"))
        volume = result.log_p - sde.prior_logp(result.latent) + D * jnp.log(first / last)
        found.append((result.latent / last, volume))
        times = [jnp.full((4,), s) for s in (t, sde.T)]
        log_p = result.log_p - sde.prior_logp(result.latent)
        log_p = log_p + law.log_prob(result.latent, times[1], sde)
        np.testing.assert_allclose(log_p, law.log_prob(first * y, times[0], sde), atol=1e-8)
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kappa", [0.0, 0.6, 1.0])
def test_bound_on_the_linear_path_is_unbiased(kappa):
    """As those of the other SDEs below; its prior has σ_T = T."""
    sde, t_min = LinearPath(), 1e-3
    x = jnp.tile(jnp.asarray([[0.8, -0.5]]), (N, 1))
    bound = sampled_bound(data(), Importance(sde, t_min), x, keys(N), kappa)
    expected = exact_bound(sde, t_min, kappa, 0.8**2 + 0.5**2)
    np.testing.assert_allclose(bound.prior, expected[0], rtol=1e-9)
    assert within(bound.diffusion, expected[1])
    assert within(bound.start, expected[2])


def repeated_ode(divergence, number=800):
    """log p of one point of a mixture in R³, many times, each with its own probes."""
    means = jnp.asarray([[1.0, 0.0, 1.0], [-1.0, 0.5, 0.0], [0.0, -1.0, -1.0]])
    law = Mixture(jnp.asarray([0.3, 0.4, 0.3]), means, jnp.asarray([0.25, 0.1, 0.5]))
    x = jnp.tile(jnp.asarray([[0.3, -0.4, 0.2]]), (number, 1))
    solver = Solver("tsit5", 1e-4, 1e-4)
    return np.asarray(ode(law, VPSDE(), x, 1e-2, divergence, solver, seed=3).log_p)


@pytest.mark.usefixtures("x64")
def test_the_largest_draw_of_a_bound_is_that_of_its_strata():
    strata = jnp.asarray([[1.0, -2.0], [3.0, 1.0], [-4.0, 0.5]])
    bound = Bound(jnp.zeros(2), strata, jnp.zeros(2))
    np.testing.assert_array_equal(bound.largest, [4.0, 2.0])


class GeometricInTime(VESDE):
    """VE whose ODE takes its steps in t, as published."""

    @property
    def ode_variable(self):
        return Variable("t²", lambda t: t**2, lambda c: c**0.5)  # of which the root is t


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("tolerance", [1e-4, 3e-5])
def test_the_ode_of_ve_costs_and_errs_no_more_than_in_t(tolerance):
    """Data of variances from 1e-5 to 1, as those of images, whose flow has a closed form."""
    variance = 10.0 ** jnp.linspace(-5.0, 0.0, 16)
    x = jnp.sqrt(variance)[None] * jax.random.normal(jax.random.key(0), (8, 16), jnp.float64)
    found = {}
    for sde in (VESDE(), GeometricInTime()):

        def score_fn(x, t, sde=sde):
            return -x / (variance[None] + sde.sigma(t)[:, None] ** 2)

        ends = variance[None] + sde.sigma(jnp.asarray([1e-5, 1.0]))[:, None] ** 2
        growth = jnp.sqrt(ends[1] / ends[0])[None]
        exact = sde.prior_logp(x * growth) + jnp.log(growth).sum()
        solver = Solver("dopri5", tolerance, tolerance)
        result = jax.jit(
            lambda x, sde=sde, score_fn=score_fn, solver=solver: ode_log_likelihood(
                score_fn, sde, x, jax.random.split(jax.random.key(0), 8),
                t_min=1e-5, solver=solver, divergence=Divergence("exact"),
            )
        )(x)  # fmt: skip
        found[type(sde)] = np.abs(result.log_p - exact).mean(), result.nfe.mean()
    assert found[VESDE][0] <= found[GeometricInTime][0]
    assert found[VESDE][1] <= found[GeometricInTime][1]


def test_probed_ode_likelihood_is_unbiased_and_more_probes_have_less_variance():
    exact = repeated_ode(Divergence("exact"), number=1)[0]
    one = repeated_ode(Divergence("rademacher", 1))
    four = repeated_ode(Divergence("rademacher", 4))
    normal = repeated_ode(Divergence("gaussian", 1))
    for values in (one, four, normal):
        # The trajectory is that of the exact solve, up to the tolerance of the solver.
        assert abs(values.mean() - exact) < 4 * values.std() / np.sqrt(len(values)) + 1e-3
    # Quarter of the variance; 4 √(2 · 2/n) is at least 4 standard errors of the ratio here.
    assert four.var() / one.var() == pytest.approx(0.25, rel=4 * math.sqrt(4 / len(one)))
    assert normal.var() > 2 * one.var()


@pytest.mark.usefixtures("x64")
def test_probes_of_an_example_depend_on_its_key_only():
    x = mixture().sample(jax.random.key(0), 4)
    draw = Divergence("gaussian", 3).draw
    whole = draw(keys(4), x)
    assert whole.shape == (4, 3, 2)
    np.testing.assert_array_equal(whole[1:3], draw(keys(4)[1:3], x[1:3]))
    assert len(np.unique(whole)) == whole.size
    assert Divergence("exact").draw(keys(4), x).shape == (4, 0, 2)


@pytest.mark.usefixtures("x64")
def test_unfinished_solves_are_marked():
    x = mixture().sample(jax.random.key(0), 2)
    solver = Solver("tsit5", 1e-10, 1e-10, max_steps=8)
    result = ode(mixture(), VPSDE(), x, 1e-3, Divergence("exact"), solver)
    assert not bool(jnp.any(result.converged))


def moments(sde, t):
    """α², σ² and v = α² V0 + σ²."""
    t = jnp.asarray(t)
    alpha2, sigma2 = (np.asarray(c(t)) ** 2 for c in (sde.alpha, sde.sigma))
    return alpha2, sigma2, alpha2 * V0 + sigma2


def exact_bound(sde, t_min, kappa, square):
    """The bound for the score −κ x/v at a point with ‖x‖² = square, its integral by quadrature.

    e1 = (1 − κ σ²/v) z − κ α σ x/v, so that E‖e1‖² = d (1 − κ σ²/v)² + κ² α² σ² ‖x‖²/v².
    """

    def residual(t):
        alpha2, sigma2, v = moments(sde, t)
        return D * (1 - kappa * sigma2 / v) ** 2 + kappa**2 * alpha2 * sigma2 * square / v**2

    def integrand(t):
        return 0.5 * np.asarray(sde.g2(t)) / moments(sde, t)[1] * residual(t)

    alpha2, sigma2, _ = moments(sde, sde.T)
    ratio = sigma2 / sde.prior_std**2
    prior = 0.5 * (alpha2 * square / sde.prior_std**2 + D * (ratio - 1.0 - math.log(ratio)))
    alpha2, sigma2, _ = moments(sde, t_min)
    decoder = 0.5 * (D * math.log(2 * math.pi * sigma2 / alpha2) + residual(t_min))
    return float(prior), integral(integrand, t_min, sde.T), float(decoder)


@functools.partial(
    jax.jit, static_argnames=("law", "proposal", "num_times", "divergence", "offset")
)
def sampled_bound(
    law, proposal, x, keys, gain=1.0, shift=0.0, num_times=4, divergence=None, offset=True
):
    """The bound for the score gain · s + shift, s the exact score of `law`."""
    sde = proposal.sde
    score_fn = lambda y, t: gain * law.score(y, t, sde) + shift  # noqa: E731
    return variational_bound(
        score_fn, sde, x, keys, proposal=proposal, num_times=num_times,
        divergence=divergence, offset=offset,
    )  # fmt: skip


@functools.cache
def data(d=D, variance=V0):
    """The same object for every test: the law is a static argument."""
    return gaussian(jnp.zeros((d,)), variance)


@pytest.mark.usefixtures("x64")
@every_sde
@pytest.mark.parametrize("kind", [Uniform, Importance])
def test_bound_is_unbiased_for_right_and_wrong_scores(sde, t_min, kind):
    """Each term within 4 standard errors of its integral, interval factor included.

    A control variate or a time weight that is right only for the exact score fails at κ ≠ 1.
    """
    t_min = max(t_min, 2e-3) if kind is Uniform else t_min
    x = jnp.tile(jnp.asarray([[0.8, -0.5]]), (N, 1))
    for kappa in (0.0, 0.6, 1.0):
        bound = sampled_bound(data(), kind(sde, t_min), x, keys(N), kappa)
        expected = exact_bound(sde, t_min, kappa, 0.8**2 + 0.5**2)
        np.testing.assert_allclose(bound.prior, expected[0], rtol=1e-9)
        assert within(bound.diffusion, expected[1])
        assert within(bound.start, expected[2])
        total = bound.prior + bound.strata.sum(axis=0) + bound.start
        np.testing.assert_allclose(bound.nll, total, rtol=1e-14)


@pytest.mark.usefixtures("x64")
@every_sde
def test_error_of_equal_steps_is_that_of_log_p(sde, t_min):
    """To first order what half the steps would change, in nats; by the latent and by the volume."""
    x, divergence = mixture().sample(jax.random.key(2), 5), Divergence("exact")
    fine, coarse = (
        ode(mixture(), sde, x, t_min, divergence, Solver("dopri5", num_steps=n)) for n in (48, 24)
    )
    expected = np.abs(np.asarray(coarse.log_p - fine.log_p))
    np.testing.assert_allclose(fine.error, expected, rtol=0.05, atol=1e-9)
    assert expected.max() > 1e-8


@pytest.mark.usefixtures("x64")
@every_sde
@pytest.mark.parametrize("divergence", [Divergence("exact"), Divergence("gaussian")])
def test_implicit_form_has_the_same_mean(sde, t_min, divergence):
    """Right and wrong scores; what is right for the exact score only fails at κ ≠ 1."""
    t_min = max(t_min, 2e-3)
    x = jnp.tile(jnp.asarray([[0.8, -0.5]]), (N, 1))
    for kappa in (0.0, 0.6, 1.0):
        bound = sampled_bound(
            data(), Importance(sde, t_min), x, keys(N), kappa, divergence=divergence
        )
        expected = exact_bound(sde, t_min, kappa, 0.8**2 + 0.5**2)
        assert within(bound.diffusion, expected[1])


@pytest.mark.usefixtures("x64")
@every_sde
def test_bound_without_offset_is_that_of_the_noised_data(sde, t_min):
    """−E log p_{t_min}(x_{t_min}) for the exact score, its entropy in place of the decoder."""
    x = math.sqrt(V0) * jax.random.normal(jax.random.key(9), (N, D))
    bound = sampled_bound(data(), Importance(sde, t_min), x, keys(N), offset=False)
    v_end, v_min = (float(moments(sde, t)[2]) for t in (1.0, t_min))
    prior2 = sde.prior_std**2
    expected = math.log(2 * math.pi * prior2) + v_end / prior2 - math.log(v_end / v_min)
    assert within(bound.nll, 0.5 * D * expected)


@pytest.mark.usefixtures("x64")
@every_sde
def test_an_sde_that_starts_anew_has_the_transition_of_its_base(sde, t_min):
    """Chapman–Kolmogorov; W' has the derivative g²/σ'², and its inverse."""
    anew, t = Restarted(sde, 0.3), jnp.asarray([0.31, 0.5, 0.9])
    start = jnp.full_like(t, 0.3)
    np.testing.assert_allclose(anew.alpha(t) * sde.alpha(start), sde.alpha(t), rtol=1e-12)
    variance = anew.alpha(t) ** 2 * sde.sigma(start) ** 2 + anew.sigma(t) ** 2
    np.testing.assert_allclose(variance, sde.sigma(t) ** 2, rtol=1e-10)
    slope = jax.vmap(jax.grad(anew.cumulative_weight))(t)
    np.testing.assert_allclose(slope, anew.g2(t) / anew.sigma(t) ** 2, rtol=1e-9)
    np.testing.assert_allclose(anew.time_of_weight(anew.cumulative_weight(t)), t, rtol=1e-9)
    np.testing.assert_allclose(time_of_noise(sde, noise_to_signal(sde, t)), t, rtol=1e-9)


@pytest.mark.usefixtures("x64")
@every_sde
def test_bound_from_a_later_time_is_above_the_density_there(sde, t_min):
    """Gaussian data, exact score: −log p_t(x_t) plus the KL of the ends, decoder error aside."""
    start = 0.05
    v = float(moments(sde, start)[2])
    x = math.sqrt(v) * jax.random.normal(jax.random.key(9), (N, D))
    law = data()
    proposal = Importance(Restarted(sde, start), start + 1e-4)

    @jax.jit
    def bound(x):
        return variational_bound(
            lambda y, t: law.score(y, t, sde), proposal.sde, x, keys(N),
            proposal=proposal, num_times=8,
        ).nll  # fmt: skip

    gap = bound(x) + law.log_prob(x, jnp.full((N,), start), sde)
    v_end = moments(sde, 1.0)[2] / sde.prior_std**2
    kl = 0.5 * D * float(v_end - 1.0 - np.log(v_end))
    assert within(gap, kl) or abs(np.mean(gap) - kl) < 1e-3


@pytest.mark.usefixtures("x64")
@every_sde
def test_noised_start_of_a_gaussian_is_a_bound_that_is_tight(sde, t_min):
    """Gaussian data, exact score: p(x_t) p(x|x_t)/q(x_t|x) has mean p(x), decoder aside."""
    x = jnp.tile(jnp.asarray([[0.8, -0.5]]), (N, 1))
    law, t = data(), jnp.full((N,), t_min)
    decoder = gaussian_decoder(lambda y, t: law.score(y, t, sde), sde)
    start = noised_start(decoder, sde, Draw(x, jnp.zeros((N,))), keys(N), t_min)
    log_weight = np.asarray(law.log_prob(start.x, t, sde) - start.log_q)
    truth = float(-0.5 * (0.8**2 + 0.5**2) / V0 - 0.5 * D * math.log(2 * math.pi * V0))
    sigma2 = float(moments(sde, t_min)[1])
    assert abs(np.mean(np.exp(log_weight)) / math.exp(truth) - 1) < (
        4 * log_weight.std() / math.sqrt(N) + 10 * sigma2**2
    )
    assert log_weight.mean() <= truth + 4 * log_weight.std() / math.sqrt(N) + 1e-9


@pytest.mark.usefixtures("x64")
def test_importance_average_decreases_the_bound_and_reaches_the_truth():
    """−log P(0 < x < 2), x ~ N(0, 1), by K uniform draws: monotone in K."""
    n, truth = 4000, -math.log(scipy.stats.norm.cdf(2.0) - scipy.stats.norm.cdf(0.0))

    def bound(number):
        def log_weight(k):
            key = jax.random.fold_in(jax.random.key(number), k)
            u = 2.0 * jax.random.uniform(key, (n,))
            return jax.scipy.stats.norm.logpdf(u) + math.log(2.0), k

        value, numbers = importance_average(log_weight, number)
        np.testing.assert_array_equal(numbers, np.arange(number))
        return -np.asarray(value)

    bounds = {number: bound(number) for number in (1, 2, 4, 16, 64)}
    means = [bounds[number].mean() for number in bounds]
    errors = [bounds[number].std() / math.sqrt(n) for number in bounds]
    for (low, high), error in zip(itertools.pairwise(means), errors, strict=False):
        assert high < low + 4 * error
    assert means[0] - truth > 0.05
    assert abs(means[-1] - truth) < 0.01


@pytest.mark.usefixtures("x64")
@every_sde
def test_bound_of_gaussian_data_with_the_exact_score(sde, t_min):
    """E = ½d ln 2πσ_π² + ½d v_T/σ_π² − ½d ln(v_T/v) + ½d(−ln α² − σ²/v), v, α, σ at t_min."""
    x = math.sqrt(V0) * jax.random.normal(jax.random.key(9), (N, D))
    bound = sampled_bound(data(), Importance(sde, t_min), x, keys(N), 1.0)
    alpha2, sigma2, v = moments(sde, t_min)
    v_end, prior2 = moments(sde, 1.0)[2], sde.prior_std**2
    expected = math.log(2 * math.pi * prior2) + v_end / prior2 - math.log(v_end / v)
    expected += -math.log(alpha2) - sigma2 / v
    assert within(bound.nll, 0.5 * D * expected)
    entropy = 0.5 * D * math.log(2 * math.pi * math.e * V0)
    assert np.mean(bound.nll) > entropy - 4 * np.std(bound.nll) / math.sqrt(N)


@pytest.mark.usefixtures("x64")
def test_bound_without_a_score_is_the_untrained_drift_elbo():
    """The oracle of the tests above, itself checked against sdeflow-light's closed form.

    s = 0: ½ d ln 2π + ½ (α_T² ‖x‖² + d σ_T²) + ½ d B(T), for any t_min.
    """
    for t_min in (1e-5, 1e-2):
        alpha2, sigma2, _ = moments(VPSDE(), 1.0)
        expected = 0.5 * (D * math.log(2 * math.pi) + alpha2 * 1.7 + D * sigma2 + D * 10.05)
        assert sum(exact_bound(VPSDE(), t_min, 0.0, 1.7)) == pytest.approx(expected, rel=1e-7)


@pytest.mark.usefixtures("x64")
def test_published_elbo_of_a_scaled_score():
    """Data N(0, 4), d = 1, score scaled by 0.9: −2.155405 nats (sdeflow-light)."""
    n = 20_000
    x = 2.0 * jax.random.normal(jax.random.key(4), (n, 1))
    bound = sampled_bound(data(1, 4.0), Importance(VPSDE(), 1e-5), x, keys(n), 0.9)
    assert within(bound.nll, 2.155405)
    assert np.std(bound.nll) / math.sqrt(n) < 0.02


@pytest.mark.usefixtures("x64")
@every_sde
def test_bound_is_above_the_negative_log_likelihood_of_a_mixture(sde, t_min):
    """By KL(q_T ‖ π) for the exact score; a shift c of the score adds ½ ‖c‖² (∫ g² dt + σ²)."""
    law, shift = mixture(), 0.5 / sde.prior_std
    x = law.sample(jax.random.key(5), N)
    entropy = -np.asarray(law.log_prob(x, jnp.zeros((N,)), VPSDE()))
    exact, shifted = (
        sampled_bound(law, Importance(sde, t_min), x, keys(N), 1.0, c) for c in (0.0, shift)
    )
    gap, loss = np.asarray(exact.nll) - entropy, np.asarray(shifted.nll - exact.nll)
    error = gap.std() / math.sqrt(N)
    # KL(q_T ‖ π) ≤ E KL(q(x_T|x0) ‖ π), the prior term; the decoder errs by O((σ/s)⁴) < 1e-5.
    assert -4 * error < gap.mean() < np.mean(exact.prior) + 4 * error + 1e-5
    variance = integral(sde.g2, t_min) + moments(sde, t_min)[1]
    assert within(loss, 0.5 * D * shift**2 * variance)


@pytest.mark.usefixtures("x64")
def test_bound_of_an_example_depends_on_its_key_only():
    x, proposal = mixture().sample(jax.random.key(0), 4), Importance(VPSDE(), 1e-3)
    whole = sampled_bound(data(), proposal, x, keys(4)).nll
    part = sampled_bound(data(), proposal, x[1:3], keys(4)[1:3]).nll
    np.testing.assert_allclose(whole[1:3], part, rtol=1e-12)
    assert len(np.unique(sampled_bound(data(), proposal, x[:1].repeat(4, 0), keys(4)).nll)) == 4


@pytest.mark.usefixtures("x64")
def test_times_are_stratified_and_the_control_variate_works():
    """8 times beat 8 independent times; without the variate ‖z‖² alone gives ½ d Z²."""
    x, proposal = jnp.tile(jnp.asarray([[0.8, -0.5]]), (N, 1)), Importance(VPSDE(), 1e-5)
    one, eight = (
        np.var(sampled_bound(data(), proposal, x, keys(N), 1.0, num_times=k).diffusion)
        for k in (1, 8)
    )
    assert eight < 0.9 * one / 8
    assert one < 0.5 * (0.5 * D * float(proposal.normalizer) ** 2)


@pytest.mark.usefixtures("x64")
@every_sde
def test_reconstruction_is_the_log_density_of_the_decoder(sde, t_min):
    """−log N(x; (x_t + σ² s)/α, σ²/α²) with x_t, mean and density written out."""
    x, z = (jax.random.normal(jax.random.key(i), (3, 2, 2)) for i in (0, 1))
    t = jnp.asarray([t_min, 0.1, 0.4])
    alpha, sigma = (np.asarray(c(t))[:, None, None] for c in (sde.alpha, sde.sigma))
    x_t = alpha * np.asarray(x) + sigma * np.asarray(z)
    mean = (x_t + sigma**2 * np.sin(x_t)) / alpha
    variance = sigma**2 / alpha**2
    log_p = -0.5 * ((np.asarray(x) - mean) ** 2 / variance + np.log(2 * np.pi * variance))
    noise = -0.5 * ((x_t / alpha - np.asarray(x)) ** 2 / variance + np.log(2 * np.pi * variance))
    found = gaussian_decoder(lambda y, t: jnp.sin(y), sde)(x, jnp.asarray(x_t), t)
    np.testing.assert_allclose(found, (log_p - noise).sum(axis=(1, 2)), rtol=1e-8)


def test_wrong_divergences_are_refused():
    with pytest.raises(ValueError, match=r"divergence='trace'.*exact.*gaussian.*rademacher"):
        Divergence("trace")
    with pytest.raises(ValueError, match="num_probes=0"):
        Divergence("rademacher", 0)
