"""Whole runs with every dequantisation: training of the dequantiser, rows, errors."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import datasets
import run_lib
from likelihood import dequantizer_loss, variational_bound
from losses import mean_loss
from operators import fold_in_all, fold_in_each
from parameterization import ScoreModel
from records import Records
from run_lib import build, folder, loading
from run_lib.dequantizer_training import load_dequantizer
from run_lib.settings import Settings
from tests import tiny

FOLDER = "flowpp_dequantizer"


def config(**changes) -> ConfigDict:
    c = tiny.config()
    c.deq.update(n_iters=6, filters=4, components=2, blocks=1, couplings=2)
    c.training.update(log_freq=2, n_jitted_steps=1, snapshot_freq_for_preemption=2)
    c.eval.update(enable_sampling=False, **changes)
    return c


def settings(**changes) -> Settings:
    return Settings.from_config(config(**changes))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a score network and its dequantiser."""
    workdir = tmp_path_factory.mktemp("trained")
    run_lib.train(settings(), workdir)
    run_lib.train_dequantizer(settings(), workdir, FOLDER)
    return workdir


def rows(workdir: Path, eval_folder: str, **changes) -> dict:
    run_lib.evaluate(settings(**changes), workdir, eval_folder, FOLDER)
    return Records(workdir / eval_folder).rows


def test_training_resumes_bit_for_bit(trained: Path, tmp_path: Path) -> None:
    """And leaves the score network as it was."""
    before = loading.load_parameters(settings(), datasets.load(settings().data), trained, 20)
    (tmp_path / "checkpoints").symlink_to(trained / "checkpoints")
    (tmp_path / "config.json").write_bytes((trained / "config.json").read_bytes())
    for last in (3, 6):
        c = config()
        c.deq.n_iters = last
        run_lib.train_dequantizer(Settings.from_config(c), tmp_path, FOLDER)
    data = datasets.load(settings().data)
    straight, resumed = (
        load_dequantizer(settings(), data, w, FOLDER)[0] for w in (trained, tmp_path)
    )
    jax.tree.map(np.testing.assert_array_equal, straight, resumed)
    after = loading.load_parameters(settings(), data, trained, 20)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    metrics = folder.read_metrics(tmp_path / FOLDER)
    assert {"loss", "log_q"} <= metrics[0].keys()


def test_the_loss_trains_the_flow_towards_the_density_of_the_score() -> None:
    """log p(y) large in the upper half of every cell: u moves there, and the loss falls."""
    c = config()
    c.deq.update(filters=8, components=4)
    c.training.update(smallest_time=1e-2)
    found = Settings.from_config(c)
    data = datasets.load(found.data)
    dequantizer, model = build.dequantizer(found, data), build.score_model(found)
    image = jnp.asarray(next(data.eval_batches("test", batch_size=24))["image"])
    centers = dequantizer.encoding.encode_with_noise(image, jnp.full(image.shape, 0.8))

    class Pull(ScoreModel):
        """A model whose data sit at 0.8 of each cell of these very images."""

        def score(self, params: dict, dropout_key: jax.Array | None = None) -> Callable:
            def score_fn(x: jax.Array, t: jax.Array) -> jax.Array:
                shape = (-1, 1, 1, 1)
                alpha, sigma = (c(t).reshape(shape) for c in (self.sde.alpha, self.sde.sigma))
                return (alpha * centers - x) / (alpha**2 * 1e-3 + sigma**2)

            return score_fn

    proposal = build.likelihood_tools(found).proposal
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
    draw = dequantizer.draw(params, image, fold_in_each(jax.random.key(1), jnp.arange(24)))
    u = dequantizer.encoding.levels * dequantizer.encoding.to_unit(draw.x) - image
    assert float(jnp.mean(u)) > 0.55


def test_all_dequantisations_have_rows_that_no_batch_changes(trained: Path) -> None:
    options = {"dequantization": "uniform,variational,tn", "num_examples": 12}
    whole = rows(trained, "whole", **options, batch_size=12)
    parts = rows(trained, "parts", **options, batch_size=4)
    assert len(whole) == 3 * 2 * 12
    assert whole.keys() == parts.keys()
    for key, row in whole.items():
        np.testing.assert_allclose(row["value"], parts[key]["value"], rtol=2e-4, err_msg=str(key))
    kinds = {row["protocol"].split("dequantisation ")[1].split(",")[0] for row in whole.values()}
    assert kinds == {"uniform", "variational", "tn"}


