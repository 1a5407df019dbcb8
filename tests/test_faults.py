"""What ends a run before its time loses nothing: kills, signals, damaged files, a full disk."""

import contextvars
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import npz_files
import plotting
import run_lib
from checkpoints import Checkpoints, whole_steps
from records import Records
from run_lib import folder, metrics, training
from run_lib.experiment import Experiment
from tests import tiny
from tests.processes import ROOT, finish, start, start_together
from tests.test_devices import wait_for_step

pytestmark = pytest.mark.usefixtures("compiled_at_o0")

CONFIG = f"--config={ROOT / 'tests' / 'tiny_config.py'}"
ENDLESS = ["--mode=train", "--config.training.n_iters=1000000"]
STOPPED = 75
LAST, KILLS = 120, 6


def experiment(**changes) -> Experiment:
    config = tiny.config()
    config.training.update(snapshot_freq=1000, snapshot_freq_for_preemption=5, **changes)
    return Experiment.from_config(config)


def state_of(workdir: Path, step: int, s: Experiment):
    checkpoints = Checkpoints(workdir)
    like = s.state_like
    try:
        return checkpoints.restore(step, like)
    finally:
        checkpoints.close()


def killed_training(workdir: str, checkpoints: int, seconds: float) -> None:
    """Training that the kernel ends so long after so many checkpoints; no Python runs then."""
    save, count = Checkpoints.save, 0

    def then_the_end(self, state) -> None:
        nonlocal count
        save(self, state)
        count += 1
        if count == checkpoints:
            signal.setitimer(signal.ITIMER_REAL, seconds)

    Checkpoints.save = then_the_end
    run_lib.train(experiment(n_iters=LAST), Path(workdir))


def test_kills_change_no_bit_and_no_line_and_leave_nothing(tmp_path: Path) -> None:
    run_lib.train(experiment(n_iters=LAST), tmp_path / "whole")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.conftest", "run_lib", "sklearn.datasets"])
    rng, begun = np.random.default_rng(1), []
    for _ in range(KILLS):
        arguments = [str(tmp_path / "killed"), int(rng.integers(1, 4)), rng.uniform(1e-4, 0.05)]
        process = context.Process(target=killed_training, args=arguments)
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGALRM  # as final as −9, but never too late
        begun.append(max(whole_steps(tmp_path / "killed"), default=0))
    assert begun == sorted(begun)
    assert 0 < begun[-1] < LAST
    assert len(set(begun)) > KILLS // 2
    run_lib.train(experiment(n_iters=LAST), tmp_path / "killed")
    states = [state_of(tmp_path / name, LAST, experiment()) for name in ("whole", "killed")]
    jax.tree.map(np.testing.assert_array_equal, *states)
    lines = [
        [{k: v for k, v in row.items() if k != "time"} for row in metrics.read_metrics(run)]
        for run in (tmp_path / "whole", tmp_path / "killed")
    ]
    assert lines[0] == lines[1]
    assert whole_steps(tmp_path / "killed") == whole_steps(tmp_path / "whole")
    assert [r["step"] for r in lines[0] if r["split"] == "train"] == list(range(5, LAST + 1, 5))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_with_a_code_of_its_own(tmp_path: Path, number: int) -> None:
    never = "--config.training.snapshot_freq_for_preemption=1000000"
    often = "--config.training.snapshot_freq=1000000"
    process = start([CONFIG, f"--workdir={tmp_path}", *ENDLESS, never, often])
    path = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_text().count("\n") > 3):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    (said,) = finish([process], code=STOPPED)
    assert "without saving" not in said  # which would come after 25 s
    assert f"{signal.Signals(number).name}: saving after the step under way" in said
    assert "stopped and saved; the same command continues" in said
    (step,) = whole_steps(tmp_path)
    assert step >= 15
    config = tiny.config()
    config.training.n_iters = step
    run_lib.train(Experiment.from_config(config), tmp_path / "whole")
    s = Experiment.from_config(config)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        state_of(tmp_path, step, s),
        state_of(tmp_path / "whole", step, s),
    )


SIGNALS_SCRIPT = """
import logging, resource, signal, sys, time
from pathlib import Path
from run_lib import folder, interruption
logging.basicConfig()
interruption.GRACE_S = float(sys.argv[2])
interruption.watch()
if sys.argv[1] == "full disk":
    logging.raiseExceptions = False
    folder.log_to(Path(sys.argv[3]))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
    sys.argv[1] = "outside"
if sys.argv[1] == "outside":
    print("ready", flush=True)
    time.sleep(60)
try:
    with interruption.saving() as stop:
        if sys.argv[1] == "closing":
            stop.steps_are_over()
        print("ready", flush=True)
        time.sleep(3 if sys.argv[1] == "closing" else 60)
except interruption.Interrupted as error:
    print(error)
    sys.exit(interruption.EXIT_INTERRUPTED)
"""


