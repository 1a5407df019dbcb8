"""Measure the calibration of a density by the levels and ranks in the rows of an evaluation.

    level p-value     of the test of Kolmogorov and Smirnov that the levels are uniform in [0, 1]
    coverage          share of examples in the region of highest density of probability 50 %, 90 %
    ranks p-value     the least of the coordinates, times their number (Bonferroni)

A p-value below 0.01 says that the density is not calibrated; a large one does not say that it is.
Reference: Talts et al. 2018, https://arxiv.org/abs/1804.06788 (ranks).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

import json_files
import plotting
from records import Row, stored, summarize_values, values
from run_lib import folder, identities

FILE = "calibration.json"
HEADER = ("step", "split", "estimator", "level p-value", "within 50 %", "within 90 %",
          "ranks p-value", "n", "protocol")  # fmt: skip
GROUP = ("step", "split", "estimator", "protocol", "identity")
COVERAGES = (0.5, 0.9)
SHOWN = 12  # coordinates in the figure


def write(eval_folder: Path) -> list[dict[str, Any]]:
    """calibration.json of a folder of rows, if they have ranks, and a picture of each line of it.

    Returns the content.
    """
    tables = identities.reported(eval_folder, stored(eval_folder))
    tables.sort(key=lambda table: [table[name] for name in GROUP])
    found: list[dict[str, Any]] = []
    for table in tables:
        if not (table.knows("ranks") and table.has_repeat(0)):
            continue
        _, levels, ranks = places(table)
        name = f"calibration_{len(found) + 1}.png"
        title = f"{table['split']} examples, step {table['step']}, {table['protocol']}"
        plotting.save_calibration(eval_folder / name, levels, ranks[:, :SHOWN], title)
        found.append(summary(table) | {"picture": name})
    if found or (eval_folder / FILE).exists():
        folder.write_json(eval_folder / FILE, found)
    return found


def read(eval_folder: Path) -> list[dict[str, Any]]:
    """The content of calibration.json; nothing where there is none."""
    path = eval_folder / FILE
    return json_files.read(path) if path.exists() else []


class Calibration(NamedTuple):
    """The places of n examples among samples of the model (`conditional_estimators`).

    Attributes:
        levels: of the densities, [n], in [0, 1].
        ranks: of the coordinates, [n, d], in [0, 1].
    """

    levels: Float[np.ndarray, " n"]
    ranks: Float[np.ndarray, "n d"]

    def figures(self, examples: np.ndarray | None = None) -> dict[str, Any]:
        """The p-values and coverages, by name.

        Args:
            examples: the number of the example of each place, [n]; None: no example has two.
        """
        examples = np.arange(len(self.levels)) if examples is None else examples
        each = [_p_value(column) for column in self.ranks.T]
        within = [summarize_values(examples, self.levels <= share) for share in COVERAGES]
        return {
            "level_p_value": _p_value(self.levels),
            "coverages": list(COVERAGES),
            "covered": [found.mean for found in within],
            "covered_standard_error": [found.standard_error for found in within],
            "ranks_p_value": min(1.0, min(each) * len(each)),
            "ranks_p_values": each,
            "n": len(self.levels),
        }


def places(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(examples [n], levels [n], ranks [n, d]) of the first repeat, levels and ranks in [0, 1]."""
    once = values(rows, "repeat") == 0
    examples, levels = values(rows, "index")[once], values(rows, "value")[once]
    return examples, levels, values(rows, "ranks")[once].reshape(len(levels), -1)


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """All figures of the rows of one estimator, by name."""
    examples, levels, ranks = places(rows)
    figures = Calibration(levels, ranks).figures(examples)
    return {name: rows[0][name] for name in GROUP} | figures


def _p_value(values: np.ndarray) -> float:
    """That of the test of Kolmogorov and Smirnov that the values are uniform in [0, 1]."""
    from scipy.stats import kstest  # a fifth of the time of the start, if it were imported there

    return float(kstest(values, "uniform").pvalue)


def cells(found: dict[str, Any]) -> list[str]:
    """The columns of `HEADER` as text."""
    covered = zip(found["covered"], found["covered_standard_error"], strict=True)
    return [
        str(found["step"]),
        found["split"],
        found["estimator"],
        f"{found['level_p_value']:.2g}",
        *(f"{100 * share:.1f} ± {100 * error:.1f} %" for share, error in covered),
        f"{found['ranks_p_value']:.2g}",
        str(found["n"]),
        found["protocol"],
    ]
