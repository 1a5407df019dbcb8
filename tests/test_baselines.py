"""Trivial models against closed forms; their rows in an evaluation; what the report says."""

import itertools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import baselines
import marginals
import run_lib
from dequantization import Pixels
from experiments import compare
from operators import fold_in_each
from records import Records
from run_lib import baseline_estimators as wiring
from run_lib import report
from run_lib.estimators import draw_keys
from run_lib.experiment import Experiment
from run_lib.training_data import BATCH
from streams import Finite
from tests import tiny

CODES = [
    Pixels(17), Pixels(256, centered=False), Pixels(5, centered=False, logit=True), Pixels(2),
]  # fmt: skip


def pixels(rng: np.random.Generator, n: int, levels: int) -> np.ndarray:
    """Images [n, 2, 3, 1] whose pixels are correlated and differ; the last is constant."""
    latent = rng.standard_normal((n, 6)) @ rng.standard_normal((6, 6)) + np.arange(6)
    k = np.clip(np.round(levels / 2 + levels / 12 * latent), 0, levels - 1).astype(np.uint8)
    k[:, 5] = 1
    return k.reshape(n, 2, 3, 1)


def fit(code: Pixels, k: np.ndarray, *, full: bool = True) -> baselines.Gaussian:
    means, variances = code.moments_of_cells()
    noise = marginals.moments([variances[k]], full=False).mean
    return baselines.fit_pixels(marginals.moments([means[k]], full=full), noise, k.shape[1:])


def table(experiment: Experiment) -> dict[str, wiring.Estimator]:
    return {e.name: e for e in wiring.baseline_estimators(experiment)}


def config(dataset: str = "digits", **changes: object):
    c = tiny.config(dataset)
    c.eval.update(baselines=True, enable_sampling=False)
    c.eval.update(changes)
    return c


def values(experiment: Experiment, estimator: wiring.Estimator) -> np.ndarray:
    """Of all test examples."""
    dataset = experiment.dataset
    ids = np.arange(dataset.size("test"))
    batch = {"image": jnp.asarray(dataset.examples("test", ids)), "noise_id": jnp.asarray(ids)}
    key = experiment.keys["eval"]
    fitted = jax.tree.map(jnp.asarray, estimator.fit())
    return np.asarray(estimator.function(fitted, key, batch)["value"])


# Closed forms


@pytest.mark.usefixtures("x64")
def test_histogram_and_uniform_of_the_digits_are_their_definitions():
    c = config()
    c.data.num_test = 0
    experiment = Experiment.from_config(c)
    found, data = table(experiment), experiment.dataset
    train, test = (data.examples(s, np.arange(data.size(s))) for s in ("train", "test"))
    number = np.stack([(train == k).sum(axis=0) for k in range(17)], axis=-1)  # [8, 8, 1, 17]
    pooled = (number.sum(axis=(0, 1, 2)) + 1.0) / (train.size + 17)
    pi = (number + 5.0 * pooled) / (len(train) + 5.0)
    chosen = np.take_along_axis(pi[None], test[..., None].astype(int), axis=-1)
    expected = -np.log2(chosen).mean(axis=(1, 2, 3, 4))
    got = values(experiment, found["histogram"])
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    assert round(got.mean(), 4) == 2.4041
    np.testing.assert_allclose(values(experiment, found["uniform"]), math.log2(17), rtol=1e-14)
    assert found["histogram"].details == {
        "of": "every position", "smoothing": 5.0, "fitted on": 1438,
    }  # fmt: skip


@pytest.mark.usefixtures("x64")
def test_large_images_have_one_histogram_per_channel(monkeypatch):
    k = np.random.default_rng(0).integers(0, 4, (7, 3, 2, 3)).astype(np.uint8)
    k[..., 2] //= 2
    shape, whole = k.shape[1:], baselines.histograms_of(k.shape[1:], 4)
    np.testing.assert_array_equal(whole.ravel(), np.arange(18))
    monkeypatch.setattr(marginals, "MAX_ENTRIES", 18 * 4 - 1)
    channels = baselines.histograms_of(shape, 4)
    np.testing.assert_array_equal(channels, np.broadcast_to([0, 1, 2], shape))
    np.testing.assert_array_equal(baselines.histograms_of((9,), 256), np.zeros(9))
    log_pi = baselines.fit_histogram([k[:3], k[3:]], shape, 4)
    assert log_pi.shape == (3, 4)
    by_position = marginals.counts([k], 4)
    np.testing.assert_array_equal(log_pi, marginals.log_histogram(marginals.pooled(by_position)))
    got = baselines.log_histogram(jnp.asarray(log_pi), channels, jnp.asarray(k))
    expected = sum(log_pi[j, k[..., j]].sum(axis=(1, 2)) for j in range(3))
    np.testing.assert_allclose(got, expected, rtol=1e-13)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("code", CODES, ids=str)
