"""Whole runs on tables and arrays of real values, at tiny size: figures in the user's units."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from ml_collections import ConfigDict

import npz_files
import run_lib
from records import Records
from run_lib import (
    calibration,
    config_files,
    estimators,
    figures,
    identities,
    measured,
    sampling_loop,
)
from run_lib.experiment import Experiment
from tests import tiny

pytestmark = pytest.mark.usefixtures("compiled_at_o0")


def config(path: Path, dataset: str = "table", **changes: str) -> ConfigDict:
    c = tiny.config(dataset)
    c.data.update(path=str(path), num_test=0, levels=256)
    c.training.update(n_iters=5)
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
        assert row["unit"] == ("" if row["estimator"] == "calibration by ODE" else "nats")
        found.setdefault(row["estimator"], {})[row["index"]] = row["value"]
    return {name: np.array([v for _, v in sorted(rows.items())]) for name, rows in found.items()}


def samples(workdir: Path) -> np.ndarray:
    shards = sampling_loop.read(workdir / "eval" / "samples_5", 9)
    return np.concatenate([arrays["samples"] for arrays in shards])


UNITS = np.array([100.0, 0.1])


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same table in two systems of units."""
    rng, where = np.random.default_rng(0), tmp_path_factory.mktemp("tables")
    x = rng.standard_normal((120, 1)) + 0.5 * rng.standard_normal((120, 2)) + [3.0, -1.0]
    for name, units in (("a", 1.0), ("b", UNITS)):
        np.savetxt(where / f"{name}.csv", units * x, "%.12g", ",", header="x,y", comments="")
    return where / "a.csv", where / "b.csv"


def test_other_units_change_figures_by_the_log_of_the_units(tmp_path, tables) -> None:
    """log p(Ax) = log p(x) − log|det A| of all estimators; samples and statistics are in units.

    The Gaussian is that of the data: shrunk towards the covariance of white data it stays itself.
    The place of an example among samples has no unit.
    """
    changes = {"eval__calibrate": "True", "eval__calibration_samples": "3"}
    for name, path in zip("ab", tables, strict=True):
        c = config(path, data__standardize="whiten", **changes)
        experiment = evaluated(c, tmp_path / name)
    a, b = (values(tmp_path / name) for name in "ab")
    places = [found.pop("calibration by ODE") for found in (a, b)]
    np.testing.assert_allclose(*places, atol=1e-6)
    assert calibration.read(tmp_path / "a" / "eval")[0]["n"] == 12
    assert "<h3>Calibration</h3>" in (tmp_path / "a" / "report.html").read_text()
    assert (tmp_path / "a" / "eval" / "calibration_1.png").exists()
    assert a.keys() == b.keys() == {"ODE", "bound", "Gaussian", "diagonal Gaussian"}
    for name in a:
        assert len(a[name]) == 12
        gap = b[name] - a[name]
        np.testing.assert_allclose(gap, np.log(UNITS).sum(), atol=2e-3, err_msg=name)
    train, test = (
        experiment.dataset.examples(split, np.arange(experiment.dataset.size(split)))
        for split in ("train", "test")
    )
    law = scipy.stats.multivariate_normal(train.mean(axis=0), np.cov(train.T, bias=True))
    np.testing.assert_allclose(b["Gaussian"], -law.logpdf(test), atol=1e-3)
    drawn = [samples(tmp_path / name) for name in "ab"]
    np.testing.assert_allclose(drawn[1], UNITS * drawn[0], rtol=1e-3)
    assert np.abs(drawn[0].mean(axis=0) - [3.0, -1.0]).max() < 3.0
    found = npz_files.read(tmp_path / "b" / "standardization.npz", ("mean", "matrix", "inverse"))
    np.testing.assert_allclose(found["mean"], UNITS * [3.0, -1.0], rtol=0.3)
    assert found["columns"].tolist() == ["x", "y"]
    assert (tmp_path / "b" / "density.png").exists()
    c.eval.update(dataset="train", num_examples=12, enable_sampling=False)
    run_lib.evaluate(Experiment.from_config(c), tmp_path / "b", "eval")
    pictures = sorted(path.name for path in (tmp_path / "b" / "eval").glob("calibration_*.png"))
    assert pictures == ["calibration_1.png", "calibration_2.png"]
    page = (tmp_path / "b" / "report.html").read_text()
    assert page.count("<figcaption>distribution functions of levels and ranks") == 2


def test_the_statistics_are_those_of_the_training_of_the_run(tmp_path, tables) -> None:
    """Fewer training rows would standardise otherwise, and are refused by name."""
    c = config(tables[0], data__standardize="coordinate")
    c.training.n_iters = 1
    c.eval.update(enable_bpd=False, bound=False, enable_sampling=False)
    run_lib.train(Experiment.from_config(c), tmp_path)
    c.data.num_train = 50
    with pytest.raises(ValueError, match=r"data\.num_train: 0 in .*, now 50"):
        run_lib.evaluate(Experiment.from_config(c), tmp_path, "eval")
    c.data.update(num_train=0, standardize="whiten")
    with pytest.raises(ValueError, match=r"data\.standardize: 'coordinate' in .*, now 'whiten'"):
        run_lib.evaluate(Experiment.from_config(c), tmp_path, "eval")


