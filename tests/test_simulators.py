"""Simulators of the benchmark, and posteriors against integrals, simulations and Bayes' rule."""

import argparse

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression

from experiments import members, sbi, simulators
from experiments.simulators import SIMULATORS

SIDE = 800


def grid(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, float]:
    """Midpoints of cells of a box in the plane, and the area of a cell."""
    axes = [a + (b - a) * (np.arange(SIDE) + 0.5) / SIDE for a, b in zip(low, high, strict=True)]
    points = np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, 2)
    return points, float(np.prod((np.asarray(high) - low) / SIDE))


@pytest.mark.parametrize(
    ("name", "y"),
    [
        ("two_moons", [0.0, 0.1]),  # both crescents, whole
        ("two_moons", [-0.75, 0.3]),  # cut by the box
        ("two_moons", [0.3, 0.05]),  # cut at q = 0
        ("gaussian_mixture", [9.9, -3.0]),
        ("gaussian_mixture", [11.0, 10.2]),  # outside
    ],
)
def test_posteriors_in_the_plane_integrate_to_one(name: str, y: list[float]) -> None:
    simulator = SIMULATORS[name]
    points, area = grid(-np.full(2, simulator.bound), np.full(2, simulator.bound))
    with np.errstate(divide="ignore"):
        log_p = simulator.log_posterior(points, np.broadcast_to(y, points.shape))
    assert_allclose(np.exp(log_p).sum() * area, 1.0, rtol=2e-2)


def test_the_posterior_of_two_moons_is_that_of_its_simulations() -> None:
    """Parameters whose simulation comes near y, against the density on a grid."""
    simulator, y = SIMULATORS["two_moons"], np.array([-0.3, 0.4])
    theta, simulated = simulator.joint(np.random.default_rng(0), 1_000_000)
    near = theta[np.hypot(*(simulated - y).T) < 0.02]
    points, area = grid(-np.ones(2), np.ones(2))
    with np.errstate(divide="ignore"):
        p = np.exp(simulator.log_posterior(points, np.broadcast_to(y, points.shape))) * area
    upper = points.sum(axis=1) > 0  # one of the crescents
    for part, of_near in ((upper, near.sum(axis=1) > 0), (~upper, near.sum(axis=1) < 0)):
        expected, found = (points * p[:, None])[part].sum(axis=0) / p[part].sum(), near[of_near]
        assert_allclose(found.mean(axis=0), expected, atol=0.02)
        assert_allclose(of_near.mean(), p[part].sum(), atol=0.03)


def test_linear_posteriors_are_those_of_bayes() -> None:
    rng = np.random.default_rng(1)
    theta, y = SIMULATORS["gaussian_linear"].joint(rng, 50)
    scale = np.sqrt(0.1)
    joint = norm.logpdf(theta, 0.0, scale) + norm.logpdf(y, theta, scale)
    expected = (joint - norm.logpdf(y, 0.0, np.sqrt(0.2))).sum(axis=1)
    assert_allclose(SIMULATORS["gaussian_linear"].log_posterior(theta, y), expected, rtol=1e-10)
    line = np.linspace(-1.0, 1.0, 4001)[:, None]
    for y_1 in (0.2, -0.9, 30.0):
        log_p = SIMULATORS["gaussian_linear_uniform"].log_posterior(line, np.full_like(line, y_1))
        assert_allclose(np.trapezoid(np.exp(log_p), line[:, 0]), 1.0, rtol=1e-2)


def test_points_of_slcp_have_the_moments_of_their_parameters() -> None:
    theta = np.repeat([[0.5, -1.0, 1.2, -0.8, 0.7]], 40_000, axis=0)
    points = SIMULATORS["slcp"].simulate(np.random.default_rng(2), theta).reshape(-1, 2)
    covariance = np.tanh(0.7) * 1.44 * 0.64
    assert_allclose(points.mean(axis=0), [0.5, -1.0], atol=0.02)
    assert_allclose(np.cov(points.T), [[1.44**2, covariance], [covariance, 0.64**2]], rtol=0.03)


