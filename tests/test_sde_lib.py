"""Laws of the linear diffusions, by automatic differentiation in float64, and their chains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from operators import scale, squared_norm
from sde_lib import SDES, VESDE, VPSDE, LinearPath, LinearVESDE, SubVPSDE, chain_index

ALL = [
    VPSDE(), VPSDE(0.3, 7.0), SubVPSDE(), SubVPSDE(0.3, 7.0),
    VESDE(0.02, 9.0), LinearVESDE(3.0), LinearPath(), LinearPath(0.9),
]  # fmt: skip
BETA = [sde for sde in ALL if isinstance(sde, VPSDE | SubVPSDE)]
every_sde = pytest.mark.parametrize("sde", ALL, ids=str)
beta_sde = pytest.mark.parametrize("sde", BETA, ids=str)


def times(sde, lowest=1e-5, number=201):
    """From `lowest` to T and not beyond, where the linear path has a pole."""
    return jnp.asarray(np.geomspace(lowest, sde.T, number))


def derivative(function, t):
    return jax.jvp(function, (t,), (jnp.ones_like(t),))[1]


@pytest.mark.usefixtures("x64")
@every_sde
def test_drift_is_logarithmic_derivative_of_alpha(sde):
    t = times(sde)
    expected = derivative(lambda t: jnp.log(sde.alpha(t)), t)
    np.testing.assert_allclose(sde.drift_coefficient(t), expected, rtol=1e-12)


@pytest.mark.usefixtures("x64")
@every_sde
def test_diffusion_makes_the_variance(sde):
    """g² = dσ²/dt − 2 a σ²."""
    t = times(sde)
    a, sigma2 = sde.drift_coefficient(t), sde.sigma(t) ** 2
    expected = derivative(lambda t: sde.sigma(t) ** 2, t) - 2.0 * a * sigma2
    np.testing.assert_allclose(sde.g2(t), expected, rtol=1e-12)
    np.testing.assert_allclose(sde.g(t) ** 2, sde.g2(t), rtol=1e-15)


@pytest.mark.usefixtures("x64")
@every_sde
def test_cumulative_weight_integrates_likelihood_weight(sde):
    """W' = g²/σ²."""
    t = times(sde)
    np.testing.assert_allclose(
        derivative(sde.cumulative_weight, t), sde.g2(t) / sde.sigma(t) ** 2, rtol=1e-11
    )


@pytest.mark.usefixtures("x64")
@every_sde
def test_time_of_weight_inverts_cumulative_weight(sde):
    t = times(sde)
    np.testing.assert_allclose(sde.time_of_weight(sde.cumulative_weight(t)), t, rtol=1e-12)


@pytest.mark.usefixtures("x64")
@every_sde
def test_velocity_share_is_the_part_of_the_weight_that_moves_the_noise(sde):
    """(d log σ²/dt)/(g²/σ²); the form 1 + 2aσ²/g² of the base class cancels where α is small."""
    t = times(sde)
    rate = derivative(lambda t: 2.0 * jnp.log(sde.sigma(t)), t)
    share = rate * sde.sigma(t) ** 2 / sde.g2(t)
    np.testing.assert_allclose(sde.velocity_share(t), share, rtol=1e-12)
    np.testing.assert_allclose(super(type(sde), sde).velocity_share(t), share, rtol=1e-11)


@pytest.mark.usefixtures("x64")
@every_sde
def test_time_of_sigma_inverts_sigma(sde):
    """For VP to the rounding of 1 − σ² = 4e-5 at T, in B = −log(1 − σ²): 5e-12 of 10."""
    t = times(sde)
    np.testing.assert_allclose(sde.time_of_sigma(sde.sigma(t)), t, rtol=1e-11)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("sde", [LinearPath(), LinearPath(0.9)], ids=str)
