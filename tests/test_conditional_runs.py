"""Whole runs of p(x | c) at tiny size, from the command line's side; contexts that do not fit."""

import json
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from checkpoints import whole_steps
from records import Records
from run_lib import identities, modes
from run_lib.experiment import Experiment
from run_lib.loading import load_parameters
from run_lib.sampling_loop import Generator
from tests import tiny

pytestmark = pytest.mark.usefixtures("compiled_at_o0")


def config(**data: Any):
    c = tiny.config()
    c.data.update(data)
    c.training.update(n_iters=10, snapshot_freq=10)
    c.eval.update(num_examples=12, curve_times=2, curve_examples=8)
    return c


def run(c, workdir: Path, names: str) -> Experiment:
    experiment, command = Experiment.from_config(c), modes.Command(workdir)
    modes.check(experiment, command, names.split(","))
    for name in names.split(","):
        modes.MODES[name].run(experiment, command)
    return experiment


def values(rows: list[dict], name: str) -> np.ndarray:
    found = {row["index"]: row["value"] for row in rows if row["estimator"] == name}
    return np.asarray([found[index] for index in sorted(found)])


def test_a_run_with_classes(tmp_path: Path) -> None:
    """Trains, goes on as if never stopped, evaluates p(x | c) and p(x), classifies, samples."""
    c = config(context="class")
    c.training.update(context_dropout=0.25, snapshot_sampling=True, microbatch=8)
    c.eval.update(classify=True, num_repeats=2, bound=False, baselines=True)
    whole = run(c, tmp_path / "whole", "train,eval,diagnose")
    c.training.n_iters = 5
    run(c, tmp_path / "parts", "train")
    c.training.n_iters = 10
    run(c, tmp_path / "parts", "train")
    params = [load_parameters(whole, tmp_path / name, 10) for name in ("whole", "parts")]
    jax.tree.map(np.testing.assert_array_equal, *params)
    assert params[0]["context_embedding"]["classes"].shape == (10, 16)

    target = tmp_path / "whole" / "eval"
    rows = list(Records(target).rows.values())
    protocols = {row["estimator"]: row["protocol"] for row in rows}
    assert {name for name in protocols if "ODE" in name} == {
        "ODE", "ODE unconditional", "ODE information", "class by ODE",
    }  # fmt: skip
    assert protocols["ODE"].endswith(", given class")
    assert "given" not in protocols["ODE unconditional"]
    gap = values(rows, "ODE unconditional") - values(rows, "ODE")
    found = [row for row in rows if row["estimator"] == "ODE information"]
    np.testing.assert_allclose(values(rows, "ODE information"), 64 * gap, rtol=1e-6)
    assert {row["unit"] for row in found} == {"bits"}
    assert len(found) == 24
    (classes,) = json.loads((target / "classification.json").read_text())
    assert np.sum(classes["confusion"]) == 24
    assert "Classes by Bayes" in (tmp_path / "whole" / "report.html").read_text()
    assert "given class of test" in (target / "samples_10" / "protocol.json").read_text()
    page = (Path(__file__).parents[1] / "docs" / "reference" / "files.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    assert 'Path("runs/digits_vp/eval")' in code
    names: dict[str, Any] = {}
    exec(code.replace("runs/digits_vp/eval", str(target)), names)
    assert len(names["log_p"]) == 12
    last = {row["index"]: row["value"] for row in rows if row["estimator"] == "ODE"}
    assert names["log_p"] == {index: -value for index, value in last.items()}
    before = len(rows)
    run(c, tmp_path / "whole", "eval")
    assert len(Records(target).rows) == before


def test_a_run_with_values_and_their_samples(tmp_path: Path) -> None:
    """A U-Net sees numbers; sample i has the numbers of example i, whatever the batch."""
    rng = np.random.default_rng(0)
    x, vectors = rng.integers(0, 16, (40, 4, 4)).astype(np.uint8), rng.normal(size=(40, 3))
    np.savez(
        tmp_path / "mine.npz", x_train=x[:24], x_test=x[24:],
        context_train=vectors[:24], context_test=vectors[24:],
    )  # fmt: skip
    c = config(dataset="npz", path=str(tmp_path / "mine.npz"), context="values", num_test=0)
    c.data.levels = 16
    c.model.update(parameterization="cells")
    c.model.update(name="unet", channels=(8,), blocks=(1,), hidden=None, depth=None)
    c.eval.update(enable_bpd=False, enable_loss=True)
    experiment = run(c, tmp_path / "run", "train,eval")
    rows = Records(tmp_path / "run" / "eval").rows.values()
    assert {row["estimator"] for row in rows} == {"bound", "loss"}
    assert all(row["protocol"].endswith("given values") for row in rows)
    params = load_parameters(experiment, tmp_path / "run", 10)
    params |= {"network": jax.tree.map(  # what ten steps learned would be lost in rounding
        lambda a: a + np.float32(0.5 * rng.normal(size=a.shape)), params["network"]
    )}  # fmt: skip
    draw = Generator(experiment, experiment.keys["samples"], 8, "test")
    whole = draw(params, 20)
    later = draw.batch(params, np.arange(16, 24), 20)["samples"]
    np.testing.assert_array_equal(later, whole[16:])
    vars(experiment.dataset)["test"].context[16 % 16] += 30.0
    changed = draw(params, 20)
    moved = np.flatnonzero(np.any(changed != whole, axis=(1, 2, 3))).tolist()
    assert set(moved) <= {0, 16}
    assert moved


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.context": "clas"}, r"^data\.context='clas': allowed .*; did you mean class"),
        (
            {"data.context": "values"},
            r"^data\.context='values': need '' for data\.dataset='digits', which has none; 'val",
        ),
        (
            {"data.context": "class", "data.dataset": "moons"},
            r"^data\.context='class': need '' for data\.dataset='moons', .* y_train and y_test",
        ),
        (
            {"data.context": "class", "model.name": "concat_mlp", "model.embed_dim": None,
             "model.dropout": None},
            r"^model\.name='concat_mlp': need one of \['ddpm', 'mlp', 'ncsnpp', 'unet'\]",
        ),
        ({"training.context_dropout": 1.0}, r"^training\.context_dropout=1.0: need 0 <= context"),
        ({"training.context_dropout": 0.1}, r"^training\.context_dropout=0.1: need 0 without"),
        ({"eval.classify": True}, r"^eval\.classify=True: need False, or data\.context='class'"),
        (
            {"eval.classify": True, "data.context": "class", "eval.enable_bpd": False,
             "eval.bound": False},
            r"^eval\.classify=True: need False, or eval\.enable_bpd=True or eval\.bound=True",
        ),
    ],
)  # fmt: skip
def test_contexts_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    c = tiny.config()
    for name, value in changes.items():
        section, field = name.split(".")
        c[section][field] = value
    with pytest.raises(ValueError, match=message):
        run(c, tmp_path, "train,eval")
    assert not whole_steps(tmp_path)


