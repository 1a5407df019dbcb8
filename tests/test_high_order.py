"""Orders 2 and 3 against the weighted-points oracle, published values and closed forms."""

import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from high_order import (
    HighOrder,
    second_order_matrix,
    second_order_residual,
    third_order_residual,
    third_order_vector,
)
from operators import (
    PROBES,
    fold_in_all,
    inner,
    scale,
    squared_norm,
    value_and_jacobian,
    value_hvp_and_directional,
    value_hvp_and_gradient,
    value_jacobian_and_trace_gradient,
)
from parameterization import score_from_velocity
from sde_lib import SDES, VPSDE
from terms import Point, Terms
from toy_data import Mixture, gaussian, weighted_points

pytestmark = pytest.mark.usefixtures("x64")
FIXTURES = Path(__file__).resolve().parents[2] / "shared" / "fixtures"
D = 3


def points():
    rng = np.random.default_rng(1)
    weights = jnp.asarray([0.1, 0.2, 0.3, 0.4])
    return weighted_points(weights, jnp.asarray(rng.standard_normal((4, D))))


def oracle_inputs(sde, shift):
    """One x_t; per data point its noise, its posterior weight, and s, Hv, ∇(vᵀHv) of the score.

    The score is the exact one of the noised points plus a constant, so δ = σ × shift.
    """
    data, t = points(), jnp.full((1,), 0.4)
    x = jnp.asarray([[0.3, -0.5, 0.8]])
    v = jnp.asarray([[1.0, -1.0, 1.0]])
    posterior = jax.nn.softmax(data.log_components(x, t, sde), axis=1)[0]
    field = lambda y: data.score(y, t, sde) + shift[None]  # noqa: E731
    s, hv, third = jax.jit(functools.partial(value_hvp_and_gradient, field))(x, v)
    spread = lambda a: jnp.broadcast_to(a, (4, D))  # noqa: E731
    z = scale(1.0 / spread_time(sde.sigma(t)), x - scale(spread_time(sde.alpha(t)), data.means))
    sigma = spread_time(sde.sigma(t))
    e1 = scale(sigma, spread(s)) + z
    return posterior, e1, spread(hv), spread(third), spread(v), sigma


def spread_time(value):
    return jnp.broadcast_to(value, (4,))


def terms_of_orders(e1, hv, third, v, sigma):
    """The three terms of A v and the six of C, each on its own."""
    along = inner(e1, v)
    second = [scale(sigma**2, hv), v, -scale(along, e1)]
    order3 = [
        scale(sigma**3, third), scale(along**2, e1), -scale(sigma**2 * inner(v, hv), e1),
        -scale(squared_norm(v), e1), -2.0 * scale(along * sigma**2, hv), -2.0 * scale(along, v),
    ]  # fmt: skip
    return second, order3


@pytest.mark.parametrize("name", SDES)
def test_conditional_means_are_those_of_a_shifted_score(name):
    """E[e1] = δ, E[Av] = −(v·δ)δ, E[v·Av] = −(v·δ)², E[C] = (v·δ)² δ."""
    shift = jnp.asarray([0.3, -0.2, 0.5])
    posterior, e1, hv, third, v, sigma = oracle_inputs(SDES[name](), shift)
    delta, probe = sigma[0] * shift, v[0]
    along = probe @ delta
    a_v = second_order_residual(e1, hv, v, sigma)
    c = third_order_residual(e1, hv, third, v, sigma)
    scale_of = max(1.0, float(np.abs(delta).max()) ** 3)
    for mean, expected in (
        (posterior @ e1, delta),
        (posterior @ a_v, -along * delta),
        (posterior @ inner(v, a_v), -(along**2)),
        (posterior @ c, along**2 * delta),
    ):
        np.testing.assert_allclose(mean, expected, rtol=1e-11, atol=1e-12 * scale_of)


