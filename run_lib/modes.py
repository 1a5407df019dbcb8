"""The modes of the command line by name: what each does, and what each needs of those before it."""

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path

from run_lib import (
    dequantizer_training,
    diagnosis_loop,
    drawing,
    evaluation_loop,
    guide,
    loading,
    quality,
    training,
)
from run_lib.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class Command:
    """The folders of a command."""

    workdir: Path
    eval_folder: str = "eval"
    deq_folder: str = "flowpp_dequantizer"


@dataclasses.dataclass(frozen=True)
class Mode:
    """A mode of the command line: what it runs, and what it checks long before it begins."""

    run: Callable[[Experiment, Command], object]
    check: Callable[[Experiment, Command, Collection[str]], None]  # also takes the modes before it
    processes: bool = True  # whether several may run it together


MODES = {
    "train": Mode(
        lambda e, c: training.train(e, c.workdir),
        lambda e, c, _: training.check(e, c.workdir),
    ),
    "train_deq": Mode(
        lambda e, c: dequantizer_training.train_dequantizer(e, c.workdir, c.deq_folder),
        lambda e, c, earlier: dequantizer_training.check(e, c.workdir, c.deq_folder, earlier),
    ),
    "train_classifier": Mode(
        lambda e, c: guide.train(e, c.workdir),
        lambda e, c, _: guide.check(e, c.workdir),
    ),
    "eval": Mode(
        lambda e, c: evaluation_loop.evaluate(e, c.workdir, c.eval_folder, c.deq_folder),
        lambda e, c, earlier: evaluation_loop.check(
            e, c.workdir, (c.eval_folder, c.deq_folder), earlier
        ),
    ),
    "import": Mode(
        lambda e, c: dequantizer_training.import_given(e, c.workdir, c.deq_folder),
        lambda e, c, _: dequantizer_training.check_given(e, c.workdir),
        processes=False,
    ),
    "fid_stats": Mode(
        lambda e, c: quality.fid_stats(e),
        lambda e, c, _: quality.check_fid_stats(e),
    ),
    "sample": Mode(
        lambda e, c: drawing.draw_samples(e, c.workdir),
        lambda e, c, earlier: drawing.check(e, c.workdir, earlier),
    ),
    "diagnose": Mode(
        lambda e, c: diagnosis_loop.diagnose(e, c.workdir, c.eval_folder),
        lambda e, c, earlier: loading.check(e, c.workdir, c.eval_folder, earlier),
        processes=False,
    ),
}


def check(experiment: Experiment, command: Command, modes: list[str]) -> None:
    """Check what the later modes of a command need, before the first one, which checks itself.

    Raises:
        ValueError: something is missing or does not fit.
    """
    for number, mode in enumerate(modes):
        if number:
            MODES[mode].check(experiment, command, modes[:number])
