"""log p(x) and log p(x | context) of arrays, in the conventions of scikit-learn.

    model = DensityModel().fit(x_train)
    model.score_samples(x_test)

A fitted model is a run folder like any other, which the command line evaluates: `log_prob` gives
the values that an evaluation of the same checkpoint and examples would write in its rows.
"""

import contextlib
import dataclasses
import functools
import logging
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.utils.validation import check_is_fitted

import json_files
import npz_files
import run_lib
from checkpoints import whole_steps
from checks import require
from default_configs import of_images, of_reals
from dequantization import Pixels, Reals
from fitting import LARGEST_SEED, check_seed, divided, folder_of, keep, parts, plain, told
from operators import fold_in_each
from real_arrays import check_finite
from run_lib import config_files, loading
from run_lib.best_checkpoint import FILE as HELD_OUT_BOUNDS
from run_lib.best_checkpoint import best_step
from run_lib.calibration import Calibration
from run_lib.conditional_estimators import with_contexts
from run_lib.estimators import Estimator, Parameters, estimators
from run_lib.experiment import Experiment
from run_lib.folder import alone, trained_otherwise, write_json
from run_lib.sampling_loop import check_finite as check_samples
from run_lib.training import given_checkpoint, write_import

CHECKPOINTS = 16
COMPILED = ("_likelihood", "_draw")
OWN = ("seed", "data.dataset", "data.path", "data.context")  # fields that `fit` sets
logger = logging.getLogger("fokker")


