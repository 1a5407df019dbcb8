"""report.html of a run folder, one file with its images inside, from whatever the folder holds."""

import base64
import html
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import json_files
import plotting
from run_lib import (
    calibration,
    classification,
    comparison,
    describe,
    folder,
    identities,
    metrics,
    quality,
    report,
)

ABOUT = "about.json"
EXPLAINED = {
    "ODE": "−log p by the change of variables along the probability-flow ODE, over the noise of "
    "the protocol",
    "bound": "variational upper bound on the negative log-likelihood",
    "bound at t_min": "the same bound of the noised data",
    "discrete bound": "the bound of grey levels, without dequantisation",
    "-ELBO": "the bound of the plug-in reverse SDE",
    "law of the data": "−log of the known density of the data; its mean is the entropy, which no "
    "model beats",
    "KL(data ‖ ODE)": "what the ODE has above it, paired over the examples: 0 for the true law",
    "uniform, histogram, Gaussian": "trivial models, fitted on the training data",
    "information": "log p(x | c) − log p(x), what the context says of x: higher is more",
}
MEANS = (
    "Every figure is the mean over examples ± its standard error; the repeats of an example are "
    "averaged first. Of likelihoods lower is better."
)
OF = "The figures are of these parameters, data and settings (digests)."
CONFUSION = "Rows are true classes, columns those with the largest posterior; counts of examples."
PLACES = (
    "If the density is the true one, levels and ranks are uniform, and so many examples lie within "
    "each region of highest density as it has probability. The p-values are those of the test of "
    "Kolmogorov and Smirnov; that of the ranks is corrected for the number of coordinates."
)
BITS = "The figure shows how much each noise level adds to the bound."
QUALITY = (
    "FID and KID: lower is better; IS: higher. Only figures of the same features, reference and n "
    "compare."
)
STYLE = """
:root{--line:#d5d9de;--soft:#f4f6f8;--ink:#1d2733;--dim:#5b6773}
body{font:16px/1.55 system-ui,sans-serif;max-width:1100px;margin:0 auto;padding:1.5em 1em 4em;
color:var(--ink)}
h1{margin:0 0 .2em}h2{margin:2em 0 .5em;border-bottom:1px solid var(--line)}
.about{color:var(--dim);margin:.2em 0}
.cards{display:flex;flex-wrap:wrap;gap:1em;margin:1.2em 0}
.card{border:1px solid var(--line);border-radius:8px;padding:.6em 1.1em;background:var(--soft)}
.card b{display:block;font-size:1.7em}.card span{color:var(--dim);font-size:.9em}
.said{border-left:4px solid #c77700;background:#fff6e6;padding:.5em .9em;margin:.6em 0}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:13px}
td,th{border:1px solid var(--line);padding:.3em .6em;text-align:left;white-space:nowrap}
th{background:var(--soft)}td:last-child{min-width:16em;white-space:normal}
.pair{display:flex;flex-wrap:wrap;gap:1em}.pair figure{flex:1 1 320px}
figure{margin:1em 0}figcaption{color:var(--dim);font-size:.9em}
img{max-width:100%}.pixels{image-rendering:pixelated}
pre{background:var(--soft);padding:1em;overflow-x:auto;font-size:12px}
summary{cursor:pointer;margin:.6em 0}
"""


def write(workdir: Path) -> Path:
    """Write report.html, so that a reader sees the old page or the new one."""
    parts = [*_head(workdir)]
    evaluations = sorted(path.parent for path in workdir.glob("*/rows.jsonl"))
    for eval_folder in evaluations:
        parts += _evaluation(eval_folder, several=len(evaluations) > 1)
    parts += _pictures_beside(workdir)
    for path in sorted(workdir.glob(f"*/{quality.FILE}")):
        parts += [f"<h2>Sample quality: {html.escape(path.parent.name)}</h2>"]
        parts += [as_html(quality.HEADER, map(quality.cells, quality.read(path.parent)))]
        parts += [_text(QUALITY)]
    snapshots = sorted((workdir / "samples").glob("step_*.png"))
    for title, image, seen in (
        ("Density", workdir / "density.png", "density of the data and of the model"),
        ("Trajectories", workdir / "trajectories.png", "samples on their way from noise to data"),
        ("Scores", workdir / "score.png", "scores of the model and of the data over x"),
        ("Diagnosis", workdir / "diagnosis.png", "errors of the score over the time t"),
        ("Training", save_curves(workdir), "losses and norms over the steps of the training"),
        ("Last snapshot of training", snapshots[-1] if snapshots else None,
         "samples drawn during the training"),
    ):  # fmt: skip
        if image is not None and image.exists():
            parts += [f"<h2>{title}</h2>", picture(image, seen)]
    parts += [*_config(workdir), *_folded("Versions", workdir / "versions.json")]
    page = workdir / "report.html"
    folder.replace_file(page, [document(workdir.name, parts)])
    return page


