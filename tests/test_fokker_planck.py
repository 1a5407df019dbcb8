"""The residual against closed forms of right and wrong scores, and published values."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fokker_planck import (
    FORMS,
    advective_residual,
    asymmetry,
    gradient_residual,
    scalar_term,
)
from operators import inner, scale
from sde_lib import SDES, VPSDE
from toy_data import Mixture

pytestmark = pytest.mark.usefixtures("x64")
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
    probes = jnp.sqrt(1.0 * d) * jnp.eye(d)
    return sum(function(jnp.broadcast_to(e[None], x.shape)) for e in probes) / d


def exact_residual(form, score, sde, at):
    return over_basis(lambda v: FORMS[form](score, sde, *at, v)[1], at[0])


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


def test_worked_numbers_of_the_vp_sde(at):
    """Data N((1, −.5), .25 I), x = (.8, −.3), t = .3, c = .8: (.3351998758, .0290559004)."""
    score = lambda x, t: 0.8 * gaussian_data().score(x, t, VPSDE())  # noqa: E731
    for form in FORMS:
        residual = exact_residual(form, score, VPSDE(), at)[0]
        np.testing.assert_allclose(residual, [0.3351998758, 0.0290559004], atol=1e-9)


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
    one = gradient_residual(fixture_score, sde, x, t, v)[1]
    two = gradient_residual(fixture_score, sde, x, t, v2)[1]
    gradient = over_basis(lambda e: gradient_residual(fixture_score, sde, x, t, e)[1], x)
    advective = over_basis(lambda e: advective_residual(fixture_score, sde, x, t, e)[1], x)
    scalar = over_basis(lambda e: scalar_term(fixture_score, sde, x, t, e), x)
    curl = over_basis(lambda e: asymmetry(fixture_score, x, t, e), x)
    for ours, theirs in (
        (one, "residual_hutchinson"), (two, "residual_hutchinson_v2"), (gradient, "residual"),
        (advective, "residual_advective"), (inner(one, two), "unbiased_square"),
        (scalar_term(fixture_score, sde, x, t, v), "scalar_hutchinson"), (scalar, "scalar"),
        (curl, "asymmetry"),
    ):  # fmt: skip
        np.testing.assert_allclose(ours, data[f"{name}/{theirs}"], rtol=1e-9, atol=1e-11)


def test_two_probes_are_unbiased_and_one_is_not(at):
    number = 4000
    x, t = jnp.repeat(at[0][:1], number, axis=0), jnp.repeat(at[1][:1], number)
    score, sde = fixture_score, VPSDE()
    exact = over_basis(lambda e: gradient_residual(score, sde, x[:1], t[:1], e)[1], x[:1])
    keys = jax.random.split(jax.random.key(0))
    probes = [jax.random.normal(k, x.shape, jnp.float64) for k in keys]
    one, two = (gradient_residual(score, sde, x, t, v)[1] for v in probes)
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
    values = scalar_term(lambda y, s: mixture_data().score(y, s, sde), sde, x, t, v)
    assert abs(float(values.mean())) < 4 * float(values.std()) / number**0.5
