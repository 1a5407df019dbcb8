"""Steps per second of training fed by the data pipeline, over those of one constant batch.

    python -m benchmarks.input_pipeline [--rounds=5]

Both take the same compiled step and take turns within one process; the median of the ratios by
round is printed. 1 means that training never waits for data. A pixel network on images in memory,
the same on PNG files that are decoded on demand, and the MLP of the digits with 20 steps per
dispatch, the hardest case, since a step takes a millisecond.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from configs import base
from configs.digits import vp as digits
from run_lib import training
from run_lib.experiment import Experiment
from run_lib.trainer import Trainer


def digits_settings(where: Path) -> Experiment:
    """The network of make demo."""
    del where
    config = digits.get_config()
    config.training.update(n_iters=1_000_000, snapshot_sampling=False)
    return Experiment.from_config(config)


def pixels(where: Path, **data: str) -> Experiment:
    """A small U-Net on 32×32×3."""
    config = base.get_config()
    config.data.update(levels=256, random_flip=True, image_size=32, num_channels=3, **data)
    config.model.update(name="ddpm", nf=32, ch_mult=(1, 2), num_res_blocks=1, conditional=True)
    config.model.update(attn_resolutions=(8,), resamp_with_conv=True, dropout=0.1)
    config.training.update(batch_size=16, n_iters=1_000_000, snapshot_sampling=False)
    return Experiment.from_config(config)


def archive(where: Path) -> Experiment:
    """2,000 images of noise in one file."""
    images = np.random.default_rng(0).integers(256, size=(2000, 32, 32, 3), dtype=np.uint8)
    np.savez(where / "images.npz", x_train=images, x_test=images[:100])
    return pixels(where, dataset="npz", path=str(where / "images.npz"))


def files(where: Path) -> Experiment:
    """2,000 PNG files of noise."""
    rng = np.random.default_rng(0)
    for split, number in (("train", 2000), ("test", 100)):
        (where / split).mkdir()
        for i in range(number):
            image = rng.integers(256, size=(32, 32, 3), dtype=np.uint8)
            Image.fromarray(image).save(where / split / f"{i:04d}.png")
    return pixels(where, dataset="folder", path=str(where))


CASES = {
    "digits, MLP": (digits_settings, 25),
    "npz, U-Net": (archive, 12),
    "PNG, U-Net": (files, 12),
}
PREPARED = 6  # batches that the threads have ready at most


def seconds(trainer: Trainer, batches: Iterator, dispatches: int) -> float:
    """Return the seconds of so many dispatches, with no batch prepared and no step under way."""
    for _ in range(PREPARED):
        next(batches)
    jax.block_until_ready(trainer.state)
    started = time.perf_counter()
    for _ in range(dispatches):
        _, batch = next(batches)
        trainer.state, _ = trainer.step_fn(trainer.state, trainer.key, batch)
    jax.block_until_ready(trainer.state)
    return time.perf_counter() - started


def ratios(experiment: Experiment, dispatches: int, rounds: int) -> list[float]:
    """Time with the constant batch over that with the pipeline, by round."""
    with tempfile.TemporaryDirectory() as workdir:
        trainer = training.score_trainer(experiment, Path(workdir))
        stream = trainer.batches()
        same = next(stream)
        constant = iter(lambda: same, None)
        found = []
        for _ in range(rounds + 1):  # the first is not counted
            fed = seconds(trainer, stream, dispatches)
            found.append(seconds(trainer, constant, dispatches) / fed)
        trainer.checkpoints.close()
        return found[1:]


def main() -> None:
    """Print for every case the median of the ratios, and the ratio of each round."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(
        f"{jax.devices()[0].device_kind}, {jax.device_count()} device(s), {options.rounds} rounds"
    )
    for name, (make, dispatches) in CASES.items():
        with tempfile.TemporaryDirectory() as where:
            found = ratios(make(Path(where)), dispatches, options.rounds)
        each = " ".join(f"{ratio:.3f}" for ratio in sorted(found))
        print(f"{name:12} {statistics.median(found):.3f}  ({each})", flush=True)


if __name__ == "__main__":
    main()
