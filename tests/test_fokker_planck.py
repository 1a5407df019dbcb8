"""The residual against closed forms of right and wrong scores, and published values."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fokker_planck import (
    FORMS,
    advective_residual,
    curl_and_slope,
    gradient_residual,
    scalar_term,
)
from operators import inner, scale, value_hvp_and_directional, value_hvp_and_gradient
from sde_lib import SDES, VPSDE
from toy_data import Mixture

pytestmark = pytest.mark.usefixtures("x64", "compiled_at_o0")
FIXTURES = Path(__file__).resolve().parents[2] / "shared" / "fixtures"


@pytest.fixture
def at() -> tuple:
    """Points x and times t, in the precision of the test."""
    x = jnp.asarray([[0.8, -0.3], [-0.4, 1.1], [0.2, 0.1]])
    return x, jnp.asarray([0.3, 0.05, 0.9])


def gaussian_data():
    return Mixture(jnp.ones(1), jnp.asarray([[1.0, -0.5]]), jnp.asarray([0.25]))


def mixture_data():
    means = jnp.asarray([[1.0, -0.5], [-0.6, 0.4]])
    return Mixture(jnp.asarray([0.3, 0.7]), means, jnp.asarray([0.5, 0.25]))


def over_basis(function, x):
    """Mean of function(v) over the probes √d e_i, for which vᵀHv averages to the exact trace."""
    d = x.shape[1]
    probes = np.sqrt(d) * np.eye(d)
    mean = jax.jit(lambda probes: jax.vmap(function)(probes).mean(axis=0))
    return mean(jnp.asarray(np.broadcast_to(probes[:, None], (d, *x.shape))))


def scalar_of(score_fn, sde, x, t, v):
    @jax.jit
    def term(x, t, v):
        score, hv = jax.jvp(lambda y: score_fn(y, t), (x,), (v,))
        return scalar_term(score, hv, x, t, v, sde)

    return term(x, t, v)


def exact_residual(form, score, sde, at):
    return over_basis(lambda v: FORMS[form](score, sde, *at, v).residual, at[0])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("make", [gaussian_data, mixture_data])
def test_true_scores_and_scores_of_other_data_have_residual_zero(form, name, make, at):
    sde, data = SDES[name](), make()
    residual = exact_residual(form, lambda x, t: data.score(x, t, sde), sde, at)
    largest = float(np.abs(data.score(*at, sde)).max())
    size = float(np.abs(sde.g2(at[1])).max()) * max(1.0, largest**2)
    np.testing.assert_allclose(residual, 0.0, atol=1e-10 * size)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["vpsde", "subvpsde", "vesde"])
def test_wrong_scores_have_their_closed_form_residual(form, name, at):
    """c s: c(1 − c) g² Jᵀs; s + b: a b + g² b/C, for Gaussian data with variance C at t."""
    sde, c, b = SDES[name](), 0.8, jnp.asarray([[0.1, -0.2]])
    x, t = at
    variance = sde.alpha(t) ** 2 * 0.25 + sde.sigma(t) ** 2
    true = lambda x, t: gaussian_data().score(x, t, sde)  # noqa: E731
    scaled = exact_residual(form, lambda x, t: c * true(x, t), sde, at)
    expected = scale(-c * (1 - c) * sde.g2(t) / variance, true(x, t))
    np.testing.assert_allclose(scaled, expected, rtol=1e-8, atol=1e-10)
    shifted = exact_residual(form, lambda x, t: true(x, t) + b, sde, at)
    slope = sde.drift_coefficient(t) + sde.g2(t) / variance
    np.testing.assert_allclose(shifted, slope[:, None] * b, rtol=1e-8, atol=1e-9)


# Closed-form residuals at x = (.8, −.3), t = .3 of wrong scores of Gaussian data, mean (1, −.5):
# C s, s + B, s + R x, s + η (x₁², x₂²), and for isotropic data the variance off by .1 (W5).
C, ETA, OFF = 0.8, 0.05, 0.1
WORKED = {
    ("vpsde", "iso"): {
        "score": (-0.242547102, -0.0210245437), "scalar": -2.957367993763,
        "scaled": (0.3351998758, 0.0290559004), "shifted": (0.5602494351, -1.1204988702),
        "turned": (0.2233267286, 0.5619834572), "bent": (-0.2162185080, -0.3086128948),
        "widened": (0.1605554165, 0.0139173148),
    },
    ("vpsde", "full"): {
        "score": (-0.2128623488, 0.0029033762), "scalar": -2.384858956154,
        "scaled": (0.2610407206, -0.0325389726), "shifted": (0.6297270603, -1.1754979627),
        "turned": (0.1121071477, 0.5432324289), "bent": (-0.2659105523, -0.3317731251),
    },
    ("subvpsde", "iso"): {
        "score": (-0.3677478721, -0.0318772360), "scalar": -5.484253740012,
        "scaled": (0.6495287223, 0.0563026518), "shifted": (0.8003961262, -1.6007922524),
        "turned": (0.3065467085, 0.7103073797), "bent": (-0.0565104841, -0.2513256808),
        "widened": (0.3258386737, 0.0282444498),
    },
    ("subvpsde", "full"): {
        "score": (-0.3057367764, 0.0195726496), "scalar": -4.523359354389,
        "scaled": (0.4602013428, -0.1086285356), "shifted": (0.9328646960, -1.7130411347),
        "turned": (0.1061992601, 0.6800532807), "bent": (-0.1440945005, -0.2931984713),
    },
    ("vesde", "iso"): {
        "score": (0.7502655844, -0.7502655844), "scalar": -0.900088704733,
        "scaled": (-0.1271242882, 0.1271242882), "shifted": (0.1058994065, -0.2117988130),
        "turned": (0.0506913156, 0.1067463018), "bent": (0.0021062984, -0.0156653034),
        "widened": (0.0, 0.0),
    },
    ("vesde", "full"): {
        "score": (0.8363344921, -1.1601360357), "scalar": -0.663255441774,
        "scaled": (-0.1816427533, 0.2802813011), "shifted": (0.1637523034, -0.2818002696),
        "turned": (0.0156316920, 0.1051835604), "bent": (-0.0126320151, -0.0332151799),
    },
}  # fmt: skip
# Mixture of (.3, .7) with means (1, −.5), (−.6, .4), covariances full and .25 I: s, L[s], eps[C s].
WORKED_MIXTURE = {
    "vpsde": ((-0.8484783852, 0.3427874736), -0.0263028734, (0.5960638579, -0.2518965844)),
    "subvpsde": ((-0.9771718881, 0.3713221043), -0.7851783178, (0.5930961835, -0.2868282449)),
    "vesde": ((0.6138342066, -1.0217697598), -0.4998669957, (-0.0706019067, 0.1897143415)),
}
COVARIANCES = {"iso": ((0.25, 0.0), (0.0, 0.25)), "full": ((0.5, 0.2), (0.2, 0.3))}


def normal_score(sde, components, off=0.0):
    """Score of Σ w N(m, S) under the SDE, the diffused covariance enlarged by `off` I."""

    def log_density(x, t):
        alpha, variance = sde.alpha(t[None])[0], sde.sigma(t[None])[0] ** 2
        logs = []
        for weight, mean, covariance in components:
            spread = alpha**2 * jnp.asarray(covariance) + (variance + off) * jnp.eye(2)
            gap = x - alpha * jnp.asarray(mean)
            square = gap @ jnp.linalg.solve(spread, gap)
            logs.append(jnp.log(weight) - 0.5 * (square + jnp.linalg.slogdet(spread)[1]))
        return jax.nn.logsumexp(jnp.stack(logs))

    return jax.jit(jax.vmap(jax.grad(log_density)))


def wrong_score(kind, sde, components):
    true = normal_score(sde, components)
    return {
        "score": true,
        "scaled": lambda x, t: C * true(x, t),
        "shifted": lambda x, t: true(x, t) + jnp.asarray([[0.1, -0.2]]),
        "turned": lambda x, t: true(x, t) + x @ jnp.asarray([[0.0, 0.1], [-0.1, 0.0]]),
        "bent": lambda x, t: true(x, t) + ETA * x**2,
        "widened": normal_score(sde, components, OFF),
    }[kind]


def worked_point():
    return jnp.asarray([[0.8, -0.3]]), jnp.asarray([0.3])


@pytest.mark.parametrize(("name", "shape"), WORKED)
def test_worked_numbers_of_wrong_scores(name, shape):
    sde, components = SDES[name](), [(1.0, (1.0, -0.5), COVARIANCES[shape])]
    numbers = WORKED[name, shape]
    true = wrong_score("score", sde, components)
    np.testing.assert_allclose(true(*worked_point())[0], numbers["score"], atol=1e-9)
    x, t = worked_point()
    scalar = over_basis(lambda v: scalar_of(true, sde, x, t, v), x)
    np.testing.assert_allclose(scalar[0], numbers["scalar"], rtol=1e-11)
    for kind in numbers.keys() - {"score", "scalar"}:
        residual = exact_residual("gradient", wrong_score(kind, sde, components), sde, (x, t))
        np.testing.assert_allclose(residual[0], numbers[kind], atol=1e-8, err_msg=kind)


@pytest.mark.parametrize("name", WORKED_MIXTURE)
@pytest.mark.parametrize("form", FORMS)
def test_worked_numbers_of_a_mixture(name, form):
    sde, (x, t) = SDES[name](), worked_point()
    components = [(0.3, (1.0, -0.5), COVARIANCES["full"]), (0.7, (-0.6, 0.4), COVARIANCES["iso"])]
    score, scalar, scaled = WORKED_MIXTURE[name]
    true = wrong_score("score", sde, components)
    np.testing.assert_allclose(true(x, t)[0], score, atol=1e-9)
    np.testing.assert_allclose(exact_residual(form, true, sde, (x, t)), 0.0, atol=1e-10)
    found = over_basis(lambda v: scalar_of(true, sde, x, t, v), x)
    np.testing.assert_allclose(found[0], scalar, atol=1e-9)
    wrong = exact_residual(form, wrong_score("scaled", sde, components), sde, (x, t))
    np.testing.assert_allclose(wrong[0], scaled, atol=1e-8)


def test_curl_and_its_size_relative_to_the_jacobian():
    """s + R x, R = ρ × rotation by 90°: ‖H − Hᵀ‖² = 8ρ² = .08; over ‖H‖² = .0196572293."""
    components = [(1.0, (1.0, -0.5), COVARIANCES["iso"])]
    turned, (x, t) = wrong_score("turned", VPSDE(), components), worked_point()
    curl = over_basis(lambda v: curl_and_slope(turned, x, t, v)[0], x)[0]
    np.testing.assert_allclose(curl, 0.08, rtol=1e-10)
    jacobian = jax.jacobian(lambda y: turned(y, t)[0])(x)[:, 0]
    slope = over_basis(lambda v: curl_and_slope(turned, x, t, v)[1], x)[0]
    np.testing.assert_allclose(slope, (jacobian**2).sum(), rtol=1e-10)
    np.testing.assert_allclose(curl / slope, 0.0196572293, rtol=1e-8)


@pytest.mark.parametrize("name", SDES)
def test_the_residual_moves_the_curl(name):
    """∂t(H − Hᵀ) = ∇eps − (∇eps)ᵀ for any score: here one that is not a gradient."""
    sde, (x, t) = SDES[name](), worked_point()

    def curl(y):
        return y - y.T

    def jacobian(function, *arguments):
        return jax.jacobian(lambda y: function(y, *arguments)[0])(x)[:, 0]

    residual = lambda y, s: exact_residual("gradient", fixture_score, sde, (y, s))  # noqa: E731
    moved = jax.jit(jax.jacfwd(lambda s: curl(jacobian(fixture_score, s))))(t)[..., 0]
    found = jax.jit(lambda s: curl(jacobian(residual, s)))(t)
    np.testing.assert_allclose(found, moved, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("form", FORMS)
def test_the_third_derivative_comes_along(form, at):
    """∇ₓ(vᵀHv) of the gradient form, D²s[v, v] of the advective one; the rest is unchanged."""
    operator = {"gradient": value_hvp_and_gradient, "advective": value_hvp_and_directional}[form]
    v = jnp.asarray([[1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    of_form = functools.partial(FORMS[form], fixture_score, VPSDE())
    plain = jax.jit(of_form)(*at, v)
    with_third = jax.jit(functools.partial(of_form, third=True))(*at, v)
    field = lambda y: fixture_score(y, at[1])  # noqa: E731
    score, hv, third = jax.jit(functools.partial(operator, field))(at[0], v)
    assert plain.third is None
    for ours, theirs in zip(with_third, (score, hv, third, plain.residual), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def fixture_score(x, t):
    """The score of the fixtures' README, section 5; not a gradient."""
    mean = jnp.mean(x, axis=1)[:, None]
    turned = 0.2 * jnp.roll(x, -1, 1) * jnp.sin(x)
    body = x + 0.3 * jnp.sin(2.0 * x + t[:, None]) + 0.1 * mean + turned
    return -body / (1.0 + t)[:, None]


