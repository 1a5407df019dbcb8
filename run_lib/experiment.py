"""One experiment: everything that a config and its data give, built once and used by all modes."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key
from ml_collections import ConfigDict

import datasets
import losses
from checks import choose, in_section, require
from dequantization import Encoding, FlowDequantizer, Pixels, Reals
from fokker_planck import FokkerPlanck
from heads import Levels
from high_order import HighOrder
from likelihood import Divergence
from models import MODELS
from ode import Solver
from parameterization import PARAMETERIZATIONS, TIME_LABELS, HeadModel, ScoreModel
from point_samplers import SAMPLERS
from run_lib import training_data
from run_lib.devices import AXIS_NAME
from run_lib.sections import SamplingConfig, TrainingConfig
from run_lib.settings import Settings
from sampling import OdeSampler, PredictorCorrector, ReverseSDE, Sampler
from streams import Context, Dataset
from terms import Terms
from time_sampling import Importance
from train_state import TrainState, create

KEYS = ("init", "train", "held_out", "snapshot", "eval", "eval_loss", "samples", "diagnose",
        "trajectories", "forward", "dequantizer")  # fmt: skip
logger = logging.getLogger("fokker")


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
    """The settings of a config and all objects that follow from them.

    What costs time, as the data set, is made when it is first asked for, and then kept.
    """

    settings: Settings
    given: Dataset | None = None  # takes the place of the data set that the settings name

    @classmethod
    def from_config(cls, config: ConfigDict) -> "Experiment":
        """The experiment of a config.

        Raises:
            ValueError: a field is unknown, unused, missing or has a value that is not allowed.
        """
        return cls(Settings.from_config(config))

    @functools.cached_property
    def dataset(self) -> Dataset:
        """Return the data set: the given one, else that of the `data` section.

        Raises:
            ValueError: they are absent or do not fit the `data` section.
        """
        return self.given or datasets.load(self.settings.data)

    @property
    def _told(self) -> bool:
        """Say whether the config tells what an example is, before the data are read."""
        data = self.settings.data
        is_image = data.dataset.lower() not in SAMPLERS
        return bool(data.image_size) and is_image and self.given is None

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of one example; read the data only where the config does not tell it."""
        data = self.settings.data
        size = (data.image_size, data.image_size, data.num_channels)
        return size if self._told else self.dataset.shape

    @property
    def levels(self) -> int | None:
        """The number of grey levels, None of real values; the data are read only as for `shape`."""
        return self.settings.data.levels if self._told else self.dataset.levels

    @functools.cached_property
    def context(self) -> Context | None:
        """Say what the model is conditioned on; None stands for nothing.

        Raises:
            ValueError: the network takes no context, or there is none to drop.
        """
        settings = self.settings
        unasked = self._told and not settings.data.context
        found = None if unasked else self.dataset.context
        able = sorted(name for name, network in MODELS.items() if hasattr(network, "context"))
        fits = found is None or settings.model.name in able
        allowed = f"one of {able}: the data have a context, {found and found.describe()}"
        require(fits, "model.name", settings.model.name, allowed)
        dropout, allowed = settings.training.context_dropout, "0 without a context (data.context)"
        require(found is not None or dropout == 0.0, "training.context_dropout", dropout, allowed)
        return found

    @property
    def is_marginal(self) -> bool:
        """Say whether the model gives p(x), alone or beside p(x | c)."""
        return self.context is None or self.settings.training.context_dropout > 0.0

    @property
    def given_name(self) -> str:
        """Say in one word what p(x | c) is given; '' for p(x)."""
        if self.context is None:
            return ""
        return "class" if self.context.classes else self.settings.data.context or "values"

    @functools.cached_property
    def keys(self) -> dict[str, Key[Array, ""]]:
        """The named keys of a run, all from `seed`."""
        split = jax.random.split(jax.random.key(self.settings.seed), len(KEYS))
        return dict(zip(KEYS, split, strict=True))

    # The score model.

    @functools.cached_property
    def model(self) -> ScoreModel:
        """Network, SDE, parameterisation and time label: the model of all likelihoods."""
        settings, network = self.settings, self.settings.network
        if self.context is not None:
            network = network.clone(context=self.context)
        number, label = settings.model.num_scales, TIME_LABELS[settings.model.time_label]
        if settings.head is not None:
            return HeadModel(
                network, settings.sde, label=label, num_scales=number, head=settings.head
            )
        to_score = PARAMETERIZATIONS[settings.model.parameterization]
        return ScoreModel(network, settings.sde, to_score, label, number)

    @functools.cached_property
    def chain_model(self) -> ScoreModel:
        """The model that is trained and that the pc sampler walks.

        With training.continuous=False it has the α and σ of the discrete chain, otherwise those of
        the SDE.
        """
        if self.settings.training.continuous:
            return self.model
        sde = self.settings.sde.chain(self.settings.model.num_scales)
        return dataclasses.replace(self.model, sde=sde)

    def initial_parameters(self) -> Any:
        """The parameters before training, of a head before it has seen data."""
        return self.model.init(self.keys["init"], self.dataset.shape)

    def with_prior(self, params: Any) -> Any:
        """The parameters with what the head knows of the training data, if there is a head."""
        self.check_head()
        model, shape = self.model, self.dataset.shape
        if not isinstance(model, HeadModel):
            return params
        name = self.settings.model.parameterization
        logger.info("the head %s starts from the laws of single coordinates in training", name)
        if isinstance(model.head, Levels):
            return params | {"prior": model.head.prior(shape, self.training_examples())}
        found = model.prior_of_reals(shape, self.encoded_pairs, is_marginal=self.is_marginal)
        return params | {"prior": found}

    def train_state(self, params: Any) -> TrainState:
        """The state of these parameters before the first step."""
        training = self.settings.training
        optimizer = self.settings.optim.chain(training.n_iters)
        return create(params, optimizer, adaptive=training.time_law == "adaptive")

    @functools.cached_property
    def state_like(self) -> TrainState:
        """Return the shapes and dtypes of the state."""
        return jax.eval_shape(
            lambda: self.train_state(self.model.init(jax.random.key(0), self.shape))
        )

    # The data.

    def training_examples(self) -> Iterator[np.ndarray]:
        """Batches [b, *d] of the training split, unaugmented; of an endless one the start."""
        return training_data.examples(self.dataset)

    def encoded_pairs(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The same in model space, with noise in their cells, and the numbers of their contexts."""
        return training_data.encoded_pairs(self.dataset, self.encoding, self.context)

    def statistics(self) -> dict[str, np.ndarray]:
        """Return what standardises data and context, by name; it is empty where nothing does.

        A, A⁻¹ and m are `matrix`, `inverse` and `mean` [*d]; beside them are `columns`,
        `cell_widths`, `lower` and `upper`, and of a context `context_mean`, `context_scale` and
        `context_names`.
        """
        context, encoding = self.dataset.context, self.encoding
        found: dict[str, Any] = {"columns": self.dataset.columns}
        if isinstance(encoding, Reals):
            found["cell_widths"] = encoding.widths
            if encoding.range is not None:
                found |= {"lower": encoding.range.lower, "upper": encoding.range.upper}
            affine = encoding.affine
            if affine is not None:
                found |= {"mean": affine.mean, "matrix": affine.matrix, "inverse": affine.inverse}
        if context is not None:
            found |= {f"context_{n}": getattr(context, n) for n in ("mean", "scale", "names")}
        return {n: np.asarray(v) for n, v in found.items() if v is not None and len(v)}

    @property
    def is_standardized(self) -> bool:
        """Say whether data or context are standardised: figures then depend on the training split.

        They depend on its examples beyond the parameters of the network.
        """
        return not {"mean", "context_mean"}.isdisjoint(self.statistics())

    @functools.cached_property
    def encoding(self) -> Encoding:
        """Pixels for quantised data; Reals otherwise, standardised by the training split."""
        data = self.settings.data
        if self.levels is None:
            return training_data.encoding_of_reals(data, self.dataset)
        return Pixels(
            self.levels,
            centered=data.centered,
            logit=data.logit,
            dequantize_uniformly=data.uniform_dequantization,
        )

    @functools.cached_property
    def evaluation_encoding(self) -> Encoding:
        """The encoding of likelihoods: pixels are always dequantised, however training saw them.

        The density at noise-free pixels bounds nothing: it can be raised without limit.
        """
        if isinstance(self.encoding, Pixels):
            return dataclasses.replace(self.encoding, dequantize_uniformly=True)
        return self.encoding

    @functools.cached_property
    def dequantizer(self) -> FlowDequantizer:
        """The variational dequantiser of the `deq` section.

        Raises:
            ValueError: the data are not images of quantised values.
        """
        found, shape = self.evaluation_encoding, self.dataset.shape
        if isinstance(found, Reals) or len(shape) != 3:
            raise ValueError(
                f"data.dataset={self.settings.data.dataset!r} has examples of shape {shape} and "
                f"{found.unit}: a variational dequantiser needs images"
            )
        return FlowDequantizer(self.settings.deq.flow, found)

    # Training, sampling, likelihoods.

    @functools.cached_property
    def terms(self) -> Terms:
        """The terms of the training objective.

        Raises:
            ValueError: the regulariser needs a derivative in time that the network lacks.
        """
        training, label = self.settings.training, self.settings.model.time_label
        regulariser = _fokker_planck(training)
        if not training.continuous and regulariser is not None:
            raise ValueError(
                "training.alpha, training.beta with training.continuous=False: the Fokker-Planck "
                "residual needs the derivative in time, which a network of discrete levels lacks"
            )
        if label == "reverse_index" and regulariser is not None:
            raise ValueError(
                "training.alpha, training.beta with model.time_label='reverse_index': a label that "
                "is rounded has no derivative in time"
            )
        return Terms(
            objective=training.objective,
            reduce_mean=training.reduce_mean,
            estimator=training.derivative_estimator,
            num_probes=training.num_probes,
            high_order=_high_order(training),
            fokker_planck=regulariser,
        )

    def per_example_loss(self, *, train: bool) -> losses.PerExampleLoss:
        """The training objective, one value per example; times are independent unless training."""
        training = self.settings.training
        law = losses.time_law(
            self.chain_model.sde,
            smallest_time=training.smallest_time,
            likelihood_weighting=training.likelihood_weighting,
            importance_weighting=training.importance_weighting,
            debias=training.debias,
            stratified=training.stratified and train,
            levels=0 if training.continuous else self.settings.model.num_scales,
            name=training.time_law,
        )
        return losses.score_matching(
            self.chain_model,
            self.encoding,
            law,
            self.terms,
            batch_size=training.batch_size,
            train=train,
            context_dropout=training.context_dropout,
        )

    @functools.cached_property
    @in_section("sampling")
    def sampler(self) -> Sampler:
        """The sampler of `sampling.method`."""
        sampling = self.settings.sampling
        method = choose(METHODS, sampling.method, "sampling.method")
        return method(sampling, self.settings.model.num_scales)

    @property
    def sampled_model(self) -> ScoreModel:
        """The model that the sampler draws from."""
        return self.chain_model if self.settings.sampling.method == "pc" else self.model

    @functools.cached_property
    @in_section("eval")
    def solver(self) -> Solver:
        """The solver of the probability-flow ODE of likelihoods."""
        config = self.settings.eval
        return Solver(
            config.solver,
            config.rtol,
            config.atol,
            num_steps=config.num_steps,
            estimate_error=config.estimate_error,
        )

    @functools.cached_property
    @in_section("eval")
    def divergence(self) -> Divergence:
        """Return the way in which likelihoods compute the divergence of the vector field."""
        return Divergence(self.settings.eval.divergence, self.settings.eval.num_probes)

    @functools.cached_property
    def proposal(self) -> Importance:
        """The times of a bound: p(t) ∝ g²/σ²."""
        return Importance(self.settings.sde, self.settings.training.smallest_time)

    def check_head(self) -> None:
        """Heads of integers need integers.

        Raises:
            ValueError: the data are real values.
        """
        fits = self.dataset.levels is not None or not isinstance(self.settings.head, Levels)
        allowed = "'mixture' or 'whitened' for real-valued data"
        require(fits, "model.parameterization", self.settings.model.parameterization, allowed)

    def check_elbo(self) -> None:
        """The ELBO starts at t = 0, where the score of the network must exist.

        Raises:
            ValueError: there it is divided by σ = 0.
        """
        name, sde = self.settings.model.parameterization, self.settings.training.sde
        at_zero = float(self.settings.sde.sigma(jnp.zeros(())))
        if at_zero == 0.0 and name not in ("drift", "score"):
            raise ValueError(
                f"eval.elbo=True with model.parameterization={name!r}: the score is divided by σ, "
                f"which is 0 at t = 0 for training.sde={sde!r}; need 'drift' or 'score', or "
                "eval.bound"
            )


def _high_order(training: TrainingConfig) -> HighOrder | None:
    """Orders 2 and 3 of the training objective; None for order 1."""
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


def _fokker_planck(training: TrainingConfig) -> FokkerPlanck | None:
    """The regulariser; None where its weights switch all of it off."""
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


def _pc(sampling: SamplingConfig, num_steps: int) -> Sampler:
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


def _sde(sampling: SamplingConfig, num_steps: int) -> Sampler:
    return ReverseSDE(num_steps, sampling.smallest_time, sampling.lmbd, sampling.noise_removal)


def _ode(sampling: SamplingConfig, num_steps: int) -> Sampler:
    del num_steps
    solver = Solver(sampling.solver, sampling.rtol, sampling.atol)
    return OdeSampler(solver, sampling.smallest_time, sampling.noise_removal)


METHODS: dict[str, Callable[[SamplingConfig, int], Sampler]] = {"pc": _pc, "sde": _sde, "ode": _ode}
