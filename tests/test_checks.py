"""Mistakes are told in one line: section, field, value, what is allowed."""

import dataclasses
import math
import os
import runpy
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import checks
import main
from checks import FieldError, in_section
from run_lib import config_files, evaluation_loop, folder, loading
from run_lib.experiment import Experiment
from run_lib.settings import Settings
from streams import Dataset, Finite, Host
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]


def test_a_section_is_added_once_and_only_where_it_lacks() -> None:
    with pytest.raises(FieldError, match=r"^model\.hidden=0: need") as error, in_section("deq"):
        with in_section("model"):
            checks.positive(hidden=0)
    assert (error.value.field, error.value.value) == ("model.hidden", 0)
    with pytest.raises(FieldError, match=r"^data\.levels=1: need two$"), in_section("model"):
        checks.require(False, "data.levels", 1, "two")
    with pytest.raises(FieldError, match=r"^model\.ch_mult\[1\]=0: need"), in_section("model"):
        checks.positive(**{"ch_mult[1]": 0})


def test_names_are_chosen_or_the_nearest_are_proposed() -> None:
    assert checks.choose({"a": 3}, "a", "x.y") == 3
    with pytest.raises(FieldError, match=r"^x\.y='evl': allowed \['eval', 'train'\]; did you mean"):
        checks.choose({"train": 0, "eval": 0}, "evl", "x.y")
    with pytest.raises(FieldError, match=r"^x=7: allowed \[1, 2\]$"):
        checks.one_of("x", 7, (1, 2))


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (int, [0, -5, 2**31 - 1], [2**31, 1.0, True, "1", None]),
        (float, [0, 1.5, -math.inf], [math.nan, "1.0", True, None]),
        (bool, [True, False], [0, "True", None]),
        (str, ["", "über"], ["\udcff", "a\0b", 1, None]),
        (tuple[float, ...], [(), (1, 2.5)], [[1.0], (1, "a"), (math.nan,), 3]),
    ],
)
def test_types_of_fields(kind: type, good: list, bad: list) -> None:
    for value in good:
        checks.of_type("f", value, kind)
    for value in bad:
        with pytest.raises(FieldError, match=r"^f="):
            checks.of_type("f", value, kind)


def build_all(config) -> None:
    """What a start checks of settings, without data."""
    split = Finite(4, np.zeros((4, 8, 8, 1), np.uint8).__getitem__)
    dataset = Dataset("digits", (8, 8, 1), 17, split, split)
    experiment = Experiment(Settings.from_config(config), dataset)
    assert None not in (experiment.sampler, experiment.solver, experiment.divergence)
    experiment.per_example_loss(train=True)
    assert experiment.state_like.ema_params