class DensityModel(DensityMixin, BaseEstimator):
    """A diffusion model of p(x) or p(x | context), fitted by maximum likelihood.

    Real values of any shape have a residual MLP that gives a mixture of Gaussians for each
    standardised coordinate; uint8 images have a U-Net that gives the law of each grey level. A
    tenth of the examples is kept out of training. Of the start, which is the prior of the head, and
    sixteen checkpoints the one is taken that is best on them (`run_lib.best_checkpoint`). The same
    data and `random_state` give the same model.

    Args:
        config: a config to start from, as a file or as an object; None: by the kind of the data.
        changes: fields of the config by name, as {"training.n_iters": 2000}.
        workdir: the run folder; an interrupted `fit` goes on there. None: a temporary folder.
        random_state: the seed of everything that is drawn.
        verbose: `fit` writes its progress to the standard error.
    """

    def __init__(
        self,
        config: str | Path | ConfigDict | None = None,
        *,
        changes: Mapping[str, Any] | None = None,
        workdir: str | Path | None = None,
        random_state: int = 0,
        verbose: bool = True,
    ) -> None:
        self.config = config
        self.changes = changes
        self.workdir = workdir
        self.random_state = random_state
        self.verbose = verbose

    def fit(
        self,
        X: np.ndarray,
        y: None = None,
        *,
        context: np.ndarray | None = None,
        held_out: np.ndarray | None = None,
    ) -> "DensityModel":
        """Train on examples X [n, *d].

        Args:
            X: real values of any shape, or uint8 images [n, H, W] or [n, H, W, C].
            y: not used, with a warning; scikit-learn may pass it.
            context: what the density is conditioned on: classes, int [n], or numbers [n, *c].
            held_out: the numbers of the examples that are kept out of training to choose the
                checkpoint by; None: a tenth, drawn at random.

        Raises:
            ValueError: X or context holds what has no density, as NaN or a constant coordinate, a
                field of the config is wrong, or the folder holds a model of other data or settings.
        """
        if y is not None:
            warnings.warn("y is not used: fit p(y | x) by fit(y, context=x)", stacklevel=2)
        X = np.asarray(X)
        allowed = "at least two examples, [n, *d]; a single column is X[:, None]"
        require(X.ndim > 1 and len(X) > 1, "X", X.shape, allowed)
        for name, array in (("X", X), ("context", np.asarray(context))):
            if array.dtype.kind == "f":
                check_finite(name, array)
        check_seed(self.random_state, LARGEST_SEED)
        if held_out is None:
            held_out = parts(len(X), 1, self.random_state)[0]
        arrays = divided(X, context, np.asarray(held_out))
        workdir = folder_of(self, self.workdir)
        with alone(workdir):  # another fit at the same time would take its data for this one's
            return self._fit(X, arrays, workdir, conditional=context is not None)

    def _fit(
        self, X: np.ndarray, arrays: npz_files.Arrays, workdir: Path, *, conditional: bool
    ) -> "DensityModel":
        """Train in a folder on arrays that were divided."""
        path = workdir / "data.npz"
        unfinished = path.exists() and not (workdir / HELD_OUT_BOUNDS).exists()
        if unfinished and whole_steps(workdir) == [0]:  # it was refused, or made no step
            shutil.rmtree(workdir / "checkpoints")
        keep(path, arrays)
        config = self._config(X, workdir, conditional=conditional)
        experiment = Experiment.from_config(config)
        settings, kind = experiment.settings, experiment.settings.model.parameterization
        require(kind != "atoms", "model.parameterization", kind, "cells: atoms have no density")
        require(settings.eval.enable_bpd, "eval.enable_bpd", False, "True: log_prob needs it")
        for name in ("bound", "offset"):
            here = getattr(settings.eval, name)
            require(here, f"eval.{name}", here, "True: the bound chooses the checkpoint")
        others = trained_otherwise(workdir, settings.resolved(), with_seed=True)
        allowed = "the settings that the model in workdir was trained with, or a new folder"
        require(not others, "changes", "; ".join(others), allowed)
        if not whole_steps(workdir) and given_checkpoint(settings, workdir) is None:
            begin = experiment.train_state(experiment.with_prior(experiment.initial_parameters()))
            every = settings.training.snapshot_freq
            write_import(workdir, settings.resolved(), begin, every)
        with told() if self.verbose else contextlib.nullcontext():
            run_lib.train(experiment, workdir)
            step = best_step(workdir, experiment)
            logger.info("the checkpoint of step %d is chosen by the held-out examples", step)
        return self._of(experiment, workdir, step)

    def log_prob(
        self, X: np.ndarray, context: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """log p(x) of every example by the ODE, in nats, and an estimate of the solver's error.

        Of real values it is the density in the units of X, −inf outside their range; of images the
        probability of their grey levels, bounded from below by one draw of the noise within their
        cells.

        Args:
            X: examples [n, *d], as in `fit`.
            context: one for each example, as in `fit`.

        Returns:
            (log p, error), both float64 [n]; the errors are NaN where eval.num_steps is 0.

        Raises:
            ValueError: the shape or the kind of X or context is another than in `fit`.
            FloatingPointError: the solver gave no value for an example.
        """
        check_is_fitted(self)
        found = [self._batch(batch) for batch in self._batches(X, context, self._size())]
        values, errors = (
            np.concatenate(part).astype(np.float64) for part in zip(*found, strict=True)
        )
        bad = np.flatnonzero(np.isnan(values))
        if bad.size:
            raise FloatingPointError(
                f"no value for examples {bad[:10].tolist()}: raise eval.num_steps"
            )
        return values, errors

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
        """Draw samples [n_samples, *d], in the units and of the kind of X.

        Args:
            n_samples: how many.
            context: one for each sample, as in `fit`.
            random_state: the seed; sample i depends on it, on i and on its context only, up to the
                tolerance of the sampler.

        Raises:
            ValueError: a context is missing, or not as in `fit`.
            FloatingPointError: a sample is not finite.
        """
        check_is_fitted(self)
        require(n_samples >= 1, "n_samples", n_samples, "at least 1")
        key, size = jax.random.key(random_state), min(self._size(), n_samples)
        context = self.check_context(context, n_samples)
        found = []
        for first in range(0, n_samples, size):
            ids = np.minimum(np.arange(first, first + size), n_samples - 1)
            given = None if context is None else context[ids]
            x, decoded = self._draw(self.params_, key, ids, given)
            check_samples(np.asarray(x), ids)
            check_samples(np.asarray(decoded, np.float32), ids)
            found.append(np.asarray(decoded))
        return np.concatenate(found)[:n_samples].reshape(n_samples, *self.shape_)

    def calibration(
        self, X: np.ndarray, context: np.ndarray | None = None, n_samples: int = 100
    ) -> Calibration:
        """Place every example among samples of the model that have the same context.

        The level is the share of samples where the density is higher than at the example, and the
        rank of a coordinate the share that is smaller. Both are uniform in [0, 1] if the model is
        right; `figures()` of what is returned tests this. Each sample costs two ODEs.

        Args:
            X: real values [n, *d] that were not in `fit`.
            context: one for each example, as in `fit`.
            n_samples: of each example.

        Raises:
            ValueError: X are images, or a row lies outside the ends, or is not as in `fit`.
            FloatingPointError: a sample or a density is not finite.
        """
        check_is_fitted(self)
        experiment, params = self.experiment_, Parameters(self.params_)
        require(experiment.levels is None, "X", "images", "real values: levels are of a density")
        require(n_samples >= 1, "n_samples", n_samples, "at least 1")
        batches = self._batches(X, context, self._size())
        outside = np.flatnonzero(~self._inside(np.asarray(X, np.float32)))
        allowed = "rows between data.lower and data.upper"
        require(outside.size == 0, "X", f"rows {outside[:10].tolist()} outside", allowed)
        settings = experiment.settings
        asked = dataclasses.replace(settings.eval, calibrate=True, calibration_samples=n_samples)
        settings = dataclasses.replace(settings, eval=asked)
        experiment = Experiment(settings, experiment.dataset)
        estimator = with_contexts(experiment, estimators(experiment))[-1]
        function, key = jax.jit(estimator.function), experiment.keys[estimator.key]
        levels, ranks = [], []
        for batch in batches:
            mask = batch.pop("mask")
            found = function(params, jax.random.fold_in(key, 0), batch)
            if not np.all(found["converged"]):
                raise FloatingPointError(
                    "a sample or a density is not finite: raise eval.num_steps"
                )
            levels.append(np.asarray(found["value"])[mask])
            ranks.append(np.asarray(found["ranks"]).reshape(len(mask), -1)[mask])
        return Calibration(np.concatenate(levels), np.concatenate(ranks))

    def save(self, folder: str | Path) -> None:
        """Copy the run folder, with the chosen checkpoint and the data of `fit`.

        The config of the copy names these data, so that the command line evaluates this model:
        `main.py --workdir=FOLDER --mode=eval`.

        Raises:
            FileExistsError: the folder is there.
        """
        check_is_fitted(self)
        folder = Path(folder).absolute()
        others = {str(step) for step in whole_steps(self.workdir_)} - {str(self.step_)}

        def left_out(parent: str, names: list[str]) -> set[str]:
            here = Path(parent) == self.workdir_ / "checkpoints"
            return others & set(names) if here else set()

        shutil.copytree(self.workdir_, folder, ignore=left_out)
        config = json_files.read(folder / "config.json")
        config["data"]["path"] = str(folder / "data.npz")
        config["eval"].update(begin_ckpt=0, end_ckpt=0)  # the latest
        write_json(folder / "config.json", config)

    @classmethod
    def load(cls, folder: str | Path) -> "DensityModel":
        """The model of a folder that `save` or `fit` has written.

        Raises:
            ValueError: there is no such model, it is damaged, or its `fit` did not end.
        """
        folder = Path(folder).absolute()
        config = config_files.load(str(folder / "config.json"))
        allowed = "the folder of a fit that has ended: give the same fit again, and it goes on"
        require((folder / HELD_OUT_BOUNDS).exists(), "folder", str(folder), allowed)
        config.data.path = str(folder / "data.npz")
        experiment = Experiment.from_config(config)
        seed = experiment.settings.seed
        model = cls(config=config, workdir=folder, random_state=seed)
        return model._of(experiment, folder, best_step(folder, experiment))

    def at_step(self, step: int) -> "DensityModel":
        """Itself, with the parameters of another checkpoint of its folder.

        Raises:
            ValueError: there is no such checkpoint.
        """
        check_is_fitted(self)
        return self._of(self.experiment_, self.workdir_, step)

    def _of(self, experiment: Experiment, workdir: Path, step: int) -> "DensityModel":
        """Itself, with what is fitted."""
        params = loading.load_parameters(experiment, workdir, step)
        self.experiment_, self.workdir_, self.step_ = experiment, workdir, step
        self.params_ = params
        for name in COMPILED:  # of an earlier fit
            self.__dict__.pop(name, None)
        stored = npz_files.read(workdir / "data.npz", ("x_train",))["x_train"]
        self.shape_ = stored.shape[1:]
        return self

    def _config(self, X: np.ndarray, workdir: Path, *, conditional: bool) -> ConfigDict:
        """The config of the data, with the changes that were asked for."""
        config = self.config
        if config is None:
            config = of_images(X) if X.dtype == np.uint8 else of_reals(X)
        elif not isinstance(config, ConfigDict):
            config = config_files.load(str(config))
        config = config.copy_and_resolve_references()
        config.seed = int(self.random_state)
        config.data.update(dataset="npz", path=str(workdir / "data.npz"))
        config.data.context = "values" if conditional else ""
        config.training.snapshot_sampling = False
        changes, training = self.changes or {}, config.training
        for name, value in changes.items():
            require(name not in OWN, "changes", name, f"fields of a config, without {OWN}")
            config_files.change(config, name, str(plain(value)))
        every = max(training.n_iters // CHECKPOINTS // training.n_jitted_steps, 1)
        for name in ("snapshot_freq", "eval_freq", "snapshot_freq_for_preemption"):
            if f"training.{name}" not in changes:
                training[name] = every * training.n_jitted_steps
        return config

    @functools.cached_property
    def _likelihood(self) -> tuple[Estimator, Callable]:
        """The estimator of log p, and its function, which is compiled once for each size."""
        found = next(e for e in estimators(self.experiment_) if e.name == "ODE")
        return found, jax.jit(found.function)

    @functools.cached_property
    def _draw(self) -> Callable:
        """The function of (parameters, key, ids [b], contexts) → samples of the model, decoded."""
        experiment, model = self.experiment_, self.experiment_.sampled_model

        @jax.jit
        def draw(
            params: Any, key: jax.Array, ids: jax.Array, context: jax.Array | None
        ) -> tuple[jax.Array, jax.Array]:
            like = jnp.zeros((len(ids), *experiment.dataset.shape), jnp.float32)
            score_fn = model.score(params, context=context)
            x = experiment.sampler(score_fn, model.sde, fold_in_each(key, ids), like).x
            return x, experiment.encoding.decode(x)

        return draw

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: all but the compiled functions."""
        state = super().__getstate__()
        return {name: value for name, value in state.items() if name not in COMPILED}

    def _size(self) -> int:
        return self.experiment_.settings.eval.batch_size

    def _batches(self, X: np.ndarray, context: np.ndarray | None, size: int) -> list[dict]:
        """Batches of equal size; the last one is filled up."""
        X = np.asarray(X)
        allowed = f"[n, {', '.join(map(str, self.shape_))}], as in fit"
        require(X.shape[1:] == self.shape_ and len(X) > 0, "X", X.shape, allowed)
        levels = self.experiment_.dataset.levels
        fits = X.dtype == np.uint8 if levels else X.dtype != np.uint8 and X.dtype.kind in "iuf"
        require(fits, "X.dtype", X.dtype, "as in fit")
        check_finite("X", X)
        x = X.reshape(len(X), *self.experiment_.dataset.shape)
        x = x if levels else x.astype(np.float32)
        context, size = self.check_context(context, len(X)), min(size, len(X))
        found = []
        for first in range(0, len(x), size):
            ids = np.arange(first, first + size)
            there = np.minimum(ids, len(x) - 1)
            batch = {"image": x[there], "noise_id": there.astype(np.int32), "mask": ids < len(x)}
            found.append(batch if context is None else batch | {"context": context[there]})
        return found

    def _batch(self, batch: dict) -> tuple[np.ndarray, np.ndarray]:
        """(log p, error) in nats of the real examples of a batch."""
        estimator, function = self._likelihood
        key = jax.random.fold_in(self.experiment_.keys[estimator.key], 0)  # of the first repeat
        mask = batch.pop("mask")
        encoding, inside = self.experiment_.encoding, self._inside(batch["image"])
        if isinstance(encoding, Reals) and encoding.range is not None:
            batch["image"] = encoding.range.clip(jnp.asarray(batch["image"]))
        unit = batch["image"][0].size * np.log(2.0) if isinstance(encoding, Pixels) else 1.0
        result = function(Parameters(self.params_), key, batch)
        value = jnp.where(result["converged"], -unit * result["value"], jnp.nan)
        error = unit * result.get("error", jnp.full_like(value, jnp.nan))
        value, error = jnp.where(inside, value, -jnp.inf), jnp.where(inside, error, 0.0)
        return np.asarray(value)[mask], np.asarray(error)[mask]

    def _inside(self, X: np.ndarray) -> np.ndarray:
        """Say which examples lie between data.lower and data.upper, bool [n].

        Raises:
            ValueError: the cell of one of them reaches an end.
        """
        encoding = self.experiment_.encoding
        if not isinstance(encoding, Reals) or encoding.range is None:
            return np.full(len(X), True)
        x = X.reshape(len(X), *self.experiment_.dataset.shape)
        inside, whole = (
            np.asarray(found(x).reshape(len(x), -1).all(axis=1))
            for found in (encoding.range.holds, encoding.holds_cells)
        )
        reaching = np.flatnonzero(inside & ~whole)
        allowed = "values whose cells (data.cell_width) lie between data.lower and data.upper"
        require(reaching.size == 0, "X", x[reaching[:3]].tolist(), allowed)
        return inside

    def check_context(self, context: np.ndarray | None, number: int) -> np.ndarray | None:
        """The context of so many examples, as a batch holds it.

        Raises:
            ValueError: it is not as in `fit`, or not one for each example.
        """
        known = self.experiment_.context
        kind = "" if known is None else dataclasses.replace(known, mean=None).describe()
        allowed = kind or "None: the model was fitted without"
        require((known is None) == (context is None), "context", context, allowed)
        if known is None:
            return None
        given = np.asarray(context)
        if known.shape == (1,) and given.shape == (number,):
            given = given[:, None]
        allowed = f"{kind}, one for each of {number} examples"
        require(given.shape == (number, *known.shape), "context", given.shape, allowed)
        if known.classes:
            fits = given.dtype.kind in "iu" and 0 <= given.min() <= given.max() < known.classes
            require(fits, "context", given, f"classes 0 to {known.classes - 1}")
            return given.astype(np.int32)
        require(given.dtype.kind in "iuf", "context", given.dtype, "numbers, as in fit")
        check_finite("context", given)
        return self.experiment_.dataset.context.standardized(given).astype(np.float32)
