"""Models that lose to a trivial baseline: paired differences over examples, in plain words.

A model loses where the mean over examples of (its value − that of the baseline) is more than two
standard errors above zero.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from records import Row, Summary, example_means, summarize_values

# What may lose; neither the loss, nor a divergence, nor the bound of noised data compares.
MODELS = {
    "ODE": "The ODE likelihood of the model",
    "bound": "The bound of the model",
    "discrete bound": "The discrete bound of the model",
    "-ELBO": "The -ELBO of the model",
}
MODELS |= {
    f"{name} unconditional": text.replace("The", "The unconditional", 1)
    for name, text in MODELS.items()
}
REGRESSION = "linear regression"  # the only one that sees the context
BASELINES = {  # what each is, and what it sees, from the least to the most
    "uniform": ("the uniform law over all values", "a model that has seen no data"),
    "histogram": (
        "the independent histogram of single pixels",
        "a model that sees one pixel at a time",
    ),
    "diagonal Gaussian": (
        "the Gaussian of single coordinates",
        "a model that knows the mean and the variance of each",
    ),
    "Gaussian": (
        "the Gaussian with the covariance of the training data",
        "a model that knows the mean and the covariance, no more",
    ),
    REGRESSION: (
        "the linear regression on the context with Gaussian noise",
        "a model that is linear in the context",
    ),
}
ERRORS = 2.0


class Defeat(NamedTuple):
    """A model that is worse than a baseline; values are means over the examples of both."""

    estimator: str
    protocol: str
    step: int
    split: str
    unit: str
    value: float
    baseline: str
    baseline_protocol: str
    baseline_value: float
    difference: Summary

    def as_json(self) -> dict[str, Any]:
        """The baseline and the difference, by name, and the sentence."""
        return {
            "baseline": self.baseline,
            "baseline_protocol": self.baseline_protocol,
            "baseline_mean": self.baseline_value,
            "difference": self.difference.mean,
            "standard_error": self.difference.standard_error,
            "n": self.difference.examples,
            "sentence": self.sentence(),
        }

    def sentence(self) -> str:
        """Say in words which baseline the model loses to, and by how much."""
        unit, gap, (law, sight) = self.unit, self.difference, BASELINES[self.baseline]
        return (
            f"{MODELS[self.estimator]}, {self.value:.4f} {unit}, is worse than {law}, "
            f"{self.baseline_value:.4f} {unit}: {sight}. Difference {gap.mean:.4f} ± "
            f"{gap.standard_error:.4f} {unit}, paired, {gap.examples} {self.split} examples, step "
            f"{self.step} ({self.protocol})."
        )


def defeats(model: Sequence[Row], others: Iterable[Sequence[Row]]) -> list[Defeat]:
    """The baselines that beat a model.

    Args:
        model: rows of one estimator, protocol, step and split.
        others: groups of rows alike; those of this step, split and unit that are baselines count.
            The regression on the context does not count beside p(x).
    """
    first = model[0]
    if first["estimator"] not in MODELS:
        return []
    sees_no_context = first["estimator"].endswith(" unconditional")
    names = BASELINES.keys() - ({REGRESSION} if sees_no_context else set())
    context = [first[field] for field in ("step", "split", "unit")]
    found = [
        _compared(model, rows, both)
        for rows in others
        if rows[0]["estimator"] in names
        and [rows[0][field] for field in ("step", "split", "unit")] == context
        and (both := example_means(model).keys() & example_means(rows).keys())
    ]
    return [d for d in found if d.difference.mean > ERRORS * d.difference.standard_error]


def _compared(model: Sequence[Row], baseline: Sequence[Row], both: set[int]) -> Defeat:
    means = [example_means(model), example_means(baseline)]
    ours, theirs = (np.asarray([mean[i] for i in sorted(both)]) for mean in means)
    first, other = model[0], baseline[0]
    return Defeat(
        **{field: first[field] for field in ("estimator", "protocol", "step", "split", "unit")},
        value=float(ours.mean()),
        baseline=other["estimator"],
        baseline_protocol=other["protocol"],
        baseline_value=float(theirs.mean()),
        difference=summarize_values(np.arange(len(both)), ours - theirs),
    )
