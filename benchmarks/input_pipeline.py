"""Images per second of the data pipeline, and how much of the time a training waits for it.

    python -m benchmarks.input_pipeline [--part=training|reading] [--rounds=5]

training: steps per second of training fed by the pipeline, over those of one constant batch. Both
take the same compiled step and take turns within one process; the median of the ratios by round is
printed. 1 means that training never waits for data. A pixel network on images in memory, the same
on PNG files that are decoded on demand, and the MLP of the digits with 20 steps per dispatch, the
hardest case, since a step takes a millisecond.

reading: images per second and CPU time per image of batches alone, for images that are decoded one
batch after another ("in turn") and for the pipeline with 1, 2, … threads, up to the cores of the
host; medians of the rounds. PNG files and records of PNG of 64×64×3, JPEG records of 500×375 pixels
that are cut and resized to 256×256, and arrays of 64×64×3 that are flipped.
"""

import argparse
import dataclasses
import io
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

import decoding
from configs import base
from configs.digits import vp as digits
from lazy_tensorflow import tensorflow
from run_lib import training
from run_lib.experiment import Experiment
from run_lib.trainer import Trainer
from streams import Finite, ahead
from tfrecords import Records


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
BATCH = 64
READ = 20  # batches of a round


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


def pictures(number: int, height: int, width: int) -> list[Image.Image]:
    """Smooth random images with some noise: they compress about as photographs do."""
    rng, found = np.random.default_rng(0), []
    for _ in range(number):
        coarse = Image.fromarray(rng.integers(256, size=(8, 8, 3), dtype=np.uint8))
        fine = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), float)
        noisy = fine + 6.0 * rng.standard_normal(fine.shape)
        found.append(Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)))
    return found


def png_files(where: Path) -> Finite:
    """1,000 PNG files."""
    paths = [where / f"{number:04d}.png" for number in range(1000)]
    for path, picture in zip(paths, pictures(1000, 64, 64), strict=True):
        picture.save(path)
    return decoding.of_files(paths, (64, 64, 3))


def png_records(where: Path) -> Finite:
    """The same in one TFRecord."""
    return records(where, pictures(1000, 64, 64), "PNG", decoding.as_stored, 64)


def jpeg_records(where: Path) -> Finite:
    """300 JPEG of the size of an image of ImageNet, cut and resized."""
    return records(where, pictures(300, 375, 500), "JPEG", decoding.centre_square, 256)


def records(
    where: Path, images: list[Image.Image], kind: str, prepare: decoding.Prepare, size: int
) -> Finite:
    """A split of encoded images in one TFRecord."""
    tf = tensorflow()
    with tf.io.TFRecordWriter(str(where / "images.tfrecord")) as writer:
        for image in images:
            content = io.BytesIO()
            image.save(content, kind, quality=90)
            writer.write(content.getvalue())

    def parse(record: Any) -> Any:
        return tf.io.decode_image(record, channels=3, expand_animations=False)

    return decoding.of_records(Records([where / "images.tfrecord"]), parse, prepare, size)


def arrays(where: Path) -> Finite:
    """2,000 images in memory, flipped at random."""
    del where
    images = np.random.default_rng(0).integers(256, size=(2000, 64, 64, 3), dtype=np.uint8)
    return Finite(len(images), images.__getitem__, flip=True)


SPLITS = {
    "PNG 64²": png_files,
    "PNG records 64²": png_records,
    "JPEG records → 256²": jpeg_records,
    "arrays 64², flips": arrays,
}


def reading(split: Finite, threads: int) -> tuple[float, float]:
    """(images per second, CPU µs per image) of training batches; 0 threads: decoded in turn."""
    if threads:
        decoding.MOST_THREADS = threads
    else:
        split = dataclasses.replace(split, pipeline=None)
    rows = {"seed": 0, "batch_size": BATCH, "part": slice(0, BATCH)}
    batches = ahead(split.training_batches(0, **rows))
    for _ in range(PREPARED):
        next(batches)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(READ):
        next(batches)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return READ * BATCH / wall, 1e6 * cpu / (READ * BATCH)


def print_reading(rounds: int) -> None:
    """Print the speeds of all kinds of files."""
    cores, tried = os.cpu_count() or 1, [0]
    while (number := 2 ** (len(tried) - 1)) <= cores:
        tried.append(number)
    print("| images | threads | images/s | CPU µs per image |\n|---|---|---|---|")
    for name, make in SPLITS.items():
        with tempfile.TemporaryDirectory() as where:
            split = make(Path(where))
            counts = tried if split.pipeline else [0]
            found = [[reading(split, threads) for threads in counts] for _ in range(rounds)]
        for number, each in zip(counts, zip(*found, strict=True), strict=True):
            speed, cost = (statistics.median(part) for part in zip(*each, strict=True))
            print(f"| {name} | {number or 'in turn'} | {speed:.0f} | {cost:.0f} |", flush=True)


def main() -> None:
    """Print for every case the median of the ratios and the ratio of each round, or the speeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("training", "reading"), default="training")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.part == "reading":
        print_reading(options.rounds)
        return
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
