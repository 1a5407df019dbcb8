"""One page that compares run folders: figures, differences, samples, and what was set otherwise.

    python -m experiments.report RUN RUN... [--out=comparison.html]

A difference is paired over the test examples that two runs share, from the first run, of the same
estimator at the last step of each; its standard error is that over examples. It is left out where
the runs were evaluated on different data.
"""

import argparse
import html
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

import json_files
from checks import require
from records import Records, Summary, Table, example_means, summarize_values
from run_lib import comparison, folder, identities, page, report

logger = logging.getLogger("fokker")
EVAL = "eval"
HEADER = ("run", "network", "parameters", "step", "estimator", "mean ± s.e.", "n",
          "difference from the first run", "protocol")  # fmt: skip


def rows_of(run: Path, result: report.Result) -> Table:
    """The rows of one line of the table of a run."""
    fields = {name: getattr(result, name) for name in report.GROUP}
    return Records(run / EVAL).table(fields)


def difference(run: Path, first: Path, estimator: str) -> Summary | None:
    """Summarize the run minus the first over the examples of both; None if they do not compare."""
    ours, theirs = (_last(report.summaries(path / EVAL), estimator) for path in (run, first))
    known = [identities.current(path / EVAL) or {} for path in (run, first)]
    if run == first or ours is None or theirs is None or ours.unit != theirs.unit:
        return None
    data = [found[r.identity].data for found, r in zip(known, (ours, theirs), strict=True)]
    if data[0] != data[1]:
        return None
    a, b = example_means(rows_of(run, ours)), example_means(rows_of(first, theirs))
    both = sorted(a.keys() & b.keys())
    gaps = np.asarray([a[i] - b[i] for i in both])
    return summarize_values(np.asarray(both), gaps) if both else None


def _last(results: list[report.Result], estimator: str) -> report.Result | None:
    """The line of an estimator at the latest step; the first of several protocols."""
    found = [result for result in results if result.estimator == estimator]
    return max(found, key=lambda result: result.step, default=None)


def names(runs: Sequence[Path]) -> dict[Path, str]:
    """Name each run by its path from the folder that holds all of them."""
    whole = [run.absolute() for run in runs]
    parent = Path(os.path.commonpath([path.parent for path in whole]))
    return {run: str(path.relative_to(parent)) for run, path in zip(runs, whole, strict=True)}


def lines(runs: Sequence[Path]) -> Iterator[list[str]]:
    """The cells of the table, run by run; baselines once, from the first."""
    called = names(runs)
    for run in runs:
        about = page.read(run / page.ABOUT)
        for result in page.headline(report.summaries(run / EVAL)):
            is_baseline = result.estimator in comparison.BASELINES
            if is_baseline and run != runs[0]:
                continue
            gap = None if is_baseline else difference(run, runs[0], result.estimator)
            value = result.value
            yield [
                "" if is_baseline else called[run],
                "" if is_baseline else str(about.get("network", "")),
                "" if is_baseline else str(about.get("parameters", "")),
                str(result.step),
                result.estimator,
                f"{value.mean:.4f} ± {value.standard_error:.4f} {result.unit}",
                str(value.examples),
                "" if gap is None else f"{gap.mean:+.4f} ± {gap.standard_error:.4f}",
                result.protocol,
            ]


def differing_fields(runs: Sequence[Path]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of the fields of the configs that are not the same in all runs."""
    configs = [dict(folder.flatten(json_files.read(run / "config.json"))) for run in runs]
    fields = sorted(set().union(*configs))
    rows = [[name, *(str(config.get(name, "")) for config in configs)] for name in fields]
    return ["field", *names(runs).values()], [row for row in rows if len(set(row[1:])) > 1]


def write(runs: Sequence[Path], out: Path) -> None:
    """Write the page that compares the runs to the file `out`.

    Raises:
        ValueError: a folder is no run folder, or has no evaluation.
    """
    for run in runs:
        there = (run / "config.json").exists() and any((run / EVAL).glob("rows*.jsonl"))
        allowed = f"a run folder with results in {EVAL}/: run --mode=eval with this --workdir"
        require(there, "RUN", str(run), allowed)
    called = names(runs)
    parts = ["<h1>Comparison</h1>", "<h2>Results</h2>", page.as_html(HEADER, lines(runs))]
    parts += [f"<p>{html.escape(page.MEANS)}</p>"]
    for run in runs:
        said = report.sentences(report.summaries(run / EVAL))
        parts += [f"<p class='said'>{html.escape(f'{called[run]}: {text}')}</p>" for text in said]
    samples = [
        page.picture(run / "samples.png", f"samples of {called[run]}", pixels=True)
        for run in runs
        if (run / "samples.png").exists()
    ]
    if samples:
        parts += [f"<h2>Samples</h2><div class='pair'>{''.join(samples)}</div>"]
    parts += ["<h2>What was set otherwise</h2>", page.as_html(*differing_fields(runs))]
    folder.replace_file(out, [page.document("Comparison", parts)])


def main() -> None:
    """Write the page of the runs of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--out", type=Path, default=Path("comparison.html"))
    options = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING, force=True)
    logger.setLevel(logging.INFO)
    try:
        write(options.runs, options.out)
    except (ValueError, OSError) as error:
        logger.error("error: %s", error)
        sys.exit(2)
    logger.info("open %s", options.out)


if __name__ == "__main__":
    main()
