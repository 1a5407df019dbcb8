"""Likelihoods and samples of checkpoints: rows per example and repeat, complete and resumable.

Every number is derived from rows; a row is keyed by (estimator, protocol, step, split, index,
repeat), so results of different tolerances or probes never mix. The noise of an example depends on
(seed, repeat, index) only, not on the batch it is in.
"""

import functools
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import plotting
from records import Records, Row, summarize
from run_lib import bits, build, folder, loading, parallel, quality, quality_loop, report
from run_lib.baseline_estimators import baseline_estimators
from run_lib.dequantizer_training import load_dequantizer
from run_lib.estimators import Estimator, Parameters, estimators
from run_lib.settings import Settings
from run_lib.trainer import Progress
from streams import Batch, Dataset

logger = logging.getLogger("fokker")
EXTREMES = 8


def evaluate(
    settings: Settings,
    workdir: Path,
    eval_folder: str,
    deq_folder: str = "flowpp_dequantizer",
) -> None:
    """Evaluate checkpoints of a run folder; rows that are already there are not computed again.

    Raises:
        ValueError: the folder has no checkpoint, or was made with another model, SDE or data.
    """
    trivial: list[Estimator] = []  # the same for all checkpoints, so that each is fitted once
    for step, dataset, params, target in loading.checkpoints_of(settings, workdir, eval_folder):
        scorer = quality_loop.scorer(settings, dataset, target, step)  # its errors come first
        found, name = Parameters(params), ""
        if "variational" in settings.eval.dequantizations:
            dequantizer, name = load_dequantizer(settings, dataset, workdir, deq_folder)
            found = Parameters(params, dequantizer)
        trivial = trivial or baseline_estimators(settings, dataset)
        table = [*estimators(settings, dataset, name), *trivial]
        evaluate_checkpoint(settings, dataset, found, step, target, table)
        if settings.eval.enable_sampling:
            quality_loop.sample(settings, dataset, params, step, target, scorer)
    parallel.wait_for_all(f"rows {eval_folder}")
    if parallel.is_first():
        _tell(workdir, eval_folder)


def _tell(workdir: Path, eval_folder: str) -> None:
    """Tables in the folder of the results and on the terminal, and the report."""
    target = workdir / eval_folder
    results = report.summaries(target)
    report.write_summaries(target, results)
    logger.info("\n%s", report.table_text(results))
    for sentence in report.sentences(results):
        logger.warning("%s", sentence)
    if rows := quality.read(target):
        logger.info("\n%s", report.aligned(quality.HEADER, map(quality.cells, rows)))
    logger.info("open %s", report.write(workdir))


def evaluate_checkpoint(
    settings: Settings,
    dataset: Dataset,
    params: Parameters,
    step: int,
    target: Path,
    table: list[Estimator],
) -> None:
    """All rows of one checkpoint."""
    host = parallel.host()
    records = Records(target, host.index)
    if parallel.is_first():
        _write_protocols(target, table)
    for estimator in table:
        fill_rows(settings, dataset, params, step, estimator, records)
    parallel.wait_for_all(f"rows of {step}")
    if parallel.is_first():
        bits.save(target, step, table)
    if parallel.is_first() and dataset.levels is not None and table:
        _save_extremes(settings, dataset, Records(target), step, table[0], target)


def _write_protocols(target: Path, table: list[Estimator]) -> None:
    """protocols.json: the details of every protocol by its text."""
    path = target / report.PROTOCOLS
    known = report.protocols(target)
    folder.write_json(path, known | {e.protocol: e.details for e in table})


def _save_extremes(
    settings: Settings, dataset: Dataset, records: Records, step: int, estimator: Estimator,
    target: Path,
) -> None:  # fmt: skip
    """extremes_<step>.png: the examples that are likeliest and least likely per dimension."""
    rows = records.select(
        estimator=estimator.name, protocol=estimator.protocol, step=step,
        split=settings.eval.dataset,
    )  # fmt: skip
    means = {index: summarize(group).mean for index, group in report.by(rows, "index").items()}
    order = sorted(means, key=means.get)
    if len(order) < 2 * EXTREMES:
        return
    chosen = [*order[:EXTREMES], *order[-EXTREMES:]]
    images = dataset.examples(settings.eval.dataset, np.asarray(chosen))
    names = [f"{means[index]:.2f}" for index in chosen]
    title = f"{estimator.name}, {estimator.unit}, likeliest and least likely examples"
    path = target / f"extremes_{step}.png"
    plotting.save_named_images(path, images, dataset.levels, names, title)


