"""Likelihoods and samples of checkpoints: rows per example and repeat, complete and resumable.

Every number is derived from rows; a row is keyed by (estimator, protocol, step, split, index,
repeat, identity), so results of different tolerances, networks or data never mix. The noise of an
example depends on (seed, repeat, index) only, not on the batch it is in.
"""

import dataclasses
import functools
import logging
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import plotting
from records import Records, Row, Running, Table, example_means, stored, values
from run_lib import (
    calibration,
    classification,
    comparison,
    devices,
    figures,
    folder,
    identities,
    loading,
    page,
    quality,
    report,
    sampling_loop,
)
from run_lib.baseline_estimators import baseline_estimators
from run_lib.conditional_estimators import with_contexts
from run_lib.dequantizer_training import check_dequantizer, load_dequantizer
from run_lib.estimators import Estimator, Parameters, estimators
from run_lib.experiment import Experiment
from run_lib.identities import Figure
from run_lib.trainer import Progress
from streams import Batch, Wanted

logger = logging.getLogger("fokker")
EXTREMES = 8


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Parameters to evaluate, and what the figures of a network and of baselines are of."""

    step: int
    params: Parameters
    target: Path  # folder of the results
    model: Figure
    baselines: Figure

    def key_of(self, estimator: Estimator) -> Row:
        """The fields that all rows of an estimator share."""
        figure = self.model if estimator.fit is None else self.baselines
        return {
            "estimator": estimator.name,
            "protocol": estimator.protocol,
            "step": self.step,
            "split": figure.split,
            "identity": figure.identity,
        }


class Program:
    """The compiled function of an estimator, for all checkpoints and all batches."""

    def __init__(self, estimator: Estimator) -> None:
        self.estimator = estimator
        self._mapped = devices.map_over_devices(
            estimator.function, in_axes=(None, None, 0), out_axes=0
        )
        self._is_compiled = False

    def __call__(
        self, progress: Progress, params: Any, key: jax.Array, batch: Batch
    ) -> tuple[float, dict[str, np.ndarray]]:
        """(seconds without compilation, results of the real examples) of a batch."""
        split = devices.split(batch | {"noise_id": np.maximum(batch["index"], 0)})
        if not self._is_compiled:
            with progress.compiling(self.estimator.name):
                self._mapped.lower(params, key, split).compile()
            self._is_compiled = True
        started = time.monotonic()
        results = devices.join(self._mapped(params, key, split))
        seconds = time.monotonic() - started
        return seconds, {name: values[batch["mask"]] for name, values in results.items()}


Programs = dict[tuple[str, str], Program]  # by name and protocol of the estimator


def evaluate(
    experiment: Experiment,
    workdir: str | Path,
    eval_folder: str = "eval",
    deq_folder: str = "flowpp_dequantizer",
) -> list[report.Result]:
    """Evaluate checkpoints of a run folder; rows that are already there are not computed again.

    Returns the lines of the table: of every estimator its mean over examples with the standard
    error, as `result.value`. Of several processes only the first returns them.

    Raises:
        ValueError: the folder has no checkpoint, or was made with another model, SDE or data.
    """
    workdir = Path(workdir)
    folder.results_folder(workdir, eval_folder, deq_folder)
    trivial: list[Estimator] = []  # the same for all checkpoints, so that each is fitted once
    programs: Programs = {}
    for step, params, target in loading.checkpoints_of(experiment, workdir, eval_folder):
        scorer = quality.scorer(experiment, target, step)  # its errors come first
        found, name = Parameters(params), ""
        if "variational" in experiment.settings.eval.dequantizations:
            dequantizer, name = load_dequantizer(experiment, workdir, deq_folder)
            found = Parameters(params, dequantizer)
        trivial = trivial or baseline_estimators(experiment)
        table = [*with_contexts(experiment, estimators(experiment, name)), *trivial]
        model = identities.of_model(experiment, params, step)
        checkpoint = Checkpoint(
            step, found, target, model, identities.of_baselines(experiment, step)
        )
        identities.declare(target, [checkpoint.model, checkpoint.baselines])
        evaluate_checkpoint(experiment, checkpoint, table, programs)
        if experiment.settings.eval.enable_sampling:
            quality.sample(experiment, params, model, target, scorer)
    devices.wait_for_all(f"rows {eval_folder}")
    return _tell(workdir, eval_folder) if devices.is_first() else []


def check(
    experiment: Experiment, workdir: Path, folders: tuple[str, str], earlier: Collection[str]
) -> None:
    """Check, before the first mode begins, what an evaluation that comes later needs.

    Args:
        experiment: settings and data.
        workdir: the run folder.
        folders: of the results and of the dequantiser.
        earlier: the modes before; what they will make need not be there yet.

    Raises:
        ValueError: something is missing or does not fit.
    """
    eval_folder, deq_folder = folders
    loading.check(experiment, workdir, eval_folder, earlier)
    folder.results_folder(workdir, eval_folder, deq_folder)
    variational = "variational" in experiment.settings.eval.dequantizations
    if variational and not {"train_deq", "import"} & set(earlier):
        check_dequantizer(experiment, workdir, deq_folder)
    with_contexts(experiment, estimators(experiment)), baseline_estimators(experiment)
    quality.check(experiment, will_have_statistics="fid_stats" in earlier)


def _tell(workdir: Path, eval_folder: str) -> list[report.Result]:
    """Tables in the folder of the results and on the terminal, and the report."""
    target = workdir / eval_folder
    results = report.summaries(target)
    report.write_summaries(target, results)
    tables = [
        (classification.HEADER, map(classification.cells, classification.write(target))),
        (calibration.HEADER, map(calibration.cells, calibration.write(target))),
        (quality.HEADER, map(quality.cells, quality.read(target))),
    ]
    logger.info("\n%s", report.table_text(results))
    if any(result.estimator in comparison.MODELS for result in results):
        logger.info("values of models and baselines are -log p: smaller is better")
    for sentence in report.probabilities(workdir, results):
        logger.info("%s", sentence)
    for sentence in report.sentences(results):
        logger.warning("%s", sentence)
    for header, lines in tables:
        if found := list(lines):
            logger.info("\n%s", report.aligned(header, found))
    logger.info("open %s", page.write(workdir))
    return results


def evaluate_checkpoint(
    experiment: Experiment, checkpoint: Checkpoint, table: list[Estimator], programs: Programs
) -> None:
    """All rows of one checkpoint; `programs` holds those of checkpoints before."""
    target, step = checkpoint.target, checkpoint.step
    records = Records(target, devices.host().index)
    if devices.is_first():
        _write_protocols(target, table)
    for estimator in table:
        if estimator.difference_of is not None:
            fill_differences(experiment, checkpoint, estimator, records)
            continue
        program = programs.setdefault((estimator.name, estimator.protocol), Program(estimator))
        fill_rows(experiment, checkpoint, program, records)
    records.sync()
    devices.wait_for_all(f"rows of {step}")
    if devices.is_first():
        figures.save_parts(target, step, table)
    if devices.is_first() and experiment.dataset.levels is not None:
        _save_extremes(experiment, checkpoint, table)


def _write_protocols(target: Path, table: list[Estimator]) -> None:
    """protocols.json: the details of every protocol by its text."""
    path = target / report.PROTOCOLS
    known = report.protocols(target)
    folder.write_json(path, known | {e.protocol: e.details for e in table})


def _save_extremes(experiment: Experiment, checkpoint: Checkpoint, table: list[Estimator]) -> None:
    """Draw the examples that are likeliest and least likely per dimension; else there is none."""
    dataset, split = experiment.dataset, experiment.settings.eval.dataset
    path = checkpoint.target / report.EXTREMES.format(step=checkpoint.step, split=split)
    path.unlink(missing_ok=True)  # of an earlier network
    if not table:
        return
    estimator, means = table[0], {}
    wanted = checkpoint.key_of(estimator)
    for rows in stored(checkpoint.target):
        if rows.shared == wanted:
            means = example_means(rows)
    order = sorted(means, key=means.get)
    if len(order) < 2 * EXTREMES:
        return
    chosen = [*order[:EXTREMES], *order[-EXTREMES:]]
    images = dataset.examples(split, np.asarray(chosen))
    names = [f"{means[index]:.2f}" for index in chosen]
    title = f"{estimator.name}, {estimator.unit}, likeliest and least likely {split} examples"
    plotting.save_named_images(path, images, dataset.levels, names, title)


def fill_rows(
    experiment: Experiment, checkpoint: Checkpoint, program: Program, records: Records
) -> None:
    """Compute the rows that are missing, batch by batch, each batch saved as it comes.

    A batch of which no row is missing is not read.
    """
    config, commit, estimator = experiment.settings.eval, folder.git_commit(), program.estimator
    shared = checkpoint.key_of(estimator)

    @functools.cache
    def parameters() -> Any:  # asked for where a row is missing
        return checkpoint.params if estimator.fit is None else devices.replicate(estimator.fit())

    size = _batch_size(experiment)
    mine = _of_this_process(size, _number(experiment))
    table, there = records.table(shared), Running()
    for index, repeat, value in _places(table):
        if index in mine and repeat < config.num_repeats:
            there.add(index, value)
    progress = Progress(there.rows, config.num_repeats * len(mine), "example")
    for repeat in range(config.num_repeats):
        key = jax.random.fold_in(experiment.keys[estimator.key], repeat)
        batches = evaluation_batches(
            experiment,
            batch_size=size,
            num_examples=config.num_examples,
            wanted=functools.partial(table.lacks, repeat=repeat),
        )
        for batch in batches:
            ids = batch["index"][batch["mask"]].tolist()
            seconds, results = program(progress, parameters(), key, batch)
            check_converged(estimator, ids, results.pop("converged"))
            more = {"unit": estimator.unit, "seconds": seconds / len(ids), "commit": commit}
            columns = {name: values.tolist() for name, values in results.items()}
            rows = [
                shared
                | {"index": index, "repeat": repeat}
                | {name: column[i] for name, column in columns.items()}
                | more
                for i, index in enumerate(ids)
            ]
            for row in records.append(rows):
                there.add(row["index"], row["value"])
            progress.update(there.rows, there.so_far(estimator.name))
    progress.close()


def _places(table: Table) -> Iterator[tuple[int, int, float]]:
    """(example, repeat, value) of every row."""
    columns = (values(table, name).tolist() for name in ("index", "repeat", "value"))
    return zip(*columns, strict=True)


def fill_differences(
    experiment: Experiment, checkpoint: Checkpoint, estimator: Estimator, records: Records
) -> None:
    """The rows of a difference, from those of this process that both of its estimators have."""
    mine = _of_this_process(_batch_size(experiment), _number(experiment))
    first, second = (
        {(index, repeat): v for index, repeat, v in _places(records.table(checkpoint.key_of(one)))}
        for one in estimator.difference_of
    )
    more = {"unit": estimator.unit, "nfe": 0, "seconds": 0.0, "commit": folder.git_commit()}
    shared = checkpoint.key_of(estimator)
    records.append(
        shared
        | {"index": index, "repeat": repeat}
        | {"value": estimator.factor * (value - second[index, repeat])}
        | more
        for (index, repeat), value in first.items()
        if index in mine and (index, repeat) in second
    )


def check_converged(estimator: Estimator, ids: list[int], converged: np.ndarray) -> None:
    """An example without a value stops the evaluation; the rows before it are kept."""
    failed = [index for index, ok in zip(ids, converged, strict=True) if not ok]
    if failed:
        raise FloatingPointError(
            f"{estimator.name} ({estimator.protocol}): no value for examples {failed[:10]} of "
            f"{len(failed)}: check the checkpoint; of an ODE, raise eval.rtol and eval.atol, or "
            "set eval.num_steps"
        )


def _number(experiment: Experiment) -> int:
    """Return how many examples of the split are evaluated."""
    config = experiment.settings.eval
    size = experiment.dataset.size(config.dataset) or 0
    return min(size, config.num_examples or size)


def _batch_size(experiment: Experiment) -> int:
    """`eval.batch_size`, or fewer where there are fewer examples: padding costs what they cost."""
    number, wanted = max(_number(experiment), 1), experiment.settings.eval.batch_size
    return sampling_loop.whole_batch(wanted, number, jax.device_count())


def _of_this_process(batch_size: int, number: int) -> set[int]:
    """Return which of the first `number` examples this process computes."""
    ids = np.arange(number)
    part = devices.host().part(batch_size)
    place = ids % batch_size
    return set(ids[(place >= part.start) & (place < part.stop)].tolist())


def _any(ids: np.ndarray) -> bool:
    """Say whether there are examples at all."""
    return ids.size > 0


def evaluation_batches(
    experiment: Experiment, *, batch_size: int, num_examples: int, wanted: Wanted = _any
) -> Iterator[Batch]:
    """The split `eval.dataset` in order, cut to its first examples; all of them for 0.

    A batch is not read where `wanted` is false of those of its examples that count.
    """
    batches = experiment.dataset.eval_batches(
        experiment.settings.eval.dataset,
        batch_size=batch_size,
        host=devices.host(),
        wanted=lambda ids: wanted(ids[ids < num_examples] if num_examples else ids),
    )
    for batch in batches:
        if num_examples:
            batch = batch | {"mask": batch["mask"] & (batch["index"] < num_examples)}
        yield batch
