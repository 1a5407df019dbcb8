"""What an evaluation of p(x | c) estimates: beside it p(x), what c says of x, and the class of x.

    information    log p(x | c) − log p(x), of every example with its own context
    class          log p(c | x) = log p(x | c) + log π_c − logsumexp_k (log p(x | k) + log π_k)

π_c are the frequencies of the training split. All classes, and p(x), see the same dequantisation,
probes, times and noise, so that their errors cancel in differences.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from checks import require
from run_lib.estimators import Estimator
from run_lib.experiment import Experiment

LEAST = -1e30  # JSON has no infinity: a class that never occurs in training


def with_contexts(experiment: Experiment, table: list[Estimator]) -> list[Estimator]:
    """The estimators of an evaluation, for what the model is given; the same without a context.

    Where contexts are dropped in training, every estimator is also taken without them.

    Raises:
        ValueError: `eval.classify` is asked for and cannot be done.
    """
    classes = [_classification(experiment, table)] if experiment.settings.eval.classify else []
    if experiment.context is None:
        return table
    given = {"given": experiment.given_name}
    found = [dataclasses.replace(e, details=e.details | given) for e in table]
    if experiment.is_marginal:
        marginal = [_without_context(estimator) for estimator in table]
        pairs = [pair for pair in zip(found, marginal, strict=True) if pair[0].key == "eval"]
        found += [*marginal, *(_information(experiment, *pair) for pair in pairs)]
    return found + classes


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
