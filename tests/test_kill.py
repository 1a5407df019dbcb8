"""An evaluation that is killed again and again ends with the rows of one that was left alone."""

import json
import multiprocessing
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

import run_lib
from records import Records, key_of
from run_lib.experiment import Experiment
from tests import tiny

pytestmark = pytest.mark.usefixtures("compiled_at_o0")

KILLS = 5


def experiment() -> Experiment:
    """Rows come one device batch at a time."""
    config = tiny.config()
    config.eval.update(batch_size=4, num_repeats=8, enable_sampling=False)
    return Experiment.from_config(config)


def evaluate(workdir: str, rows_to_wait_for: int, seconds: float) -> None:
    """An evaluation that the kernel ends so long after it has so many rows; no Python runs then."""
    append = Records.append

    def then_the_end(self: Records, rows: list[dict]) -> list[dict]:
        before = len(self.rows)
        new = append(self, rows)
        if before < rows_to_wait_for <= len(self.rows):
            signal.setitimer(signal.ITIMER_REAL, seconds)
        return new

    Records.append = then_the_end
    run_lib.evaluate(experiment(), Path(workdir), "eval")


def table(workdir: Path) -> list[dict]:
    """summary.json without the seconds."""
    summary = json.loads((workdir / "eval" / "summary.json").read_text())
    return [{k: v for k, v in row.items() if k != "seconds_per_example"} for row in summary]


def test_kills_lose_no_row_and_write_none_twice(tmp_path: Path) -> None:
    run_lib.train(experiment(), tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    run_lib.evaluate(experiment(), tmp_path / "whole", "eval")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.conftest", "run_lib", "sklearn.datasets"])
    rng, counts = np.random.default_rng(0), []
    for _ in range(KILLS):
        # Of 384 rows the next few, then a moment in the middle of whatever is going on.
        wanted = (counts[-1] if counts else 0) + int(rng.integers(1, 12))
        arguments = [str(tmp_path / "killed"), wanted, float(rng.uniform(1e-4, 3e-3))]
        process = context.Process(target=evaluate, args=arguments)
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGALRM
        counts.append(len(Records(tmp_path / "killed" / "eval").rows))
    assert 0 < counts[-1] < 384  # the kills came in the middle
    assert len(set(counts)) > KILLS // 2
    run_lib.evaluate(experiment(), tmp_path / "killed", "eval")
    lines = (tmp_path / "killed" / "eval" / "rows.jsonl").read_text().splitlines()
    keys = [key_of(json.loads(line)) for line in lines]
    assert len(keys) == len(set(keys)) == 384
    whole, after = (Records(tmp_path / name / "eval").rows for name in ("whole", "killed"))
    assert {k: r["value"] for k, r in after.items()} == {k: r["value"] for k, r in whole.items()}
    assert table(tmp_path / "killed") == table(tmp_path / "whole")
