"""Whole runs at tiny size: resume, devices, non-finite values, evaluation, the run folder."""

import json
import re
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog

import run_lib
import streams
from checkpoints import Checkpoints
from configs import base
from likelihood import Divergence, ode_log_likelihood
from ode import Solver
from operators import fold_in_all, fold_in_each
from parameterization import PARAMETERIZATIONS, TIME_LABELS
from records import Records
from run_lib import evaluation_loop, folder, loading, metrics, page
from run_lib.estimators import draw_keys
from run_lib.experiment import Experiment
from run_lib.trainer import PendingMetrics
from run_lib.training import score_trainer
from sde_lib import SDES
from tests import tiny
from version import VERSION

pytestmark = pytest.mark.usefixtures("compiled_at_o0", "four_devices")

ROOT = Path(__file__).resolve().parents[1]


def train(config: ConfigDict, workdir: Path) -> None:
    run_lib.train(Experiment.from_config(config), workdir)


def final_state(workdir: Path, config: ConfigDict) -> dict:
    """The leaves of the last checkpoint, as numpy."""
    experiment = Experiment.from_config(config)
    trainer = score_trainer(experiment, workdir)
    trainer.checkpoints.close()
    return jax.device_get(trainer.state)


@pytest.mark.parametrize(("n_jitted_steps", "law"), [(1, ""), (5, "adaptive")])
def test_resumed_run_is_bit_identical_to_an_uninterrupted_one(
    tmp_path: Path, n_jitted_steps: int, law: str
) -> None:
    config = tiny.config()
    config.model.dropout = 0.1
    config.training.update(n_jitted_steps=n_jitted_steps, time_law=law)
    config.training.importance_weighting = law != "adaptive"
    train(config, tmp_path / "straight")
    config.training.n_iters = 11
    train(config, tmp_path / "resumed")
    config.training.n_iters = 20
    train(config, tmp_path / "resumed")
    straight = final_state(tmp_path / "straight", config)
    resumed = final_state(tmp_path / "resumed", config)
    assert straight.step == 20
    assert (straight.time_law is not None) == (law == "adaptive")
    jax.tree.map(np.testing.assert_array_equal, straight, resumed)


def test_a_run_changes_its_law_of_times(tmp_path: Path) -> None:
    """Without what a law learns, with it, without: each goes on from the parameters there are."""
    config = tiny.config()
    config.training.update(importance_weighting=False, eval_freq=5)
    for law, n_iters in (("importance", 5), ("adaptive", 10), ("velocity", 15)):
        config.training.update(time_law=law, n_iters=n_iters)
        train(config, tmp_path)
        state = final_state(tmp_path, config)
        assert state.step == n_iters
        assert (state.time_law is not None) == (law == "adaptive")
        assert law != "adaptive" or np.abs(state.time_law - 1.0).max() > 0.1
    rows = list(metrics.read_metrics(tmp_path))
    assert not any("time_law" in row for row in rows)
    assert [row["step"] for row in rows if row["split"] == "train"] == [5, 10, 15]


def test_the_prior_of_a_head_stays_as_the_data_gave_it(tmp_path: Path) -> None:
    """Bit by bit, with weight decay and clipping; all else moves; its moving average to 1e-6."""
    config = tiny.config()
    config.model.parameterization = "cells"
    config.optim.update(weight_decay=0.1, warmup=0)
    experiment = Experiment.from_config(config)
    start = experiment.with_prior(experiment.initial_parameters())
    train(config, tmp_path)
    state = final_state(tmp_path, config)
    np.testing.assert_array_equal(state.params["prior"], start["prior"])
    np.testing.assert_allclose(state.ema_params["prior"], start["prior"], rtol=1e-6)
    for first, last in zip(
        jax.tree.leaves(start["network"]), jax.tree.leaves(state.params["network"]), strict=True
    ):
        assert np.all(np.any(first != last))
    assert np.ptp(start["prior"]) > 1.0


