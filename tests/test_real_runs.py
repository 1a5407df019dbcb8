"""Whole runs on tables and arrays of real values, at tiny size: figures in the user's units."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

import npz_files
import run_lib
from records import Records
from run_lib import config_files, figures, sampling_loop
from run_lib.experiment import Experiment
from tests import tiny

pytestmark = pytest.mark.usefixtures("compiled_at_o0")


def config(path: Path, dataset: str = "table", **changes: str) -> ConfigDict:
    c = tiny.config(dataset)
    c.data.update(path=str(path), num_test=0, levels=256)
    c.model.update(parameterization="mixture", components=2)
    c.training.update(n_iters=10)
    c.eval.update(baselines=True, num_times=4, batch_size=16)
    for name, text in changes.items():
        config_files.change(c, name.replace("__", "."), text)
    return c


def evaluated(c: ConfigDict, workdir: Path) -> Experiment:
    experiment = Experiment.from_config(c)
    run_lib.train(experiment, workdir)
    run_lib.evaluate(experiment, workdir, "eval")
    return experiment


def values(workdir: Path) -> dict[str, np.ndarray]:
    """Of every estimator, in the order of the examples."""
    found: dict[str, dict[int, float]] = {}
    for row in Records(workdir / "eval").rows.values():
        assert row["unit"] == "nats"
        found.setdefault(row["estimator"], {})[row["index"]] = row["value"]
    return {name: np.array([v for _, v in sorted(rows.items())]) for name, rows in found.items()}


def samples(workdir: Path) -> np.ndarray:
    shards = sampling_loop.read(workdir / "eval" / "samples_10", 9)
    return np.concatenate([arrays["samples"] for arrays in shards])


UNITS = np.array([1000.0, 0.01])


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same table in two systems of units."""
    rng, where = np.random.default_rng(0), tmp_path_factory.mktemp("tables")
    x = rng.standard_normal((120, 1)) + 0.5 * rng.standard_normal((120, 2)) + [3.0, -1.0]
    for name, units in (("a", 1.0), ("b", UNITS)):
        np.savetxt(where / f"{name}.csv", units * x, "%.12g", ",", header="x,y", comments="")
    return where / "a.csv", where / "b.csv"


@pytest.mark.parametrize("kind", ["coordinate", "whiten"])
def test_other_units_change_figures_by_the_log_of_the_units(tmp_path, tables, kind: str) -> None:
    """log p(Ax) = log p(x) − log|det A| of all estimators; samples and statistics are in units."""
    for name, path in zip("ab", tables, strict=True):
        evaluated(config(path, data__standardize=kind), tmp_path / name)
    a, b = (values(tmp_path / name) for name in "ab")
    assert a.keys() == b.keys() == {"ODE", "bound", "Gaussian", "diagonal Gaussian"}
    for name in a:
        assert len(a[name]) == 12
        gap = b[name] - a[name]
        np.testing.assert_allclose(gap, np.log(UNITS).sum(), atol=2e-3, err_msg=name)
    drawn = [samples(tmp_path / name) for name in "ab"]
    np.testing.assert_allclose(drawn[1], UNITS * drawn[0], rtol=1e-3)
    assert np.abs(drawn[0].mean(axis=0) - [3.0, -1.0]).max() < 3.0
    found = npz_files.read(tmp_path / "b" / "standardization.npz", ("mean", "matrix", "inverse"))
    np.testing.assert_allclose(found["mean"], UNITS * [3.0, -1.0], rtol=0.3)
    assert found["columns"].tolist() == ["x", "y"]
    assert (tmp_path / "b" / "density.png").exists()


def test_a_gaussian_of_real_values_is_that_of_scipy(tmp_path, tables) -> None:
    """The baseline of standardised data is, in the units of the file, that of the data."""
    import scipy.stats

    c = config(tables[1], data__standardize="coordinate")
    c.eval.update(enable_bpd=False, bound=True, enable_sampling=False)
    experiment = evaluated(c, tmp_path)
    train, test = (experiment.dataset.examples(s, np.arange(n)) for s, n in
                   (("train", 108), ("test", 12)))  # fmt: skip
    train = train.astype(np.float64)
    covariance = np.cov(train.T, bias=True)
    shrunk = (108 * covariance + 5 * np.diag(np.diagonal(covariance))) / 113
    expected = -scipy.stats.multivariate_normal(train.mean(axis=0), shrunk).logpdf(test)
    np.testing.assert_allclose(values(tmp_path)["Gaussian"], expected, atol=1e-3)


