"""Training that starts from a given checkpoint, and --mode=import."""

from pathlib import Path

import jax
import numpy as np
import pytest

import run_lib
from checkpoints import Checkpoints
from run_lib import metrics, training
from run_lib.experiment import Experiment
from tests import tiny
from tests.test_importers import CASES, FIXTURES, STEPS, needs_fixtures

pytestmark = pytest.mark.usefixtures("compiled_at_o0")

NEW = 6  # steps of training after those of the checkpoint
BLOB = {"name": "ncsnpp", "nf": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "dropout": 0.1}


def config(folder_of_data: Path, case: str = "mle_ddpmpp_vp"):
    """A run of 16×16 images that the networks of the fixtures fit."""
    rng = np.random.default_rng(0)
    path = folder_of_data / "data.npz"
    if not path.exists():
        images = rng.integers(0, 256, (24, 16, 16, 3), np.uint8)
        np.savez(path, x_train=images, x_test=images[:8])
    c = tiny.config("npz")
    for field in ("hidden", "depth", "embed_dim"):
        c.model[field] = None
    c.data.update(path=str(path), image_size=16, num_channels=3, levels=256, num_test=0)
    c.model.update(**BLOB, attn_resolutions=(8,), parameterization="noise", time_label="time")
    c.training.update(n_iters=STEPS[case] + NEW, batch_size=8, n_jitted_steps=1, log_freq=1)
    c.training.update(eval_freq=20, snapshot_freq=1000, snapshot_freq_for_preemption=10)
    c.training.update(likelihood_weighting=False, importance_weighting=False)
    if case == "mle_ncsnpp_ve":
        c.data.centered = False
        c.model.update(fir=True, progressive_input="residual", embedding_type="fourier")
        c.model.update(parameterization="scaled_score", time_label="sigma", sigma_max=50.0)
        c.training.sde = "vesde"
    return c


@needs_fixtures
def test_training_goes_on_from_a_published_checkpoint(tmp_path):
    """Some steps: losses of the size that the moving average predicts; imported or by init_from."""
    c, first = config(tmp_path), STEPS["mle_ddpmpp_vp"]
    c.training.init_from = str(FIXTURES / "mle_ddpmpp_vp" / CASES["mle_ddpmpp_vp"])
    whole, direct = tmp_path / "whole", tmp_path / "direct"
    experiment = Experiment.from_config(c)
    training.import_checkpoint(experiment, whole)
    trainer = training.score_trainer(experiment, whole)
    predicted = trainer.task.held_out(trainer.state.ema_params)["loss"]
    trainer.checkpoints.close()
    run_lib.train(experiment, whole)
    losses = [row["loss"] for row in metrics.read_metrics(whole) if row["split"] == "train"]
    assert len(losses) == NEW
    assert np.isfinite(losses).all()
    assert 0.5 * predicted < np.mean(losses) < 2.0 * predicted
    run_lib.train(experiment, direct)
    like = experiment.state_like
    states = [Checkpoints(run).restore(first + NEW, like) for run in (whole, direct)]
    jax.tree.map(np.testing.assert_array_equal, *states)


@needs_fixtures
def test_a_published_file_in_checkpoints_meta_is_picked_up(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints-meta").mkdir(parents=True)
    for name in ("checkpoint_7", "checkpoint_10"):
        data = (FIXTURES / "mle_ddpmpp_vp" / "checkpoint_7").read_bytes()
        (run / "checkpoints-meta" / name).write_bytes(data)
    experiment = Experiment.from_config(config(tmp_path))
    assert training.given_checkpoint(experiment.settings, run).name == "checkpoint_10"
    training.import_checkpoint(experiment, run)
    assert Checkpoints(run).steps() == [350001]
    training.import_checkpoint(experiment, run)  # again: there is nothing left to do
    (run / "checkpoints" / "7").mkdir()
    with pytest.raises(ValueError, match="is not empty: use another --workdir"):
        training.import_checkpoint(experiment, run)


@needs_fixtures
def test_what_cannot_be_imported_is_refused_and_leaves_nothing(tmp_path):
    c, run = config(tmp_path), tmp_path / "run"
    with pytest.raises(ValueError, match="init_from='': say which checkpoint"):
        training.import_checkpoint(Experiment.from_config(c), run)
    c.training.init_from = str(FIXTURES / "mle_ncsnpp_ve" / "checkpoint_12")
    with pytest.raises(ValueError, match="does not fit the network"):
        training.import_checkpoint(Experiment.from_config(c), run)
    with pytest.raises(ValueError, match="does not fit the network"):
        run_lib.train(Experiment.from_config(c), run)
    c.training.init_from = str(FIXTURES / "mle_ddpmpp_vp" / "checkpoint_7")
    c.training.n_iters = 350001
    with pytest.raises(ValueError, match="n_iters=350001: need more than the 350001 steps"):
        run_lib.train(Experiment.from_config(c), run)
    assert [path.name for path in run.rglob("*") if path.is_file()] in ([], ["lock"])


def test_another_run_folder_can_be_the_start(tmp_path):
    c = tiny.config()
    run_lib.train(Experiment.from_config(c), tmp_path / "first")
    c.training.update(init_from=str(tmp_path / "first"), n_iters=30)
    run_lib.train(Experiment.from_config(c), tmp_path / "second")
    assert Checkpoints(tmp_path / "second").steps()[-1] == 30
    c.training.sde = "subvpsde"
    with pytest.raises(ValueError, match=r"training\.sde: 'vpsde' in"):
        run_lib.train(Experiment.from_config(c), tmp_path / "third")
    c.training.init_from = str(tmp_path)
    with pytest.raises(ValueError, match="the folder has no checkpoints/"):
        run_lib.train(Experiment.from_config(c), tmp_path / "third")
