"""--mode=diagnose: error curves over t of a checkpoint, as rows, a table and a figure."""

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import diagnostics
import plotting
from elbo import gap_factor
from operators import fold_in_all, fold_in_each, standard_normal
from parameterization import ScoreFn
from run_lib import devices, evaluation_loop, folder, identities, loading, page
from run_lib.experiment import Experiment
from terms import Point

logger = logging.getLogger("fokker")
TABLE_TIMES = 6


class Mean(NamedTuple):
    """Mean over examples and its standard error."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} ± {self.error:.2g}"


Values = dict[str, np.ndarray]  # of every example


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Curves [times] by name over times t with weights of ∫ dt, and numbers that sum them up."""

    t: np.ndarray
    weights: np.ndarray
    examples: int
    curves: dict[str, list[Mean]]
    totals: dict[str, Mean]


def diagnose(
    experiment: Experiment, workdir: str | Path, eval_folder: str = "eval"
) -> dict[int, Diagnosis]:
    """Diagnose the checkpoints that --mode=eval would evaluate; returns the diagnosis of each step.

    Raises:
        ValueError: as `evaluate`.
    """
    workdir, diagnoses = Path(workdir), {}
    for step, params, target in loading.checkpoints_of(experiment, workdir, eval_folder):
        found = diagnoses[step] = diagnosis(experiment, params)
        figure = identities.of_model(experiment, params, step)
        identities.declare(target, [figure])
        rows = [row | {"identity": figure.identity} for row in _rows(experiment, found, step)]
        path = target / f"diagnosis_{step}.jsonl"
        folder.replace_file(path, (json.dumps(row) + "\n" for row in rows))
        plotting.save_error_curves(workdir / "diagnosis.png", found.t, panels(found))
        logger.info("\n%s\n%s", path, table(found))
        folder.replace_file(target / f"diagnosis_{step}.txt", [table(found) + "\n"])
    logger.info("open %s", page.write(workdir))
    return diagnoses


def diagnosis(experiment: Experiment, params: Any) -> Diagnosis:
    """All curves of one checkpoint; every time sees the same examples, with noise of its own."""
    settings = experiment.settings
    sde = settings.sde
    t, weights = diagnostics.time_grid(
        settings.training.smallest_time, sde.T, settings.eval.curve_times
    )
    at = Sampled(experiment, params)
    function = _curves_function(experiment)
    values = [at(number, time, function) for number, time in enumerate(t)]
    stacked = {name: np.stack([v[name] for v in values]) for name in values[0]}
    examples = next(iter(stacked.values())).shape[1]
    curves = {
        name: [_mean(v) for v in rows] for name, rows in stacked.items()
        if name not in ("curl", "slope")
    }  # fmt: skip
    pairs = zip(stacked["curl"], stacked["slope"], strict=True)
    curves["asymmetry"] = [ratio_of_means(*pair) for pair in pairs]
    found = {}
    if experiment.dataset.law is not None:
        ends = _ends(experiment, at)
        found = totals(stacked, ends, np.asarray(weights), settings.eval.trajectory_lmbds)
    return Diagnosis(np.asarray(t), np.asarray(weights), examples, curves, found)


