"""ODE log-likelihood of a trained run: the published way against every solver here, in bits/dim.

    python -m benchmarks.likelihood --workdir=runs/digits_velocity [--set data.path=mnist.npz]
        [--config=configs/digits/velocity.py] [--images=64] [--rounds=5] [--only=tsit5]
    python -m benchmarks.likelihood --variables [--only=network] [--workdir=… --config=…]

"published" is the way of the published codes: SciPy's RK45 on the host in float64, rtol = atol =
1e-5, one error norm for the whole batch, steps in t, divergence by a vjp. All have the same images,
dequantisation noise and probes; the reference is Dopri8 at 1e-9 in float64. Variants take turns
within one process; medians are printed, and the time of the published way over each. Times hold
for this machine only. "profile" is the time of one evaluation of the batch by itself.

With --variables: the variable in which the ODE takes its steps (`SDE.ode_variable`), for every SDE,
against a solve at 1e-11. The scores are exact, of data whose variances go from 1e-5 to 1, as those
of images, and of 30 points in narrow cells; --workdir adds a trained network.
"""

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.integrate import solve_ivp

from experiments.compare import load
from likelihood import Divergence, ode_log_likelihood
from ode import Solver
from operators import Batched, PerExample, dimension, fold_in_each, inner
from parameterization import ScoreFn
from run_lib.experiment import Experiment
from run_lib.loading import load_parameters, steps_in
from sde_base import TIME, Variable
from sde_lib import SDE, SDES
from toy_data import Mixture

VARIANTS = {
    **{
        f"{name} {tolerance:.0e}": Solver(name, tolerance, tolerance)
        for name, tolerances in {
            "tsit5": (3e-4, 1e-4),
            "dopri5": (1e-4, 3e-5),
            "bosh3": (1e-4,),
        }.items()
        for tolerance in tolerances
    },
    **{
        f"{name} {number} steps": Solver(name, num_steps=number, estimate_error=False)
        for name, numbers in {"dopri5": (10, 13, 14, 16, 20), "tsit5": (16,)}.items()
        for number in numbers
    },
    **{
        f"dopri5 {number} steps, estimate": Solver("dopri5", num_steps=number)
        for number in (10, 16)
    },
}


class Found(NamedTuple):
    """For every image: log p and its estimated error in nats, and the number of evaluations."""

    log_p: np.ndarray
    error: np.ndarray
    nfe: np.ndarray


class FixedProbes:
    """A divergence with given probes, equal in every precision."""

    def __init__(self, divergence: Divergence, probes: jax.Array) -> None:
        self.divergence, self.probes = divergence, probes

    def draw(self, keys: jax.Array, x: jax.Array) -> jax.Array:
        """Return the given probes, whatever the keys and x are."""
        del keys, x
        return self.probes

    def __call__(self, *arguments: Any) -> Any:
        """Return what the wrapped divergence returns."""
        return self.divergence(*arguments)


class Flow(NamedTuple):
    """A score, data, and how its divergence is computed."""

    name: str
    sde: SDE
    score_fn: ScoreFn
    x: jax.Array
    t_min: float
    divergence: Any