@pytest.mark.parametrize(
    ("case", "pauses", "grace", "message"),
    [
        ("outside", [0], 60, "SIGTERM: stopped; the same command continues"),
        ("stuck", [0], 1, "no step has ended within 1 s: stopped without saving"),
        ("stuck", [2, 0], 60, "SIGTERM again: stopped without saving"),
        ("stuck", [0.01, 0], 1, "no step has ended within 1 s: stopped without saving"),
        ("closing", [0], 1, "stopped and saved"),
        ("full disk", [0], 60, "SIGTERM: stopped; the same command continues"),
    ],
    ids=["outside", "stuck", "again", "sent twice", "closing", "full disk"],
)
def test_signals_where_no_step_is_under_way(
    tmp_path: Path, case: str, pauses: list, grace: float, message: str
) -> None:
    command = [sys.executable, "-c", SIGNALS_SCRIPT, case, str(grace), str(tmp_path)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while process.stdout.readline() != "ready\n":
        assert process.poll() is None
    for pause in pauses:
        process.send_signal(signal.SIGTERM)
        time.sleep(pause)
    said, _ = process.communicate(timeout=50)
    assert process.returncode == STOPPED, said
    assert message in said
    assert ("without saving" in said) == (case == "stuck")


def test_all_processes_stop_at_the_same_step(tmp_path: Path) -> None:
    arguments = [CONFIG, f"--workdir={tmp_path}", *ENDLESS]
    processes = start_together(arguments)
    wait_for_step(tmp_path, 10)
    processes[1].send_signal(signal.SIGTERM)
    said = finish(processes, code=STOPPED)
    assert all("stopped and saved" in text for text in said)
    assert "another process" not in "".join(said)
    state_of(tmp_path, whole_steps(tmp_path)[-1], experiment())


def test_a_dead_process_ends_the_others(tmp_path: Path) -> None:
    """After a silence of 20 s in the place of 60."""
    impatient = "from run_lib import devices; devices.SILENCE_S = 20"
    arguments = [CONFIG, f"--workdir={tmp_path}", *ENDLESS]
    processes = start_together(arguments, first_of_all=impatient)
    wait_for_step(tmp_path, 10)
    processes[1].kill()
    said, _ = processes[0].communicate(timeout=120)
    assert processes[0].returncode in (3, -signal.SIGABRT), said  # by itself, or by JAX's service
    if processes[0].returncode == 3:
        assert "another process of this run is gone" in said
    processes[1].communicate()
    # What it left behind is a run folder like any other.
    state_of(tmp_path, whole_steps(tmp_path)[-1], experiment())


def damage(path: Path) -> None:
    """The second half of every file is gone, as after a crash of the machine."""
    for file in (p for p in path.rglob("*") if p.is_file()):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])