def test_rows_of_the_bound_are_those_of_the_library(trained: Path) -> None:
    """Variational: −bound(y) − log q(y | k) in bits/dim, y and log q from the trained flow."""
    found = rows(trained, "library", dequantization="variational", enable_bpd=False, num_examples=4)
    s = settings()
    data = datasets.load(s.data)
    params, name = load_dequantizer(s, data, trained, FOLDER)
    assert all(f"dequantiser {name}" in row["protocol"] for row in found.values())
    batch = next(data.eval_batches("test", batch_size=4))
    repeat = jax.random.fold_in(build.keys(s)["eval"], 0)
    keys = fold_in_each(repeat, jnp.asarray(batch["index"]))
    draw = build.dequantizer(s, data).draw(
        params, jnp.asarray(batch["image"]), fold_in_all(fold_in_all(keys, 0), 0)
    )
    model = build.score_model(s)
    score = model.score(loading.load_parameters(s, data, trained, 20))
    bound = variational_bound(
        score, s.sde, draw.x, fold_in_all(keys, 2),
        proposal=build.likelihood_tools(s).proposal, num_times=s.eval.num_times,
    )  # fmt: skip
    bits = (bound.nll + draw.log_q) / (64 * np.log(2))
    np.testing.assert_allclose([r["value"] for r in found.values()], bits, rtol=1e-4)


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
    dsm = rows(trained, "dsm", **shared, enable_bpd=False, num_times=16)
    form = rows(trained, "form", **shared, enable_bpd=False, num_times=16, dsm=False)
    a, b = (np.array([r["value"] for r in f.values()]) for f in (dsm, form))
    error = np.hypot(a.std(), b.std()) / np.sqrt(len(a))
    assert abs(a.mean() - b.mean()) < 4 * error
    data = rows(trained, "data", **shared, bound=False)
    noised = rows(trained, "noised", **shared, bound=False, ode_start="noised")
    a, b = (np.array([r["value"] for r in f.values()]) for f in (data, noised))
    error = np.hypot(a.std(), b.std()) / np.sqrt(len(a))
    assert abs(a.mean() - b.mean()) < 4 * error + 0.02
    assert "start noised" in next(iter(noised.values()))["protocol"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dequantization": "normal"}, r"eval.dequantization='normal'.*tn.*uniform.*variational"),
        ({"tn_tau": 0.0}, r"eval.tn_tau=0.0: need more than 0"),
        ({"num_importance": 0}, r"eval.num_importance=0: need at least 1"),
        ({"ode_start": "noise"}, r"eval.ode_start='noise'.*noised"),
    ],
)
def test_wrong_settings_are_named(trained: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rows(trained, "wrong", **changes)


def test_what_is_missing_or_does_not_fit_is_named(trained: Path) -> None:
    with pytest.raises(ValueError, match=r"no dequantiser in .*nothing: run --mode=train_deq"):
        run_lib.evaluate(settings(dequantizer=True), trained, "missing", "nothing")
    c = config(dequantizer=True)
    c.deq.filters = 8
    with pytest.raises(ValueError, match=r"deq\.filters: 4 in .*, now 8"):
        run_lib.evaluate(Settings.from_config(c), trained, "other", FOLDER)
    with pytest.raises(ValueError, match="plain name of a folder"):
        run_lib.train_dequantizer(settings(), trained, "a/b")


def test_points_need_no_dequantisation(tmp_path: Path) -> None:
    c = tiny.config("swissroll")
    c.eval.update(dequantization="tn", divergence="exact")
    c.training.n_iters = 5
    found = Settings.from_config(c)
    run_lib.train(found, tmp_path)
    with pytest.raises(ValueError, match=r"eval\.dequantization='tn'.*real values"):
        run_lib.evaluate(found, tmp_path, "eval")
    with pytest.raises(ValueError, match="variational dequantiser needs images"):
        run_lib.train_dequantizer(found, tmp_path, FOLDER)


def test_logit_data_have_no_truncated_normal() -> None:
    c = config()
    c.data.update(centered=False, logit=True)
    found = Settings.from_config(c)
    with pytest.raises(ValueError, match=r"'tn' with data\.logit=True"):
        build.dequantization(found, datasets.load(found.data), "tn")


def test_start_of_the_truncated_normal() -> None:
    """α h/σ = τ there, cells of the training grid; never before the smallest time."""
    found = settings()
    data = datasets.load(found.data)
    noise = build.dequantization(found, data, "tn")
    t = jnp.asarray(noise.start)
    ratio = float(found.sde.alpha(t) / found.sde.sigma(t)) / 17
    assert ratio == pytest.approx(3.0, rel=1e-3)
    early = dataclasses.replace(found, eval=dataclasses.replace(found.eval, tn_tau=1e4))
    assert build.dequantization(early, data, "tn").start == pytest.approx(1e-5)
