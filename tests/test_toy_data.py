"""Exact laws: density against quadrature, score against Bayes' rule, tails, moments of samples."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erfcx, log_ndtr
from scipy.stats import multivariate_normal

from operators import (
    inner,
    squared_norm,
    value_and_divergence,
    value_jacobian_and_trace_gradient,
)
from sde_lib import VESDE, VPSDE, LinearVESDE, SubVPSDE
from toy_data import LAWS, Boxes, Mixture, gaussian, weighted_points

pytestmark = pytest.mark.usefixtures("compiled_at_o0")

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


CENTERS = np.asarray([[-1.5, 0.0], [0.5, 1.0], [0.5, -2.0]])
HALF_WIDTH = 0.75


def boxes(shape=(2,), dtype=jnp.float64):
    return Boxes(jnp.asarray(CENTERS.reshape(3, *shape), dtype), HALF_WIDTH)


def points_of(law, nodes):
    """Gauss–Legendre points of boxes: the density of these points is the convolution integral."""
    place, weight = np.polynomial.legendre.leggauss(nodes)
    centers = np.asarray(law.centers)
    d = centers.shape[1]
    offsets = law.half_width * np.asarray(list(itertools.product(place, repeat=d)))
    weights = np.prod(list(itertools.product(weight / 2, repeat=d)), axis=1) / len(centers)
    means = (centers[:, None] + offsets[None]).reshape(-1, d)
    return weighted_points(jnp.asarray(np.tile(weights, len(centers))), jnp.asarray(means))


@functools.partial(jax.jit, static_argnames=("law", "sde"))
def log_p_and_score(law, x, t, sde):
    return law.log_prob(x, t, sde), law.score(x, t, sde)


@functools.partial(jax.jit, static_argnames=("law", "sde"))
def three_derivatives(law, x, t, sde):
    """Score, its Jacobian and the gradient of its divergence."""
    return value_jacobian_and_trace_gradient(lambda y: law.score(y, t, sde), x)


@pytest.mark.usefixtures("x64")
@every_sde
def test_boxes_are_the_limit_of_their_points(sde):
    """60 nodes a side of 1.5 resolve σ ≥ 0.1."""
    law, rng = boxes(), np.random.default_rng(0)
    t = jnp.asarray(np.linspace(0.3, 1.0, 8))
    x0, z = law.sample(jax.random.key(0), 8), jnp.asarray(3.0 * rng.standard_normal((8, 2)))
    x = sde.perturb(x0, t, z)
    log_p, score = log_p_and_score(law, x, t, sde)
    expected = log_p_and_score(points_of(law, 60), x, t, sde)
    np.testing.assert_allclose(log_p, expected[0], rtol=1e-11)
    np.testing.assert_allclose(score, expected[1], rtol=1e-9)
    step = 1e-4 * sde.sigma(t)
    shift = step[:, None] * jnp.asarray([[0.6, 0.8]])
    plus, minus = (log_p_and_score(law, x + s * shift, t, sde)[0] for s in (1.0, -1.0))
    # The error of a central difference of step 1e-4 σ: 1e-8 σ² s'' and 1e-15 / (1e-4 σ).
    slope = inner(score, shift) / step * sde.sigma(t)
    np.testing.assert_allclose((plus - minus) / 2e-4, slope, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("x64")
def test_every_branch_of_a_box_and_its_derivatives_agree_with_quadrature():
    """σ/h and |x|/σ on both sides of every seam, the centre, the edges; three derivatives."""
    law, sde = Boxes(jnp.zeros((1, 1)), 1.0), LinearVESDE(1.0)
    sigmas, within = [0.08, 0.3, 0.95, 1.05, 3.0, 20.0], np.linspace(0.0, 1.0, 21)
    x = [np.concatenate([within, 1.0 + s * np.linspace(0.1, 12.0, 40)]) for s in sigmas]
    x = jnp.asarray(np.concatenate([*x, *(-each for each in x)]))[:, None]
    t, oracle = jnp.tile(jnp.repeat(jnp.asarray(sigmas), 61), 2), points_of(law, 150)
    (log_p, _), (expected, _) = (log_p_and_score(each, x, t, sde) for each in (law, oracle))
    np.testing.assert_allclose(log_p, expected, rtol=1e-12, atol=1e-12)
    ours, exact = (three_derivatives(each, x, t, sde) for each in (law, oracle))
    for n, (a, b) in enumerate(zip(ours, exact, strict=True), start=1):
        a, b = (np.asarray(c).ravel() * np.asarray(t) ** n for c in (a, b))
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("x64")
@every_sde
def test_density_of_boxes_integrates_to_one(sde):
    """The trapezoidal rule of a function that is smooth on the scale σ, at steps of σ/5 or less."""
    law = Boxes(jnp.asarray([[-1.5], [0.75]]), 0.5)
    for t in (0.02, 0.4, 1.0):
        time = jnp.full(4001, t)
        reach = 2.0 + 12.0 * float(sde.sigma(time)[0])
        x = jnp.linspace(-reach, reach, 4001)[:, None]
        density = np.exp(log_p_and_score(law, x, time, sde)[0])
        assert np.trapezoid(density, x[:, 0]) == pytest.approx(1.0, abs=1e-11)


@pytest.mark.usefixtures("x64")
@every_sde
def test_density_of_boxes_solves_the_fokker_planck_equation(sde):
    """∂_t log p = ½ g² (Δ log p + ‖∇ log p‖²) − a (d + x·∇ log p)."""
    law = boxes()
    t = jnp.asarray(np.linspace(0.1, 1.0, 8))
    z = jnp.asarray(np.random.default_rng(1).standard_normal((8, 2)))
    x = sde.perturb(law.sample(jax.random.key(1), 8), t, z)

    @jax.jit
    def terms(x, t):
        rate = jax.jvp(lambda t: law.log_prob(x, t, sde), (t,), (jnp.ones(8),))[1]
        return rate, *value_and_divergence(lambda y: law.score(y, t, sde), x)

    rate, score, laplacian = terms(x, t)
    spread = 0.5 * sde.g2(t) * (laplacian + squared_norm(score))
    expected = spread - sde.drift_coefficient(t) * (2.0 + inner(x, score))
    np.testing.assert_allclose(rate, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("sde", "t"), [(VPSDE(), 1e-12), (LinearVESDE(), 1e-9)], ids=str)
def test_density_of_boxes_at_time_zero(sde, t):
    """1/(K (2h)^d) inside, half of it on a face, a quarter at a corner, nothing outside."""
    h, t = HALF_WIDTH, jnp.full(5, t)
    offsets = [[0.0, 0.0], [0.9 * h, -0.9 * h], [h, 0.1], [-h, h], [1.1 * h, 0.0]]
    shares = np.asarray([1.0, 1.0, 0.5, 0.25, 0.0])
    x = sde.alpha(t)[:, None] * jnp.asarray(CENTERS[:1] + np.asarray(offsets))
    density = np.exp(log_p_and_score(boxes(), x, t, sde)[0])
    # x = α (c + h) is rounded to 1e-16, of which σ ≥ 5e-8 makes 1e-8 of a share.
    np.testing.assert_allclose(density, shares / (3 * (2 * h) ** 2), rtol=1e-8)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_tails_of_boxes_are_accurate_to_rounding(dtype):
    """At a σ beyond the edge of a wide box, p ∝ Q(a), −σ s = φ/Q =: r and −σ² s' = r (r − a)."""
    beyond = [0.0, 0.5, 3.0, 3.9, 4.1, 5.9, 30.0, 300.0, 1e3, 1e4]
    t = np.repeat([1e-3, 1e-2, 0.1], 2 * len(beyond)).astype(dtype)
    sign = np.tile(np.repeat([-1.0, 1.0], len(beyond)), 3)
    x = (sign * (1.0 + t * np.tile(beyond, 6))).astype(dtype)
    with jax.enable_x64(dtype == jnp.float64), jax.numpy_dtype_promotion("strict"):
        law, sde = Boxes(jnp.zeros((1, 1), dtype), 1.0), LinearVESDE(1.0)
        states = jnp.asarray(x)[:, None], jnp.asarray(t)
        found = (*log_p_and_score(law, *states, sde), three_derivatives(law, *states, sde)[1])
        log_p, score, slope = (np.asarray(f, np.float64).ravel() for f in found)
    x, t = x.astype(np.float64), t.astype(np.float64)
    a = (np.abs(x) - 1.0) / t
    hazard = np.sqrt(2.0 / np.pi) / erfcx(a / np.sqrt(2.0))
    eps = float(jnp.finfo(dtype).eps)
    # e^(a²/2), taken for a up to 4, magnifies rounding by 8, and r − a that of r by a².
    np.testing.assert_allclose(log_p, log_ndtr(-a) - np.log(2.0), rtol=4 * eps)
    np.testing.assert_allclose(t * score, -sign * hazard, rtol=16 * eps)
    # The oracle r − a ≈ 1/a loses digits itself: 1e-16 a² of them.
    np.testing.assert_allclose(t**2 * slope, -hazard * (hazard - a), rtol=100 * eps, atol=1e-7)


