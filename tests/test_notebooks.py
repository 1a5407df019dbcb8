"""The notebooks run, in few steps, and say what their text promises."""

import json
import re
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest

from tests.test_import_mode import BLOB, config
from tests.test_importers import CASES, FIXTURES, needs_fixtures

pytestmark = pytest.mark.usefixtures("compiled_at_o0")
FOLDER = Path(__file__).resolve().parents[1] / "docs" / "notebooks"
# The network and the steps of the solver are most of the time of these tests.
SET_STEPS = '"training.n_iters": STEPS'
FEW_STEPS = f'{SET_STEPS}, "eval.num_steps": 6, "training.n_jitted_steps": 10, "model.hidden": 32'
HERE = {  # the modules of the package are at the top level of the repository
    "from fokker import DensityModel": "from density_model import DensityModel",
    "from fokker import DensityEnsemble": "from density_ensemble import DensityEnsemble",
    "from fokker import run_lib": "import run_lib",
    "from fokker.": "from ",
}
FEW_IMAGES = {"(images, test_size=100,": "(images, train_size=100, test_size=16,"}


def executed(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **values: object) -> dict:
    """The names that a notebook leaves behind when some of its constants have other values."""
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text())
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    code = "\n".join(cells)
    for old, new in (HERE | FEW_IMAGES).items():
        code = code.replace(old, new)
    for constant, value in values.items():
        code, found = re.subn(rf"(?m)^{constant} = .*$", f"{constant} = {value!r}", code)
        assert found == 1, constant
    assert "fokker" not in code
    code = code.replace(SET_STEPS, FEW_STEPS)
    monkeypatch.chdir(folder)
    mpl.use("Agg")
    names: dict = {}
    exec(code, names)
    return names


def test_the_density_of_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = executed("density_of_a_table", tmp_path, monkeypatch, STEPS=50)
    assert names["log_p"].shape == (120,)
    assert names["log_p"].mean() > -5.0  # that of the start, with one mixture for each column
    assert names["drawn"].shape == (449, 4)


def test_a_conditional_density(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = executed("conditional_density", tmp_path, monkeypatch, MEMBERS=2, STEPS=50, K=9)
    assert names["ranks"].shape == (100,)
    assert -6.5 < names["log_p"].mean() < -5.0
    assert 0.5 < names["inside"][1] <= 1.0


def test_bits_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny network, few images and few equal steps in the place of what convolutions cost."""
    changes = {"training.n_iters": 2, "data.levels": 17, "training.batch_size": 16,
               "model.channels": "(4,)", "model.blocks": "(1,)", "model.summary": 0,
               "eval.num_steps": 8, "eval.num_times": 8}  # fmt: skip
    names = executed("bits_of_your_images", tmp_path, monkeypatch, STEPS=2, changes=changes)
    assert 2.0 < names["bits"].mean() < 4.1  # a histogram has 2.40, equal levels have 4.09
    assert [picture.shape for picture in names["rows"]] == [(8, 8, 8)] * 3


@needs_fixtures
def test_a_published_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = "mle_ddpmpp_vp"
    small = config(tmp_path)
    small.eval.num_times = 4
    (tmp_path / "small.json").write_text(small.to_json_best_effort())
    names = executed(
        "published_checkpoint", tmp_path, monkeypatch, CONFIG="small.json", EXAMPLES=4,
        CHECKPOINT=str(FIXTURES / case / CASES[case]), DATA=str(tmp_path / "data.npz"),
    )  # fmt: skip
    assert names["score"](names["x"], names["jnp"].full(2, 0.5)).shape == (2, 16, 16, 3)
    assert np.isfinite(names["value"].mean)
    assert BLOB["name"] == names["config"].model.name
