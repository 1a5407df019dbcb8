"""Variance of one draw of the ELBO estimators, at equal network calls, for a trained drift network.

    python -m benchmarks.elbo_variance configs/toy/swissroll_drift.py --workdir=runs/swissroll_drift
        [--examples=20000] [--draws=16]

One draw is one evaluation of the network with one tangent: one time and one Rademacher probe. The
variance within examples is that of repeated draws; the total adds the spread of the examples.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import numpy as np

from elbo import ESTIMATORS
from experiments.compare import load
from likelihood import Divergence
from operators import fold_in_all, fold_in_each
from run_lib.experiment import Experiment
from run_lib.loading import load_parameters, steps_in


def main() -> None:
    """Print the mean and the standard deviations of every ELBO estimator."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--examples", type=int, default=20_000)
    parser.add_argument("--draws", type=int, default=16)
    options = parser.parse_args()
    experiment = Experiment.from_config(load(options.config, [f"data.num_test={options.examples}"]))
    dataset = experiment.dataset
    step = steps_in(options.workdir)[-1]
    params = load_parameters(experiment, options.workdir, step)
    model, probe = experiment.model, Divergence("rademacher")
    batch = next(dataset.eval_batches("test", batch_size=options.examples))
    keys = fold_in_each(jax.random.key(0), batch["index"])
    encoding = experiment.evaluation_encoding
    x = encoding.encode(batch["image"], keys)
    print(f"{options.workdir} step {step}, {options.examples} examples, {options.draws} draws each")
    print(f"{'estimator':16}{'ELBO':>10}{'s.e.':>8}{'std within':>12}{'std total':>11}{'ratio':>8}")
    reference = None
    for name, estimator in ESTIMATORS.items():

        @jax.jit
        def draw(params: Any, keys: jax.Array, estimator: Any = estimator) -> jax.Array:
            return estimator(model.score(params), model.sde, x, keys, num_times=1, divergence=probe)

        values = np.stack([draw(params, fold_in_all(keys, 1 + k)) for k in range(options.draws)])
        within, total = values.var(axis=0, ddof=1).mean(), values.var()
        reference = reference or within
        error = values.mean(axis=0).std() / np.sqrt(options.examples)
        print(
            f"{name:16}{values.mean():10.4f}{error:8.4f}{np.sqrt(within):12.3f}"
            f"{np.sqrt(total):11.3f}{within / reference:8.3f}"
        )


if __name__ == "__main__":
    main()
