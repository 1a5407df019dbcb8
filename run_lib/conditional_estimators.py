"""Estimate beside p(x | c) also p(x), what c says of x, the class of x, and the calibration.

    information    log p(x | c) − log p(x), of every example with its own context
    class          log p(c | x) = log p(x | c) + log π_c − logsumexp_k (log p(x | k) + log π_k)
    calibration    the place of x among samples x_1, …, x_L of q(· | c), in [0, 1]

π_c are the frequencies of the training split. All classes, and p(x), see the same dequantisation,
probes, times and noise, so that their errors cancel in differences. For the calibration u is
uniform in [0, 1]; of each coordinate j there is the same for x_j, its rank:

    level = (#{k: q(x_k | c) > q(x | c)} + u)/(L + 1)
    rank_j = (#{k: x_kj < x_j} + u_j)/(L + 1)

Both are uniform in [0, 1] if q = p: then x is one more sample of q.
Reference: Talts et al. 2018, https://arxiv.org/abs/1804.06788 (ranks); Hyndman 1996,
https://doi.org/10.1080/00031305.1996.10474359 (regions of highest density).
"""

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from checks import require
from dequantization import Reals
from operators import fold_in_all, fold_in_each
from run_lib.estimators import Details, Estimator, Parameters, ode_of_points, starts_noised
from run_lib.experiment import Experiment
from sampling import OdeSampler

LEAST = -1e30  # JSON has no infinity: a class that never occurs in training


def with_contexts(experiment: Experiment, table: list[Estimator]) -> list[Estimator]:
    """The estimators of an evaluation, for what the model is given; the same without a context.

    Where contexts are dropped in training, every estimator is also taken without them.

    Raises:
        ValueError: `eval.classify` or `eval.calibrate` is asked for and cannot be done.
    """
    config = experiment.settings.eval
    more = [_classification(experiment, table)] if config.classify else []
    more += [_calibration(experiment, table)] if config.calibrate else []
    if experiment.context is None:
        return table + more
    given: Details = {"given": experiment.given_name}
    found = [dataclasses.replace(e, details=e.details | given) for e in table]
    if experiment.is_marginal:
        marginal = [_without_context(estimator) for estimator in table]
        pairs = [pair for pair in zip(found, marginal, strict=True) if pair[0].key == "eval"]
        found += [*marginal, *(_information(experiment, *pair) for pair in pairs)]
    return found + more


def _without_context(estimator: Estimator) -> Estimator:
    """The same of p(x): the score finds no context in the batch."""

    def function(params: tuple, key: jax.Array, batch: dict) -> dict[str, jax.Array]:
        left = {name: leaf for name, leaf in batch.items() if name != "context"}
        return estimator.function(params, key, left)

    name = f"{estimator.name} unconditional"
    return dataclasses.replace(estimator, name=name, function=function)


def _information(experiment: Experiment, given: Estimator, marginal: Estimator) -> Estimator:
    """log p(x | c) − log p(x) in bits or nats, not per dimension: −log p(x) minus −log p(x | c)."""
    per_dimension = given.unit == "bits/dim"
    return dataclasses.replace(
        given,
        name=f"{given.name} information",
        unit="bits" if per_dimension else given.unit,
        edges=(),
        difference_of=(marginal, given),
        factor=float(np.prod(experiment.dataset.shape)) if per_dimension else 1.0,
    )


def log_frequencies(experiment: Experiment) -> Float[Array, " n"]:
    """log π_c of every class in the training split.

    Raises:
        FieldError: a class of the evaluated split never occurs in it.
    """
    dataset, split = experiment.dataset, experiment.settings.eval.dataset
    number = experiment.context.classes
    counts, there = (
        np.bincount(dataset.contexts(name, np.arange(dataset.size(name))), minlength=number)
        for name in ("train", split)
    )
    lost = np.flatnonzero((counts == 0) & (there > 0)).tolist()
    allowed = f"False: the classes {lost} of the split {split} never occur in training"
    require(not lost, "eval.classify", True, allowed)
    with np.errstate(divide="ignore"):  # a class that no split has
        return jnp.asarray(np.log(counts / counts.sum()), jnp.float32)


