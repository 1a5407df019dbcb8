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
from datasets import Dataset
from elbo import gap_factor
from operators import fold_in_all, fold_in_each, gaussian
from run_lib import build, evaluation_loop, parallel, report
from run_lib.settings import Settings
from terms import Point

logger = logging.getLogger("fokker")
TABLE_TIMES = 6


class Mean(NamedTuple):
    """Mean over examples and its standard error."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} ± {self.error:.2g}"


Curve = list[Mean]


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Curves by name over times t with weights of ∫ dt, and numbers that sum them up."""

    t: np.ndarray
    curves: dict[str, Curve]
    totals: dict[str, Mean]


def diagnose(settings: Settings, workdir: Path, eval_folder: str) -> None:
    """Diagnose the checkpoints that --mode=eval would evaluate.

    Raises:
        ValueError: as `evaluate`.
    """
    for step, dataset, params, target in evaluation_loop.checkpoints_of(
        settings, workdir, eval_folder
    ):
        found = diagnosis(settings, dataset, params)
        rows = list(_rows(settings, found, step))
        path = target / f"diagnosis_{step}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        plotting.save_error_curves(workdir / "diagnosis.png", found.t, panels(found))
        logger.info("\n%s\n%s", path, table(found))
        (target / "diagnosis.txt").write_text(table(found) + "\n")
    logger.info("open %s", report.write(workdir))


def diagnosis(settings: Settings, dataset: Dataset, params: Any) -> Diagnosis:
    """All curves of one checkpoint."""
    t_min, sde = settings.training.smallest_time, settings.sde
    t, weights = diagnostics.time_grid(t_min, sde.T, settings.eval.curve_times)
    at = Sampled(settings, dataset, params)
    curves: dict[str, Curve] = {}
    function = _curves_function(settings, dataset)
    for number, time in enumerate(t):
        for name, value in _means(at(number, time, function)).items():
            curves.setdefault(name, []).append(value)
    totals = _totals(settings, dataset, at, curves, np.asarray(weights)) if dataset.law else {}
    return Diagnosis(np.asarray(t), curves, totals)


@dataclasses.dataclass
class Sampled:
    """Functions of (params, point), averaged over the noised examples of the split at one time."""

    settings: Settings
    dataset: Dataset
    params: Any

    def __post_init__(self) -> None:
        config = dataclasses.replace(
            self.settings.eval, num_examples=self.settings.eval.curve_examples
        )
        settings = dataclasses.replace(self.settings, eval=config)
        self._batches = list(evaluation_loop.evaluation_batches(settings, self.dataset))
        self._key = build.keys(self.settings)["diagnose"]
        self._encoding = build.evaluation_encoding(self.settings, self.dataset)
        self._mapped: dict[Callable, Callable] = {}

    def __call__(
        self, number: int, t: jax.Array, function: Callable[..., dict]
    ) -> dict[str, np.ndarray]:
        """Values of every example; `number` tells the draws of one time from those of another."""
        if function not in self._mapped:
            self._mapped[function] = parallel.map_over_devices(
                lambda *arguments: function(*self._arguments(*arguments)),
                in_axes=(None, None, None, 0),
                out_axes=0,
            )
        key, found = jax.random.fold_in(self._key, number), []
        for batch in self._batches:
            split = parallel.split(batch | {"noise_id": np.maximum(batch["index"], 0)})
            results = parallel.join(self._mapped[function](self.params, key, t, split))
            found.append({name: values[batch["mask"]] for name, values in results.items()})
        return {name: np.concatenate([f[name] for f in found]) for name in found[0]}

    def _arguments(self, params: Any, key: jax.Array, t: jax.Array, batch: dict) -> tuple:
        keys = fold_in_each(key, batch["noise_id"])
        x0 = self._encoding.encode(batch["image"], fold_in_all(keys, 0))
        times = jnp.full(x0.shape[:1], t, x0.dtype)
        z = gaussian(fold_in_all(keys, 1), x0)
        x = self.settings.sde.perturb(x0, times, z)
        return params, x0, t, Point(x, times, z, fold_in_all(keys, 2))


def _mean(values: np.ndarray) -> Mean:
    values = np.asarray(values, np.float64)
    return Mean(float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))))


