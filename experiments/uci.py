"""Densities p(y | x) or p(x, y) of five tables of the UCI repository, on the usual 20 splits.

    python -m experiments.uci uci.npz --workdir=runs/uci [--tables=boston,yacht] [--splits=20]
        [--members=1] [--joint] [--set training.n_iters=2000 ...]

The file holds, for every table, `<name>_x` [n, d], `<name>_y` [n] and `<name>_test` [20, m], the
rows that are tested in each split. Of the other rows a `DensityModel` keeps a tenth, by which it
chooses its checkpoint. With several --members it is a `DensityEnsemble` of as many. All figures are
means over splits ± standard error:

    model, process, mixture    the mean of log p(y | x) over the tested rows, in nats of the units
                               of y: of the model, of a Gaussian process, and of a Gaussian mixture
                               of (x, y) given x, its number of components chosen by BIC
    within 50 %, 90 %          the share of the tested y between the quantiles of 99 samples

The values of y are rounded; each then stands for a cell as wide as the rounding, and p is the
probability of the cell over its width (`data.cell_width`). Without this a density could be raised
without limit where values repeat.

With --joint the figures are means of log p(x, y) in nats of the units of the columns: of the model,
of the Gaussian mixture, and of a kernel density, its width chosen by five-fold cross-validation.
Uniform noise, drawn once for all of them, first fills the cells of every column; a cell is as wide
as the smallest step between two values of its column.

A fit that was interrupted goes on; a figure of the same fit is not computed twice. WORKDIR gets
uci.txt, or joint.txt.
Reference: Hernández-Lobato and Adams 2015, https://arxiv.org/abs/1502.05336 (the splits); Gal and
Ghahramani 2016, https://arxiv.org/abs/1506.02142 (MC dropout, tuned: `PUBLISHED`).
"""

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
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
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.neighbors import KernelDensity

import checksums
import json_files
import npz_files
from checks import one_of, require
from experiments.compare import over_seeds
from experiments.members import Model, digests, fit, model_of
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
WIDTHS = np.geomspace(0.03, 1.0, 8)  # of a kernel, in standard deviations
SAMPLES = 99
CONDITIONAL = ("model", "process", "mixture", "within 50 %", "within 90 %")
JOINT = ("model", "mixture", "kernels")

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
    fits = test.dtype.kind in "iu" and 0 <= test.min() <= test.max() < len(y)
    require(fits, f"{name}_test of {path}", test.dtype, f"integers from 0 to {len(y) - 1}")
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


def best_mixture(points: Rows) -> GaussianMixture:
    """The Gaussian mixture of least BIC."""
    fits = [GaussianMixture(k, reg_covar=1e-5, random_state=0).fit(points) for k in COMPONENTS]
    return min(fits, key=lambda fit: fit.bic(points))


def log_p_mixture(split: Split) -> Column:
    """log p(x, y) − log p(x) of the tested rows by the Gaussian mixture of least BIC."""
    joint, tested = joined(split)
    points, tested, scale = standardised(joint, tested)
    best = best_mixture(points)

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


def joined(split: Split) -> tuple[Rows, Rows]:
    """(x, y) of the rows for training and of the tested rows."""
    rows = np.concatenate([split.x, split.y[:, None]], axis=1)
    return rows, np.concatenate([split.x_test, split.y_test[:, None]], axis=1)


def standardised(rows: Rows, tested: Rows) -> tuple[Rows, Rows, Column]:
    """Both in standard deviations of the first, and these deviations."""
    mean, scale = rows.mean(axis=0), rows.std(axis=0) + 1e-9
    return (rows - mean) / scale, (tested - mean) / scale, scale


def filled(rows: Rows, tested: Rows, seed: int) -> tuple[Rows, Rows]:
    """Both with uniform noise within the cells of their columns."""
    every = np.concatenate([rows, tested])
    steps = [np.diff(np.unique(np.round(column, 9))) for column in every.T]
    require(all(map(len, steps)), "--joint", "a constant column", "columns of several values")
    cells = [step.min() for step in steps]
    noisy = every + np.random.default_rng(seed).uniform(-0.5, 0.5, every.shape) * cells
    return noisy[: len(rows)], noisy[len(rows) :]


def log_p_joint(rows: Rows, tested: Rows) -> tuple[float, float]:
    """The means of log p of the tested rows by a Gaussian mixture and by a kernel density."""
    points, tested, scale = standardised(rows, tested)
    folds = KFold(5, shuffle=True, random_state=0)  # the tables are in an order that means much
    search = GridSearchCV(KernelDensity(), {"bandwidth": WIDTHS}, cv=folds).fit(points)
    units = np.log(scale).sum()
    kernels = search.score(tested) / len(tested)
    return float(best_mixture(points).score(tested) - units), float(kernels - units)