def _classification(experiment: Experiment, table: list[Estimator]) -> Estimator:
    """−log p(c | x) of the true class in nats, by the first likelihood of the table."""
    known = experiment.context is not None and experiment.context.classes > 0
    require(known, "eval.classify", True, "False, or data.context='class'")
    likelihoods = [estimator for estimator in table if estimator.key == "eval"]
    allowed = "False, or eval.enable_bpd=True or eval.bound=True: Bayes' rule needs a likelihood"
    require(len(likelihoods) > 0, "eval.classify", True, allowed)
    of, log_pi = likelihoods[0], log_frequencies(experiment)
    encoding = experiment.evaluation_encoding

    def function(params: tuple, key: jax.Array, batch: dict) -> dict[str, jax.Array]:
        truth = batch["context"]

        def given(number: jax.Array) -> tuple[jax.Array, ...]:
            found = of.function(params, key, batch | {"context": jnp.full_like(truth, number)})
            return found["value"], found["nfe"], found["converged"]

        values, nfe, converged = jax.lax.map(given, jnp.arange(len(log_pi), dtype=truth.dtype))
        nat = encoding.negative_log_likelihood(jnp.ones_like(values[0]), batch["image"])
        log_p = (values / nat[None]).T
        log_posterior = jax.nn.log_softmax(log_p + log_pi.astype(log_p.dtype)[None], axis=1)
        value = -jnp.take_along_axis(log_posterior, truth[:, None], axis=1)[:, 0]
        return {
            "value": value,
            "nfe": jnp.sum(nfe, axis=0),
            "converged": jnp.all(converged, axis=0) & jnp.isfinite(value),
            "class": truth,
            "log_likelihoods": log_p,
            "log_posterior": jnp.maximum(log_posterior, LEAST),
        }

    size = experiment.dataset.size("train")
    details = of.details | {"classes": len(log_pi), "frequencies of": f"{size} training examples"}
    return Estimator(f"class by {of.name}", details, "nats", of.key, function)


def _calibration(experiment: Experiment, table: list[Estimator]) -> Estimator:
    """The level of x and the ranks of its coordinates, by samples and density of the ODE.

    Where the values are known to lie in cells, x is drawn in its cell, once for all of these.
    """
    settings, encoding = experiment.settings, experiment.encoding
    found = [estimator for estimator in table if estimator.name == "ODE"]
    allowed = "False, or eval.enable_bpd=True and real-valued data: levels are of a density"
    fits = bool(found) and isinstance(encoding, Reals)
    require(fits, "eval.calibrate", True, allowed)
    reals = cast(Reals, encoding)
    of, number = ode_of_points(experiment), settings.eval.calibration_samples
    t_min, model = settings.training.smallest_time, experiment.model
    sampler = OdeSampler(experiment.solver, t_min, noise_removal=starts_noised(settings))

    def function(params: Parameters, key: jax.Array, batch: dict) -> dict[str, jax.Array]:
        keys = fold_in_each(key, batch["noise_id"])
        score_fn = model.score(params.score, context=batch.get("context"))
        x = reals.in_cells(batch["image"], fold_in_all(keys, 8))
        truth = of.function(params, key, batch | {"image": x})

        def drawn(k: jax.Array) -> tuple[jax.Array, ...]:
            each = fold_in_all(fold_in_all(keys, 5), k)
            sample = reals.decode(sampler(score_fn, model.sde, each, jnp.zeros_like(x)).x)
            likeness = of.function(
                params, jax.random.fold_in(key, k + 1), batch | {"image": sample}
            )
            denser = likeness["value"] < truth["value"]
            return denser, sample < x, likeness["nfe"], likeness["converged"]

        denser, below, nfe, converged = jax.lax.map(drawn, jnp.arange(number))

        return {
            "value": _place(denser, fold_in_all(keys, 6)),
            "nfe": truth["nfe"] + jnp.sum(nfe, axis=0),
            "converged": truth["converged"] & jnp.all(converged, axis=0),
            "ranks": _place(below, fold_in_all(keys, 7)),
        }

    given = {} if experiment.context is None else {"given": experiment.given_name}
    cells = {"drawn": "within cells"} if reals.is_noisy else {}
    details = found[0].details | given | {"samples": number} | cells
    return Estimator(f"calibration by {of.name}", details, "", of.key, function)


def _place(is_before: Bool[Array, "n b *d"], keys: Key[Array, " b"]) -> Float[Array, "b *d"]:
    """(the number of samples that come before + u)/(n + 1), u uniform from the example's key."""
    number, shape = len(is_before), is_before.shape[2:]
    u = jax.vmap(lambda key: jax.random.uniform(key, shape))(keys)
    return (jnp.sum(is_before, axis=0, dtype=u.dtype) + u) / (number + 1)
