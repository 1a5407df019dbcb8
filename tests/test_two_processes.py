"""Two processes evaluate one run folder: each its rows and shards, the same figures as alone."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import run_lib
from records import Records
from run_lib import sampling_loop
from run_lib.settings import Settings
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))
from pathlib import Path
from tests.test_two_processes import evaluate
evaluate(Path(sys.argv[3]), "two")
assert (jax.process_count(), jax.device_count()) == (2, 4)
"""


def evaluate(workdir: Path, eval_folder: str) -> None:
    """Ten examples in batches of 8: the second batch has none for the second process."""
    config = tiny.config()
    config.eval.update(batch_size=8, num_examples=10, num_samples=12)
    run_lib.evaluate(Settings.from_config(config), workdir, eval_folder)


def two_processes(workdir: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, port, str(rank), str(workdir)],
            env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        for process in processes:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()


def test_rows_and_samples_are_those_of_one_process(tmp_path: Path) -> None:
    """Also after one process has lost all its rows, when only it has something to do."""
    run_lib.train(Settings.from_config(tiny.config()), tmp_path)
    evaluate(tmp_path, "one")
    two_processes(tmp_path)
    (tmp_path / "two" / "rows-1.jsonl").unlink()
    two_processes(tmp_path)
    one, two = (Records(tmp_path / name).rows for name in ("one", "two"))
    assert len(one) == 2 * 10
    assert two.keys() == one.keys()
    for key, row in one.items():
        assert two[key]["value"] == pytest.approx(row["value"], rel=2e-4), key
    lines = [
        len((tmp_path / "two" / name).read_text().splitlines())
        for name in ("rows.jsonl", "rows-1.jsonl")
    ]
    assert lines == [2 * 6, 2 * 4]
    means = [
        [row["mean"] for row in json.loads((tmp_path / name / "summary.json").read_text())]
        for name in ("one", "two")
    ]
    np.testing.assert_allclose(means[1], means[0], rtol=2e-4)
    alone, shared = (
        np.concatenate([part["samples"] for part in sampling_loop.read(where, 12)])
        for where in (tmp_path / name / "samples_20" for name in ("one", "two"))
    )
    assert alone.shape == shared.shape
    assert np.mean(alone != shared) < 0.01  # a value at the edge of a grey level may fall to it