def document(title: str, parts: Iterable[str]) -> str:
    """A page of its own."""
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body>{''.join(parts)}</body></html>\n"
    )


# What stands on top: the run, its figures beside the baselines.


def _head(workdir: Path) -> Iterator[str]:
    """The name of the run, what it is of, and the command that repeats it."""
    yield f"<h1>{html.escape(workdir.name)}</h1>"
    about = read(workdir / ABOUT)
    versions = read(workdir / "versions.json")
    if about:
        parts = [
            f"{about['network']}, {about['parameters']:,} parameters",
            f"begun on {about['begun']}",
            f"Fokker {versions.get('fokker', '')}, commit {versions.get('git_commit', 'unknown')}",
        ]
        yield f"<p class='about'>{html.escape(' · '.join(parts))}</p>"
        yield f"<p class='about'>{html.escape(about['data'])}</p>"
        if about["command"]:
            yield f"<pre>{html.escape(about['command'])}</pre>"


def _evaluation(eval_folder: Path, *, several: bool) -> Iterator[str]:
    """All that one folder of rows tells."""
    results = report.summaries(eval_folder)
    name = f": {html.escape(eval_folder.name)}" if several or eval_folder.name != "eval" else ""
    yield f"<h2>Results{name}</h2>"
    yield from _headline(eval_folder, results)
    yield from map(_text, report.probabilities(eval_folder.parent, headline(results)))
    yield from (f"<p class='said'>{html.escape(text)}</p>" for text in report.sentences(results))
    yield as_html(report.HEADER, (result.cells() for result in results))
    yield _text(MEANS)
    names = "".join(
        f"<dt><b>{html.escape(name)}</b></dt><dd>{html.escape(text)}</dd>"
        for name, text in EXPLAINED.items()
    )
    yield f"<details><summary>What the names mean</summary><dl>{names}</dl></details>"
    seen = "the likeliest and the least likely examples, with their values"
    yield from (picture(path, seen) for path in _pictures(eval_folder, report.EXTREMES))
    yield from _bits(eval_folder)
    yield from _classes(eval_folder)
    yield from _calibration(eval_folder)
    yield from _identities(eval_folder)


def headline(results: list[report.Result]) -> list[report.Result]:
    """The likelihoods of the latest step, and the baselines beside them."""
    names = {*comparison.MODELS, *comparison.BASELINES}
    found = [result for result in results if result.estimator in names]
    last = max((result.step for result in found), default=0)
    return [result for result in found if result.step == last]


def _headline(eval_folder: Path, results: list[report.Result]) -> Iterator[str]:
    """The figures in large letters, and a drawing of them beside the baselines."""
    shown = headline(results)
    models = [result for result in shown if result.estimator in comparison.MODELS]
    if not models:
        return
    cards = "".join(
        f"<div class='card'><span>{html.escape(result.estimator)}</span>"
        f"<b>{result.value.mean:.3f} ± {result.value.standard_error:.3f}</b>"
        f"<span>{result.unit}, {result.value.examples} {result.split} examples</span></div>"
        for result in models
    )
    yield f"<div class='cards'>{cards}</div>"
    if len(shown) > len(models):
        path = eval_folder / "headline.png"
        several = len({result.split for result in shown}) > 1
        bars = [
            plotting.Mark(
                f"{r.estimator}, {r.split}" if several else r.estimator,
                r.value.mean,
                r.value.standard_error,
                r not in models,
            )
            for r in shown
        ]
        plotting.save_marks(path, bars, f"{models[0].unit} (lower is better)")
        numbers = ", ".join(f"{bar.name} {bar.mean:.3f}" for bar in bars)
        yield picture(path, "the model beside trivial models", numbers)


def _pictures_beside(workdir: Path) -> list[str]:
    """Samples, and beside them examples of the data where they are images."""
    found = [
        picture(path, seen, pixels=True)
        for path, seen in (
            (workdir / "examples.png", "examples of the data"),
            (workdir / "samples.png", "samples of the model"),
        )
        if path.exists()
    ]
    return [f"<h2>Samples</h2><div class='pair'>{''.join(found)}</div>"] if found else []


# Parts of an evaluation.


def _bits(eval_folder: Path) -> list[str]:
    """The figure of the latest step that says where the bits of a bound are spent."""
    images = _pictures(eval_folder, "bits_{step}.png")
    if not images:
        return []
    seen = "the cost of each noise level, and their sum"
    return ["<h3>Where the bits are spent</h3>", _text(BITS), picture(images[-1], seen)]


def _classes(eval_folder: Path) -> list[str]:
    """Show what Bayes' rule makes of the likelihoods of all classes."""
    parts = []
    for found in classification.read(eval_folder):
        parts += ["<h3>Classes by Bayes' rule</h3>"]
        parts += [as_html(classification.HEADER, [classification.cells(found)])]
        parts += [_text(CONFUSION), as_html(*classification.confusion_cells(found))]
    return parts


