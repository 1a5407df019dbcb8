"""The trivial baselines as estimators: what each is fitted on, and its value of an example.

They are fitted on the training split, in order and without augmentation, or on the first samples
of an endless one; read once for each that lacks a row, and not at all where none does.
"""

import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import baselines
import marginals
from dequantization import Encoding, Pixels
from models.conditioning import number_of_regressors, regressors
from operators import PerExample, fold_in_each
from run_lib.comparison import REGRESSION
from run_lib.estimators import Details, Estimator, draw_keys
from run_lib.experiment import Experiment
from run_lib.training_data import ENDLESS

logger = logging.getLogger("fokker")


def baseline_estimators(experiment: Experiment) -> list[Estimator]:
    """The baselines of these data, where likelihoods are evaluated that they can stand beside."""
    config, dataset = experiment.settings.eval, experiment.dataset
    if not config.baselines or not (config.enable_bpd or config.bound or config.elbo):
        return []
    full = math.prod(dataset.shape) <= marginals.MAX_COVARIANCE
    encoding = experiment.evaluation_encoding
    if isinstance(encoding, Pixels):
        levels = [_uniform(encoding), _histogram(experiment, encoding)]
        return [*levels, _gaussian_pixels(experiment, encoding, full)]
    kinds = (False, True) if full else (False,)
    regression = [_regression(experiment)] if number_of_regressors(experiment.context) else []
    return [_gaussian_reals(experiment, kind) for kind in kinds] + regression


def _fitted_on(experiment: Experiment) -> Details:
    return {"fitted on": experiment.dataset.size("train") or ENDLESS}


LogProbability = Callable[[Any, jax.Array, dict], PerExample]  # (fitted, key, batch), in nats


def _estimator(
    name: str, details: Details, encoding: Encoding, fit: Callable[[], Any], log_p: LogProbability
) -> Estimator:
    """An estimator with parameters of its own and no evaluation of the network."""

    def function(fitted: Any, key: jax.Array, batch: dict) -> dict[str, jax.Array]:
        value = encoding.negative_log_likelihood(log_p(fitted, key, batch), batch["image"])
        nfe = jnp.zeros(value.shape, jnp.int32)
        return {"value": value, "nfe": nfe, "converged": jnp.isfinite(value)}

    @functools.cache
    def once() -> Any:
        logger.info("%s (%s): fitting", name, ", ".join(f"{k} {v}" for k, v in details.items()))
        return fit()

    return Estimator(name, details, encoding.unit, "eval", function, fit=once)


def _uniform(encoding: Pixels) -> Estimator:
    def log_p(fitted: Any, key: jax.Array, batch: dict) -> PerExample:
        del fitted, key
        return baselines.log_uniform(batch["image"], encoding.levels)

    return _estimator("uniform", {"levels": encoding.levels}, encoding, tuple, log_p)


def _histogram(experiment: Experiment, encoding: Pixels) -> Estimator:
    shape, levels = experiment.dataset.shape, encoding.levels
    histogram = baselines.histograms_of(shape, levels)

    def fit() -> np.ndarray:
        return baselines.fit_histogram(experiment.training_examples(), shape, levels)

    def log_p(fitted: jax.Array, key: jax.Array, batch: dict) -> PerExample:
        del key
        return baselines.log_histogram(fitted, histogram, batch["image"])

    place = "every position" if marginals.by_position(shape, levels) else "every channel"
    details: Details = {"of": place, "smoothing": marginals.SMOOTHING, **_fitted_on(experiment)}
    return _estimator("histogram", details, encoding, fit, log_p)


def _gaussian_name(full: bool) -> str:
    return "Gaussian" if full else "diagonal Gaussian"


def _gaussian_pixels(experiment: Experiment, encoding: Pixels, full: bool) -> Estimator:
    batches = experiment.training_examples
    means, variances = encoding.moments_of_cells()

    def fit() -> baselines.Gaussian:
        found = marginals.moments((means[k] for k in batches()), full=full)
        noise = np.full(found.mean.shape, variances[0])
        if encoding.logit:  # no two cells have the same
            noise = marginals.moments((variances[k] for k in batches()), full=False).mean
        return baselines.fit_pixels(found, noise, experiment.dataset.shape)

    def log_p(fitted: baselines.Gaussian, key: jax.Array, batch: dict) -> PerExample:
        keys = draw_keys(fold_in_each(key, batch["noise_id"]), 0)
        draw = encoding.draw(batch["image"], keys)  # that of the ODE under uniform noise
        return baselines.log_gaussian(fitted, draw.x) - draw.log_q

    details = _gaussian_details(experiment, full, "pooled variance") | {"dequantisation": "uniform"}
    return _estimator(_gaussian_name(full), details, encoding, fit, log_p)


def _gaussian_reals(experiment: Experiment, full: bool) -> Estimator:
    """Fitted in model space: a Gaussian of the data, or of their logits and logarithms."""
    encoding = experiment.evaluation_encoding

    def fit() -> baselines.Gaussian:
        found = marginals.moments((x for x, _ in experiment.encoded_pairs()), full=full)
        return baselines.fit_reals(found, experiment.dataset.shape)

    def log_p(fitted: baselines.Gaussian, key: jax.Array, batch: dict) -> PerExample:
        keys = draw_keys(fold_in_each(key, batch["noise_id"]), 0)
        draw = encoding.draw(batch["image"], keys)  # that of the ODE
        return baselines.log_gaussian(fitted, draw.x) - draw.log_q

    details = _gaussian_details(experiment, full, "diagonal")
    return _estimator(_gaussian_name(full), details, encoding, fit, log_p)


def _regression(experiment: Experiment) -> Estimator:
    """x given c is Gaussian around the ridge regression of x on c: the least for p(x | c)."""
    encoding, kind = experiment.evaluation_encoding, experiment.context
    shape = experiment.dataset.shape
    full = math.prod(shape) <= marginals.MAX_COVARIANCE

    def fit() -> tuple[baselines.Gaussian, np.ndarray]:
        slope = marginals.slope(experiment.encoded_pairs())
        slope = slope.reshape(-1, *shape)
        residuals = (x - np.tensordot(c, slope, axes=1) for x, c in experiment.encoded_pairs())
        return baselines.fit_reals(marginals.moments(residuals, full=full), shape), slope

    def log_p(fitted: Any, key: jax.Array, batch: dict) -> PerExample:
        gaussian, slope = fitted
        keys = draw_keys(fold_in_each(key, batch["noise_id"]), 0)
        draw = encoding.draw(batch["image"], keys)  # that of the ODE
        known = regressors(kind, batch["context"], draw.x)
        mean = jnp.tensordot(known, slope, axes=1, precision=jax.lax.Precision.HIGHEST)
        return baselines.log_gaussian(gaussian, draw.x - mean) - draw.log_q

    details = _gaussian_details(experiment, full, "diagonal")
    given: Details = {"given": experiment.given_name}
    return _estimator(REGRESSION, details | given, encoding, fit, log_p)


def _gaussian_details(experiment: Experiment, full: bool, target: str) -> Details:
    kind = {"covariance": "full" if full else "diagonal"}
    shrinkage = {"shrinkage": f"{marginals.SMOOTHING:g} examples of the {target}"}
    return kind | shrinkage | _fitted_on(experiment)