def test_spikes_are_correlated_with_the_stimulus_that_drives_them() -> None:
    x, simulator = simulators.design_matrix(), SIMULATORS["bernoulli_glm"]
    assert_allclose(x[5], [1.0, *simulators.STIMULUS[5::-1], 0.0, 0.0, 0.0])
    theta = np.repeat([[1.0, 2.0] + [0.0] * 8], 20_000, axis=0)
    y = simulator.simulate(np.random.default_rng(3), theta)
    expected = x.T @ (1.0 / (1.0 + np.exp(-1.0 - 2.0 * x[:, 1])))
    assert_allclose(y.mean(axis=0), expected, atol=0.2)
    prior = simulator.prior(np.random.default_rng(4), 100_000)
    assert_allclose(prior[:, 0].var(), 2.0, rtol=0.03)  # of precision ½


def test_a_classifier_sees_a_shift_and_no_difference() -> None:
    rng, scale = np.random.default_rng(5), np.array([1e-3, 1e3])  # it sees them standardised
    reference = rng.normal(size=(600, 2)) * scale
    assert abs(sbi.c2st(rng.normal(size=(600, 2)) * scale, reference) - 0.5) < 0.06
    shifted = sbi.c2st(rng.normal([2.0, 0.0], size=(600, 2)) * scale, reference)
    assert_allclose(shifted, norm.cdf(1.0), atol=0.04)  # the best there is


class Exact:
    """The posterior of gaussian_linear, in the place of a fitted model."""

    params_ = {"w": np.zeros(1)}  # noqa: RUF012

    def __init__(self, workdir=None) -> None:
        self.workdir_ = workdir

    def score_samples(self, theta: np.ndarray, y: np.ndarray) -> np.ndarray:
        return norm.logpdf(theta, y / 2.0 + 0.1, np.sqrt(0.05)).sum(axis=1)  # shifted by 0.1

    def sample(self, number: int, y: np.ndarray, *, random_state: int = 0) -> np.ndarray:
        return y / 2.0 + np.sqrt(0.05) * np.random.default_rng(random_state).normal(size=y.shape)


def test_a_fit_is_compared_with_the_truth(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A density that is shifted by 0.1 in ten coordinates of variance .05: KL = 10 · .01/.1 = 1."""

    class Reference:
        """What the package of the benchmark holds."""

        def observation(self, task: str, number: int) -> np.ndarray:
            return np.full((1, 10), 0.1 * number)

        def posterior(self, task: str, number: int) -> np.ndarray:
            y = np.repeat(self.observation(task, number), 150, axis=0)
            return Exact().sample(150, y, random_state=number)

    monkeypatch.setattr(sbi, "Reference", Reference)
    monkeypatch.setattr(sbi, "fitted", lambda *_: Exact(tmp_path))
    monkeypatch.setattr(sbi, "MLPClassifier", lambda *_, **__: LogisticRegression())  # in no time
    options = argparse.Namespace(
        workdir=tmp_path, seed=1, samples=150, observations=1, members=1, set=[]
    )
    found = sbi.evaluated("gaussian_linear", 1000, options)
    kl, error = found["kl"]
    assert_allclose(kl, 1.0, atol=4 * error)
    assert all(0.35 < value < 0.65 for value in found["c2st"].values())
    assert "| 0.652 | " in sbi.line("gaussian_linear", 1000, found)
    monkeypatch.setattr(sbi, "c2st", None)  # what is there is not computed again
    assert sbi.evaluated("gaussian_linear", 1000, options)["c2st"] == found["c2st"]
    for name, value in (("samples", 149), ("set", ["eval.num_steps=9"])):  # of others it is
        changed = argparse.Namespace(**vars(options) | {name: value})
        with pytest.raises(TypeError, match="not callable"):
            sbi.evaluated("gaussian_linear", 1000, changed)


def test_a_fit_knows_the_box_of_the_prior(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple] = []

    class Ensemble:
        def __init__(self, number: int, **options) -> None:
            made.append((number, options))

        def fit(self, theta: np.ndarray, *, context: np.ndarray) -> "Ensemble":
            assert theta.shape == context.shape == (50, 10)
            assert theta.dtype == context.dtype == np.float32
            return self

    monkeypatch.setattr(members, "DensityEnsemble", Ensemble)
    options = argparse.Namespace(seed=1, members=3, set=["training.n_iters=9"])
    simulator = SIMULATORS["gaussian_linear_uniform"]
    assert isinstance(sbi.fitted(simulator, 50, tmp_path / "50", options), Ensemble)
    ends = {"data.lower": "-1", "data.upper": "1", "training.n_iters": "9"}
    folder = tmp_path / "50_3"
    assert made == [(3, {"workdir": folder, "random_state": 1, "changes": ends})]