def _calibration(eval_folder: Path) -> list[str]:
    """Show the places of the examples among samples of the model."""
    found = calibration.read(eval_folder)
    if not found:
        return []
    parts = ["<h3>Calibration</h3>", as_html(calibration.HEADER, map(calibration.cells, found))]
    seen = "distribution functions of levels and ranks, less that of the uniform law"
    images = [eval_folder / line["picture"] for line in found if "picture" in line]
    return [*parts, _text(PLACES), *(picture(path, seen) for path in images if path.exists())]


def _pictures(eval_folder: Path, name: str) -> list[Path]:
    """The pictures of the steps and splits whose figures are reported, which stand in the name."""
    figures = (identities.current(eval_folder) or {}).values()
    places = sorted({(figure.step, figure.split) for figure in figures})
    names = dict.fromkeys(name.format(step=step, split=split) for step, split in places)
    return [path for path in map(eval_folder.joinpath, names) if path.exists()]


def _identities(eval_folder: Path) -> list[str]:
    """Show in a table which parameters, data and settings the figures of a folder are of."""
    figures = [f for f in (identities.current(eval_folder) or {}).values() if f.kind == "model"]
    header = ("step", "split", "parameters", "data", "settings")
    cells = [[str(getattr(figure, name)) for name in header] for figure in sorted(figures)]
    table = f"{_text(OF)}{as_html(header, cells)}"
    return [f"<details><summary>Identities</summary>{table}</details>"] if cells else []


# Training and config.


def save_curves(workdir: Path) -> Path | None:
    """curves.png from metrics.jsonl, unless it is of that time; None where there are no metrics."""
    path, source = workdir / "curves.png", workdir / metrics.FILE
    if not source.exists():
        return None
    written = source.stat().st_mtime_ns  # before it is read: rows that come then are drawn later
    if path.exists() and path.stat().st_mtime_ns == written:
        return path
    curves: dict[str, dict[str, tuple[array[int], array[float]]]] = {}
    for row in metrics.read_metrics(workdir):
        label = row["split"].replace("_", "-")
        for name in row.keys() - {"step", "split", "time"}:
            steps, values = curves.setdefault(name, {}).setdefault(label, (array("q"), array("d")))
            steps.append(row["step"])
            values.append(row[name])
    labels = ("train", "held-out")
    panels: dict[str, dict[str, plotting.Curve]] = {
        name: {label: curves[name][label] for label in labels if label in curves[name]}
        for name in sorted(curves)
    }
    if not panels:
        return None
    unfinished = path.with_name("curves.tmp.png")
    plotting.save_curves(unfinished, panels)
    os.utime(unfinished, ns=(written, written))
    os.replace(unfinished, path)
    return path


def _config(workdir: Path) -> list[str]:
    """The fields that differ from the defaults, with their meaning; the whole config folded."""
    path = workdir / "config.json"
    if not path.exists():
        return []
    values = dict(folder.flatten(read(path)))
    known = {field.dotted: field for field in describe.fields()}
    rows = [
        [name, str(value), str(known[name].default), known[name].meaning]
        for name, value in values.items()
        if name in known and value != _plain(known[name].default)
    ]
    title = "<h2>Config</h2><p>These fields differ from their defaults.</p>"
    table = as_html(("field", "value", "default", "meaning"), rows)
    return [title, table, *_folded("All fields", path)]


def _plain(value: Any) -> Any:
    """The value as a JSON file gives it back."""
    return json.loads(json.dumps(value))


def _folded(title: str, path: Path) -> list[str]:
    """A JSON file that opens on a click; nothing where there is none."""
    if not path.exists():
        return []
    text = html.escape(json.dumps(read(path), indent=2))
    return [f"<details><summary>{title}</summary><pre>{text}</pre></details>"]


# HTML.


def as_html(header: Sequence[str], rows: Iterable[list[str]]) -> str:
    """A table that scrolls where it is wider than the page."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<div class='wide'><table><tr>{head}</tr>{body}</table></div>"


def picture(path: Path, seen: str, numbers: str = "", *, pixels: bool = False) -> str:
    """An image inside the page, with what is seen on it; images of pixels are enlarged sharply."""
    data, kind = base64.b64encode(path.read_bytes()).decode(), " class='pixels'" * pixels
    alt = html.escape(f"{seen}: {numbers}" if numbers else seen, quote=True)
    image = f"<img{kind} alt='{alt}' src='data:image/png;base64,{data}'>"
    return f"<figure>{image}<figcaption>{html.escape(seen)}</figcaption></figure>"


def _text(sentences: str) -> str:
    return f"<p>{html.escape(sentences)}</p>"


def read(path: Path) -> Any:
    """Return what a JSON file holds; an empty object where there is no file."""
    return json_files.read(path) if path.exists() else {}
