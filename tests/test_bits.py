"""Where the bits of a bound are spent: parts sum to the value; the file depends on rows only."""

import base64
import copy
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from PIL import Image

import plotting
import run_lib
from records import GROUP, Records, Row, Table
from restarted import noise_to_signal
from run_lib import figures, report
from run_lib import page as page_of
from run_lib.estimators import BINS
from run_lib.experiment import Experiment
from tests import tiny

pytestmark = pytest.mark.usefixtures("compiled_at_o0")

KINDS = ("velocity", "cells", "atoms", "nats")


def config_of(kind: str) -> ConfigDict:
    """A tiny run of the digits with that parameterisation, or of 2-D points."""
    config = tiny.config("swissroll" if kind == "nats" else "digits")
    if kind != "nats":
        config.model.parameterization = kind
    config.data.uniform_dequantization = kind != "atoms"
    config.training.update(n_iters=10, eval_freq=10, snapshot_freq=5)
    config.eval.update(enable_bpd=False, enable_sampling=False, baselines=True, num_times=20)
    return config


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """(config, run folder with both checkpoints evaluated in `eval`, two repeats)."""
    config, workdir = config_of(request.param), tmp_path_factory.mktemp(request.param)
    run_lib.train(Experiment.from_config(config), workdir)
    config.eval.update(num_repeats=2, begin_ckpt=1, end_ckpt=2)
    run_lib.evaluate(Experiment.from_config(config), workdir, "eval")
    return config, workdir


def evaluate(config: ConfigDict, workdir: Path, eval_folder: str, **changes: object) -> Path:
    config = copy.deepcopy(config)
    config.eval.update(changes)
    run_lib.evaluate(Experiment.from_config(config), workdir, eval_folder)
    return workdir / eval_folder


def read(target: Path, step: int = 10) -> list[dict]:
    return json.loads((target / f"bits_{step}.json").read_text())


def bounds(target: Path) -> list[dict]:
    return [row for row in Records(target).rows.values() if "bins" in row]


def check_sums(target: Path, estimators: set[str]) -> None:
    rows = bounds(target)
    assert {row["estimator"] for row in rows} == estimators
    for row in rows:
        assert len(row["bins"]) == BINS
        terms = [row["prior"], row["decoder"], *row["bins"]]
        scale = np.abs(terms).max()  # float32 terms, which may cancel
        np.testing.assert_allclose(sum(terms), row["value"], atol=2e-6 * scale * len(terms))


def test_prior_decoder_and_bins_of_a_row_sum_to_its_value(run: tuple) -> None:
    config, workdir = run
    atoms = config.model.parameterization == "atoms"
    units = {row["unit"] for row in bounds(workdir / "eval")}
    assert units == {"nats" if config.data.dataset == "swissroll" else "bits/dim"}
    check_sums(workdir / "eval", {"discrete bound"} if atoms else {"bound"})


@pytest.mark.parametrize("run", ["cells"], indirect=True)
def test_so_they_do_without_the_decoder_and_under_truncated_noise(run: tuple) -> None:
    config, workdir = run
    changes = {"num_repeats": 1, "begin_ckpt": 2, "baselines": False}
    target = evaluate(config, workdir, "noised", offset=False, **changes)
    check_sums(target, {"bound at t_min"})
    assert [parts["histogram"] for parts in read(target)] == [None]
    evaluate(config, workdir, "tn", dequantization="uniform,tn", **changes)
    check_sums(workdir / "tn", {"bound"})
    protocols = [parts["protocol"] for parts in read(workdir / "tn")]
    assert len(protocols) == 2
    evaluate(config, workdir, "tn", **changes)  # the edges of the other are those of the file
    assert [parts["protocol"] for parts in read(workdir / "tn")] == protocols


