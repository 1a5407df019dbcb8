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
# Fields of `training` that the value of the objective depends on.
OBJECTIVE_FIELDS = (
    "objective", "continuous", "smallest_time", "reduce_mean", "likelihood_weighting",
    "importance_weighting", "debias", "score_matching_order", "second_order_weight",
    "trace_weight", "third_order_weight", "third_order_form", "derivative_estimator",
    "num_probes", "alpha", "beta", "scalar_fp", "fp_wgt_type", "m", "fp_form", "fp_probes",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Estimator:
    """A named value per example, with the protocol that defines it."""

    name: str
    protocol: str
    unit: str
    key: str  # a name in build.keys; ODE and bound share their dequantisation noise
    # (params, key, batch with noise_id) → {"value": [B], "nfe": [B], "converged": [B]}
    function: Callable[..., dict[str, jax.Array]]


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


def checkpoints_of(
    settings: Settings, workdir: Path, eval_folder: str
) -> Iterator[tuple[int, Dataset, Any, Path]]:
    """(step, data, moving average of the parameters, folder of results) of every checkpoint.

    Raises:
        ValueError: the folder has no checkpoint, or was made with another model, SDE or data.
    """
    if Path(eval_folder).name != eval_folder:
        raise ValueError(f"--eval_folder={eval_folder!r}: need the plain name of a folder")
    checkpoints = Checkpoints(workdir)
    try:
        steps = checkpoint_steps(settings, checkpoints)
        ignore = ("eval", "sampling", "optim", "data.num_train")
        folder.reconcile(workdir, settings.resolved(), ignore=ignore)
        folder.same_examples(workdir / eval_folder, settings.resolved())
        parallel.check_batch_size(settings.eval.batch_size, "eval.batch_size")
        dataset = datasets.load(settings.data)
        target = workdir / eval_folder
        folder.write_json(target / "config.json", settings.resolved())
        for step in steps:
            yield step, dataset, load_parameters(settings, dataset, checkpoints, step), target
    finally:
        checkpoints.close()


def checkpoint_steps(settings: Settings, checkpoints: Checkpoints) -> list[int]:
    """Steps to evaluate: begin_ckpt..end_ckpt × snapshot_freq, or the latest."""
    available = checkpoints.steps()
    if not available:
        raise ValueError(
            f"no checkpoint in {checkpoints.directory}: run --mode=train with this --workdir first"
        )
    begin, end = settings.eval.begin_ckpt, settings.eval.end_ckpt
    if end == 0:
        return available[-1:]
    every = settings.training.snapshot_freq
    wanted = [k * every for k in range(max(begin, 1), end + 1)]
    absent = sorted(set(wanted) - set(available))
    if absent:
        raise ValueError(
            f"eval.begin_ckpt={begin}, eval.end_ckpt={end} times training.snapshot_freq={every}: "
            f"no checkpoint of steps {absent}; there are {available}"
        )
    return wanted


def load_parameters(
    settings: Settings, dataset: Dataset, checkpoints: Checkpoints, step: int
) -> Any:
    """The moving average of a checkpoint."""
    model = build.score_model(settings)
    optimizer = settings.optim.chain(settings.training.n_iters)

    def fresh() -> train_state.TrainState:
        params = model.init(jax.random.key(0), dataset.shape)
        return train_state.create(params, optimizer)

    return checkpoints.restore(step, jax.eval_shape(fresh)).ema_params


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


def estimators(settings: Settings, dataset: Dataset) -> list[Estimator]:
    """The enabled estimators."""
    config, table = settings.eval, []
    if config.enable_bpd:
        table.append(_ode(settings, dataset))
    if config.enable_bpd and dataset.law is not None:
        table.append(_divergence_from_data(settings, dataset))
    if config.bound:
        table.append(_bound(settings, dataset))
    if config.elbo:
        table.append(_elbo(settings, dataset))
    if config.enable_loss:
        table.append(_loss(settings, dataset))
    return table


def _ode(settings: Settings, dataset: Dataset) -> Estimator:
    encoding = build.evaluation_encoding(settings, dataset)

    def value(log_p: jax.Array, x: jax.Array) -> jax.Array:
        return encoding.negative_log_likelihood(log_p, x)

    return _by_ode(settings, dataset, "ODE", value)


def _divergence_from_data(settings: Settings, dataset: Dataset) -> Estimator:
    """log q(x) − log p(x), whose mean is the divergence of the model from the known law."""
    law = dataset.law
    return _by_ode(settings, dataset, "KL(data ‖ ODE)", lambda log_p, x: law.log_data(x) - log_p)


def _by_ode(
    settings: Settings, dataset: Dataset, name: str, value: Callable[..., jax.Array]
) -> Estimator:
    model, encoding = build.score_model(settings), build.evaluation_encoding(settings, dataset)
    tools, t_min = build.likelihood_tools(settings), settings.training.smallest_time

    def function(params: Any, key: jax.Array, batch: dict) -> dict[str, jax.Array]:
        keys = fold_in_each(key, batch["noise_id"])
        x = encoding.encode(batch["image"], fold_in_all(keys, 0))
        result = ode_log_likelihood(
            model.score(params), model.sde, x, fold_in_all(keys, 1),
            t_min=t_min, solver=tools.solver, divergence=tools.divergence,
        )  # fmt: skip
        found = value(result.log_p, x)
        return {"value": found, "nfe": result.nfe, "converged": result.converged}

    solver = tools.solver
    protocol = (
        f"{solver.name}, rtol {solver.rtol:g}, atol {solver.atol:g}, "
        f"trace {_trace(tools.divergence)}, "
        f"t_min {t_min:g}, {_dequantization(encoding)}"
    )
    return Estimator(name, protocol, encoding.unit, "eval", function)


def _bound(settings: Settings, dataset: Dataset) -> Estimator:
    model, encoding = build.score_model(settings), build.evaluation_encoding(settings, dataset)
    tools, number = build.likelihood_tools(settings), settings.eval.num_times

    def function(params: Any, key: jax.Array, batch: dict) -> dict[str, jax.Array]:
        keys = fold_in_each(key, batch["noise_id"])
        x = encoding.encode(batch["image"], fold_in_all(keys, 0))
        bound = variational_bound(
            model.score(params), model.sde, x, fold_in_all(keys, 2),
            proposal=tools.proposal, num_times=number,
        )  # fmt: skip
        value = encoding.negative_log_likelihood(-bound.nll, x)
        nfe = jnp.full(value.shape, number + 1)
        return {"value": value, "nfe": nfe, "converged": jnp.isfinite(value)}

    protocol = (
        f"{number} stratified times, t_min {settings.training.smallest_time:g}, "
        f"{_dequantization(encoding)}"
    )
    return Estimator("bound", protocol, encoding.unit, "eval", function)


def _elbo(settings: Settings, dataset: Dataset) -> Estimator:
    model, encoding = build.score_model(settings), build.evaluation_encoding(settings, dataset)
    tools, number = build.likelihood_tools(settings), settings.eval.num_times
    name, divergence = settings.eval.elbo_estimator, tools.divergence
    build.check_elbo(settings)

    def function(params: Any, key: jax.Array, batch: dict) -> dict[str, jax.Array]:
        keys = fold_in_each(key, batch["noise_id"])
        x = encoding.encode(batch["image"], fold_in_all(keys, 0))
        log_p = ESTIMATORS[name](
            model.score(params), model.sde, x, fold_in_all(keys, 3),
            num_times=number, divergence=divergence,
        )  # fmt: skip
        value = encoding.negative_log_likelihood(log_p, x)
        nfe = jnp.full(value.shape, number)
        return {"value": value, "nfe": nfe, "converged": jnp.isfinite(value)}

    one = _trace(dataclasses.replace(divergence, num_probes=1))
    times = {"published": f"uniform times, trace {one}, one x_T each",
             "low_variance": f"stratified debiased times, trace {_trace(divergence)}"}  # fmt: skip
    start = float(model.sde.sigma(jnp.zeros(())))
    protocol = f"{name}: {number} {times[name]}, sigma(0) {start:g}, {_dequantization(encoding)}"
    return Estimator("-ELBO", protocol, encoding.unit, "eval", function)


def _loss(settings: Settings, dataset: Dataset) -> Estimator:
    per_example = build.per_example_loss(settings, dataset, train=False)

    def function(params: Any, key: jax.Array, batch: dict) -> dict[str, jax.Array]:
        value, _ = per_example(params, key, batch)
        return {"value": value, "nfe": jnp.ones(value.shape), "converged": jnp.isfinite(value)}

    fields = dataclasses.asdict(settings.training)
    chosen = ", ".join(f"{name} {fields[name]}" for name in OBJECTIVE_FIELDS)
    protocol = f"training objective: {chosen}"
    return Estimator("loss", protocol, "", "eval_loss", function)


def _trace(divergence: Divergence) -> str:
    return "exact" if divergence.kind == "exact" else f"{divergence.num_probes} {divergence.kind}"


def _dequantization(encoding: Any) -> str:
    return "uniform dequantisation" if encoding.unit == "bits/dim" else "real-valued data"


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