def test_values_of_a_file_are_checked(tmp_path: Path, caplog) -> None:
    """Their number, their shapes, NaN; vectors are standardised, large images are told."""
    x = np.zeros((4, 4, 4), np.uint8)
    x[0] = 200
    good = np.ones((4, 2))

    def load(train: np.ndarray, test: np.ndarray) -> Experiment:
        np.savez(tmp_path / "a.npz", x_train=x, x_test=x, context_train=train, context_test=test)
        c = config(dataset="npz", path=str(tmp_path / "a.npz"), context="values", levels=256)
        c.data.num_test = 0
        experiment = Experiment.from_config(c)
        assert experiment.dataset.context is not None
        return experiment

    for bad, said in (
        (good[:3], r"context_train of .*need one for each image or example of x_train, 4"),
        (np.where(good > 0, np.nan, 0), r"value \[0, 0\] of the context beside x_train .* is nan"),
        (good.astype(str), r"need numbers \[n, \*c\], alike in both splits"),
        (np.ones((4, 3)), r"need numbers \[n, \*c\], alike in both splits"),
    ):
        with pytest.raises(ValueError, match=said):
            load(bad, good)
    found = load(np.array([[1.0], [3.0], [1.0], [3.0]]), np.full((4, 1), 3.0)).dataset
    np.testing.assert_array_equal(found.train.context[:, 0], [-1, 1, -1, 1])
    np.testing.assert_array_equal(found.test.context, 1)
    with caplog.at_level(logging.WARNING, logger="fokker"):
        load(np.full((4, 4, 4, 1), 1000.0), np.ones((4, 4, 4, 1)))
    assert "the contexts reach 1000" in caplog.text


def test_a_context_counts_in_identities_only_where_there_is_one() -> None:
    """The network is told of it by the data: no field of `model` says it."""
    plain, given = (Experiment.from_config(config(context=name)) for name in ("", "class"))
    assert "context" not in given.settings.resolved()["model"]
    assert identities.settings_digest(plain) != identities.settings_digest(given)
    assert plain.dataset.digests != given.dataset.digests
    assert "examples, given one of 10 classes" in given.dataset.describe()


def test_the_network_of_an_import_is_known_without_reading_data() -> None:
    c = config(dataset="cifar10", image_size=32, num_channels=3, path="/nowhere", levels=256)
    assert Experiment.from_config(c).context is None
