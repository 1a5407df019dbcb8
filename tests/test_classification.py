"""Accuracy, log loss, calibration and confusion of rows against numbers by hand."""

import math
from pathlib import Path

import numpy as np
import pytest

from records import Records
from run_lib import classification


def row(index: int, truth: int, posterior: tuple[float, ...], repeat: int = 0) -> dict:
    return {
        "estimator": "class by ODE", "protocol": "p", "step": 1, "split": "test", "identity": "i",
        "index": index, "repeat": repeat, "class": truth,
        "log_posterior": [math.log(p) for p in posterior],
        "value": -math.log(posterior[truth]), "unit": "nats",
    }  # fmt: skip


ROWS = [row(0, 0, (0.9, 0.1)), row(1, 1, (0.2, 0.8)), row(2, 1, (0.7, 0.3)), row(3, 0, (0.6, 0.4))]


def test_figures_of_four_examples() -> None:
    found = classification.summary(ROWS)
    assert found["accuracy"] == 0.75
    assert found["accuracy_standard_error"] == pytest.approx(0.25)
    losses = [-math.log(p) for p in (0.9, 0.8, 0.3, 0.6)]
    assert found["log_loss"] == pytest.approx(np.mean(losses))
    assert found["log_loss_standard_error"] == pytest.approx(np.std(losses, ddof=1) / 2)
    assert found["confusion"] == [[2, 0], [1, 1]]
    assert (found["n"], found["repeats"]) == (4, 1)
    # Four bins with an example each: |1 − .9|, |1 − .8|, |0 − .7|, |1 − .6|.
    assert found["calibration_error"] == pytest.approx((0.1 + 0.2 + 0.7 + 0.4) / 4)


def test_calibration_is_measured_in_bins() -> None:
    """Confidences of one bin are compared with their common accuracy; 1 is in the last bin."""
    confidence = np.full(1000, 0.75)
    assert classification.calibration_error(confidence, np.arange(1000) % 4 > 0) == pytest.approx(0)
    assert classification.calibration_error(confidence, np.arange(1000) % 2 > 0) == pytest.approx(
        0.25
    )
    assert classification.calibration_error(np.ones(3), np.ones(3, bool)) == 0.0


def test_repeats_are_averaged_first_and_other_rows_left_out(tmp_path: Path) -> None:
    other = {k: v for k, v in ROWS[0].items() if k != "log_posterior"} | {"estimator": "ODE"}
    Records(tmp_path).append([*ROWS, row(0, 0, (0.4, 0.6), repeat=1), other])
    (found,) = classification.write(tmp_path)
    assert classification.read(tmp_path) == [found]
    assert found["accuracy"] == pytest.approx((0.5 + 1 + 0 + 1) / 4)
    assert found["confusion"] == [[2, 1], [1, 1]]
    assert found["n"] == 4
    assert classification.cells(found)[3] == "0.6250 ± 0.2394"
    header, rows = classification.confusion_cells(found)
    assert (list(header), rows) == (["true", "0", "1"], [["0", "2", "1"], ["1", "1", "1"]])
    assert classification.write(tmp_path / "none") == []
