"""Settings to objects: the score model, losses, samplers and estimators of a run."""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

import losses
import marginals
from checks import choose, in_section, require
from dequantization import Draw, Encoding, FlowDequantizer, Pixels, Reals
from fokker_planck import FokkerPlanck
from heads import Levels
from high_order import HighOrder
from likelihood import Divergence
from ode import Solver
from operators import fold_in_each
from parameterization import PARAMETERIZATIONS, TIME_LABELS, HeadModel, ScoreModel
from restarted import time_of_noise
from run_lib.settings import Settings
from sampling import OdeSampler, PredictorCorrector, ReverseSDE, Sampler
from streams import Dataset
from terms import Terms
from time_sampling import Importance
from train_state import TrainState, create

AXIS_NAME = "batch"
PRIOR_BATCH = 500
ENDLESS = 20_000  # examples that stand for an endless training split
logger = logging.getLogger("fokker")


def score_model(settings: Settings, *, on_levels: bool = False) -> ScoreModel:
    """Network, SDE, parameterisation and time label.

    `on_levels`: with training.continuous=False, the α and σ of the discrete chain, on which the
    network was trained and that the pc sampler walks; likelihoods are those of the SDE.
    """
    number, label = settings.model.num_scales, TIME_LABELS[settings.model.time_label]
    chain = on_levels and not settings.training.continuous
    sde = settings.sde.chain(number) if chain else settings.sde
    if settings.head is not None:
        return HeadModel(
            settings.network, sde, label=label, num_scales=number, head=settings.head
        )  # fmt: skip
    to_score = PARAMETERIZATIONS[settings.model.parameterization]
    return ScoreModel(settings.network, sde, to_score, label, number)


