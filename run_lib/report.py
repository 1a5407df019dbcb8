"""The lines of the table of results, from the rows of an evaluation; summary.json and table.md."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import json_files
import npz_files
from records import Row, Summary, Table, largest_share, present, stored, summarize, values
from run_lib import comparison, folder, identities


class Result(NamedTuple):
    """One line of the table: all rows of one estimator, protocol, split and identity."""

    step: int
    split: str
    estimator: str
    protocol: str
    identity: str
    unit: str
    value: Summary
    nfe: float
    max_nfe: int
    seconds: float
    commits: list[str]
    solver_error: float | None  # mean estimate; None where steps are adaptive
    worse_than: list[comparison.Defeat]
    doubts: list[str]  # why the mean and its error may be wrong

    def _solver_error(self) -> str:
        return "" if self.solver_error is None else f" (solver {self.solver_error:.1g})"

    def as_json(self) -> dict[str, Any]:
        """All fields by name."""
        return {
            "step": self.step,
            "split": self.split,
            "estimator": self.estimator,
            "unit": self.unit,
            "mean": self.value.mean,
            "standard_error": self.value.standard_error,
            "n": self.value.examples,
            "repeats": self.value.repeats,
            "nfe": self.nfe,
            "max_nfe": self.max_nfe,
            "seconds_per_example": self.seconds,
            "git_commits": self.commits,
            "solver_error": self.solver_error,
            "protocol": self.protocol,
            "identity": self.identity,
            "worse_than": [defeat.as_json() for defeat in self.worse_than],
            "doubts": self.doubts,
        }

    def cells(self) -> list[str]:
        """The columns of `HEADER` as text."""
        value = self.value
        return [
            str(self.step),
            self.split,
            self.estimator,
            f"{value.mean:.4f} ± {value.standard_error:.4f} {self.unit}{self._solver_error()}",
            str(value.examples),
            str(value.repeats),
            f"{self.nfe:.0f} (max {self.max_nfe})",
            f"{self.seconds:.3f}",
            self.protocol,
        ]


HEADER = ("step", "split", "estimator", "mean ± s.e.", "n", "repeats", "evaluations",
          "s/example", "protocol")  # fmt: skip
PROTOCOLS = "protocols.json"
EXTREMES = "extremes_{step}_{split}.png"
GROUP = ("step", "split", "estimator", "protocol", "identity")  # of rows in one line
HEAVY = 5.0  # examples that one draw is worth; 0.05 for VP and 64 times, 2 to 5 for one time


def summaries(eval_folder: Path) -> list[Result]:
    """One result per group of rows in an evaluation folder; baselines after the models."""
    tables = identities.reported(eval_folder, stored(eval_folder))
    tables.sort(key=_place)
    return [_result(table, comparison.defeats(table, tables)) for table in tables]


def _place(table: Table) -> tuple:
    step, split, estimator, protocol, identity = (table[field] for field in GROUP)
    names = list(comparison.BASELINES)
    baseline = names.index(estimator) if estimator in names else -1
    return step, split, baseline, estimator, protocol, identity


def sentences(results: list[Result]) -> list[str]:
    """List what has to be said of bounds with heavy tails, and of models worse than a baseline."""
    doubts = [sentence for result in results for sentence in result.doubts]
    return doubts + [defeat.sentence() for result in results for defeat in result.worse_than]


def probabilities(workdir: Path, results: list[Result]) -> list[str]:
    """Sentences on the probability of cells, where real values are known to lie in cells.

    −log P(cells) <= −E log p − Σ_j log w_j for widths w_j > 0: noise within a cell makes a density
    p, and by Jensen's inequality its mean logarithm is at most that of the probability over w.
    """
    path = workdir / folder.STATISTICS
    widths = (
        npz_files.read(path, (), ("cell_widths",)).get("cell_widths") if path.exists() else None
    )
    if widths is None:
        return []
    volume = float(np.log(widths[widths > 0.0]).sum())
    beside = "" if np.all(widths > 0.0) else ", times the density of the continuous values,"
    return [
        f"{result.estimator} at step {result.step} ({result.split}): −log of the probability of "
        f"the cells{beside} is at most {result.value.mean - volume:.4f} ± "
        f"{result.value.standard_error:.4f} {result.unit}"
        for result in results
        if result.estimator in comparison.MODELS
    ]


def protocols(eval_folder: Path) -> dict[str, dict[str, Any]]:
    """The details of every protocol by its text."""
    path = eval_folder / PROTOCOLS
    return json_files.read(path) if path.exists() else {}


def write_summaries(eval_folder: Path, results: list[Result]) -> None:
    """Write summary.json and table.md into the folder of an evaluation."""
    known = protocols(eval_folder)
    summary = [result.as_json() | {"details": known.get(result.protocol)} for result in results]
    folder.write_json(eval_folder / "summary.json", summary)
    lines = [HEADER, ["---"] * len(HEADER), *(result.cells() for result in results)]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    text = "".join(f"| {' | '.join(line)} |\n" for line in escaped)
    text += "".join(f"\n{sentence}\n" for sentence in sentences(results))
    folder.replace_file(eval_folder / "table.md", [text])


def _result(rows: Table, worse_than: list[comparison.Defeat]) -> Result:
    nfe, errors = values(rows, "nfe"), present(rows, "error")
    return Result(
        **{field: rows[field] for field in GROUP},
        unit=rows[0]["unit"],
        value=summarize(rows),
        nfe=float(nfe.mean()),
        max_nfe=int(nfe.max()),
        seconds=float(values(rows, "seconds").mean()),
        commits=sorted(set(rows.present("commit"))) or ["unknown"],
        solver_error=float(np.mean(errors)) if errors else None,
        worse_than=worse_than,
        doubts=doubts(rows),
    )


def doubts(rows: Sequence[Row]) -> list[str]:
    """Sentences on a bound whose draws are too few for its tails; none for other estimators.

    A draw has the weight of its stratum. Where a stratum is wide, few draws, or none, fall where
    the integrand is large: then few make the mean, or the mean lacks what none has seen.
    """
    first, value, share = rows[0], summarize(rows), largest_share(rows)
    name = f"{first['estimator']} at step {first['step']} ({first['split']})"
    remedy = "raise eval.num_times, or take a schedule that ends at less noise"
    found = []
    if share * len(rows) > HEAVY:
        found.append(
            f"{name}: one draw makes {share:.1%} of the estimate, as much as "
            f"{share * len(rows):.0f} examples. Its tails are heavy, and the standard error may be "
            f"too small: {remedy}"
        )
    of_integers = "largest" in first and first["unit"] == "bits/dim"
    if of_integers and "t_min" not in first["estimator"] and value.mean < -2 * value.standard_error:
        found.append(
            f"{name}: {value.mean:.4f} {first['unit']} is below zero, which no bound on the "
            f"negative log-probability of integers is. No draw fell where it is made: {remedy}"
        )
    return found


def table_text(results: list[Result]) -> str:
    """The table for a terminal."""
    return aligned(HEADER, (result.cells() for result in results))


def aligned(header: Sequence[str], rows: Iterable[list[str]]) -> str:
    """Write a header and rows as text in aligned columns."""
    lines = [list(header), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    padded = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(line.rstrip() for line in padded)
