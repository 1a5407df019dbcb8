"""Likelihoods and samples of checkpoints: rows per example and repeat, complete and resumable.

Every number is derived from rows; a row is keyed by (estimator, protocol, step, split, index,
repeat), so results of different tolerances or probes never mix. The noise of an example depends on
(seed, repeat, index) only, not on the batch it is in.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import datasets
import train_state
from checkpoints import Checkpoints
from elbo import ESTIMATORS
from likelihood import Divergence, ode_log_likelihood, variational_bound
from operators import fold_in_all, fold_in_each
from records import Records, Row
from run_lib import build, folder, parallel, quality, quality_loop, report
from run_lib.settings import Settings
from streams import Batch, Dataset

logger = logging.getLogger("fokker")


def evaluate(settings: Settings, workdir: Path, eval_folder: str) -> None:
    """Evaluate checkpoints of a run folder; rows that are already there are not computed again.

    Raises:
        ValueError: the folder has no checkpoint, or was made with another model, SDE or data.
    """
    for step, dataset, params, target in checkpoints_of(settings, workdir, eval_folder):
        scorer = quality_loop.scorer(settings, dataset, target, step)  # its errors come first
        evaluate_checkpoint(settings, dataset, params, step, target, scorer)
    logger.info("\n%s", report.table_text(report.summaries(workdir / eval_folder)))
    if rows := quality.read(workdir / eval_folder):
        logger.info("\n%s", report.aligned(quality.HEADER, map(quality.cells, rows)))
    page = report.write(workdir)
    logger.info("open %s", page)


def evaluate_checkpoint(
    settings: Settings,
    dataset: Dataset,
    params: Any,
    step: int,
    target: Path,
    scorer: quality_loop.Scorer | None,
) -> None:
    """All enabled estimates of one checkpoint."""
    records = Records(target / "rows.jsonl")
    for estimator in estimators(settings, dataset):
        fill_rows(settings, dataset, params, step, estimator, records)
    if settings.eval.enable_sampling:
        quality_loop.sample(settings, dataset, params, step, target, scorer)


def fill_rows(
    settings: Settings,
    dataset: Dataset,
    params: Any,
    step: int,
    estimator: Estimator,
    records: Records,
) -> None:
    """Compute the rows that are missing, batch by batch, each batch saved as it comes."""
    mapped = parallel.map_over_devices(estimator.function, in_axes=(None, None, 0), out_axes=0)
    compiled = False
    config = settings.eval
    identity = {
        "estimator": estimator.name,
        "protocol": estimator.protocol,
        "step": step,
        "split": config.dataset,
    }
    for repeat in range(config.num_repeats):
        key = jax.random.fold_in(build.keys(settings)[estimator.key], repeat)
        for batch in evaluation_batches(settings, dataset):
            rows = [
                identity | {"index": int(index), "repeat": repeat}
                for index in batch["index"][batch["mask"]]
            ]
            if not records.missing(rows):
                continue
            split = parallel.split(batch | {"noise_id": np.maximum(batch["index"], 0)})
            if not compiled:  # so that the seconds are those of the solve
                mapped.lower(params, key, split).compile()
                compiled = True
            started = time.monotonic()
            results = parallel.join(mapped(params, key, split))
            results = {name: v[batch["mask"]] for name, v in results.items()}
            check_converged(estimator, rows, results["converged"])
            seconds = (time.monotonic() - started) / len(rows)
            records.append(
                row | {
                    "value": float(value), "unit": estimator.unit,
                    "nfe": int(nfe), "seconds": seconds,
                }
                for row, value, nfe in zip(rows, results["value"], results["nfe"], strict=True)
            )  # fmt: skip
            logger.info(report.partial_text(records, identity))


def check_converged(estimator: Estimator, rows: list[Row], converged: np.ndarray) -> None:
    """An example without a value stops the evaluation; the rows before it are kept."""
    failed = [row["index"] for row, ok in zip(rows, converged, strict=True) if not ok]
    if failed:
        raise FloatingPointError(
            f"{estimator.name} ({estimator.protocol}): no value for examples {failed[:10]} of "
            f"{len(failed)}; raise eval.rtol and eval.atol, or check the checkpoint"
        )


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
