"""Measure how good the classes of Bayes' rule are, from the rows of an evaluation.

    accuracy     share of examples whose largest posterior is that of their class
    log loss     −log p(c | x) of the true class, nats
    calibration  Σ_b (n_b/n) |accuracy_b − confidence_b|, 15 bins of equal width of the largest
                 posterior

Means ± standard errors over examples, the repeats of an example averaged first.
Reference: Guo et al. 2017, https://arxiv.org/abs/1706.04599, eq. (3).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import json_files
from records import Row, stored, summarize, summarize_values, values
from run_lib import folder, identities

FILE = "classification.json"
HEADER = ("step", "split", "estimator", "accuracy", "log loss, nats", "calibration error", "n",
          "protocol")  # fmt: skip
GROUP = ("step", "split", "estimator", "protocol", "identity")
BINS = 15


def write(eval_folder: Path) -> list[dict[str, Any]]:
    """classification.json of a folder of rows, if they have classes; returns its content."""
    tables = identities.reported(eval_folder, stored(eval_folder))
    tables.sort(key=lambda table: [table[name] for name in GROUP])
    found = [summary(table) for table in tables if table.knows("log_posterior")]
    if found or (eval_folder / FILE).exists():
        folder.write_json(eval_folder / FILE, found)
    return found


def read(eval_folder: Path) -> list[dict[str, Any]]:
    """The content of classification.json; nothing where there is none."""
    path = eval_folder / FILE
    return json_files.read(path) if path.exists() else []


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """All figures of the rows of one estimator, by name; `confusion` [true][predicted]."""
    truth, log_posterior = values(rows, "class"), values(rows, "log_posterior")
    chosen = log_posterior.argmax(axis=1)
    right = chosen == truth
    accuracy, log_loss = summarize_values(values(rows, "index"), right), summarize(rows)
    number = log_posterior.shape[1]
    confusion = np.bincount(truth * number + chosen, minlength=number**2).reshape(number, number)
    return {name: rows[0][name] for name in GROUP} | {
        "accuracy": accuracy.mean,
        "accuracy_standard_error": accuracy.standard_error,
        "log_loss": log_loss.mean,
        "log_loss_standard_error": log_loss.standard_error,
        "calibration_error": calibration_error(np.exp(log_posterior.max(axis=1)), right),
        "n": accuracy.examples,
        "repeats": accuracy.repeats,
        "confusion": confusion.tolist(),
    }


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Σ_b (n_b/n) |accuracy_b − confidence_b| of [n] confidences and whether each was right."""
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(place, weights=right - confidence, minlength=BINS)
    return float(np.abs(gaps).sum() / len(right))


def cells(found: dict[str, Any]) -> list[str]:
    """The columns of `HEADER` as text."""
    return [
        str(found["step"]),
        found["split"],
        found["estimator"],
        f"{found['accuracy']:.4f} ± {found['accuracy_standard_error']:.4f}",
        f"{found['log_loss']:.4f} ± {found['log_loss_standard_error']:.4f}",
        f"{found['calibration_error']:.4f}",
        str(found["n"]),
        found["protocol"],
    ]


def confusion_cells(found: dict[str, Any]) -> tuple[Sequence[str], list[list[str]]]:
    """The confusion matrix as (header, rows) of text."""
    table = found["confusion"]
    rows = [[str(true), *map(str, counts)] for true, counts in enumerate(table)]
    return ["true", *map(str, range(len(table)))], rows
