"""Estimate for every example its likelihood under each dequantisation, and the loss.

An estimator is a function of (parameters, key, batch) with the protocol that defines it. It is of
p(x | c) where the batch has contexts, otherwise of p(x). The noise
of an example depends on (seed, repeat, index) only, and all estimators of a dequantisation share
its draw.
"""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from checks import require
from dequantization import Draw, Encoding, Pixels, Reals
from elbo import ESTIMATORS
from heads import Atoms, Cells
from likelihood import (
    Bound,
    Divergence,
    cell_shares,
    discrete_bound,
    gaussian_decoder,
    importance_average,
    noised_start,
    ode_log_likelihood,
    variational_bound,
)
from operators import dimension, fold_in_all, fold_in_each
from real_heads import Mixture
from restarted import Restarted, noise_to_signal, time_of_noise
from run_lib.experiment import Experiment
from run_lib.settings import Settings
from time_sampling import Importance

# Fields of `training` that the value of the objective depends on.
OBJECTIVE_FIELDS = (
    "objective", "continuous", "smallest_time", "reduce_mean", "likelihood_weighting",
    "importance_weighting", "debias", "time_law", "score_matching_order", "second_order_weight",
    "frobenius_weight", "trace_weight", "third_order_weight", "third_order_form",
    "derivative_estimator", "num_probes", "alpha", "beta", "scalar_fp", "fp_wgt_type", "m",
    "fp_form", "fp_probes",
)  # fmt: skip
BINS = 16  # of the integral of a bound over log(σ/α), kept for every example
Details = dict[str, str | int | float]
logger = logging.getLogger("fokker")


class Parameters(NamedTuple):
    """The parameters of the score network, and of the dequantiser where there is one."""

    score: Any
    dequantizer: Any = None


@dataclasses.dataclass(frozen=True)
class Estimator:
    """A named value per example, with the protocol that defines it."""

    name: str
    details: Details  # of the protocol, by name
    unit: str
    key: str  # a name in Experiment.keys; likelihoods share their dequantisation noise
    # (parameters, key, batch with noise_id) → {value, nfe, converged, …}, each [B]
    function: Callable[[Any, jax.Array, dict], dict[str, jax.Array]]
    edges: tuple[float, ...] = ()  # of a bound: log(σ/α) at the ends of its bins
    # of parameters of its own, in place of the model's; called where a row is missing
    fit: Callable[[], Any] | None = None
    # two others: its rows are the values of the first minus those of the second, times `factor`
    difference_of: tuple["Estimator", "Estimator"] | None = None
    factor: float = 1.0

    @property
    def protocol(self) -> str:
        """The details as one line, a part of the key of every row."""
        return ", ".join(f"{name} {_text(value)}" for name, value in self.details.items())