def within(samples: Float[np.ndarray, "n k"], y: Column, share: float) -> float:
    """The share of y between the quantiles of (1 ∓ share)/2 of their samples."""
    ends = [0.5 - share / 2, 0.5 + share / 2]
    low, high = np.quantile(samples, ends, axis=1, method="weibull")  # unbiased for y of their law
    return float(np.mean((low <= y) & (y <= high)))


def conditional(model: Model, split: Split) -> Callable[[], dict[str, float]]:
    """Fit p(y | x), and return what computes its figures."""
    x_test, y_test = split.x_test.astype(np.float32), split.y_test.astype(np.float32)[:, None]
    fit(model, split.y[:, None], split.x)

    def figures() -> dict[str, float]:
        contexts = np.repeat(x_test, SAMPLES, axis=0)
        samples = model.sample(len(contexts), contexts).reshape(len(x_test), SAMPLES)
        return {
            "model": float(model.score_samples(y_test, x_test).mean()),
            "process": float(log_p_process(split).mean()),
            "mixture": float(log_p_mixture(split).mean()),
            "within 50 %": within(samples, y_test[:, 0], 0.5),
            "within 90 %": within(samples, y_test[:, 0], 0.9),
        }

    return figures


def joint(model: Model, split: Split, seed: int) -> Callable[[], dict[str, float]]:
    """Fit p(x, y), and return what computes its figures."""
    rows, tested = filled(*joined(split), seed)
    fit(model, rows)

    def figures() -> dict[str, float]:
        mixture, kernels = log_p_joint(rows, tested)
        value = float(model.score_samples(tested.astype(np.float32)).mean())
        return {"model": value, "mixture": mixture, "kernels": kernels}

    return figures


def evaluated(name: str, number: int, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one split: read where the fit has them, else computed."""
    split = split_of(options.file, name, number)
    cells = {} if options.joint else {"data.cell_width": f"({ROUNDED[name]},)"}
    changes = cells | dict(setting.split("=", 1) for setting in options.set)
    workdir = options.workdir / name / f"{'joint' * options.joint}{number}"
    model = model_of(options.members, workdir, random_state=number, changes=changes)
    figures = joint(model, split, number) if options.joint else conditional(model, split)
    path, tested = model.workdir_ / "uci.json", {"x": split.x_test, "y": split.y_test}
    identity = {
        "parameters": digests(model), "tested": checksums.digest(tested), "settings": changes,
    }  # fmt: skip
    found = json_files.read(path) if path.exists() else {}
    known = found.keys() >= set(JOINT if options.joint else CONDITIONAL)
    if not known or found.get("identity") != identity:
        found = {"identity": identity, "step": model.step_, "n": len(split.y_test)} | figures()
        folder.write_json(path, found)
    told = found["model"], found["step"]
    logger.info("%s, split %d: log p %.4f, checkpoint %d", name, number, *told)
    return found


def header(columns: Sequence[str]) -> str:
    """The first lines of the table, as Markdown."""
    return f"| table | {' | '.join(columns)} |\n{'|---' * (len(columns) + 1)}|"


def line(name: str, found: list[dict[str, Any]]) -> str:
    """One row of the table, as Markdown: of a joint density without a published figure."""
    is_joint = "kernels" in found[0]
    values = [
        over_seeds([split[figure] for split in found])
        for figure in (JOINT if is_joint else CONDITIONAL)
    ]
    cells = [f"{value.mean:.3f} ± {value.error:.3f}" for value in values]
    if not is_joint:
        cells.append("{:.3f} ± {:.3f}".format(*PUBLISHED[name]))
    return f"| `{name}` | {' | '.join(cells)} | {len(found)} |"


def main() -> None:
    """Print the table, and write it into WORKDIR."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="the .npz file of all tables")
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--tables", default=",".join(PUBLISHED))
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--members", type=int, default=1, help="of an ensemble, or 1")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    parser.add_argument("--joint", action="store_true", help="log p(x, y) instead of log p(y | x)")
    options = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING, force=True)
    logger.setLevel(logging.INFO)
    columns = (*JOINT, "splits") if options.joint else (*CONDITIONAL, "MC dropout", "splits")
    result = options.workdir / ("joint.txt" if options.joint else "uci.txt")
    lines = [header(columns)]
    try:
        require(options.splits >= 1, "--splits", options.splits, "at least 1")
        require(options.members >= 1, "--members", options.members, "at least 1")
        for setting in options.set:
            require("=" in setting, "--set", setting, "section.field=value")
        for name in options.tables.split(","):
            one_of("--tables", name, PUBLISHED)
        for name in options.tables.split(","):
            found = [evaluated(name, number, options) for number in range(options.splits)]
            lines.append(line(name, found))
            result.write_text("\n".join(lines) + "\n")
    except (ValueError, OSError, FloatingPointError) as error:
        logger.error("error: %s", error)
        sys.exit(2)
    logger.info("\n%s", "\n".join(lines))


if __name__ == "__main__":
    main()
