"""Several fits of a density, whose mean density is taken: a mixture of models.

The members differ in their start and in the tenth of the examples that each keeps to choose its
checkpoint by. Where few examples let a network overfit, their mean is better than each of them.
Reference: Lakshminarayanan et al. 2017, https://arxiv.org/abs/1612.01474.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float
from scipy.special import logsumexp

from density_model import DensityModel

Rows = Float[np.ndarray, "n d"]


@dataclasses.dataclass(frozen=True)
class Members:
    """Models of p(x) or p(x | context), each with a folder and a seed of its own."""

    models: list[DensityModel]

    @classmethod
    def of(
        cls, number: int, workdir: Path, *, random_state: int, changes: Mapping[str, str]
    ) -> "Members":
        """So many models: the first in `workdir`, the others beside it."""
        return cls([
            DensityModel(
                changes=changes,
                workdir=workdir.with_name(f"{workdir.name}_{member}") if member else workdir,
                random_state=random_state + 1000 * member,
            )
            for member in range(number)
        ])  # fmt: skip

    def fit(self, X: Rows, context: Rows | None = None) -> "Members":
        """Fit each to float32 rows."""
        for model in self.models:
            model.fit(X.astype(np.float32), context=_float32(context))
        return self

    def log_densities(self, X: Rows, context: Rows | None = None) -> Float[np.ndarray, "m n"]:
        """log p of every row by every member."""
        x, given = X.astype(np.float32), _float32(context)
        return np.stack([model.score_samples(x, given) for model in self.models])

    def sample(
        self, number: int, context: Rows | None = None, *, random_state: int = 0
    ) -> Float[np.ndarray, "m n d"]:
        """So many samples of every member, [n, d] of each, all of other noise."""
        given = _float32(context)
        return np.stack([
            model.sample(number, given, random_state=random_state + 1000 * member)
            for member, model in enumerate(self.models)
        ])  # fmt: skip


def log_mean(each: Float[np.ndarray, "m n"]) -> Float[np.ndarray, " n"]:
    """The logarithm of the mean of the densities."""
    return logsumexp(each, axis=0) - np.log(len(each))


def _float32(rows: Rows | None) -> Rows | None:
    return None if rows is None else rows.astype(np.float32)
