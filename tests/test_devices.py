"""The same run on 1 and 4 devices and in two processes: losses, rows and samples are equal."""

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax._src.distributed import global_state

import run_lib
from checkpoints import whole_steps
from records import Records
from run_lib import devices, metrics, sampling_loop
from run_lib.experiment import Experiment
from run_lib.trainer import Progress
from tests import tiny
from tests.processes import ROOT, finish, free_port, start, start_together

pytestmark = pytest.mark.usefixtures("compiled_at_o0", "four_devices")

CONFIG = f"--config={ROOT / 'tests' / 'tiny_config.py'}"
# Ten examples in batches of 8: the second batch has none for the second process.
FIELDS = [
    "--config.training.stratified=True",
    "--config.training.log_freq=5",
    "--config.eval.batch_size=8",
    "--config.eval.num_examples=10",
    "--config.eval.num_samples=12",
]
LAYOUTS = ("1", "4", "2x2")  # devices, of this process or in two processes of their own


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run folder of every layout, trained and evaluated by `main.py`."""
    root = tmp_path_factory.mktemp("layouts")
    for name in LAYOUTS:
        arguments = [CONFIG, f"--workdir={root / name}", "--mode=train,eval", *FIELDS]
        if name == "4":
            assert jax.device_count() == 4
            run_here(root / name)
            continue
        processes = [start(arguments)] if name == "1" else start_together(arguments)
        said = finish(processes)
        assert "process 0 of" in said[0]
        assert "open " in said[0]
        if len(said) == 2:  # the second one tells what it is and no more
            assert "waiting up to 300 s for 2 processes at 127.0.0.1" in said[0]
            assert "process 1 of 2" in said[1]
            assert "step" not in said[1]
    return {name: root / name for name in LAYOUTS}


def run_here(workdir: Path) -> None:
    config = tiny.config()
    config.training.update(stratified=True, log_freq=5)
    config.eval.update(batch_size=8, num_examples=10, num_samples=12)
    run_lib.train(Experiment.from_config(config), workdir)
    run_lib.evaluate(Experiment.from_config(config), workdir, "eval")


def lines(run: Path) -> list[dict]:
    """metrics.jsonl without the clock."""
    return [{k: v for k, v in row.items() if k != "time"} for row in metrics.read_metrics(run)]


def samples(run: Path) -> np.ndarray:
    return np.concatenate([p["samples"] for p in sampling_loop.read(run / "eval/samples_20", 12)])


def by_example(run: Path) -> dict[tuple, dict]:
    """Rows by their key, without the identity of parameters that differ in their last digits."""
    return {key[:-1]: row for key, row in Records(run / "eval").rows.items()}


@pytest.mark.parametrize("layout", ["4", "2x2"])
def test_losses_are_equal(runs: dict[str, Path], layout: str) -> None:
    alone, here = lines(runs["1"]), lines(runs[layout])
    assert [row["step"] for row in alone] == [5, 10, 10, 15, 20, 20]
    assert len({row["loss"] for row in alone}) == 6
    for one, other in zip(alone, here, strict=True):
        assert other == {
            k: v if isinstance(v, str) else pytest.approx(v, rel=1e-5) for k, v in one.items()
        }


@pytest.mark.parametrize("layout", ["4", "2x2"])
def test_rows_and_samples_are_equal(runs: dict[str, Path], layout: str) -> None:
    one, other = (by_example(runs[name]) for name in ("1", layout))
    assert len(one) == 2 * 10
    assert other.keys() == one.keys()
    for key, row in one.items():
        assert other[key]["value"] == pytest.approx(row["value"], rel=2e-4), key
    alone, here = samples(runs["1"]), samples(runs[layout])
    assert alone.shape == here.shape == (12, 8, 8, 1)
    assert len(np.unique(alone)) > 3
    assert np.mean(alone != here) < 0.01  # a value at the edge of a grey level may fall to it


def test_every_process_writes_its_rows_and_only_the_missing_ones(runs: dict[str, Path]) -> None:
    """After one process has lost all its rows, only it has something to do."""
    where, before = runs["2x2"] / "eval", Records(runs["2x2"] / "eval").rows
    names = ("rows.jsonl", "rows-1.jsonl")
    count = lambda: [len((where / n).read_text().splitlines()) for n in names]  # noqa: E731
    assert count() == [2 * 6, 2 * 4]
    (where / "rows-1.jsonl").unlink()
    arguments = [CONFIG, f"--workdir={runs['2x2']}", "--mode=eval", *FIELDS]
    finish(start_together(arguments))
    assert count() == [2 * 6, 2 * 4]
    after = Records(where).rows
    assert {k: r["value"] for k, r in after.items()} == {k: r["value"] for k, r in before.items()}


def wait_for_step(workdir: Path, step: int, seconds: float = 120.0) -> int:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = whole_steps(workdir)
        if max(found, default=0) >= step:
            return max(found)
        time.sleep(0.01)
    raise TimeoutError(f"no checkpoint of step {step} in {workdir}")


def test_a_run_goes_on_with_other_devices(tmp_path: Path) -> None:
    """Begun on 4 devices and killed, continued on 1 and killed, ended on 4: as if undisturbed."""
    arguments = [CONFIG, f"--workdir={tmp_path / 'moved'}", "--mode=train", *FIELDS]
    endless = [*arguments, "--config.training.n_iters=100000"]
    step = 0
    for number in (4, 1):
        process = start(endless, devices=number)
        wait_for_step(tmp_path / "moved", step + 10)  # beyond where it began
        process.kill()
        process.communicate()
        step = wait_for_step(tmp_path / "moved", 0)
    last = whole_steps(tmp_path / "moved")[-1] + 10
    assert last < 100000
    config = tiny.config()
    config.training.update(stratified=True, n_iters=last)
    assert jax.device_count() == 4
    for name in ("moved", "alone"):
        run_lib.train(Experiment.from_config(config), tmp_path / name)
    moved, alone = (lines(tmp_path / name) for name in ("moved", "alone"))
    assert [(r["step"], r["split"]) for r in moved if r["split"] == "train"] == [
        (step, "train") for step in range(5, last + 1, 5)
    ]
    assert moved[-1]["step"] == alone[-1]["step"] == last
    assert moved[-1]["loss"] == pytest.approx(alone[-1]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("nowhere", 2, 0), "--coordinator='nowhere': need HOST:PORT"),
        (("here:12a", 2, 0), "--coordinator='here:12a': need HOST:PORT"),
        (("here:1234", None, 0), "--num_processes=None: need at least 1"),
        (("here:1234", 2, None), "--process_id=None: need 0 to 1"),
        (("here:1234", 2, 2), "--process_id=2: need 0 to 1"),
        (("", 2, None), "--num_processes=2: need --coordinator=HOST:PORT with it"),
        (("", None, 1), "--process_id=1: need --coordinator=HOST:PORT with it"),
    ],
)
def test_mistakes_of_the_command_line_are_named(flags: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        devices.connect(*flags)


@pytest.mark.parametrize(
    ("variables", "joined"),
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"}, False),
        ({"SLURM_STEP_NUM_TASKS": "16"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ],
)
def test_launchers_are_recognised(monkeypatch, variables: dict[str, str], joined: bool) -> None:
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **kwargs: calls.append(kwargs))
    devices.connect("", None, None)
    assert len(calls) == joined


def test_open_mpi_without_an_address_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.delenv("OMPI_MCA_orte_hnp_uri", raising=False)
    with pytest.raises(ValueError, match=r"Open MPI 5 .* --coordinator=HOST:PORT"):
        devices.connect("", None, None)


def test_a_coordinator_that_does_not_answer_is_told(monkeypatch) -> None:
    monkeypatch.setattr(devices, "CONNECT_S", 1)
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(
        ValueError, match=f"--coordinator={address}: process 0 did not answer in 1 s"
    ):
        devices.connect(address, 2, 1)


def test_processes_wait_for_each_other_by_the_coordination_service(monkeypatch) -> None:
    """Not by a collective of devices, which gives up after 30 s; each meeting has its own name."""
    calls, told = [], {}
    client = SimpleNamespace(
        wait_at_barrier=lambda *a: calls.append(a),
        key_value_set=told.__setitem__,
        blocking_key_value_get=lambda key, _: told.get(key, "another process"),
    )
    devices.wait_for_all("data")  # alone
    in_two_processes(monkeypatch, client)
    assert calls == []
    devices.wait_for_all("data", seconds=devices.START_S)
    devices.wait_for_all("data")
    (first, short), (second, long) = calls
    assert first != second
    assert 290_000 < short <= 300_000
    assert 86_390_000 < long <= 86_400_000
    assert devices.told_by_all("data", "mine") == ["mine", "another process"]


def in_two_processes(monkeypatch, client: SimpleNamespace) -> None:
    monkeypatch.setattr(global_state, "client", client)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 0)


@pytest.mark.parametrize(
    ("code", "waits"), [("DEADLINE_EXCEEDED", [60_000, 120_000, 20_000]), ("UNAVAILABLE", [60_000])]
)
def test_a_process_that_does_not_come_is_given_up(monkeypatch, caplog, code, waits) -> None:
    now, asked = [0.0], []

    def never(key: str, limit: int) -> str:
        if key.endswith("/0"):
            return "mine"
        asked.append(limit)
        assert len(asked) <= len(waits)
        now[0] += limit / 1000
        raise jax.errors.JaxRuntimeError(f"{code}: no such key")

    devices.wait_for_all("data")  # alone
    monkeypatch.setattr(devices, "time", SimpleNamespace(monotonic=lambda: now[0]))
    client = SimpleNamespace(key_value_set=lambda *_: None, blocking_key_value_get=never)
    in_two_processes(monkeypatch, client)
    with (
        caplog.at_level("INFO", logger="fokker"),
        pytest.raises(jax.errors.JaxRuntimeError, match=code),
    ):
        devices.wait_for_all("rows", seconds=200.0)
    assert asked == waits
    lines = [f"waiting for process 1 at 'rows' for {waited} s" for waited in (60, 180)]
    assert caplog.messages == lines[: len(waits) - 1]


LATE_SCRIPT = """
import logging, sys, time
from run_lib import devices
devices.logger.setLevel(logging.INFO)
devices.PATIENCE_S = 1.0
devices.connect(sys.argv[1], 2, int(sys.argv[2]))
devices.host()  # the devices of both are known
if sys.argv[2] == "1":
    time.sleep(3.5)
