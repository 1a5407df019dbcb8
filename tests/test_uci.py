"""Baselines of conditional densities against closed forms; splits; figures that are read again."""

import argparse
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.stats import norm

from experiments import members, uci


def linear(rows: int) -> uci.Split:
    """y = 3 x_1 − x_2 + 2 + N(0, .5²): both baselines can hold it."""
    rng = np.random.default_rng(0)
    x = rng.normal([5.0, 100.0], [2.0, 30.0], (rows, 2))
    y = 3.0 * x[:, 0] - x[:, 1] + 2.0 + 0.5 * rng.normal(size=rows)
    return uci.Split(x[:-50], y[:-50], x[-50:], y[-50:])


@pytest.mark.parametrize("baseline", [uci.log_p_process, uci.log_p_mixture])
def test_baselines_have_the_density_of_a_linear_law(baseline) -> None:
    split = linear(150)
    x, y = split.x_test, split.y_test
    truth = norm.logpdf(y, 3.0 * x[:, 0] - x[:, 1] + 2.0, 0.5)
    assert_allclose(baseline(split).mean(), truth.mean(), atol=0.3)
    assert baseline(split).mean() > norm.logpdf(y, y.mean(), y.std()).mean() + 1.0


def test_a_mixture_is_conditioned_on_x() -> None:
    """Two clusters in x with y = ±4: p(y | x) is that of the cluster, with variance 1."""
    rng = np.random.default_rng(1)
    side = rng.choice([-1.0, 1.0], 4000)
    x, y = side[:, None] * 5.0 + rng.normal(size=(4000, 1)), side * 4.0 + rng.normal(size=4000)
    found = uci.log_p_mixture(uci.Split(x[:-200], y[:-200], x[-200:], y[-200:]))
    assert_allclose(found, norm.logpdf(y[-200:], side[-200:] * 4.0), atol=0.15)


def test_quantiles_of_samples_hold_their_share() -> None:
    rng = np.random.default_rng(2)
    samples, y = rng.normal(size=(3000, 99)), rng.normal(size=3000)
    for share in (0.5, 0.9):
        n = 4 * (share * (1 - share) / 3000) ** 0.5
        assert_allclose(uci.within(samples, y, share), share, atol=n)
    many = np.random.default_rng(4).normal(size=(40_000, 10))  # few samples show a wrong quantile
    assert_allclose(uci.within(many[:, 1:], many[:, 0], 0.8), 0.8, atol=0.008)
    assert uci.within(samples, y + 10.0, 0.9) == 0.0


def test_a_joint_density_is_in_the_units_of_the_columns() -> None:
    """Independent Gaussians of deviations 3 and 200: a mixture has one component."""
    deviations = np.array([3.0, 200.0])
    rows = np.random.default_rng(3).normal(size=(1500, 2)) * deviations + 50.0
    train = rows[:-500][np.argsort(rows[:-500, 0])]  # a table in an order
    mixture, kernels = uci.log_p_joint(train, rows[-500:])
    truth = norm.logpdf(rows[-500:], 50.0, deviations).sum(axis=1).mean()
    assert_allclose(mixture, truth, atol=0.03)
    assert truth - 0.2 < kernels < truth


def test_noise_fills_the_cells_of_each_column() -> None:
    rows = np.tile([[0.0, 0.25], [1.0, 0.5], [5.0, 1.0], [1.0, 0.75]], (100, 1))
    first, second = uci.filled(rows[:300], rows[300:], 0)
    noise = np.concatenate([first, second]) - rows
    assert np.all(np.abs(noise) <= [0.5, 0.125])
    assert np.all(np.ptp(noise, axis=0) > [0.95, 0.23])
    with pytest.raises(ValueError, match="--joint='a constant column'"):
        uci.filled(rows[:300] * [1.0, 0.0], rows[300:] * [1.0, 0.0], 0)


