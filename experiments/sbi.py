"""Simulation-based inference: p(θ | y) learned from simulations, against known posteriors.

    pip install --no-deps -r requirements/benchmarks.txt
    python -m experiments.sbi --workdir=runs/sbi [--tasks=two_moons,slcp] [--simulations=10000]
        [--observations=10] [--samples=10000] [--members=1]
        [--set training.n_iters=4000 ...]

A task is a simulator of experiments/simulators.py. A `DensityModel` of p(θ | y) is fitted to pairs
(θ, y), then compared with the truth:

    C2ST    accuracy of a classifier that tells its samples from those of the benchmark's reference
            posterior, five-fold cross-validated (½ is perfect); mean ± standard error over the
            benchmark's observations
    KL      E log p(θ | y) − log q(θ | y) in nats over 1,000 fresh pairs, where p is closed

The box of a uniform prior is given to the model (`data.lower`, `data.upper`). With several
--members it is an ensemble of as many models. A fit that was interrupted goes on; a figure of the
same fit is not computed twice. WORKDIR gets sbi.txt.
Reference: Lueckmann et al. 2021, https://arxiv.org/abs/2101.04653 (tasks, reference posteriors,
C2ST); Lopez-Paz and Oquab 2017, https://arxiv.org/abs/1610.06545.
"""

import argparse
import importlib.util
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from sklearn.model_selection import KFold, cross_val_score
from sklearn.neural_network import MLPClassifier

import json_files
from checks import one_of, require
from experiments.compare import over_seeds
from experiments.members import Model, digests, fit, model_of
from experiments.simulators import SIMULATORS, Simulator
from run_lib import folder

logger = logging.getLogger("fokker")
PAIRS = 1000  # of the KL
REFERENCES = 10_000  # samples of a reference posterior
SNPE = {  # C2ST of the benchmark's SNPE after 1,000 and 10,000 simulations, mean of 10 observations
    "two_moons": (0.643, 0.554),
    "gaussian_mixture": (0.669, 0.551),
    "gaussian_linear": (0.652, 0.544),
    "gaussian_linear_uniform": (0.631, 0.527),
    "slcp": (0.965, 0.845),
    "bernoulli_glm": (0.855, 0.614),
}
BUDGETS = (1000, 10_000)


def c2st(
    found: Float[np.ndarray, "n d"], reference: Float[np.ndarray, "n d"], seed: int = 1
) -> float:
    """The accuracy of a classifier between two sets of samples, as the benchmark trains it.

    Two hidden layers of 10 d units, coordinates standardised by the reference, five folds.
    """
    mean, deviation = reference.mean(axis=0), reference.std(axis=0, ddof=1)
    points = (np.concatenate([reference, found]) - mean) / deviation
    labels = np.repeat([0, 1], [len(reference), len(found)])
    width = 10 * points.shape[1]
    classifier = MLPClassifier((width, width), max_iter=10_000, random_state=seed)
    folds = KFold(5, shuffle=True, random_state=seed)
    return float(np.mean(cross_val_score(classifier, points, labels, cv=folds)))


class Reference:
    """Observations and samples of their posteriors, from the files of the package `sbibm`."""

    def __init__(self) -> None:
        found = importlib.util.find_spec("sbibm")
        allowed = "the package sbibm: pip install --no-deps -r requirements/benchmarks.txt"
        require(found is not None, "--observations", "of sbibm", allowed)
        self.tasks = Path(found.origin).parent / "tasks"

    def observation(self, task: str, number: int) -> Float[np.ndarray, "1 m"]:
        """y of an observation, counted from 1."""
        return self._table(task, number, "observation.csv")

    def posterior(self, task: str, number: int) -> Float[np.ndarray, "n d"]:
        """REFERENCES samples of p(θ | y)."""
        return self._table(task, number, "reference_posterior_samples.csv.bz2")

    def _table(self, task: str, number: int, name: str) -> np.ndarray:
        path = self.tasks / task / "files" / f"num_observation_{number}" / name
        return np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2)