@pytest.mark.parametrize("flipped", range(9))
def test_the_oracle_sees_a_flipped_sign_in_each_of_the_nine_terms(flipped):
    shift = jnp.asarray([0.3, -0.2, 0.5])
    posterior, e1, hv, third, v, sigma = oracle_inputs(VPSDE(), shift)
    second, order3 = terms_of_orders(e1, hv, third, v, sigma)
    np.testing.assert_allclose(sum(second), second_order_residual(e1, hv, v, sigma), rtol=1e-12)
    np.testing.assert_allclose(
        sum(order3), third_order_residual(e1, hv, third, v, sigma), rtol=1e-11, atol=1e-12
    )
    terms = second if flipped < 3 else order3
    wrong = posterior @ (sum(terms) - 2.0 * terms[flipped if flipped < 3 else flipped - 3])
    along, delta = v[0] @ (sigma[0] * shift), sigma[0] * shift
    expected = -along * delta if flipped < 3 else along**2 * delta
    assert float(np.abs(wrong - expected).max()) > 1e-3


def fixture_score(parameters, x, t):
    """The score of the fixtures' README, section 5; its Jacobian is not symmetric."""
    a, b, c, e = parameters
    mean = jnp.mean(x, axis=1)[:, None]
    body = x + a * jnp.sin(2.0 * x + t[:, None]) + b * mean + c * jnp.roll(x, -1, 1) * jnp.sin(x)
    return -body / (1.0 + t)[:, None] + e


def by_probe(field, x, z, sigma, v):
    """Parts of order 3 by the probe v."""

    @jax.jit
    def parts(x, z, sigma, v):
        score, hv, third = value_hvp_and_gradient(field, x, v)
        return HighOrder(3).parts(scale(sigma, score) + z, hv, third, v, sigma)

    return parts(x, z, sigma, v)


def exactly(field, x, z, sigma):
    """Parts of order 3 from the Jacobian."""

    @jax.jit
    def parts(x, z, sigma):
        score, jacobian, trace_gradient = value_jacobian_and_trace_gradient(field, x)
        return HighOrder(3).exact_parts(scale(sigma, score) + z, jacobian, trace_gradient, sigma)

    return parts(x, z, sigma)


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_published_losses_and_gradients(name):
    path = FIXTURES / "dsm_orders.npz"
    if not path.exists():
        pytest.skip(f"{path.name} is not here")
    data = np.load(path)
    x0, t, z, v = (jnp.asarray(data[k]) for k in ("x0", "t", "z", "v"))
    sde = SDES[name + "sde"]()
    sigma, x = sde.sigma(t), sde.perturb(x0, t, z)
    start = jnp.asarray([0.3, 0.1, 0.2, 0.0])

    def probed_at(parameters):
        return by_probe(lambda y: fixture_score(parameters, y, t), x, z, sigma, v)

    probed = probed_at(start)
    exact = exactly(lambda y: fixture_score(start, y, t), x, z, sigma)
    for ours, theirs in (
        (probed["frobenius"], "loss2_frobenius"), (probed["trace"], "loss2_trace"),
        (probed["third"], "loss3"), (exact["frobenius"], "exact_frobenius"),
        (exact["trace"], "exact_trace"), (exact["third"], "exact_order3"),
    ):  # fmt: skip
        np.testing.assert_allclose(ours, data[f"{name}/{theirs}"], rtol=1e-9)
    jacobian = jax.jit(jax.jacobian(probed_at))(start)
    order2 = jacobian["frobenius"] + jacobian["trace"]
    np.testing.assert_allclose(order2, data[f"{name}/grad_loss2"], rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(jacobian["third"], data[f"{name}/grad_loss3"], rtol=1e-8, atol=1e-10)


def test_an_additive_constant_gets_no_gradient_from_orders_2_and_3():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, D)))
    t, z = jnp.full((4,), 0.3), x[::-1]
    sigma, v = VPSDE().sigma(t), jnp.sign(x)

    def total(constant, part):
        field = lambda y: fixture_score((0.3, 0.1, 0.2, constant), y, t)  # noqa: E731
        return by_probe(field, x, z, sigma, v)[part].sum()

    for part in ("frobenius", "trace", "third"):
        assert float(total(0.5, part)) != float(total(0.0, part))
        slope = jax.jit(jax.grad(total), static_argnums=1)(0.5, part)
        np.testing.assert_allclose(slope, 0.0, atol=1e-14)


