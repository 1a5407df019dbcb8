"""The mean of the densities of several models: better than one where examples are few.

    p(x | c) = (1/M) Σ_m p_m(x | c)

Every member keeps another tenth of the examples out of training. All members use the checkpoint of
the same step. It is chosen by all these parts together, because one tenth alone is too few examples
to tell checkpoints apart.
Reference: Lakshminarayanan et al. 2017, https://arxiv.org/abs/1612.01474 (means of networks).
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from scipy.special import logsumexp
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.utils.validation import check_is_fitted

import json_files
from checks import require
from density_model import DensityModel
from fitting import HELD_OUT, LARGEST_SEED, check_seed, folder_of, parts
from run_lib.best_checkpoint import chosen, held_out_values
from run_lib.folder import write_json

FILE = "ensemble.json"
SEEDS = 1000  # between the seeds of two members
MEMBERS = 7  # the stream of numbers that says which member a sample is of


class DensityEnsemble(DensityMixin, BaseEstimator):
    """A mixture of `DensityModel`s with equal weights.

    Args:
        members: the number M of models, 2 to 10; `fit` takes M times as long.
        config: as of `DensityModel`; so are the others.
        changes: fields of the config by name.
        workdir: the folder of the run folders of the members; an interrupted `fit` goes on there.
            None: a temporary folder.
        random_state: the seed of everything that is drawn.
        verbose: `fit` writes its progress to the standard error.
    """

    def __init__(
        self,
        members: int = 5,
        *,
        config: str | Path | ConfigDict | None = None,
        changes: Mapping[str, Any] | None = None,
        workdir: str | Path | None = None,
        random_state: int = 0,
        verbose: bool = True,
    ) -> None:
        self.members = members
        self.config = config
        self.changes = changes
        self.workdir = workdir
        self.random_state = random_state
        self.verbose = verbose

    def fit(
        self, X: np.ndarray, y: None = None, *, context: np.ndarray | None = None
    ) -> "DensityEnsemble":
        """Train every member on examples X [n, *d]; arguments and errors as of `DensityModel`."""
        if y is not None:
            warnings.warn("y is not used: fit p(y | x) by fit(y, context=x)", stacklevel=2)
        most = round(1.0 / HELD_OUT)
        require(2 <= self.members <= most, "members", self.members, f"2 to {most}")
        check_seed(self.random_state, LARGEST_SEED - SEEDS * (self.members - 1))
        X = np.asarray(X)
        allowed = f"at least {2 * self.members} examples, [n, *d], for {self.members} members"
        require(X.ndim > 1 and len(X) >= 2 * self.members, "X", X.shape, allowed)
        workdir = folder_of(self, self.workdir)
        models = []
        for number, part in enumerate(parts(len(X), self.members, self.random_state)):
            model = DensityModel(
                self.config,
                changes=self.changes,
                workdir=workdir / f"member_{number}",
                random_state=self.random_state + SEEDS * number,
                verbose=self.verbose,
            )
            models.append(model.fit(X, context=context, held_out=part))
        values = [held_out_values(m.workdir_, m.experiment_) for m in models]
        common = set.intersection(*map(set, values))
        step = chosen({s: np.concatenate([found[s] for found in values]) for s in common})
        write_json(workdir / FILE, {"members": self.members, "step": step})
        return self._of(workdir, [model.at_step(step) for model in models], step)

    def log_prob(
        self, X: np.ndarray, context: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """log p(x) of every example in nats, and an estimate of the solver's error, both [n].

        Arguments and errors as of `DensityModel.log_prob`. The error is the mean of those of the
        members, weighted by their densities, as the error of the logarithm of a sum is.
        """
        check_is_fitted(self)
        found = [model.log_prob(X, context) for model in self.models_]
        each, errors = (np.stack(part) for part in zip(*found, strict=True))
        total = logsumexp(each, axis=0)
        shares = np.exp(each - np.where(np.isfinite(total), total, 0.0))
        return total - np.log(len(each)), (shares * errors).sum(axis=0)

    def score_samples(self, X: np.ndarray, context: np.ndarray | None = None) -> np.ndarray:
        """log p(x), or log p(x | context), of every example in nats, [n]."""
        return self.log_prob(X, context)[0]

    def score(self, X: np.ndarray, y: None = None, *, context: np.ndarray | None = None) -> float:
        """The mean over the examples of log p(x) in nats."""
        del y
        return float(self.score_samples(X, context).mean())

    def sample(
        self, n_samples: int = 1, context: np.ndarray | None = None, *, random_state: int = 0
    ) -> np.ndarray:
        """Draw samples [n_samples, *d], each of a member that is drawn at random.

        Arguments and errors as of `DensityModel.sample`.
        """
        check_is_fitted(self)
        require(n_samples >= 1, "n_samples", n_samples, "at least 1")
        self.models_[0].check_context(context, n_samples)
        drawn = np.random.default_rng([random_state, MEMBERS]).random(n_samples)
        members = np.floor(len(self.models_) * drawn).astype(int)
        samples: dict[int, np.ndarray] = {}
        for number in np.unique(members):
            ids = np.flatnonzero(members == number)
            given = None if context is None else np.asarray(context)[ids]
            seed = random_state + SEEDS * int(number)
            found = self.models_[number].sample(len(ids), given, random_state=seed)
            samples |= dict(zip(ids, found, strict=True))
        return np.stack([samples[i] for i in range(n_samples)])

    def save(self, folder: str | Path) -> None:
        """Copy the members, each with the chosen checkpoint, as `DensityModel.save`.

        Raises:
            FileExistsError: the folder is there.
        """
        check_is_fitted(self)
        folder = Path(folder).absolute()
        folder.mkdir(parents=True)
        for model in self.models_:
            model.save(folder / model.workdir_.name)
        write_json(folder / FILE, {"members": len(self.models_), "step": self.step_})

    @classmethod
    def load(cls, folder: str | Path) -> "DensityEnsemble":
        """The ensemble of a folder that `save` or `fit` has written.

        Raises:
            ValueError: there is no such ensemble, or it is damaged.
        """
        folder = Path(folder).absolute()
        require((folder / FILE).is_file(), "folder", str(folder), f"one that holds {FILE}")
        found = json_files.read(folder / FILE)
        known = isinstance(found, dict) and found.keys() >= {"members", "step"}
        require(known, "folder", str(folder), f"one whose {FILE} names members and step")
        models = [
            DensityModel.load(folder / f"member_{number}").at_step(found["step"])
            for number in range(found["members"])
        ]
        first = models[0]
        ensemble = cls(
            len(models), config=first.config, workdir=folder, random_state=first.random_state
        )
        return ensemble._of(folder, models, found["step"])

    def _of(self, workdir: Path, models: list[DensityModel], step: int) -> "DensityEnsemble":
        """Itself, with what is fitted."""
        self.workdir_, self.models_, self.step_ = workdir, models, step
        return self