MLP = {"hidden": None, "depth": None, "embed_dim": None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.hidden": 0}, r"model\.hidden=0: need an integer of at least 1"),
        ({"model.dropout": 1.5}, r"model\.dropout=1.5: need 0 <= dropout < 1"),
        ({"model.activation": "swich"}, r"model\.activation='swich': allowed .*mean swish"),
        ({"model.ema_rate": 1.0}, r"model\.ema_rate=1.0: need"),
        ({"model.beta_min": 30.0}, r"model\.beta_min=30.0: need 0 < beta_min < beta_max=20.0"),
        (
            {"model.name": "ddpm", "model.ch_mult": (1,) * 5, **{f"model.{k}": None for k in MLP}},
            r"model\.ch_mult=\(1, 1, 1, 1, 1\): need images .* multiples of 16; .*\(1, 8, 8, 1\)",
        ),
        ({"training.smallest_time": 0.0}, r"training\.smallest_time=0.0: need 0 < t < T = 1.0"),
        ({"sampling.method": "ode", "sampling.rtol": 0.0}, r"sampling\.rtol=0.0: need more"),
        ({"sampling.method": "ode", "sampling.solver": "rk4"}, r"sampling\.solver='rk4': allowed"),
        ({"eval.atol": -1.0}, r"eval\.atol=-1.0: need more than 0"),
        ({"eval.solver": "rk4"}, r"eval\.solver='rk4': allowed"),
        ({"eval.divergence": "trace"}, r"eval\.divergence='trace': allowed"),
        ({"eval.num_probes": 0}, r"eval\.num_probes=0: need"),
        ({"deq.heads": 5}, r"deq\.heads=5: need a divisor"),
        ({"deq.filters": 0}, r"deq\.filters=0: need"),
        ({"seed": -1}, r"seed=-1: need 0 <= seed < 2\*\*32"),
        ({"seed": 2**32}, r"seed=4294967296: need 0 <= seed"),
        ({"training.n_iters": 2**31}, r"training\.n_iters=2147483648: need an integer, at most"),
        ({"training.alpha": math.nan}, r"training\.alpha=nan: need a number"),
        ({"data.path": "a\udcff"}, r"data\.path='a\\udcff': need a text in UTF-8"),
        ({"data.path": "a\0"}, r"data\.path='a\\x00': need a text"),
    ],
)
def test_a_wrong_value_is_told_with_its_section(changes: dict, message: str) -> None:
    config = tiny.config()
    for name, value in changes.items():
        section, _, field = name.rpartition(".")
        parent = config[section] if section else config
        parent[field] = value
    with pytest.raises(FieldError, match=f"^{message}") as error:
        build_all(config)
    assert "\n" not in str(error.value)


def test_a_config_is_resolved_as_it_was_given() -> None:
    config = tiny.config()
    config.training.update(smallest_time=1e-5, importance_smallest_time=5e-5)
    before = config.copy_and_resolve_references()
    settings = Settings.from_config(config)
    assert settings.training.smallest_time == 5e-5  # in force, with importance weighting
    assert settings.resolved()["training"]["smallest_time"] == 1e-5
    assert config == before


def test_the_config_of_a_run_is_a_config(tmp_path: Path) -> None:
    config = tiny.config()
    config.model.activation = "gelu"
    config.eval.trajectory_lmbds = (0.5, 1.0)
    config.training.importance_smallest_time = 5e-5
    settings = Settings.from_config(config)
    folder.write_json(tmp_path / "config.json", settings.resolved())
    again = Settings.from_config(config_files.load(str(tmp_path / "config.json")))
    assert again == settings
    assert again.resolved() == settings.resolved()