def fitted(simulator: Simulator, number: int, workdir: Path, options: argparse.Namespace) -> Model:
    """q(θ | y) of so many simulations, within the prior's box."""
    changes = dict(setting.split("=", 1) for setting in options.set)
    if simulator.bound is not None:
        ends = {"data.lower": f"{-simulator.bound:g}", "data.upper": f"{simulator.bound:g}"}
        changes = ends | changes
    theta, y = simulator.joint(np.random.default_rng([options.seed, 0]), number)
    model = model_of(options.members, workdir, random_state=options.seed, changes=changes)
    return fit(model, theta, y)


def divergence(
    model: Model, simulator: Simulator, seed: int, number: int = PAIRS
) -> tuple[float, float]:
    """E log p(θ | y) − log q(θ | y) over fresh pairs, and its standard error, in nats."""
    theta, y = simulator.joint(np.random.default_rng([seed, 1]), number)
    log_q = model.score_samples(theta.astype(np.float32), y.astype(np.float32))
    gaps = simulator.log_posterior(theta, y) - log_q
    return float(gaps.mean()), float(gaps.std(ddof=1) / np.sqrt(number))


def evaluated(name: str, simulations: int, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one task and budget: read where the fit has them, else computed."""
    simulator, workdir = SIMULATORS[name], options.workdir / name / str(simulations)
    model = fitted(simulator, simulations, workdir, options)
    path, protocol = model.workdir_ / "sbi.json", [digests(model), options.samples, options.set]
    found = json_files.read(path) if path.exists() else {}
    if found.get("protocol") != protocol:
        found = {"protocol": protocol, "c2st": {}}
    if simulator.log_posterior is not None and "kl" not in found:
        found["kl"] = list(divergence(model, simulator, options.seed))
    reference = Reference()
    for number in range(1, options.observations + 1):
        if str(number) not in found["c2st"]:
            y = reference.observation(name, number)
            contexts = np.repeat(y, options.samples, axis=0).astype(np.float32)
            drawn = model.sample(options.samples, contexts).astype(np.float64)
            truth = reference.posterior(name, number)[: options.samples]
            found["c2st"][str(number)] = value = c2st(drawn, truth)
            logger.info("%s, %d simulations, %d: C2ST %.4f", name, simulations, number, value)
        folder.write_json(path, found)
    return found


def line(name: str, simulations: int, found: dict[str, Any]) -> str:
    """One row of the table, as Markdown."""
    accuracy = over_seeds(list(found["c2st"].values()))
    published = dict(zip(BUDGETS, SNPE[name], strict=True)).get(simulations, "")
    kl = "{:.3f} ± {:.3f}".format(*found["kl"]) if "kl" in found else ""
    value = f"{accuracy.mean:.3f} ± {accuracy.error:.3f}"
    return f"| `{name}` | {simulations:,} | {value} | {published} | {kl} |"


HEADER = "| task | simulations | C2ST | C2ST of SNPE | KL, nats |\n|---|---|---|---|---|"


def main() -> None:
    """Print the table, and write it as sbi.txt."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--tasks", default=",".join(SIMULATORS))
    parser.add_argument("--simulations", default=",".join(map(str, BUDGETS)))
    parser.add_argument("--observations", type=int, default=10)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--members", type=int, default=1, help="of an ensemble, or 1")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    options = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING, force=True)
    logger.setLevel(logging.INFO)
    lines = [HEADER]
    try:
        for name in options.tasks.split(","):
            one_of("--tasks", name, SIMULATORS)
        require(1 <= options.observations <= 10, "--observations", options.observations, "1 to 10")
        require(options.members >= 1, "--members", options.members, "at least 1")
        allowed = f"100 to {REFERENCES}, as many as a reference has"
        require(100 <= options.samples <= REFERENCES, "--samples", options.samples, allowed)
        for number in options.simulations.split(","):
            require(number.isdecimal(), "--simulations", number, "integers with commas between")
        for setting in options.set:
            require("=" in setting, "--set", setting, "section.field=value")
        for name in options.tasks.split(","):
            for simulations in map(int, options.simulations.split(",")):
                found = evaluated(name, simulations, options)
                lines.append(line(name, simulations, found))
                (options.workdir / "sbi.txt").write_text("\n".join(lines) + "\n")
    except (ValueError, OSError, FloatingPointError) as error:
        logger.error("error: %s", error)
        sys.exit(2)
    logger.info("\n%s", "\n".join(lines))


if __name__ == "__main__":
    main()