devices.wait_for_all("the end")
print("both are here", devices.told_by_all("name", sys.argv[2]))
"""


def test_a_process_that_is_waited_for_is_named() -> None:
    address = f"127.0.0.1:{free_port()}"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", LATE_SCRIPT, address, str(rank)], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    texts = finish(both)
    assert "waiting for process 1 at 'the end' for" in texts[0]
    assert all("both are here ['0', '1']" in text for text in texts)


def test_processes_with_different_configs_end_together(tmp_path: Path) -> None:
    """Before they compute together, with the field that differs; other data alike."""
    address = f"--coordinator=127.0.0.1:{free_port()}"
    processes = [
        start([
            CONFIG, f"--workdir={tmp_path / 'run'}", "--mode=train", address, "--num_processes=2",
            f"--process_id={rank}", f"--config.training.n_iters={20 + 5 * rank}",
        ])
        for rank in (0, 1)
    ]  # fmt: skip
    for text in finish(processes, code=2):
        assert "training.n_iters: 20 in process 0, 25 in process 1" in text
        assert "Traceback" not in text
    assert not (tmp_path / "run/checkpoints").exists()


def test_only_the_first_process_draws_a_bar(monkeypatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for first in (True, False):
        monkeypatch.setattr(devices, "is_first", lambda first=first: first)
        progress = Progress(0, 10, "step")
        assert (progress.bar is not None) == first
        progress.close()


MISTAKE_SCRIPT = """
import atexit
import jax
import main
atexit.register(print, "waits for the others")
jax.process_count = lambda: 2
main._run = lambda fields: [][0]
main.main(["main.py"])
"""


def test_a_mistake_in_one_of_several_processes_ends_it_at_once() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MISTAKE_SCRIPT], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "error: IndexError" in done.stderr
    assert "waits" not in done.stdout
