"""Standardised data: moments, inverse, log-determinant, and the density in the user's units."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import marginals
import standardization
from dequantization import Reals
from likelihood import Divergence, ode_log_likelihood
from ode import Solver
from sde_lib import VPSDE

KINDS = ("coordinate", "whiten")
every_kind = pytest.mark.parametrize("kind", KINDS)
MEAN, SPREAD = np.array([1013.0, -2.0, 0.1]), np.array([6.0, 0.01, 300.0])
CORRELATION = np.array([[1.0, 0.9, -0.3], [0.9, 1.0, 0.1], [-0.3, 0.1, 1.0]])
COVARIANCE = CORRELATION * np.outer(SPREAD, SPREAD)


def sample(n: int = 400) -> np.ndarray:
    return np.random.default_rng(0).multivariate_normal(MEAN, COVARIANCE, n)


def affine(kind: str, x: np.ndarray | None = None, widths=None) -> standardization.Affine:
    x = sample() if x is None else x
    return standardization.fitted(kind, [x[:100], x[100:]], x.shape[1:], widths)


@pytest.mark.usefixtures("x64")
@every_kind
@pytest.mark.parametrize("shape", [(3,), (3, 1), (1, 3, 1)])
def test_training_data_come_out_with_zero_mean_and_unit_variance(kind, shape) -> None:
    x = sample().reshape(-1, *shape)
    found = affine(kind, x)
    y = np.asarray(found.apply(jnp.asarray(x)))
    assert y.shape == x.shape
    covariance = np.cov(y.reshape(len(y), 3).T, bias=True)
    np.testing.assert_allclose(y.mean(axis=0), 0.0, atol=1e-9)
    np.testing.assert_allclose(np.diagonal(covariance), 1.0, rtol=1e-9)
    if kind == "whiten":
        np.testing.assert_allclose(covariance, np.eye(3), atol=1e-8)
    np.testing.assert_allclose(found.invert(jnp.asarray(y)), x, rtol=1e-11, atol=1e-9)


@pytest.mark.usefixtures("x64")
@every_kind
def test_log_determinant_is_that_of_the_jacobian(kind) -> None:
    found = affine(kind)
    jacobian = jax.jacfwd(lambda x: found.apply(x[None])[0])(jnp.zeros(3))
    assert found.log_det == pytest.approx(np.linalg.slogdet(jacobian)[1], abs=1e-10)


@every_kind
def test_units_of_the_coordinates_do_not_matter(kind) -> None:
    """In inches or metres the model sees the same numbers."""
    units = np.array([39.37, 1e3, 1e-2])
    x = sample()
    a, b = affine(kind, x), affine(kind, x * units)
    np.testing.assert_allclose(b.matrix * units, a.matrix, rtol=1e-8, atol=1e-12)
    assert b.log_det == pytest.approx(a.log_det - np.log(units).sum(), abs=1e-8)


@pytest.mark.usefixtures("x64")
@every_kind
def test_noise_in_cells_is_part_of_the_variance(kind) -> None:
    """E y² of 200,000 noised values within five standard errors of one."""
    rng, widths = np.random.default_rng(1), np.array([2.0, 0.0, 1.0])
    x = np.round(rng.standard_normal((100_000, 3)) * [1.0, 3.0, 0.5] / [2, 1, 1]) * [2, 1, 1]
    code = Reals(affine(kind, x, widths), widths)
    keys = jax.random.split(jax.random.key(0), len(x))
    y = np.asarray(code.encode(jnp.asarray(x), keys))
    error = (y**2).std(axis=0) / np.sqrt(len(y))
    assert (np.abs((y**2).mean(axis=0) - 1.0) < 5 * error + 1e-6).all()


ENDS = standardization.Range(
    np.array([-1.0, 0.5, -np.inf, -np.inf, 0.0, -1.0, -np.inf]),
    np.array([3.0, np.inf, 2.0, np.inf, np.inf, 0.0, 0.0]),
)


@pytest.mark.usefixtures("x64")
def test_ranges_are_mapped_to_the_whole_line_and_back() -> None:
    """Both ends, one of them, none: increasing, with the log-determinant of the Jacobian."""
    v = 3.0 * np.random.default_rng(0).standard_normal((50, 7))
    x = ENDS.invert(jnp.asarray(v))
    assert ENDS.holds(np.asarray(x)).all()
    np.testing.assert_allclose(ENDS.apply(x), v, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(x[:, 3], v[:, 3])
    jacobians = jax.vmap(jax.jacfwd(lambda row: ENDS.apply(row[None])[0]))(x)
    assert (np.diagonal(jacobians, axis1=1, axis2=2) > 0.0).all()
    np.testing.assert_allclose(ENDS.log_det(x), np.linalg.slogdet(jacobians)[1], atol=1e-9)
    one_column = standardization.Range(ENDS.lower.reshape(7, 1), ENDS.upper.reshape(7, 1))
    np.testing.assert_allclose(one_column.log_det(x[..., None]), ENDS.log_det(x), rtol=1e-12)


@pytest.mark.parametrize("size", [20.0, 80.0])
def test_no_sample_lies_at_an_end_in_float32(size: float) -> None:
    """So it can be mapped back; at the end itself the logit is infinite."""
    v = size * jnp.asarray([[-1.0] * 7, [1.0] * 7], jnp.float32)
    x = ENDS.invert(v)
    assert x.dtype == jnp.float32
    assert ENDS.holds(np.asarray(x)).all()
    assert np.isfinite(ENDS.apply(x)).all()
    assert np.isfinite(ENDS.log_det(x)).all()
    assert not ENDS.holds(np.asarray(ENDS.lower, np.float32)[None])[0, [0, 1, 4, 5]].any()
    close = ENDS.apply(x)[:, 4:]  # near an end at 0 small numbers keep their digits
    near = np.array([[True, False, False], [False, True, True]])
    np.testing.assert_allclose(close[near], v[:, 4:][near], rtol=1e-3)


@pytest.mark.usefixtures("x64")
def test_noise_in_cells_stays_within_the_ends() -> None:
    """A lognormal x in a cell that touches 0: E_u p is P(cell)/w, at 5 s.e."""
    n, width = 40_000, 0.5
    code = Reals(
        widths=np.array([width]), range=standardization.Range(np.zeros(1), np.full(1, np.inf))
    )
    x = jnp.full((n, 1), 0.5 * width)
    draw = code.draw(x, jax.random.split(jax.random.key(0), n))
    p = np.exp(scipy.stats.norm.logpdf(draw.x[:, 0]) - np.asarray(draw.log_q))
    expected = scipy.stats.lognorm(1.0).cdf(width) / width
    assert abs(p.mean() - expected) < 5.0 * p.std() / n**0.5
    np.testing.assert_array_less(
        0.0, code.in_cells(x - 0.5 * width, jax.random.split(jax.random.key(1), n))
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ["none", "coordinate", "whiten"])
def test_gaussians_behind_a_range_are_lognormal_and_logit_normal(kind) -> None:
    """The density of x of the change of variables is that of SciPy and of the textbook."""
    ends = standardization.Range(np.array([2.0, -np.inf]), np.array([5.0, 1.0]))
    rng = np.random.default_rng(1)
    v = rng.multivariate_normal([0.3, -0.4], [[0.5, 0.2], [0.2, 0.8]], 500)
    x = ends.invert(jnp.asarray(v))
    found = standardization.fitted(kind, [v], (2,), None)
    code = Reals(found, range=ends)
    draw = code.draw(x, jax.random.split(jax.random.key(0), len(x)))
    matrix = np.eye(2) if found is None else found.matrix
    matrix = np.diag(matrix) if matrix.ndim == 1 else matrix
    mean = np.zeros(2) if found is None else found.mean
    law = scipy.stats.multivariate_normal(-matrix @ mean, matrix @ matrix.T)  # of v ~ N(0, I)
    p, gap = (np.asarray(x)[:, 0] - 2.0) / 3.0, 1.0 - np.asarray(x)[:, 1]
    logit_normal = scipy.stats.norm.logpdf(np.log(p / (1.0 - p))) - np.log(3.0 * p * (1.0 - p))
    expected = logit_normal + scipy.stats.lognorm(1.0).logpdf(gap)
    np.testing.assert_allclose(law.logpdf(draw.x) - draw.log_q, expected, atol=1e-9)
    np.testing.assert_allclose(code.decode(draw.x), x, rtol=1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_a_density_is_that_of_the_data_in_their_own_units(kind) -> None:
    """log p(Ax + b) = log p(x) − log|det A|: the exact score of the encoded Gaussian, by the ODE.

    α(T) = e⁻³⁰ and t_min = 1e-10 leave nothing to the prior and to the start.
    """
    scale = np.array([1.0, 1.0, 1.0] if kind == "none" else [6.0, 0.1, 30.0])
    mean, covariance = MEAN / np.max(MEAN), CORRELATION * np.outer(scale, scale)
    rng = np.random.default_rng(2)
    x = rng.multivariate_normal(mean, covariance, 8)
    found = affine(kind, 1.3 * rng.multivariate_normal(mean, covariance, 300) + 0.1)
    code, sde = Reals(found), VPSDE(0.1, 119.9)
    matrix = np.eye(3) if found is None else np.asarray(found.matrix).reshape(-1, 3)
    matrix = np.diag(matrix[0]) if len(matrix) == 1 else matrix
    location = jnp.asarray(matrix @ (mean - (0.0 if found is None else found.mean)))
    law = jnp.asarray(matrix @ covariance @ matrix.T)

    def score(y: jax.Array, t: jax.Array) -> jax.Array:
        alpha, sigma = sde.alpha(t)[:, None], sde.sigma(t)[:, None, None]
        total = alpha[..., None] ** 2 * law[None] + sigma**2 * jnp.eye(3)[None]
        return -jnp.linalg.solve(total, (y - alpha * location[None])[..., None])[..., 0]

    keys = jax.random.split(jax.random.key(0), len(x))
    draw = code.draw(jnp.asarray(x), keys)
    ode = ode_log_likelihood(
        score, sde, draw.x, keys, t_min=1e-10, solver=Solver("dopri8", 1e-10, 1e-10),
        divergence=Divergence("exact"),
    )  # fmt: skip
    nats = code.negative_log_likelihood(ode.log_p - draw.log_q, jnp.asarray(x))
    expected = scipy.stats.multivariate_normal(mean, covariance).logpdf(x)
    np.testing.assert_allclose(nats, -expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(code.decode(draw.x), x, rtol=1e-12, atol=1e-12)


def test_what_cannot_be_standardised_is_refused_by_name() -> None:
    x = sample()
    double = np.concatenate([x, x[:, :1] - x[:, 1:2]], axis=1)
    with pytest.raises(ValueError, match=r"'whiten': need 'coordinate' or 'none': of the 4 .* 1 f"):
        affine("whiten", double)
    assert affine("coordinate", double).matrix.shape == (4,)
    with pytest.raises(ValueError, match=r"need 'none': coordinates \[1\] are constant"):
        affine("coordinate", x * [1.0, 0.0, 1.0])
    assert affine("coordinate", x * [1.0, 0.0, 1.0], np.full(3, 0.1)).mean.shape == (3,)
    many = np.zeros((2, marginals.MAX_COVARIANCE + 1))
    with pytest.raises(ValueError, match=r"'whiten': need 'coordinate' for more than 4000 coord"):
        affine("whiten", many)
    assert affine("none") is None
    with pytest.raises(ValueError, match=r"data\.standardize='zca': allowed .*whiten"):
        affine("zca")