class Exact:
    """The law of `linear`, in the place of a fitted model."""

    params_, step_ = {"w": np.zeros(1)}, 7

    def __init__(self, *_, **options) -> None:
        self.workdir_ = options["workdir"]
        assert options["changes"]["data.cell_width"] == "(0.1,)"

    def fit(self, y: np.ndarray, *, context: np.ndarray) -> None:
        assert y.shape == (len(context), 1)
        assert y.dtype == context.dtype == np.float32

    def score_samples(self, y: np.ndarray, context: np.ndarray) -> np.ndarray:
        assert len(y) == 50  # the tested rows
        return norm.logpdf(y[:, 0], self._mean(context), 0.5)

    def sample(self, number: int, context: np.ndarray) -> np.ndarray:
        noise = np.random.default_rng(3).normal(size=(number, 1))
        return self._mean(context)[:, None] + 0.5 * noise

    def _mean(self, x: np.ndarray) -> np.ndarray:
        return 3.0 * x[:, 0] - x[:, 1] + 2.0


def test_figures_of_a_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = linear(200)
    x, y = np.concatenate([split.x, split.x_test]), np.concatenate([split.y, split.y_test])
    test = np.stack([np.arange(50), np.arange(150, 200)])
    np.savez(tmp_path / "tables.npz", boston_x=x, boston_y=y, boston_test=test)
    assert_allclose(uci.split_of(tmp_path / "tables.npz", "boston", 1).x_test, split.x_test)
    assert_allclose(uci.split_of(tmp_path / "tables.npz", "boston", 0).y, y[50:])
    with pytest.raises(ValueError, match=r"--splits=3: need at most 2 for boston"):
        uci.split_of(tmp_path / "tables.npz", "boston", 2)
    monkeypatch.setattr(members, "DensityModel", Exact)
    options = argparse.Namespace(
        file=tmp_path / "tables.npz", workdir=tmp_path, set=[], joint=False, members=1
    )
    found = uci.evaluated("boston", 1, options)
    assert_allclose(found["model"], -0.73, atol=0.2)  # −½ log 2πe − log ½
    assert_allclose([found["within 50 %"], found["within 90 %"]], [0.5, 0.9], atol=0.2)
    monkeypatch.setattr(uci, "log_p_process", None)  # what is there is not computed again
    assert uci.evaluated("boston", 1, options) == found
    for params, options.set in (
        ({"w": np.ones(1)}, []),
        (Exact.params_, ["eval.num_steps=9"]),
    ):  # of another model or other settings it is
        monkeypatch.setattr(Exact, "params_", params)
        with pytest.raises(TypeError, match="not callable"):
            uci.evaluated("boston", 1, options)
    monkeypatch.setattr(members, "DensityEnsemble", Exact)
    monkeypatch.setattr(uci, "log_p_process", lambda split: np.zeros(50))
    options.members = 3
    assert_allclose(uci.evaluated("boston", 1, options)["model"], found["model"], rtol=1e-12)
    assert (tmp_path / "boston" / "1_3" / "uci.json").exists()
    assert "| -2.402 ± 0.042 | 2 |" in uci.line("boston", [found, found])


class Unit:
    """A model of p(x, y) that gives every row the density e."""

    params_, step_ = {"w": np.zeros(1)}, 3

    def __init__(self, **options) -> None:
        self.workdir_ = options["workdir"]
        assert (options["changes"], options["workdir"].name) == ({}, "joint0")

    def fit(self, rows: np.ndarray, *, context: None) -> None:
        assert rows.shape == (150, 3)

    def score_samples(self, rows: np.ndarray) -> np.ndarray:
        return np.ones(50) if rows.shape == (50, 3) else np.full(1, np.nan)


def test_figures_of_a_joint_density(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split, test = linear(200), np.arange(150, 200)[None]
    x, y = np.concatenate([split.x, split.x_test]), np.concatenate([split.y, split.y_test])
    np.savez(tmp_path / "tables.npz", boston_x=x, boston_y=y, boston_test=test)
    monkeypatch.setattr(members, "DensityModel", Unit)
    options = argparse.Namespace(
        file=tmp_path / "tables.npz", workdir=tmp_path, set=[], joint=True, members=1
    )
    found = uci.evaluated("boston", 0, options)
    truth = norm.entropy(5.0, 2.0) + norm.entropy(100.0, 30.0) + norm.entropy(0.0, 0.5)
    assert_allclose(found["mixture"], -truth, atol=0.3)
    assert uci.line("boston", [found]).startswith("| `boston` | 1.000 ± nan | ")
    assert uci.line("boston", [found]).endswith("| 1 |")
