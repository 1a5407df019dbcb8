"""Hours of training and evaluation in turn, in one process: do memory and open files stay flat?

    python -m benchmarks.soak --workdir=runs/soak --minutes=60

Every round trains the digits network some steps further and evaluates the new checkpoint. The log
rotates early, so that this is seen, too. Written: soak.csv, a row per round, and a verdict: growth
after the first quarter of the memory between rounds (resident, and without pages of files), of its
peak and of open files; number of rotated logs.
"""

import argparse
import csv
import importlib
import logging
import os
import re
import sys
import time
from pathlib import Path

import jax
import numpy as np

import run_lib
from run_lib import devices, folder
from run_lib.experiment import Experiment

STEPS = 2000  # as often as the config saves


MEMORY = {
    "resident": "VmRSS",
    "anonymous": "RssAnon",  # without pages of files, which the system drops and reads at will
    "peak": "VmHWM",  # the most that was ever resident
}


def memory_mb() -> list[float]:
    """Memory of this process by the kinds of MEMORY, in MB."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return [int(re.search(rf"{key}:\s+(\d+) kB", status)[1]) / 1e3 for key in MEMORY.values()]


def open_files() -> int:
    """Open file handles of this process."""
    return len(os.listdir("/proc/self/fd"))


def experiment(last: int) -> Experiment:
    """The digits run up to so many steps, evaluated on a part of the test set."""
    config = importlib.import_module("configs.digits.vp").get_config()
    config.training.update(n_iters=last, log_freq=20, eval_freq=100)
    config.eval.update(num_examples=64, batch_size=64, num_samples=64)
    return Experiment.from_config(config)


def main() -> None:
    """Run, report, and fail if something grows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0)
    options = parser.parse_args()
    devices.one_arena()  # as main.py
    logging.getLogger("fokker").setLevel(logging.INFO)
    folder.LOG_BYTES = 40_000
    cache = str(options.workdir.absolute().parent / ".compilation_cache")
    jax.config.update("jax_compilation_cache_dir", cache)
    folder.log_to(options.workdir)
    started, rows = time.monotonic(), []
    with (options.workdir / "soak.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["minutes", "step", *(f"{kind}_mb" for kind in MEMORY), "open_files"])
        while (minutes := (time.monotonic() - started) / 60) < options.minutes:
            now = experiment(STEPS * (len(rows) + 1))
            run_lib.train(now, options.workdir)
            devices.release()  # as main.py between its modes
            run_lib.evaluate(now, options.workdir, f"eval_{len(rows) % 10}")
            devices.release()
            rows.append((round(minutes, 2), now.training.n_iters, *memory_mb(), open_files()))
            table.writerow(rows[-1])
            file.flush()
            print(*rows[-1], flush=True)
    sys.exit(verdict(np.array(rows), len(list(options.workdir.glob("log.txt.*")))))


def verdict(rows: np.ndarray, rotated: int) -> int:
    """Print what has grown; 1 if it is too much."""
    after = rows[len(rows) // 4 :]
    tenth = max(len(after) // 10, 1)
    growth = after[-tenth:].mean(axis=0) / after[:tenth].mean(axis=0) - 1
    handles = int(after[-1, -1] - after[0, -1])
    print(f"{len(rows)} rounds, {rows[-1, 1]:.0f} steps; after warm-up:")
    for column, kind in enumerate(MEMORY, start=2):
        ends = f"{after[0, column]:.0f} to {after[-1, column]:.0f} MB"
        print(f"  {kind} memory {growth[column]:+.1%} ({ends})")
    print(f"  open files {handles:+d}, {rotated} rotated logs")
    return int(max(growth[2:-1]) > 0.05 or handles > 0 or rotated == 0)


if __name__ == "__main__":
    main()