def fill_rows(
    settings: Settings,
    dataset: Dataset,
    params: Parameters,
    step: int,
    estimator: Estimator,
    records: Records,
) -> None:
    """Compute the rows that are missing, batch by batch, each batch saved as it comes."""
    config, commit = settings.eval, folder.git_commit()
    identity = {
        "estimator": estimator.name,
        "protocol": estimator.protocol,
        "step": step,
        "split": config.dataset,
    }
    timed = _timed(estimator.function)

    @functools.cache
    def parameters() -> Any:  # asked for where a row is missing
        return params if estimator.fit is None else parallel.replicate(estimator.fit())

    mine = _of_this_process(config.batch_size, _number(settings, dataset))

    def there() -> list[Row]:
        rows = records.select(**identity)
        return [r for r in rows if r["index"] in mine and r["repeat"] < config.num_repeats]

    progress = Progress(len(there()), config.num_repeats * len(mine), "example")
    for repeat in range(config.num_repeats):
        key = jax.random.fold_in(build.keys(settings)[estimator.key], repeat)
        for batch in evaluation_batches(settings, dataset):
            ids = batch["index"][batch["mask"]]
            rows = [identity | {"index": int(index), "repeat": repeat} for index in ids]
            if not records.missing(rows):
                continue
            seconds, results = timed(parameters(), key, batch)
            check_converged(estimator, rows, results.pop("converged"))
            shared = {"unit": estimator.unit, "seconds": seconds / len(rows), "commit": commit}
            records.append(
                row | {name: values[i].tolist() for name, values in results.items()} | shared
                for i, row in enumerate(rows)
            )
            found = there()
            progress.update(len(found), summarize(found).so_far(estimator.name))
    progress.close()


def _timed(function: Callable) -> Callable[..., tuple[float, dict[str, np.ndarray]]]:
    """(seconds without compilation, results of the real examples) of a batch."""
    mapped = parallel.map_over_devices(function, in_axes=(None, None, 0), out_axes=0)
    compiled = []

    def call(params: Any, key: jax.Array, batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
        split = parallel.split(batch | {"noise_id": np.maximum(batch["index"], 0)})
        if not compiled:
            logger.info("compiling the estimator")
            compiled.append(mapped.lower(params, key, split).compile())
        started = time.monotonic()
        results = parallel.join(mapped(params, key, split))
        seconds = time.monotonic() - started
        return seconds, {name: values[batch["mask"]] for name, values in results.items()}

    return call


def check_converged(estimator: Estimator, rows: list[Row], converged: np.ndarray) -> None:
    """An example without a value stops the evaluation; the rows before it are kept."""
    failed = [row["index"] for row, ok in zip(rows, converged, strict=True) if not ok]
    if failed:
        raise FloatingPointError(
            f"{estimator.name} ({estimator.protocol}): no value for examples {failed[:10]} of "
            f"{len(failed)}: check the checkpoint; of an ODE, raise eval.rtol and eval.atol, or "
            "set eval.num_steps"
        )


def _number(settings: Settings, dataset: Dataset) -> int:
    """How many examples of the split are evaluated."""
    size = dataset.size(settings.eval.dataset) or 0
    return min(size, settings.eval.num_examples or size)


def _of_this_process(batch_size: int, number: int) -> set[int]:
    """Which of the first `number` examples this process computes."""
    ids = np.arange(number)
    part = parallel.host().part(batch_size)
    place = ids % batch_size
    return set(ids[(place >= part.start) & (place < part.stop)].tolist())


def evaluation_batches(settings: Settings, dataset: Dataset) -> Iterator[Batch]:
    """The split in order, cut to `eval.num_examples`."""
    config = settings.eval
    batches = dataset.eval_batches(
        config.dataset, batch_size=config.batch_size, host=parallel.host()
    )
    for batch in batches:
        if config.num_examples:
            batch = batch | {"mask": batch["mask"] & (batch["index"] < config.num_examples)}
        if not batch["mask"].any():
            return
        yield batch
