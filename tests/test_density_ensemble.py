"""DensityEnsemble: the mean of densities, disjoint held-out parts, one step, turns in sampling."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

import npz_files
from density_ensemble import DensityEnsemble
from run_lib import best_checkpoint

pytestmark = pytest.mark.usefixtures("compiled_at_o0")

FEW = {"training.n_iters": 32, "model.hidden": 32, "model.depth": 1, "eval.num_steps": 16}


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    """Three members of few steps each."""
    rng = np.random.default_rng(5)
    c = rng.standard_normal(90)
    y = c + 0.3 * rng.standard_normal(90)
    workdir = tmp_path_factory.mktemp("ensemble") / "run"
    model = DensityEnsemble(
        3, changes=FEW | {"training.n_iters": 32}, workdir=workdir, verbose=False
    )
    return model.fit(y[:, None], context=c), c, y


def test_an_ensemble_is_the_mean_of_the_densities_of_its_members(ensemble):
    model, c, y = ensemble
    each = np.stack([m.score_samples(y[:20, None], c[:20]) for m in model.models_])
    values, errors = model.log_prob(y[:20, None], c[:20])
    assert_allclose(values, np.log(np.exp(each).mean(axis=0)), rtol=1e-6)
    assert np.ptp(each, axis=0).min() > 0.0  # the members differ
    worst = np.max([m.log_prob(y[:20, None], c[:20])[1] for m in model.models_], axis=0)
    assert ((errors >= 0.0) & (errors <= worst + 1e-12)).all()
    assert model.score(y[:20, None], context=c[:20]) == pytest.approx(values.mean())


def test_members_hold_out_disjoint_tenths_and_share_a_step(ensemble):
    model = ensemble[0]
    parts = [npz_files.read(m.workdir_ / "data.npz", ())["x_test"] for m in model.models_]
    assert [len(part) for part in parts] == [9, 9, 9]
    assert len(np.unique(np.concatenate(parts))) == 27
    assert {m.step_ for m in model.models_} == {model.step_}
    stored = [
        json.loads((m.workdir_ / "held_out.json").read_text())["values"] for m in model.models_
    ]
    together = {int(s): np.concatenate([values[s] for values in stored]) for s in stored[0]}
    assert model.step_ == best_checkpoint.chosen(together)
    assert len({m.random_state for m in model.models_}) == 3


def test_samples_of_an_ensemble_take_turns(ensemble):
    model, c, _ = ensemble
    found = model.sample(7, c[:7], random_state=4)
    for number, member in enumerate(model.models_):
        ids = np.arange(number, 7, 3)
        alone = member.sample(len(ids), c[ids], random_state=4 + 1000 * number)
        assert_allclose(found[ids], alone)
    assert model.sample(2, c[:2]).shape == (2, 1)


def test_a_saved_ensemble_is_the_same(ensemble, tmp_path):
    model, c, y = ensemble
    model.save(tmp_path / "copy")
    for folder in (tmp_path / "copy", model.workdir_):
        again = DensityEnsemble.load(folder)
        assert again.step_ == model.step_
        assert_allclose(
            again.score_samples(y[:5, None], c[:5]), model.score_samples(y[:5, None], c[:5])
        )
    with pytest.raises(ValueError, match=r"folder=.*: need one that holds ensemble\.json"):
        DensityEnsemble.load(tmp_path)
    for members in (1, 11):
        with pytest.raises(ValueError, match=f"members={members}: need 2 to 10"):
            DensityEnsemble(members).fit(y[:, None])
    with pytest.raises(ValueError, match="need at least 6 examples"):
        DensityEnsemble(3).fit(y[:5, None])
