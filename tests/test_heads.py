"""Heads against closed forms: weighted points and boxes, independent coordinates, both precisions.

The exact r_j of a law with few components is a finite sum. With it the score of a head must be that
of the law, for every SDE, and bounds and ODE must give the law's own probabilities.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import marginals
from dequantization import Draw
from heads import SPAN, Atoms, Cells, cell_terms, narrow_terms
from likelihood import (
    Divergence,
    cell_shares,
    discrete_bound,
    noised_start,
    ode_log_likelihood,
    variational_bound,
)
from models import MODELS
from ode import Solver
from operators import fold_in_each, value_hvp_and_directional
from parameterization import HEADS, TIME_LABELS, HeadModel
from real_heads import WIDEST, Mixture, Whitened
from sde_lib import SDES
from tails import hazard, log_tail
from time_sampling import Importance
from toy_data import Boxes
from toy_data import Mixture as MixtureLaw

pytestmark = pytest.mark.usefixtures("compiled_at_o0")

every_sde = pytest.mark.parametrize("sde", [cls() for cls in SDES.values()], ids=SDES)
LEVELS, LOW, HIGH = 5, -1.0, 1.0
# Three examples of three coordinates, as levels; the law puts these weights on them.
POINTS = np.array([[0, 2, 4], [1, 2, 0], [4, 0, 0]])
WEIGHTS = np.array([0.5, 0.3, 0.2])


def noised(sde, x0, seed=0):
    """(x_t, t) of copies of x0 at times from 0.02 on."""
    rng = np.random.default_rng(seed)
    t = jnp.asarray(np.geomspace(0.02, 0.98, 6))
    x0 = jnp.asarray(x0[rng.integers(0, len(x0), len(t))])
    return sde.perturb(x0, t, jnp.asarray(rng.standard_normal(x0.shape))), t


def others(log_terms):
    """Σ over the other coordinates, [B, K, d] → [B, K, d]: what all but j say of component k."""
    return log_terms.sum(axis=-1, keepdims=True) - log_terms


def logits_of(points, log_weights, levels):
    """log Σ_{components with level k at j} e^{log weight}, [B, K, d] → [B, d, levels]."""
    found = np.full((*log_weights.shape[::2], levels), -1e6)
    for j, k in itertools.product(range(points.shape[1]), range(levels)):
        here = points[:, j] == k
        if here.any():
            found[:, j, k] = np.logaddexp.reduce(log_weights[:, here, j], axis=1)
    return jnp.asarray(found)


def zero_prior(head, shape):
    return jax.tree.map(jnp.zeros_like, head.arrays(shape))


def check_score(head, arrays, net, x, t, sde, law, rtol):
    """The score of the head is that of the law."""
    found = jax.jit(lambda *a: head.score(*a, sde))(arrays, net, x, t)
    expected = jax.jit(lambda *a: law.score(*a, sde))(x, t)
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=1e-11)


@every_sde
@pytest.mark.usefixtures("x64")
def test_atoms_with_the_exact_law_give_the_score_of_weighted_points(sde):
    head = Atoms(LEVELS, LOW, HIGH)
    values = np.linspace(LOW, HIGH, LEVELS)[POINTS]
    x, t = noised(sde, values)
    law = MixtureLaw(jnp.asarray(WEIGHTS), jnp.asarray(values), jnp.zeros(3))
    alpha, sigma = sde.alpha(t)[:, None, None], sde.sigma(t)[:, None, None]
    logs = np.asarray(-0.5 * ((x[:, None] - alpha * values[None]) / sigma) ** 2)
    logits = logits_of(POINTS, np.log(WEIGHTS)[None, :, None] + others(logs), LEVELS)
    check_score(head, zero_prior(head, (3,)), logits, x, t, sde, law, rtol=1e-12)


@every_sde
@pytest.mark.usefixtures("x64")
def test_cells_with_the_exact_law_give_the_score_of_boxes(sde):
    head, half = Cells(LEVELS, LOW, HIGH), (HIGH - LOW) / LEVELS / 2.0
    centers = (LOW + half * (2 * np.arange(LEVELS) + 1))[POINTS]
    law = Boxes(jnp.asarray(centers), half)
    x, t = noised(sde, centers)
    alpha, sigma = np.asarray(sde.alpha(t))[:, None, None], np.asarray(sde.sigma(t))[:, None, None]
    m = (centers[None] - np.asarray(x)[:, None] / alpha) * alpha / sigma
    logs, _ = cell_terms(jnp.asarray(m), jnp.asarray(2.0 * half * alpha / sigma))
    logits = logits_of(POINTS, others(np.asarray(logs)), LEVELS)
    check_score(head, zero_prior(head, (3,)), logits, x, t, sde, law, rtol=1e-11)


@every_sde
@pytest.mark.usefixtures("x64")
def test_mixture_with_the_exact_law_gives_the_score_of_a_mixture(sde):
    head = Mixture(components=3, floor=0.02)
    means, variances = np.array([[-1.0, 0.5], [0.3, 1.0], [1.0, -1.0]]), np.array([0.1, 0.4, 0.01])
    law = MixtureLaw(jnp.asarray(WEIGHTS), jnp.asarray(means), jnp.asarray(variances))
    x, t = noised(sde, means)
    alpha, sigma = np.asarray(sde.alpha(t))[:, None], np.asarray(sde.sigma(t))[:, None]
    spread = (alpha**2 * variances[None] + sigma**2)[..., None]
    logs = -0.5 * ((np.asarray(x)[:, None] - alpha[..., None] * means[None]) ** 2 / spread)
    logs = logs - 0.5 * np.log(spread)
    law_of_j = np.log(WEIGHTS)[None, :, None] + others(logs)
    # A prior that is not standard: its location and scale must come out again.
    prior = head.arrays((2,))["prior"]
    prior = prior | {"location": jnp.asarray([0.5, -2.0]), "scale": jnp.asarray([2.0, 0.5])}
    scaled = (means - np.asarray(prior["location"])) / np.asarray(prior["scale"])  # [3, 2]
    inner = variances[:, None] / np.asarray(prior["scale"])[None] ** 2 - head.floor**2
    net = np.concatenate(
        [
            law_of_j.swapaxes(1, 2),
            np.broadcast_to(scaled.T, (len(t), 2, 3)),
            np.broadcast_to(0.5 * np.log(inner.T), (len(t), 2, 3)),
        ],
        axis=-1,
    )
    check_score(head, {"prior": prior}, jnp.asarray(net), x, t, sde, law, rtol=1e-12)


@every_sde
@pytest.mark.parametrize("shape", [(3,), (2, 2, 1)], ids=["vector", "image"])
@pytest.mark.usefixtures("x64")
def test_whitened_starts_as_the_gaussian_of_the_data_and_adds_the_velocity(sde, shape):
    """s = −(α²C + σ²I)⁻¹(x − αμ), and n enters as α√C/σ (α²C + σ²I)^{-1/2} Uᵀ n."""
    n, rng = math.prod(shape), np.random.default_rng(0)
    data = rng.standard_normal((400, n)) @ rng.standard_normal((n, n)) + 0.3
    head = Whitened()
    arrays = {"prior": head.prior(shape, [data[:150].reshape(-1, *shape), data[150:]])}
    mean, covariance = data.mean(axis=0), np.cov(data.T, bias=True)
    x, t = noised(sde, data.reshape(-1, *shape))
    net = jnp.asarray(rng.standard_normal(x.shape))
    expected = []
    values, basis = np.linalg.eigh(covariance)
    for b in range(len(t)):
        alpha, sigma = float(sde.alpha(t)[b]), float(sde.sigma(t)[b])
        v = alpha**2 * values + sigma**2
        gap = np.asarray(x[b]).ravel() - alpha * mean
        n_b = np.asarray(net[b]).ravel()
        n_b = n_b if len(shape) == 1 else basis.T @ n_b
        along = basis.T @ gap / v + alpha * np.sqrt(values) / (sigma * np.sqrt(v)) * n_b
        expected.append(-(basis @ along).reshape(shape))
    np.testing.assert_allclose(head.score(arrays, net, x, t, sde), expected, rtol=1e-9, atol=1e-9)
    # What the network sees has unit variance in every direction.
    many = jnp.asarray(data.reshape(-1, *shape))
    t = jnp.full((len(many),), 0.4 * sde.T)
    x = sde.perturb(many, t, jnp.asarray(rng.standard_normal(many.shape)))
    seen = np.asarray(head.inputs(arrays, x, t, sde)[0]).reshape(len(many), n)
    np.testing.assert_allclose(np.cov(seen.T), np.eye(n), atol=0.35)


def test_whitened_start_is_equivariant_under_affine_maps():
    """The Gaussian of A x + b is that of x: log p(A x + b) = log p(x) − log|det A| at the start."""
    rng = np.random.default_rng(1)
    data = rng.standard_normal((500, 3)) @ rng.standard_normal((3, 3))
    a, b = rng.standard_normal((3, 3)), rng.standard_normal(3)
    logs = []
    for values in (data, data @ a.T + b):
        found = Whitened().prior((3,), [values])
        gap = (values - np.asarray(found["mean"])) @ np.asarray(found["basis"])
        squares = (gap**2 / np.asarray(found["variances"])).sum(axis=1)
        logs.append(-0.5 * (squares + np.log(np.asarray(found["variances"])).sum()))
    shift = -math.log(abs(np.linalg.det(a)))
    np.testing.assert_allclose(logs[1], logs[0] + shift, rtol=1e-3, atol=1e-3)


def model_of(head, sde, shape, log_prior=None):
    """A head whose network is zero, so that its law is the prior; (model, parameters)."""
    network = MODELS["mlp"](hidden=4, depth=1, embed_dim=4)
    network = network.clone(outputs=head.outputs) if head.outputs > 1 else network
    model = HeadModel(network, sde, label=TIME_LABELS["log_snr"], head=head)
    with jax.enable_x64(False):
        shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), shape))
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
    return model, params | ({} if log_prior is None else {"prior": jnp.asarray(log_prior)})


def random_law(shape, levels, seed=0):
    logits = np.random.default_rng(seed).standard_normal((*shape, levels))
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


@every_sde
@pytest.mark.parametrize("levels", [4, 40], ids=["all cells", "window"])
@pytest.mark.usefixtures("x64")
def test_ode_of_independent_cells_is_their_probability(sde, levels):
    """−log p(x) + log q(x|k) − … = −log π_k for every example; 40 levels go through the window."""
    head, shape, number = Cells(levels, LOW, HIGH), (2,), 6
    law = random_law(shape, levels)
    model, params = model_of(head, sde, shape, law)
    k = np.random.default_rng(0).integers(0, levels, (number, *shape))
    u = np.random.default_rng(1).random(k.shape)
    x = jnp.asarray(LOW + head.width * (k + u))
    keys = fold_in_each(jax.random.key(0), jnp.arange(number))
    t_min = 0.02 if sde.alpha(jnp.ones(())) == 1.0 else 1e-4

    @jax.jit
    def solved(x, keys):
        start = noised_start(model.decoder(params), sde, Draw(x, jnp.zeros(number)), keys, t_min)
        found = ode_log_likelihood(
            model.score(params), sde, start.x, keys, t_min=t_min,
            solver=Solver("dopri8", 1e-7, 1e-7), divergence=Divergence("exact"),
        )  # fmt: skip
        return found.log_p - start.log_q, found.latent

    log_p, latent = solved(x, keys)
    log_pi = np.take_along_axis(law[None], k[..., None], -1)[..., 0].sum(-1)
    # The model is what the flow makes of the prior, not of the law that the cells have at T.
    end = jnp.full(number, sde.T)
    tau = sde.sigma(end) / sde.alpha(end)
    logits = jnp.broadcast_to(jnp.asarray(law)[None], (number, *law.shape))
    y = latent / sde.alpha(end)[:, None]
    _, log_mass = jax.jit(head.mean_and_log_mass)(logits, y, tau)
    log_p_end = log_mass.sum(axis=1) - math.prod(shape) * jnp.log(head.width * sde.alpha(end))
    expected = log_pi - math.prod(shape) * math.log(head.width)
    expected = expected + sde.prior_logp(latent) - log_p_end
    allowed = 1e-5 if levels == 4 else 1e-3  # of coarse cells
    np.testing.assert_allclose(log_p, expected, atol=allowed)


@every_sde
@pytest.mark.usefixtures("x64")
def test_bound_of_independent_cells_is_their_entropy(sde):
    """E[bound] + log q = −log π_k where the head is exact, within four standard errors."""
    levels, number = 4, 400
    head, law = Cells(levels, LOW, HIGH), random_law((1,), levels, seed=3)
    model, params = model_of(head, sde, (1,), law)
    rng = np.random.default_rng(0)
    k = rng.choice(levels, number, p=np.exp(law[0]))
    x = jnp.asarray(LOW + head.width * (k + rng.random(number)))[:, None]
    found = bound_of(model, params, sde, x)
    check_entropy(found, np.asarray(found.nll) - math.log(head.width) + law[0][k])


@every_sde
@pytest.mark.usefixtures("x64")
def test_discrete_bound_of_independent_atoms_is_their_entropy(sde):
    """E[bound] = −log π_k where the head is exact, within four standard errors."""
    levels, number = 4, 400
    head, law = Atoms(levels, LOW, HIGH), random_law((1,), levels, seed=3)
    model, params = model_of(head, sde, (1,), law)
    k = np.random.default_rng(0).choice(levels, number, p=np.exp(law[0]))
    bound = functools.partial(
        discrete_bound, model.score(params), model.log_probability(params), sde,
        distance=head.width, **exact_times(sde),
    )  # fmt: skip
    x = jnp.asarray(np.linspace(LOW, HIGH, levels)[k])[:, None]
    found = jax.jit(bound)(x, fold_in_each(jax.random.key(0), jnp.arange(number)))
    check_entropy(found, np.asarray(found.nll) + law[0][k])
    # At t_min the level is known; of much noise, nothing is.
    assert abs(found.start).max() < 1e-6


def bound_of(model, params, sde, x):
    """The variational bound of every x with the decoder of the head."""
    bound = functools.partial(
        variational_bound, model.score(params), sde,
        decoder=model.decoder(params), **exact_times(sde),
    )  # fmt: skip
    return jax.jit(bound)(x, fold_in_each(jax.random.key(0), jnp.arange(len(x))))


def exact_times(sde):
    t_min = 1e-3 if sde.alpha(jnp.ones(())) == 1.0 else 1e-4
    return {"proposal": Importance(sde, t_min), "num_times": 128}


def check_entropy(found, gap):
    """The mean of the gap is zero, and its noise is small enough for an error to show."""
    error = gap.std() / math.sqrt(len(gap))
    assert abs(gap.mean()) < 4.0 * error + float(np.mean(found.prior))
    assert error < 0.05


@pytest.mark.usefixtures("x64")
def test_what_cells_cost_in_a_bound_is_what_the_noise_in_a_cell_costs():
    """cell_shares against the integral of a model that knows the cell: one level, π = 1."""
    sde, number = SDES["vpsde"](), 2000
    head = Cells(2, -1.0, 3.0)  # the second cell has no mass: x is uniform in [−1, 1]
    model, params = model_of(head, sde, (1,), np.array([[0.0, -1e6]]))
    x = jnp.asarray(np.random.default_rng(0).uniform(-1.0, 1.0, (number, 1)))
    found = bound_of(model, params, sde, x)
    edges = exact_times(sde)["proposal"].quantile(jnp.linspace(0.0, 1.0, 5))
    edges = np.log(np.asarray(sde.sigma(edges) / sde.alpha(edges)))
    sampled = np.asarray(found.strata).reshape(4, 32, number).sum(axis=1)
    error = sampled.std(axis=1) / math.sqrt(number)
    np.testing.assert_array_less(abs(sampled.mean(axis=1) - cell_shares(edges, 2.0)), 4 * error)
    assert error.max() < 0.03 < sampled.mean(axis=1)[:3].min()


@every_sde
@pytest.mark.usefixtures("x64")
def test_known_noise_is_the_mean_of_the_noise_given_the_cell(sde):
    """E[z | x_t, cell] by numerical integration over the place in the cell."""
    head = Cells(5, LOW, HIGH)
    for t, k, x in ((0.05, 1, -0.3), (0.3, 4, 0.2), (0.6, 0, 1.5)):
        u = LOW + head.width * (k + (np.arange(20_000) + 0.5) / 20_000)
        t = jnp.asarray([t])
        alpha, sigma = float(sde.alpha(t)[0]), float(sde.sigma(t)[0])
        z = (x - alpha * u) / sigma
        weight = np.exp(-0.5 * (z**2 - np.min(z**2)))
        expected = (weight * z).sum() / weight.sum()
        x0 = jnp.asarray([[LOW + head.width * (k + 0.3)]])
        found = head.known_noise(x0, jnp.asarray([[x]]), t, sde)
        np.testing.assert_allclose(found, [[expected]], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("x", [-4.0, -40.0])
def test_a_mixture_far_from_all_data_draws_back(x):
    """In float32, whatever width the network says: exp(2 · 80) is infinite."""
    sde, head = SDES["vpsde"](), Mixture(components=2)
    t = jnp.asarray([0.02, 0.5, 0.99])
    net = jnp.full((3, 1, 6), 80.0).at[..., :4].set(0.0)  # log π, μ; then log s
    found = head.score(head.arrays((1,)), net, jnp.full((3, 1), x), t, sde)
    variances = sde.alpha(t) ** 2 * WIDEST**2 + sde.sigma(t) ** 2
    np.testing.assert_allclose(found[:, 0], -x / variances, rtol=1e-4)
    arrays = head.arrays((1,))  # of a column with outliers, as it starts
    arrays["prior"]["log_deviations"] += math.log(30.0)
    found = head.score(arrays, 0.0 * net, jnp.full((3, 1), x), t, sde)
    variances = sde.alpha(t) ** 2 * 30.0**2 + sde.sigma(t) ** 2
    np.testing.assert_allclose(found[:, 0], -x / variances, rtol=1e-3)


@pytest.mark.usefixtures("x64")
def test_decoder_of_a_mixture_is_bayes_rule():
    """log p(x0 | x_t) by numerical integration over x0."""
    sde, head = SDES["vpsde"](), Mixture(components=2, floor=0.05)
    rng, t = np.random.default_rng(0), jnp.asarray([0.1, 0.4])
    arrays, net = head.arrays((1,)), jnp.asarray(rng.standard_normal((2, 1, 6)))
    x = jnp.asarray(rng.standard_normal((2, 1)))
    grid = np.linspace(-12.0, 12.0, 48_001)
    alpha, sigma = np.asarray(sde.alpha(t)), np.asarray(sde.sigma(t))
    for b in range(2):
        pi, mu, s = np.asarray(net[b, 0]).reshape(3, 2)
        variance = 0.05**2 + np.exp(2.0 * s)
        pi = np.exp(pi) / np.exp(pi).sum()
        normal = lambda u, m, v: np.exp(-0.5 * (u - m) ** 2 / v) / np.sqrt(2 * math.pi * v)  # noqa: E731
        r = sum(p * normal(grid, m, v) for p, m, v in zip(pi, mu, variance, strict=True))
        joint = r * normal(float(x[b, 0]), alpha[b] * grid, sigma[b] ** 2)
        posterior = joint / np.trapezoid(joint, grid)
        x0 = 0.3
        tau = sigma[b] / alpha[b]
        expected = np.log(np.interp(x0, grid, posterior))
        expected -= np.log(normal(float(x[b, 0]) / alpha[b], x0, tau**2))
        found = head.log_ratio(
            arrays, net[b : b + 1], jnp.asarray([[x0]]), x[b : b + 1], t[b : b + 1], sde
        )
        np.testing.assert_allclose(found[0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("x64")
def test_window_and_coarse_cells_are_within_their_stated_errors():
    """256 levels against exact masses in all cells: 8.7e-5 |m³ − 3m| at τ = 2h, e⁻³² below."""
    head, rng = Cells(256, LOW, HIGH), np.random.default_rng(0)
    logits = jnp.asarray(rng.standard_normal((400, 1, 256)))
    ratio = jnp.asarray(np.geomspace(0.05, 50.0, 400))
    tau = ratio * head.width
    y = jnp.asarray(rng.uniform(-1.0, 1.0, (400, 1)) + np.asarray(tau)[:, None] * 0.5)
    cells = jnp.arange(256, dtype=y.dtype)[None, None]

    @jax.jit
    def exact_mean(logits, y, tau):
        terms, u = cell_terms(*head.position(y, tau, cells))
        return jnp.sum(jax.nn.softmax(logits + terms, axis=-1) * u, axis=-1)

    exact = exact_mean(logits, y, tau)
    found, _ = jax.jit(head.mean_and_log_mass)(logits, y, tau)
    error = np.abs(np.asarray(found - exact))[:, 0]
    fine = np.asarray(ratio) < 2.0
    assert error[fine].max() < 1e-10
    assert (
        1e-9 < error[~fine].max() < 5e-4
    )  # of units of 1/τ: the stated error is met, and is there
    far = np.asarray(ratio) > 20.0
    assert error[far].max() < 1e-7


@pytest.mark.parametrize("levels", [16, 256])
def test_float32_is_float64_from_1e_4_to_1e4_cells(levels):
    """1e-4 of 1/τ, at the same points; gradients are finite at all of them and outside of cells."""
    head, rng = Cells(levels, LOW, HIGH), np.random.default_rng(0)
    number = 1000
    with jax.enable_x64(True):
        tau = np.geomspace(1e-4, 1e4, number) * head.width
        y = rng.uniform(-1.0, 1.0, number) + np.minimum(tau, 3.0) * rng.standard_normal(number)
        y[::7] = rng.uniform(-4.0, 4.0, len(y[::7]))  # outside of all cells, too
        y, tau = y.astype(np.float32), tau.astype(np.float32)
        logits = rng.standard_normal((number, 1, levels)).astype(np.float32)

        mean = jax.jit(lambda y, tau, logits: head.mean_and_log_mass(logits, y, tau))
        inputs = y[:, None], tau, logits
        double = mean(*(jnp.asarray(a, jnp.float64) for a in inputs))
        single = mean(*(jnp.asarray(a, jnp.float32) for a in inputs))
        scale = 1.0 + np.abs(np.asarray(double[0]))
        assert np.max(np.abs(single[0] - double[0]) / scale) < 1e-4
        size = 1.0 + np.abs(np.asarray(double[1]))
        assert np.max(np.abs(single[1] - double[1]) / size) < 1e-4
        total = lambda *a: jnp.sum(mean(*a)[0] + mean(*a)[1])  # noqa: E731
        for gradient in jax.jit(jax.grad(total, argnums=(0, 1, 2)))(*map(jnp.asarray, inputs)):
            assert gradient.dtype == jnp.float32
            assert bool(jnp.isfinite(gradient).all())


def test_score_far_outside_is_that_of_the_nearest_edge():
    head, tau = Cells(17, LOW, HIGH), jnp.asarray([0.01], jnp.float32)
    found, _ = head.mean_and_log_mass(jnp.zeros((1, 1, 17)), jnp.asarray([[1.5]]), tau)
    expected = -float(hazard(jnp.asarray(50.0)))  # (1 − y)/τ = −50, and 1/50 from the tail
    np.testing.assert_allclose(found, [[expected]], rtol=1e-5)


@pytest.mark.usefixtures("x64")
def test_tails_and_their_derivatives():
    from scipy.special import log_ndtr

    x = np.concatenate([np.linspace(-12.0, 35.0, 400), [100.0, 1e4]])
    np.testing.assert_allclose(log_tail(jnp.asarray(x)), log_ndtr(-x), rtol=1e-8, atol=1e-15)
    step = 1e-4
    inside = jnp.asarray(x[:-2])
    slope = (log_tail(inside + step) - log_tail(inside - step)) / (2.0 * step)
    np.testing.assert_allclose(-hazard(inside), slope, rtol=1e-6, atol=1e-9)
    for order in (1, 2):
        derivative = functools.reduce(lambda f, _: jax.grad(f), range(order), hazard)
        lower = functools.reduce(lambda f, _: jax.grad(f), range(order - 1), hazard)
        slope = (jax.vmap(lower)(inside + step) - jax.vmap(lower)(inside - step)) / (2.0 * step)
        np.testing.assert_allclose(jax.vmap(derivative)(inside), slope, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("x64")
def test_narrow_cells_meet_the_exact_ones():
    """At the threshold the two formulas agree to their stated error w⁴/720."""
    w = 0.02
    m = jnp.linspace(-4.0, 4.0, 101)[None, :, None]
    exact, narrow = cell_terms(m, jnp.full((1, 1, 1), w)), narrow_terms(m, jnp.full((1, 1, 1), w))
    for a, b in zip(exact, narrow, strict=True):
        np.testing.assert_allclose(a, b, atol=w**4 / 720.0 * 60.0)
    # One step below the threshold the narrow form is used, without a jump.
    low = float(jnp.finfo(jnp.float64).eps) ** (1.0 / 6.0)
    sides = [cell_terms(m, jnp.full((1, 1, 1), low * c)) for c in (1.0 - 1e-9, 1.0 + 1e-9)]
    np.testing.assert_allclose(sides[0][1], sides[1][1], atol=1e-11)


@pytest.mark.parametrize("kind", ["cells", "atoms", "mixture", "whitened"])
@pytest.mark.usefixtures("x64")
def test_second_derivatives_by_one_sweep_are_those_of_nested_jvps(kind):
    sde, shape = SDES["vpsde"](), (3,)
    head = HEADS[kind](40, LOW, HIGH) if kind in ("cells", "atoms") else HEADS[kind]()
    model, params = model_of(head, sde, shape)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: a + 0.3 * jnp.asarray(rng.standard_normal(a.shape)), params)
    if kind == "whitened":
        params["prior"] |= {"variances": jnp.asarray([0.5, 1.0, 2.0])}
    if kind == "mixture":
        params["prior"] |= {"scale": jnp.asarray([0.5, 1.0, 2.0])}
    t = jnp.asarray([1e-3, 0.01, 0.3, 0.9])
    x, v = jnp.asarray(rng.standard_normal((4, 3))), jnp.asarray(rng.standard_normal((4, 3)))
    field = lambda y: model.score(params)(y, t)  # noqa: E731
    slope = lambda y: jax.jvp(field, (y,), (v,))[1]  # noqa: E731
    value, first, second = jax.jit(functools.partial(value_hvp_and_directional, field))(x, v)
    expected = jax.jit(lambda y: (field(y), slope(y), jax.jvp(slope, (y,), (v,))[1]))(x)
    np.testing.assert_allclose(value, expected[0], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(first, expected[1], rtol=1e-7, atol=1e-7 * np.abs(first).max())
    nested = expected[2]
    np.testing.assert_allclose(second, nested, rtol=1e-6, atol=1e-6 * np.abs(nested).max())
    assert np.abs(nested).max() > 1e-3


def test_digits_start_at_their_histogram():
    """Mean of −log2 π_k: 2.4041 bits/dim; the network of the head starts near zero."""
    from sklearn.datasets import load_digits

    images = load_digits().images.astype(np.uint8)[..., None]
    is_test = np.arange(len(images)) % 5 == 4
    head = Cells(17, LOW, HIGH)
    prior = np.asarray(head.prior((8, 8, 1), [images[~is_test][:900], images[~is_test][900:]]))
    found = np.take_along_axis(prior[None], images[is_test][..., None].astype(int), -1)
    assert -found.mean() / math.log(2.0) == pytest.approx(2.4041, abs=5e-5)
    np.testing.assert_allclose(np.exp(prior).sum(-1), 1.0, rtol=1e-5)


def test_levels_of_large_images_are_pooled_over_positions():
    head = Cells(256, LOW, HIGH)
    assert head.arrays((32, 32, 3))["prior"].shape == (32, 32, 3, 256)
    assert head.arrays((64, 64, 3))["prior"].shape == (3, 256)
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    prior = np.asarray(head.prior((64, 64, 3), [images]))
    assert prior.shape == (3, 256)
    expected = np.mean(images[..., 1] == 7)
    assert math.exp(prior[1, 7]) == pytest.approx(expected, rel=0.05)
    net = jnp.zeros((2, 64, 64, 3, head.outputs))
    arrays = {"prior": jnp.asarray(prior), "matrix": jnp.ones((head.rank, 256))}
    y = jnp.zeros((2, 64, 64, 3))
    found = head.logits(arrays, net, y, jnp.ones(2))[1, 5, 6, 1]
    np.testing.assert_allclose(found, prior[1], rtol=1e-5)


def test_moments_and_mixtures_of_a_stream_are_those_of_the_whole():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((3000, 4)) @ rng.standard_normal((4, 4)) + 100.0
    found = marginals.moments(np.array_split(values, 7), full=True)
    np.testing.assert_allclose(found.mean, values.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(values.T, bias=True), rtol=1e-9)
    diagonal = marginals.moments(np.array_split(values, 7), full=False)
    np.testing.assert_allclose(diagonal.variances, values.var(axis=0), rtol=1e-9)
    two = np.where(rng.random((4000, 1)) < 0.3, -1.0, 2.0) + 0.1 * rng.standard_normal((4000, 1))
    mixture = marginals.mixtures(two, 2, floor=0.01)
    order = np.argsort(mixture.means[0])
    np.testing.assert_allclose(mixture.means[0][order], [-1.0, 2.0], atol=0.02)
    np.testing.assert_allclose(np.exp(mixture.log_weights[0][order]), [0.3, 0.7], atol=0.02)
    np.testing.assert_allclose(mixture.deviations[0], 0.1, atol=0.01)


@pytest.mark.parametrize("levels", [SPAN, SPAN + 1])
def test_more_levels_than_a_window_share_a_matrix(levels):
    head = Cells(levels, LOW, HIGH, rank=3)
    assert head.outputs == (levels if levels == SPAN else 5)
    arrays = head.arrays((2,))
    assert ("matrix" in arrays) == (levels > SPAN)
    if levels > SPAN:  # of size 1, high noise governs the training
        assert 0.0 < np.abs(arrays["matrix"]).max() < 0.2


def test_the_gain_multiplies_what_moves_the_law():
    """A network that gives a under a gain of 3 is one that gives 3 a under a gain of 1."""
    rng = np.random.default_rng(0)
    net = jnp.asarray(rng.standard_normal((2, 3, 18)), jnp.float32)
    y, tau = jnp.asarray(0.5 * rng.standard_normal((2, 3)), jnp.float32), jnp.asarray([0.01, 0.3])
    found = []
    for gain, output in ((3.0, net), (1.0, net.at[..., -2].multiply(3.0))):
        head = Cells(256, LOW, HIGH, gain=gain)
        found.append(head.mean_and_log_mass(head.logits(head.arrays((3,)), output, y, tau), y, tau))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"gain=0.0: need more than 0"):
        Cells(256, LOW, HIGH, gain=0.0)