def over_examples(rows: list[dict], values: list) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error by numpy, the two repeats of every example averaged first."""
    indices = np.asarray([row["index"] for row in rows])
    order = np.argsort(indices, kind="stable")
    assert (np.bincount(indices) == 2).all()
    means = np.asarray(values)[order].reshape(len(rows) // 2, 2, -1).mean(axis=1)
    return means.mean(axis=0), means.std(axis=0, ddof=1) / np.sqrt(len(means))


def assert_is(named: dict, expected: tuple[np.ndarray, np.ndarray]) -> None:
    for name, values in zip(("mean", "standard_error"), expected, strict=True):
        np.testing.assert_allclose(np.atleast_1d(named[name]), values, rtol=1e-9, atol=1e-12)


def test_means_errors_and_sums_are_those_of_the_rows(run: tuple) -> None:
    _, workdir = run
    for parts in read(workdir / "eval"):
        names = ("estimator", "protocol", "split", "step")
        rows = [r for r in bounds(workdir / "eval") if all(r[n] == parts[n] for n in names)]
        assert (parts["n"], parts["repeats"], parts["unit"]) == (24, 2, rows[0]["unit"])
        for name in ("decoder", "bins", "prior"):
            assert_is(parts[name], over_examples(rows, [row[name] for row in rows]))
        sums = [np.cumsum([row["decoder"], *row["bins"], row["prior"]]) for row in rows]
        assert_is(parts["cumulative"], over_examples(rows, sums))
        mean, error = over_examples(rows, [row["value"] for row in rows])
        scale = abs(parts["decoder"]["mean"]) + mean[0]
        np.testing.assert_allclose(parts["cumulative"]["mean"][-1], mean[0], atol=1e-5 * scale)
        np.testing.assert_allclose(
            parts["cumulative"]["standard_error"][-1], error[0], atol=1e-5 * scale
        )


def test_edges_go_from_the_noise_at_t_min_to_that_at_the_end(run: tuple) -> None:
    config, workdir = run
    sde = Experiment.from_config(config).settings.sde
    ends = 0.5 * np.log(noise_to_signal(sde, jnp.asarray([1e-5, 1.0])))
    for parts in read(workdir / "eval"):
        edges = parts["edges"]
        assert len(edges) == len(parts["bins"]["mean"]) + 1
        assert np.all(np.diff(edges) > 0)
        np.testing.assert_allclose([edges[0], edges[-1]], ends, atol=2e-3)


def test_the_histogram_is_that_of_its_rows(run: tuple) -> None:
    config, workdir = run
    rows = [r for t in Records(workdir / "eval").tables(estimator="histogram", step=10) for r in t]
    expected = over_examples(rows, [row["value"] for row in rows])[0] if rows else None
    assert (expected is None) == (config.data.dataset == "swissroll")
    for parts in read(workdir / "eval"):
        assert parts["histogram"] == (expected if expected is None else pytest.approx(expected[0]))


def test_an_interrupted_evaluation_gives_the_same_file(run: tuple) -> None:
    config, workdir = run
    path, rows = workdir / "eval" / "bits_10.json", workdir / "eval" / "rows.jsonl"
    before, lines = path.read_text(), rows.read_text().splitlines(keepends=True)
    path.unlink()
    rows.write_text("".join(lines[::-2]))  # half of the rows, in another order
    evaluate(config, workdir, "eval")
    assert len(rows.read_text().splitlines()) == len(lines)
    assert path.read_text() == before


def test_report_shows_the_figure_of_the_latest_step(run: tuple) -> None:
    _, workdir = run
    page = (workdir / "report.html").read_text()
    figures = {step: workdir / "eval" / f"bits_{step}.png" for step in (5, 10)}
    for path in figures.values():
        with Image.open(path) as image:
            assert image.format == "PNG"
    shown = {step: base64.b64encode(p.read_bytes()).decode() in page for step, p in figures.items()}
    assert shown == {5: False, 10: True}
    assert "<h3>Where the bits are spent</h3>" in page
    assert page_of.BITS in page


def test_without_a_bound_there_is_neither_file_nor_heading(tmp_path: Path) -> None:
    config = config_of("nats")
    run_lib.train(Experiment.from_config(config), tmp_path)
    (tmp_path / "eval").mkdir()
    for name in (f"bits_{config.training.n_iters}.json", f"bits_{config.training.n_iters}.png"):
        (tmp_path / "eval" / name).write_text("[]")  # of an earlier network
    target = evaluate(config, tmp_path, "eval", bound=False, enable_loss=True)
    assert Records(target).rows
    assert not list(target.glob("bits*"))
    assert "Where the bits are spent" not in (tmp_path / "report.html").read_text()


def row(index: int, repeat: int = 0, **fields: object) -> dict:
    """Of a bound of two bins that sums to 10 + index + repeat, or as the fields say."""
    value = 10.0 + index + repeat
    found = {
        "estimator": "bound", "protocol": "p", "step": 1, "split": "test", "unit": "bits/dim",
        "index": index, "repeat": repeat, "identity": "0a1b", "value": value, "decoder": 4.0,
        "prior": 1.0, "bins": [2.0, value - 7.0],
    }  # fmt: skip
    return found | fields


def test_a_bound_of_few_draws_for_its_tails_is_doubted() -> None:
    """With beta_max = 1e4 a stratum spans 20 units of log(σ/α); the integrand, one or two."""
    one = {"nfe": 1, "seconds": 0.0, "largest": 0.5}
    rows = [row(k, value=2.0 + 0.01 * k, **one) for k in range(40)]
    assert report.doubts(rows) == []
    (heavy,) = report.doubts([*rows[1:], row(40, value=62.0, **one | {"largest": 60.0})])
    assert "one draw makes 40.6% of the estimate, as much as 16 examples" in heavy
    (missed,) = report.doubts([row(k, value=-4.5 + 0.01 * k, **one) for k in range(40)])
    assert "-4.3050 bits/dim is below zero" in missed
    others = [{k: v for k, v in r.items() if k != "largest"} | {"value": -1.0} for r in rows]
    assert report.doubts(others) == []


EDGES = {("bound", "p"): [-1.0, 0.0, 2.0]}


def tables(rows: list[Row]) -> list[Table]:
    """The rows as an evaluation holds them."""
    found: dict[tuple, Table] = {}
    for one in rows:
        key = tuple(one[field] for field in GROUP)
        found.setdefault(key, Table(dict(zip(GROUP, key, strict=True)))).add(one)
    return list(found.values())


def test_rows_without_bins_or_with_others_do_not_count() -> None:
    old = {k: v for k, v in row(2).items() if k not in ("bins", "decoder", "prior")}
    rows = [row(0), row(0, 1), row(1), old, row(3, bins=[1.0, 1.0, 3.0])]
    (parts,) = figures.all_parts(tables(rows), EDGES)
    assert (parts["n"], parts["repeats"]) == (2, 1)
    assert parts["bins"]["mean"] == [2.0, 3.75]  # of 3.5 and 4
    assert parts["bins"]["standard_error"] == [0.0, 0.25]
    assert parts["cumulative"]["mean"] == [4.0, 6.0, 9.75, 10.75]
    assert parts["cumulative"]["standard_error"] == [0.0, 0.0, 0.25, 0.25]
    assert figures.all_parts(tables([old]), EDGES) == []
    assert figures.all_parts(tables(rows), {}) == []


def test_protocols_and_splits_do_not_mix_and_the_histogram_has_the_same_examples() -> None:
    rows = [row(0), row(1), row(0, protocol="q"), row(0, split="train")]
    rows += [row(i, estimator="histogram", value=float(i), bins=[]) for i in range(3)]
    edges = EDGES | {("bound", "q"): [0.0, 1.0, 2.0]}
    found = figures.all_parts(tables(rows), edges)
    assert [(p["protocol"], p["split"], p["n"], p["histogram"]) for p in found] == [
        ("p", "test", 2, 0.5), ("p", "train", 1, None), ("q", "test", 1, 0.0),
    ]  # fmt: skip
    assert [p["edges"][0] for p in found] == [-1.0, -1.0, 0.0]


def test_figure_draws_cost_per_unit_and_sum(tmp_path: Path, monkeypatch) -> None:
    """Bins over widths and the cumulative values, as they are on the axes."""
    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: kept.append(figure))
    (parts,) = figures.all_parts(tables([row(0), row(1)]), EDGES)
    plotting.save_bits(tmp_path / "b.png", [figures._drawn(parts)])
    monkeypatch.undo()
    left, right = kept[0].axes
    outline = next(p for p in left.patches if p.get_fill() is False)
    np.testing.assert_allclose(outline.get_data().values, [2.0, 3.5 / 2.0])
    np.testing.assert_array_equal(outline.get_data().edges, [-1.0, 0.0, 2.0])
    band = next(p for p in left.patches if p.get_label() == "± 1 standard error").get_data()
    np.testing.assert_allclose([band.baseline[1], band.values[1]], [1.5, 2.0])
    lines = {line.get_label(): np.asarray(line.get_ydata()) for line in right.lines}
    np.testing.assert_allclose(lines["integral 5.5000"], [4.0, 6.0, 9.5])
    np.testing.assert_allclose(lines["decoder 4.0000 ± 0.0000"], [0.0, 4.0])
    np.testing.assert_allclose(lines["prior 1.0000 ± 0.0000"], [9.5, 10.5])
    np.testing.assert_allclose(lines["total 10.5000 ± 0.5000"], 10.5)
    assert right.get_ylabel().startswith("bits/dim")
