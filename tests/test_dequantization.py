"""Encodings: log-determinants, bits/dim of uniform densities, integers to reals and back."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dequantization import Pixels, Reals

CODES = [
    Pixels(256), Pixels(256, centered=False), Pixels(256, centered=False, logit=True),
    Pixels(17), Pixels(17, centered=False), Pixels(17, centered=False, logit=True), Pixels(2),
]  # fmt: skip
every_code = pytest.mark.parametrize("code", CODES, ids=str)


def all_integers(code):
    return jnp.arange(code.levels, dtype=jnp.uint8)[:, None]


@pytest.mark.usefixtures("x64")
@every_code
def test_log_determinant_is_that_of_the_jacobian(code):
    w = jax.random.uniform(jax.random.key(0), (5, 6), minval=1e-3, maxval=1 - 1e-3)
    jacobian = jax.vmap(jax.jacfwd(code.from_unit))(w)
    expected = jnp.linalg.slogdet(jacobian)[1]
    np.testing.assert_allclose(code.log_det(code.from_unit(w)), expected, rtol=0, atol=1e-10)
    np.testing.assert_allclose(code.to_unit(code.from_unit(w)), w, rtol=1e-13)


@pytest.mark.usefixtures("x64")
@every_code
def test_uniform_density_has_log2_levels_bits(code):
    """The uniform law on the unit cube, written in model space: log p(y) = −log|dy/dw|."""
    u, k = jax.random.uniform(jax.random.key(0), (5, 2, 3)), jnp.ones((5, 2, 3), jnp.uint8)
    draw = code.draw_of_noise(k, u)
    w = code.to_unit(draw.x)
    log_slope = jnp.log(jax.jvp(code.from_unit, (w,), (jnp.ones_like(w),))[1])
    log_weight = -jnp.sum(log_slope, axis=(1, 2)) - draw.log_q
    bits = code.negative_log_likelihood(log_weight, draw.x)
    np.testing.assert_allclose(bits, math.log2(code.levels), rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("code", "log_p_per_dim", "bits"),
    [
        (Pixels(256), 0.0, 7.0),
        (Pixels(256, centered=False), 0.0, 8.0),
        (Pixels(17), 0.0, math.log2(17) - 1.0),
        (Pixels(256, centered=False), -3.0 * math.log(2.0), 11.0),
    ],
)
def test_published_offsets_of_bits_per_dim(code, log_p_per_dim, bits):
    draw = code.draw_of_noise(jnp.ones((2, 5), jnp.uint8), jnp.full((2, 5), 0.25))
    log_weight = jnp.full((2,), 5 * log_p_per_dim) - draw.log_q
    np.testing.assert_allclose(code.negative_log_likelihood(log_weight, draw.x), bits, rtol=1e-13)


@pytest.mark.usefixtures("x64")
def test_untrained_drift_network_on_logit_data():
    """17.2966 − mean log-determinant in bits: sdeflow-light's first evaluation, |y|² = d."""
    code, d = Pixels(256, centered=False, logit=True), 7
    y = jnp.ones((1, d))
    log_p = jnp.full((1,), -0.5 * d * (math.log(2 * math.pi) + 1.0 + 10.05))
    log_det = float(code.log_det(y)[0])
    expected = 17.2966 - log_det / (d * math.log(2.0))
    cell = code.levels * code.to_unit(y)
    draw = code.draw_of_noise(jnp.floor(cell).astype(jnp.uint8), cell % 1.0)
    np.testing.assert_allclose(draw.x, y, rtol=1e-12)
    bits = code.negative_log_likelihood(log_p - draw.log_q, y)
    assert float(bits[0]) == pytest.approx(expected, abs=6e-5)


@pytest.mark.usefixtures("x64")
@every_code
def test_decode_inverts_encode_for_every_level(code):
    """Noise from the first to the last 1e-12 of the cell, in float64."""
    for u in (1e-12, 0.1, 0.5, 0.9, 1.0 - 1e-12):
        k = all_integers(code)
        y = code.encode_with_noise(k, jnp.full(k.shape, u))
        np.testing.assert_array_equal(code.decode(y), k)


@every_code
def test_decode_inverts_encode_in_float32(code):
    """Up to 2e-4 of a cell from its edge: 256 levels leave 16 bits for the noise."""
    for u in (2e-4, 0.5, 1.0 - 2e-4):
        k = all_integers(code)
        y = code.encode_with_noise(k, jnp.full(k.shape, u, jnp.float32))
        assert y.dtype == jnp.float32
        np.testing.assert_array_equal(code.decode(y), k)