@pytest.mark.parametrize("name", ["vp", "subvp", "ve"])
def test_published_values(name):
    path = FIXTURES / "fpe.npz"
    if not path.exists():
        pytest.skip(f"{path.name} is not here")
    data, sde = np.load(path), SDES[name + "sde"]()
    x, t, v, v2 = (jnp.asarray(data[k]) for k in ("x", "t", "v", "v2"))
    residual = jax.jit(lambda v: gradient_residual(fixture_score, sde, x, t, v).residual)
    one, two = residual(v), residual(v2)
    gradient = over_basis(lambda e: gradient_residual(fixture_score, sde, x, t, e).residual, x)
    advective = over_basis(lambda e: advective_residual(fixture_score, sde, x, t, e).residual, x)
    scalar = over_basis(lambda e: scalar_of(fixture_score, sde, x, t, e), x)
    curl = over_basis(lambda e: curl_and_slope(fixture_score, x, t, e)[0], x)
    for ours, theirs in (
        (one, "residual_hutchinson"), (two, "residual_hutchinson_v2"), (gradient, "residual"),
        (advective, "residual_advective"), (inner(one, two), "unbiased_square"),
        (scalar_of(fixture_score, sde, x, t, v), "scalar_hutchinson"), (scalar, "scalar"),
        (curl, "asymmetry"),
    ):  # fmt: skip
        np.testing.assert_allclose(ours, data[f"{name}/{theirs}"], rtol=1e-9, atol=1e-11)