def test_flow_matching_on_the_linear_path_is_score_matching(sde):
    """u = f − ½g²s: ‖u − (z − x0)‖² = ‖e1‖²/α², for any score."""
    x0, z, score = jax.random.normal(jax.random.key(0), (3, 201, 4))
    t = times(sde)
    x = sde.perturb(x0, t, z)
    np.testing.assert_allclose(x, (1.0 - t)[:, None] * x0 + t[:, None] * z, rtol=1e-14)
    e1 = scale(sde.sigma(t), score) + z
    loss = squared_norm(sde.ode_drift(score, x, t) - (z - x0))
    np.testing.assert_allclose(loss, squared_norm(e1) / sde.alpha(t) ** 2, rtol=1e-12)
    posterior_mean = scale(1.0 / sde.alpha(t), x + scale(sde.sigma(t) ** 2, score))
    u = scale(1.0 / t, x - posterior_mean)  # E[z − x0 | x_t] of the mean x0 and its noise
    np.testing.assert_allclose(sde.ode_drift(score, x, t), u, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("x64")
@every_sde
def test_perturbed_data_start_at_the_data(sde):
    zero = jnp.zeros(())
    assert sde.alpha(zero) == 1.0
    assert sde.sigma(zero) == (sde.sigma_min if isinstance(sde, VESDE) else 0.0)


@pytest.mark.usefixtures("x64")
@beta_sde
def test_integral_of_beta(sde):
    t = times(sde)
    np.testing.assert_allclose(derivative(sde.integral_beta, t), sde.beta(t), rtol=1e-13)
    np.testing.assert_allclose(sde.time_of_integral_beta(sde.integral_beta(t)), t, rtol=1e-13)
    assert sde.beta(jnp.ones(())) == sde.beta_max


@pytest.mark.usefixtures("x64")
def test_published_values():
    """α_1 and σ of VP, sub-VP and VE at their smallest times (mle_score_ode, sdeflow-light)."""
    one, tiny, small = jnp.asarray(1.0), jnp.asarray(1e-5), jnp.asarray(1e-2)
    assert float(VPSDE().alpha(one)) == pytest.approx(6.5715865e-3, rel=1e-7)
    assert float(VPSDE().sigma(one) ** 2) == pytest.approx(0.99995681, rel=1e-8)
    assert float(VPSDE().sigma(tiny)) == pytest.approx(1.0005e-3, rel=5e-5)
    assert float(SubVPSDE().sigma(small)) == pytest.approx(1.993e-3, rel=3e-4)
    assert float(VESDE().sigma(tiny)) == pytest.approx(1.000085e-2, rel=1e-6)


@pytest.mark.usefixtures("x64")
@every_sde
@pytest.mark.parametrize("name", ["alpha", "sigma", "g2", "cumulative_weight"])
def test_float32_is_accurate_near_the_data(sde, name):
    """1e-5 relative; √(1 − e^{−B}) in float32 is wrong by 6e-3 at t = 1e-5."""
    t = jnp.asarray(np.geomspace(1e-5, 1e-2, 400), jnp.float32)
    function = getattr(sde, name)
    single, double = function(t), function(t.astype(jnp.float64))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single.astype(jnp.float64), double, rtol=1e-5)


@pytest.mark.usefixtures("x64")
@every_sde
def test_the_variable_of_the_ode_is_sigma_for_ve_and_time_for_all_others(sde):
    variable, t = sde.ode_variable, times(sde)
    expected = sde.sigma(t) if isinstance(sde, VESDE) else t
    assert variable.name == ("σ" if isinstance(sde, VESDE) else "t")
    np.testing.assert_allclose(variable.of_time(t), expected, rtol=1e-15)
    np.testing.assert_allclose(variable.time_of(expected), t, rtol=1e-12, atol=1e-15)


@pytest.mark.usefixtures("x64")
def test_sigma_of_ve_is_good_to_rounding_in_float32():
    """The Fourier embedding of log σ multiplies its error; e^{t ln(σmax/σmin)} errs by 9e-7."""
    t = jnp.asarray(np.random.default_rng(0).uniform(0.0, 1.0, 20_000), jnp.float32)
    single, double = VESDE().sigma(t), VESDE().sigma(t.astype(jnp.float64))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single.astype(jnp.float64), double, rtol=2e-7)


@pytest.mark.usefixtures("x64")
@every_sde
@pytest.mark.parametrize("name", ["alpha", "sigma", "g2"])
def test_no_jump_where_published_code_switches_formula(sde, name):
    """Steps across t = 0.010017 are equal within 1%; the published σ jumps by ten such steps."""
    t = jnp.asarray(0.010017 + 1e-6 * np.arange(-50, 51))
    steps = np.diff(np.log(getattr(sde, name)(t)))
    np.testing.assert_allclose(steps, steps.mean(), rtol=1e-2, atol=1e-15)


@pytest.mark.usefixtures("x64")
@every_sde
def test_perturb_and_prior_sample_moments(sde):
    x0, z, t = jnp.ones((3, 2, 2)), 2.0 * jnp.ones((3, 2, 2)), jnp.asarray([0.1, 0.5, 0.9])
    expected = np.asarray(sde.alpha(t) + 2.0 * sde.sigma(t))[:, None, None] * np.ones((3, 2, 2))
    np.testing.assert_allclose(sde.perturb(x0, t, z), expected, rtol=1e-15)
    x = sde.prior_sample(jax.random.split(jax.random.key(0), 10_000), jnp.zeros((10_000, 2)))
    assert abs(float(jnp.std(x)) / sde.prior_std - 1.0) < 4 / np.sqrt(2 * x.size)