@dataclasses.dataclass
class Sampled:
    """Functions of (score, t, point) at the noised examples of the split at one time.

    The score is that of p(x | c), given the context of every example, where there is one.
    """

    experiment: Experiment
    params: Any

    def __post_init__(self) -> None:
        config, devices = self.experiment.settings.eval, jax.device_count()
        size = -(-min(config.batch_size, config.curve_examples) // devices) * devices
        batches = evaluation_loop.evaluation_batches(
            self.experiment, batch_size=size, num_examples=config.curve_examples
        )
        self._batches, self._key = list(batches), self.experiment.keys["diagnose"]
        self._encoding = self.experiment.evaluation_encoding
        self._mapped: dict[Callable, Callable] = {}

    def __call__(
        self, number: int, t: jax.Array, function: Callable[..., dict]
    ) -> dict[str, np.ndarray]:
        """Values of every example; `number` tells the draws of one time from those of another."""
        if function not in self._mapped:
            self._mapped[function] = devices.map_over_devices(
                lambda *arguments: function(*self._arguments(*arguments)),
                in_axes=(None, None, None, 0),
                out_axes=0,
            )
        key, found = jax.random.fold_in(self._key, number), []
        for batch in self._batches:
            split = devices.split(batch | {"noise_id": np.maximum(batch["index"], 0)})
            results = devices.join(self._mapped[function](self.params, key, t, split))
            results = {name: values[batch["mask"]] for name, values in results.items()}
            _check_converged(results.pop("converged", None), batch["index"][batch["mask"]], t)
            found.append(results)
        return {name: np.concatenate([f[name] for f in found]) for name in found[0]}

    def _arguments(self, params: Any, key: jax.Array, t: jax.Array, batch: dict) -> tuple:
        keys = fold_in_each(key, batch["noise_id"])
        x0 = self._encoding.encode(batch["image"], fold_in_all(keys, 0))
        times = jnp.full(x0.shape[:1], t, x0.dtype)
        z = standard_normal(fold_in_all(keys, 1), x0)
        x = self.experiment.settings.sde.perturb(x0, times, z)
        score_fn = self.experiment.model.score(params, context=batch.get("context"))
        return score_fn, t, Point(x, times, z, fold_in_all(keys, 2))


def _mean(values: np.ndarray) -> Mean:
    values = np.asarray(values, np.float64)
    return Mean(float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))))


def _curves_function(experiment: Experiment) -> Callable[..., dict]:
    """Values of all curves at the points of one time."""
    law, sde = experiment.dataset.law, experiment.settings.sde
    solver = experiment.solver

    def function(score_fn: ScoreFn, t: jax.Array, point: Point) -> dict:
        found = diagnostics.error_curves(score_fn, sde, point)
        if law is None:
            return found
        own = diagnostics.ode_score(score_fn, sde, point.x, t, solver)
        truth = diagnostics.truth_curves(score_fn, sde, point, law, own)
        return found | truth | {"converged": own.converged}

    return function


def ratio_of_means(above: np.ndarray, below: np.ndarray) -> Mean:
    """E above/E below and its standard error to first order."""
    ratio = float(above.mean() / below.mean())
    return Mean(ratio, _mean(above - ratio * below).error / float(below.mean()))


def _check_converged(converged: np.ndarray | None, index: np.ndarray, t: jax.Array) -> None:
    if converged is not None and not converged.all():
        raise FloatingPointError(
            f"the ODE from t = {float(t):.4g} did not reach T for examples "
            f"{index[~converged][:10].tolist()}; raise eval.rtol and eval.atol"
        )


def _ends(experiment: Experiment, at: Sampled) -> Values:
    """log q/p at t_min, log q/π at T and −log q at t_min of every example."""
    settings, law = experiment.settings, experiment.dataset.law
    sde, solver, t_min = settings.sde, experiment.solver, settings.training.smallest_time

    def at_data(score_fn: ScoreFn, t: jax.Array, point: Point) -> dict:
        own = diagnostics.ode_score(score_fn, sde, point.x, t, solver)
        log_q = law.log_prob(point.x, point.t, sde)
        return {"kl": log_q - own.log_p, "entropy": -log_q, "converged": own.converged}

    def at_prior(score_fn: ScoreFn, t: jax.Array, point: Point) -> dict:
        del score_fn, t
        return {"start": law.log_prob(point.x, point.t, sde) - sde.prior_logp(point.x)}

    number = settings.eval.curve_times
    data = at(number, jnp.asarray(t_min), at_data)
    return data | at(number + 1, jnp.asarray(sde.T), at_prior)