def test_moments_of_cells_are_those_of_noise_in_each(code):
    means, variances = code.moments_of_cells()
    u = (np.arange(200_000) + 0.5) / 200_000  # midpoint rule: error below 1e-9
    y = np.asarray(code.from_unit(jnp.asarray((np.arange(code.levels)[:, None] + u) / code.levels)))
    np.testing.assert_allclose(means, y.mean(axis=1), rtol=0, atol=1e-8)
    np.testing.assert_allclose(variances, y.var(axis=1), rtol=1e-6)
    if not code.logit:
        np.testing.assert_allclose(variances, (2 * code.half_cell) ** 2 / 12, rtol=1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("code", CODES, ids=str)
def test_gaussian_of_integers_is_that_of_dequantised_samples(code, full, monkeypatch):
    """Mean and covariance, to four standard errors, with the shrinkage switched off."""
    monkeypatch.setattr(marginals, "SMOOTHING", 0.0)
    k = pixels(np.random.default_rng(0), 50, code.levels)
    many = np.repeat(k, 2000, axis=0)
    draws = code.draw(jnp.asarray(many), jax.random.split(jax.random.key(0), len(many))).x
    y = np.asarray(draws).reshape(len(many), -1)
    found = fit(code, k, full=full)
    bound = 4.0 * y.std(axis=0) / math.sqrt(len(y))
    assert np.all(np.abs(found.mean.ravel() - y.mean(axis=0)) < bound)
    gap = y - y.mean(axis=0)
    if full:
        root = np.linalg.inv(found.whitening.reshape(6, 6))
        products = gap[:, :, None] * gap[:, None, :]
        assert np.all(
            np.abs(root @ root.T - products.mean(0)) < 4 * products.std(0) / len(y) ** 0.5
        )
    else:
        squares = np.square(gap)
        error = np.abs(found.whitening.ravel() ** -2.0 - squares.mean(0))
        assert np.all(error < 4 * squares.std(0) / len(y) ** 0.5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("full", [True, False])
def test_value_of_dequantised_data_is_the_density_of_scipy(full):
    code, shape = Pixels(17), (2, 3, 1)
    k = pixels(np.random.default_rng(0), 40, 17)
    h, flat = 2.0 / 17.0, k.reshape(40, 6).astype(float)
    covariance = np.cov(flat.T, bias=True) * h**2
    covariance = covariance if full else np.diag(np.diag(covariance))
    pooled = np.trace(covariance) / 6.0 * np.eye(6)
    law = scipy.stats.multivariate_normal(
        (flat.mean(axis=0) + 0.5) * h - 1.0,
        (40.0 * covariance + 5.0 * pooled) / 45.0 + h**2 / 12.0 * np.eye(6),
    )
    draw = code.draw_of_noise(jnp.asarray(k), jax.random.uniform(jax.random.key(1), k.shape))
    got = baselines.log_gaussian(fit(code, k, full=full), draw.x)
    expected = law.logpdf(np.asarray(draw.x).reshape(40, 6))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-10)
    bits = code.negative_log_likelihood(got - draw.log_q, draw.x)
    np.testing.assert_allclose(bits, math.log2(17) - 1 - expected / (6 * math.log(2)), rtol=1e-12)
    assert fit(code, k, full=full).mean.shape == shape


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("full", [True, False])
def test_gaussian_of_real_values_scales_with_them(full):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((30, 3)) @ rng.standard_normal((3, 3)) + [0.0, 1.0, -2.0]
    units = np.asarray([1.0, 1e-3, 1e3])
    found = [
        baselines.log_gaussian(
            baselines.fit_reals(marginals.moments([data], full=full), (3,)), jnp.asarray(data)
        )
        for data in (x, x * units)
    ]
    np.testing.assert_allclose(found[0] - math.log(units.prod()), found[1], rtol=0, atol=1e-5)
    covariance = np.cov(x.T, bias=True)
    diagonal = np.diag(np.diag(covariance))
    expected = (30 * covariance + 5 * diagonal) / 35 if full else diagonal
    law = scipy.stats.multivariate_normal(x.mean(axis=0), expected)
    np.testing.assert_allclose(found[0], law.logpdf(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("code", CODES, ids=str)
def test_no_covariance_is_singular_and_float32_will_do(code):
    """Fewer images than pixels, constant ones, all pixels constant, one image."""
    for k in (
        pixels(np.random.default_rng(0), 3, code.levels),
        np.ones((4, 2, 3, 1), np.uint8),
        np.ones((1, 2, 3, 1), np.uint8),
    ):
        for full in (True, False):
            draw = code.draw(jnp.asarray(k), jax.random.split(jax.random.key(0), len(k)))
            fitted = fit(code, k, full=full)
            got = baselines.log_gaussian(jax.tree.map(jnp.asarray, fitted), draw.x)
            assert got.dtype == jnp.float32
            with jax.enable_x64(True):
                expected = baselines.log_gaussian(fitted, jnp.asarray(draw.x, jnp.float64))
            assert np.all(np.isfinite(expected))
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-3)
    for x in (np.zeros((5, 2)), np.full((1, 2), 3.0), np.outer(np.arange(3.0), [1.0, 2.0])):
        fitted = baselines.fit_reals(marginals.moments([x], full=True), (2,))
        assert np.all(np.isfinite(baselines.log_gaussian(fitted, jnp.float32(x))))


# Evaluations


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("trained")
    run_lib.train(Experiment.from_config(config()), workdir)
    return workdir


def test_rows_stand_beside_the_model_and_are_not_computed_twice(trained, monkeypatch):
    experiment = Experiment.from_config(config(num_repeats=2, begin_ckpt=1, end_ckpt=2))
    reads, ordered = [], Finite.ordered_batches

    def counted(self, **options):
        for batch in ordered(self, **options):
            reads.append(self.size)
            yield batch

    monkeypatch.setattr(Finite, "ordered_batches", counted)
    run_lib.evaluate(experiment, trained, "a")
    passes = math.ceil(1438 / BATCH)
    assert reads.count(1438) == 2 * passes  # histogram, Gaussian; once for both checkpoints
    rows = Records(trained / "a").rows
    names = ["ODE", "bound", "uniform", "histogram", "Gaussian"]
    found = json.loads((trained / "a" / "summary.json").read_text())
    assert [(r["step"], r["estimator"]) for r in found] == [(s, n) for s in (10, 20) for n in names]
    assert all((r["n"], r["repeats"], r["unit"]) == (24, 2, "bits/dim") for r in found)
    assert all(r["max_nfe"] == 0 for r in found if r["estimator"] in names[2:])
    assert found[4]["details"] == {
        "covariance": "full", "shrinkage": "5 examples of the pooled variance",
        "fitted on": 1438, "dequantisation": "uniform",
    }  # fmt: skip
    by_key = {
        (r["estimator"], r["step"], r["repeat"], r["index"]): r["value"] for r in rows.values()
    }
    data = experiment.dataset
    k, train = data.examples("test", np.arange(24)), data.examples("train", np.arange(1438))
    fitted = fit(Pixels(17), train)
    plain = values(experiment, table(experiment)["histogram"])
    for step, repeat in itertools.product((10, 20), (0, 1)):
        key = jax.random.fold_in(experiment.keys["eval"], repeat)
        draw = Pixels(17).draw(jnp.asarray(k), draw_keys(fold_in_each(key, jnp.arange(24)), 0))
        log_weight = baselines.log_gaussian(fitted, draw.x) - draw.log_q
        bits = {
            "uniform": np.full(24, math.log2(17)), "histogram": plain,
            "Gaussian": -log_weight / (64 * math.log(2)),
        }  # fmt: skip
        for name, expected in bits.items():
            got = [by_key[name, step, repeat, index] for index in range(24)]
            np.testing.assert_allclose(got, expected, rtol=1e-5, err_msg=name)
    reads.clear()
    run_lib.evaluate(experiment, trained, "a")
    assert reads.count(1438) == 0
    path = trained / "a" / "rows.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(x for x in lines if '"histogram"' not in x or '"index":3,' not in x))
    run_lib.evaluate(experiment, trained, "a")
    assert reads.count(1438) == passes
    assert Records(trained / "a").rows.keys() == rows.keys()
    again = Records(trained / "a").rows
    assert {k: r["value"] for k, r in again.items()} == {k: r["value"] for k, r in rows.items()}


def test_a_bad_model_is_told_so_everywhere(trained, caplog):
    caplog.set_level("WARNING", logger="fokker")
    run_lib.evaluate(Experiment.from_config(config(bound=False)), trained, "b")
    ode, uniform, *_ = json.loads((trained / "b" / "summary.json").read_text())
    names = [defeat["baseline"] for defeat in ode["worse_than"]]
    assert names == ["uniform", "histogram", "Gaussian"]
    assert uniform["worse_than"] == []
    said = [defeat["sentence"] for defeat in ode["worse_than"]]
    assert said[1].startswith(
        f"The ODE likelihood of the model, {ode['mean']:.4f} bits/dim, is worse than"
    )
    assert "single pixels, 2." in said[1]
    assert ": a model that sees one pixel at a time. Difference " in said[1]
    markdown = (trained / "b" / "table.md").read_text().split("\n\n")
    assert [paragraph.strip() for paragraph in markdown[1:]] == said
    page = (trained / "report.html").read_text()
    assert all(f"<p class='said'>{sentence}</p>" in page for sentence in said)
    assert [record.message for record in caplog.records if "worse than" in record.message] == said


def test_no_baseline_without_a_likelihood_or_where_it_is_not_asked_for(trained):
    assert not table(
        Experiment.from_config(config(enable_bpd=False, bound=False, enable_loss=True))
    )
    assert not table(Experiment.from_config(config(baselines=False)))
    assert table(Experiment.from_config(config(enable_bpd=False)))
    run_lib.evaluate(Experiment.from_config(config(baselines=False, bound=False)), trained, "c")
    assert {row["estimator"] for row in Records(trained / "c").rows.values()} == {"ODE"}


def test_logit_data_have_a_gaussian_too():
    c = config()
    c.data.update(centered=False, logit=True, num_test=200)  # all 359: 2.4304 ± 0.0100 bits/dim
    experiment = Experiment.from_config(c)
    train = experiment.dataset.examples("train", np.arange(1438))
    expected = fit(Pixels(17, centered=False, logit=True), train)
    got = table(experiment)["Gaussian"].fit()
    np.testing.assert_allclose(got.mean, expected.mean, rtol=1e-10)
    np.testing.assert_allclose(got.whitening, expected.whitening, rtol=0, atol=1e-8)
    bits = values(experiment, table(experiment)["Gaussian"])
    assert abs(bits.mean() - 2.43) < 4 * bits.std() / math.sqrt(len(bits))


@pytest.mark.parametrize("num_train", [0, 50])
def test_real_values_have_two_gaussians_of_finite_or_endless_data(num_train):
    c = config("gaussian")  # N(0, [[1, 0.6], [0.6, 1]])
    c.data.update(num_train=num_train, num_test=2000)
    experiment = Experiment.from_config(c)
    found = table(experiment)
    assert list(found) == ["diagonal Gaussian", "Gaussian"]
    assert {e.unit for e in found.values()} == {"nats"}
    assert found["Gaussian"].details["fitted on"] == (num_train or 20_000)
    diagonal, full = (values(experiment, found[n]) for n in ("diagonal Gaussian", "Gaussian"))
    entropy = 1.0 + math.log(2 * math.pi) + 0.5 * math.log(1 - 0.6**2)
    excess = 1.5 / (num_train or 20_000)  # n (d + d(d + 1)/2)/2 parameters
    assert abs(full.mean() - entropy) < 4 * full.std() / math.sqrt(2000) + 4 * excess
    gain, expected = diagonal - full, -0.5 * math.log(1 - 0.6**2)
    assert abs(gain.mean() - expected) < 4 * gain.std() / math.sqrt(2000) + 4 * excess
    examples = [np.concatenate(list(experiment.training_examples())) for _ in range(2)]
    np.testing.assert_array_equal(*examples)
    assert len(examples[0]) == (num_train or 20_000)
    assert len(np.unique(examples[0], axis=0)) == len(examples[0])


# Sentences


def row(estimator: str, index: int, value: float, **changes: object) -> dict:
    return {
        "estimator": estimator, "protocol": "p", "step": 1, "split": "test", "index": index,
        "repeat": 0, "identity": "0a1b", "value": value, "unit": "bits/dim", "nfe": 1,
        "seconds": 0.0,
    } | changes  # fmt: skip


def said(folder: Path, *rows: dict) -> list[str]:
    Records(folder).append(rows)
    return report.sentences(report.summaries(folder))


def test_the_difference_is_paired_and_must_be_two_standard_errors(tmp_path):
    """Values that vary by far more between examples than model and baseline differ."""
    spread = np.asarray([0.0, 3.0, 7.0, 20.0])
    histogram = [row("histogram", i, v) for i, v in enumerate(spread)]
    for name, gaps, worse in (
        ("worse", [0.1, 0.2, 0.1, 0.2], True),
        ("better", [-0.1, -0.2, -0.1, -0.2], False),
        ("within the error", [0.9, -0.5, -0.4, 0.3], False),
        ("equal", [0.0] * 4, False),
    ):
        model = [row("ODE", i, v) for i, v in enumerate(spread + gaps)]
        found = said(tmp_path / name, *model, *histogram)
        assert bool(found) == worse, name
    (sentence,) = said(tmp_path / "worse")
    assert sentence == (
        "The ODE likelihood of the model, 7.6500 bits/dim, is worse than the independent histogram "
        "of single pixels, 7.5000 bits/dim: a model that sees one pixel at a time. Difference "
        "0.1500 ± 0.0289 bits/dim, paired, 4 test examples, step 1 (p)."
    )


def test_only_likelihoods_of_the_same_split_step_and_unit_are_compared(tmp_path):
    bad = [(i, 10.0 + 0.1 * i) for i in range(3)]
    baseline = [row("Gaussian", i, 1.0) for i, _ in bad]
    for name, changes in (
        ("step", {"step": 2}), ("split", {"split": "train"}), ("unit", {"unit": "nats"}),
        ("loss", {"estimator": "loss"}), ("noised", {"estimator": "bound at t_min"}),
        ("divergence", {"estimator": "KL(data ‖ ODE)"}), ("other", {"index": 7}),
    ):  # fmt: skip
        model = [row("ODE", i, v) | changes for i, v in bad]
        assert said(tmp_path / name, *model, *baseline) == [], name
    for estimator in ("ODE", "bound", "-ELBO"):
        model = [row(estimator, i, v) for i, v in bad]
        assert len(said(tmp_path / estimator, *model, *baseline)) == 1
    assert said(tmp_path / "alone", row("ODE", 0, 9.0), row("Gaussian", 0, 1.0)) == []


def test_a_comparison_of_configs_lists_baselines_and_does_not_draw_them(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(compare.plotting, "save_comparison", lambda _, panels: drawn.append(panels))
    found = {"ODE": {1: 2.0, 2: 2.5}, "Gaussian": {1: 3.0, 2: 3.0}}
    text = compare.write({"one": found, "other": found}, tmp_path)
    assert [line.split()[0] for line in text.splitlines()[1:]] == ["ODE"] * 2 + ["Gaussian"] * 2
    assert [list(panels) for panels in drawn] == [["ODE"]]


def test_repeats_count_once_and_baselines_come_last(tmp_path):
    model = [row("bound", i, 2.0 + i + k, repeat=k) for i in range(3) for k in (0, 1)]
    others = [row(n, i, 1.0 + i) for n in ("Gaussian", "histogram", "uniform") for i in range(3)]
    loss = [row("loss", i, 0.5) for i in range(3)]
    found = said(tmp_path, *others, *model, *loss)
    names = [result.estimator for result in report.summaries(tmp_path)]
    assert names == ["bound", "loss", "uniform", "histogram", "Gaussian"]
    assert len(found) == 3
    assert all("Difference 1.5000 ± 0.0000 bits/dim, paired, 3 test" in line for line in found)
