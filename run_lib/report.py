"""What a person reads: the table of results, training curves, a self-contained report.html."""

import base64
import html
import json
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import json_files
import plotting
from records import Records, Row, Summary, by, largest_share, summarize
from run_lib import calibration, classification, comparison, folder, identities, metrics, quality


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
GROUP = ("step", "split", "estimator", "protocol", "identity")  # of rows in one line
HEAVY = 5.0  # examples that one draw is worth; 0.05 for VP and 64 times, 2 to 5 for one time


def summaries(eval_folder: Path) -> list[Result]:
    """One result per group of rows in an evaluation folder; baselines after the models."""
    rows = identities.reported(eval_folder, Records(eval_folder).rows.values())
    groups = by(rows, *GROUP)
    others = [groups[group] for group in sorted(groups, key=_place)]
    return [_result(rows, comparison.defeats(rows, others)) for rows in others]


def _place(group: tuple[int, str, str, str, str]) -> tuple:
    step, split, estimator, protocol, identity = group
    names = list(comparison.BASELINES)
    baseline = names.index(estimator) if estimator in names else -1
    return step, split, baseline, estimator, protocol, identity


def sentences(results: list[Result]) -> list[str]:
    """What has to be said of bounds with heavy tails, and of models that lose to a baseline."""
    doubts = [sentence for result in results for sentence in result.doubts]
    return doubts + [defeat.sentence() for result in results for defeat in result.worse_than]


def protocols(eval_folder: Path) -> dict[str, dict[str, Any]]:
    """The details of every protocol by its text."""
    path = eval_folder / PROTOCOLS
    return json_files.read(path) if path.exists() else {}


def write_summaries(eval_folder: Path, results: list[Result]) -> None:
    """summary.json, table.md and table.html."""
    known = protocols(eval_folder)
    summary = [result.as_json() | {"details": known.get(result.protocol)} for result in results]
    folder.write_json(eval_folder / "summary.json", summary)
    lines = [HEADER, ["---"] * len(HEADER), *(result.cells() for result in results)]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    text = "".join(f"| {' | '.join(line)} |\n" for line in escaped)
    text += "".join(f"\n{sentence}\n" for sentence in sentences(results))
    (eval_folder / "table.md").write_text(text, encoding="utf-8")
    page = f"<!doctype html><meta charset='utf-8'><style>{STYLE}</style>{table_html(results)}\n"
    (eval_folder / "table.html").write_text(page, encoding="utf-8")


def _result(rows: list[Row], worse_than: list[comparison.Defeat]) -> Result:
    group = (rows[0][field] for field in GROUP)
    nfe = [row["nfe"] for row in rows]
    seconds = sum(row["seconds"] for row in rows) / len(rows)
    unit = rows[0]["unit"]
    commits = sorted({row.get("commit", "unknown") for row in rows})
    value, mean_nfe = summarize(rows), sum(nfe) / len(nfe)
    errors = [row["error"] for row in rows if "error" in row]
    solver_error = sum(errors) / len(errors) if errors else None
    return Result(
        *group, unit, value, mean_nfe, max(nfe), seconds, commits, solver_error, worse_than,
        doubts(rows),
    )  # fmt: skip


def doubts(rows: list[Row]) -> list[str]:
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
    """Columns of text."""
    lines = [list(header), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    padded = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(line.rstrip() for line in padded)


def table_html(results: list[Result]) -> str:
    """The table for the report, and below it what has to be said."""
    said = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in sentences(results))
    return as_html(HEADER, (result.cells() for result in results)) + said


def as_html(header: Sequence[str], rows: Iterable[list[str]]) -> str:
    """Columns in HTML."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def save_curves(workdir: Path) -> Path | None:
    """curves.png from metrics.jsonl; None where there are no metrics yet."""
    curves: dict[str, dict[str, plotting.Curve]] = {}
    for row in metrics.read_metrics(workdir):
        label = row["split"].replace("_", "-")
        for name in row.keys() - {"step", "split", "time"}:
            steps, values = curves.setdefault(name, {}).setdefault(label, (array("q"), array("d")))
            steps.append(row["step"])
            values.append(row[name])
    labels = ("train", "held-out")
    panels = {
        name: {label: curves[name][label] for label in labels if label in curves[name]}
        for name in sorted(curves)
    }
    if not panels:
        return None
    plotting.save_curves(workdir / "curves.png", panels)
    return workdir / "curves.png"


OF = "The figures are of these parameters, data and settings (digests)."
CONFUSION = "Rows are true classes, columns those with the largest posterior; counts of examples."
PLACES = (
    "If the density is the true one, levels and ranks are uniform, and so many examples lie within "
    "each region of highest density as it has probability. The p-values are those of the test of "
    "Kolmogorov and Smirnov; that of the ranks is corrected for the number of coordinates."
)
BITS = "The figure shows how much each noise level adds to the bound."
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;
color:#222}table{border-collapse:collapse;font-size:13px}td,th{border:1px solid #ccc;padding:.3em
.6em;
text-align:left}img{max-width:100%;image-rendering:pixelated}pre{background:#f6f6f6;padding:1em;
overflow:auto;font-size:12px}h2{margin-top:1.6em}"""


