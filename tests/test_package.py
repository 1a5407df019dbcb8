"""The package: one top-level name, and in an empty folder all that the repository does."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml

import setup
from tests.test_architecture import imported
from version import VERSION

ROOT = Path(__file__).resolve().parents[1]
WITHOUT = shutil.ignore_patterns(".*", "runs", "build", "dist", "tests", "__pycache__")
# What the core has to do without.
BLOCKED = ("tensorflow", "tensorflow_datasets", "tensorflow_gan", "tensorflow_hub", "tf_keras")


def run(arguments: list[str], folder: Path, *path: Path) -> str:
    """What Python says in this folder, where only these folders and its packages are imported."""
    quick = {"JAX_NUM_CPU_DEVICES": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    variables = os.environ | quick | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of this repository, built without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=WITHOUT)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", "."]
    path = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    run(["-m", "pip", "wheel", *options, "./source"], folder, *map(Path, path))
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel is installed, and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    options = ["--no-deps", "--no-index", "--quiet", "--target", str(target)]
    run(["-m", "pip", "install", *options, str(wheel)], target)
    return target


@pytest.fixture(scope="module")
def blocked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the modules that the core does without cannot be imported."""
    folder = tmp_path_factory.mktemp("blocked")
    for name in BLOCKED:
        (folder / f"{name}.py").write_text("raise ImportError('blocked')\n")
    return folder


def test_one_name_is_installed_and_no_module_imports_another(installed: Path) -> None:
    names = {path.name for path in installed.iterdir()}
    assert names == {"fokker", f"fokker-{VERSION}.dist-info", "bin"}
    assert os.listdir(installed / "bin") == ["fokker"]
    modules = list((installed / "fokker").rglob("*.py"))
    for path in modules:
        roots = {name.split(".")[0] for name in imported(path)}
        assert not roots & setup.OWN, path
    here = [path for path in ROOT.glob("*.py") if path.stem != "setup"]
    here += [path for root in setup.ROOTS for path in (ROOT / root).rglob("*.py")]
    generated = {Path("__init__.py"), Path("__main__.py")}
    expected = {path.relative_to(ROOT) for path in here} | generated
    assert {path.relative_to(installed / "fokker") for path in modules} == expected
    assert (installed / "fokker/py.typed").exists()


def test_lines_keep_their_numbers(installed: Path) -> None:
    for name in ("main.py", "run_lib/evaluation_loop.py", "configs/digits/vp.py"):
        before = (ROOT / name).read_text().splitlines()
        after = (installed / "fokker" / name).read_text().splitlines()
        assert len(before) == len(after)
        changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
        assert all(re.match(r"\s*(from|import) ", a) and "fokker" in b for a, b in changed)


def test_metadata_tell_version_extras_and_the_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        texts = {Path(name).name: archive.read(name).decode() for name in archive.namelist()}
    metadata = Parser().parsestr(texts["METADATA"])
    assert metadata["Version"] == VERSION
    assert metadata.get_all("Provides-Extra") == ["images", "tables", "cuda12", "tpu", "test"]
    required = metadata.get_all("Requires-Dist")
    core = [line for line in required if "extra ==" not in line]
    assert any(line.startswith("jax<") for line in core)
    assert not [line for line in core if "tensorflow" in line or "keras" in line]
    images = [line for line in required if 'extra == "images"' in line.replace("'", '"')]
    assert any(line.startswith("tensorflow-gan==") for line in images)
    assert "fokker = fokker.__main__:run" in texts["entry_points.txt"]
    classifiers = metadata.get_all("Classifier")
    assert {f"Programming Language :: Python :: 3.{n}" for n in (11, 12, 13)} <= set(classifiers)