def _curves_function(settings: Settings, dataset: Dataset) -> Callable[..., dict]:
    """Values of all curves at the points of one time."""
    model, law, sde = build.score_model(settings), dataset.law, settings.sde
    solver = build.likelihood_tools(settings).solver

    def function(params: Any, x0: jax.Array, t: jax.Array, point: Point) -> dict:
        del x0
        score_fn = model.score(params)
        found = diagnostics.error_curves(score_fn, sde, point)
        if law is None:
            return found
        own = diagnostics.ode_score(score_fn, sde, point.x, t, solver)
        return found | diagnostics.truth_curves(score_fn, sde, point, law, own)

    return function


def _means(values: dict[str, np.ndarray]) -> dict[str, Mean]:
    """Means of all curves; `curl` and `slope` become their ratio, the asymmetry."""
    means = {name: _mean(v) for name, v in values.items() if name not in ("curl", "slope")}
    ratio = values["curl"].mean() / values["slope"].mean()
    spread = _mean(values["curl"] - ratio * values["slope"]).error / values["slope"].mean()
    return means | {"asymmetry": Mean(float(ratio), float(spread))}


def _totals(
    settings: Settings, dataset: Dataset, at: Sampled, curves: dict[str, Curve], weights: np.ndarray
) -> dict[str, Mean]:
    """Both sides of the KL identity, the gap of the ELBO and the bounds of the λ-family."""
    model, law, sde = build.score_model(settings), dataset.law, settings.sde
    solver, t_min = build.likelihood_tools(settings).solver, settings.training.smallest_time

    def at_data(params: Any, x0: jax.Array, t: jax.Array, point: Point) -> dict:
        own = diagnostics.ode_score(model.score(params), sde, point.x, t, solver)
        log_q = law.log_prob(point.x, point.t, sde)
        return {"kl": log_q - own.log_p, "entropy": -law.log_data(x0)}

    def at_prior(params: Any, x0: jax.Array, t: jax.Array, point: Point) -> dict:
        del params, x0, t
        return {"kl": law.log_prob(point.x, point.t, sde) - sde.prior_logp(point.x)}

    number = settings.eval.curve_times
    data, prior = (
        at(number, jnp.asarray(t_min), at_data),
        at(number + 1, jnp.asarray(sde.T), at_prior),
    )
    fisher, rate = _integral(curves["fisher"], weights), _integral(curves["kl_rate"], weights)
    entropy, start = _mean(data["entropy"]), _mean(prior["kl"])
    totals = {
        "KL(data ‖ ODE), from densities": _mean(data["kl"]),
        "KL(data ‖ ODE), from scores": _sum(start, rate),
        "KL(q_T ‖ prior)": start,
        "½ ∫ g² E‖s − s*‖² dt": fisher,
        "½ ∫ g² E‖s_ode − s*‖² dt": _integral(curves["fisher_ode"], weights),
        "entropy of the data": entropy,
    }
    for lmbd in (lmbd for lmbd in settings.eval.trajectory_lmbds if lmbd < 1.0):
        factor = gap_factor(lmbd)
        gap = Mean(factor * fisher.mean, factor * fisher.error)
        totals[f"−ELBO of λ = {lmbd:g}"] = _sum(entropy, start, gap)
    return totals


def _integral(curve: Curve, weights: np.ndarray) -> Mean:
    """½ ∫ of a curve; its times have independent draws."""
    means, errors = np.asarray([c.mean for c in curve]), np.asarray([c.error for c in curve])
    return Mean(0.5 * float(weights @ means), 0.5 * math.sqrt(float(weights**2 @ errors**2)))


def _sum(*means: Mean) -> Mean:
    return Mean(sum(m.mean for m in means), math.sqrt(sum(m.error**2 for m in means)))


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


def _rows(settings: Settings, found: Diagnosis, step: int) -> Iterator[dict[str, Any]]:
    config = settings.eval
    common = {
        "step": step, "split": config.dataset, "n": config.curve_examples,
        "protocol": f"{config.solver}, rtol {config.rtol:g}, atol {config.atol:g}",
    }  # fmt: skip
    for name, curve in found.curves.items():
        for t, value in zip(found.t, curve, strict=True):
            row = {"curve": name, "t": float(t), "mean": value.mean, "standard_error": value.error}
            yield common | row
    for name, value in found.totals.items():
        yield common | {"total": name, "mean": value.mean, "standard_error": value.error}
