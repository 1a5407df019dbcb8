"""Whole runs with every dequantisation: training of the dequantiser, rows, errors."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from ml_collections import ConfigDict

import run_lib
from dequantization import Draw, FlowDequantizer
from likelihood import Bound, ode_log_likelihood, variational_bound
from losses import dequantizer_loss, mean_loss
from operators import fold_in_all, fold_in_each, standard_normal
from parameterization import ScoreModel
from records import Records
from restarted import Restarted
from run_lib import loading, metrics
from run_lib.dequantizer_training import load_dequantizer
from run_lib.estimators import dequantization
from run_lib.experiment import Experiment
from tests import tiny
from time_sampling import Importance

pytestmark = pytest.mark.usefixtures("compiled_at_o0")

FOLDER = "flowpp_dequantizer"


def config(**changes) -> ConfigDict:
    c = tiny.config()
    c.deq.update(n_iters=6, filters=4, components=2, blocks=1, couplings=2)
    c.training.update(log_freq=2, n_jitted_steps=1, snapshot_freq_for_preemption=2)
    c.eval.update(enable_sampling=False, **changes)
    return c


def experiment(**changes) -> Experiment:
    return Experiment.from_config(config(**changes))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a score network and its dequantiser."""
    workdir = tmp_path_factory.mktemp("trained")
    run_lib.train(experiment(), workdir)
    run_lib.train_dequantizer(experiment(), workdir, FOLDER)
    return workdir


@partial(jax.jit, static_argnums=0)
def draw_of(dequantizer: FlowDequantizer, params: dict, image: jax.Array, keys: jax.Array) -> Draw:
    return dequantizer.draw(params, image, keys)


@partial(jax.jit, static_argnums=(0, 4))
def bound_of(s: Experiment, params: dict, x: jax.Array, keys: jax.Array, num_times: int) -> Bound:
    score, proposal = s.model.score(params), s.proposal
    return variational_bound(score, s.settings.sde, x, keys, proposal=proposal, num_times=num_times)


def rows(workdir: Path, eval_folder: str, **changes) -> dict:
    run_lib.evaluate(experiment(**changes), workdir, eval_folder, FOLDER)
    return Records(workdir / eval_folder).rows


