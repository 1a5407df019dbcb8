"""--mode=diagnose, toy figures and ELBO of whole runs; the comparison of runs over seeds."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

import run_lib
from experiments import compare, report
from records import Records, example_means
from run_lib import metrics
from run_lib.diagnosis_loop import ratio_of_means, totals
from run_lib.experiment import Experiment
from tests import tiny

pytestmark = pytest.mark.usefixtures("compiled_at_o0")


def small(dataset: str) -> ConfigDict:
    config = tiny.config(dataset)
    config.training.update(n_iters=5, eval_freq=5, snapshot_freq=5)
    config.eval.update(curve_times=3, curve_examples=10, trajectory_lmbds=(0.0, 1.0))
    config.eval.update(divergence="exact", bound=False)
    return config


def run(config: ConfigDict, workdir: Path, *modes: str) -> None:
    experiment = Experiment.from_config(config)
    for mode in modes:
        if mode == "train":
            run_lib.train(experiment, workdir)
        if mode == "eval":
            run_lib.evaluate(experiment, workdir, "eval")
        if mode == "diagnose":
            run_lib.diagnose(experiment, workdir, "eval")


def rows_of(workdir: Path) -> tuple[dict, dict]:
    rows = [json.loads(line) for line in (workdir / "eval/diagnosis_5.jsonl").open()]
    curves = {(r["curve"], round(r["t"], 6)): r for r in rows if "curve" in r}
    return curves, {r["total"]: r for r in rows if "total" in r}


TRUTH = {"fisher", "fisher_ode", "self", "kl_rate", "jacobian"}
ALWAYS = {"dsm", "frobenius", "trace", "third", "r_fp", "asymmetry"}


def test_diagnosis_of_a_mixture_on_a_line(tmp_path: Path, optimised: None) -> None:
    check_diagnosis_with_known_law(tmp_path, "mog1d")


def test_diagnosis_of_a_checkerboard(tmp_path: Path) -> None:
    check_diagnosis_with_known_law(tmp_path, "checkerboard")


def check_diagnosis_with_known_law(tmp_path: Path, dataset: str) -> None:
    """All curves, totals and figures; the divergence of the rows is that of the definition."""
    config = small(dataset)
    run(config, tmp_path, "train", "eval", "diagnose")
    curves, found_totals = rows_of(tmp_path)
    assert {name for name, _ in curves} == ALWAYS | TRUTH
    assert len(curves) == 3 * len(ALWAYS | TRUTH)
    for row in (*curves.values(), *found_totals.values()):
        assert np.isfinite(row["mean"])
        assert row["standard_error"] >= 0
        assert (row["n"], row["step"], row["split"]) == (10, 5, "test")
    assert curves["fisher", min(t for _, t in curves)]["mean"] > 0
    bound = found_totals["−ELBO of λ = 0"]["mean"]
    entropy = found_totals["entropy of q at t_min"]["mean"]
    assert bound > entropy  # an untrained network
    if dataset == "checkerboard":  # blurred by σ(t_min) = 0.01
        assert math.log(32.0) < entropy + 0.1 < math.log(32.0) + 0.3
    names = ["diagnosis.png", "density.png", "trajectories.png", "samples.png", "report.html"]
    for name in names + ["score.png"] * (dataset == "mog1d"):
        assert (tmp_path / name).stat().st_size > 1000, name
    text = (tmp_path / "eval/diagnosis_5.txt").read_text()
    assert "KL(q ‖ ODE) at t_min, from scores" in text
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png") >= 4
    averages = compare.diagnosed(tmp_path / "eval/diagnosis_5.jsonl")
    assert averages["−ELBO of λ = 0"] == bound
    points = [(row["weight"], row["mean"]) for (name, t), row in curves.items() if name == "r_fp"]
    average = compare.time_average(points)
    np.testing.assert_allclose(averages["mean over t of r_fp"], average, rtol=1e-4)
    # The divergence is the paired difference of densities: NLL minus entropy, on the same points.
    found = (tmp_path / "eval/rows.jsonl").read_text().splitlines()
    values = {}
    for row in map(json.loads, found):
        values.setdefault(row["estimator"], {})[row["index"]] = row["value"]
    kl, nll = values["KL(data ‖ ODE)"], values["ODE"]
    if dataset == "checkerboard":
        for index, value in kl.items():
            assert abs(value - (nll[index] - math.log(32.0))) < 1e-4


def test_diagnosis_of_images_needs_no_law(tmp_path: Path) -> None:
    config = small("digits")
    config.eval.divergence = "rademacher"
    run(config, tmp_path, "train", "diagnose")
    curves, found_totals = rows_of(tmp_path)
    assert {name for name, _ in curves} == ALWAYS
    assert not found_totals
    assert (tmp_path / "diagnosis.png").exists()


@pytest.mark.parametrize("estimator", ["published", "low_variance"])
def test_elbo_of_a_drift_network(tmp_path: Path, estimator: str) -> None:
    config = small("swissroll")
    config.model.update(parameterization="drift", time_label="unit_time")
    config.training.update(likelihood_weighting=False, importance_weighting=False)
    config.training.update(objective="ism", debias=True)
    config.eval.update(elbo=True, elbo_estimator=estimator, enable_bpd=False, num_times=4)
    config.eval.enable_sampling = False
    run(config, tmp_path, "train", "eval")
    rows = [json.loads(line) for line in (tmp_path / "eval/rows.jsonl").open()]
    assert {row["estimator"] for row in rows} == {"-ELBO"}
    assert len(rows) == 24
    assert rows[0]["protocol"].startswith(f"estimator {estimator}, ")


def test_elbo_of_a_network_that_divides_by_sigma_is_refused(tmp_path: Path) -> None:
    config = small("swissroll")
    config.eval.elbo = True
    message = r"eval\.elbo=True with model\.parameterization='velocity'"
    with pytest.raises(ValueError, match=message):
        run(config, tmp_path, "train")
    config.eval.elbo = False
    run(config, tmp_path, "train")
    config.eval.elbo = True
    with pytest.raises(ValueError, match=message):
        run(config, tmp_path, "eval")


def test_training_with_the_regulariser_reports_it(tmp_path: Path) -> None:
    config = small("moons")
    config.training.update(alpha=0.1, fp_wgt_type="dimensionless", fp_every=2, fp_fraction=0.5)
    config.training.update(score_matching_order=2, high_order_fraction=0.25)
    run(config, tmp_path, "train")
    row = next(metrics.read_metrics(tmp_path))
    assert min(row[name] for name in ("dsm", "frobenius", "trace", "fp")) > 0


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("alpha", -1.0, "training.alpha=-1.0"), ("m", -2.0, "training.m=-2.0"),
        ("fp_wgt_type", "snr", "training.fp_wgt_type='snr'"),
        ("objective", "elbo", "training.objective='elbo'"),
        ("high_order_fraction", 0.3, "training.high_order_fraction=0.3"),
        ("scalar_fp", "yes", "training.scalar_fp='yes'"),
    ],
)  # fmt: skip
def test_wrong_fields_are_refused_before_training(
    tmp_path: Path, field: str, value: object, message: str
) -> None:
    config = small("moons")
    config.training.score_matching_order = 2
    config.training[field] = value
    with pytest.raises(ValueError, match=message):
        run(config, tmp_path, "train")
    assert not (tmp_path / "checkpoints").exists()


CONFIG = """
from tests.test_diagnosis import small