def test_the_statistics_are_those_of_the_training_of_the_run(tmp_path, tables) -> None:
    """Fewer training rows would standardise otherwise: refused; without standardisation free."""
    for kind in ("coordinate", "none"):
        c = config(tables[0], data__standardize=kind)
        c.eval.update(enable_bpd=False, enable_sampling=False, baselines=False)
        run_lib.train(Experiment.from_config(c), tmp_path / kind)
        c.data.num_train = 50
        experiment = Experiment.from_config(c)
        if kind == "none":
            run_lib.evaluate(experiment, tmp_path / kind, "eval")
            continue
        with pytest.raises(ValueError, match=r"data\.num_train: 0 in .*, now 50"):
            run_lib.evaluate(experiment, tmp_path / kind, "eval")
    c.data.update(num_train=0, standardize="whiten")
    with pytest.raises(ValueError, match=r"data\.standardize: 'none' in .*, now 'whiten'"):
        run_lib.evaluate(Experiment.from_config(c), tmp_path / "none", "eval")


def test_cells_are_told_in_the_protocol(tmp_path: Path) -> None:
    """Integers with noise in their cells, several draws of it; a config.json is a config again."""
    rng = np.random.default_rng(0)
    np.savetxt(tmp_path / "t.csv", rng.integers(0, 9, (60, 2)), "%d", ",", header="k,m")
    c = config(tmp_path / "t.csv", data__standardize="coordinate", data__cell_width="1")
    c.eval.update(num_importance=2, bound=True, ode_start="data", enable_sampling=False)
    run = tmp_path / "run"
    evaluated(c, run)
    rows = list(Records(run / "eval").rows.values())
    protocols = {row["protocol"] for row in rows if row["estimator"] in ("ODE", "bound")}
    assert all("data real-valued, uniform noise in cells" in text for text in protocols)
    again = config_files.load(str(run / "config.json"))
    assert again.data.cell_width == (1.0,)
    run_lib.evaluate(Experiment.from_config(again), run, "eval")
    assert len(Records(run / "eval").rows) == len(rows)
    c.data.cell_width = ()
    with pytest.raises(ValueError, match=r"data\.cell_width: \[1\] in .*, now \[\]"):
        run_lib.evaluate(Experiment.from_config(c), run, "eval")


@pytest.mark.parametrize(
    ("shape", "head"), [((4,), "whitened"), ((5, 2), "mixture"), ((4, 4, 3), "whitened")]
)
def test_arrays_of_any_shape_train_and_evaluate(tmp_path, shape, head: str) -> None:
    x = 3.0 + np.random.default_rng(0).standard_normal((60, *shape))
    np.save(tmp_path / "x.npy", x)
    c = config(tmp_path / "x.npy", "npz", data__standardize="coordinate")
    c.model.update(parameterization=head, components=None if head == "whitened" else 2)
    experiment = evaluated(c, tmp_path / "run")
    found = values(tmp_path / "run")
    assert {len(v) for v in found.values()} == {6}
    assert all(np.isfinite(v).all() for v in found.values())
    assert samples(tmp_path / "run").shape == (9, *shape)
    assert experiment.shape == shape


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_figures_of_the_line_are_of_model_space(tmp_path: Path) -> None:
    """A column far from zero has a density that integrates to one over what is shown."""
    rng = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", 1e4 + 50.0 * rng.standard_normal(80))
    c = config(tmp_path / "x.npy", "npz", data__standardize="coordinate")
    c.eval.update(enable_bpd=False, enable_sampling=False, baselines=False)
    experiment = evaluated(c, tmp_path / "run")
    points = figures._encoded(experiment, np.float32([[1e4], [1e4 + 50.0]]))
    assert np.abs(points - [[0.0], [1.0]]).max() < 0.3
