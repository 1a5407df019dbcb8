"""Conditional densities p(y | x) of five tables of the UCI repository, on the usual 20 splits.

    python -m experiments.uci uci.npz --workdir=runs/uci [--tables=boston,yacht] [--splits=20]
        [--set training.n_iters=2000 ...]

The file holds, for every table, `<name>_x` [n, d], `<name>_y` [n] and `<name>_test` [20, m], the
rows that are tested in each split. Of the other rows a `DensityModel` keeps a tenth, by which it
chooses its checkpoint. All figures are means over splits ± standard error:

    model, process, mixture    the mean of log p(y | x) over the tested rows, in nats of the units
                               of y: of the model, of a Gaussian process, and of a Gaussian mixture
                               of (x, y) given x, its number of components chosen by BIC
    within 50 %, 90 %          the share of the tested y between the quantiles of 99 samples

The values of y are rounded; each then stands for a cell as wide as the rounding, and p is the
probability of the cell over its width (`data.cell_width`). Without this a density could be raised
without limit where values repeat. A fit that was interrupted goes on; a figure of the same fit is
not computed twice. WORKDIR gets uci.txt.
Reference: Hernández-Lobato and Adams 2015, https://arxiv.org/abs/1502.05336 (the splits); Gal and
Ghahramani 2016, https://arxiv.org/abs/1506.02142 (MC dropout, tuned: `PUBLISHED`).
"""

import argparse
import logging
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import logsumexp
from scipy.stats import multivariate_normal, norm
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from sklearn.mixture import GaussianMixture

import checkpoints
import json_files
import npz_files
from checks import one_of, require
from density_model import DensityModel
from experiments.compare import over_seeds
from run_lib import folder

logger = logging.getLogger("fokker")
PUBLISHED = {  # log p(y | x) of MC dropout ± standard error over the splits
    "boston": (-2.402, 0.042),
    "concrete": (-2.937, 0.025),
    "energy": (-1.212, 0.005),
    "power": (-2.808, 0.009),
    "yacht": (-1.250, 0.015),
}
ROUNDED = {"boston": 0.1, "concrete": 0.01, "energy": 0.01, "power": 0.01, "yacht": 0.01}
PROCESS_ROWS = 1000  # of training, at most, for a Gaussian process
COMPONENTS = (1, 2, 3, 5, 8)
SAMPLES = 99
FIGURES = ("model", "process", "mixture", "within 50 %", "within 90 %")

Rows = Float[np.ndarray, "n d"]
Column = Float[np.ndarray, " n"]


class Split(NamedTuple):
    """The rows of a table for training and for the test; y is a column."""

    x: Rows
    y: Column
    x_test: Rows
    y_test: Column


def split_of(path: Path, name: str, number: int) -> Split:
    """One of the splits of a table.

    Raises:
        ValueError: the file has no such table or split.
    """
    arrays = npz_files.read(path, [f"{name}_{part}" for part in ("x", "y", "test")])
    x, y, test = (arrays[f"{name}_{part}"] for part in ("x", "y", "test"))
    require(number < len(test), "--splits", number + 1, f"at most {len(test)} for {name}")
    train = np.setdiff1d(np.arange(len(y)), test[number])
    return Split(x[train], y[train], x[test[number]], y[test[number]])


