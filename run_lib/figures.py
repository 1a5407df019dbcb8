"""Figures of toy runs: density of the ODE, trajectories, scores. Of bounds: where bits are spent.

    value = decoder + Σ_j bins_j + prior,   bins_j the integral between two values of log(σ/α)
    cumulative_0 = decoder,   cumulative_j = cumulative_{j−1} + bins_j,   at last + prior

Mean ± standard error over examples, the repeats of an example averaged first. `bits_<step>.json`
depends on the rows only, in whatever order they were computed; `bits_<step>.png` shows it.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import json_files
import plotting
from diagnostics import ode_score
from likelihood import Divergence, ode_log_likelihood
from operators import fold_in_each, standard_normal
from records import Row, Table, example_means, stored, summarize, summarize_columns, values
from run_lib import comparison, devices, folder, identities
from run_lib.estimators import Estimator
from run_lib.experiment import Experiment
from sampling import ReverseSDE

STEPS = 1000
STOPS = (820, 840, 860, 880, 900, 920, 940, 960, 980, 1000)  # as in the published figure
LINE_STOPS = tuple(range(0, STEPS + 1, 10))
POINTS = 4000
CELLS = 120  # of a density in the plane, each way
SCORE_TIMES = (0.2, 0.35, 0.5)
Parts = dict[str, Any]  # of the rows of one estimator, protocol and split at one step
HISTOGRAM = "histogram"  # the baseline that the figure shows


def save_toy(experiment: Experiment, params: Any, samples: np.ndarray, workdir: Path) -> None:
    """density.png, trajectories.png and, on a line, score.png, in the run folder.

    All are of model space: data that the config standardises are shown standardised.
    """
    shape = experiment.dataset.shape
    if shape == (1,):
        _save_on_a_line(experiment, params, _encoded(experiment, samples), workdir)
    elif shape == (2,):
        _save_in_the_plane(experiment, params, _encoded(experiment, samples), workdir)


def _encoded(experiment: Experiment, x: np.ndarray) -> np.ndarray:
    """The points in model space, without noise in their cells."""
    encoding = dataclasses.replace(experiment.encoding, widths=None)
    keys = fold_in_each(jax.random.key(0), jnp.arange(len(x)))
    return np.asarray(encoding.encode(jnp.asarray(x), keys))


def _density(experiment: Experiment, params: Any, points: np.ndarray) -> np.ndarray:
    """exp(log p) of the probability-flow ODE with exact trace at points [n, d]."""
    settings, model = experiment.settings, experiment.model
    size = settings.eval.batch_size

    def log_p(params: Any, x: jax.Array) -> jax.Array:  # NaN, a hole in the figure, where unsolved
        keys = fold_in_each(jax.random.key(0), jnp.arange(x.shape[0]))  # the exact trace needs none
        found = ode_log_likelihood(
            model.score(params), model.sde, x, keys, t_min=settings.training.smallest_time,
            solver=experiment.solver, divergence=Divergence("exact"),
        )  # fmt: skip
        return jnp.where(found.converged, found.log_p, jnp.nan)

    mapped = devices.map_over_devices(log_p, in_axes=(None, 0), out_axes=0)
    padded = np.resize(points, (math.ceil(len(points) / size) * size, *points.shape[1:]))
    batches = np.split(padded.astype(np.float32), len(padded) // size)
    found = [devices.join(mapped(params, devices.split(batch))) for batch in batches]
    return np.exp(np.concatenate(found)[: len(points)])


def _data_density(experiment: Experiment, points: np.ndarray) -> np.ndarray:
    """The exact density at t_min, where the ODE ends."""
    x, settings = jnp.asarray(points, jnp.float32), experiment.settings
    t = jnp.full(x.shape[:1], settings.training.smallest_time)
    return np.exp(
        np.asarray(jax.jit(experiment.dataset.law.log_prob, static_argnums=2)(x, t, settings.sde))
    )


def _trajectories(experiment: Experiment, params: Any, shape: tuple, stops: tuple) -> dict:
    """Points [len(stops), n, d] of every λ of `eval.trajectory_lmbds`."""
    settings, model, key = experiment.settings, experiment.model, experiment.keys["trajectories"]
    keys, rows = fold_in_each(key, jnp.arange(POINTS)), {}
    for lmbd in settings.eval.trajectory_lmbds:
        sampler = ReverseSDE(STEPS, settings.training.smallest_time, lmbd, False)

        def run(params: Any, sampler: ReverseSDE = sampler) -> jax.Array:
            like = jnp.zeros((POINTS, *shape), jnp.float32)
            return sampler.trajectory(model.score(params), model.sde, keys, like, stops)

        rows[f"λ = {lmbd:g}"] = np.asarray(jax.jit(run)(params))
    return rows


def _save_in_the_plane(
    experiment: Experiment, params: Any, samples: np.ndarray, workdir: Path
) -> None:
    radius = 1.2 * float(np.quantile(np.abs(samples), 0.999))
    cells = (2 * np.arange(CELLS) + 1) / CELLS - 1.0
    grid = radius * np.stack(np.meshgrid(cells, cells, indexing="ij"), axis=-1).reshape(-1, 2)
    images = {"ODE": _density(experiment, params, grid).reshape(CELLS, CELLS)}
    if experiment.dataset.law is not None:
        images["data"] = _data_density(experiment, grid).reshape(CELLS, CELLS)
    plotting.save_density_images(workdir / "density.png", images, radius)
    rows = _trajectories(experiment, params, experiment.dataset.shape, STOPS)
    plotting.save_trajectories(workdir / "trajectories.png", rows, [f"step {k}" for k in STOPS])


def _save_on_a_line(
    experiment: Experiment, params: Any, samples: np.ndarray, workdir: Path
) -> None:
    low, high = np.quantile(samples, [0.001, 0.999])
    x = np.linspace(low - 0.2 * (high - low), high + 0.2 * (high - low), 500)
    curves = {"ODE": (x, _density(experiment, params, x[:, None]))}
    if experiment.dataset.law is not None:
        curves["data"] = (x, _data_density(experiment, x[:, None]))
    plotting.save_density_on_a_line(workdir / "density.png", samples[:, 0], curves)
    _save_paths(experiment, params, workdir)
    _save_scores(experiment, params, x, workdir)


def _save_paths(experiment: Experiment, params: Any, workdir: Path) -> None:
    settings = experiment.settings
    t_min, sde = settings.training.smallest_time, settings.sde
    times = np.linspace(sde.T, t_min, len(LINE_STOPS))
    batch = next(experiment.dataset.eval_batches("test", batch_size=POINTS))
    x0 = jnp.asarray(_encoded(experiment, batch["image"][batch["mask"]]))
    keys = fold_in_each(experiment.keys["forward"], jnp.arange(len(x0)))
    z = standard_normal(keys, x0)
    forward = [sde.perturb(x0, jnp.full((len(x0),), t, x0.dtype), z)[:, 0] for t in times]
    rows = _trajectories(experiment, params, experiment.dataset.shape, LINE_STOPS)
    panels = {"data": np.asarray(jnp.stack(forward))} | {
        name: path[..., 0] for name, path in rows.items()
    }
    panels = {name: path[::-1] for name, path in panels.items()}
    plotting.save_paths_on_a_line(workdir / "trajectories.png", panels, times[::-1])


def _save_scores(experiment: Experiment, params: Any, x: np.ndarray, workdir: Path) -> None:
    model, law = experiment.model, experiment.dataset.law
    points, panels = jnp.asarray(x[:, None], jnp.float32), {}

    @jax.jit
    def scores(params: Any, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        own = ode_score(model.score(params), model.sde, points, t, experiment.solver)
        own_score = jnp.where(own.converged[:, None], own.score, jnp.nan)
        return model.score(params)(points, jnp.full((len(x),), t)), own_score

    for t in SCORE_TIMES:
        times = jnp.full((len(x),), t, jnp.float32)
        curves = dict(zip(("model", "of its ODE"), scores(params, jnp.asarray(t)), strict=True))
        if law is not None:
            curves["data"] = law.score(points, times, model.sde)
        panels[f"score at t = {t:g}"] = {n: np.asarray(c)[:, 0] for n, c in curves.items()}
    plotting.save_score_on_a_line(workdir / "score.png", x, panels)


# Where the bits of a bound are spent.


def save_parts(target: Path, step: int, table: list[Estimator]) -> None:
    """bits_<step>.json and bits_<step>.png of a folder of rows.

    Without rows of a bound there are none, and those of an earlier network go.

    Edges are those of the estimators; of other protocols, those that the file already has.
    """
    path = target / f"bits_{step}.json"
    before = {(parts["estimator"], parts["protocol"]): parts["edges"] for parts in _parts_in(path)}
    edges = before | {(e.name, e.protocol): list(e.edges) for e in table if e.edges}
    tables = [t for t in identities.reported(target, stored(target)) if t["step"] == step]
    picture = path.with_suffix(".png")
    if found := all_parts(tables, edges):
        folder.write_json(path, found)
        plotting.save_bits(picture, list(map(_drawn, found)))
    else:
        path.unlink(missing_ok=True)
        picture.unlink(missing_ok=True)


def _parts_in(path: Path) -> list[Parts]:
    return json_files.read(path) if path.exists() else []


def all_parts(tables: Iterable[Table], edges: dict[tuple[str, str], list[float]]) -> list[Parts]:
    """The parts of every estimator, protocol and split whose edges are known, in order of names.

    Args:
        tables: of one step; rows without bins, or with another number of them, do not count.
        edges: log(σ/α) at the ends of the bins, by (estimator, protocol).
    """
    found, names = [], ("estimator", "protocol", "split")
    for table in sorted(tables, key=lambda table: [table[name] for name in names]):
        ends = edges.get((table["estimator"], table["protocol"]), [])
        if len(binned := _binned(table, len(ends) - 1)):
            histogram = _histogram(binned, tables)
            found.append(_parts(binned) | {"edges": ends, HISTOGRAM: histogram})
    return found


def _binned(table: Table, number: int) -> Sequence[Row]:
    """The rows of a table with so many bins."""
    if table.knows("bins") and table.column("bins").ndim == 2:
        return table if table.column("bins").shape[1] == number else []
    return [row for row in table if 0 < len(row.get("bins", ())) == number]


def _parts(rows: Sequence[Row]) -> Parts:
    first, value, index = rows[0], summarize(rows), values(rows, "index")
    terms = np.column_stack([values(rows, name) for name in ("decoder", "bins", "prior")])
    mean, error = _summaries(index, terms)
    names = ("estimator", "protocol", "split", "step", "unit")
    return {name: first[name] for name in names} | {
        "n": value.examples,
        "repeats": value.repeats,
        "decoder": _named(mean[0], error[0]),
        "bins": _named(mean[1:-1], error[1:-1]),
        "prior": _named(mean[-1], error[-1]),
        "cumulative": _named(*_summaries(index, np.cumsum(terms, axis=1))),
    }


def _named(mean: float | list[float], error: float | list[float]) -> dict[str, Any]:
    return {"mean": mean, "standard_error": error}


def _summaries(index: np.ndarray, columns: np.ndarray) -> tuple[list[float], list[float]]:
    """Means and standard errors over examples, of n values for each row."""
    mean, error = summarize_columns(index, columns)
    return mean.tolist(), error.tolist()


def _histogram(rows: Sequence[Row], tables: Iterable[Table]) -> float | None:
    """The mean of the independent histogram over the examples of a bound; None without it.

    The best one where there are several; none beside the bound of noised data, which is no bound
    of the same thing.
    """
    first, examples = rows[0], np.unique(values(rows, "index")).tolist()
    if first["estimator"] not in comparison.MODELS:
        return None
    alike = [
        example_means(table)
        for table in tables
        if table["estimator"] == HISTOGRAM
        and (table["split"], table[0]["unit"]) == (first["split"], first["unit"])
    ]
    whole = [means for means in alike if means.keys() >= set(examples)]
    return min((float(np.mean([means[i] for i in examples])) for means in whole), default=None)


def _drawn(parts: Parts) -> plotting.Bits:
    """Turn the parts of a bound into what the figure draws."""
    start = "entropy at t_min" if parts["estimator"] == "bound at t_min" else "decoder"
    pairs = {name: tuple(parts[name].values()) for name in ("decoder", "bins", "prior")}
    return plotting.Bits(
        title=f"{parts['estimator']}, step {parts['step']}, {parts['n']} {parts['split']} examples",
        subtitle=parts["protocol"],
        unit=parts["unit"],
        edges=parts["edges"],
        bins=pairs["bins"],
        cumulative=tuple(parts["cumulative"].values()),
        ends={start: pairs["decoder"], "prior": pairs["prior"]},
        baseline=parts[HISTOGRAM],
    )