def test_two_probes_are_unbiased_and_one_is_not(at):
    number = 4000
    x, t = jnp.repeat(at[0][:1], number, axis=0), jnp.repeat(at[1][:1], number)
    score, sde = fixture_score, VPSDE()
    exact = over_basis(lambda e: gradient_residual(score, sde, x[:1], t[:1], e).residual, x[:1])
    keys = jax.random.split(jax.random.key(0))
    probes = [jax.random.normal(k, x.shape, jnp.float64) for k in keys]
    residual = jax.jit(lambda v: gradient_residual(score, sde, x, t, v).residual)
    one, two = map(residual, probes)
    truth = float(inner(exact, exact)[0])
    product, square = inner(one, two), inner(one, one)
    assert abs(float(product.mean()) - truth) < 4 * float(product.std()) / number**0.5
    assert float(square.mean()) - truth > 4 * float(square.std()) / number**0.5


def test_mean_of_the_scalar_term_of_the_true_score_is_zero():
    sde, number = VPSDE(), 20_000
    t = jnp.full((number,), 0.3)
    z = jax.random.normal(jax.random.key(1), (number, 2), jnp.float64)
    x = sde.perturb(mixture_data().sample(jax.random.key(0), number), t, z)
    v = jnp.sign(jax.random.normal(jax.random.key(2), x.shape, jnp.float64))
    values = scalar_of(lambda y, s: mixture_data().score(y, s, sde), sde, x, t, v)
    assert abs(float(values.mean())) < 4 * float(values.std()) / number**0.5
