"""What a command leaves out: config, run folder and modes by default; help and version."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import main
from checks import FieldError
from run_lib import config_files
from run_lib.choices import choices, folder_of
from tests import tiny
from version import VERSION

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.py") if "get_config" in p.read_text())


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_a_command_that_says_nothing_trains_and_evaluates_the_digits() -> None:
    chosen = choices(None, None, None)
    assert chosen.config.to_dict() == config_files.load("configs/digits/vp.py").to_dict()
    assert (chosen.workdir, chosen.modes) == (Path("runs/digits_vp"), "train,eval")
    assert chosen.by_default == (
        "--config=configs/digits/vp.py --workdir=runs/digits_vp --mode=train,eval"
    )


def test_what_is_said_is_taken_as_it_is() -> None:
    chosen = choices("configs/mnist/vp.py", "here", "eval", ["eval.num_times=3", "seed=1"])
    assert chosen.config.data.dataset == "npz"
    assert (chosen.workdir, chosen.modes, chosen.by_default) == (Path("here"), "eval", "")
    assert chosen.changed == {"eval.num_times": 3, "seed": 1}
    assert choices(None, "here", "eval").by_default == "--config=configs/digits/vp.py"


def test_every_config_has_a_folder_of_its_own() -> None:
    files = [str(path.relative_to(ROOT)) for path in CONFIGS]
    assert len({folder_of(file, {}) for file in files}) == len(files) > 70
    assert folder_of("configs/score_flow/vp/x.py", {}) == Path("runs/score_flow_vp_x")
    assert folder_of(str(ROOT / "configs/digits/vp.py"), {}) == Path("runs/digits_vp")
    assert folder_of("configs.py", {}) == Path("runs/configs")
    one, other = folder_of("../a/vp.py", {}), folder_of("../b/vp.py", {})
    assert one != other
    assert one.parent == other.parent == Path("runs")


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        (["training.score_matching_order=3"], "digits_vp-score_matching_order=3"),
        (["optim.lr=1e-3", "data.path=~/a b/x.npz"], "digits_vp-path=a_b_x.npz-lr=0.001"),
        (["eval.num_times=3", "sampling.lmbd=1", "deq.n_iters=9"], "digits_vp"),
        (["training.batch_size=64", "seed=42"], "digits_vp"),  # as the config has them
        (["seed=1"], "digits_vp-seed=1"),
    ],
)
def test_another_training_has_another_folder(fields: list[str], name: str) -> None:
    assert choices(None, None, None, fields).workdir == Path("runs", name)


def test_long_names_are_cut_and_differ() -> None:
    names = {folder_of("a.py", {"data.path": "x" * 300 + end}).name for end in "yz"}
    assert len(names) == 2
    assert all(len(name) <= 100 for name in names)


def test_a_run_folder_is_its_own_config(tmp_path: Path) -> None:
    config = tiny.config()
    (tmp_path / "config.json").write_text(config.to_json())
    chosen = choices(None, str(tmp_path), None, ["eval.num_times=3"])
    config.eval.num_times = 3
    assert chosen.config.to_dict() == config.to_dict()
    assert chosen.source == str(tmp_path / "config.json")
    assert chosen.by_default == f"--config={tmp_path}/config.json --mode=train,eval"
    with pytest.raises(FieldError, match=rf"--workdir=None: need a run folder, as {tmp_path}, w"):
        choices(chosen.source, None, None)


def test_a_config_is_looked_for_beside_the_program_last(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert choices(None, None, None).config.data.levels == 17
    own = tmp_path / "configs/digits/vp.py"
    own.parent.mkdir(parents=True)
    own.write_text("from tests.tiny import config as get_config\n")
    assert choices(None, None, None).config.model.name == "mlp"


def run(*arguments: str, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "main.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


def test_what_prints_and_runs_nothing(tmp_path: Path) -> None:
    said = run("--describe", "--workdir=x", "--config.optim.lr=1e-3", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert "  > lr                           0.001          learning rate" in said.stdout
    assert not os.listdir(tmp_path)


def test_help_tells_five_commands_and_the_flags_of_this_program(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main.parse(["main.py", "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert said.count("  python main.py") == 5
    flags = {line.split()[0] for line in said.splitlines() if line.startswith("  --")}
    assert flags == {f"--{flag.name}" for flag in main.OWN_FLAGS} | {"--config.FIELD", "--helpfull"}
    assert max(map(len, said.splitlines())) <= 100


def test_the_version_is_told(capsys, monkeypatch) -> None:
    monkeypatch.setattr(main.FLAGS["version"], "value", False)
    with pytest.raises(SystemExit) as stop:
        main.parse(["main.py", "--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"fokker {VERSION}\n"
