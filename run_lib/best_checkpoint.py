"""Choose the best checkpoint of a run folder by the bound on held-out examples.

What was measured before is read from held_out.json.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import json_files
from run_lib import identities, loading
from run_lib.estimators import Parameters, estimators
from run_lib.experiment import Experiment
from run_lib.folder import write_json

MOST_BOUNDS = 500  # held-out examples
DRAWS, MOST_REPEATS = 1000, 16  # of the bound for a checkpoint; few examples have several each


def best_step(workdir: Path, experiment: Experiment) -> int:
    """Return the step of the checkpoint with the least bound on the examples that were held out.

    The loss would not do: it has one draw of time and noise for each example, and few examples are
    held out of few. What was measured before is read from held_out.json.
    """
    path, run = workdir / "held_out.json", json_files.read(workdir / identities.RUN)["run"]
    stored = json_files.read(path) if path.exists() else {}
    bounds = stored["bounds"] if stored.get("run") == run else {}
    steps = loading.steps_in(workdir)
    if missing := [step for step in steps if str(step) not in bounds]:
        bound = held_out_bound(experiment)
        for step in missing:
            bounds[str(step)] = bound(loading.load_parameters(experiment, workdir, step))
        write_json(path, {"run": run, "bounds": bounds})
    return min(steps, key=lambda step: bounds[str(step)])


def held_out_bound(experiment: Experiment) -> Callable[[Any], float]:
    """Return the function that maps parameters to the mean bound on the held-out examples.

    All parameters see the same times and noise, so that differences are known better than values.
    """
    names = ("bound", "discrete bound")
    bound = next(e for e in estimators(experiment) if e.name in names)
    function, key = jax.jit(bound.function), experiment.keys[bound.key]
    number = min(experiment.dataset.size("test"), MOST_BOUNDS)
    size = min(number, experiment.settings.eval.batch_size)

    def mean(params: Any) -> float:
        values = []
        for repeat in range(np.clip(DRAWS // number, 1, MOST_REPEATS)):
            for batch in experiment.dataset.eval_batches("test", batch_size=size):
                there = batch.pop("mask") & (batch["index"] < number)
                ids = np.maximum(batch.pop("index"), 0)
                if there.any():
                    fresh = jax.random.fold_in(key, repeat)
                    result = function(Parameters(params), fresh, batch | {"noise_id": ids})
                    values.append(np.asarray(result["value"])[there])
        return float(np.concatenate(values).mean())

    return mean
