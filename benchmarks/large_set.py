"""Resident memory of a process that trains on a set larger than the memory.

    python -m benchmarks.large_set --workdir=runs/large [--gigabytes=20]

The set is one .npy file of images 64×64×3. It is sparse: 3,000 of the images are noise and take
room on the disk, the others are holes that read as zeros. Training divides the file at random. All
of it is read before the first step, once by the check of its values and once for its digest; then
batches are drawn from all over it. The peak is that of the process that trains, with the pages of
the file that it has mapped.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

SHAPE = (64, 64, 3)
NOISE = 3000  # images that are no holes
ROOT = Path(__file__).resolve().parents[1]
FIELDS = {
    "data.image_size": "64", "data.num_channels": "3", "data.levels": "256",
    "model.parameterization": "velocity", "model.channels": "(8,8)", "model.blocks": "(1,1)",
    "model.summary": "8", "training.time_law": "uniform", "training.n_iters": "200",
    "training.n_jitted_steps": "1", "training.log_freq": "50", "training.eval_freq": "200",
    "training.snapshot_freq": "200", "training.snapshot_freq_for_preemption": "200",
    "eval.batch_size": "16",
}  # fmt: skip


def make(path: Path, gigabytes: float) -> int:
    """Write the sparse file; the number of its images."""
    number = round(gigabytes * 1e9) // int(np.prod(SHAPE))
    images = np.lib.format.open_memmap(path, "w+", np.uint8, (number, *SHAPE))
    rng = np.random.default_rng(0)
    for place in np.linspace(0, number - 1, min(NOISE, number)).astype(int):
        images[place] = rng.integers(0, 256, SHAPE, np.uint8)
    images.flush()
    return number


def main() -> None:
    """Make the set, train on it and print the peak."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--gigabytes", type=float, default=20.0)
    args = parser.parse_args()
    if args.workdir.exists():
        parser.error(f"--workdir={args.workdir}: need a new folder; an ended run has no steps left")
    args.workdir.mkdir(parents=True)
    path = args.workdir / "images.npy"
    number = make(path, args.gigabytes)
    flags = [f"--config.{field}={value}" for field, value in FIELDS.items()]
    command = [
        sys.executable, "main.py", "--config=configs/mnist/sharp.py", "--mode=train",
        f"--workdir={args.workdir.resolve() / 'run'}", f"--config.data.path={path.resolve()}",
    ]  # fmt: skip
    started = time.monotonic()
    subprocess.run([*command, *flags], cwd=ROOT, check=True)
    seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    print(
        f"{number} images, {path.stat().st_size / 1e9:.1f} GB: at most {peak:.2f} GB resident, "
        f"{seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