def test_held_out_figures_are_those_of_the_validation_split(tmp_path: Path, monkeypatch) -> None:
    """The held-out loss is of its examples, and likelihoods are where they are asked for."""
    config = tiny.config()
    config.data.update(num_train=60, num_validation=16)
    config.training.n_iters = 5
    config.eval.update(dataset="validation", enable_sampling=False, bound=False)
    asked, whole = [], streams.Dataset.eval_batches

    def eval_batches(self, split, **options):
        asked.append(split)
        return whole(self, split, **options)

    monkeypatch.setattr(streams.Dataset, "eval_batches", eval_batches)
    train(config, tmp_path)
    assert asked == ["validation"]
    run_lib.evaluate(Experiment.from_config(config), tmp_path, "eval")
    rows = Records(tmp_path / "eval").rows.values()
    assert sorted(row["index"] for row in rows) == list(range(16))
    assert {row["split"] for row in rows} == {"validation"}
    config.data.num_validation = 0
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"^eval\.dataset='validation': need one of .*$") as error:
        run_lib.evaluate(Experiment.from_config(config), tmp_path, "other")
    assert "data.num_validation makes a validation split" in str(error.value)
    assert not (tmp_path / "other").exists()


def test_the_linear_path_trains_samples_and_has_likelihoods(tmp_path: Path) -> None:
    """All figures finite; the bound above the ODE's on average; samples where the data are."""
    config = tiny.config("swissroll")
    config.training.update(sde="linear", time_law="velocity", importance_weighting=False)
    config.training.n_iters = 10
    config.model.num_scales = 100
    config.eval.update(divergence="exact", num_times=16)
    train(config, tmp_path)
    for method in ("sde", "ode"):
        config.sampling.method = method
        config.eval.update(enable_bpd=method == "sde", bound=method == "sde")
        run_lib.evaluate(Experiment.from_config(config), tmp_path, method)
        (path,) = (tmp_path / method / "samples_10").glob("*.npz")
        assert np.abs(np.load(path)["samples"]).max() < 20.0
    rows = Records(tmp_path / "sde").rows.values()
    value = {
        name: np.asarray([row["value"] for row in rows if row["estimator"] == name])
        for name in ("ODE", "bound")
    }
    assert all(len(v) == 24 and np.isfinite(v).all() for v in value.values())
    difference = value["bound"] - value["ODE"]
    assert difference.mean() > -4 * difference.std() / np.sqrt(24)


def test_metrics_hold_each_step_once_after_a_resume(tmp_path: Path) -> None:
    config = tiny.config()
    train(config, tmp_path)
    before = list(metrics.read_metrics(tmp_path))
    # as if a killed run had written lines after its last checkpoint
    lines = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(
        lines + '{"step": 24, "split": "train", "loss": 1}\n{"s'
    )
    config.training.n_iters = 24
    train(config, tmp_path)
    rows = [(row["step"], row["split"]) for row in metrics.read_metrics(tmp_path)]
    assert len(rows) == len(set(rows)) > len(before)


DAMAGED = {
    "zeros of a power cut": "\0\0\0",
    "two lines in one": '{"step": 6, "spl\0\0',
    "no step": '{"stup": 6, "split": "train", "loss": 1}',
    "no split": '{"step": 6, "splat": "train", "loss": 1}',
    "step of a half": '{"step": 6.5, "split": "train", "loss": 1}',
    "huge step": '{"step": 1e999, "split": "train", "loss": 1}',
    "unknown split": '{"step": 6, "split": "tra1n", "loss": 1}',
    "text for a number": '{"step": 6, "split": "train", "loss": "1"}',
    "number that no float holds": f'{{"step": 6, "split": "train", "loss": {10**400}}}',
    "no object": "[6]",
    "brackets": "[" * 100_000,
}