def get_config():
    config = small("moons")
    config.training.derivative_estimator = "exact"
    config.eval.enable_sampling = False
    return config
"""


def test_comparison_over_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small.py").write_text(CONFIG)
    file, out = str(tmp_path / "small.py"), tmp_path / "out"
    first_name, second_name = (f"score_matching_order={order}" for order in (1, 2))
    arguments = ["compare", file, f"--workdir={out}", "--seeds=2", "--modes=train,eval"]
    arguments += ["--vary", "training.score_matching_order=1,2"]
    monkeypatch.setattr("sys.argv", [*arguments, "--set", "data.num_test=12"])
    compare.main()
    first = (out / "compare.txt").read_text()
    log = (out / first_name / "seed_1/log.txt").read_text()
    compare.main()  # nothing is left to do
    assert (out / "compare.txt").read_text() == first
    assert "step 5/5" not in (out / first_name / "seed_1/log.txt").read_text()[len(log) :]
    rows = [json.loads(line) for line in (out / "compare.jsonl").open()]
    nll = {(r["config"], r["seed"]): r["value"] for r in rows if r["quantity"] == "ODE"}
    assert nll.keys() == {(name, seed) for name in (first_name, second_name) for seed in (1, 2)}
    assert len(set(nll.values())) == 4
    line = next(x for x in first.splitlines() if x.startswith("ODE ") and f" {second_name} " in x)
    gaps = np.asarray([nll[second_name, s] - nll[first_name, s] for s in (1, 2)])
    expected = f"{gaps.mean():.4f} ± {gaps.std(ddof=1) / math.sqrt(2):.4f}"
    assert line.endswith(expected)
    assert (out / "compare.png").stat().st_size > 1000
    assert json.loads((out / first_name / "seed_2/config.json").read_text())["seed"] == 2
    both = [out / name / "seed_1" for name in (first_name, second_name)]
    report.write(both, tmp_path / "page.html")
    a, b = (example_means(Records(run / "eval").tables(estimator="ODE")[0]) for run in both)
    gaps = np.asarray([b[i] - a[i] for i in a])
    page = (tmp_path / "page.html").read_text()
    error = gaps.std(ddof=1) / math.sqrt(len(gaps))
    assert f"<td>{gaps.mean():+.4f} ± {error:.4f}</td>" in page
    assert f"<td>{second_name}/seed_1</td>" in page
    assert "<tr><td>training.score_matching_order</td><td>1</td><td>2</td></tr>" in page
    assert report.difference(both[0], both[0], "ODE") is None
    with pytest.raises(ValueError, match=r"^RUN='.*none': need a run folder with results in eval/"):
        report.write([tmp_path / "none"], tmp_path / "page.html")
    changed = [*arguments, "--set", "data.num_test=12", "--set", "training.stratified=True"]
    monkeypatch.setattr("sys.argv", changed)
    with pytest.raises(SystemExit):  # a complete run keeps the training that it had
        compare.main()


def test_variants_are_named_by_field_and_value() -> None:
    varied = ["training.alpha=0.1,0.25", "training.fp_form=gradient,advective"]
    found = compare.variants(["configs/toy/mog1d_ve_fp.py"], varied, [])
    forms = ("gradient", "advective")
    assert list(found) == [
        f"alpha={alpha}_fp_form={form}" for alpha in (0.1, 0.25) for form in forms
    ]
    assert found["alpha=0.25_fp_form=advective"].training.alpha == 0.25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["configs/toy/none.py"], "none.py': need an existing file"),
        (["configs/toy/mog1d_ve_order1.py", "--set", "training.n_iter=3"], "n_iter"),
        (["configs/toy/mog1d_ve_order1.py", "--set", "seed"], "need section.field=value"),
        (["configs/toy/mog1d_ve_order1.py", "--modes=trian"], "did you mean train"),
        (["configs/toy/mog1d_ve_order1.py", "--set", "seed=3"], "--set='seed=3': need --seeds"),
        (["configs/toy/mog1d_ve_order1.py", "--seeds=0"], "--seeds=0: need at least 1"),
        (["configs/digits/vp.py", "configs/mnist/vp.py"], "variants of different names"),
        (["configs/digits/vp.py", "--vary", "seed"], "need section.field=value,value"),
        (["configs/digits/vp.py", "--vary", "model.parameterization=cell"], "'cell'"),
    ],
)
def test_mistakes_in_a_comparison_end_in_one_line(
    tmp_path: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr("sys.argv", ["compare", *arguments, f"--workdir={tmp_path / 'out'}"])
    with pytest.raises(SystemExit):
        compare.main()
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_time_average_is_the_weighted_mean() -> None:
    assert compare.time_average([(1.0, 1.0), (3.0, 3.0)]) == 2.5


def test_totals_of_examples_that_share_their_errors() -> None:
    """Values against their formulas; the standard error is that over examples, not over draws."""
    rng = np.random.default_rng(0)
    common, weights = rng.standard_normal(400), np.asarray([0.2, 0.3, 0.5])
    curves = {
        "fisher": np.stack([4.0 + common] * 3), "fisher_ode": np.ones((3, 400)),
        "kl_rate": np.stack([2.0 * common + 1.0] * 3),
    }  # fmt: skip
    ends = {"kl": 3.0 + common, "start": 0.5 - common, "entropy": 1.0 + 0.0 * common}
    found = totals(curves, ends, weights, (0.0, 0.5, 1.0))
    mean, error = common.mean(), common.std(ddof=1) / 20
    expected = {
        "KL(q ‖ ODE) at t_min, from densities": (3.0 + mean, error),
        "KL(q ‖ ODE) at t_min, from scores": (1.0, 0.0),
        "KL(q_T ‖ prior)": (0.5 - mean, error),
        "½ ∫ g² E‖s − s*‖² dt": (2.0 + 0.5 * mean, 0.5 * error),
        "½ ∫ g² E‖s_ode − s*‖² dt": (0.5, 0.0),
        "entropy of q at t_min": (1.0, 0.0),
        "−ELBO of λ = 0": (3.5 - 0.5 * mean, 0.5 * error),
        "−ELBO of λ = 0.5": (1.5 + 1.125 * 2.0 + (0.5 * 1.125 - 1.0) * mean, 0.4375 * error),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-9, atol=1e-12, err_msg=name)


def test_ratio_of_means_and_its_error() -> None:
    """Against the spread over 2,000 repeats of 400 examples."""
    rng = np.random.default_rng(0)
    below = 2.0 + rng.random((2000, 400))
    above = 0.3 * below + 0.1 * rng.standard_normal((2000, 400))
    found = [ratio_of_means(a, b) for a, b in zip(above, below, strict=True)]
    means = np.asarray([value.mean for value in found])
    np.testing.assert_allclose(means.mean(), 0.3, atol=4 * means.std() / 2000**0.5)
    np.testing.assert_allclose(np.mean([v.error for v in found]), means.std(), rtol=0.1)


def test_a_solve_that_does_not_arrive_stops_the_diagnosis(tmp_path: Path) -> None:
    config = small("mog1d")
    run(config, tmp_path, "train")
    config.eval.update(rtol=1e-12, atol=1e-12)
    with pytest.raises(FloatingPointError, match="did not reach T"):
        run(config, tmp_path, "diagnose")