class Problem:
    """The images of a run, their noise and their probes."""

    def __init__(self, experiment: Experiment, workdir: Path, number: int) -> None:
        self.settings, self.dataset = experiment.settings, experiment.dataset
        self.step = steps_in(workdir)[-1]
        self.params = load_parameters(experiment, workdir, self.step)
        self.model = experiment.model
        self.encoding = experiment.encoding
        batch = next(self.dataset.eval_batches("test", batch_size=number))
        self.keys = fold_in_each(jax.random.key(0), jnp.asarray(batch["index"]))
        self.x = self.encoding.encode(jnp.asarray(batch["image"]), self.keys)
        self.divergence = Divergence("rademacher", 1)
        self.probes = self.divergence.draw(self.keys, self.x)
        self.t_min = experiment.settings.training.smallest_time

    def ours(self, solver: Solver, dtype: jnp.dtype) -> Callable[[], Found]:
        """A compiled solve of all images, in the given precision."""
        params, x, probes = jax.tree.map(
            lambda a: a.astype(dtype), (self.params, self.x, self.probes)
        )

        @jax.jit
        def run(params: Any, x: jax.Array) -> Found:
            found = ode_log_likelihood(
                self.model.score(params), self.model.sde, x, self.keys,
                t_min=self.t_min, solver=solver, divergence=FixedProbes(self.divergence, probes),
            )  # fmt: skip
            return Found(found.log_p, found.error, found.nfe)

        return lambda: jax.device_get(run(params, x))

    def published(self) -> Callable[[], Found]:
        """SciPy's RK45 over the flattened batch; drift and divergence from one vjp, in float32."""
        shape, number, sde = self.x.shape, len(self.x), self.model.sde
        probes = self.probes[:, 0]

        @jax.jit
        def drift(params: Any, x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
            times = jnp.full(number, t)
            value, pull = jax.vjp(
                lambda y: sde.ode_drift(self.model.score(params)(y, times), y, times), x
            )
            return value, inner(probes, pull(probes)[0])

        def host(t: float, state: np.ndarray) -> np.ndarray:
            x = jnp.asarray(state[:-number].reshape(shape), jnp.float32)
            found = jax.device_get(drift(self.params, x, jnp.float32(t)))
            return np.concatenate([part.ravel() for part in found]).astype(np.float64)

        def run() -> Found:
            start = np.concatenate([np.asarray(self.x, np.float64).ravel(), np.zeros(number)])
            end = solve_ivp(host, (self.t_min, sde.T), start, rtol=1e-5, atol=1e-5, method="RK45")
            latent, log_det = end.y[:-number, -1].reshape(shape), end.y[-number:, -1]
            log_p = np.asarray(sde.prior_logp(jnp.asarray(latent, jnp.float32))) + log_det
            return Found(log_p, np.full(number, np.nan), np.full(number, end.nfev))

        return run

    def flow(self) -> Flow:
        """The network in float64, with its probes."""
        params, x, probes = jax.tree.map(
            lambda a: jnp.asarray(a, jnp.float64), (self.params, self.x, self.probes)
        )
        divergence, name = FixedProbes(self.divergence, probes), type(self.model.sde).__name__
        score_fn = self.model.score(params)
        return Flow(f"{name}, network", self.model.sde, score_fn, x, self.t_min, divergence)

    def profile(self) -> dict[str, float]:
        """Milliseconds of one evaluation of the batch, by itself."""
        t = jnp.full(len(self.x), 0.3)
        probes = self.probes[:, 0]

        def by_vjp(params: Any, x: jax.Array) -> Any:
            value, pull = jax.vjp(lambda y: self.model.score(params)(y, t), x)
            return value, inner(probes, pull(probes)[0])

        calls = {
            "score": jax.jit(lambda p, x: self.model.score(p)(x, t)),
            "score and divergence by jvp": jax.jit(
                lambda p, x: self.divergence(
                    lambda y: self.model.score(p)(y, t), x, self.probes
                )
            ),
            "the same by vjp": jax.jit(by_vjp),
        }  # fmt: skip
        runs = {
            name: (lambda f=f: jax.block_until_ready(f(self.params, self.x)))
            for name, f in calls.items()
        }
        return {name: 1e3 * t for name, t in medians(runs, rounds=40).items()}


def medians(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each, taking turns, after one call that compiles."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def row(name: str, found: Found, reference: np.ndarray, seconds: float, speedup: float) -> str:
    """One row of the table; errors in bits/dim."""
    error, guess = found.log_p - reference, np.mean(found.error)
    cells = [
        name, f"{found.nfe.mean():.0f}", f"{found.nfe.max()}", f"{1e3 * seconds:.2f}",
        f"{speedup:.2f}", f"{abs(error.mean()):.1e}", f"{np.abs(error).mean():.1e}",
        f"{np.abs(error).max():.1e}", "" if np.isnan(guess) else f"{guess:.1e}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def exact_flows() -> Iterator[Flow]:
    """Exact scores under every SDE, in 16 dimensions; sub-VP starts at 1e-2, as published."""
    variance = 10.0 ** jnp.linspace(-5.0, 0.0, 16)
    normal = jnp.sqrt(variance)[None] * jax.random.normal(jax.random.key(0), (8, 16))
    points = jnp.asarray(np.random.default_rng(0).uniform(0.0, 1.0, (30, 16)))
    cells = Mixture(jnp.full(30, 1.0 / 30.0), points, jnp.full(30, 4e-4))

    def gaussian_score(x: Batched, t: PerExample, sde: SDE) -> Batched:
        alpha2, sigma2 = sde.alpha(t)[:, None] ** 2, sde.sigma(t)[:, None] ** 2
        return -x / (alpha2 * variance[None] + sigma2)

    for name, t_min in T_MIN.items():
        sde = SDES[name]()
        for kind, score, x in (
            ("Gaussian", gaussian_score, normal),
            ("points", cells.score, cells.sample(jax.random.key(0), 8)),
        ):
            score_fn = functools.partial(score, sde=sde)
            yield Flow(f"{name}, {kind}", sde, score_fn, x, t_min, Divergence("exact"))


T_MIN = {"vpsde": 1e-5, "subvpsde": 1e-2, "vesde": 1e-5, "linearvesde": 1e-4, "linear": 1e-4}


def variables(sde: SDE) -> dict[str, Variable]:
    """By the name of the root, in which steps are taken."""
    far = 20.0  # so that log σ + far is positive

    def sigma_to(power: float) -> Variable:
        return Variable(
            "", lambda t: sde.sigma(t) ** (2 * power),
            lambda c: sde.time_of_sigma(c ** (0.5 / power)),
        )  # fmt: skip

    return {
        "t": Variable("", lambda t: t**2, jnp.sqrt),
        "√t": TIME,
        "log σ": Variable(
            "", lambda t: (jnp.log(sde.sigma(t)) + far) ** 2,
            lambda c: sde.time_of_sigma(jnp.exp(jnp.sqrt(c) - far)),
        ),
        "σ": sigma_to(1.0),
        "√σ": sigma_to(0.5),
        "σ^{1/4}": sigma_to(0.25),
    }  # fmt: skip


def in_variable(flow: Flow, variable: Variable, solver: Solver) -> Found:
    """A solve whose steps are taken in the root of the variable."""
    kind = type("Varied", (type(flow.sde),), {"ode_variable": property(lambda self: variable)})
    sde = kind(**dataclasses.asdict(flow.sde))
    keys = jax.random.split(jax.random.key(1), len(flow.x))

    @jax.jit
    def run(x: jax.Array) -> Found:
        found = ode_log_likelihood(
            flow.score_fn, sde, x, keys,
            t_min=flow.t_min, solver=solver, divergence=flow.divergence,
        )  # fmt: skip
        return Found(found.log_p, found.error, found.nfe)

    return jax.device_get(run(flow.x))


def compare_variables(options: argparse.Namespace) -> None:
    """Print evaluations and errors in bits/dim of Dopri5 by the variable, in float64."""
    print("| flow | variable | " + " | ".join(f"{tolerance:.0e}" for tolerance in TOLERANCES)
          + " |\n" + "|---" * (2 + len(TOLERANCES)) + "|")  # fmt: skip
    with jax.enable_x64(True):
        flows = list(exact_flows())
        if options.workdir is not None:
            experiment = Experiment.from_config(load(options.config, options.set))
            flows.append(Problem(experiment, options.workdir, options.images).flow())
        for flow in flows:
            if options.only not in flow.name:
                continue
            unit = dimension(flow.x) * np.log(2.0)
            tight = Solver("dopri8", 1e-11, 1e-11, max_steps=50_000)
            exact = in_variable(flow, flow.sde.ode_variable, tight).log_p
            for name, variable in variables(flow.sde).items():
                cells = []
                for tolerance in TOLERANCES:
                    found = in_variable(flow, variable, Solver("dopri5", tolerance, tolerance))
                    error = np.abs(found.log_p - exact) / unit
                    cells.append(f"{found.nfe.mean():.0f}: {error.mean():.1e} ({error.max():.0e})")
                print(f"| {flow.name} | {name} | {' | '.join(cells)} |", flush=True)


TOLERANCES = (1e-4, 3e-5, 1e-5)


def main() -> None:
    """Print the table of solvers, or with --variables that of ODE variables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--variables", action="store_true")
    parser.add_argument("--config", default="configs/digits/velocity.py")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="variants whose name contains this")
    options = parser.parse_args()
    if options.variables:
        compare_variables(options)
        return
    if options.workdir is None:
        parser.error("--workdir is needed without --variables")
    experiment = Experiment.from_config(load(options.config, options.set))
    problem = Problem(experiment, options.workdir, options.images)
    with jax.enable_x64(True):
        exact = problem.ours(Solver("dopri8", 1e-9, 1e-9, max_steps=20_000), jnp.float64)()
    runs = {"published": problem.published()}
    runs |= {
        name: problem.ours(solver, jnp.float32)
        for name, solver in VARIANTS.items()
        if options.only in name
    }
    unit = dimension(problem.x) * np.log(2.0)
    results = {name: Found(*(np.asarray(a) for a in run())) for name, run in runs.items()}
    seconds = medians(runs, options.rounds)
    print(f"{jax.devices()[0].device_kind}, step {problem.step}, {options.images} images")
    print("profile: " + ", ".join(f"{k} {v:.2f} ms" for k, v in problem.profile().items()))
    print("| solver | NFE mean | max | ms/image | times faster | \\|Δ mean\\| | mean \\|Δ\\| "
          "| max \\|Δ\\| | mean estimate |\n" + "|---" * 9 + "|")  # fmt: skip
    for name, found in results.items():
        scaled = found._replace(log_p=found.log_p / unit, error=found.error / unit)
        speedup = seconds["published"] / seconds[name]
        print(row(name, scaled, exact.log_p / unit, seconds[name] / options.images, speedup))


if __name__ == "__main__":
    main()
