"""ODE log-likelihood of a trained run: solvers and tolerances against a 1e-9 solution.

    python -m benchmarks.likelihood --workdir=runs/digits_vp [--images=64] [--rounds=3]

Same images, dequantisation noise and probes for all; the reference is Dopri8 at 1e-9 in float64.
Variants take turns within one process; medians are printed. Times hold for this machine only.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import datasets
from configs.digits import vp
from likelihood import Divergence, OdeLikelihood, ode_log_likelihood
from ode import Solver
from operators import fold_in_each
from run_lib import build
from run_lib.loading import load_parameters, steps_in
from run_lib.settings import Settings

VARIANTS = [
    ("tsit5", 1e-3), ("tsit5", 1e-4), ("tsit5", 1e-5), ("dopri5", 1e-4), ("dopri5", 1e-5),
    ("dopri8", 1e-5), ("bosh3", 1e-4), ("heun", 1e-4),
]  # fmt: skip


class Problem:
    """The images of a run, their noise and their probes."""

    def __init__(self, workdir: Path, number: int) -> None:
        self.settings = Settings.from_config(vp.get_config())
        self.dataset = datasets.load(self.settings.data)
        step = steps_in(workdir)[-1]
        self.params = load_parameters(self.settings, self.dataset, workdir, step)
        self.model = build.score_model(self.settings)
        self.encoding = build.encoding(self.settings, self.dataset)
        batch = next(self.dataset.eval_batches("test", batch_size=number))
        self.keys = fold_in_each(jax.random.key(0), jnp.asarray(batch["index"]))
        self.x = self.encoding.encode(jnp.asarray(batch["image"]), self.keys)
        self.divergence = Divergence("rademacher", 1)
        self.probes = self.divergence.draw(self.keys, self.x)

    def solve(self, solver: Solver, dtype: jnp.dtype) -> Callable[[], OdeLikelihood]:
        """A compiled solve of all images, in the given precision."""
        cast = lambda tree: jax.tree.map(lambda a: a.astype(dtype), tree)  # noqa: E731
        params, x, probes = cast((self.params, self.x, self.probes))
        divergence = FixedProbes(self.divergence, probes)

        @jax.jit
        def run(params: Any, x: jax.Array) -> OdeLikelihood:
            return ode_log_likelihood(
                self.model.score(params), self.model.sde, x, self.keys,
                t_min=self.settings.training.smallest_time, solver=solver, divergence=divergence,
            )  # fmt: skip

        return lambda: jax.block_until_ready(run(params, x))

    def bits(self, result: OdeLikelihood) -> np.ndarray:
        """bits/dim of every image."""
        log_p = jnp.asarray(result.log_p, jnp.float32)
        return np.asarray(self.encoding.negative_log_likelihood(log_p, self.x), np.float64)


class FixedProbes:
    """A divergence with given probes, equal in every precision."""

    def __init__(self, divergence: Divergence, probes: jax.Array) -> None:
        self.divergence, self.probes = divergence, probes

    def draw(self, keys: jax.Array, x: jax.Array) -> jax.Array:
        """The given probes."""
        del keys, x
        return self.probes

    def __call__(self, *arguments: Any) -> Any:
        """As the divergence that it wraps."""
        return self.divergence(*arguments)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    problem = Problem(options.workdir, options.images)
    with jax.enable_x64(True):
        exact = problem.solve(Solver("dopri8", 1e-9, 1e-9, max_steps=20_000), jnp.float64)()
    assert bool(exact.converged.all()), "the reference did not converge"
    reference = problem.bits(exact)
    runs = {v: problem.solve(Solver(v[0], v[1], v[1]), jnp.float32) for v in VARIANTS}
    results = {v: run() for v, run in runs.items()}
    times: dict[tuple, list[float]] = {v: [] for v in VARIANTS}
    for _ in range(options.rounds):
        for variant, run in runs.items():
            start = time.perf_counter()
            run()
            times[variant].append(time.perf_counter() - start)
    print(
        f"{jax.devices()[0].device_kind}, {options.images} images, reference {reference.mean():.4f}"
    )
    print(f"{'solver':8}{'tol':>8}{'NFE':>7}{'max':>6}{'ms/image':>10}{'|Δ mean|':>10}"
          f"{'mean |Δ|':>10}{'max |Δ|':>10}  (bits/dim)")  # fmt: skip
    for variant, result in results.items():
        error = problem.bits(result) - reference
        milliseconds = 1e3 * statistics.median(times[variant]) / options.images
        nfe = np.asarray(result.nfe)
        print(
            f"{variant[0]:8}{variant[1]:8.0e}{nfe.mean():7.0f}{nfe.max():6d}{milliseconds:10.2f}"
            f"{abs(error.mean()):10.1e}{np.abs(error).mean():10.1e}{np.abs(error).max():10.1e}"
        )


if __name__ == "__main__":
    main()