def test_the_config_of_a_unet_run_is_a_config_too(tmp_path: Path) -> None:
    """What follows from other fields, as whether the input is centred, is taken from them."""
    config = config_files.load(str(ROOT / "configs/vp/cifar10_ddpmpp_continuous.py"))
    folder.write_json(tmp_path / "config.json", Settings.from_config(config).resolved())
    again = config_files.load(str(tmp_path / "config.json"))
    again.data.centered = False
    assert not Settings.from_config(again).network.centered
    assert again.model.ch_mult == (1, 2, 2, 2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.py", None, "need an existing file"),
        ("a.yaml", "seed: 1", r"need a \.py file that has get_config\(\), or the config.json"),
        ("a.py", "x = 1", r"need a \.py file that has get_config\(\)"),
        ("a.py", "def get_config(:", "line 1: SyntaxError"),
        ("a.py", "\nimport nothing_of_this_name", "line 2: ModuleNotFoundError"),
        ("a.py", "\n\n1 / 0", "line 3: ZeroDivisionError"),
        ("a.py", "def get_config():\n    return 3", "need a ConfigDict .* not 3"),
        (
            "a.py",
            "from configs import base\ndef get_config():\n c = base.get_config()\n"
            " c.training.n_iters = 'many'\n return c",
            "line 4: TypeError",
        ),
        ("a.json", "[1]", r"need a \.py file"),
        ("a.json", '{"data": {"levels": "many"}}', "data.levels='many': need a value of type int"),
        ("a.json", '{"data": {"level": 3}}', "data.level=3: .*no such field; did you mean"),
        ("a.json", '{"dta": {}}', "config section='dta': allowed .*data"),
        ("a.json", '{"data": {', r"a\.json is damaged, or no JSON"),
        ("a.json", "\xff", r"a\.json is damaged, or no JSON"),
    ],
)
def test_a_wrong_config_file_is_told_in_one_line(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=message) as error:
        config_files.load(str(path))
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value) or name.endswith("json")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("seed", "7", 7),
        ("training.n_iters", "12", 12),
        ("optim.lr", "1e-3", 1e-3),
        ("optim.lr", "1", 1.0),
        ("training.continuous", "false", False),
        ("data.path", "", ""),
        ("data.path", "a=b", "a=b"),
        ("model.ch_mult", "1,2", (1, 2)),
        ("model.ch_mult", "(1,)", (1,)),
        ("model.ch_mult", "3", (3,)),
        ("eval.trajectory_lmbds", "[0.5, 1]", (0.5, 1)),
        ("model.hidden", "None", None),
        ("model.hidden", "", None),
        ("model.activation", "", None),
        ("training.n_iters", "None", 1_300_001),
        ("data.path", "None", ""),
    ],
)
def test_fields_are_changed_and_unset_by_texts(name: str, text: str, value: object) -> None:
    config = tiny.config()
    config.data.path = "before"
    config.lock()
    assert config_files.change(config, name, text) == value
    section, _, field = name.rpartition(".")
    assert (config[section] if section else config)[field] == value


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("training.n_iters", "1e3", r"training\.n_iters='1e3': need a whole number, as 1000"),
        ("optim.lr", "fast", r"optim\.lr='fast': need a number"),
        ("training.continuous", "maybe", r"training\.continuous='maybe': allowed"),
        ("model.ch_mult", "1,,2", r"model\.ch_mult='1,,2': need numbers"),
        ("training.bach_size", "3", r"training\.bach_size='3': .*mean training\.batch_size"),
        ("label", "3", r"label='3': the config has no such field"),
        ("data", "3", r"data='3': the config has no such field"),
        ("data.path.name", "3", "the config has no such field"),
        ("", "3", "the config has no such field"),
    ],
)
def test_texts_that_are_no_values_are_told(name: str, text: str, message: str) -> None:
    with pytest.raises(FieldError, match=message):
        config_files.change(tiny.config(), name, text)


def test_fields_are_separated_from_flags() -> None:
    fields, others = config_files.separate(
        ["--config=a.py", "--config.seed=3", "--config.data.path", "x y", "--config.data.logit",
         "--noconfig.data.centered", "-config.optim.lr=1", "--mode=train", "--", "--config.seed=4"]
    )  # fmt: skip
    assert others == ["--config=a.py", "--mode=train", "--", "--config.seed=4"]
    assert fields == [
        ("seed", "3"), ("data.path", "x y"), ("data.logit", "True"),
        ("data.centered", "False"), ("optim.lr", "1"),
    ]  # fmt: skip


def test_the_network_can_be_changed_by_unsetting_the_fields_of_another() -> None:
    config = config_files.load(str(ROOT / "configs/digits/vp.py"))
    config_files.change(config, "model.name", "ddpm")
    config_files.change(config, "model.parameterization", "noise")
    with pytest.raises(FieldError, match=r"model\.(channels|blocks|summary)=.*: used neither by"):
        Settings.from_config(config)
    for field in ("hidden", "channels", "blocks", "summary"):
        config_files.change(config, f"model.{field}", "None")
    assert type(Settings.from_config(config).network).__name__ == "DDPM"


def test_homes_of_nobody_are_no_paths() -> None:
    assert checks.path_of("data.path", "a/b") == Path("a/b")
    assert checks.path_of("data.path", "~/b").is_absolute()
    with pytest.raises(FieldError, match=r"data\.path='~nosuch/x': need the ~ of a user"):
        checks.path_of("data.path", "~nosuch/x")


