"""The classifier of noised examples: its loss, its network, whole runs that guide samples."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import losses
import run_lib
from dequantization import Reals
from models.time_classifier import TimeClassifier
from run_lib import drawing, guide, metrics, sampling_loop
from run_lib.experiment import Experiment
from sde_lib import VPSDE
from tests import tiny
from toy_data import Mixture

MEANS, WEIGHTS = (1.5, -1.0), (0.3, 0.7)


def posterior(x: jax.Array, t: jax.Array, sde: VPSDE) -> jax.Array:
    """log p(c | x_t) of two Gaussians of variance ¼ on a line."""
    variance = sde.alpha(t) ** 2 * 0.25 + sde.sigma(t) ** 2
    gaps = x - sde.alpha(t)[:, None] * jnp.asarray(MEANS)[None]
    log_joint = jnp.log(jnp.asarray(WEIGHTS))[None] - 0.5 * gaps**2 / variance[:, None]
    return jax.nn.log_softmax(log_joint)


@pytest.mark.usefixtures("x64")
def test_the_loss_is_least_for_the_true_classifier() -> None:
    """Its mean is the entropy of c given x_t and t; sharper and flatter ones have more."""
    sde, n = VPSDE(), 40_000
    rng = np.random.default_rng(0)
    c = rng.choice(2, n, p=WEIGHTS)
    image = np.asarray(MEANS)[c][:, None] + 0.5 * rng.standard_normal((n, 1))
    batch = {"image": jnp.asarray(image), "noise_id": jnp.arange(n, dtype=jnp.int32),
             "context": jnp.asarray(c, jnp.int32)}  # fmt: skip
    law = losses.time_law(
        sde, smallest_time=1e-3, likelihood_weighting=True, name="velocity", stratified=True
    )

    def mean(power: float) -> np.ndarray:
        def log_prob(params, x, t, key):
            assert key is None
            return jax.nn.log_softmax(power * posterior(x, t, sde))

        loss = losses.classifier_loss(
            log_prob, sde, Reals(None), law, batch_size=n, train=False
        )  # fmt: skip
        values, parts = loss({}, jax.random.key(0), batch)
        assert set(np.unique(parts["accuracy"])) == {0.0, 1.0}
        return np.asarray(values)

    exact = mean(1.0)
    x, t = (
        np.random.default_rng(1).standard_normal((400, 200)),
        law.proposal.quantile(jnp.asarray((np.arange(400) + 0.5) / 400)),
    )
    scale = np.asarray(jnp.sqrt(sde.alpha(t) ** 2 * 0.25 + sde.sigma(t) ** 2))
    entropy = 0.0
    for k, weight in enumerate(WEIGHTS):
        points = scale[:, None] * x + np.asarray(sde.alpha(t))[:, None] * MEANS[k]
        flat = posterior(jnp.asarray(points.reshape(-1, 1)), jnp.repeat(t, 200), sde)
        entropy -= weight * float(flat[:, k].mean())
    assert_allclose(exact.mean(), entropy, atol=4 * exact.std() / n**0.5 + 2e-3)
    for power in (0.7, 1.4):
        gap = mean(power) - exact
        assert gap.mean() > 4 * gap.std() / n**0.5


@pytest.mark.parametrize("shape", [(5, 7, 3), (4, 3)])
def test_the_network_begins_with_equal_classes(shape: tuple[int, ...]) -> None:
    network = TimeClassifier(classes=5, width=8, depth=3)
    x = jax.random.normal(jax.random.key(0), (6, *shape))
    params = jax.jit(network.init)(jax.random.key(1), x, jnp.zeros(6))
    logits = jax.jit(network.apply)(params, x, jnp.linspace(-5.0, 5.0, 6))
    assert logits.shape == (6, 5)
    assert_allclose(logits, 0.0, atol=1e-3)
    with pytest.raises(ValueError, match="depth=0: need an integer of at least 1"):
        TimeClassifier(classes=5, depth=0)


def experiment(dataset: str = "digits", **changes: object) -> Experiment:
    c = tiny.config(dataset)
    c.training.update(n_iters=5, time_law="")
    c.classifier.update(n_iters=100, width=16, depth=2, ema_rate=0.9)
    c.sampling.update({"num_samples": 4} | changes)
    return Experiment.from_config(c)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("digits")
    run_lib.train(experiment(), workdir)
    return workdir


def test_a_network_of_no_class_is_guided_to_one(run: Path) -> None:
    with pytest.raises(ValueError, match=r"^sampling\.guide='classifier': need '' or a classifier"):
        drawing.check(experiment(guide="classifier", context="3"), run)
    guide.train(experiment(), run)
    rows = [r for r in metrics.read_metrics(run / "classifier") if r["split"] == "held_out"]
    assert rows[-1]["loss"] < np.log(10) - 0.1  # of the classes at all noise levels
    assert int(guide.train(experiment(), run).step) == 100  # there is nothing left to do

    other = tiny.config("digits")
    other.classifier.update(n_iters=100, width=16, depth=2)
    other.training.sde = "subvpsde"
    with pytest.raises(ValueError, match=r"training\.sde: 'vpsde' in .*, now 'subvpsde'"):
        guide.load(Experiment.from_config(other), run)

    def samples(**changes: object) -> np.ndarray:
        drawing.draw_samples(experiment(**changes), run)
        where = max((run / "samples").glob("drawn-*"), key=lambda p: p.stat().st_mtime)
        return np.concatenate([part["samples"] for part in sampling_loop.read(where, 4)])

    plain = samples()
    three = samples(guide="classifier", context="3", guidance=20.0)
    seven = samples(guide="classifier", context="7", guidance=20.0)
    assert np.any(plain != three)
    assert np.any(three != seven)
    for changes, message in (
        ({}, r"^sampling\.guide='classifier': need '' without sampling\.context"),
        ({"context": "12"}, r"^sampling\.context='12': need one of 10 classes"),
    ):
        with pytest.raises(ValueError, match=message):
            drawing.check(experiment(guide="classifier", **changes), run)


def test_guided_samples_have_the_score_of_their_class() -> None:
    """∇ log p(x_t) + ∇ log p(c | x_t) of the guide is the score of the Gaussian of the class."""
    sde = VPSDE()
    law = Mixture(jnp.asarray(WEIGHTS), jnp.asarray(MEANS)[:, None], jnp.full(2, 0.25))
    found = guide.Guide({}, lambda params, x, t: posterior(x, t, sde), None, "")
    x, t = jnp.linspace(-2.0, 2.0, 8)[:, None], jnp.linspace(0.05, 0.9, 8)
    c = jnp.arange(8) % 2
    score = drawing.classifier_guided(lambda x, t: law.score(x, t, sde), found.of({}, c), 1.0)
    variance = sde.alpha(t) ** 2 * 0.25 + sde.sigma(t) ** 2
    expected = -(x[:, 0] - sde.alpha(t) * jnp.asarray(MEANS)[c]) / variance
    assert_allclose(score(x, t)[:, 0], expected, rtol=2e-4, atol=1e-5)


def test_data_without_classes_have_no_classifier(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^data\.dataset='moons': need data with classes"):
        guide.train(experiment("moons"), tmp_path)
    assert not list(tmp_path.iterdir())
