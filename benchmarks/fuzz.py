"""Random command lines and damaged files: tracebacks, silent changes of a figure, hangs.

    python -m benchmarks.fuzz --workdir=runs/fuzz [--commands=1000] [--files=300] [--seconds=60]

Every case runs in a forked process of its own. A command line is a small run with a few fields or
flags changed at random. A damaged file belongs to a copy of a finished run, or is a file of data or
statistics: bits are flipped, bytes replaced or repeated, ends cut. Right are a refusal in one line
(exit code 2), a stop (75), or the figures of the undamaged file; anything else is counted and told
in fuzz.txt. The order of cases follows from --seed alone.
"""

import argparse
import collections
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

import datasets
import evaluation
import main as program
from configs import base

SMALL = {
    "training.n_iters": "4", "training.batch_size": "8", "training.n_jitted_steps": "1",
    "training.log_freq": "2", "training.eval_freq": "2", "training.snapshot_freq": "2",
    "training.snapshot_freq_for_preemption": "2", "training.snapshot_sampling": "False",
    "model.hidden": "8", "model.depth": "1", "data.num_test": "8", "eval.batch_size": "8",
    "eval.num_times": "2", "eval.num_samples": "8", "eval.enable_sampling": "False",
    "eval.baselines": "False", "eval.rtol": "1e-2", "eval.atol": "1e-2", "optim.warmup": "1",
}  # fmt: skip
ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "toy" / "swissroll_vp.py"
TEXTS = (
    "0", "1", "-1", "2", "3", "7", "1000", "2147483648", "1e3", "0.5", "1e-5", "-0.1", "1e400",
    "nan", "inf", "None", "", "True", "False", "maybe", "none", "1,2", "(2,)", "[1", "a\udcffb",
    "ünïcode", "~nosuch/x", "{0}", "a=b", "\n", "swissroll", "digits", "mlp", "ddpm", "ode", "pc",
    "vesde",
)  # fmt: skip
MODES = ("train", "train", "train", "eval", "train,eval", "diagnose", "import", "fid_stats",
         "train_deq", "evaluate", "", "train,,eval")  # fmt: skip
GOOD = (0, 2, 75)


class Case(NamedTuple):
    """The verdict on one random command line or one damaged file."""

    kind: str
    verdict: str  # same, refused, traceback, changed, hang
    detail: str


def in_a_fork(function: Callable[[], None], log: Path, seconds: float) -> tuple[int | None, str]:
    """(exit code, or None for a hang; what was written) of a function in a process of its own."""
    child = os.fork()
    if child == 0:
        _child(function, log)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), log.read_text(errors="replace")
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None, log.read_text(errors="replace")


