"""The regression of x on its context, which heads of real values start from."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal

import marginals
from models import MLP
from parameterization import TIME_LABELS, HeadModel
from real_heads import Mixture, Whitened
from run_lib import comparison
from run_lib.baseline_estimators import baseline_estimators
from run_lib.experiment import Experiment
from sde_lib import VPSDE
from streams import Context
from tests import tiny

pytestmark = pytest.mark.usefixtures("compiled_at_o0")

CLASS, VECTOR = Context((), 3), Context((5,))


@pytest.mark.parametrize("head", [Mixture(2), Whitened()], ids=["mixture", "whitened"])
@pytest.mark.parametrize("kind", [CLASS, VECTOR, Context((2, 2))], ids=["class", "vector", "table"])
@pytest.mark.usefixtures("x64")
def test_a_head_of_real_values_sees_what_the_regression_on_the_context_leaves(head, kind):
    """With φ(c) B the score is that of x − α φ(c) B without it, and so is the decoder."""
    rng, sde = np.random.default_rng(0), VPSDE()
    net = MLP(hidden=8, depth=1, embed_dim=8, context=kind, outputs=head.outputs)
    model = HeadModel(net, sde, label=TIME_LABELS["log_snr"], head=head)
    params = random_params_of(model, (3,))
    n = kind.classes or math.prod(kind.shape)
    slope = rng.normal(size=(n, 3))
    assert params["prior"]["slope"].shape == slope.shape
    plain = params | {"prior": params["prior"] | {"slope": jnp.zeros((n, 3))}}
    sloped = params | {"prior": params["prior"] | {"slope": jnp.asarray(slope)}}
    context = rng.integers(0, 3, 4) if kind.classes else rng.normal(size=(4, *kind.shape))
    context = jnp.asarray(context, jnp.int32 if kind.classes else None)
    moved = np.eye(n)[context] @ slope if kind.classes else context.reshape(4, n) @ slope
    x0, x = (jnp.asarray(rng.normal(size=(4, 3))) for _ in range(2))
    t = jnp.asarray([0.01, 0.2, 0.5, 1.0])
    there = x - sde.alpha(t)[:, None] * moved
    found = model.score(sloped, context=context)(x, t)
    expected = model.score(plain, context=context)(there, t)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert float(jnp.max(jnp.abs(expected - model.score(plain, context=context)(x, t)))) > 0.01
    none = model.score(sloped)(x, t)
    np.testing.assert_allclose(none, model.score(plain)(x, t), rtol=1e-12)
    if isinstance(head, Mixture):
        ratio = model.decoder(sloped, context=context)(x0, x, t)
        expected = model.decoder(plain, context=context)(x0 - moved, there, t)
        np.testing.assert_allclose(ratio, expected, rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_the_prior_of_a_head_is_that_of_the_residuals():
    """Before training the score is that of the Gaussian that least squares finds.

    With p(x) in the same network the prior is that of x itself.
    """
    rng, n = np.random.default_rng(0), 2000
    context = rng.normal(size=(n, 5)) + 1.0
    noise = rng.normal(size=(n, 2)) @ [[0.5, 0.2], [0.0, 0.3]]
    x = context @ rng.normal(size=(5, 2)) + noise - 3.0
    net = MLP(hidden=8, depth=1, embed_dim=8, context=VECTOR)
    model = HeadModel(net, VPSDE(), label=TIME_LABELS["log_snr"], head=Whitened())

    def pairs():
        yield x[:900], context[:900]
        yield x[900:], context[900:]

    design = np.concatenate([context, np.ones((n, 1))], axis=1)
    fit, *_ = np.linalg.lstsq(design, x, rcond=None)
    residuals = x - design @ fit
    prior = model.prior_of_reals((2,), pairs, is_marginal=False)
    np.testing.assert_allclose(prior["slope"], fit[:5], rtol=0, atol=1e-3)
    np.testing.assert_allclose(prior["mean"], fit[5], rtol=0, atol=1e-3)
    covariance = prior["basis"] @ jnp.diag(prior["variances"]) @ prior["basis"].T
    np.testing.assert_allclose(covariance, residuals.T @ residuals / n, rtol=0, atol=1e-5)
    params = random_params_of(model, (2,))
    params = {"network": jax.tree.map(jnp.zeros_like, params["network"]), "prior": prior}
    t = jnp.full((n,), 0.3)
    alpha, sigma = (float(of(t)[0]) for of in (VPSDE().alpha, VPSDE().sigma))
    found = model.score(params, context=jnp.asarray(context))(jnp.asarray(x), t)
    total = alpha**2 * residuals.T @ residuals / n + sigma**2 * np.eye(2)
    expected = -np.linalg.solve(total, (x - alpha * design @ fit).T).T
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3)

    both = model.prior_of_reals((2,), pairs, is_marginal=True)
    assert not both["slope"].any()
    np.testing.assert_allclose(both["mean"], x.mean(axis=0), rtol=1e-12)


def random_params_of(model, shape):
    """Parameters of a model in float64, those of the network not at their start."""
    with jax.enable_x64(False):
        params = jax.device_get(model.init(jax.random.key(0), shape))
    params = jax.tree.map(lambda a: jnp.asarray(a, float), params)
    return params | {"network": jax.tree.map(lambda a: a + 0.1, params["network"])}


def test_few_rows_of_many_numbers_are_not_interpolated():
    """Least squares would fit 40 rows of 30 numbers that say nothing; it leaves out one by one."""
    rng = np.random.default_rng(0)
    rows = [(rng.normal(size=(40, 2, 2)), rng.normal(size=(40, 30)))]
    assert marginals.slope(rows).shape == (30, 4)
    assert np.square(rows[0][1] @ marginals.slope(rows)).mean() < 0.2
    x = rows[0][0].copy()
    x[:, 1, 1] = 3.0 * rows[0][1][:, 7]
    found = marginals.slope([(x, rows[0][1])])[:, 3]
    np.testing.assert_allclose(found, 3.0 * np.eye(30)[7], rtol=0, atol=1e-3)


@pytest.mark.parametrize(("rows", "scale"), [(30_000, 1.0), (400, 1e-4)], ids=["sorted", "small"])
def test_neither_the_order_nor_the_unit_of_a_context_hides_the_regression(rows, scale):
    """Classes that come one after another, of which all are seen; numbers of a small unit."""
    rng = np.random.default_rng(0)
    known = np.repeat(np.eye(3), rows // 3 + 1, axis=0)[:rows] if scale == 1.0 else None
    known = scale * rng.normal(size=(rows, 3)) if known is None else known
    truth = np.array([[1.0], [-2.0], [5.0]]) / scale
    x = known @ truth + 0.01 * rng.normal(size=(rows, 1))
    parts = np.array_split(np.arange(rows), 13)
    found = marginals.slope((x[part], known[part]) for part in parts)
    centred = found - found.mean() if scale == 1.0 else found
    expected = truth - truth.mean() if scale == 1.0 else truth
    np.testing.assert_allclose(centred, expected, rtol=0.01)
    (few,) = marginals.slope([(x[:1], known[:1])]).T
    np.testing.assert_array_equal(few, 0.0)


def test_every_kth_example_is_taken():
    rows = [np.arange(first, first + 7)[:, None] for first in range(0, 70, 7)]
    np.testing.assert_array_equal(marginals.evenly(rows, 40)[:, 0], np.arange(70))
    np.testing.assert_array_equal(marginals.evenly(rows, 20)[:, 0], np.arange(0, 70, 2))
    np.testing.assert_array_equal(marginals.evenly(rows, 5)[:, 0], np.arange(0, 70, 8))


def test_what_the_context_determines_has_a_density_that_the_noise_can_resolve():
    """y = 2c + 1: the residual is rounding, and its scale stays a tenth of that of y."""
    rng = np.random.default_rng(0)
    c = rng.normal(size=(400, 5))
    net = MLP(hidden=8, depth=1, embed_dim=8, context=VECTOR)
    model = HeadModel(net, VPSDE(), head=Mixture(2))
    y = 2.0 * c[:, :1] + 1.0
    prior = model.prior_of_reals((1,), lambda: iter([(y, c)]), is_marginal=False)
    np.testing.assert_allclose(prior["scale"], 0.1 * y.std(), rtol=1e-5)


@pytest.fixture
def linear_data(tmp_path):
    """An experiment whose data are linear in their contexts, [530, 2] and [530, 3]."""

    def build(dropout: float) -> tuple[Experiment, np.ndarray, np.ndarray]:
        rng = np.random.default_rng(3)
        context = 4.0 * rng.normal(size=(630, 3)) - 2.0
        x = context @ rng.normal(size=(3, 2)) + 0.3 * rng.normal(size=(630, 2)) + 7.0
        arrays = {"x_train": x[:530], "x_test": x[530:]}
        arrays |= {"context_train": context[:530], "context_test": context[530:]}
        np.savez(tmp_path / "data.npz", **arrays)
        c = tiny.config()
        c.data.update(dataset="npz", path=str(tmp_path / "data.npz"), context="values", num_test=0)
        c.data.update(standardize="coordinate")
        c.model.update(parameterization="mixture")
        c.training.context_dropout = dropout
        c.eval.baselines = True
        return Experiment.from_config(c), x, context

    return build


def test_a_run_starts_from_the_regression_of_its_data(linear_data):
    """B of `with_prior` in the units of the data is that of least squares; batches are padded."""
    experiment, x, context = linear_data(0.0)
    prior = experiment.with_prior({"network": {}})["prior"]
    design = np.concatenate([context[:530], np.ones((530, 1))], axis=1)
    fit, *_ = np.linalg.lstsq(design, x[:530], rcond=None)
    scales = x[:530].std(axis=0), context[:530].std(axis=0)
    slope = np.asarray(prior["slope"]) * scales[0] / scales[1][:, None]
    np.testing.assert_allclose(slope, fit[:3], rtol=1e-2)
    residual = (x[:530] - design @ fit).std(axis=0) / scales[0]
    np.testing.assert_allclose(prior["scale"], np.maximum(residual, 0.1), rtol=1e-2)
    both = linear_data(0.25)[0].with_prior({"network": {}})["prior"]
    assert not both["slope"].any()
    np.testing.assert_allclose(both["scale"], 1.0, rtol=1e-3)


def test_the_baseline_of_a_conditional_density_is_its_regression(linear_data):
    """log p(x | c) of the test examples in the units of the data, against SciPy."""
    experiment, x, context = linear_data(0.0)
    found = {e.name: e for e in baseline_estimators(experiment)}["linear regression"]
    design = np.concatenate([context, np.ones((630, 1))], axis=1)
    fit, *_ = np.linalg.lstsq(design[:530], x[:530], rcond=None)
    residuals = x - design @ fit
    law = multivariate_normal(np.zeros(2), residuals[:530].T @ residuals[:530] / 530)
    (batch,) = experiment.dataset.eval_batches("test", batch_size=100)
    batch = jax.tree.map(jnp.asarray, batch | {"noise_id": batch["index"]})
    rows = found.function(found.fit(), jax.random.key(0), batch)
    np.testing.assert_allclose(rows["value"], -law.logpdf(residuals[530:]), atol=0.05)
    assert found.details["given"] == "values"


def test_a_model_of_x_alone_is_not_compared_with_the_regression():
    def rows(estimator: str, value: float) -> list[dict]:
        shared = {"protocol": "", "step": 1, "split": "test", "unit": "nats", "repeat": 0}
        shared |= {"estimator": estimator}
        return [shared | {"index": i, "value": value + 0.01 * i} for i in range(20)]

    others = [rows("Gaussian", 1.0), rows("linear regression", 0.0)]
    found = {
        name: [d.baseline for d in comparison.defeats(rows(name, 2.0), others)]
        for name in ("ODE", "ODE unconditional")
    }
    assert found == {"ODE": ["Gaussian", "linear regression"], "ODE unconditional": ["Gaussian"]}