def _text(value: str | float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclasses.dataclass(frozen=True)
class Dequantization:
    """The start of a likelihood: the law q(x | k) of x at time `start` (0: data), and its name."""

    details: Details
    draw: Callable[[Any, jax.Array, Key[Array, " b"]], Draw]  # (parameters, images, keys)
    start: float = 0.0


def dequantization(experiment: Experiment, kind: str, trained: str = "") -> Dequantization:
    """The law of the noise by its name in `eval.dequantization`.

    Args:
        experiment: settings and data.
        kind: uniform, variational or tn.
        trained: what the trained dequantiser is called in the protocol.

    Raises:
        ValueError: real-valued data need none; logit data have no truncated normal.
    """
    encoding, name = experiment.encoding, experiment.settings.data.dataset
    if isinstance(encoding, Reals):
        allowed = f"'uniform' for data.dataset={name!r}, which has real values"
        require(kind == "uniform", "eval.dequantization", kind, allowed)
        kind = "real-valued" + ", within ends" * (encoding.range is not None)
        kind += ", uniform noise in cells" * encoding.is_noisy
        return Dequantization({"data": kind}, lambda _, x, keys: encoding.draw(x, keys))
    found = experiment.evaluation_encoding
    if kind == "uniform":
        return Dequantization({"dequantisation": kind}, lambda _, x, keys: found.draw(x, keys))
    if kind == "variational":
        details: Details = {"dequantisation": kind, "dequantiser": trained}
        return Dequantization(details, experiment.dequantizer.draw)
    return _truncated_normal(experiment.settings, encoding)


def _truncated_normal(settings: Settings, pixels: Pixels) -> Dequantization:
    """Starts where half a cell is τ standard deviations of the noise, at t_min the earliest."""
    sde, tau = settings.sde, settings.eval.tn_tau
    time = time_of_noise(sde, jnp.asarray((pixels.half_cell / tau) ** 2))
    earliest = settings.training.smallest_time
    start = max(float(f"{float(time):.5g}"), earliest)  # the last digits depend on the machine
    if start == earliest:
        logger.info("eval.tn_tau=%g would start before t_min=%g: it starts there", tau, earliest)
    require(start < sde.T, "eval.tn_tau", tau, "a cell that the noise reaches before T")
    alpha, sigma = (float(c(jnp.asarray(start))) for c in (sde.alpha, sde.sigma))
    tau_at_start = round(alpha * pixels.half_cell / sigma, 3)
    details: Details = {"dequantisation": "tn", "tau": tau_at_start}
    jax.eval_shape(  # logit data are refused here
        lambda x, key: pixels.truncated_normal_draw(x, key[None], alpha, sigma),
        jax.ShapeDtypeStruct((1, 1), jnp.uint8), jax.random.key(0),
    )  # fmt: skip
    return Dequantization(
        details, lambda _, x, keys: pixels.truncated_normal_draw(x, keys, alpha, sigma), start
    )


def estimators(experiment: Experiment, dequantizer: str = "") -> list[Estimator]:
    """List the estimators that the config enables.

    Args:
        experiment: settings and data.
        dequantizer: what to call the trained dequantiser, where there is one.
    """
    settings, table = experiment.settings, []
    config = settings.eval
    for kind in _with_densities(experiment):
        noise = dequantization(experiment, kind, dequantizer)
        if config.enable_bpd:
            table.append(_ode(experiment, noise))
        if config.bound:
            table.append(_bound(experiment, noise))
        if config.elbo:
            table.append(_elbo(experiment, noise))
    if config.bound and isinstance(settings.head, Atoms):
        table.append(_discrete_bound(experiment, settings.head))
    if config.enable_bpd and experiment.dataset.law is not None and experiment.context is None:
        law = _law_of_the_data(experiment)
        table += [law, _divergence(table[0], law)]
    if config.enable_loss:
        table.append(_loss(experiment))
    return table


def _with_densities(experiment: Experiment) -> list[str]:
    """The laws of noise under which the model has a density.

    That of atoms is infinite at the levels and zero between them, where uniform noise lies.
    """
    kinds = experiment.settings.eval.dequantizations
    if not isinstance(experiment.settings.head, Atoms):
        return kinds
    if set(kinds) != {"tn"}:
        logger.info(
            "atoms have the discrete bound; for ODE and bound of their density set "
            "eval.dequantization=tn, noise of the diffusion itself"
        )
    return [kind for kind in kinds if kind == "tn"]


def _ode(experiment: Experiment, noise: Dequantization) -> Estimator:
    settings, model = experiment.settings, experiment.model
    encoding = experiment.evaluation_encoding
    t_min = noise.start or settings.training.smallest_time
    noised, number = starts_noised(settings) and not noise.start, settings.eval.num_importance
    if number > 1 and isinstance(encoding, Reals) and not (encoding.is_noisy or noised):
        raise ValueError(
            f"eval.num_importance={number} with real-valued data: there is no noise to draw; "
            "allowed: 1, or eval.ode_start='noised'"
        )

    def function(params: Parameters, key: jax.Array, batch: dict) -> dict[str, jax.Array]:
        keys, context = fold_in_each(key, batch["noise_id"]), batch.get("context")
        score_fn = model.score(params.score, context=context)
        own_decoder = model.decoder(params.score, context=context)

        def log_weight(k: jax.Array) -> tuple[jax.Array, tuple]:
            draw = noise.draw(params.dequantizer, batch["image"], draw_keys(keys, k))
            if noised:
                keys_start = fold_in_all(fold_in_all(keys, 4), k)
                decoder = own_decoder or gaussian_decoder(score_fn, model.sde)
                draw = noised_start(decoder, model.sde, draw, keys_start, t_min)
            # The probes are those of k = 0 for all: their error is then common to all weights,
            # and its exponential does not raise their mean.
            found = ode_log_likelihood(
                score_fn, model.sde, draw.x, fold_in_all(keys, 1),
                t_min=t_min, solver=experiment.solver, divergence=experiment.divergence,
            )  # fmt: skip
            return found.log_p - draw.log_q, (found.nfe, found.converged, found.error)

        value, (nfe, converged, error) = importance_average(log_weight, number)
        result = {
            "value": encoding.negative_log_likelihood(value, batch["image"]),
            "nfe": jnp.sum(nfe, axis=0),
            "converged": jnp.all(converged, axis=0) & jnp.isfinite(value),
        }
        if experiment.solver.estimates_error:
            worst = jnp.max(error, axis=0)
            result["error"] = encoding.negative_log_likelihood(-worst, batch["image"])
            result["converged"] &= jnp.isfinite(worst)
        return result

    details = _ode_details(experiment, t_min) | noise.details
    details |= {"start": "noised", **_decoder_name(settings)} if noised else {}
    details |= {"draws": number} if number > 1 else {}
    return Estimator("ODE", details, encoding.unit, "eval", function)


def ode_of_points(experiment: Experiment) -> Estimator:
    """The ODE at real values as they are, without noise in their cells."""
    continuous = dataclasses.replace(experiment.encoding, widths=None)
    return _ode(experiment, Dequantization({}, lambda _, x, keys: continuous.draw(x, keys)))


def starts_noised(settings: Settings) -> bool:
    """Say whether the ODE starts at x_{t_min}; by "auto" it does where the head has a decoder."""
    if settings.eval.ode_start == "auto":
        return isinstance(settings.head, Cells | Mixture)
    return settings.eval.ode_start == "noised"


def _decoder_name(settings: Settings) -> Details:
    """Name the decoder for the protocol, where the head has a decoder of its own."""
    known = isinstance(settings.head, Cells | Mixture)
    return {"decoder": settings.model.parameterization} if known else {}


def draw_keys(keys: jax.Array, k: jax.Array | int) -> jax.Array:
    """Keys of the k-th draw of dequantisation noise."""
    return fold_in_all(fold_in_all(keys, 0), k)


def _law_of_the_data(experiment: Experiment) -> Estimator:
    """−log q(x) under the known law of the data; its mean is the entropy, which no model beats."""
    law = experiment.dataset.law

    def function(params: Parameters, key: jax.Array, batch: dict) -> dict[str, jax.Array]:
        value = -law.log_data(batch["image"])
        return {
            "value": value,
            "nfe": jnp.zeros(value.shape, jnp.int32),
            "converged": jnp.isfinite(value),
        }

    unit = experiment.evaluation_encoding.unit
    return Estimator("law of the data", {"data": experiment.dataset.name}, unit, "eval", function)


def _divergence(model: Estimator, law: Estimator) -> Estimator:
    """log q(x) − log p(x), whose mean is the divergence of the model from the known law."""
    # What all such data have in common is left out, as in the rows of earlier versions.
    details = {name: value for name, value in model.details.items() if name != "data"}
    name = f"KL(data ‖ {model.name})"
    return dataclasses.replace(model, name=name, details=details, difference_of=(model, law))


def _ode_details(experiment: Experiment, t_min: float) -> Details:
    name = experiment.settings.sde.ode_variable.name
    variable: Details = {} if name == "t" else {"steps in the root of": name}
    trace_details: Details = {"trace": trace(experiment.divergence), "t_min": t_min}
    return experiment.solver.details | variable | trace_details


def _bound(experiment: Experiment, noise: Dequantization) -> Estimator:
    settings, model = experiment.settings, experiment.model
    encoding = experiment.evaluation_encoding
    config, t_min = settings.eval, settings.training.smallest_time
    number, offset = config.num_times, config.offset
    divergence = None if config.dsm else experiment.divergence
    sde = Restarted(model.sde, noise.start) if noise.start else model.sde
    proposal = Importance(sde, noise.start + t_min)
    edges = _edges(proposal, number)
    uniform = noise.details.get("dequantisation") == "uniform" and not settings.data.logit
    shares: np.ndarray | float = 0.0
    if isinstance(encoding, Pixels) and uniform:
        shares = cell_shares(np.asarray(edges), 2.0 * encoding.half_cell)

    def function(params: Parameters, key: jax.Array, batch: dict) -> dict[str, jax.Array]:
        keys = fold_in_each(key, batch["noise_id"])
        draw = noise.draw(params.dequantizer, batch["image"], draw_keys(keys, 0))
        context = batch.get("context")
        decoder = None if noise.start else model.decoder(params.score, context=context)
        bound = variational_bound(
            model.score(params.score, context=context), sde, draw.x, fold_in_all(keys, 2),
            proposal=proposal, num_times=number, divergence=divergence, decoder=decoder,
            offset=offset,
        )  # fmt: skip
        row = _bound_row(bound, draw.log_q, encoding, batch["image"], number + offset)
        return _without_cells(row, shares, encoding, batch["image"])

    form = {} if divergence is None else {"trace": trace(divergence)}
    details = {"stratified times": number, **form, "t_min": proposal.t_min, **noise.details}
    details |= _decoder_name(settings) if offset and not noise.start else {}
    name = "bound" if offset else "bound at t_min"
    return Estimator(name, details, encoding.unit, "eval", function, edges)


def _discrete_bound(experiment: Experiment, head: Atoms) -> Estimator:
    """The bound on −log P(k) of atoms, without dequantisation."""
    settings, model, encoding = experiment.settings, experiment.model, experiment.encoding
    number, t_min = settings.eval.num_times, settings.training.smallest_time
    proposal = Importance(model.sde, t_min)

    def function(params: Parameters, key: jax.Array, batch: dict) -> dict[str, jax.Array]:
        keys = fold_in_all(fold_in_each(key, batch["noise_id"]), 2)
        context = batch.get("context")
        bound = discrete_bound(
            model.score(params.score, context=context),
            model.log_probability(params.score, context=context), model.sde,
            encoding.encode(batch["image"], keys), keys, distance=head.width,
            proposal=proposal, num_times=number,
        )  # fmt: skip
        return _bound_row(bound, 0.0, encoding, batch["image"], number + 1)

    details: Details = {"stratified times": number, "t_min": t_min, "dequantisation": "none"}
    details |= {"decoder": "atoms"}
    edges = _edges(proposal, number)
    return Estimator("discrete bound", details, encoding.unit, "eval", function, edges)


def _bound_row(
    bound: Bound, log_q: jax.Array | float, encoding: Encoding, image: jax.Array, nfe: int
) -> dict[str, jax.Array]:
    """The value of a bound, and where it is spent: prior, decoder, and the integral in bins."""

    def in_unit(nats: jax.Array) -> jax.Array:
        return encoding.negative_log_likelihood(-nats, image)

    groups = _groups(len(bound.strata))
    bins = jnp.stack([in_unit(jnp.sum(bound.strata[g], axis=0)) for g in groups], axis=1)
    value = in_unit(bound.nll + log_q)
    return {
        "value": value,
        "nfe": jnp.full(value.shape, nfe),
        "converged": jnp.isfinite(value),
        "prior": in_unit(bound.prior),
        "decoder": in_unit(bound.start + log_q),
        "bins": bins,
        "largest": in_unit(bound.largest),
    }


def _without_cells(
    row: dict[str, jax.Array], shares: np.ndarray | float, encoding: Encoding, image: jax.Array
) -> dict[str, jax.Array]:
    """The row with what the noise in the cells costs taken from the bins, and from log q.

    The shares of all noise levels and of the decoder sum to −log q; so does what is left to the
    value, and says at which noise the levels become known.
    """
    nats = jnp.broadcast_to(dimension(image) * jnp.asarray(shares), row["bins"].shape)
    in_unit = jax.vmap(lambda x: encoding.negative_log_likelihood(-x, image), 1, 1)
    cells = in_unit(nats)
    return row | {"bins": row["bins"] - cells, "decoder": row["decoder"] + jnp.sum(cells, axis=1)}


def _groups(number: int) -> list[np.ndarray]:
    """The strata of a bound in at most so many bins, in order of time."""
    return np.array_split(np.arange(number), min(BINS, number))


def _edges(proposal: Importance, number: int) -> tuple[float, ...]:
    """log(σ/α) at the ends of the bins."""
    ends = [0, *(group[-1] + 1 for group in _groups(number))]
    ratio = noise_to_signal(proposal.sde, proposal.quantile(jnp.asarray(ends) / number))
    return tuple(float(f"{edge:.6g}") for edge in 0.5 * np.log(ratio))


def _elbo(experiment: Experiment, noise: Dequantization) -> Estimator:
    config, model = experiment.settings.eval, experiment.model
    encoding = experiment.evaluation_encoding
    name, number, divergence = config.elbo_estimator, config.num_times, experiment.divergence
    experiment.check_elbo()
    if noise.start:
        raise ValueError(
            "eval.elbo=True with eval.dequantization='tn': the ELBO starts at t = 0; use eval.bound"
        )

    def function(params: Parameters, key: jax.Array, batch: dict) -> dict[str, jax.Array]:
        keys = fold_in_each(key, batch["noise_id"])
        draw = noise.draw(params.dequantizer, batch["image"], draw_keys(keys, 0))
        log_p = ESTIMATORS[name](
            model.score(params.score, context=batch.get("context")), model.sde, draw.x,
            fold_in_all(keys, 3), num_times=number, divergence=divergence,
        )  # fmt: skip
        value = encoding.negative_log_likelihood(log_p - draw.log_q, batch["image"])
        nfe = jnp.full(value.shape, number)
        return {"value": value, "nfe": nfe, "converged": jnp.isfinite(value)}

    one = trace(dataclasses.replace(divergence, num_probes=1))
    times: dict[str, Details] = {
        "published": {"uniform times": number, "trace": one, "x_T": "one each"},
        "low_variance": {"stratified debiased times": number, "trace": trace(divergence)},
    }
    start = float(model.sde.sigma(jnp.zeros(())))
    details: Details = {"estimator": name, **times[name], "sigma(0)": start, **noise.details}
    return Estimator("-ELBO", details, encoding.unit, "eval", function)


def _loss(experiment: Experiment) -> Estimator:
    per_example = experiment.per_example_loss(train=False)

    def function(params: Parameters, key: jax.Array, batch: dict) -> dict[str, jax.Array]:
        value, _ = per_example(params.score, key, batch)
        return {"value": value, "nfe": jnp.ones(value.shape), "converged": jnp.isfinite(value)}

    fields = dataclasses.asdict(experiment.settings.training)
    details = {name: fields[name] for name in OBJECTIVE_FIELDS}
    return Estimator("loss", details, "", "eval_loss", function)


def trace(divergence: Divergence) -> str:
    """Say in words how the divergence is computed."""
    return "exact" if divergence.kind == "exact" else f"{divergence.num_probes} {divergence.kind}"
