"""The sections of a config as frozen dataclasses; an unknown field is an error that names it.

A ConfigDict stops here. `model` is open: its fields belong to the network, the SDE or to
ModelConfig, and None means "the default of the class that has the field".
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ml_collections import ConfigDict

import elbo
import models
import sde_lib
from checks import FieldError, in_section, nearest, of_type, one_of, positive, rate, require
from datasets import DataConfig
from dequantization import Pixels
from models.flowpp import Flowpp
from parameterization import HEADS, PARAMETERIZATIONS, TIME_LABELS, Head
from train_state import OptimizerConfig

T = TypeVar("T")
SAMPLED_BY_WEIGHT = ("importance", "velocity", "adaptive")
DEQUANTIZATIONS = ("uniform", "variational", "tn")
TASKS = ("inpaint", "colourise", "super_resolve", "denoise", "linear")
TASK_METHODS = ("replacement", "dps", "moment_matching", "twisted")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The fields of `model` that belong neither to the network nor to the SDE."""

    name: str
    parameterization: str
    time_label: str
    ema_rate: float
    num_scales: int

    def __post_init__(self) -> None:
        one_of("name", self.name, models.MODELS)
        one_of("parameterization", self.parameterization, PARAMETERIZATIONS | HEADS)
        one_of("time_label", self.time_label, TIME_LABELS)
        rate("ema_rate", self.ema_rate)
        require(self.num_scales >= 2, "num_scales", self.num_scales, "at least 2")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The `training` section."""

    sde: str
    continuous: bool
    objective: str
    n_iters: int
    batch_size: int
    microbatch: int
    n_jitted_steps: int
    profile_steps: int
    reduce_mean: bool
    likelihood_weighting: bool
    importance_weighting: bool
    debias: bool
    stratified: bool
    time_law: str
    context_dropout: float
    score_matching_order: int
    second_order_weight: float
    frobenius_weight: float
    trace_weight: float
    third_order_weight: float
    third_order_form: str
    high_order_fraction: float
    scalar_fp: str
    fp_wgt_type: str
    alpha: float
    beta: float
    m: float
    fp_form: str
    fp_probes: int
    fp_fraction: float
    fp_every: int
    derivative_estimator: str
    num_probes: int
    smallest_time: float
    importance_smallest_time: float
    log_freq: int
    eval_freq: int
    snapshot_freq_for_preemption: int
    snapshot_freq: int
    snapshot_sampling: bool
    init_from: str

    def __post_init__(self) -> None:
        one_of("sde", self.sde.lower(), sde_lib.SDES)
        other = self.importance_smallest_time
        require(other >= 0.0, "importance_smallest_time", other, "0 or more")
        names = ("n_iters", "batch_size", "n_jitted_steps", "log_freq", "eval_freq",
                 "snapshot_freq_for_preemption", "snapshot_freq")  # fmt: skip
        positive(**{name: getattr(self, name) for name in names})
        for field in (name for name in names if name.endswith(("_freq", "_preemption"))):
            value = getattr(self, field)
            allowed = f"a multiple of training.n_jitted_steps={self.n_jitted_steps}"
            require(value % self.n_jitted_steps == 0, field, value, allowed)
        size = self.microbatch or self.batch_size
        allowed = f"a divisor of training.batch_size={self.batch_size}, or 0 for all of it"
        require(size >= 1 and self.batch_size % size == 0, "microbatch", size, allowed)
        rate("context_dropout", self.context_dropout)
        require(self.profile_steps >= 0, "profile_steps", self.profile_steps, "0 or more")


@dataclasses.dataclass(frozen=True)
class DeqConfig:
    """The `deq` section: the variational dequantiser and its training."""

    n_iters: int
    ema_rate: float
    num_times: int
    filters: int
    components: int
    blocks: int
    heads: int
    couplings: int
    processor: str
    init_from: str

    def __post_init__(self) -> None:
        positive(n_iters=self.n_iters, num_times=self.num_times)
        rate("ema_rate", self.ema_rate)
        self.flow  # noqa: B018  its fields are checked

    @property
    def flow(self) -> Flowpp:
        """The network."""
        names = ("filters", "components", "blocks", "heads", "couplings", "processor")
        return Flowpp(**{name: getattr(self, name) for name in names})


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """The `sampling` section."""

    method: str
    smallest_time: float
    noise_removal: bool
    predictor: str
    corrector: str
    snr: float
    n_steps_each: int
    probability_flow: bool
    lmbd: float
    solver: str
    rtol: float
    atol: float
    num_samples: int
    context: str
    guidance: float
    task: str
    task_method: str
    measurements: str
    num_measured: int
    mask: str
    factor: int
    matrix: str
    noise: float
    particles: int

    def __post_init__(self) -> None:
        positive(num_samples=self.num_samples, num_measured=self.num_measured)
        require(self.guidance >= 0.0, "guidance", self.guidance, "0 or more")
        require(self.particles >= 2, "particles", self.particles, "at least 2")
        one_of("task", self.task, ("", *TASKS))
        one_of("task_method", self.task_method, TASK_METHODS)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """The `eval` section."""

    begin_ckpt: int
    end_ckpt: int
    batch_size: int
    dataset: str
    num_examples: int
    num_repeats: int
    wait_s: float
    dequantization: str
    dequantizer: bool
    tn_tau: float
    enable_bpd: bool
    ode_start: str
    num_importance: int
    bound: bool
    dsm: bool
    offset: bool
    elbo: bool
    elbo_estimator: str
    baselines: bool
    classify: bool
    calibrate: bool
    calibration_samples: int
    enable_loss: bool
    enable_sampling: bool
    num_samples: int
    features: str
    stats: str
    solver: str
    rtol: float
    atol: float
    num_steps: int
    estimate_error: bool
    divergence: str
    num_probes: int
    num_times: int
    trajectory_lmbds: tuple[float, ...]
    curve_times: int
    curve_examples: int

    def __post_init__(self) -> None:
        one_of("dataset", self.dataset, ("train", "validation", "test"))
        one_of("elbo_estimator", self.elbo_estimator, elbo.ESTIMATORS)
        one_of("ode_start", self.ode_start, ("auto", "data", "noised"))
        for kind in self.dequantizations:
            one_of("dequantization", kind, DEQUANTIZATIONS)
        both = self.dequantizer and self.dequantization not in ("uniform", "variational")
        allowed = "'variational', which eval.dequantizer=True stands for, or leave that False"
        require(not both, "dequantization", self.dequantization, allowed)
        require(self.tn_tau > 0.0, "tn_tau", self.tn_tau, "more than 0")
        names = ("batch_size", "num_repeats", "num_samples", "num_times", "curve_times",
                 "curve_examples", "num_importance", "calibration_samples")  # fmt: skip
        positive(**{name: getattr(self, name) for name in names})
        for field in ("begin_ckpt", "end_ckpt", "num_examples", "wait_s"):
            require(getattr(self, field) >= 0, field, getattr(self, field), "0 or more")
        for lmbd in self.trajectory_lmbds:
            require(lmbd <= 1.0, "trajectory_lmbds", lmbd, "λ <= 1")
        allowed = f"at least eval.begin_ckpt={self.begin_ckpt}"
        require(self.begin_ckpt <= self.end_ckpt, "end_ckpt", self.end_ckpt, allowed)

    @property
    def dequantizations(self) -> list[str]:
        """The names in `dequantization`."""
        return ["variational"] if self.dequantizer else self.dequantization.split(",")


@dataclasses.dataclass(frozen=True)
class Settings:
    """A whole config: one dataclass per section, the SDE and the network.

    `training.smallest_time` is the one in force, `smallest_time` what the config says.
    """

    seed: int
    smallest_time: float
    data: DataConfig
    model: ModelConfig
    network: Any  # a flax Module
    head: Head | None  # None: one of the published parameterisations
    sde: sde_lib.SDE
    training: TrainingConfig
    optim: OptimizerConfig
    deq: DeqConfig
    sampling: SamplingConfig
    eval: EvalConfig

    @classmethod
    def from_config(cls, config: ConfigDict) -> "Settings":
        """Resolve a config.

        Raises:
            FieldError: a field is unknown, unused, missing or has a value that is not allowed.
        """
        sections = _sections(config)
        training = section(TrainingConfig, sections["training"], "training")
        given = training.smallest_time
        proposed = training.importance_weighting or training.time_law in SAMPLED_BY_WEIGHT
        if proposed and training.importance_smallest_time:
            t_min = training.importance_smallest_time
            training = dataclasses.replace(training, smallest_time=t_min)
        data = section(DataConfig, sections["data"], "data")
        label = dict(sections["model"]).get("time_label")
        allowed = "another with training.continuous=True, where model.num_scales may change"
        require(label != "level" or not training.continuous, "model.time_label", label, allowed)
        model, network, head, sde = _model(sections["model"], training.sde.lower(), data)
        if hasattr(network, "centered"):
            network = network.clone(centered=data.centered or data.logit)
        return cls(
            seed=sections["seed"],
            smallest_time=given,
            data=data,
            model=model,
            network=network,
            head=head,
            sde=sde,
            training=training,
            optim=section(OptimizerConfig, sections["optim"], "optim"),
            deq=section(DeqConfig, sections["deq"], "deq"),
            sampling=section(SamplingConfig, sections["sampling"], "sampling"),
            eval=section(EvalConfig, sections["eval"], "eval"),
        )

    def resolved(self) -> dict[str, Any]:
        """Plain nested dict in the layout of the config, defaults of network and SDE filled in."""
        model = dataclasses.asdict(self.model) | _fields(self.network) | _fields(self.sde)
        model |= _fields(self.head) if self.head is not None else {}
        return {
            "seed": self.seed,
            "data": dataclasses.asdict(self.data),
            "model": model,
            "training": dataclasses.asdict(self.training) | {"smallest_time": self.smallest_time},
            "optim": dataclasses.asdict(self.optim),
            "deq": dataclasses.asdict(self.deq),
            "sampling": dataclasses.asdict(self.sampling),
            "eval": dataclasses.asdict(self.eval),
        }


def _sections(config: ConfigDict) -> dict[str, Any]:
    """The sections of a config by name, none of them unknown or missing; and the seed."""
    sections = dict(config)
    sections.pop("name", None)
    known = ("seed", "data", "model", "training", "optim", "deq", "sampling", "eval")
    for name in sections:
        one_of("config section", name, known)
    missing = sorted(set(known) - sections.keys())
    require(not missing, "config", sorted(sections), f"the sections {missing}, too")
    seed = sections["seed"]
    require(type(seed) is int and 0 <= seed < 2**32, "seed", seed, "0 <= seed < 2**32")
    return sections


def _model(
    values: Mapping[str, Any], sde_name: str, data: DataConfig
) -> tuple[ModelConfig, Any, Head | None, sde_lib.SDE]:
    """Distribute the open `model` section over ModelConfig, the network, the head and the SDE."""
    given = {name: value for name, value in dict(values).items() if value is not None}
    own = {f.name for f in dataclasses.fields(ModelConfig)}
    model = section(ModelConfig, {k: v for k, v in given.items() if k in own}, "model")
    parts = {f"model.name={model.name!r}": models.MODELS[model.name]}
    if model.parameterization in HEADS:
        parts[f"model.parameterization={model.parameterization!r}"] = HEADS[model.parameterization]
    parts[f"training.sde={sde_name!r}"] = sde_lib.SDES[sde_name]
    fields = {name: _field_names(cls) for name, cls in parts.items()}
    known = own.union(*fields.values())
    for name in given.keys() - known:
        used = " nor by ".join(f"{part} (fields {sorted(there)})" for part, there in fields.items())
        used += nearest(name, known)
        raise FieldError(f"model.{name}", given[name], f"used neither by {used}")
    made = [
        functools.partial(cls, **{k: v for k, v in given.items() if k in _field_names(cls)})
        for cls in parts.values()
    ]
    with in_section("model"):
        head = _head(model, made[1], data) if model.parameterization in HEADS else None
        return model, _network(model, made[0](), head), head, made[-1]()


def _head(model: ModelConfig, make: Callable[..., Head], data: DataConfig) -> Head:
    """The head; those of quantised data take levels and range from the encoding."""
    name = model.parameterization
    if name not in ("cells", "atoms"):
        return make()
    noisy = data.uniform_dequantization
    field = f"data.uniform_dequantization with model.parameterization={name!r}"
    require(noisy == (name == "cells"), field, noisy, str(not noisy))
    field = f"data.logit with model.parameterization={name!r}"
    require(not data.logit, field, data.logit, "False: its levels are at unequal distances")
    pixels = Pixels(data.levels, data.centered, dequantize_uniformly=noisy)
    return make(levels=data.levels, low=pixels.from_unit(0.0), high=pixels.from_unit(1.0))


def _network(model: ModelConfig, network: Any, head: Head | None) -> Any:
    """The network, with as many numbers per coordinate as the head asks for."""
    if head is None or head.outputs == 1:
        return network
    able = sorted(n for n, c in models.MODELS.items() if hasattr(c, "outputs"))
    allowed = f"one of {able} for model.parameterization={model.parameterization!r}"
    require(hasattr(network, "outputs"), "model.name", model.name, allowed)
    return network.clone(outputs=head.outputs)


# What follows from other fields, and is no field of the config.
IMPLIED = ("parent", "name", "outputs", "context", "levels", "low", "high")


def _field_names(cls: type) -> set[str]:
    return {f.name for f in dataclasses.fields(cls) if f.name not in IMPLIED}


def _fields(instance: Any) -> dict[str, Any]:
    return {name: getattr(instance, name) for name in sorted(_field_names(type(instance)))}


def section(cls: type[T], values: Mapping[str, Any], name: str) -> T:
    """`cls(**values)`, each value of the type of its field.

    Raises:
        FieldError: a field is unknown, missing, of another type or not allowed; names it with its
            section, and the nearest known one.
    """
    values = dict(values)
    kinds = {f.name: f.type for f in dataclasses.fields(cls)}
    with in_section(name):
        for field, value in values.items():
            if field not in kinds:
                raise FieldError(field, value, f"not a field of the config{nearest(field, kinds)}")
            of_type(field, value, kinds[field])
        missing = sorted(kinds.keys() - values.keys())
        require(not missing, f"the section {name}", sorted(values), f"the fields {missing}, too")
        return cls(**values)
