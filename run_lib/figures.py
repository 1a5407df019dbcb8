"""Figures of toy runs: density of the ODE, trajectories of the λ-family, scores on a line."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import plotting
from diagnostics import ode_score
from likelihood import Divergence, ode_log_likelihood
from operators import fold_in_each, standard_normal
from run_lib import parallel
from run_lib.experiment import Experiment
from sampling import ReverseSDE

STEPS = 1000
STOPS = (820, 840, 860, 880, 900, 920, 940, 960, 980, 1000)  # as in the published figure
LINE_STOPS = tuple(range(0, STEPS + 1, 10))
POINTS = 4000
CELLS = 120  # of a density in the plane, each way
SCORE_TIMES = (0.2, 0.35, 0.5)


def save_toy(experiment: Experiment, params: Any, samples: np.ndarray, workdir: Path) -> None:
    """density.png, trajectories.png and, on a line, score.png, in the run folder."""
    shape = experiment.dataset.shape
    if shape == (1,):
        _save_on_a_line(experiment, params, samples, workdir)
    elif shape == (2,):
        _save_in_the_plane(experiment, params, samples, workdir)


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

    mapped = parallel.map_over_devices(log_p, in_axes=(None, 0), out_axes=0)
    padded = np.resize(points, (math.ceil(len(points) / size) * size, *points.shape[1:]))
    batches = np.split(padded.astype(np.float32), len(padded) // size)
    found = [parallel.join(mapped(params, parallel.split(batch))) for batch in batches]
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
    x0 = jnp.asarray(batch["image"][batch["mask"]])
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