def log_p_process(split: Split) -> Column:
    """Return log p(y | x) of the tested rows by a Gaussian process.

    Its kernel is a squared exponential with a length for each column, plus noise.
    """
    mean, scale = split.x.mean(axis=0), split.x.std(axis=0) + 1e-9
    rows = np.random.default_rng(0).permutation(len(split.x))[:PROCESS_ROWS]
    kernel = ConstantKernel() * RBF(np.ones(split.x.shape[1]), (1e-2, 1e3)) + WhiteKernel(0.1)
    process = GaussianProcessRegressor(kernel, normalize_y=True, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        process.fit((split.x[rows] - mean) / scale, split.y[rows])
    location, deviation = process.predict((split.x_test - mean) / scale, return_std=True)
    return norm.logpdf(split.y_test, location, deviation)


def log_p_mixture(split: Split) -> Column:
    """log p(x, y) − log p(x) of the tested rows by the Gaussian mixture of least BIC."""
    joint = np.concatenate([split.x, split.y[:, None]], axis=1)
    mean, scale = joint.mean(axis=0), joint.std(axis=0) + 1e-9
    points = (joint - mean) / scale
    fits = [GaussianMixture(k, reg_covar=1e-5, random_state=0).fit(points) for k in COMPONENTS]
    best = min(fits, key=lambda fit: fit.bic(points))
    tested = np.concatenate([split.x_test, split.y_test[:, None]], axis=1)
    tested = (tested - mean) / scale

    def log_density(number: int) -> Column:
        """Return the log density of the first `number` columns of every tested row."""
        each = [
            np.log(weight)
            + multivariate_normal(m[:number], c[:number, :number]).logpdf(tested[:, :number])
            for weight, m, c in zip(best.weights_, best.means_, best.covariances_, strict=True)
        ]
        return logsumexp(each, axis=0)

    columns = tested.shape[1]
    return log_density(columns) - log_density(columns - 1) - np.log(scale[-1])


def within(samples: Float[np.ndarray, "n k"], y: Column, share: float) -> float:
    """The share of y between the quantiles of (1 ∓ share)/2 of their samples."""
    low, high = np.quantile(samples, [0.5 - share / 2, 0.5 + share / 2], axis=1)
    return float(np.mean((low <= y) & (y <= high)))


def evaluated(name: str, number: int, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one split: read where the fit has them, else computed."""
    split, workdir = split_of(options.file, name, number), options.workdir / name / str(number)
    changes = {"data.cell_width": f"({ROUNDED[name]},)"} | dict(
        s.split("=", 1) for s in options.set
    )
    model = DensityModel(changes=changes, workdir=workdir, random_state=number)
    x, x_test = split.x.astype(np.float32), split.x_test.astype(np.float32)
    y, y_test = (part.astype(np.float32)[:, None] for part in (split.y, split.y_test))
    model.fit(y, context=x)
    path, identity = workdir / "uci.json", checkpoints.digest(model.params_)
    found = json_files.read(path) if path.exists() else {}
    if found.get("parameters") != identity:
        samples = model.sample(len(x_test) * SAMPLES, np.repeat(x_test, SAMPLES, axis=0))
        samples = samples.reshape(len(x_test), SAMPLES)
        values = (
            model.score(y_test, context=x_test),
            float(log_p_process(split).mean()),
            float(log_p_mixture(split).mean()),
            *(within(samples, y_test[:, 0], share) for share in (0.5, 0.9)),
        )
        found = {"parameters": identity, "step": model.step_, "n": len(y_test)}
        found |= dict(zip(FIGURES, values, strict=True))
        folder.write_json(path, found)
    logger.info("%s, split %d: log p %.4f, step %d", name, number, found["model"], found["step"])
    return found


HEADER = "| table | " + " | ".join(FIGURES) + " | MC dropout | splits |\n" + "|---" * 8 + "|"


def line(name: str, found: list[dict[str, Any]]) -> str:
    """One row of the table, as Markdown."""
    values = [over_seeds([figures[figure] for figures in found]) for figure in FIGURES]
    cells = [f"{value.mean:.3f} ± {value.error:.3f}" for value in values]
    published = "{:.3f} ± {:.3f}".format(*PUBLISHED[name])
    return f"| `{name}` | {' | '.join(cells)} | {published} | {len(found)} |"


def main() -> None:
    """Print the table, and write it as uci.txt."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="the .npz file of all tables")
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--tables", default=",".join(PUBLISHED))
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    options = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING, force=True)
    logger.setLevel(logging.INFO)
    lines = [HEADER]
    try:
        require(options.splits >= 1, "--splits", options.splits, "at least 1")
        for setting in options.set:
            require("=" in setting, "--set", setting, "section.field=value")
        for name in options.tables.split(","):
            one_of("--tables", name, PUBLISHED)
        for name in options.tables.split(","):
            found = [evaluated(name, number, options) for number in range(options.splits)]
            lines.append(line(name, found))
            (options.workdir / "uci.txt").write_text("\n".join(lines) + "\n")
    except (ValueError, OSError, FloatingPointError) as error:
        logger.error("error: %s", error)
        sys.exit(2)
    logger.info("\n%s", "\n".join(lines))


if __name__ == "__main__":
    main()
