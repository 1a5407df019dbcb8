"""Imports that are killed at random moments: does the same import, begun again, always end whole?

    python -m benchmarks.kills --number=20

Every second kill comes at any moment of an import, the others while its checkpoint is written.
Printed: how many left what behind, and whether each folder holds the numbers of the source in the
end, and nothing else.
"""

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np

import run_lib
from checkpoints import TEMPORARY, Checkpoints, whole_steps
from run_lib.experiment import Experiment
from tests import tiny

STEPS = 20


def experiment(source: str = "") -> Experiment:
    """A network of some thousand parameters on the digits."""
    config = tiny.config()
    config.training.update(n_iters=STEPS, init_from=source)
    return Experiment.from_config(config)


def import_into(workdir: str, source: str) -> None:
    """Import a checkpoint into a run folder, as `--mode=import` does."""
    run_lib.import_given(experiment(source), Path(workdir), "flowpp_dequantizer")


def start(root: Path, number: int) -> multiprocessing.Process:
    """An import into a folder of this number, in a process of its own."""
    arguments = (str(root / str(number)), str(root / "source"))
    process = multiprocessing.get_context("forkserver").Process(target=import_into, args=arguments)
    process.start()
    return process


def wait_for_writing(workdir: Path, process: multiprocessing.Process) -> None:
    """Until the folder of checkpoints is there, or the end of the process."""
    while process.is_alive() and not (workdir / "checkpoints").exists():
        time.sleep(0.001)


def left_behind(workdir: Path) -> str:
    """Find what a kill has left of a checkpoint."""
    if whole_steps(workdir):
        return "a whole checkpoint"
    half = list((workdir / "checkpoints").glob(f"*{TEMPORARY}*"))
    return "half a checkpoint" if half else "no checkpoint"


def is_whole(root: Path, number: int) -> bool:
    """Import to the end; say whether the folder holds what the source holds, and nothing else."""
    process = start(root, number)
    process.join()
    like = experiment().state_like
    numbers = []
    for workdir in (root / "source", root / str(number)):
        checkpoints = Checkpoints(workdir)
        numbers.append(jax.tree.leaves(checkpoints.restore(STEPS, like)))
        checkpoints.close()
    names = [path.name for path in (root / str(number) / "checkpoints").iterdir()]
    return process.exitcode == 0 and names == [str(STEPS)] and all(map(np.array_equal, *numbers))


def main() -> None:
    """Kill, begin again, report; code 1 if one of them is not whole."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["run_lib", "tests.tiny", "sklearn.datasets"]
    )
    rng, left, whole = np.random.default_rng(options.seed), Counter(), 0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        run_lib.train(experiment(), root / "source")
        is_whole(root, -1)  # starts the server
        began, process = time.monotonic(), start(root, -2)
        wait_for_writing(root / "-2", process)
        writing = time.monotonic()
        process.join()
        spans = (time.monotonic() - began, time.monotonic() - writing)
        for number in range(options.number):
            process = start(root, number)
            if number % 2:
                wait_for_writing(root / str(number), process)
            time.sleep(rng.uniform(0.0, spans[number % 2]))
            process.kill()
            process.join()
            left[left_behind(root / str(number))] += 1
            whole += is_whole(root, number)
    print(f"an import takes {spans[0]:.2f} s, of which it writes for {spans[1]:.2f} s")
    print(", ".join(f"{count} kills left {what}" for what, count in sorted(left.items())))
    print(f"{whole} of {options.number} whole after the second import")
    sys.exit(whole < options.number)


if __name__ == "__main__":
    main()