def totals(
    curves: Values, ends: Values, weights: np.ndarray, lmbds: tuple[float, ...]
) -> dict[str, Mean]:
    """Both sides of the KL identity, the gap of the ELBO and the bounds of the λ-family.

    Args:
        curves: `fisher`, `fisher_ode`, `kl_rate` [times, examples].
        ends: `kl`, `entropy` at t_min and `start` at T [examples].
        weights: of ∫ dt [times].
        lmbds: the members; λ = 1 has no bound.

    Sums are taken per example, so that the standard errors hold whatever the examples share.
    """
    half = {name: 0.5 * weights @ curves[name] for name in ("fisher", "fisher_ode", "kl_rate")}
    values = {
        "KL(q ‖ ODE) at t_min, from densities": ends["kl"],
        "KL(q ‖ ODE) at t_min, from scores": ends["start"] + half["kl_rate"],
        "KL(q_T ‖ prior)": ends["start"],
        "½ ∫ g² E‖s − s*‖² dt": half["fisher"],
        "½ ∫ g² E‖s_ode − s*‖² dt": half["fisher_ode"],
        "entropy of q at t_min": ends["entropy"],
    }
    for lmbd in (lmbd for lmbd in lmbds if lmbd < 1.0):
        bound = ends["entropy"] + ends["start"] + gap_factor(lmbd) * half["fisher"]
        values[f"−ELBO of λ = {lmbd:g}"] = bound
    return {name: _mean(value) for name, value in values.items()}


PANELS = {
    "order 1: ‖e1‖²/d": ("dsm",),
    "orders 2 and 3": ("frobenius", "trace", "third"),
    "r_FP: ‖eps‖/√d": ("r_fp",),
    "asymmetry": ("asymmetry",),
    "g²-weighted errors of scores": ("fisher", "fisher_ode", "self"),
    "‖H − H*‖²": ("jacobian",),
    "rate of KL(data ‖ ODE)": ("kl_rate",),
}


def panels(found: Diagnosis) -> dict[str, dict[str, plotting.Band]]:
    """The curves that there are, in groups."""
    table = {}
    for title, names in PANELS.items():
        here = {name: np.asarray(found.curves[name]).T for name in names if name in found.curves}
        if here:
            table[title] = {name: (band[0], band[1]) for name, band in here.items()}
    return table


def table(found: Diagnosis) -> str:
    """A few times as lines, all curves as columns, then the totals."""
    names = list(found.curves)
    picks = np.unique(np.linspace(0, len(found.t) - 1, TABLE_TIMES).astype(int))
    lines = [["t", *names]]
    lines += [[f"{found.t[k]:.4f}", *(str(found.curves[name][k]) for name in names)] for k in picks]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
    text += [f"{name}: {value} nats" for name, value in found.totals.items()]
    return "\n".join(line.rstrip() for line in text)


def _rows(experiment: Experiment, found: Diagnosis, step: int) -> Iterator[dict[str, Any]]:
    settings = experiment.settings
    config, t_min = settings.eval, settings.training.smallest_time
    common = {
        "step": step, "split": config.dataset, "n": found.examples,
        "protocol": f"{config.solver}, rtol {config.rtol:g}, atol {config.atol:g}, "
                    f"t_min {t_min:g}, {config.curve_times} times{_given(experiment)}",
    }  # fmt: skip
    for name, curve in found.curves.items():
        for t, weight, value in zip(found.t, found.weights, curve, strict=True):
            yield common | {
                "curve": name, "t": float(t), "weight": float(weight),
                "mean": value.mean, "standard_error": value.error,
            }  # fmt: skip
    for name, value in found.totals.items():
        yield common | {"total": name, "mean": value.mean, "standard_error": value.error}


def _given(experiment: Experiment) -> str:
    """Say what the density is given, as the end of a protocol."""
    name = experiment.given_name
    return f", given {name}" if name else ""