def _child(function: Callable[[], None], log: Path) -> None:
    """Run the function; never returns."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(log.parent)  # where relative paths of random texts lead
    sys.path.insert(0, str(ROOT))
    code = 1
    try:
        function()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def judged(kind: str, what: str, code: int | None, said: str) -> Case:
    """The verdict on an exit code and what was said."""
    if code is None:
        return Case(kind, "hang", what)
    if "Traceback" in said or code not in GOOD:
        return Case(kind, "traceback", f"{what}: exit {code}: {' | '.join(said.splitlines()[-3:])}")
    return Case(kind, "same" if code == 0 else "refused", what)


def arguments(workdir: Path, mode: str, changes: dict[str, str]) -> list[str]:
    """The command line of a small run."""
    fields = [f"--config.{name}={value}" for name, value in (SMALL | changes).items()]
    cache = f"--compilation_cache_dir={workdir.parent / 'cache'}"
    flags = [f"--config={CONFIG}", f"--workdir={workdir}", f"--mode={mode}", cache]
    return ["main.py", *flags, *fields]


def run_program(command: list[str]) -> None:
    """Run a command line in this process, as `python main.py` does."""
    program.main(program.parse(command))


def command_case(rng: random.Random, workdir: Path, seconds: float) -> Case:
    """A small run with up to three fields and perhaps a flag changed at random."""
    defaults = base.get_config()
    names = [f"{s}.{f}" for s in defaults if s != "seed" for f in defaults[s]] + ["seed", "nothing"]
    changes = {rng.choice(names): rng.choice(TEXTS) for _ in range(rng.randrange(4))}
    command = arguments(workdir / "command", rng.choice(MODES), changes)
    if rng.random() < 0.2:
        flag = rng.choice(("config", "workdir", "eval_folder", "deq_folder", "process_id", "wrk"))
        command.append(f"--{flag}={rng.choice(TEXTS)}")
    shutil.rmtree(workdir / "command", ignore_errors=True)
    code, said = in_a_fork(lambda: run_program(command), workdir / "command.log", seconds)
    shown = [part for part in command[3:] if part.partition("=")[0] not in SHOWN]
    return judged("command line", repr([command[3], shown[1:], changes]), code, said)


SHOWN = {f"--config.{name}" for name in SMALL} | {"--compilation_cache_dir"}


def damaged(rng: random.Random, data: bytes) -> bytes:
    """The bytes with a random damage."""
    new, at = bytearray(data), rng.randrange(len(data))
    kind = rng.choice(("flip", "flip", "flip", "cut", "noise", "repeat", "remove", "empty"))
    if kind == "flip":
        for _ in range(rng.choice((1, 1, 8))):
            new[rng.randrange(len(new))] ^= 1 << rng.randrange(8)
    if kind == "noise":
        new[at : at + rng.randrange(1, 64)] = rng.randbytes(rng.randrange(1, 64))
    if kind == "repeat":
        new[at:at] = new[at : at + rng.randrange(1, 64)]
    if kind == "remove":
        del new[at : at + rng.randrange(1, 64)]
    return bytes({"cut": new[:at], "empty": b""}.get(kind, new))


def write_sets(folder: Path) -> dict[str, tuple[Path, Callable[[], str]]]:
    """Small sets of every kind: (what is damaged, the function that gives the figure)."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (30, 8, 8, 3), np.uint8)
    np.savez(folder / "data.npz", x_train=x[:20], x_test=x[20:], y_train=np.arange(20) % 3)
    _write_png(folder / "png", x)
    _write_tfrecords(folder / "a.tfrecords", x)
    statistics = evaluation.Statistics(np.float32(rng.random((9, 4))), "e", "d", "train")
    statistics.write(folder / "stats.npz")

    def examples(dataset: str, path: Path) -> Callable[[], str]:
        return lambda: digest_of_set(dataset, path)

    return {
        "data npz": (folder / "data.npz", examples("npz", folder / "data.npz")),
        "PNG folder": (folder / "png" / "007.png", examples("folder", folder / "png")),
        "TFRecords": (folder / "a.tfrecords", examples("ffhq", folder / "a.tfrecords")),
        "statistics": (folder / "stats.npz", lambda: digest_of_statistics(folder / "stats.npz")),
    }


def _write_png(folder: Path, images: np.ndarray) -> None:
    from PIL import Image

    folder.mkdir(exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}.png")


def _write_tfrecords(path: Path, images: np.ndarray) -> None:
    def write() -> None:
        import tensorflow as tf

        with tf.io.TFRecordWriter(str(path)) as writer:
            for image in images.transpose(0, 3, 1, 2):
                shape = tf.train.Feature(int64_list=tf.train.Int64List(value=image.shape))
                data = tf.train.Feature(bytes_list=tf.train.BytesList(value=[image.tobytes()]))
                features = tf.train.Features(feature={"shape": shape, "data": data})
                writer.write(tf.train.Example(features=features).SerializeToString())

    in_a_fork(write, path.with_suffix(".log"), 300.0)  # this process must stay without TensorFlow


def digest_of_set(dataset: str, path: Path) -> str:
    """Return the digest of all examples and classes of both splits."""
    config = datasets.DataConfig(dataset, str(path), 8, 3, 256, False, True, True, False, 0, 0)
    found, digest = datasets.load(config), hashlib.sha256()
    for name in ("train", "test"):
        split = found.splits[name]
        digest.update(split.examples(np.arange(split.size)).tobytes())
        digest.update(b"" if split.labels is None else split.labels.tobytes())
    return digest.hexdigest()


def digest_of_statistics(path: Path) -> str:
    """Return the digest of the features, their extractor, their data set and its split."""
    found = evaluation.read_statistics(path)
    said = (found.extractor, found.dataset, found.split)
    return hashlib.sha256(found.pool_3.tobytes() + repr(said).encode()).hexdigest()