@pytest.mark.parametrize("damaged", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_line_of_the_metrics_is_left_out_and_said(tmp_path, caplog, damaged) -> None:
    first = '{"step": 5, "split": "train", "loss": 1}\n'
    path, last = tmp_path / "metrics.jsonl", first.replace("5", "7")
    path.write_text(first + damaged + "\n" + last)
    assert [row["step"] for row in metrics.read_metrics(tmp_path)] == [5, 7]
    assert page.save_curves(tmp_path).exists()
    assert f"{path}: line 2 is damaged and is left out" in caplog.text
    for step, kept in ((10, first + last), (6, first)):
        metrics.MetricsWriter(tmp_path, step).close()
        assert path.read_text() == kept


def test_events_of_tensorboard_are_those_of_the_metrics(tmp_path: Path) -> None:
    """A first one of its format, one that makes later ones of a killed run void, the values."""
    writer = metrics.MetricsWriter(tmp_path, 4)
    writer.write(5, "train", {"loss": 2.5, "norm": 1.0})
    (path,) = (tmp_path / "tensorboard").iterdir()
    content, found = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        found.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    writer.close()
    assert found[0].file_version == "brain.Event:2"
    assert (found[1].step, found[1].session_log.status) == (5, SessionLog.START)
    values = [(event.step, v.tag, v.simple_value) for event in found for v in event.summary.value]
    assert values == [(5, "train/loss", 2.5), (5, "train/norm", 1.0)]


def test_curves_are_those_of_the_metrics(tmp_path: Path, monkeypatch) -> None:
    rows = [
        {"step": 5, "split": "train", "time": 0.0, "loss": 3.0, "grad_norm": 1.0},
        {"step": 5, "split": "held_out", "time": 0.0, "loss": 4.0},
        {"step": 10, "split": "train", "time": 1.0, "loss": 2.0, "grad_norm": 0.5},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 15, "spl'
    (tmp_path / "metrics.jsonl").write_text(text)
    drawn = []

    def draw(path: Path, panels: dict) -> None:
        path.write_text("half a picture" if not drawn else "a picture")
        drawn.append(panels)
        if len(drawn) == 1:
            raise OSError("the disk is full")

    monkeypatch.setattr(page.plotting, "save_curves", draw)
    with pytest.raises(OSError, match="the disk is full"):
        page.save_curves(tmp_path)
    assert not (tmp_path / "curves.png").exists()
    for more in ("", "", '{"step": 15, "split": "train", "time": 2.0, "loss": 1.0}\n'):
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(more)
        path = page.save_curves(tmp_path)
        assert path.read_text() == "a picture"
    assert len(drawn) == 3  # not where nothing was written
    found = {
        name: {label: tuple(map(list, curve)) for label, curve in panel.items()}
        for name, panel in drawn[0].items()
    }
    assert found == {
        "grad_norm": {"train": ([5, 10], [1.0, 0.5])},
        "loss": {"train": ([5, 10], [3.0, 2.0]), "held-out": ([5], [4.0])},
    }


def test_a_non_finite_loss_stops_the_run_and_leaves_the_last_good_checkpoint(
    tmp_path: Path,
) -> None:
    config = tiny.config()
    config.training.n_iters = 10
    train(config, tmp_path)
    config.training.update(n_iters=40, n_jitted_steps=1, snapshot_freq_for_preemption=1)
    config.optim.lr = 1e38
    with pytest.raises(FloatingPointError, match=r"at step 10 "):
        train(config, tmp_path)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps()[-1] == 10
    checkpoints.close()


def test_pending_metrics_name_the_first_bad_step() -> None:
    pending = PendingMetrics()
    pending.add(range(4, 6), {"loss": np.array([1.0, 2.0])})
    pending.add(range(6, 8), {"loss": np.array([3.0, np.nan])})
    with pytest.raises(FloatingPointError, match="loss = nan at step 7"):
        pending.check()


def test_pending_metrics_average_all_steps_since_the_last_flush() -> None:
    pending = PendingMetrics()
    pending.add(range(2), {"loss": np.array([1.0, 2.0])})
    pending.check()
    pending.add(range(2, 3), {"loss": np.array([6.0, 0.0])})  # of a dispatch of two
    assert pending.flush() == {"loss": 3.0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("trained")
    config = tiny.config()
    config.training.snapshot_sampling = True
    train(config, workdir)
    return workdir


def test_run_folder_holds_what_the_readme_says(trained: Path) -> None:
    for name in ("config.json", "versions.json", "metrics.jsonl", "curves.png", "report.html"):
        assert (trained / name).stat().st_size > 0, name
    versions = json.loads((trained / "versions.json").read_text())
    assert versions["fokker"] == VERSION
    assert list((trained / "tensorboard").glob("events*"))
    assert (trained / "samples" / "step_0000020.png").exists()
    assert json.loads((trained / "config.json").read_text())["model"]["beta_max"] == 20.0
    splits = {row["split"] for row in metrics.read_metrics(trained)}
    assert splits == {"train", "held_out"}


def evaluate(workdir: Path, eval_folder: str, **changes: object) -> dict[tuple, dict]:
    config = tiny.config()
    config.eval.update(changes)
    run_lib.evaluate(Experiment.from_config(config), workdir, eval_folder)
    return Records(workdir / eval_folder).rows


def test_evaluation_is_complete_and_does_not_depend_on_the_batch_size(trained: Path) -> None:
    one = evaluate(trained, "a", batch_size=24, enable_sampling=False, enable_loss=True)
    other = evaluate(trained, "b", batch_size=8, enable_sampling=False, enable_loss=True)
    assert one.keys() == other.keys()
    assert len(one) == 3 * 24
    for key, row in one.items():
        np.testing.assert_allclose(row["value"], other[key]["value"], rtol=2e-4, err_msg=str(key))


def test_a_notebook_gets_the_last_state_and_the_table(trained: Path) -> None:
    config = tiny.config()
    config.eval.update(num_examples=4, enable_bpd=False, enable_sampling=False)
    experiment = Experiment.from_config(config)
    state = run_lib.train(experiment, str(trained))
    assert int(state.step) == 20
    (result,) = run_lib.evaluate(experiment, str(trained), "returned")
    values = [row["value"] for row in Records(trained / "returned").rows.values()]
    assert result.estimator == "bound"
    np.testing.assert_allclose(result.value.mean, np.mean(values), rtol=1e-12)


@pytest.mark.parametrize("split", ["test", "train"])
def test_rows_are_the_ode_likelihood_of_the_moving_average(trained: Path, split: str) -> None:
    options = {"dataset": split, "num_examples": 4, "bound": False, "enable_sampling": False}
    rows = evaluate(trained, f"rows_{split}", **options)
    experiment = Experiment.from_config(tiny.config())
    dataset = experiment.dataset
    batch = next(dataset.eval_batches(split, batch_size=4))
    repeat_key = jax.random.fold_in(experiment.keys["eval"], 0)
    keys = fold_in_each(repeat_key, jnp.asarray(batch["index"]))
    u = jax.vmap(lambda k: jax.random.uniform(k, (8, 8, 1)))(draw_keys(keys, 0))
    x = 2 * (batch["image"] + u) / 17 - 1
    state = final_state(trained, tiny.config())
    result = ode_log_likelihood(
        experiment.model.score(state.ema_params), experiment.settings.sde, x, fold_in_all(keys, 1),
        t_min=1e-5, solver=Solver("tsit5", 1e-2, 1e-2), divergence=Divergence(),
    )  # fmt: skip
    bits = -result.log_p / (64 * np.log(2)) + np.log2(17) - 1
    assert [row["split"] for row in rows.values()] == [split] * 4
    np.testing.assert_allclose([row["value"] for row in rows.values()], bits, rtol=1e-4)


def test_likelihoods_dequantise_even_if_training_does_not(tmp_path: Path) -> None:
    config = tiny.config()
    config.data.uniform_dequantization = False
    config.eval.update(enable_sampling=False, bound=False)
    config.training.n_iters = 5
    train(config, tmp_path)
    run_lib.evaluate(Experiment.from_config(config), tmp_path, "plain")
    config.data.uniform_dequantization = True
    saved = json.loads((tmp_path / "config.json").read_text())
    saved["data"]["uniform_dequantization"] = True
    (tmp_path / "config.json").write_text(json.dumps(saved))
    run_lib.evaluate(Experiment.from_config(config), tmp_path, "dequantised")
    one, other = (Records(tmp_path / f).rows for f in ("plain", "dequantised"))
    assert {k: r["value"] for k, r in one.items()} == {k: r["value"] for k, r in other.items()}


def test_rows_of_other_data_or_seeds_do_not_mix(trained: Path) -> None:
    evaluate(trained, "g", enable_bpd=False, enable_sampling=False)
    config = tiny.config()
    config.seed = 1
    with pytest.raises(ValueError, match="rows of another seed: 42 then, now 1"):
        run_lib.evaluate(Experiment.from_config(config), trained, "g")


def test_a_first_mistake_does_not_lock_the_folder(tmp_path: Path) -> None:
    config = tiny.config("moons")
    config.model.update(name="ddpm")
    for field in ("hidden", "depth", "embed_dim"):
        config.model[field] = None
    with pytest.raises(ValueError, match=r"ch_mult=.*need images"):
        train(config, tmp_path / "run")
    train(tiny.config("moons"), tmp_path / "run")


def test_ill_posed_samplers_are_refused_before_training(tmp_path: Path) -> None:
    config = tiny.config()
    config.training.sde = "subvpsde"
    config.sampling.update(method="pc", predictor="ancestral_sampling")
    with pytest.raises(ValueError, match="ancestral_sampling"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_failed_snapshot_neither_stops_training_nor_costs_the_checkpoint(tmp_path: Path) -> None:
    config = tiny.config()
    config.training.update(n_iters=10, snapshot_sampling=True)
    config.sampling.update(method="ode", rtol=1e-14, atol=1e-14)
    train(config, tmp_path)
    assert (tmp_path / "checkpoints" / "10").exists()


@pytest.mark.parametrize("form", ["gradient", "directional"])
def test_third_order_trains_on_images_and_reports_every_part(tmp_path: Path, form: str) -> None:
    config = tiny.config()
    config.training.update(n_iters=5, score_matching_order=3, third_order_form=form, num_probes=2)
    train(config, tmp_path)
    row = next(metrics.read_metrics(tmp_path))
    parts = [row[name] for name in ("dsm", "frobenius", "trace", "third")]
    assert min(parts) > 0
    np.testing.assert_allclose(row["loss"], sum(parts), rtol=1e-4)


def test_exact_second_order_trains_in_the_plane(tmp_path: Path) -> None:
    config = tiny.config("moons")
    config.training.update(n_iters=5, score_matching_order=2, derivative_estimator="exact")
    config.training.update(second_order_weight=0.5, trace_weight=0.0)
    train(config, tmp_path)
    row = next(metrics.read_metrics(tmp_path))
    np.testing.assert_allclose(row["loss"], row["dsm"] + 0.5 * row["frobenius"], rtol=1e-4)


def test_evaluation_computes_only_the_missing_rows(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluate(trained, "c", enable_sampling=False)
    path = trained / "c" / "rows.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:30]) + lines[30][:20])
    batches, check = [], evaluation_loop.check_converged
    monkeypatch.setattr(
        evaluation_loop, "check_converged", lambda *a: (batches.append(a), check(*a))
    )
    second = evaluate(trained, "c", enable_sampling=False)
    assert {k: r["value"] for k, r in second.items()} == {k: r["value"] for k, r in first.items()}
    assert len(batches) == 2  # rows 0–29 were there: the rest is the bound of both batches
    assert len(path.read_text().splitlines()) == len(first)


def test_evaluation_writes_samples_and_report(trained: Path) -> None:
    evaluate(trained, "d", enable_bpd=False)
    samples = np.load(trained / "d" / "samples_20" / "00000000-00000008.npz")["samples"]
    assert samples.shape == (9, 8, 8, 1)
    assert samples.dtype == np.uint8
    assert samples.max() <= 16
    page = (trained / "report.html").read_text()
    assert "bits/dim" in page
    assert "data:image/png;base64," in page
    assert "src='http" not in page
    assert page.startswith("<!doctype html>\n<html lang='en'>")
    assert "name='viewport'" in page
    assert re.findall(r"<img(?![^>]* alt='[^']{10})", page) == []
    about = json.loads((trained / "about.json").read_text())
    assert f"mlp, {about['parameters']:,} parameters" in page
    assert about["parameters"] > 1000
    assert "<tr><td>training.n_iters</td><td>20</td>" in page  # it differs from its default
    with Image.open(trained / "examples.png") as image, Image.open(trained / "samples.png") as own:
        assert image.size == own.size


def test_repeats_use_fresh_noise(trained: Path) -> None:
    rows = evaluate(trained, "e", enable_sampling=False, enable_bpd=False, num_repeats=2)
    values = [[r["value"] for r in rows.values() if r["repeat"] == k] for k in (0, 1)]
    assert np.all(np.array(values[0]) != np.array(values[1]))


def test_real_valued_data_train_and_evaluate_in_nats(tmp_path: Path) -> None:
    config = tiny.config("swissroll")
    config.eval.update(divergence="exact")
    train(config, tmp_path)
    run_lib.evaluate(Experiment.from_config(config), tmp_path, "eval")
    rows = Records(tmp_path / "eval").rows.values()
    assert {row["unit"] for row in rows} == {"nats"}
    assert len(rows) == 2 * 24
    assert (tmp_path / "samples.png").exists()


@pytest.mark.parametrize(
    ("sde", "parameterization", "label"),
    [
        ("vpsde", "drift", "unit_time"),
        ("subvpsde", "noise", "time"),
        ("vesde", "score", "sigma"),
        ("linearvesde", "velocity", "log_snr"),
        ("linear", "noise", "unit_time"),
    ],
)
def test_every_sde_parameterization_and_label_trains(
    tmp_path: Path, sde: str, parameterization: str, label: str
) -> None:
    config = tiny.config("moons")
    config.training.update(sde=sde, n_iters=4, smallest_time=1e-2)
    config.model.update(parameterization=parameterization, time_label=label)
    model = Experiment.from_config(config).model
    assert type(model.sde) is SDES[sde]
    assert model.to_score is PARAMETERIZATIONS[parameterization]
    assert model.label is TIME_LABELS[label]
    train(config, tmp_path)
    assert list(metrics.read_metrics(tmp_path))[-1]["step"] == 4


def test_a_label_that_counts_levels_needs_discrete_levels() -> None:
    """In continuous time model.num_scales is free: another number would be another label."""
    config = tiny.config("mixture")
    config.model.update(parameterization="noise", time_label="level")
    with pytest.raises(ValueError, match=r"model\.time_label='level'.*training\.continuous=True"):
        Experiment.from_config(config)


def test_a_network_of_discrete_levels_trains_and_samples_on_the_chain(tmp_path: Path) -> None:
    """DDPM and SMLD objectives with their samplers; likelihoods are those of the SDE."""
    for sde, changes in (
        ("vpsde", {"parameterization": "noise", "time_label": "level", "beta_max": 5.0}),
        ("vesde", {"parameterization": "scaled_score", "time_label": "reverse_index"}),
    ):
        config = tiny.config("mixture")
        config.model.update(**changes)
        config.training.update(sde=sde, continuous=False, n_iters=5, eval_freq=5)
        config.training.update(snapshot_freq=5, snapshot_freq_for_preemption=5)
        config.training.update(likelihood_weighting=False, importance_weighting=False)
        config.sampling.update(method="pc", predictor="ancestral_sampling")
        config.eval.update(enable_bpd=False, bound=False)
        train(config, tmp_path / sde)
        experiment = Experiment.from_config(config)
        on_levels, plain = (experiment.chain_model, experiment.model)
        assert (on_levels.sde == plain.sde) == (sde == "vesde")
        run_lib.evaluate(experiment, tmp_path / sde, "eval")
        config.training.alpha = 0.1
        with pytest.raises(ValueError, match="continuous=False: the Fokker-Planck residual"):
            train(config, tmp_path / "no")
    config.training.update(sde="subvpsde", alpha=0.0)
    with pytest.raises(ValueError, match="continuous=False: need True: SubVPSDE has no chain"):
        train(config, tmp_path / "no")


def test_changed_fields_are_refused_by_name_and_harmless_ones_are_not(trained: Path) -> None:
    config = tiny.config()
    config.model.hidden = 17
    config.optim.lr = 3e-4
    with pytest.raises(ValueError, match=r"model\.hidden: 16 in") as error:
        train(config, trained)
    assert "optim.lr" not in str(error.value)
    config = tiny.config()
    config.training.sde = "subvpsde"
    with pytest.raises(ValueError, match=r"training\.sde: 'vpsde'"):
        run_lib.evaluate(Experiment.from_config(config), trained, "eval")


def test_a_folder_from_before_a_field_existed_goes_on_and_levels_are_fixed(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    config = Experiment.from_config(tiny.config()).settings.resolved()
    older = json.loads(json.dumps(config))
    del older["model"]["dropout"], older["data"]["logit"]
    folder.write_json(tmp_path / "config.json", older)
    folder.reconcile(tmp_path, config)
    config["model"]["num_scales"] += 1
    folder.reconcile(tmp_path, config)
    config["training"]["continuous"] = False
    with pytest.raises(ValueError, match=r"model\.num_scales: 10 in"):
        folder.reconcile(tmp_path, config)
    config["optim"]["lr"], config["training"]["n_iters"], config["seed"] = 0.5, 7, 1
    names = ["model.num_scales", "optim.lr", "training.continuous", "training.n_iters"]
    others = folder.trained_otherwise(tmp_path, config)
    assert [text.split(":")[0] for text in others] == names
    assert folder.trained_otherwise(tmp_path, config, ["training.n_iters"]) == others[:3]
    (tmp_path / "checkpoints" / "5").rmdir()
    assert folder.trained_otherwise(tmp_path, config) == []


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        ("training", "bach_size", 3, "training.bach_size=3: not a field.*batch_size"),
        ("model", "sigma_max", 3.0, "model.sigma_max=3.0: used neither by .*'mlp'.*'vpsde'"),
        ("model", "nf", 32, "model.nf=32: used neither by"),
        ("model", "name", "mpl", "model.name='mpl': allowed .*did you mean mlp"),
        ("training", "sde", "vp", "training.sde='vp': allowed"),
        ("training", "batch_size", 0, "training.batch_size=0: need an integer of at least 1"),
        ("training", "log_freq", 7, "training.log_freq=7: need a multiple of .*n_jitted_steps=5"),
        (
            "training",
            "importance_weighting",
            True,
            "importance_weighting=True: need .*likelihood_weighting=True",
        ),
        ("training", "time_law", "velocity", "velocity': need .*likelihood_weighting=True"),
        ("training", "time_law", "importnce", "training.time_law='importnce': allowed"),
        ("eval", "solver", "rk4", "eval.solver='rk4': allowed"),
        ("eval", "dataset", "val", "eval.dataset='val': allowed"),
        ("sampling", "method", "sed", "sampling.method='sed': allowed .*did you mean"),
        ("optim", "optimizer", "sgd", "optim.optimizer='sgd'"),
        ("training", "score_matching_order", 4, r"score_matching_order=4: need 1, 2 or 3"),
        ("data", "dataset", "digit", "digits"),
    ],
)
def test_mistakes_are_named_before_any_training(
    tmp_path: Path, section: str, field: str, value: object, message: str
) -> None:
    config = tiny.config()
    config.training.update(likelihood_weighting=False, importance_weighting=False)
    with config.unlocked():
        config[section][field] = value
    with pytest.raises(ValueError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_fraction_that_the_batch_lacks_is_refused_before_any_training(tmp_path: Path) -> None:
    config = tiny.config()
    config.training.update(score_matching_order=2, high_order_fraction=1 / 7)
    with pytest.raises(ValueError, match="need a multiple of 7 for a fraction of 1/7"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_batch_size_must_fit_the_devices(tmp_path: Path) -> None:
    config = tiny.config()
    config.training.batch_size = 18
    with pytest.raises(ValueError, match=r"training.batch_size=18: .* 4 devices"):
        train(config, tmp_path)


def test_a_network_that_is_not_finite_is_named_and_earlier_rows_stay(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(trained, "n", enable_sampling=False, num_examples=4)
    whole = evaluation_loop.Parameters
    monkeypatch.setattr(
        evaluation_loop, "Parameters",
        lambda score: whole(jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), score)),
    )  # fmt: skip
    with pytest.raises(
        FloatingPointError, match=r"ODE .*no value for examples \[0, 1, .*checkpoint"
    ):
        evaluate(trained, "n", enable_sampling=False)
    assert len(Records(trained / "n").rows) == 2 * 4


def test_evaluation_waits_for_a_checkpoint_but_not_for_ever(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, slept = [0.0], []

    class Clock:
        """Time passes only while somebody sleeps."""

        @staticmethod
        def monotonic() -> float:
            return now[0]

        @staticmethod
        def sleep(seconds: float) -> None:
            slept.append(seconds)
            now[0] += seconds

    monkeypatch.setattr(loading, "time", Clock)
    with pytest.raises(ValueError, match=r"no checkpoint of steps \[30\]"):
        evaluate(trained, "w", enable_sampling=False, begin_ckpt=3, end_ckpt=3, wait_s=7.0)
    assert slept == [5.0, 2.0]


def test_equal_steps_report_the_error_of_the_solver(trained: Path) -> None:
    rows = evaluate(
        trained, "s", enable_sampling=False, bound=False, num_examples=4,
        solver="dopri5", num_steps=8,
    )  # fmt: skip
    assert {row["nfe"] for row in rows.values()} == {8 * 6 + 4 * 6}
    assert all(0.0 < row["error"] < 0.1 for row in rows.values())
    (summary,) = json.loads((trained / "s" / "summary.json").read_text())
    assert summary["details"]["equal steps"] == 8
    assert summary["details"]["estimate"] == "yes"
    assert summary["solver_error"] > 0.0


def test_summaries_say_all_of_the_protocol(trained: Path) -> None:
    evaluate(trained, "p", enable_sampling=False, num_repeats=2)
    ode, bound = json.loads((trained / "p" / "summary.json").read_text())
    assert (ode["estimator"], bound["estimator"]) == ("ODE", "bound")
    assert (ode["n"], ode["repeats"], ode["step"], ode["unit"]) == (24, 2, 20, "bits/dim")
    wanted = {"solver": "tsit5", "rtol": 1e-2, "t_min": 1e-5, "dequantisation": "uniform"}
    assert wanted.items() <= ode["details"].items()
    assert ode["git_commits"] == [folder.git_commit()]
    assert ode["standard_error"] > 0.0 < ode["seconds_per_example"]
    text = (trained / "p" / "table.md").read_text()
    assert f"{ode['mean']:.4f} ± {ode['standard_error']:.4f} bits/dim" in text
    assert (trained / "p" / "extremes_20_test.png").stat().st_size > 0


def test_eval_without_a_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run --mode=train"):
        run_lib.evaluate(Experiment.from_config(tiny.config()), tmp_path, "eval")


def test_chosen_checkpoints_are_evaluated_and_missing_ones_named(trained: Path, caplog) -> None:
    """The estimator is compiled once for both, and the rows of a network are its own."""
    with caplog.at_level("INFO", logger="fokker"):
        rows = evaluate(
            trained, "f", begin_ckpt=1, end_ckpt=2, enable_bpd=False, enable_sampling=False
        )
    assert caplog.text.count("compiling bound") == 1
    assert {row["step"] for row in rows.values()} == {10, 20}
    values = {step: [r["value"] for r in rows.values() if r["step"] == step] for step in (10, 20)}
    assert len(values[10]) == len(values[20])
    assert values[10] != values[20]
    with pytest.raises(ValueError, match=r"no checkpoint of steps \[30\]"):
        evaluate(trained, "f", begin_ckpt=1, end_ckpt=3)


def test_base_config_and_settings_have_the_same_fields() -> None:
    experiment = Experiment.from_config(base.get_config())
    resolved = experiment.settings.resolved()
    for section in ("data", "training", "optim", "sampling", "eval"):
        assert set(resolved[section]) == set(base.get_config()[section].keys())
