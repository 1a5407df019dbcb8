"""Diagnostic curves against closed forms: exact scores, wrong scores, the KL identity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diagnostics import error_curves, exact_residual, ode_score, time_grid, truth_curves
from ode import Solver
from sde_lib import SDES, VESDE, VPSDE
from terms import Point
from toy_data import Mixture, gaussian

pytestmark = pytest.mark.usefixtures("x64")
TIGHT = Solver("dopri8", 1e-10, 1e-10)


def bimodal():
    means = jnp.asarray([[-1.0, 0.3], [0.8, -0.2]])
    return Mixture(jnp.asarray([0.4, 0.6]), means, jnp.asarray([0.1, 0.3]))


def point_of(law, sde, number, t, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    x0 = law.sample(keys[0], number)
    z = jax.random.normal(keys[1], x0.shape, jnp.float64)
    times = jnp.broadcast_to(jnp.asarray(t, jnp.float64), (number,))
    return Point(sde.perturb(x0, times, z), times, z, jax.random.split(keys[2], number))


@pytest.mark.parametrize("name", SDES)
def test_score_of_the_ode_of_gaussian_data(name):
    """−x (v_T/σ_π²)/v_t: the ODE starts from the prior, not from q_T."""
    sde, variance, t = SDES[name](), 0.25, 0.2
    law = gaussian(jnp.zeros((2,)), variance)
    x = jnp.asarray([[0.3, -0.8], [1.0, 0.2]])
    score_fn = lambda y, s: law.score(y, s, sde)  # noqa: E731
    found = ode_score(score_fn, sde, x, t, TIGHT)
    v = lambda s: sde.alpha(s) ** 2 * variance + sde.sigma(s) ** 2  # noqa: E731
    v_t, v_end = v(jnp.asarray(t)), v(jnp.asarray(sde.T))
    np.testing.assert_allclose(found.score, -x * v_end / sde.prior_std**2 / v_t, rtol=1e-7)
    x_end = x * jnp.sqrt(v_end / v_t)
    np.testing.assert_allclose(found.log_p, sde.prior_logp(x_end) + jnp.log(v_end / v_t), rtol=1e-8)
    assert bool(found.converged.all())


def test_score_of_the_ode_is_the_gradient_of_its_log_likelihood():
    """For a score that is no gradient, by central differences of log p."""
    sde, t, h = VPSDE(), 0.3, 1e-5

    def score_fn(x, s):
        return -(x + 0.3 * jnp.sin(2.0 * x + s[:, None]) + 0.2 * jnp.roll(x, -1, 1) * jnp.sin(x))

    x = jnp.asarray([[0.3, -0.8]])
    solved = jax.jit(lambda y: ode_score(score_fn, sde, y, t, TIGHT))
    steps = h * jnp.eye(2)[:, None]
    difference = [(solved(x + e).log_p - solved(x - e).log_p)[0] / (2 * h) for e in steps]
    found = solved(x)
    np.testing.assert_allclose(found.score[0], jnp.stack(difference), rtol=1e-5)


def curves(sde, law, score_fn, t, number=400):
    @jax.jit
    def found():
        point = point_of(law, sde, number, t)
        own = ode_score(score_fn, sde, point.x, t, TIGHT)
        curves = error_curves(score_fn, sde, point)
        return point, own, curves | truth_curves(score_fn, sde, point, law, own)

    return found()


def test_the_exact_score_has_no_errors():
    law, sde = bimodal(), VPSDE()
    _, _, found = curves(sde, law, lambda x, t: law.score(x, t, sde), 0.3)
    for name in ("r_fp", "curl", "fisher", "jacobian"):
        np.testing.assert_allclose(found[name], 0.0, atol=1e-8)
    # What is left is the prior in place of q_T, of relative size 4e-5.
    for name in ("fisher_ode", "self"):
        assert 0.0 < float(found[name].max()) < 1e-5


@pytest.mark.parametrize("kappa", [0.8, 1.0])
def test_curves_of_a_scaled_score(kappa):
    """s = κ s* of N(0, S): fisher g²(1 − κ)²‖x‖²/v², r_fp κ(1 − κ) g²‖x‖/v²/√d, and the rest."""
    sde, variance, t = VPSDE(), 0.25, 0.3
    law = gaussian(jnp.zeros((2,)), variance)
    score_fn = lambda x, s: kappa * law.score(x, s, sde)  # noqa: E731
    point, own, found = curves(sde, law, score_fn, t, number=50)
    g2, v = sde.g2(jnp.asarray(t)), sde.alpha(jnp.asarray(t)) ** 2 * variance
    v = v + sde.sigma(jnp.asarray(t)) ** 2
    square = (point.x**2).sum(1)
    expected = {
        "fisher": g2 * (1 - kappa) ** 2 * square / v**2,
        "r_fp": kappa * (1 - kappa) * g2 * jnp.sqrt(square / 2) / v**2,
        "jacobian": 2 * (1 - kappa) ** 2 / v**2 * jnp.ones(50),
        "slope": 2 * (kappa / v) ** 2 * jnp.ones(50),
        "curl": jnp.zeros(50),
        "fisher_ode": g2 * ((own.score + point.x / v) ** 2).sum(1),
        "self": g2 * ((own.score - score_fn(point.x, point.t)) ** 2).sum(1),
        "kl_rate": g2 * ((kappa - 1) * -point.x / v * (own.score + point.x / v)).sum(1),
        "dsm": ((sde.sigma(point.t)[:, None] * score_fn(point.x, point.t) + point.z) ** 2).mean(1),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-7, atol=1e-10, err_msg=name)


def test_probed_curves_in_many_dimensions():
    """Nine dimensions: one probe; for a linear score the residual by one probe is exact."""
    sde, law = VPSDE(), gaussian(jnp.zeros((9,)), 0.25)
    point = point_of(law, sde, 6, 0.3)
    score_fn = lambda x, s: 0.8 * law.score(x, s, sde)  # noqa: E731
    found = jax.jit(lambda point: error_curves(score_fn, sde, point))(point)
    eps = jax.jit(lambda x, t: exact_residual(score_fn, sde, x, t))(point.x, point.t)
    np.testing.assert_allclose(found["r_fp"], jnp.sqrt((eps**2).sum(1) / 9), rtol=1e-9)


@pytest.mark.parametrize("sde", [VPSDE(), VESDE(0.01, 5.0)])
def test_both_sides_of_the_kl_identity(sde):
    """Wrong score of a mixture, within 4 standard errors; the two sides share no sample."""
    law, t_min, number = bimodal(), 0.01, 300

    def score_fn(x, t):
        return 0.9 * law.score(x, t, sde) + 0.1 * jnp.sin(x)

    solver = Solver("dopri5", 1e-7, 1e-7)
    point = point_of(law, sde, 4000, t_min, seed=1)
    own = jax.jit(lambda x: ode_score(score_fn, sde, x, t_min, solver))(point.x)
    left = law.log_prob(point.x, point.t, sde) - own.log_p
    end = point_of(law, sde, 20_000, 1.0, seed=2)
    start = law.log_prob(end.x, end.t, sde) - sde.prior_logp(end.x)
    times, weights = time_grid(t_min, sde.T, 30)

    @jax.jit
    def rates(t, seed):
        point = point_of(law, sde, number, t, seed)
        own = ode_score(score_fn, sde, point.x, t, solver)
        return truth_curves(score_fn, sde, point, law, own)["kl_rate"]

    values = np.stack([rates(t, 10 + k) for k, t in enumerate(times)])
    integral = 0.5 * float(weights @ values.mean(1))
    variance = 0.25 * float(weights**2 @ values.var(1)) / number
    right = float(start.mean()) + integral
    error = np.sqrt(left.var() / len(left) + start.var() / len(start) + variance)
    assert abs(float(left.mean()) - right) < 4 * error
    assert float(left.mean()) > 10 * error  # a difference that is there to be explained
    flipped = float(start.mean()) - integral
    assert abs(float(left.mean()) - flipped) > 8 * error


def test_grid_integrates():
    t, w = time_grid(0.1, 1.0, 200)
    np.testing.assert_allclose(w @ t**2, (1 - 1e-3) / 3, rtol=1e-4)
    np.testing.assert_allclose(w.sum(), 0.9, rtol=1e-12)