def test_a_damaged_checkpoint_is_passed_over_and_kept(tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO", logger="fokker")
    run_lib.train(experiment(n_iters=20), tmp_path)
    shutil.copytree(tmp_path, tmp_path / "whole")
    damage(tmp_path / "checkpoints" / "20")
    run_lib.evaluate(experiment(), tmp_path, "eval")  # the one before; it changes nothing
    assert "20 cannot be read" in caplog.text
    steps = {json.loads(line)["step"] for line in (tmp_path / "eval/rows.jsonl").open()}
    assert steps == {15}
    assert whole_steps(tmp_path) == [15, 20]
    caplog.clear()
    run_lib.train(experiment(n_iters=20), tmp_path)
    assert re.search(r"20 cannot be read.*The one before it is used", caplog.text)
    assert "from step 15 to 20" in caplog.text
    assert (tmp_path / "checkpoints-damaged" / "20").is_dir()
    s = experiment()
    jax.tree.map(
        np.testing.assert_array_equal,
        state_of(tmp_path, 20, s),
        state_of(tmp_path / "whole", 20, s),
    )


def test_if_no_checkpoint_can_be_read_nothing_is_moved(tmp_path: Path) -> None:
    run_lib.train(experiment(n_iters=10), tmp_path)
    for step in whole_steps(tmp_path):
        damage(tmp_path / "checkpoints" / str(step))
    with pytest.raises(ValueError, match=r"no checkpoint of .* can be read"):
        run_lib.train(experiment(n_iters=20), tmp_path)
    assert whole_steps(tmp_path) == [5, 10]
    assert not (tmp_path / "checkpoints-damaged").exists()


def small_files(limit: int) -> None:
    """Writes beyond so many bytes fail, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def test_a_full_disk_is_told_and_earlier_checkpoints_stay(tmp_path: Path) -> None:
    run_lib.train(experiment(), tmp_path)
    before = whole_steps(tmp_path)
    more = ["--config.training.n_iters=40", "--compilation_cache_dir="]
    arguments = [CONFIG, f"--workdir={tmp_path}", "--mode=train", *more]
    # Of a checkpoint some file is larger, however its leaves are divided among the files.
    process = start(arguments, preexec_fn=lambda: small_files(15_000))
    (said,) = finish([process], code=2)
    assert re.search(
        r"^error: a checkpoint could not be written to .*; the same command", said, re.M
    )
    assert whole_steps(tmp_path)[-1] >= before[-1]
    for step in whole_steps(tmp_path):
        state_of(tmp_path, step, experiment())
    run_lib.train(experiment(n_iters=40), tmp_path)
    assert whole_steps(tmp_path)[-1] == 40


WRITERS = {
    "curves.png": lambda path: plotting.save_curves(
        path, {"loss": {"train": ([1, 2], [1.0, 2.0])}}
    ),
    "samples.png": lambda path: plotting.save_images(path, np.zeros((4, 8, 8, 1), np.uint8), 17),
    "config.json.tmp": lambda path: folder.replace_file(path.with_suffix(""), ["{}"] * 10_000),
    "data.npz.tmp": lambda path: npz_files.write(path.with_suffix(""), {"x": np.zeros(10_000)}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as found:
        WRITERS[name](tmp_path / name)
    assert found.value.filename == str(tmp_path / name.removesuffix(".tmp"))


def test_a_full_disk_is_told_with_the_name_of_rows_and_metrics(tmp_path: Path) -> None:
    records, writer = Records(tmp_path), metrics.MetricsWriter(tmp_path, 0)
    (tmp_path / "rows.jsonl").symlink_to("/dev/full")
    row = {"estimator": "ODE", "protocol": "", "step": 1, "split": "test", "identity": "0a1b"}
    with pytest.raises(OSError, match="No space left on device") as found:
        records.append([row | {"index": 0, "repeat": 0, "value": 1.0}])
    assert found.value.filename == str(tmp_path / "rows.jsonl")
    writer._file = Path("/dev/full").open("a")
    with pytest.raises(OSError, match="No space left on device") as found:
        writer.write(1, "train", {"loss": 1.0})
    assert found.value.filename == str(tmp_path / "metrics.jsonl")


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path, monkeypatch) -> None:
    run_lib.train(experiment(n_iters=10), tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=900_000))
    with pytest.raises(OSError, match=r"0\.9 MB are free, 1\.2 MB are asked for.*\[5, 10\]"):
        run_lib.train(experiment(n_iters=20), tmp_path)
    monkeypatch.undo()
    assert whole_steps(tmp_path) == [5, 10]
    assert not list((tmp_path / "checkpoints").glob("*tmp*"))


def test_an_import_that_was_killed_is_done_again(tmp_path: Path) -> None:
    """What was half written is no checkpoint, for whatever asks for one."""
    s = experiment()
    state = s.train_state(s.initial_parameters())
    folder.write_json(tmp_path / "config.json", experiment(sde="subvpsde").settings.resolved())
    (tmp_path / "checkpoints" / "0.orbax-checkpoint-tmp").mkdir(parents=True)
    folder.reconcile(tmp_path, s.settings.resolved())
    for _ in range(2):
        training.write_import(tmp_path, s.settings.resolved(), state, snapshot_freq=10)
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["0"]
    jax.tree.map(np.testing.assert_array_equal, state_of(tmp_path, 0, s), state)
    other = jax.tree.map(lambda leaf: leaf + 0 * leaf.sum() + (leaf.ndim > 1), state)
    with pytest.raises(ValueError, match=r"checkpoints/0 holds other numbers: use another"):
        training.write_import(tmp_path, s.settings.resolved(), other, snapshot_freq=10)
    with pytest.raises(ValueError, match="is not empty: use another --workdir"):
        training.write_import(
            tmp_path, s.settings.resolved(), state.replace(step=state.step + 1), 10
        )


def test_a_second_process_in_a_folder_is_refused(tmp_path: Path) -> None:
    with folder.alone(tmp_path):
        (said,) = finish([start([CONFIG, f"--workdir={tmp_path}", "--mode=train"])], code=2)
    assert f"{tmp_path} is in use by process {os.getpid()} on " in said
    assert not (tmp_path / "checkpoints").exists()
    run_lib.train(experiment(n_iters=5), tmp_path)
    with folder.alone(tmp_path):  # evaluation and training may run side by side
        run_lib.evaluate(experiment(), tmp_path, "eval")
    other_thread = contextvars.Context()
    with folder.alone(tmp_path / "eval"), pytest.raises(ValueError, match="is in use by process"):
        other_thread.run(run_lib.evaluate, experiment(), tmp_path, "eval")
    run_lib.evaluate(experiment(), tmp_path, "eval")


def test_clock_locale_and_a_read_only_data_folder_do_not_matter(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    images = np.random.default_rng(0).integers(0, 17, (40, 8, 8), np.uint8)
    np.savez(data / "d.npz", x_train=images, x_test=images[:24])
    data.chmod(0o555)
    process = start(
        [CONFIG, f"--workdir={tmp_path / 'r'}", "--mode=train,eval", "--config.data.dataset=npz",
         f"--config.data.path={data / 'd.npz'}", "--config.data.num_test=0"],
        environment={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TZ": "Nowhere"},
    )  # fmt: skip
    finish([process])
    assert "±" in (tmp_path / "r/eval/table.md").read_text(encoding="utf-8")
    assert [p.name for p in data.iterdir()] == ["d.npz"]
