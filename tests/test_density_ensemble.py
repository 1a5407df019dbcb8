"""DensityEnsemble: the mean of densities, disjoint held-out parts, one step, members drawn."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

import fitting
import json_files
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
    model = DensityEnsemble(3, changes=FEW, workdir=workdir, verbose=False)
    return model.fit(y[:, None], context=c), c, y


def test_an_ensemble_is_the_mean_of_the_densities_of_its_members(ensemble):
    model, c, y = ensemble
    each = np.stack([m.score_samples(y[:20, None], c[:20]) for m in model.models_])
    values, errors = model.log_prob(y[:20, None], c[:20])
    assert_allclose(values, np.log(np.exp(each).mean(axis=0)), rtol=1e-6)
    assert np.ptp(each, axis=0).min() > 0.0  # the members differ
    assert errors.shape == (20,)
    assert model.score(y[:20, None], context=c[:20]) == pytest.approx(values.mean())


@pytest.mark.filterwarnings("error")
def test_errors_are_weighted_by_the_densities():
    class Known:
        def __init__(self, *found) -> None:
            self.found = np.array(found[0]), np.array(found[1])

        def log_prob(self, X, context):
            return self.found

    none = -np.inf
    model = DensityEnsemble(2)
    model.models_ = [
        Known([np.log(0.1), 1000.0, -1000.0, none, none], [0.2, 0.1, 0.1, 0.0, 0.0]),
        Known([np.log(0.3), 999.0, -999.0, 2.0, none], [0.4, 0.3, 0.3, 0.5, 0.0]),
    ]
    values, errors = model.log_prob(None)
    e = np.exp(1.0)
    expected = [np.log(0.2), 1000 + np.log((1 + 1 / e) / 2), -999 + np.log((1 + 1 / e) / 2)]
    assert_allclose(values, [*expected, 2.0 - np.log(2.0), none], rtol=1e-12)
    assert_allclose(errors, [0.35, (0.1 * e + 0.3) / (e + 1), (0.1 + 0.3 * e) / (e + 1), 0.5, 0.0])


@pytest.mark.parametrize("members", [2, 3, 7, 10])
def test_held_out_parts_are_disjoint_and_of_equal_size(members):
    for number in range(2 * members, 60):
        found = fitting.parts(number, members, 0)
        together = np.concatenate(found)
        assert len({len(part) for part in found}) == 1
        assert len(found) == members
        assert len(np.unique(together)) == len(together) >= members
    assert [len(part) for part in fitting.parts(100_000, members, 0)] == [2000] * members


def test_members_hold_out_disjoint_tenths_and_share_a_step(ensemble):
    model = ensemble[0]
    parts = [npz_files.read(m.workdir_ / "data.npz", ())["x_test"] for m in model.models_]
    assert [len(part) for part in parts] == [9, 9, 9]
    assert len(np.unique(np.concatenate(parts))) == 27
    assert {m.step_ for m in model.models_} == {model.step_}
    stored = [json_files.read(m.workdir_ / "held_out.json")["values"] for m in model.models_]
    together = {int(s): np.concatenate([values[s] for values in stored]) for s in stored[0]}
    assert model.step_ == best_checkpoint.chosen(together)
    assert len({m.random_state for m in model.models_}) == 3


def test_samples_are_of_members_drawn_at_random(ensemble):
    """Each member has its share of one context, and a sample stays when more are drawn."""
    model, c, _ = ensemble
    found = model.sample(60, np.full(60, c[0]), random_state=4)[:, 0]
    counts, members = [], np.full(60, -1)
    for number, member in enumerate(model.models_):
        own = member.sample(60, np.full(60, c[0]), random_state=4 + 1000 * number)[:, 0]
        ids = np.flatnonzero(np.isin(found, own))
        assert_allclose(found[ids], own[: len(ids)], rtol=1e-5)
        members[ids] = number
        counts.append(len(ids))
    assert sum(counts) == 60
    assert min(counts) >= 10
    assert (np.diff(members) == 1).sum() < 40  # not in turn
    assert_allclose(model.sample(7, np.full(7, c[0]), random_state=4)[:, 0], found[:7], rtol=1e-3)


def test_a_saved_ensemble_is_the_same(ensemble, tmp_path):
    model, c, y = ensemble
    model.save(tmp_path / "copy")
    for folder in (tmp_path / "copy", model.workdir_):
        again = DensityEnsemble.load(folder)
        assert again.step_ == model.step_
        assert_allclose(
            again.score_samples(y[:5, None], c[:5]), model.score_samples(y[:5, None], c[:5])
        )
    assert again.config.training.n_iters == 32
    with pytest.raises(FileExistsError):
        model.save(tmp_path / "copy")
    with pytest.raises(ValueError, match="one for each of 3 examples"):
        model.sample(3, c[:4])
    with pytest.raises(
        ValueError, match=r"random_state=4294967295: need a whole number, 0 to 4294965295"
    ):
        DensityEnsemble(3, random_state=2**32 - 1).fit(y[:, None])
    with pytest.raises(ValueError, match=r"folder=.*: need one that holds ensemble\.json"):
        DensityEnsemble.load(tmp_path)
    for members in (1, 11):
        with pytest.raises(ValueError, match=f"members={members}: need 2 to 10"):
            DensityEnsemble(members).fit(y[:, None])
    with pytest.raises(ValueError, match="need at least 6 examples"):
        DensityEnsemble(3).fit(y[:5, None])
