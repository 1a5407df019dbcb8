"""DensityModel: known densities, contexts, images, a folder that the command line evaluates."""

import json
import logging
import pickle
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.stats import multivariate_normal, norm
from sklearn.base import clone

import npz_files
import run_lib
from checkpoints import whole_steps
from checksums import digest
from density_model import DensityModel
from dequantization import Reals
from records import Records
from run_lib import best_checkpoint, config_files, folder
from run_lib.experiment import Experiment
from standardization import Range

pytestmark = pytest.mark.usefixtures("compiled_at_o0")

MIX = np.array([[1.0, 0.5], [0.0, 2.0]])
FEW = {"training.n_iters": 400, "model.hidden": 32, "model.depth": 1, "eval.num_steps": 16}


def correlated(n, seed):
    return 5.0 + np.random.default_rng(seed).standard_normal((n, 2)) @ MIX


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A model of a Gaussian with correlations, whitened: exact before its first step."""
    changes = FEW | {"model.parameterization": "whitened"}
    workdir = tmp_path_factory.mktemp("model") / "run"
    return DensityModel(changes=changes, workdir=workdir).fit(correlated(2000, seed=0))


def test_the_density_is_that_of_the_data_in_their_units(fitted):
    x = correlated(1000, seed=1)
    values, errors = fitted.log_prob(x)
    truth = multivariate_normal([5.0, 5.0], MIX.T @ MIX).logpdf(x)
    assert values.shape == errors.shape == (1000,)
    assert (errors >= 0.0).all()
    assert errors.max() < 0.05
    gap = truth - values  # its mean is the divergence from the data to the model
    assert -3 * gap.std() / 1000**0.5 < gap.mean() < 0.05
    assert_allclose(fitted.score_samples(x), values)
    assert fitted.score(x) == pytest.approx(values.mean())
    # A density does not depend on its batch.
    assert_allclose(fitted.score_samples(x[:3])[1:], values[1:3], rtol=1e-4)


def test_samples_follow_the_data(fitted):
    x = fitted.sample(2000)
    assert x.shape == (2000, 2)
    assert_allclose(x.mean(0), 5.0, atol=0.25)
    assert_allclose(np.cov(x.T), MIX.T @ MIX, atol=0.5)
    assert_allclose(fitted.sample(3), x[:3], atol=0.05)  # of standard deviations of 1 and 2
    assert np.abs(fitted.sample(3, random_state=1) - x[:3]).max() > 0.5
    assert fitted._draw._cache_size() == 2  # compiled once for each number of samples


def test_calibration_tells_fresh_examples_from_shifted_ones(fitted):
    x = correlated(150, seed=2)
    found = fitted.calibration(x, n_samples=19)
    assert (found.levels.shape, found.ranks.shape) == ((150,), (150, 2))
    figures = found.figures()
    assert figures["level_p_value"] > 0.01
    assert figures["ranks_p_value"] > 0.01
    assert abs(figures["covered"][1] - 0.9) < 4 * figures["covered_standard_error"][1]
    shifted = fitted.calibration(x[:60] + np.array([0.0, 2.0]), n_samples=19).figures()
    assert shifted["ranks_p_value"] < 1e-4
    assert shifted["ranks_p_values"][0] > 1e-4 > shifted["ranks_p_values"][1]
    with pytest.raises(ValueError, match="n_samples=0: need at least 1"):
        fitted.calibration(x, n_samples=0)


def test_a_saved_model_is_the_same_and_the_command_line_evaluates_it(fitted, tmp_path):
    fitted.save(tmp_path / "copy")
    again, x = DensityModel.load(tmp_path / "copy"), correlated(7, seed=2)
    assert_allclose(again.score_samples(x), fitted.score_samples(x), rtol=1e-6)
    assert whole_steps(tmp_path / "copy") == [fitted.step_]
    held_out = np.load(tmp_path / "copy" / "data.npz")["x_test"]
    config = config_files.load(str(tmp_path / "copy" / "config.json"))  # as the command line does
    assert config.data.path == str(tmp_path / "copy" / "data.npz")
    config.eval.update(enable_sampling=False, bound=False)
    run_lib.evaluate(Experiment.from_config(config), tmp_path / "copy", "eval")
    (rows,) = Records(tmp_path / "copy" / "eval").tables(estimator="ODE")
    assert rows["step"] == fitted.step_
    values = [row["value"] for row in sorted(rows, key=lambda row: row["index"])]
    assert_allclose(-again.score_samples(held_out), values, rtol=1e-4)
    pickled = pickle.loads(pickle.dumps(fitted))  # also after log_prob has compiled
    assert_allclose(pickled.score_samples(x), fitted.score_samples(x), rtol=1e-6)
    with pytest.raises(FileExistsError):
        fitted.save(tmp_path / "copy")


def test_the_checkpoint_with_the_least_bound_is_chosen(fitted, monkeypatch):
    """It is measured once; a training that begins anew is measured anew."""
    path = fitted.workdir_ / "held_out.json"
    stored = json.loads(path.read_text())
    bounds = {int(step): value for step, value in stored["bounds"].items()}
    assert len(bounds) > 4
    assert 0 in bounds  # the start is one of them
    rows = best_checkpoint.held_out_bound(fitted.experiment_)(fitted.params_)
    assert_allclose(rows, stored["values"][str(fitted.step_)], rtol=1e-4)
    found = rows.mean()
    assert found == pytest.approx(bounds[fitted.step_], rel=1e-4)
    assert found < min(bounds.values()) + rows.std() / 200**0.5
    held_out = np.load(fitted.workdir_ / "data.npz")["x_test"]
    values = -fitted.score_samples(held_out)
    assert found == pytest.approx(values.mean(), abs=0.3)  # one bound and another
    last = max(bounds)
    values = {step: [1.0, 2.0] for step in stored["values"]} | {str(last): [0.0, 1.0]}
    other = stored | {"values": values}
    path.write_text(json.dumps(other))
    monkeypatch.setattr(best_checkpoint, "held_out_bound", None)
    assert best_checkpoint.best_step(fitted.workdir_, fitted.experiment_) == last
    path.write_text(json.dumps(other | {"run": "another"}))
    with pytest.raises(TypeError, match="not callable"):  # it would be measured
        best_checkpoint.best_step(fitted.workdir_, fitted.experiment_)
    path.write_text(json.dumps(stored))


def test_the_earliest_checkpoint_that_cannot_be_told_from_the_best_is_chosen():
    """By half a standard error of the difference: of the paired one, not of the means."""
    noise = np.random.default_rng(0).normal(size=100)
    zero, spread = np.zeros(100), noise - noise.mean()
    error = spread.std(ddof=1) / 10.0
    for excess, step in ((0.4, 20), (0.6, 30)):
        values = {30: 50.0 * noise, 20: 50.0 * noise + spread + excess * error, 10: zero + 100.0}
        assert best_checkpoint.chosen(values) == step
    assert best_checkpoint.chosen({0: np.ones(1), 10: np.zeros(1)}) == 10
    assert best_checkpoint.chosen({5: np.ones(4)}) == 5
    bad = np.array([1.0, np.nan, 1.0, 1.0])
    assert best_checkpoint.chosen({0: bad, 5: np.ones(4), 9: bad}) == 5
    with pytest.raises(FloatingPointError, match=r"held-out examples \[1\] of it"):
        best_checkpoint.chosen({0: bad, 5: bad})


def test_a_density_ends_where_its_range_does(tmp_path):
    """A logit and a logarithm of a Gaussian, which the head gives exactly before its first step."""

    def drawn(n, seed):
        z = np.random.default_rng(seed).standard_normal((n, 2)) @ MIX
        return np.stack([6.0 / (1.0 + np.exp(-z[:, 0])), np.exp(z[:, 1])], axis=1), z

    changes = FEW | {"model.parameterization": "whitened", "training.n_iters": 16}
    changes |= {"data.lower": np.zeros(2), "data.upper": (np.float64(6), None)}
    model = DensityModel(changes=changes, workdir=tmp_path / "run").fit(drawn(4000, seed=0)[0])
    x, z = drawn(1000, seed=1)
    slopes = np.log(x[:, 0] * (1.0 - x[:, 0] / 6.0) * x[:, 1])
    truth = multivariate_normal([0.0, 0.0], MIX.T @ MIX).logpdf(z) - slopes
    gap = truth - model.score_samples(x)
    assert abs(gap.mean()) < 0.05
    assert gap.std() < 0.2
    samples = model.sample(500)
    assert (samples > 0.0).all()
    assert (samples[:, 0] < 6.0).all()
    assert_allclose(np.log(samples[:, 1]).std(), np.linalg.norm(MIX[:, 1]), atol=0.2)
    again = DensityModel.load(tmp_path / "run")
    values, errors = again.log_prob(np.array([x[0], [6.0, 1.0], [3.0, -1.0], x[1]]))
    assert_allclose(values[[0, 3]], model.score_samples(x[:2]), rtol=1e-4)
    assert np.isneginf(values[1:3]).all()
    with pytest.raises(ValueError, match=r"X='rows \[1\] outside': need rows between data.lower"):
        again.calibration(np.array([x[0], [6.5, 1.0]]), n_samples=2)
    assert np.isfinite(errors).all()


def test_an_example_whose_cell_reaches_beyond_an_end_is_refused():
    """Noise in its cell would be cut off at the end, where the logit is without bound."""
    known = Range(np.array([0.0]), np.array([np.inf]))
    encoding, model = Reals(widths=np.array([0.5]), range=known), DensityModel()
    model.experiment_ = SimpleNamespace(encoding=encoding, dataset=SimpleNamespace(shape=(1,)))
    assert model._inside(np.array([[0.25], [3.0], [-1.0]])).tolist() == [True, True, False]
    with pytest.raises(ValueError, match=r"X=\[\[0\.2\]\]: need values whose cells"):
        model._inside(np.array([[3.0], [0.2]]))


def test_a_density_given_numbers():
    """y | c ~ N(3 c, ½²): the mean follows the context."""
    rng = np.random.default_rng(3)
    c = rng.standard_normal(1500)
    y = 3.0 * c + 0.5 * rng.standard_normal(1500)
    model = DensityModel(changes=FEW | {"training.n_iters": 500}).fit(y[:, None], context=c)
    given = np.array([-1.0, 0.0, 1.0]).repeat(100)
    points = 3.0 * given + 0.5 * rng.standard_normal(300)
    gap = norm(3.0 * given, 0.5).logpdf(points) - model.score_samples(points[:, None], given)
    assert -3 * gap.std() / 300**0.5 < gap.mean() < 0.2
    drawn = model.sample(300, given)[:, 0] - 3.0 * given
    assert abs(drawn.mean()) < 0.2
    assert 0.3 < drawn.std() < 0.8
    with pytest.raises(ValueError, match="context=None: need floats"):
        model.sample(3)
    with pytest.raises(ValueError, match=r"one for each of 2 examples"):
        model.score_samples(points[:2, None], given)
    with pytest.raises(ValueError, match=r"value \[1, 0\] of context"):
        model.score_samples(points[:2, None], np.array([0.0, np.nan]))
    with pytest.raises(ValueError, match=r"value \[0, 0\] of X"):
        model.score_samples(np.array([[np.nan]]), np.zeros(1))
    with pytest.raises(ValueError, match=r"n_samples=0: need at least 1"):
        model.sample(0, np.zeros(0))


@pytest.mark.parametrize(
    ("x", "options", "said"),
    [
        (np.array([[1.0, np.nan]] * 30), {}, r"value \[0, 1\] of X"),
        (np.ones(4), {}, r"X=\(4,\): need at least two examples, .* X\[:, None\]"),
        (np.eye(4), {"context": np.full(4, np.inf)}, r"value \[0\] of context"),
        (np.eye(4), {"context": np.ones(3)}, r"context=\(3,\): need one for each of 4 examples"),
        (np.eye(4, dtype=np.uint8), {}, r"X='uint8 \(4, 4\)': need uint8 images"),
    ],
    ids=["NaN", "shape", "infinity", "context", "bytes"],
)
def test_what_has_no_density_is_refused(x, options, said):
    with pytest.raises(ValueError, match=said):
        DensityModel(changes=FEW).fit(x, **options)


def test_a_refused_fit_leaves_no_data_that_another_would_miss(tmp_path):
    x = correlated(40, seed=4)
    x[:, 1] = 3.0
    for _ in range(2):
        with pytest.raises(ValueError, match="coordinate 1: constant"):
            DensityModel(changes=FEW, workdir=tmp_path).fit(x, context=None)
    for name, value, said in (
        ("eval.enable_bpd", False, "=False: need True"),
        ("eval.bound", False, "=False: need True"),
        ("eval.offset", False, "=False: need True"),
        ("seed", 3, "need fields of a config, without"),
        ("data.path", "other.npz", "need fields of a config, without"),
    ):
        with pytest.raises(ValueError, match=said):
            DensityModel(changes={name: value}, workdir=tmp_path).fit(np.eye(9))
    cells = {"model.parameterization": "cells"}
    with pytest.raises(ValueError, match="need 'mixture' or 'whitened' for real-valued data"):
        DensityModel(changes=cells, workdir=tmp_path).fit(correlated(40, seed=1))
    images = np.random.default_rng(0).integers(0, 255, (9, 4, 4)).astype(np.uint8)
    atoms = {"model.parameterization": "atoms", "data.uniform_dequantization": False}
    with pytest.raises(ValueError, match=r"model\.parameterization='atoms': need cells"):
        DensityModel(changes=atoms, workdir=tmp_path).fit(images)
    assert not (tmp_path / "checkpoints").exists()


def test_a_fit_that_made_no_step_does_not_bar_its_folder(tmp_path):
    """The start is written before training: what is refused then leaves it; another fit goes on."""
    changes = FEW | {"training.n_iters": 50, "model.hidden": 8}
    wrong = changes | {"training.alpha": 0.1, "model.time_label": "reverse_index"}
    with pytest.raises(ValueError, match="reverse_index"):
        DensityModel(changes=wrong, workdir=tmp_path).fit(correlated(60, seed=1))
    assert whole_steps(tmp_path) == [0]
    with pytest.raises(ValueError, match="the folder of a fit that has ended"):
        DensityModel.load(tmp_path)
    model = DensityModel(changes=changes, workdir=tmp_path).fit(correlated(50, seed=2))
    assert whole_steps(tmp_path) == [0, 50]
    assert model.shape_ == (2,)


def test_a_saved_start_is_a_model_that_another_fit_leaves(tmp_path):
    """A fit whose choice was the checkpoint before the first step."""
    changes = FEW | {"training.n_iters": 4}
    model = DensityModel(changes=changes, random_state=np.int64(3)).fit(correlated(60, seed=1))
    model.at_step(0).save(tmp_path / "copy")
    before = (tmp_path / "copy" / "data.npz").read_bytes()
    copy = DensityModel.load(tmp_path / "copy")
    with pytest.raises(ValueError, match="holds a model of other data"):
        clone(copy).fit(correlated(60, seed=2))
    assert whole_steps(tmp_path / "copy") == [0]
    assert (tmp_path / "copy" / "data.npz").read_bytes() == before
    assert_allclose(copy.score_samples(np.full((1, 2), 5.0)), model.score_samples([[5.0, 5.0]]))


def test_two_fits_at_once_do_not_share_a_folder(tmp_path):
    """Nothing is deleted or written before the second one is refused."""
    with ThreadPoolExecutor(1) as another, folder.alone(tmp_path):
        fit = another.submit(DensityModel(workdir=tmp_path).fit, correlated(60, seed=1))
        with pytest.raises(ValueError, match="is in use by process"):
            fit.result()
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    with folder.alone(tmp_path), folder.alone(tmp_path):
        pass


@pytest.mark.parametrize("seed", [None, -1, 2**32, 0.5, np.random.RandomState(0)])
def test_a_random_state_is_a_whole_number(seed):
    with pytest.raises(ValueError, match=r"random_state=.*: need a whole number, 0 to 4294967295"):
        DensityModel(random_state=seed).fit(correlated(60, seed=1))


def test_a_fit_tells_its_progress_and_that_y_is_not_used(fitted, capsys):
    """The fits are there already; what is logged comes to the standard error once."""
    for verbose in (True, False):
        changes, x = fitted.changes, correlated(2000, seed=0)
        model = DensityModel(changes=changes, workdir=fitted.workdir_, verbose=verbose)
        root, logging.root.handlers = logging.root.handlers, []
        try:
            with pytest.warns(UserWarning, match=r"fit\(y, context=x\)"):
                model.fit(x, np.ones(2000))
        finally:
            logging.root.handlers = root
        said = capsys.readouterr().err
        assert said.count("is chosen by the held-out examples") == verbose
    assert logging.getLogger("fokker").handlers == []


def test_a_folder_keeps_the_model_that_it_holds(fitted):
    before = (fitted.workdir_ / "data.npz").read_bytes()
    with pytest.raises(ValueError, match="holds a model of other data"):
        DensityModel(changes=fitted.changes, workdir=fitted.workdir_).fit(correlated(50, seed=9))
    assert (fitted.workdir_ / "data.npz").read_bytes() == before
    others = fitted.changes | {"optim.lr": 0.5, "training.n_iters": 200}
    with pytest.raises(ValueError, match=r"changes='optim\.lr: 0\.001 in .*training\.n_iters: 400"):
        DensityModel(changes=others, workdir=fitted.workdir_).fit(correlated(2000, seed=0))
    given = npz_files.read(fitted.workdir_ / "data.npz", ())["x_test"]
    x = correlated(2000, seed=0)
    held_out = np.flatnonzero(np.isin(x[:, 0], given[:, 0]))
    other = DensityModel(changes=fitted.changes, workdir=fitted.workdir_, random_state=5)
    with pytest.raises(ValueError, match=r"changes='seed: 0 in .*, now 5"):
        other.fit(x, held_out=held_out)
    again = DensityModel(changes=fitted.changes, workdir=fitted.workdir_)
    assert again.fit(correlated(2000, seed=0)).step_ == fitted.step_


def test_a_misspelt_field_and_another_shape_are_refused(fitted):
    with pytest.raises(ValueError, match=r"training\.n_iter='3'.*n_iters"):
        DensityModel(changes={"training.n_iter": 3}).fit(np.random.default_rng(0).random((9, 2)))
    with pytest.raises(ValueError, match=r"X=\(3, 5\): need \[n, 2\], as in fit"):
        fitted.score_samples(np.ones((3, 5)))
    with pytest.raises(ValueError, match="the model was fitted without"):
        fitted.sample(2, context=np.ones(2))
    assert clone(fitted).get_params() == fitted.get_params()


def test_chosen_examples_are_held_out(tmp_path):
    x, changes = correlated(60, seed=3), FEW | {"training.n_iters": 4}
    model = DensityModel(changes=changes, workdir=tmp_path / "a").fit(x, held_out=[7, 3, 50])
    found = npz_files.read(tmp_path / "a" / "data.npz", ())
    assert_allclose(found["x_test"], x[[3, 7, 50]])
    assert_allclose(found["x_train"], np.delete(x, [3, 7, 50], axis=0))
    last = model.params_
    assert model.at_step(0).step_ == 0
    assert digest(model.params_) != digest(last)
    with pytest.raises(ValueError, match="no checkpoint of step 3"):
        model.at_step(3)
    assert model.step_ == 0
    assert digest(model.at_step(4).params_) == digest(last)
    for wrong in ([60], [-1], [3, 3], [], list(range(60)), [0.5]):
        with pytest.raises(ValueError, match=r"held_out=.*: need numbers of some, not all, of"):
            DensityModel(workdir=tmp_path / "b").fit(x, held_out=wrong)
