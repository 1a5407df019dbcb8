"""Imports only go down the layers; TensorFlow stays out unless an image set is asked for."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOT_MODULES = [path for path in ROOT.glob("*.py") if path.stem != "setup"]

# Level of every module; run_lib has levels of its own.
LEVELS = {
    "checks": -2, "json_files": -1, "lazy_tensorflow": -1, "image_arrays": 0.5, "image_files": 0,
    "decoding": 4,
    "taylor": -1, "operators": 0, "models": 0, "sde_base": 0.5, "sde_lib": 1, "time_sampling": 2,
    "torch_files": 0, "tfrecords": 0, "array_records": 0, "json_lines": 0, "importers": 7,
    "flow_importer": 7.5,    "npz_files": 0, "classifier": 6, "evaluation": 7,
    "parameterization": 2, "dequantization": 2, "toy_data": 2, "high_order": 3,
    "fokker_planck": 3, "ode": 3, "terms": 4, "losses": 5, "likelihood": 4, "elbo": 7,
    "sampling": 6, "train_state": 6, "records": 6, "diagnostics": 6, "checksums": 0,
    "checkpoints": 7,
    "streams": 3, "point_samplers": 3, "restarted": 2, "datasets": 7, "plotting": 7, "version": -2,
    "marginals": 0, "tails": 0, "standardization": 1, "splits": 5,
    "real_arrays": 6, "array_files": 6.5, "tables": 6, "heads": 1.5, "real_heads": 1.7,
    "baselines": 3, "run_lib": 8, "default_configs": 8.5, "fitting": 8, "density_model": 9,
    "density_ensemble": 10, "main": 9,
    "posterior_sampling": 7, "twisted": 7.5, "measurements": 1,
}  # fmt: skip
RUN_LIB = {
    "sections": 0, "settings": 1, "training_data": 1, "config_files": 2, "devices": 1,
    "folder": 2, "comparison": 2,
    "choices": 3, "describe": 3, "calibration": 4, "guide": 5,
    "experiment": 2, "interruption": 3, "identities": 3, "metrics": 3, "estimators": 3,
    "baseline_estimators": 4, "conditional_estimators": 4, "classification": 4,
    "sampling_loop": 4, "image_check": 4, "figures": 4, "loading": 4, "trainer": 4,
    "measured": 3, "drawing": 6, "quality": 5, "best_checkpoint": 5, "report": 5, "page": 6,
    "training": 7, "dequantizer_training": 8, "evaluation_loop": 9, "diagnosis_loop": 10,
    "modes": 11, "__init__": 12,
}  # fmt: skip


def imported(path: Path) -> set[str]:
    """Modules imported anywhere in a file, dotted."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_module_has_a_level() -> None:
    modules = {path.stem for path in ROOT_MODULES} | {"models", "run_lib"}
    assert modules == LEVELS.keys()
    assert {p.stem for p in (ROOT / "run_lib").glob("*.py")} == RUN_LIB.keys()


MODULES = [*ROOT_MODULES, *(ROOT / "models").glob("*.py"), *(ROOT / "run_lib").glob("*.py")]


@pytest.mark.parametrize("path", sorted(MODULES), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_imports_go_down(path: Path) -> None:
    own = path.parent.name if path.parent != ROOT else path.stem
    level = LEVELS[own]
    used = {name.split(".")[0] for name in imported(path)} & LEVELS.keys() - {own}
    assert all(LEVELS[name] < level for name in used), used


@pytest.mark.parametrize("path", sorted((ROOT / "run_lib").glob("*.py")), ids=lambda p: p.stem)
def test_run_lib_imports_go_down(path: Path) -> None:
    level = RUN_LIB[path.stem]
    names = {
        name.removeprefix("run_lib.") for name in imported(path) if name.startswith("run_lib.")
    }
    used = {name.split(".")[0] for name in names} & RUN_LIB.keys()
    assert all(RUN_LIB[name] < level for name in used), used


def test_configs_import_ml_collections_only() -> None:
    for path in (ROOT / "configs").rglob("*.py"):
        roots = {name.split(".")[0] for name in imported(path)}
        assert roots <= {"ml_collections", "configs"}, path


def loaded_after(code: str) -> set[str]:
    """Top-level modules loaded in a fresh process that runs `code`, compiled as users compile."""
    script = f"{code}\nimport sys; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    output = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
    ).stdout  # fmt: skip
    return set(output.splitlines()[-1].split())


@pytest.mark.slow
def test_all_below_run_lib_do_not_load_tensorflow() -> None:
    modules = ", ".join(name for name, level in LEVELS.items() if level <= 7)
    assert "tensorflow" not in loaded_after(f"import {modules}")


@pytest.mark.slow
def test_a_whole_run_on_embedded_data_does_not_load_tensorflow(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
import run_lib
from run_lib import figures
from run_lib.experiment import Experiment
from tests import tiny
from tests.conftest import SMALL_FIGURES
vars(figures).update(SMALL_FIGURES)
experiment, workdir = Experiment.from_config(tiny.config()), Path({str(tmp_path)!r})
run_lib.train(experiment, workdir)
run_lib.evaluate(experiment, workdir, "eval")
Experiment.from_config(tiny.config("swissroll")).dataset
"""
    loaded = loaded_after(code)
    assert "tensorboardX" in loaded
    assert "tensorflow" not in loaded


@pytest.mark.slow
def test_each_script_of_the_command_line_explains_itself() -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "main.py", *arguments], cwd=ROOT, capture_output=True, text=True
        )

    assert "python main.py --workdir=" in run("--help").stdout
    config = "--config=configs/digits/vp.py"
    later = run(config, "--workdir=unused", "--mode=train,evaluate")
    assert later.returncode == 2
    assert "did you mean eval" in later.stderr
    wrong = run(config, "--workdir=unused", "--mode=train", "--config.training.bach_size=3")
    assert wrong.returncode != 0
    assert "batch_size" in wrong.stderr
    missing = run("--config=configs/digits/nothing.py", "--workdir=unused", "--mode=train")
    assert missing.returncode != 0
    assert "nothing.py" in missing.stderr
    assert not (ROOT / "unused").exists()