def test_every_requirement_stands_in_one_file() -> None:
    """requirements.txt and requirements-test.txt only refer to the files of the package."""
    files = {path.stem: path.read_text() for path in (ROOT / "requirements").glob("*.txt")}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["dynamic"]
    assert files.keys() == extras["optional-dependencies"].keys() | {"core", "docs", "benchmarks"}
    for name in ("requirements.txt", "requirements-test.txt"):
        lines = [line for line in (ROOT / name).read_text().splitlines() if line[:1] != "#"]
        assert all(line.startswith("-r requirements") for line in lines)
    names = [re.split(r"[<>=\[]", line)[0] for text in files.values() for line in text.split("\n")]
    names = [name for name in names if name and name[0] != "#" and name != "jax"]
    assert len(names) == len(set(names))


def test_changes_and_citation_are_of_this_version() -> None:
    (first, *_) = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert first == citation["version"] == VERSION
    assert citation["license"] == project["license"] == "Apache-2.0"
    assert citation["authors"] == project["authors"] == [{"name": "The Fokker authors"}]
    assert all(work["url"].startswith("https://arxiv.org/abs/") for work in citation["references"])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("import losses", "from fokker import losses"),
        ("import losses as l", "from fokker import losses as l"),
        ("import losses, optax", "from fokker import losses; import optax"),
        ("import run_lib.folder as f", "import fokker.run_lib.folder as f"),
        ("import models.mlp", "import fokker.models.mlp; from fokker import models"),
        ("from models.mlp import (\n    MLP,\n)", "from fokker.models.mlp import (\n    MLP,\n)"),
        (
            "def f():\n    from  losses import x  # y",
            "def f():\n    from fokker.losses import x  # y",
        ),
        ("'é'; import losses; import os", "'é'; from fokker import losses; import os"),
        ("import lossesx, jax.losses\nfrom jax import losses", None),
        ("from . import losses\n'import losses'\nx = losses", None),
    ],
)
def test_only_imports_of_own_modules_are_rewritten(before: str, after: str | None) -> None:
    assert setup.renamed(before, {"losses", "models", "run_lib"}) == (after or before)


@pytest.mark.slow
def test_the_library_example_runs_in_an_empty_folder(
    installed: Path, blocked: Path, tmp_path: Path
) -> None:
    """The first of the docs with the prefix, and fewer steps."""
    page = (ROOT / "docs" / "guides" / "library.md").read_text()
    example = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    assert example.count(": 1000}") == 1
    code = setup.renamed(example.replace(": 1000}", ": 50}"))
    check = "\nimport fokker; fokker.DensityEnsemble; "
    check += "print('is', fokker.__version__, log_p.mean(), fokker.__file__)"
    said = run(["-c", code + check], tmp_path, installed, blocked)
    version, mean, file = re.search(r"(?m)^is (\S+) (\S+) (\S+)$", said).groups()
    assert "is chosen by the held-out examples" in said  # the progress of a fit
    assert version == VERSION
    assert -50.0 < float(mean) < 2.0
    assert Path(file).parent == installed / "fokker"
    assert not os.listdir(tmp_path)


@pytest.mark.slow
def test_the_demo_begins_in_an_empty_folder_without_tensorflow(
    installed: Path, blocked: Path, tmp_path: Path
) -> None:
    """Twenty steps of the digits, by the config in the package."""
    fields = ["n_iters=20", "log_freq=10", "snapshot_sampling=False"]
    arguments = ["--mode=train", *(f"--config.training.{field}" for field in fields)]
    said = run(["-m", "fokker", *arguments], tmp_path, installed, blocked)
    assert "by default: --config=configs/digits/vp.py --workdir=runs/digits_vp-" in said
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "checkpoints/20").is_dir()
    assert (folder / "report.html").exists()
    assert os.listdir(tmp_path) == ["runs"]


@pytest.mark.slow
def test_the_command_explains_itself(installed: Path, tmp_path: Path) -> None:
    said = run([str(installed / "bin/fokker"), "--help"], tmp_path, installed)
    assert said.count("\n  fokker ") == 5
    assert "main.py" not in said
    assert not os.listdir(tmp_path)