def test_float32_keeps_three_derivatives_where_two_distant_boxes_compete():
    """At 30 and 100 σ the two scores are close to −30 and −100 times e₂, their cubes are not."""
    sde, found = LinearVESDE(1.0), []
    for dtype in (jnp.float32, jnp.float64):
        with jax.enable_x64(dtype == jnp.float64):
            law = Boxes(jnp.asarray([[-2.0, 0.0], [2.0, 0.0]], dtype), 1.0)
            x = jnp.asarray([[s, y] for s in (-0.7, -0.2, 0.0, 0.4) for y in (30.1, -100.3)], dtype)
            found.append(list(map(np.asarray, three_derivatives(law, x, jnp.ones(8, dtype), sde))))
    for single, double in zip(*found, strict=True):
        np.testing.assert_allclose(single, double, rtol=1e-3, atol=1e-3)


@every_sde
def test_boxes_are_finite_in_float32_wherever_a_state_may_be(sde):
    """Value and three derivatives, at centres, edges and far away, at small and large times."""
    law, places = boxes(dtype=jnp.float32), np.asarray([0.0, 0.5, -1.25, 3.0, -20.0, 1e3], "f4")
    x, t = np.asarray(list(itertools.product(places, repeat=2))), [1e-5, 1e-3, 0.1, 0.5, 1.0]
    x, t = jnp.asarray(np.tile(x, (5, 1))), jnp.repeat(jnp.asarray(t), len(x))
    found = (*log_p_and_score(law, x, t, sde), *three_derivatives(law, x, t, sde))
    assert all(bool(jnp.all(jnp.isfinite(value))) for value in found)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_box_narrower_than_the_noise_is_a_gaussian_of_its_variance(dtype):
    """U(c ± h) and N(c, h²/3) differ by O((h/σ)⁴) in log p: below rounding for h/σ = 1e-4."""
    with jax.enable_x64(dtype == jnp.float64), jax.numpy_dtype_promotion("strict"):
        law, sde = Boxes(jnp.asarray([[0.5, -1.0]], dtype), 1e-2), LinearVESDE(100.0)
        x = jnp.asarray(np.outer(10.0 ** np.arange(-1, 4), [1.0, -0.3]), dtype)
        both = (law, gaussian(law.centers[0], 1e-4 / 3))
        ours, normal = (log_p_and_score(each, x, jnp.ones(5, dtype), sde) for each in both)
        for a, b in zip(ours, normal, strict=True):
            rtol = 8 * float(jnp.finfo(dtype).eps)
            np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(jnp.max(jnp.abs(b))))


