"""An evaluation that is killed again and again ends with the rows of one that was left alone."""

import json
import multiprocessing
import shutil
import time
from pathlib import Path

import numpy as np

import run_lib
from records import Records, key_of
from run_lib.settings import Settings
from tests import tiny

KILLS = 10


def settings() -> Settings:
    """Rows come one device batch at a time."""
    config = tiny.config()
    config.eval.update(batch_size=4, num_repeats=4, enable_sampling=False)
    return Settings.from_config(config)


def evaluate(workdir: str) -> None:
    """What the killed process does."""
    run_lib.evaluate(settings(), Path(workdir), "eval")


def killed(workdir: Path, rows_to_wait_for: int, seconds: float) -> None:
    """Start an evaluation; kill −9 so long after it has so many rows."""
    path = workdir / "eval" / "rows.jsonl"
    process = multiprocessing.get_context("forkserver").Process(target=evaluate, args=[workdir])
    process.start()
    deadline = time.monotonic() + 120.0
    while process.is_alive() and time.monotonic() < deadline:
        if path.exists() and path.read_bytes().count(b"\n") >= rows_to_wait_for:
            break
        time.sleep(0.001)
    time.sleep(seconds)
    process.kill()
    process.join()


def table(workdir: Path) -> list[dict]:
    """summary.json without the seconds."""
    summary = json.loads((workdir / "eval" / "summary.json").read_text())
    return [{k: v for k, v in row.items() if k != "seconds_per_example"} for row in summary]


def test_ten_kills_lose_no_row_and_write_none_twice(tmp_path: Path) -> None:
    run_lib.train(settings(), tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    run_lib.evaluate(settings(), tmp_path / "whole", "eval")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.conftest", "run_lib"])
    rng, counts = np.random.default_rng(0), []
    for _ in range(KILLS):
        # Of 192 rows the next few, then a moment in the middle of whatever is going on.
        wanted = (counts[-1] if counts else 0) + int(rng.integers(0, 16))
        killed(tmp_path / "killed", wanted, float(rng.uniform(0.0, 0.02)))
        counts.append(len(Records(tmp_path / "killed" / "eval").rows))
    assert 0 < counts[-1] < 192  # the kills came in the middle
    assert len(set(counts)) > 3
    run_lib.evaluate(settings(), tmp_path / "killed", "eval")
    lines = (tmp_path / "killed" / "eval" / "rows.jsonl").read_text().splitlines()
    keys = [key_of(json.loads(line)) for line in lines]
    assert len(keys) == len(set(keys)) == 192
    whole, after = (Records(tmp_path / name / "eval").rows for name in ("whole", "killed"))
    assert {k: r["value"] for k, r in after.items()} == {k: r["value"] for k, r in whole.items()}
    assert table(tmp_path / "killed") == table(tmp_path / "whole")