@every_code
def test_encode_adds_uniform_noise_of_each_key(code):
    n = 4000
    k = jnp.full((n, 1), code.levels // 2, jnp.uint8)
    keys = jax.random.split(jax.random.key(0), n)
    u = np.asarray(code.levels * code.to_unit(code.encode(k, keys)) - code.levels // 2)
    # Within 4 standard errors, those of u and of (u − ½)² being √(1/12n) and √(1/180n).
    assert abs(u.mean() - 0.5) < 4 * np.sqrt(1 / (12 * n))
    assert abs(((u - 0.5) ** 2).mean() - 1 / 12) < 4 * np.sqrt(1 / (180 * n))
    np.testing.assert_array_equal(code.encode(k[:3], keys[:3]), code.encode(k, keys)[:3])


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("centered", [False, True])
def test_noise_free_encoding_spans_the_interval_and_comes_back(levels, centered):
    code = Pixels(levels, centered=centered, dequantize_uniformly=False)
    k = all_integers(code)
    y = code.encode(k, jax.random.split(jax.random.key(0), levels))
    expected = np.linspace(-1.0 if centered else 0.0, 1.0, levels)[:, None]
    np.testing.assert_allclose(y, expected, atol=1e-7)
    np.testing.assert_array_equal(code.decode(y), k)


@every_code
def test_decode_clips_to_the_levels(code):
    outside = jnp.asarray([[-20.0, 20.0]])
    np.testing.assert_array_equal(code.decode(outside), [[0, code.levels - 1]])


@pytest.mark.parametrize("levels", [-1, 0, 1, 257])
def test_wrong_number_of_levels_is_refused(levels):
    with pytest.raises(ValueError, match=f"data.levels={levels}.*2 <= levels <= 256"):
        Pixels(levels)


def test_contradictory_transforms_are_refused():
    with pytest.raises(ValueError, match=r"data\.centered=True: need False with data\.logit=True"):
        Pixels(256, centered=True, logit=True)
    with pytest.raises(ValueError, match=r"data\.uniform_dequantization=False: need True"):
        Pixels(256, centered=False, logit=True, dequantize_uniformly=False)


def test_real_data_are_left_alone_and_reported_in_nats():
    x = jnp.asarray([[1.5, -2.0]])
    code = Reals()
    np.testing.assert_array_equal(code.encode(x, jax.random.split(jax.random.key(0), 1)), x)
    np.testing.assert_array_equal(code.decode(x), x)
    np.testing.assert_array_equal(code.negative_log_likelihood(jnp.asarray([3.0]), x), [-3.0])
    assert (code.unit, Pixels(256).unit) == ("nats", "bits/dim")


@pytest.mark.usefixtures("x64")
def test_the_density_of_real_values_in_cells_is_a_bound_of_their_probability():
    """Of a Gaussian: E p is P(cell)/w and −E log p is no less than −log P + log w, at 5 s.e."""
    n, widths = 40_000, np.array([0.5, 0.0])
    x = jnp.broadcast_to(jnp.asarray([0.5, 1.25]), (n, 2))
    draw = Reals(widths=widths).draw(x, jax.random.split(jax.random.key(0), n))
    y = np.asarray(draw.x)
    np.testing.assert_array_equal(draw.log_q, 0.0)
    np.testing.assert_array_equal(y[:, 1], 1.25)
    assert np.abs(y[:, 0] - 0.5).max() <= 0.25
    log_p, normal = scipy.stats.norm.logpdf(y).sum(axis=1), scipy.stats.norm
    mass = (normal.cdf(0.75) - normal.cdf(0.25)) / 0.5 * normal.pdf(1.25)
    p, error = np.exp(log_p), 5 / np.sqrt(n)
    assert abs(p.mean() - mass) < error * p.std()
    assert -np.log(mass) - error * log_p.std() < -log_p.mean() < -np.log(mass) + 0.01


@pytest.mark.usefixtures("x64")
@every_code
def test_noise_with_a_density_changes_log_q_by_that_density(code):
    k, u = all_integers(code), jax.random.uniform(jax.random.key(1), (code.levels, 1))
    plain, dense = code.draw_of_noise(k, u), code.draw_of_noise(k, u, jnp.log(u[:, 0]))
    np.testing.assert_allclose(dense.log_q - plain.log_q, jnp.log(u[:, 0]), rtol=1e-9)
    np.testing.assert_array_equal(dense.x, plain.x)


TRUNCATED = [
    Pixels(256), Pixels(17, centered=False), Pixels(17, dequantize_uniformly=False),
    Pixels(256, centered=False, dequantize_uniformly=False),
]  # fmt: skip


@pytest.mark.parametrize("code", TRUNCATED, ids=str)
@pytest.mark.parametrize("tau", [0.3, 1.0, 3.0, 30.0])
def test_truncated_normal_noise_stays_in_its_cell_and_has_the_density_of_scipy(code, tau):
    """Cells of the training grid, scaled by α; τ = 0.3 is nearly uniform, τ = 30 not truncated."""
    alpha, n = 0.9, 2000
    sigma = alpha * code.half_cell / tau
    k = jnp.full((n, 3), 5, jnp.uint8)
    draw = code.truncated_normal_draw(k, jax.random.split(jax.random.key(0), n), alpha, sigma)
    low, high = ((4.5, 5.5), (5.0, 6.0))[code.dequantize_uniformly]
    cells = code.levels - (not code.dequantize_uniformly)
    low, high = (float(code.from_unit(jnp.full((1,), edge / cells))[0]) for edge in (low, high))
    x = np.asarray(draw.x, np.float64) / alpha
    slack = 1e-6
    assert low - slack <= x.min()
    assert x.max() <= high + slack
    center = 0.5 * (low + high)
    law = scipy.stats.truncnorm(-tau, tau, alpha * center, sigma)
    expected = law.logpdf(np.clip(alpha * x, law.ppf(0), law.ppf(1))).sum(axis=1)
    np.testing.assert_allclose(draw.log_q, expected, rtol=0, atol=2e-2)
    assert scipy.stats.kstest(alpha * x.ravel(), law.cdf).pvalue > 1e-4
    # E_q[1/q] is the volume of the support.
    inverse = np.exp(-np.asarray(draw.log_q, np.float64))
    volume = (alpha * (high - low)) ** 3
    if tau <= 1.0:  # else the tails carry the mean
        assert abs(inverse.mean() - volume) < 4 * inverse.std() / np.sqrt(n) + 1e-6 * volume


def test_truncated_normal_noise_of_logit_data_is_refused():
    code = Pixels(256, centered=False, logit=True)
    with pytest.raises(ValueError, match=r"'tn': need 'uniform'.*logit"):
        code.truncated_normal_draw(
            all_integers(code), jax.random.split(jax.random.key(0), 256), 1.0, 1.0
        )
