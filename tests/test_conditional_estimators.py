"""Likelihoods given a class against closed forms: p(x | c), p(x), and the class by Bayes' rule."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from scipy.stats import chi2

from dequantization import Reals
from likelihood import Divergence, gaussian_decoder, ode_log_likelihood, variational_bound
from ode import Solver
from operators import fold_in_all, fold_in_each
from parameterization import ScoreModel, score_from_score, unit_time_label
from run_lib import calibration
from run_lib.conditional_estimators import with_contexts
from run_lib.estimators import Estimator, Parameters, estimators
from run_lib.experiment import Experiment
from sde_lib import SDE, VPSDE
from streams import Context, Dataset, Finite
from tests import tiny
from time_sampling import Importance
from toy_data import Mixture, gaussian

pytestmark = pytest.mark.usefixtures("x64")

MEANS = ((0.9, -0.4), (-0.7, 0.8), (0.1, 0.2))
VARIANCES = (0.3, 0.5, 0.8)
COUNTS = (5, 2, 13)  # of the training split
SDE_ = VPSDE(beta_max=60.0)  # the prior is that of x_T to 1e-6
T_MIN = 1e-3


def joint() -> Mixture:
    weights = jnp.asarray(COUNTS, float) / sum(COUNTS)
    return Mixture(weights, jnp.asarray(MEANS), jnp.asarray(VARIANCES))


def given(c: int) -> Mixture:
    """p(x | c)."""
    return gaussian(jnp.asarray(MEANS[c]), VARIANCES[c])


class Oracle(nn.Module):
    """The exact score of p(x | c), or of p(x) where there is no c."""

    sde: SDE
    context: Any = None

    @nn.compact
    def __call__(self, x, label, train=False, context=None):
        whole = joint().score(x, label, self.sde)
        if context is None:
            return whole
        each = [given(c).score(x, label, self.sde) for c in range(len(COUNTS))]
        known = jnp.select([context[:, None] == c for c in range(len(COUNTS))], each, whole)
        return known


MODEL = ScoreModel(Oracle(SDE_), SDE_, score_from_score, unit_time_label)


def points(n: int = 12) -> tuple[jax.Array, jax.Array]:
    """(x, c)."""
    rng = np.random.default_rng(0)
    c = np.arange(n) % 3
    noise = rng.standard_normal((n, 2)) * np.sqrt(np.asarray(VARIANCES))[c][:, None]
    return jnp.asarray(np.asarray(MEANS)[c] + noise), jnp.asarray(c, jnp.int32)


def exact(x: jax.Array, c: jax.Array | None, t_min: float = T_MIN) -> np.ndarray:
    """log p_t(x | c) at t_min, or log p_t(x)."""
    t = jnp.full(x.shape[:1], t_min)
    if c is None:
        return np.asarray(joint().log_prob(x, t, SDE_))
    each = jnp.stack([given(k).log_prob(x, t, SDE_) for k in range(3)])
    return np.asarray(each)[np.asarray(c), np.arange(len(c))]


@pytest.mark.parametrize("which", ["given", "none", "some"])
def test_the_ode_of_a_bound_score_has_the_conditional_likelihood(which: str) -> None:
    """Also in one batch with examples that have no context."""
    x, c = points()
    known = {"given": c, "none": None, "some": jnp.where(c == 1, -1, c)}[which]
    solver = Solver("dopri5", rtol=1e-7, atol=1e-7)
    log_p = jax.jit(
        lambda x, known: ode_log_likelihood(
            MODEL.score({}, context=known), SDE_, x, jax.random.split(jax.random.key(0), len(x)),
            t_min=T_MIN, solver=solver, divergence=Divergence("exact"),
        ).log_p
    )(x, known)  # fmt: skip
    law, marginal = exact(x, c), exact(x, None)
    expected = {"given": law, "none": marginal, "some": np.where(c == 1, marginal, law)}[which]
    np.testing.assert_allclose(log_p, expected, atol=2e-4)
    assert np.abs(law - marginal).min() > 2e-3


def test_the_bound_of_a_bound_score_is_the_conditional_likelihood() -> None:
    """With exact scores the bound is tight: mean over draws within four standard errors."""
    x, c = points(3)
    many, of = jnp.tile(x, (2000, 1)), jnp.tile(c, 2000)
    keys = jax.random.split(jax.random.key(1), len(many))

    def values(known: jax.Array | None) -> np.ndarray:
        score_fn = MODEL.score({}, context=known)
        bound = variational_bound(
            score_fn, SDE_, many, keys, proposal=Importance(SDE_, T_MIN), num_times=32,
            decoder=gaussian_decoder(score_fn, SDE_), offset=True,
        )  # fmt: skip
        return np.asarray(bound.nll).reshape(2000, 3)

    laws = {None: joint().log_data(x)}
    laws |= {"c": jnp.stack([given(k).log_data(x[k : k + 1])[0] for k in range(3)])}
    for known, law in ((None, laws[None]), (of, laws["c"])):
        found = values(known)
        error = found.std(axis=0) / 2000**0.5
        gap = found.mean(axis=0) + np.asarray(law)
        assert np.all(np.abs(gap) < 4 * error + 2 * T_MIN), (gap, error)
        assert error.max() < 0.05


def dataset() -> Dataset:
    x, c = points()
    train = np.repeat(np.arange(3), COUNTS).astype(np.int32)
    rows = np.zeros((len(train), 2), np.float32)
    splits = [
        Finite(len(train), rows.__getitem__, context=train),
        Finite(12, np.asarray(x, np.float32).__getitem__, context=np.asarray(c)),
    ]
    return Dataset("points", (2,), None, *splits, context=Context((), 3))


def table(**changes: Any) -> tuple[Experiment, dict[str, Estimator]]:
    """The estimators of the oracle by name."""
    config = tiny.config("moons")
    config.training.update(context_dropout=0.1, smallest_time=T_MIN)
    config.eval.update({"bound": False, "classify": True, "rtol": 1e-7, "atol": 1e-7} | changes)
    experiment = Experiment.from_config(config)
    experiment = dataclasses.replace(experiment, given=dataset())
    vars(experiment)["model"] = MODEL
    return experiment, {e.name: e for e in with_contexts(experiment, estimators(experiment))}


def run(estimator: Estimator, x: jax.Array, c: jax.Array) -> dict[str, np.ndarray]:
    batch = {"image": x, "context": c, "noise_id": jnp.arange(len(x))}
    found = jax.jit(estimator.function)(Parameters({}), jax.random.key(3), batch)
    return {name: np.asarray(value) for name, value in found.items()}


def test_bayes_rule_gives_the_classes_of_a_known_mixture() -> None:
    """log p(c | x) of the closed form at t_min, where the ODE ends; its table of all classes."""
    x, c = points()
    _, found = table(divergence="exact")
    rows = run(found["class by ODE"], x, c)
    logits = np.stack([exact(x, jnp.full_like(c, k)) for k in range(3)], axis=1)
    np.testing.assert_allclose(rows["log_likelihoods"], logits, atol=2e-4)
    joint_ = logits + np.log(np.asarray(COUNTS) / sum(COUNTS))
    expected = joint_ - np.logaddexp.reduce(joint_, axis=1, keepdims=True)
    np.testing.assert_allclose(rows["log_posterior"], expected, atol=4e-4)
    np.testing.assert_allclose(rows["value"], -expected[np.arange(12), np.asarray(c)], atol=4e-4)
    np.testing.assert_array_equal(rows["class"], c)
    assert "classes 3, frequencies of 20 training examples" in found["class by ODE"].protocol


def test_all_classes_and_no_class_share_the_noise() -> None:
    """The likelihood of the true class is that of the ODE to rounding, probes and all."""
    x, c = points()
    _, found = table(divergence="rademacher")
    log_p = run(found["class by ODE"], x, c)["log_likelihoods"]
    own, marginal = (run(found[name], x, c)["value"] for name in ("ODE", "ODE unconditional"))
    np.testing.assert_allclose(log_p[np.arange(12), np.asarray(c)], -own, atol=1e-9)
    assert np.abs(own - marginal).min() > 1e-3
    assert found["ODE"].protocol == found["ODE unconditional"].protocol + ", given class"
    information = found["ODE information"]
    assert information.difference_of == (found["ODE unconditional"], found["ODE"])
    assert (information.unit, information.factor) == ("nats", 1.0)


def test_classes_that_training_never_saw_are_refused() -> None:
    experiment, _ = table()
    data = experiment.dataset
    rare = dataclasses.replace(data.train, context=np.where(data.train.context == 1, 0, 2))
    lacks = dataclasses.replace(experiment, given=dataclasses.replace(data, train=rare))
    with pytest.raises(ValueError, match=r"eval\.classify=True: need False: the classes \[1\] of"):
        with_contexts(lacks, estimators(lacks))


def test_noise_depends_on_the_example_alone() -> None:
    """A batch that is cut in two has the same rows: no example sees the context of another."""
    x, c = points()
    _, found = table(divergence="rademacher")
    for name in ("class by ODE", "ODE unconditional"):
        estimator, whole = found[name], run(found[name], x, c)["value"]
        batch = {"image": x, "context": c, "noise_id": jnp.arange(12)}
        half = {key: leaf[6:] for key, leaf in batch.items()}
        part = jax.jit(estimator.function)(Parameters({}), jax.random.key(3), half)["value"]
        np.testing.assert_allclose(part, whole[6:], atol=1e-9)


@pytest.mark.parametrize("width", [None, 0.8])
def test_examples_have_their_place_among_samples_of_the_model(width: float | None) -> None:
    """Of the exact density the places are uniform; a mode is at 0, a far point at 1.

    Also where the values are rounded and stand for cells.
    """
    experiment, found = table(
        classify=False, calibrate=True, calibration_samples=19, rtol=1e-4, atol=1e-4
    )
    if width is not None:
        vars(experiment)["encoding"] = Reals(widths=np.full(2, width))
        found = {e.name: e for e in with_contexts(experiment, estimators(experiment))}
    rng, n = np.random.default_rng(1), 300
    c = np.arange(n) % 3
    mean, scale = np.asarray(MEANS)[c], np.sqrt(np.asarray(VARIANCES))[c][:, None]
    x = mean + scale * rng.standard_normal((n, 2))
    x[-6:-3] = mean[-6:-3]
    x[-3:] = mean[-3:] + np.asarray([5.0, -5.0]) * scale[-3:]
    if width is not None:
        x = width * np.round(x / width)
    batch = {"image": x, "context": c.astype(np.int32),
             "noise_id": np.arange(n, dtype=np.int32)}  # fmt: skip
    estimator = found["calibration by ODE"]
    cells = "" if width is None else ", drawn within cells"
    assert estimator.protocol.endswith("given class, samples 19" + cells)
    result = jax.jit(estimator.function)(Parameters({}), experiment.keys["eval"], batch)
    assert np.all(result["converged"])
    levels, ranks = np.asarray(result["value"]), np.asarray(result["ranks"])
    keys = fold_in_all(fold_in_each(experiment.keys["eval"], jnp.arange(n)), 8)
    seen = np.asarray(experiment.encoding.in_cells(jnp.asarray(x), keys))  # in its cell
    expected = chi2(2).cdf((((seen - mean) / scale) ** 2).sum(axis=1))  # of a Gaussian in the plane
    assert np.mean((levels - expected) ** 2) < 0.013  # 1/(6 · 19) of 19 samples, and more
    rows = [
        dict.fromkeys(("estimator", "protocol", "step", "split", "identity"), "")
        | {"repeat": 0, "index": i, "value": levels[i], "ranks": ranks[i]}
        for i in range(n)
    ]
    summary = calibration.summary(rows[:-6])
    assert summary["level_p_value"] > 0.01
    assert min(summary["ranks_p_values"]) > 0.01
    covered, error = summary["covered"], summary["covered_standard_error"]
    assert abs(covered[0] - 0.5) < 4 * error[0]
    assert abs(covered[1] - 0.9) < 4 * error[1]
    if width is None:
        assert levels[-6:-3].max() < 0.05
    assert levels[-3:].min() > 0.95
    assert ranks[-3:, 0].min() > 0.95
    assert ranks[-3:, 1].max() < 0.05
    shifted = calibration.summary([row | {"value": row["value"] ** 2} for row in rows])
    assert shifted["level_p_value"] < 1e-6
    assert shifted["covered"][0] > 0.6


def test_grey_levels_have_no_density_to_be_calibrated() -> None:
    config = tiny.config("digits")
    config.eval.calibrate = True
    experiment = Experiment.from_config(config)
    with pytest.raises(ValueError, match=r"eval\.calibrate=True: need False, or eval\.enable_bpd"):
        with_contexts(experiment, estimators(experiment))