CONFIG = "--config=tests/tiny_config.py"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([CONFIG, "--workdir=~nosuch/x", "--mode=train"], "--workdir='~nosuch/x': need the ~"),
        ([CONFIG, "--workdir=a\udcff", "--mode=train"], r"--workdir='a\\udcff': need a text"),
        ([CONFIG, "--workdir=README.md/x", "--mode=train"], "--workdir='README.md/x': need a fold"),
        ([CONFIG, "--workdir=nowhere", "--mode=eval"], "--workdir='nowhere': need a folder that"),
        ([CONFIG, "--workdir=x", "--mode=train,evaluate"], "--mode='evaluate': .*mean eval"),
        (["--config=none.py", "--workdir=x", "--mode=train"], "--config='none.py': need an exist"),
        (
            [CONFIG, "--workdir=x", "--mode=train", "--config.optim.lr=fast"],
            "optim.lr='fast': need a number",
        ),
    ],
)
def test_a_wrong_command_line_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr(main.interruption, "watch", lambda: None)
    monkeypatch.chdir(ROOT)
    with pytest.raises(FieldError, match=f"^{message}") as error:
        main._run(main.parse(["main.py", *arguments])[1:])
    assert "\n" not in str(error.value)
    assert not (ROOT / "x").exists()


@pytest.mark.parametrize("argument", ["more", "--wrkdir=x", "--num_processes=1e3"])
def test_flags_that_do_not_exist_are_told_in_one_line(capsys, argument: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main.parse(["main.py", CONFIG, "--workdir=x", "--mode=train", argument])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_more_examples_than_the_split_has_are_refused() -> None:
    config = tiny.config()
    config.eval.num_examples = 5
    settings = Settings.from_config(config)
    split = Finite(4, np.zeros((4, 8, 8, 1), np.uint8).__getitem__)
    dataset = Dataset("digits", (8, 8, 1), 17, split, split)
    with pytest.raises(FieldError, match=r"^eval\.num_examples=5: need 0 \(all\) to 4, the ex"):
        loading._check_split(settings.eval, dataset)
    loading._check_split(dataclasses.replace(settings.eval, num_examples=4), dataset)


@pytest.mark.parametrize(("batch_size", "number"), [(8, 20), (4, 3), (6, 600)])
def test_each_process_counts_its_own_examples(monkeypatch, batch_size: int, number: int) -> None:
    parts = []
    for index in range(2):
        monkeypatch.setattr(evaluation_loop.devices, "host", lambda i=index: Host(i, 2))
        parts.append(evaluation_loop._of_this_process(batch_size, number))
    split = Finite(number, lambda ids: ids)
    for part, host in zip(parts, (Host(0, 2), Host(1, 2)), strict=True):
        batches = Dataset("x", (), None, split, split).eval_batches(
            "test", batch_size=batch_size, host=host
        )
        assert part == {int(i) for batch in batches for i in batch["index"] if i >= 0}


class SignalAtImport:
    """A finder that sends the process a signal when it is asked for a module."""

    def find_spec(self, name: str, *_: object) -> None:
        if name == "jax":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10.0)


@pytest.mark.filterwarnings("ignore:os.fork")
def test_a_signal_during_the_imports_ends_in_one_line(monkeypatch) -> None:
    """In a fork, which imports JAX as if it were not there yet."""
    monkeypatch.chdir(ROOT)
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.modules.pop("jax")
            sys.meta_path.insert(0, SignalAtImport())
            runpy.run_path("main.py", run_name="__main__")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 75


def test_a_batch_of_an_evaluation_has_no_more_rows_than_there_are_examples() -> None:
    for wanted, number, size in ((1000, 12, 12), (8, 12, 8), (1000, 0, 24)):
        c = tiny.config()
        c.eval.update(batch_size=wanted, num_examples=number)
        assert evaluation_loop._batch_size(Experiment.from_config(c)) == size