def write(workdir: Path) -> Path:
    """Write report.html, one file with its images inside, from whatever the folder holds."""
    parts = [f"<h1>{html.escape(workdir.name)}</h1>"]
    for rows in sorted(workdir.glob("*/rows.jsonl")):
        parts += [f"<h2>Results: {html.escape(rows.parent.name)}</h2>"]
        parts += [table_html(summaries(rows.parent))]
        parts += map(_image, _pictures(rows.parent, "extremes").values())
        parts += _bits(rows.parent)
        parts += _classes(rows.parent)
        parts += _calibration(rows.parent)
        parts += _identities(rows.parent)
        parts += [
            "<p>Mean over examples ± standard error of that mean; the repeats of an example are "
            "averaged first. ODE: change of variables along the probability-flow ODE, over the "
            "noise of the protocol. bound: variational upper bound on the negative log-likelihood; "
            "bound at t_min: the same of the noised data; -ELBO: that of the plug-in reverse SDE. "
            "uniform, histogram, Gaussian: trivial models fitted on the training data. "
            "Lower is better. information: log p(x | c) − log p(x), what the context says of x; "
            "higher is more.</p>"
        ]
    for path in sorted(workdir.glob(f"*/{quality.FILE}")):
        parts += [f"<h2>Sample quality: {html.escape(path.parent.name)}</h2>"]
        parts += [as_html(quality.HEADER, map(quality.cells, quality.read(path.parent)))]
        parts += [
            "<p>FID and KID: lower is better; IS: higher. Only figures of the same features, "
            "reference and n compare.</p>"
        ]
    snapshots = sorted((workdir / "samples").glob("*.png"))
    for title, image in (
        ("Samples", workdir / "samples.png"),
        ("Density", workdir / "density.png"),
        ("Trajectories", workdir / "trajectories.png"),
        ("Scores", workdir / "score.png"),
        ("Diagnosis", workdir / "diagnosis.png"),
        ("Training", save_curves(workdir)),
        ("Last snapshot of training", snapshots[-1] if snapshots else None),
    ):
        if image is not None and image.exists():
            parts += [f"<h2>{title}</h2>", _image(image)]
    for title, path in (("Config", "config.json"), ("Versions", "versions.json")):
        if (workdir / path).exists():
            text = json.dumps(json_files.read(workdir / path), indent=2)
            parts += [f"<h2>{title}</h2><pre>{html.escape(text)}</pre>"]
    page = workdir / "report.html"
    page.write_text(
        f"<!doctype html><html><head><meta charset='utf-8'><title>{html.escape(workdir.name)}"
        f"</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n",
        encoding="utf-8",
    )
    return page


def _bits(eval_folder: Path) -> list[str]:
    """The figure of the latest step that says where the bits of a bound are spent."""
    images = _pictures(eval_folder, "bits")
    if not images:
        return []
    return ["<h3>Where the bits are spent</h3>", f"<p>{BITS}</p>", _image(images[max(images)])]


def _classes(eval_folder: Path) -> list[str]:
    """Show what Bayes' rule makes of the likelihoods of all classes."""
    parts = []
    for found in classification.read(eval_folder):
        parts += ["<h3>Classes by Bayes' rule</h3>"]
        parts += [as_html(classification.HEADER, [classification.cells(found)])]
        parts += [f"<p>{CONFUSION}</p>", as_html(*classification.confusion_cells(found))]
    return parts


def _calibration(eval_folder: Path) -> list[str]:
    """Show the places of the examples among samples of the model."""
    found = calibration.read(eval_folder)
    if not found:
        return []
    parts = ["<h3>Calibration</h3>", as_html(calibration.HEADER, map(calibration.cells, found))]
    return [
        *parts,
        f"<p>{PLACES}</p>",
        *map(_image, _pictures(eval_folder, "calibration").values()),
    ]


def _pictures(eval_folder: Path, kind: str) -> dict[int, Path]:
    """The pictures <kind>_<step>.png of those steps whose figures are reported, in order."""
    known = identities.current(eval_folder)
    found = {int(path.stem.split("_")[1]): path for path in eval_folder.glob(f"{kind}_*.png")}
    steps = found.keys() if known is None else {figure.step for figure in known.values()}
    return {step: found[step] for step in sorted(found.keys() & steps)}


def _identities(eval_folder: Path) -> list[str]:
    """What the figures of a folder are of."""
    figures = [f for f in (identities.current(eval_folder) or {}).values() if f.kind == "model"]
    header = ("step", "split", "parameters", "data", "settings")
    cells = [[str(getattr(figure, name)) for name in header] for figure in sorted(figures)]
    return [f"<p>{OF}</p>", as_html(header, cells)] if cells else []


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f"<img alt='{html.escape(path.stem)}' src='data:image/png;base64,{data}'>"