def test_training_resumes_bit_for_bit(trained: Path, tmp_path: Path) -> None:
    """And leaves the score network as it was."""
    before = loading.load_parameters(experiment(), trained, 20)
    (tmp_path / "checkpoints").symlink_to(trained / "checkpoints")
    (tmp_path / "config.json").write_bytes((trained / "config.json").read_bytes())
    for last in (3, 6):
        c = config()
        c.deq.n_iters = last
        run_lib.train_dequantizer(Experiment.from_config(c), tmp_path, FOLDER)
    straight, resumed = (load_dequantizer(experiment(), w, FOLDER)[0] for w in (trained, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, straight, resumed)
    after = loading.load_parameters(experiment(), trained, 20)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    first = next(metrics.read_metrics(tmp_path / FOLDER))
    assert {"loss", "log_q"} <= first.keys()


def test_the_loss_trains_the_flow_towards_the_density_of_the_score() -> None:
    """log p(y) large in the upper half of every cell: u moves there, and the loss falls."""
    c = config()
    c.deq.update(filters=8, components=4)
    c.training.update(smallest_time=1e-2)
    found = Experiment.from_config(c)
    data = found.dataset
    dequantizer, model = found.dequantizer, found.model
    image = jnp.asarray(next(data.eval_batches("test", batch_size=24))["image"])
    centers = dequantizer.encoding.encode_with_noise(image, jnp.full(image.shape, 0.8))

    class Pull(ScoreModel):
        """A model whose data sit at 0.8 of each cell of these very images."""

        def score(
            self, params: dict, dropout_key: jax.Array | None = None, *, context: None = None
        ) -> Callable:
            def score_fn(x: jax.Array, t: jax.Array) -> jax.Array:
                shape = (-1, 1, 1, 1)
                alpha, sigma = (c(t).reshape(shape) for c in (self.sde.alpha, self.sde.sigma))
                return (alpha * centers - x) / (alpha**2 * 1e-3 + sigma**2)

            return score_fn

    proposal = found.proposal
    per_example = dequantizer_loss(
        dequantizer,
        Pull(model.network, model.sde),
        proposal,
        num_times=1,
    )
    loss_fn = mean_loss(per_example)
    batch = {"image": image, "noise_id": jnp.arange(24), "mask": jnp.ones(24, bool)}
    params = dequantizer.init(jax.random.key(0), image)

    @jax.jit
    def step(params: dict, key: jax.Array) -> tuple[dict, jax.Array]:
        grads, metrics = jax.grad(loss_fn, has_aux=True)(params, key, batch, {})
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
        return jax.tree.map(lambda p, g: p - 0.03 * g / norm, params, grads), metrics["loss"]

    losses = []
    for i in range(60):
        params, loss = step(params, jax.random.key(i))
        losses.append(float(loss))
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.1
    draw = draw_of(dequantizer, params, image, fold_in_each(jax.random.key(1), jnp.arange(24)))
    u = dequantizer.encoding.levels * dequantizer.encoding.to_unit(draw.x) - image
    assert float(jnp.mean(u)) > 0.55


def test_all_dequantisations_have_rows_that_no_batch_changes(trained: Path) -> None:
    options = {"dequantization": "uniform,variational,tn", "num_examples": 12, "bound": False}
    whole = rows(trained, "whole", **options, batch_size=12)
    parts = rows(trained, "parts", **options, batch_size=4)
    assert len(whole) == 3 * 12
    assert whole.keys() == parts.keys()
    for key, row in whole.items():
        np.testing.assert_allclose(row["value"], parts[key]["value"], rtol=2e-4, err_msg=str(key))
    kinds = {row["protocol"].split("dequantisation ")[1].split(",")[0] for row in whole.values()}
    assert kinds == {"uniform", "variational", "tn"}


def test_rows_of_the_bound_are_those_of_the_library(trained: Path) -> None:
    """Variational: −bound(y) − log q(y | k) in bits/dim, y and log q from the trained flow."""
    found = rows(trained, "library", dequantization="variational", enable_bpd=False, num_examples=4)
    s = experiment()
    data = s.dataset
    params, name = load_dequantizer(s, trained, FOLDER)
    assert all(f"dequantiser {name}" in row["protocol"] for row in found.values())
    batch = next(data.eval_batches("test", batch_size=4))
    repeat = jax.random.fold_in(s.keys["eval"], 0)
    keys = fold_in_each(repeat, jnp.asarray(batch["index"]))
    draw_keys = fold_in_all(fold_in_all(keys, 0), 0)
    draw = draw_of(s.dequantizer, params, jnp.asarray(batch["image"]), draw_keys)
    score_params = loading.load_parameters(s, trained, 20)
    bound = bound_of(s, score_params, draw.x, fold_in_all(keys, 2), s.settings.eval.num_times)
    bits = (bound.nll + draw.log_q) / (64 * np.log(2))
    np.testing.assert_allclose([r["value"] for r in found.values()], bits, rtol=1e-4)


def test_draws_and_loss_are_those_of_the_flow() -> None:
    """log q(y | k) is that of the flow and of the encoding; the loss is bound + log q(y | k)."""
    s = experiment()
    data = s.dataset
    dequantizer, model = s.dequantizer, s.model
    image = jnp.asarray(next(data.eval_batches("test", batch_size=8))["image"])
    params = dequantizer.init(jax.random.key(0), image)
    keys = fold_in_each(jax.random.key(1), jnp.arange(8))
    x = image.astype(jnp.float32) / 16
    u, log_q = jax.jit(s.settings.deq.flow.apply)({"params": params}, standard_normal(keys, x), x)
    draw = draw_of(dequantizer, params, image, keys)
    np.testing.assert_allclose(draw.x, 2 * (image + u) / 17 - 1, atol=1e-6)
    expected = log_q + 64 * np.log(17 / 2)  # a cell of y has the volume (2/17)^64
    np.testing.assert_allclose(draw.log_q, expected, rtol=1e-5)
    assert float(jnp.abs(log_q).min()) > 0.1
    proposal = s.proposal
    per_example = jax.jit(dequantizer_loss(dequantizer, model, proposal, num_times=2))
    score_params = model.init(jax.random.key(2), data.shape)
    batch = {"image": image, "noise_id": jnp.arange(8)}
    bits, parts = per_example(params, jax.random.key(1), batch, score_params)
    draw = draw_of(dequantizer, params, image, fold_in_all(keys, 0))
    bound = bound_of(s, score_params, draw.x, fold_in_all(keys, 1), 2)
    np.testing.assert_allclose(bits, (bound.nll + draw.log_q) / (64 * np.log(2)), rtol=1e-5)
    denser = (draw.log_q - 64 * np.log(17 / 2)) / (64 * np.log(2))
    np.testing.assert_allclose(parts["log_q"], denser, rtol=1e-3, atol=1e-6)


def test_rows_of_the_truncated_normal_are_those_of_the_library(tmp_path: Path) -> None:
    """A network trained on k/16: cells around it, ODE and bound from t0, where τ = 2."""
    c = config(dequantization="tn", num_examples=4, tn_tau=2.0)
    c.data.uniform_dequantization = False
    s = Experiment.from_config(c)
    run_lib.train(s, tmp_path)
    run_lib.evaluate(s, tmp_path, "eval", FOLDER)
    found = Records(tmp_path / "eval").rows.values()
    data, sde = s.dataset, s.settings.sde
    start = dequantization(s, "tn").start
    alpha, sigma = (float(f(jnp.asarray(start))) for f in (sde.alpha, sde.sigma))
    assert alpha / sigma / 16 == pytest.approx(2.0, rel=1e-3)
    batch = next(data.eval_batches("test", batch_size=4))
    repeat = jax.random.fold_in(s.keys["eval"], 0)
    keys = fold_in_each(repeat, jnp.asarray(batch["index"]))
    tau = alpha / 16 / sigma
    z = jnp.stack([
        jax.random.truncated_normal(key, -tau, tau, (8, 8, 1))
        for key in fold_in_all(fold_in_all(keys, 0), 0)
    ])  # fmt: skip
    x = alpha * (batch["image"] / 8.0 - 1.0) + sigma * z
    law = scipy.stats.truncnorm(-tau, tau, 0.0, sigma)
    log_q = law.logpdf(sigma * np.asarray(z)).sum(axis=(1, 2, 3))
    score = s.model.score(loading.load_parameters(s, tmp_path, 20))
    log_p = ode_log_likelihood(
        score, sde, x.astype(jnp.float32), fold_in_all(keys, 1), t_min=start,
        solver=s.solver, divergence=s.divergence,
    ).log_p  # fmt: skip
    anew = Restarted(sde, start)
    bound = variational_bound(
        score, anew, x.astype(jnp.float32), fold_in_all(keys, 2),
        proposal=Importance(anew, start + 1e-5), num_times=2,
    ).nll  # fmt: skip
    for name, nll in (("ODE", -log_p), ("bound", bound)):
        values = [row["value"] for row in found if row["estimator"] == name]
        np.testing.assert_allclose(values, (nll + log_q) / (64 * np.log(2)), rtol=2e-3)


def test_draws_of_the_start_average_for_points(tmp_path: Path) -> None:
    """With ode_start=noised there is noise to average over; without, K draws are refused."""
    c = tiny.config("swissroll")
    c.training.update(n_iters=5, smallest_time=1e-2)
    c.eval.update(divergence="exact", bound=False, enable_sampling=False, ode_start="noised")
    run_lib.train(Experiment.from_config(c), tmp_path)
    values = []
    for number in (1, 8):
        c.eval.num_importance = number
        run_lib.evaluate(Experiment.from_config(c), tmp_path, f"k{number}", FOLDER)
        values.append([r["value"] for r in Records(tmp_path / f"k{number}").rows.values()])
    # One z for all draws would give the values of a single one.
    assert (np.array(values[0]) - np.array(values[1])).std() > 1e-3
    c.eval.ode_start = "data"
    with pytest.raises(ValueError, match=r"num_importance=8 with real-valued data"):
        run_lib.evaluate(Experiment.from_config(c), tmp_path, "data", FOLDER)


def test_another_sde_or_folder_is_refused_and_the_score_step_stays(
    trained: Path, tmp_path: Path
) -> None:
    c = config()
    c.training.sde = "subvpsde"
    with pytest.raises(ValueError, match=r"training\.sde: 'vpsde' in .*, now 'subvpsde'"):
        run_lib.train_dequantizer(Experiment.from_config(c), trained, "other_sde")
    for name in ("", "..", "checkpoints", "eval", "samples", "a/b"):
        with pytest.raises(ValueError, match="plain name of a folder"):
            run_lib.train_dequantizer(experiment(), trained, name)
    (tmp_path / FOLDER).mkdir()  # of a training that was killed before its first checkpoint
    (tmp_path / FOLDER / "versions.json").write_text('{"score_step": 5}')
    (tmp_path / "config.json").write_bytes((trained / "config.json").read_bytes())
    for last in (10, 20):
        shutil.copytree(trained / f"checkpoints/{last}", tmp_path / f"checkpoints/{last}")
        c = config()
        c.deq.n_iters = last // 5
        run_lib.train_dequantizer(Experiment.from_config(c), tmp_path, FOLDER)
        assert json.loads((tmp_path / FOLDER / "versions.json").read_text())["score_step"] == 10


def test_more_draws_lower_the_estimate_on_average(trained: Path) -> None:
    """K = 1 is an upper bound on K = 8; the first draw is the same."""
    shared = {"dequantization": "variational", "bound": False, "num_examples": 12}
    one, eight = (
        np.array([r["value"] for r in rows(trained, f"k{k}", **shared, num_importance=k).values()])
        for k in (1, 8)
    )
    difference = one - eight
    assert difference.mean() > 2 * difference.std() / np.sqrt(len(difference)) > 0.0


def test_forms_and_starts_of_the_same_quantity_agree(trained: Path) -> None:
    """DSM and divergence form of the bound, ODE from the data and from the noised data."""
    shared = {"num_examples": 12, "num_repeats": 8, "batch_size": 12}

    def difference(one: dict, other: dict) -> tuple[float, float]:
        """Mean and standard error over examples, paired, repeats averaged first."""
        a, b = (np.array([r["value"] for r in f.values()]).reshape(8, 12) for f in (one, other))
        gaps = (a - b).mean(axis=0)
        return abs(gaps.mean()), gaps.std() / np.sqrt(12)

    dsm = rows(trained, "dsm", **shared, enable_bpd=False, num_times=16)
    form = rows(trained, "form", **shared, enable_bpd=False, num_times=16, dsm=False)
    gap, error = difference(dsm, form)
    assert gap < 4 * error
    data = rows(trained, "data", **shared, bound=False)
    noised = rows(trained, "noised", **shared, bound=False, ode_start="noised")
    gap, error = difference(data, noised)
    assert gap < 4 * error + 1e-3
    assert "start noised" in next(iter(noised.values()))["protocol"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dequantization": "normal"}, r"eval.dequantization='normal'.*tn.*uniform.*variational"),
        ({"tn_tau": 0.0}, r"eval.tn_tau=0.0: need more than 0"),
        ({"num_importance": 0}, r"eval.num_importance=0: need an integer of at least 1"),
        ({"ode_start": "noise"}, r"eval.ode_start='noise'.*noised"),
    ],
)
def test_wrong_settings_are_named(trained: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rows(trained, "wrong", **changes)


def test_what_is_missing_or_does_not_fit_is_named(trained: Path) -> None:
    with pytest.raises(ValueError, match=r"no dequantiser in .*nothing: run --mode=train_deq"):
        run_lib.evaluate(experiment(dequantizer=True), trained, "missing", "nothing")
    c = config(dequantizer=True)
    c.deq.filters = 8
    with pytest.raises(ValueError, match=r"deq\.filters: 4 in .*, now 8"):
        run_lib.evaluate(Experiment.from_config(c), trained, "other", FOLDER)


def test_points_need_no_dequantisation(tmp_path: Path) -> None:
    c = tiny.config("swissroll")
    c.eval.update(dequantization="tn", divergence="exact")
    c.training.n_iters = 5
    found = Experiment.from_config(c)
    run_lib.train(found, tmp_path)
    with pytest.raises(ValueError, match=r"eval\.dequantization='tn'.*real values"):
        run_lib.evaluate(found, tmp_path, "eval")
    with pytest.raises(ValueError, match="variational dequantiser needs images"):
        run_lib.train_dequantizer(found, tmp_path, FOLDER)


def test_logit_data_have_no_truncated_normal() -> None:
    c = config()
    c.data.update(centered=False, logit=True)
    found = Experiment.from_config(c)
    with pytest.raises(ValueError, match=r"'tn': need .*data\.logit=True"):
        dequantization(found, "tn")


def test_start_of_the_truncated_normal() -> None:
    """α h/σ = τ there, cells of the training grid; never before the smallest time."""
    found = experiment()
    noise = dequantization(found, "tn")
    t = jnp.asarray(noise.start)
    ratio = float(found.settings.sde.alpha(t) / found.settings.sde.sigma(t)) / 17
    assert ratio == pytest.approx(3.0, rel=1e-3)
    early = experiment(tn_tau=1e4)
    assert dequantization(early, "tn").start == pytest.approx(1e-5)