@pytest.mark.usefixtures("x64")
def test_samples_of_boxes_are_uniform_in_every_box():
    n = 20_000
    x = np.asarray(boxes().sample(jax.random.key(0), n))
    inside = np.abs(x[:, None] - CENTERS).max(axis=2) < HALF_WIDTH
    assert np.all(inside.sum(axis=1) == 1)
    assert np.all(np.abs(inside.mean(axis=0) - 1 / 3) < 4 * np.sqrt(2 / 9 / n))
    box = inside.argmax(axis=1)
    place = (x - CENTERS[box]) / HALF_WIDTH
    outer = np.einsum("bi,bj->bij", place, place)
    assert np.all(np.abs(place.mean(axis=0)) < 4 * np.sqrt(1 / 3 / n))
    assert np.all(np.abs(outer.mean(axis=0) - np.eye(2) / 3) < 4 * np.sqrt(1 / 9 / n))
    assert np.all(np.abs(np.mean(place * (box[:, None] - 1.0), axis=0)) < 4 * np.sqrt(2 / 9 / n))


@pytest.mark.usefixtures("x64")
def test_boxes_of_images_and_vectors_are_the_same_law():
    sde, t = VPSDE(), jnp.asarray([0.2, 0.7])
    images, x = boxes((1, 2, 1)), jnp.asarray([[0.3, -0.4], [2.0, 1.0]])
    log_p, score = log_p_and_score(images, x.reshape(2, 1, 2, 1), t, sde)
    expected = log_p_and_score(boxes(), x, t, sde)
    np.testing.assert_allclose(log_p, expected[0], rtol=1e-14)
    np.testing.assert_allclose(score.reshape(2, 2), expected[1], rtol=1e-13)
    assert images.sample(jax.random.key(0), 5).shape == (5, 1, 2, 1)


def test_laws_of_data_sets_are_the_published_ones():
    mog = LAWS["mog1d"]()
    np.testing.assert_allclose(mog.weights, [0.3, 0.3, 0.4], rtol=1e-6)
    np.testing.assert_allclose(7 * mog.means, [[-2], [-6], [4]], rtol=1e-6)
    np.testing.assert_allclose(49 * mog.variances, [0.1, 0.1, 1.0], rtol=1e-6)
    board = LAWS["checkerboard"]()
    cells = {tuple(c) for c in np.asarray(board.centers).tolist()}
    odd = (-3.0, -1.0, 1.0, 3.0)
    assert cells == {(i, j) for i in odd for j in odd if (i + j - 2.0) % 4.0 == 0.0}
    assert board.half_width == 1.0
    assert all(f().sample(jax.random.key(0), 2).dtype == jnp.float32 for f in LAWS.values())
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        assert all(f().sample(jax.random.key(0), 2).dtype == jnp.float64 for f in LAWS.values())