@pytest.mark.usefixtures("x64")
@every_sde
def test_prior_log_density(sde):
    x = sde.prior_std * jax.random.normal(jax.random.key(0), (5, 2, 3))
    expected = norm.logpdf(np.asarray(x), scale=sde.prior_std).sum(axis=(1, 2))
    np.testing.assert_allclose(sde.prior_logp(x), expected, rtol=1e-13)


@pytest.mark.usefixtures("x64")
@every_sde
def test_prior_kl_is_expected_log_ratio(sde):
    """E[log q(x_T|x0) − log π(x_T)], exact by two nodes: the integrand is quadratic in z."""
    x0 = 3.0 * jax.random.normal(jax.random.key(0), (5, 2, 3))
    end = jnp.asarray(sde.T)
    mean, std = np.asarray(sde.alpha(end) * x0), float(sde.sigma(end))
    log_ratio = [
        norm.logpdf(mean + std * z, mean, std) - norm.logpdf(mean + std * z, 0.0, sde.prior_std)
        for z in (-1.0, 1.0)
    ]
    expected = 0.5 * sum(log_ratio).sum(axis=(1, 2))
    np.testing.assert_allclose(sde.prior_kl(x0), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("x64")
@every_sde
@pytest.mark.parametrize("lmbd", [-3.0, 0.0, 0.5, 1.0])
def test_every_member_of_the_lambda_family_has_the_forward_marginals(sde, lmbd):
    """Gaussian data of variance v0, s = −x/v: run backwards, the variance moves by −dv/dt.

    With drift b x and diffusion √(1 − λ) g that is −2 b v + (1 − λ) g² = −dv/dt.
    """
    t, v0 = times(sde, 1e-3, 50), 0.7
    variance = lambda t: sde.alpha(t) ** 2 * v0 + sde.sigma(t) ** 2  # noqa: E731
    v, x = variance(t), jnp.ones((50, 1))
    b = sde.reverse_drift(-x / v[:, None], x, t, lmbd)[:, 0]
    backwards = -2.0 * b * v + (1.0 - lmbd) * sde.g2(t)
    size = np.asarray(sde.g2(t) + jnp.abs(2.0 * b * v))
    np.testing.assert_array_less(np.abs(backwards + derivative(variance, t)), 1e-12 * size)


@pytest.mark.usefixtures("x64")
@every_sde
def test_ode_drift_is_the_member_without_noise(sde):
    x, score, t = jnp.ones((3, 2)), 2.0 * jnp.ones((3, 2)), jnp.asarray([0.1, 0.5, 0.9])
    np.testing.assert_array_equal(
        sde.ode_drift(score, x, t), sde.reverse_drift(score, x, t, lmbd=1.0)
    )
    np.testing.assert_allclose(
        sde.ode_drift(score, x, t)[:, 0], sde.drift_coefficient(t) - sde.g2(t), rtol=1e-14
    )


@pytest.mark.parametrize("num_steps", [2, 10, 1000, 3000, 8000, 100_000])
def test_times_of_the_chain_fall_on_their_own_index(num_steps):
    """⌊t (N − 1)⌋ in float32 loses the grid points that round down."""
    t = jnp.linspace(0.0, 1.0, num_steps)
    np.testing.assert_array_equal(chain_index(t, num_steps, 1.0), np.arange(num_steps))
    between = (t[1:] + t[:-1]) / 2
    np.testing.assert_array_equal(chain_index(between, num_steps, 1.0), np.arange(num_steps - 1))


@pytest.mark.parametrize("num_steps", [1000, 8000, 100_000])
def test_the_walk_from_the_prior_takes_every_level_once(num_steps):
    """The times of the samplers, T − k dt in float32."""
    dt = (1.0 - 1e-6) / (num_steps - 1)
    t = 1.0 - jnp.arange(num_steps, dtype=jnp.float32) * dt
    np.testing.assert_array_equal(chain_index(t, num_steps, 1.0), np.arange(num_steps)[::-1])


def test_more_levels_than_float32_tells_apart_are_refused():
    with pytest.raises(ValueError, match=r"model.num_scales=2000000: .* at most 1000000"):
        chain_index(jnp.ones(1), 2_000_000, 1.0)


def whole_chain(number):
    return jnp.linspace(0.0, 1.0, number), jnp.ones((number, 1))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("sde", [VPSDE(), VPSDE(0.3, 7.0)], ids=str)
def test_vp_chain_preserves_variance_with_linear_beta(sde):
    t, x = whole_chain(1000)
    f, g = sde.discretize(x, t, 1e-3, 1000)
    beta = np.linspace(sde.beta_min / 1000, sde.beta_max / 1000, 1000)
    np.testing.assert_allclose(g**2, beta, rtol=1e-12)
    np.testing.assert_allclose((x + f)[:, 0] ** 2 + g**2, 1.0, rtol=1e-14)
    np.testing.assert_allclose(sde.langevin_alpha(t, 1000), 1.0 - beta, rtol=1e-14)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("sde", [VESDE(), VESDE(0.02, 9.0)], ids=str)
def test_ve_chain_adds_geometric_variances(sde):
    t, x = whole_chain(1000)
    f, g = sde.discretize(x, t, 1e-3, 1000)
    sigmas = np.geomspace(sde.sigma_min, sde.sigma_max, 1000)
    np.testing.assert_array_equal(f, 0.0)
    np.testing.assert_allclose(np.sqrt(np.cumsum(g**2)), sigmas, rtol=1e-10)
    np.testing.assert_array_equal(sde.langevin_alpha(t, 1000), 1.0)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("sde", [SubVPSDE(), LinearVESDE()], ids=str)
def test_other_chains_are_euler_maruyama(sde):
    t, x = jnp.asarray([0.2, 0.7]), jnp.asarray([[1.0, -2.0], [0.5, 3.0]])
    f, g = sde.discretize(x, t, 0.01, 100)
    a = np.asarray(sde.drift_coefficient(t))[:, None]
    np.testing.assert_allclose(f, 0.01 * a * np.asarray(x), rtol=1e-14)
    np.testing.assert_allclose(g**2, 0.01 * np.asarray(sde.g2(t)), rtol=1e-14)


@pytest.mark.usefixtures("x64")
def test_sub_vp_corrector_uses_the_published_chain():
    t = whole_chain(100)[0]
    expected = 1.0 - np.linspace(0.1, 20.0, 100) / 100
    np.testing.assert_allclose(SubVPSDE().langevin_alpha(t, 100), expected, rtol=1e-14)
    np.testing.assert_array_equal(LinearVESDE().langevin_alpha(t, 100), 1.0)


@pytest.mark.usefixtures("x64")
def test_vp_ancestral_mean_is_the_posterior_mean():
    """One data point x0: E[x_{i−1} | x_i, x0] of the chain with ᾱ_i = Π (1 − β_j)."""
    n, x0, x = 50, 0.8, jnp.full((50, 1), -1.3)
    beta = np.linspace(0.1, 20.0, n) / n
    bar = np.cumprod(1.0 - beta)
    before = np.concatenate([[1.0], bar[:-1]])
    score = jnp.asarray((np.sqrt(bar) * x0 + 1.3) / (1.0 - bar))[:, None]
    mean, std = VPSDE().ancestral(score, x, whole_chain(n)[0], n)
    expected = np.sqrt(before) * beta * x0 - np.sqrt(1.0 - beta) * (1.0 - before) * 1.3
    np.testing.assert_allclose(mean[:, 0], expected / (1.0 - bar), rtol=1e-9)
    np.testing.assert_allclose(std, np.sqrt(beta), rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_ve_ancestral_step_is_the_posterior():
    """One data point x0: the precisions of x_{i−1} given x0 and given x_i add up."""
    n, x0, x = 50, 0.8, jnp.full((50, 1), -1.3)
    sigma2 = np.geomspace(0.01, 50.0, n) ** 2
    before = np.concatenate([[0.0], sigma2[:-1]])
    mean, std = VESDE().ancestral(
        jnp.asarray((x0 + 1.3) / sigma2)[:, None], x, whole_chain(n)[0], n
    )
    assert std[0] == 0.0
    assert float(mean[0, 0]) == pytest.approx(x0, rel=1e-12)
    precision = 1.0 / before[1:] + 1.0 / (sigma2 - before)[1:]
    expected = (x0 / before[1:] - 1.3 / (sigma2 - before)[1:]) / precision
    np.testing.assert_allclose(std[1:], precision**-0.5, rtol=1e-9)
    np.testing.assert_allclose(mean[1:, 0], expected, rtol=1e-9)


@pytest.mark.parametrize("sde", [SubVPSDE(), LinearVESDE()], ids=str)
def test_ancestral_sampling_without_a_chain_is_refused(sde):
    x, t = jnp.ones((1, 2)), jnp.ones((1,))
    with pytest.raises(
        ValueError, match=rf"ancestral_sampling.*{type(sde).__name__}.*VPSDE and VESDE"
    ):
        sde.ancestral(x, x, t, 10)


@pytest.mark.parametrize("kind", [VPSDE, SubVPSDE])
@pytest.mark.parametrize("fields", [(0.0, 20.0), (-0.1, 20.0), (20.0, 0.1), (1.0, 1.0)])
def test_wrong_beta_is_refused(kind, fields):
    with pytest.raises(ValueError, match=r"beta_min.*beta_max"):
        kind(*fields)


@pytest.mark.parametrize("fields", [(0.0, 50.0), (-0.01, 50.0), (50.0, 0.01), (1.0, 1.0)])
def test_wrong_geometric_sigma_is_refused(fields):
    with pytest.raises(ValueError, match=r"sigma_min.*sigma_max"):
        VESDE(*fields)


@pytest.mark.parametrize("sigma_max", [0.0, -1.0, float("nan")])
def test_wrong_linear_sigma_is_refused(sigma_max):
    with pytest.raises(ValueError, match="sigma_max"):
        LinearVESDE(sigma_max)


@pytest.mark.usefixtures("x64")
def test_the_prior_of_the_linear_path_is_the_noise_at_its_end():
    """W(T) = log(σ²/α²) = 10, and no KL divergence for data at 0."""
    sde = LinearPath()
    assert float(sde.cumulative_weight(jnp.asarray(sde.T))) == pytest.approx(10.0, rel=1e-12)
    np.testing.assert_allclose(sde.prior_kl(jnp.zeros((1, 3))), 0.0, atol=1e-14)


@pytest.mark.parametrize("end", [0.0, 1.0, -0.5, float("nan")])
def test_a_linear_path_up_to_its_pole_is_refused(end):
    with pytest.raises(ValueError, match=r"end=.*: need 0 < end < 1"):
        LinearPath(end)


def test_names_resolve_and_sdes_are_static_arguments():
    assert SDES == {
        "vpsde": VPSDE, "subvpsde": SubVPSDE, "vesde": VESDE, "linearvesde": LinearVESDE,
        "linear": LinearPath,
    }  # fmt: skip
    sigma = jax.jit(lambda sde, t: sde.sigma(t), static_argnums=0)
    assert float(sigma(LinearVESDE(3.0), jnp.asarray(0.5))) == 1.5
    assert hash(VPSDE()) == hash(VPSDE(0.1, 20.0))


@pytest.mark.usefixtures("x64")
def test_chain_of_ddpm_has_the_products_of_its_betas():
    """α_i² = Π (1 − β_k) with β = linspace(β0/N, β1/N, N); between levels those below."""
    number = 50
    chain = VPSDE().chain(number)
    alpha2 = np.cumprod(1.0 - np.linspace(0.1, 20.0, number) / number)
    t = jnp.linspace(0.0, 1.0, number, dtype=jnp.float64)
    np.testing.assert_allclose(chain.alpha(t) ** 2, alpha2, rtol=1e-12)
    np.testing.assert_allclose(chain.sigma(t) ** 2, 1.0 - alpha2, rtol=1e-12)
    between = t[:-1] + 0.5 / number
    np.testing.assert_allclose(chain.alpha(between) ** 2, alpha2[:-1], rtol=1e-12)
    np.testing.assert_allclose(chain.g2(t), VPSDE().g2(t), rtol=0)


def test_chain_of_smld_is_the_sde_and_other_sdes_have_none():
    assert VESDE().chain(10) == VESDE()
    for sde in (SubVPSDE(), LinearVESDE()):
        with pytest.raises(ValueError, match=r"continuous=False: need True: .* has no chain"):
            sde.chain(10)


def test_the_published_walk_over_the_chain_takes_every_level_once():
    """1000 times from 1 to 1e-3 in float32: the last, 0.999 of a cell, is level 0."""
    t = jnp.asarray(np.linspace(1.0, 1e-3, 1000), jnp.float32)
    np.testing.assert_array_equal(chain_index(t, 1000, 1.0), np.arange(999, -1, -1))
    grid = jnp.arange(1000, dtype=jnp.float32) * jnp.float32(1.0 / 999.0)
    np.testing.assert_array_equal(chain_index(grid, 1000, 1.0), np.arange(1000))