def write_figure(figure: Callable[[], str], path: Path) -> None:
    """The figure to a file, or the end of a program that refuses its data."""
    try:
        path.write_text(figure())
    except (ValueError, OSError) as error:
        program._fail(str(error), program.EXIT_USER_ERROR)


def file_case(
    kind: str, path: Path, figure: Callable[[], str], rng: random.Random, log: Path, seconds: float
) -> Case:
    """The figure of a file before and after a damage, which is then undone."""
    told, whole = log.with_suffix(".figure"), path.read_bytes()
    results = []
    try:
        for data in (whole, damaged(rng, whole)):
            told.unlink(missing_ok=True)
            path.write_bytes(data)
            results.append(in_a_fork(lambda: write_figure(figure, told), log, seconds))
            results.append(told.read_text() if told.exists() else "")
    finally:
        path.write_bytes(whole)
    before, (code, said), after = results[1], results[2], results[3]
    found = judged(kind, path.name, code, said)
    return found._replace(verdict="changed") if code == 0 and before != after else found


FILES_OF_RUN = {
    "rows": "eval/rows.jsonl", "metrics": "metrics.jsonl", "JSON": "config.json",
    "JSON of rows": "eval/config.json", "protocols": "eval/protocols.json",
}  # fmt: skip


def figures_of_run(run: Path) -> str:
    """Return as text the figures of an evaluation: means, standard errors, numbers."""
    path = run / "eval" / "summary.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    kept = ("estimator", "mean", "standard_error", "n", "step")
    return json.dumps([[row[key] for key in kept] for row in rows])


def run_case(kind: str, whole: Path, rng: random.Random, log: Path, seconds: float) -> Case:
    """A finished run, one of its files damaged, trained and evaluated again."""
    run = whole.with_name("damaged")
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(whole, run)
    path = run / FILES_OF_RUN[kind]
    path.write_bytes(damaged(rng, path.read_bytes()))
    (run / "eval" / "summary.json").unlink()
    command = arguments(run, "train,eval", {})
    code, said = in_a_fork(lambda: run_program(command), log, seconds)
    found = judged(kind, path.name, code, said)
    changed = code == 0 and figures_of_run(run) != figures_of_run(whole)
    return found._replace(verdict="changed", detail=said[-300:]) if changed else found


def table(cases: list[Case]) -> str:
    """Count the verdicts for every kind of case, and list the cases that went wrong."""
    verdicts = ("same", "refused", "traceback", "changed", "hang")
    counts = collections.Counter((case.kind, case.verdict) for case in cases)
    lines = ["| kind | " + " | ".join(verdicts) + " |", "|---" * (len(verdicts) + 1) + "|"]
    for kind in dict.fromkeys(case.kind for case in cases):
        lines.append(f"| {kind} | " + " | ".join(str(counts[kind, v]) for v in verdicts) + " |")
    wrong = [case for case in cases if case.verdict not in ("same", "refused")]
    return "\n".join([*lines, *(f"{c.verdict}: {c.kind}: {c.detail}" for c in wrong)])


def main() -> None:
    """Run all cases; 1 if one of them was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--commands", type=int, default=1000)
    parser.add_argument("--files", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, workdir, cases = random.Random(options.seed), options.workdir.absolute(), []
    workdir.mkdir(parents=True, exist_ok=True)
    for _ in range(options.commands):
        cases.append(command_case(rng, workdir, options.seconds))
        print(*cases[-1][:2], flush=True)
    sets, log = write_sets(workdir), workdir / "file.log"
    whole = workdir / "whole"
    if options.files:
        in_a_fork(lambda: run_program(arguments(whole, "train,eval", {})), log, 600.0)
    kinds = [*sets, *FILES_OF_RUN]
    for number in range(options.files):
        kind = kinds[number % len(kinds)]
        if kind in sets:
            cases.append(file_case(kind, *sets[kind], rng, log, options.seconds))
        else:
            cases.append(run_case(kind, whole, rng, log, options.seconds))
        print(*cases[-1][:2], flush=True)
    text = table(cases)
    (workdir / "fuzz.txt").write_text(text, encoding="utf-8", errors="replace")
    print(text)
    sys.exit(any(case.verdict not in ("same", "refused") for case in cases))


if __name__ == "__main__":
    main()
