"""Whole runs with heads at tiny size, and heads that do not fit."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import run_lib
from configs import base
from run_lib.estimators import estimators
from run_lib.experiment import Experiment
from run_lib.loading import load_parameters
from tests.tiny import config

pytestmark = pytest.mark.usefixtures("compiled_at_o0")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.uniform_dequantization": False}, "uniform_dequantization with .*'cells'"),
        (
            {"model.parameterization": "atoms"},
            "uniform_dequantization with .*'atoms'.*: need False",
        ),
        ({"data.centered": False, "data.logit": True}, "data.logit with .*'cells'"),
        ({"data.dataset": "moons"}, "model.parameterization='cells': need 'mixture' or 'whitened'"),
        ({"model.rank": 1}, "model.rank=1: need at least 2"),
        ({"model.components": 4}, "model.components=4: used neither by"),
        ({"model.parameterization": "cell"}, "model.parameterization='cell': allowed .*cells"),
        ({"eval.elbo": True}, "eval.elbo=True with model.parameterization='cells'"),
        ({"model.parameterization": "mixture", "model.floor": 0.0}, "model.floor=0.0: need more"),
        ({"model.parameterization": "whitened", "model.whitening": "zca"}, "model.whitening='zca'"),
    ],
)
def test_heads_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    c = config()
    c.model.parameterization = "cells"
    for name, value in changes.items():
        section, field = name.split(".")
        c[section][field] = value
    with pytest.raises(ValueError, match=message):
        run_lib.train(Experiment.from_config(c), tmp_path)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("kind", ["cells", "atoms", "mixture", "whitened"])
def test_a_run_with_a_head_trains_evaluates_and_samples(tmp_path: Path, kind: str) -> None:
    """The prior is in the checkpoint; orders 2 and 3 and the residual go through the head."""
    c = config("digits" if kind in ("cells", "atoms") else "moons")
    c.data.uniform_dequantization = kind != "atoms"
    c.model.update(parameterization=kind, num_scales=10)
    c.training.update(n_iters=10)
    if kind in ("cells", "mixture"):
        c.training.update(score_matching_order=3, third_order_form="directional")
        c.training.update(alpha=0.1, fp_form="advective", fp_wgt_type="dimensionless")
    c.training.update(importance_weighting=False, time_law="adaptive", smallest_time=1e-3)
    c.eval.update(num_examples=12, dequantization="tn" if kind == "atoms" else "uniform")
    c.eval.update(curve_times=3, curve_examples=8)
    experiment = Experiment.from_config(c)
    run_lib.train(experiment, tmp_path)
    run_lib.evaluate(experiment, tmp_path, "eval")
    if kind in ("cells", "mixture"):
        run_lib.diagnose(experiment, tmp_path, "eval")
    rows = [
        json.loads(line) for line in (tmp_path / "eval" / "rows.jsonl").read_text().splitlines()
    ]
    found = {row["estimator"] for row in rows}
    assert {"ODE", "bound"} <= found
    assert ("discrete bound" in found) == (kind == "atoms")
    starts = {row["protocol"] for row in rows if row["estimator"] == "ODE"}
    assert all(("decoder" in protocol) == (kind in ("cells", "mixture")) for protocol in starts)
    terms = {"dsm", "frobenius", "third", "fp"} if kind in ("cells", "mixture") else {"dsm"}
    assert terms <= lines(tmp_path / "metrics.jsonl")[0].keys()
    prior = load_parameters(experiment, tmp_path, 10)["prior"]
    expected = experiment.with_prior({"network": {}})["prior"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), prior, expected)


def test_atoms_have_no_density_under_uniform_noise() -> None:
    """Their score pulls what lies between two levels to one of them, as fast as t_min allows."""
    c = config("digits")
    c.data.uniform_dequantization = False
    c.model.update(parameterization="atoms")
    names = {}
    for kind in ("uniform", "uniform,tn"):
        c.eval.update(dequantization=kind, enable_loss=False)
        names[kind] = [e.name for e in estimators(Experiment.from_config(c))]
    assert names == {
        "uniform": ["discrete bound"],
        "uniform,tn": ["ODE", "bound", "discrete bound"],
    }


def test_a_network_without_several_outputs_is_refused() -> None:
    c = base.get_config()
    c.model.update(name="ncsnv2_64", parameterization="cells")
    message = r"model.name='ncsnv2_64': need one of .*unet.* for .*cells"
    with pytest.raises(ValueError, match=message):
        Experiment.from_config(c)