def test_probes_average_to_the_exact_forms():
    """Over all 2^d probes: mean ‖Av‖² = ‖A‖_F², mean v·Av = tr A, mean C = exact C."""
    d = 4
    rng = np.random.default_rng(3)
    x, z = (jnp.asarray(np.repeat(rng.standard_normal((1, d)), 2**d, axis=0)) for _ in range(2))
    v = jnp.asarray(list(itertools.product([-1.0, 1.0], repeat=d)))
    t = jnp.full((2**d,), 0.3)
    sigma = VPSDE().sigma(t)
    field = lambda y: fixture_score((0.3, 0.1, 0.2, 0.0), y, t[: y.shape[0]])  # noqa: E731
    s, hv, third = jax.jit(functools.partial(value_hvp_and_gradient, field))(x, v)
    e1 = scale(sigma, s) + z
    a_v = second_order_residual(e1, hv, v, sigma)
    c = third_order_residual(e1, hv, third, v, sigma)
    exact = jax.jit(functools.partial(value_jacobian_and_trace_gradient, field))
    _, jacobian, trace_gradient = exact(x[:1])
    matrix = second_order_matrix(e1[:1], jacobian, sigma[:1])
    vector = third_order_vector(e1[:1], jacobian, trace_gradient, sigma[:1])
    np.testing.assert_allclose(squared_norm(a_v).mean(), squared_norm(matrix)[0], rtol=1e-12)
    np.testing.assert_allclose(inner(v, a_v).mean(), jnp.trace(matrix[0]), rtol=1e-12)
    np.testing.assert_allclose(c.mean(axis=0), vector[0], rtol=1e-11, atol=1e-12)


def test_directional_form_equals_the_gradient_where_the_jacobian_is_symmetric():
    data = Mixture(
        jnp.asarray([0.3, 0.7]), jnp.asarray([[1.0, -0.5, 0.0], [-0.6, 0.4, 1.0]]),
        jnp.asarray([0.2, 0.4]),
    )  # fmt: skip
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, D)))
    t, v = jnp.full((5,), 0.3), jnp.sign(x)
    field = lambda y: data.score(y, t, VPSDE())  # noqa: E731

    def both(field):
        operators = (value_hvp_and_directional, value_hvp_and_gradient)
        return jax.jit(lambda x, v: [operator(field, x, v) for operator in operators])(x, v)

    for ours, theirs in zip(*both(field), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)
    not_a_gradient = lambda y: fixture_score((0.3, 0.1, 0.2, 0.0), y, t)  # noqa: E731
    directional, gradient = (found[2] for found in both(not_a_gradient))
    assert float(np.abs(directional - gradient).max()) > 1e-2


@pytest.mark.parametrize("estimator", ["exact", "probe"])
def test_the_quadratic_form_alone_is_the_second_order_of_i_dode(estimator):
    """tr A = −α (σ vᵀ(∂F/∂x)v − α(d − ‖F − F*‖²)) for the velocity F, F* = αz − σx0, VP.

    Exactly, with tr ∂F/∂x; by a probe v, with the square of v·(F − F*) for that of the norm.
    """
    sde, number = VPSDE(), 6
    x0, z = jax.random.normal(jax.random.key(0), (2, number, D), jnp.float64)
    t = jnp.linspace(0.05, 0.9, number)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    velocity = lambda y, t: fixture_score((0.3, 0.1, 0.2, 0.4), y, t)  # noqa: E731
    score_fn = lambda y, t: score_from_velocity(velocity(y, t), y, t, sde)  # noqa: E731
    keys = jax.random.split(jax.random.key(1), number)
    point = Point(sde.perturb(x0, t, z), t, z, keys)

    order = HighOrder(2, second_order_weight=0.1, frobenius_weight=0.0, trace_weight=2.0)
    terms = Terms(high_order=order, estimator=estimator)
    parts = jax.jit(lambda point: terms.parts(score_fn, sde, point))(point)

    gap = velocity(point.x, t) - (scale(alpha, z) - scale(sigma, x0))
    np.testing.assert_allclose(parts["dsm"], alpha**2 * squared_norm(gap) / D, rtol=1e-12)
    jacobian = jax.jit(lambda x: value_and_jacobian(lambda y: velocity(y, t), x)[1])(point.x)
    if estimator == "exact":
        form, along = jnp.trace(jacobian, axis1=1, axis2=2), squared_norm(gap)
    else:
        v = PROBES["rademacher"](fold_in_all(keys, 0), point.x)
        form, along = jnp.einsum("bi,bij,bj->b", v, jacobian, v), inner(v, gap) ** 2
    trace = -alpha * (sigma * form - alpha * (D - along))
    np.testing.assert_allclose(parts["trace"], trace**2 / D**2, rtol=1e-11)

    weight, ones = jnp.linspace(1.0, 2.0, number), jnp.ones((number,))
    total = terms.weighted(parts, sde, t, weight, ones)
    expected = weight * (parts["dsm"] + 0.1 * 2.0 * trace**2 / D**2)
    np.testing.assert_allclose(total, expected, rtol=1e-11)