def training_examples(dataset: Dataset) -> Iterator[np.ndarray]:
    """Batches [b, *d] of the training split in order, unaugmented; of an endless one the start."""
    if dataset.size("train") is None:
        batches = dataset.train_batches(batch_size=PRIOR_BATCH, seed=0, first_step=0)
        batches = itertools.islice(batches, ENDLESS // PRIOR_BATCH)
    else:
        batches = dataset.eval_batches("train", batch_size=PRIOR_BATCH)
    yield from marginals.arrays(batches)


def train_state(settings: Settings, params: Any) -> TrainState:
    """The state of these parameters before the first step."""
    optimizer = settings.optim.chain(settings.training.n_iters)
    return create(params, optimizer, adaptive=settings.training.time_law == "adaptive")


def with_prior(settings: Settings, dataset: Dataset, params: Any) -> Any:
    """The parameters with what the head knows of the training data; published ones as they are."""
    head = settings.head
    if head is None:
        return params
    batches, name = training_examples(dataset), settings.model.parameterization
    if not isinstance(head, Levels):
        batches = _encoded(encoding(settings, dataset), batches)
    logger.info("the prior of model.parameterization=%r is taken from the training data", name)
    return params | {"prior": head.prior(dataset.shape, batches)}


def check_head(settings: Settings, dataset: Dataset) -> None:
    """Heads of integers need integers.

    Raises:
        ValueError: the data are real values.
    """
    fits = dataset.levels is not None or not isinstance(settings.head, Levels)
    allowed = "'mixture' or 'whitened' for real-valued data"
    require(fits, "model.parameterization", settings.model.parameterization, allowed)


def _encoded(found: Encoding, batches: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The batches in model space."""
    encode, first = jax.jit(found.encode), 0
    for batch in batches:
        keys = fold_in_each(jax.random.key(0), first + jnp.arange(len(batch)))
        yield np.asarray(encode(batch, keys))
        first += len(batch)


def encoding(settings: Settings, dataset: Dataset) -> Encoding:
    """Pixels for quantised data, Reals otherwise."""
    if dataset.levels is None:
        return Reals()
    data = settings.data
    return Pixels(
        dataset.levels,
        centered=data.centered,
        logit=data.logit,
        dequantize_uniformly=data.uniform_dequantization,
    )


def evaluation_encoding(settings: Settings, dataset: Dataset) -> Encoding:
    """The encoding of likelihoods: pixels are always dequantised, however training saw them.

    The density at noise-free pixels bounds nothing: it can be raised without limit.
    """
    found = encoding(settings, dataset)
    if isinstance(found, Pixels):
        return dataclasses.replace(found, dequantize_uniformly=True)
    return found


@dataclasses.dataclass(frozen=True)
class Dequantization:
    """How a likelihood starts: the law q(x | k) of x at time `start` (0: data), and its name."""

    details: dict[str, str | float]
    draw: Callable[[Any, jax.Array, Key[Array, " b"]], Draw]  # (parameters, images, keys)
    start: float = 0.0


def dequantization(
    settings: Settings, dataset: Dataset, kind: str, trained: str = ""
) -> Dequantization:
    """The law of the noise by its name in `eval.dequantization`; `trained` names the dequantiser.

    Raises:
        ValueError: real-valued data need none; logit data have no truncated normal.
    """
    found = evaluation_encoding(settings, dataset)
    if isinstance(found, Reals):
        allowed = f"'uniform' for data.dataset={settings.data.dataset!r}, which has real values"
        require(kind == "uniform", "eval.dequantization", kind, allowed)
        return Dequantization({"data": "real-valued"}, lambda _, x, keys: found.draw(x, keys))
    if kind == "uniform":
        return Dequantization({"dequantisation": kind}, lambda _, x, keys: found.draw(x, keys))
    if kind == "variational":
        details = {"dequantisation": kind, "dequantiser": trained}
        return Dequantization(details, dequantizer(settings, dataset).draw)
    return _truncated_normal(settings, encoding(settings, dataset))


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
    details = {"dequantisation": "tn", "tau": round(alpha * pixels.half_cell / sigma, 3)}
    jax.eval_shape(  # logit data are refused here
        lambda x, key: pixels.truncated_normal_draw(x, key[None], alpha, sigma),
        jax.ShapeDtypeStruct((1, 1), jnp.uint8), jax.random.key(0),
    )  # fmt: skip
    return Dequantization(
        details, lambda _, x, keys: pixels.truncated_normal_draw(x, keys, alpha, sigma), start
    )


def dequantizer(settings: Settings, dataset: Dataset) -> FlowDequantizer:
    """The variational dequantiser of the `deq` section.

    Raises:
        ValueError: the data are not images of quantised values.
    """
    found = evaluation_encoding(settings, dataset)
    if isinstance(found, Reals) or len(dataset.shape) != 3:
        raise ValueError(
            f"data.dataset={settings.data.dataset!r} has examples of shape {dataset.shape} and "
            f"{found.unit}: a variational dequantiser needs images"
        )
    return FlowDequantizer(settings.deq.flow, found)


def per_example_loss(settings: Settings, dataset: Dataset, *, train: bool) -> losses.PerExampleLoss:
    """The training objective, one value per example; times are independent unless training."""
    training = settings.training
    found = terms(settings)
    if not training.continuous and found.fokker_planck is not None:
        raise ValueError(
            "training.alpha, training.beta with training.continuous=False: the Fokker-Planck "
            "residual needs the derivative in time, which a network of discrete levels lacks"
        )
    if settings.model.time_label == "reverse_index" and found.fokker_planck is not None:
        raise ValueError(
            "training.alpha, training.beta with model.time_label='reverse_index': a label that is "
            "rounded has no derivative in time"
        )
    model = score_model(settings, on_levels=True)
    law = losses.time_law(
        model.sde,
        smallest_time=training.smallest_time,
        likelihood_weighting=training.likelihood_weighting,
        importance_weighting=training.importance_weighting,
        debias=training.debias,
        stratified=training.stratified and train,
        levels=0 if training.continuous else settings.model.num_scales,
        name=training.time_law,
    )
    return losses.score_matching(
        model,
        encoding(settings, dataset),
        law,
        found,
        batch_size=training.batch_size,
        train=train,
    )


def terms(settings: Settings) -> Terms:
    """The terms of the training objective."""
    training = settings.training
    return Terms(
        objective=training.objective,
        reduce_mean=training.reduce_mean,
        estimator=training.derivative_estimator,
        num_probes=training.num_probes,
        high_order=high_order(settings),
        fokker_planck=fokker_planck(settings),
    )


def high_order(settings: Settings) -> HighOrder | None:
    """Orders 2 and 3 of the training objective; None for order 1."""
    training = settings.training
    if training.score_matching_order == 1:
        return None
    return HighOrder(
        training.score_matching_order,
        second_order_weight=training.second_order_weight,
        frobenius_weight=training.frobenius_weight,
        trace_weight=training.trace_weight,
        third_order_weight=training.third_order_weight,
        third_order_form=training.third_order_form,
        fraction=training.high_order_fraction,
    )


def fokker_planck(settings: Settings) -> FokkerPlanck | None:
    """The regulariser; None where its weights switch all of it off."""
    training = settings.training
    found = FokkerPlanck(
        alpha=training.alpha,
        beta=training.beta,
        scalar_fp=training.scalar_fp,
        weight=training.fp_wgt_type,
        m=training.m,
        form=training.fp_form,
        num_probes=training.fp_probes,
        fraction=training.fp_fraction,
        every=training.fp_every,
    )
    return found if found.names else None


def _pc(settings: Settings, num_steps: int) -> Sampler:
    sampling = settings.sampling
    return PredictorCorrector(
        sampling.predictor,
        sampling.corrector,
        num_steps,
        sampling.smallest_time,
        snr=sampling.snr,
        n_steps_each=sampling.n_steps_each,
        probability_flow=sampling.probability_flow,
        noise_removal=sampling.noise_removal,
        axis_name=AXIS_NAME,
    )


def _sde(settings: Settings, num_steps: int) -> Sampler:
    sampling = settings.sampling
    return ReverseSDE(num_steps, sampling.smallest_time, sampling.lmbd, sampling.noise_removal)


def _ode(settings: Settings, num_steps: int) -> Sampler:
    del num_steps
    sampling = settings.sampling
    solver = Solver(sampling.solver, sampling.rtol, sampling.atol)
    return OdeSampler(solver, sampling.smallest_time, sampling.noise_removal)


METHODS: dict[str, Callable[[Settings, int], Sampler]] = {"pc": _pc, "sde": _sde, "ode": _ode}


@in_section("sampling")
def sampler(settings: Settings) -> Sampler:
    """The sampler of `sampling.method`."""
    return choose(METHODS, settings.sampling.method, "sampling.method")(
        settings, settings.model.num_scales
    )


@dataclasses.dataclass(frozen=True)
class LikelihoodTools:
    """How likelihoods are estimated."""

    solver: Solver
    divergence: Divergence
    proposal: Importance


@in_section("eval")
def likelihood_tools(settings: Settings) -> LikelihoodTools:
    """What the `eval` section asks for; the bound's times follow p(t) ∝ g²/σ²."""
    config = settings.eval
    solver = Solver(
        config.solver,
        config.rtol,
        config.atol,
        num_steps=config.num_steps,
        estimate_error=config.estimate_error,
    )
    return LikelihoodTools(
        solver,
        Divergence(config.divergence, config.num_probes),
        Importance(settings.sde, settings.training.smallest_time),
    )


def check_elbo(settings: Settings) -> None:
    """The ELBO starts at t = 0, where the score of the network must exist."""
    name = settings.model.parameterization
    at_zero = float(settings.sde.sigma(jnp.zeros(())))
    if at_zero == 0.0 and name not in ("drift", "score"):
        raise ValueError(
            f"eval.elbo=True with model.parameterization={name!r}: the score is divided by σ, "
            f"which is 0 at t = 0 for training.sde={settings.training.sde!r}; need 'drift' or "
            "'score', or eval.bound"
        )


def keys(settings: Settings) -> dict[str, Key[Array, ""]]:
    """The named keys of a run, all from `seed`."""
    names = ("init", "train", "held_out", "snapshot", "eval", "eval_loss", "samples",
             "diagnose", "trajectories", "forward", "dequantizer")  # fmt: skip
    return dict(
        zip(names, jax.random.split(jax.random.key(settings.seed), len(names)), strict=True)
    )
