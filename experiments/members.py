"""One model, or an ensemble of several, behind the same methods."""

from pathlib import Path

import numpy as np

import checksums
from density_ensemble import DensityEnsemble
from density_model import DensityModel

Model = DensityModel | DensityEnsemble


def model_of(members: int, workdir: Path, *, random_state: int, changes: dict[str, str]) -> Model:
    """Return a model for `members=1`, otherwise an ensemble, whose folder ends in their number."""
    if members == 1:
        return DensityModel(workdir=workdir, random_state=random_state, changes=changes)
    workdir = workdir.with_name(f"{workdir.name}_{members}")
    return DensityEnsemble(members, workdir=workdir, random_state=random_state, changes=changes)


def fit(model: Model, X: np.ndarray, context: np.ndarray | None = None) -> Model:
    """Fit it to float32 rows."""
    given = None if context is None else context.astype(np.float32)
    return model.fit(X.astype(np.float32), context=given)


def digests(model: Model) -> list[str]:
    """Digest the parameters of a fitted model, or of every member of an ensemble."""
    return [checksums.digest(part.params_) for part in getattr(model, "models_", [model])]