def test_weights_of_order_2_are_those_of_its_parts():
    """λ2 (λF frobenius + λtr trace) + λ3 third."""
    parts = {"frobenius": jnp.asarray([1.0]), "trace": jnp.asarray([10.0]), "third": jnp.ones((1,))}
    second = HighOrder(2, second_order_weight=3.0, frobenius_weight=0.5, trace_weight=0.25)
    assert float(second.weighted(parts)[0]) == 3.0 * (0.5 + 2.5)
    third = HighOrder(3, frobenius_weight=0.5, trace_weight=0.0, third_order_weight=4.0)
    assert float(third.weighted(parts)[0]) == 0.5 + 4.0
    assert float(HighOrder(2).weighted(parts)[0]) == 11.0


def test_jacobian_is_that_of_autodiff():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, D)))
    t = jnp.asarray([0.2, 0.5])
    field = lambda y: fixture_score((0.3, 0.1, 0.2, 0.0), y, t)  # noqa: E731
    _, jacobian = jax.jit(functools.partial(value_and_jacobian, field))(x)
    full = jax.jit(jax.jacobian(field))(x)
    for b in range(2):
        np.testing.assert_allclose(jacobian[b], full[b, :, b], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("d", [2, 8])
def test_gaussian_minima(d):
    """Exact score of N(0, s² I): order 2 has mean c²(3 + 1/d), order 3 c³(2 + 4/d)."""
    sde, number, variance = VPSDE(), 20_000, 0.25
    data = gaussian(jnp.zeros(d), variance)
    keys = jax.random.split(jax.random.key(0), number)
    x0 = data.sample(jax.random.key(1), number)
    z = jax.random.normal(jax.random.key(2), x0.shape, jnp.float64)
    t = jnp.full((number,), 0.35)
    sigma = sde.sigma(t)
    point = Point(sde.perturb(x0, t, z), t, z, keys)
    score_fn = lambda x, t: data.score(x, t, sde)  # noqa: E731
    terms = Terms(high_order=HighOrder(3))
    parts = jax.jit(lambda point: terms.parts(score_fn, sde, point))(point)
    c = float(1.0 - (sigma**2 / (sde.alpha(t) ** 2 * variance + sigma**2))[0])
    for values, expected in (
        (parts["frobenius"] + parts["trace"], c**2 * (3 + 1 / d)),
        (parts["third"], c**3 * (2 + 4 / d)),
    ):
        error = float(values.std() / np.sqrt(number))
        assert abs(float(values.mean()) - expected) < 4 * error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 4}, r"score_matching_order=4: need 1, 2 or 3"),
        ({"order": 3, "third_order_form": "jet"}, "third_order_form='jet'"),
        ({"order": 2, "trace_weight": -1.0}, "trace_weight=-1.0"),
        ({"order": 2, "frobenius_weight": -0.5}, "training.frobenius_weight=-0.5: need 0 or more"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        HighOrder(**options)


def test_images_of_any_size_have_parts_of_order_one():
    """d³ of 32×32×3 is beyond int32: the parts of e1 = v = 1, H = ∇(vᵀHv) = 0 by hand."""
    ones = jnp.ones((1, 32, 32, 3))
    d, zero, sigma = 3072, jnp.zeros_like(ones), jnp.ones((1,))
    found = jax.jit(HighOrder(3).parts)(ones, zero, zero, ones, sigma)
    np.testing.assert_allclose(found["frobenius"], (1 - d) ** 2 / d, rtol=1e-5)
    np.testing.assert_allclose(found["trace"], (d - d**2) ** 2 / d**2, rtol=1e-5)
    np.testing.assert_allclose(found["third"], (d**2 - 3 * d) ** 2 / d**2, rtol=1e-5)