def test_cells_are_told_in_the_protocol(tmp_path: Path) -> None:
    """Multiples of 0.5 and integers; the config.json of the run is a config again.

    Cells of 0.5 × 1 have a probability of half the density.
    """
    rng, run = np.random.default_rng(0), tmp_path / "run"
    table = rng.integers(0, 9, (60, 2)) * [0.5, 1.0]
    np.savetxt(tmp_path / "t.csv", table, "%g", ",", header="k,m")
    c = config(tmp_path / "t.csv", data__standardize="coordinate", data__cell_width="0.5,1")
    c.eval.update(enable_bpd=False, enable_sampling=False)
    evaluated(c, run)
    rows = list(Records(run / "eval").rows.values())
    (protocol,) = {row["protocol"] for row in rows if row["estimator"] == "bound"}
    assert "data real-valued, uniform noise in cells" in protocol
    mean = np.mean([row["value"] for row in rows if row["estimator"] == "bound"])
    said = f"the probability of the cells is at most {mean + np.log(2.0):.4f} ±"
    assert said in (run / "report.html").read_text()
    again = config_files.load(str(run / "config.json"))
    assert again.data.cell_width == (0.5, 1.0)
    run_lib.evaluate(Experiment.from_config(again), run, "eval")
    assert len(Records(run / "eval").rows) == len(rows)
    experiment = Experiment.from_config(c)
    assert experiment.encoding.is_noisy
    c.eval.update(enable_bpd=True, num_importance=2)
    table = estimators.estimators(Experiment.from_config(c))  # there is noise to draw
    assert "draws 2" in table[0].protocol
    c.data.cell_width = ()
    with pytest.raises(ValueError, match=r"data\.cell_width: \[0\.5, 1\] in .*, now \[\]"):
        run_lib.evaluate(Experiment.from_config(c), run, "eval")


def test_columns_with_ends(tmp_path: Path, tables) -> None:
    """Logits are standardised; the ends are part of the identity, not how they are written."""
    c = config(tables[0], data__standardize="coordinate", data__lower="-8", data__upper="19,None")
    c.training.n_iters = 1
    c.eval.update(enable_sampling=False, baselines=True)
    experiment, run = evaluated(c, tmp_path / "run"), tmp_path / "run"
    v = np.concatenate([v for v, _ in experiment.encoded_pairs()])
    np.testing.assert_allclose(v.mean(axis=0), 0.0, atol=1e-4)
    np.testing.assert_allclose(v.std(axis=0), 1.0, atol=1e-4)
    x = np.concatenate(list(experiment.training_examples()))
    for column, logit in ((0, np.log(x + 8.0) - np.log(19.0 - x)), (1, np.log(x + 8.0))):
        expected = logit[:, column]
        expected = (expected - expected.mean()) / expected.std()
        np.testing.assert_allclose(v[:, column], expected, atol=1e-3)
    found = npz_files.read(run / "standardization.npz", ("lower", "upper"))
    np.testing.assert_array_equal(found["lower"], [-8.0, -8.0])
    np.testing.assert_array_equal(found["upper"], [19.0, np.inf])
    rows = Records(run / "eval").rows.values()
    assert all("within ends" in r["protocol"] for r in rows if r["estimator"] in ("ODE", "bound"))

    def digest(lower: tuple, upper: tuple) -> str:
        c.data.update(lower=lower, upper=upper)
        return identities.settings_digest(Experiment.from_config(c))

    assert digest((-8.0, -8.0), (19.0, None)) == identities.settings_digest(experiment)
    assert digest((-8.0,), (19.5, None)) != identities.settings_digest(experiment)
    assert digest((None,), (None, None)) == digest((), ())
    c.data.update(lower=(-9.0,), upper=())
    with pytest.raises(ValueError, match=r"data\.lower: \[-8\] in .*, now \[-9"):
        run_lib.evaluate(Experiment.from_config(c), run, "eval")
    older = json.loads((run / "config.json").read_text())  # of a version without these fields
    del older["data"]["lower"], older["data"]["upper"]
    (run / "config.json").write_text(json.dumps(older))
    with pytest.raises(ValueError, match=r"data\.lower: \[\] in .*, now \[-9"):
        run_lib.evaluate(Experiment.from_config(c), run, "eval")
    c.sampling.task = "denoise"
    with pytest.raises(ValueError, match=r"data\.lower=.*no measurement is linear"):
        measured.measured(Experiment.from_config(c))


@pytest.mark.parametrize(("shape", "head"), [((5, 2), "mixture"), ((4, 4, 3), "whitened")])
def test_arrays_of_any_shape_train_and_evaluate(tmp_path, shape, head: str) -> None:
    np.save(tmp_path / "x.npy", 3.0 + np.random.default_rng(0).standard_normal((60, *shape)))
    c = config(tmp_path / "x.npy", "npz", data__standardize="coordinate")
    c.model.update(parameterization=head, components=None if head == "whitened" else 2)
    c.eval.update(enable_bpd=False, baselines=False, enable_sampling=head == "whitened")
    experiment = evaluated(c, tmp_path / "run")
    found = values(tmp_path / "run")
    assert {len(v) for v in found.values()} == {6}
    assert all(np.isfinite(v).all() for v in found.values())
    assert experiment.shape == shape
    if head == "whitened":
        assert samples(tmp_path / "run").shape == (9, *shape)


def test_figures_of_the_line_are_of_model_space(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", 1e4 + 50.0 * rng.standard_normal(80))
    c = config(tmp_path / "x.npy", "npz", data__standardize="coordinate")
    points = figures._encoded(Experiment.from_config(c), np.float32([[1e4], [1e4 + 50.0]]))
    assert np.abs(points - [[0.0], [1.0]]).max() < 0.3
