"""Where the bits of a bound are spent: its parts over the noise levels, from the rows.

    value = decoder + Σ_j bins_j + prior,   bins_j the integral between two values of log(σ/α)
    cumulative_0 = decoder,   cumulative_j = cumulative_{j−1} + bins_j,   at last + prior

Mean ± standard error over examples, the repeats of an example averaged first. `bits_<step>.json`
depends on the rows only, in whatever order they were computed; `bits_<step>.png` shows it.
"""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import json_files
import plotting
from records import Records, Row, example_means, key_of, summarize
from run_lib import comparison, folder, identities, report
from run_lib.estimators import Estimator

Parts = dict[str, Any]  # of the rows of one estimator, protocol and split at one step
HISTOGRAM = "histogram"  # the baseline that the figure shows


def save(target: Path, step: int, table: list[Estimator]) -> None:
    """bits_<step>.json and bits_<step>.png of a folder of rows; none without rows of a bound.

    Edges are those of the estimators; of other protocols, those that the file already has.
    """
    path = target / f"bits_{step}.json"
    before = {(parts["estimator"], parts["protocol"]): parts["edges"] for parts in _read(path)}
    edges = before | {(e.name, e.protocol): list(e.edges) for e in table if e.edges}
    rows = identities.reported(target, Records(target).select(step=step))
    if found := all_parts(rows, edges):
        folder.write_json(path, found)
        plotting.save_bits(path.with_suffix(".png"), list(map(_drawn, found)))


def _read(path: Path) -> list[Parts]:
    return json_files.read(path) if path.exists() else []


def all_parts(rows: list[Row], edges: dict[tuple[str, str], list[float]]) -> list[Parts]:
    """The parts of every estimator, protocol and split whose edges are known, in order of names.

    Args:
        rows: of one step; those without bins, or with another number of them, do not count.
        edges: log(σ/α) at the ends of the bins, by (estimator, protocol).
    """
    groups = report.by(sorted(rows, key=key_of), "estimator", "protocol", "split")
    found = []
    for estimator, protocol, split in sorted(groups):
        ends = edges.get((estimator, protocol), [])
        group = groups[estimator, protocol, split]
        binned = [row for row in group if 0 < len(row.get("bins", ())) == len(ends) - 1]
        if binned:
            histogram = _histogram(binned, rows)
            found.append(_parts(binned) | {"edges": ends, HISTOGRAM: histogram})
    return found


def _parts(rows: list[Row]) -> Parts:
    first, value = rows[0], summarize(rows)
    terms = [[row["decoder"], *row["bins"], row["prior"]] for row in rows]
    sums = [list(itertools.accumulate(row)) for row in terms]
    mean, error = _summaries(rows, terms)
    names = ("estimator", "protocol", "split", "step", "unit")
    return {name: first[name] for name in names} | {
        "n": value.examples,
        "repeats": value.repeats,
        "decoder": _named(mean[0], error[0]),
        "bins": _named(mean[1:-1], error[1:-1]),
        "prior": _named(mean[-1], error[-1]),
        "cumulative": _named(*_summaries(rows, sums)),
    }


def _named(mean: float | list[float], error: float | list[float]) -> dict[str, Any]:
    return {"mean": mean, "standard_error": error}


def _summaries(rows: list[Row], values: list[list[float]]) -> tuple[list[float], list[float]]:
    """Means and standard errors over examples, of n values for each row."""
    found = [
        summarize([row | {"value": v} for row, v in zip(rows, column, strict=True)])
        for column in zip(*values, strict=True)
    ]
    return [s.mean for s in found], [s.standard_error for s in found]


def _histogram(rows: list[Row], others: Iterable[Row]) -> float | None:
    """The mean of the independent histogram over the examples of a bound; None without it.

    The best one where there are several; none beside the bound of noised data, which is no bound
    of the same thing.
    """
    first, examples = rows[0], {row["index"] for row in rows}
    if first["estimator"] not in comparison.MODELS:
        return None
    alike = [
        row
        for row in others
        if row["estimator"] == HISTOGRAM
        and all(row[name] == first[name] for name in ("split", "unit"))
        and row["index"] in examples
    ]
    groups = report.by(alike, "protocol").values()
    whole = [group for group in groups if example_means(group).keys() == examples]
    return min((summarize(group).mean for group in whole), default=None)


def _drawn(parts: Parts) -> plotting.Bits:
    """What the figure needs of the parts."""
    start = "entropy at t_min" if parts["estimator"] == "bound at t_min" else "decoder"
    pairs = {name: tuple(parts[name].values()) for name in ("decoder", "bins", "prior")}
    return plotting.Bits(
        title=f"{parts['estimator']}, step {parts['step']}, {parts['n']} {parts['split']} examples",
        subtitle=parts["protocol"],
        unit=parts["unit"],
        edges=parts["edges"],
        bins=pairs["bins"],
        cumulative=tuple(parts["cumulative"].values()),
        ends={start: pairs["decoder"], "prior": pairs["prior"]},
        baseline=parts[HISTOGRAM],
    )
