"""The sections of a config as frozen dataclasses; an unknown field is an error that names it.

A ConfigDict stops here. `model` is open: its fields belong to the network, the SDE or to
ModelConfig, and None means "the default of the class that has the field".
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from ml_collections import ConfigDict

import elbo
import models
import sde_lib
from datasets import DataConfig
from models.flowpp import Flowpp
from parameterization import PARAMETERIZATIONS, TIME_LABELS
from train_state import OptimizerConfig

T = TypeVar("T")
DEQUANTIZATIONS = ("uniform", "variational", "tn")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The fields of `model` that belong neither to the network nor to the SDE."""

    name: str
    parameterization: str
    time_label: str
    ema_rate: float
    num_scales: int

    def __post_init__(self) -> None:
        choose(models.MODELS, self.name, "model.name")
        choose(PARAMETERIZATIONS, self.parameterization, "model.parameterization")
        choose(TIME_LABELS, self.time_label, "model.time_label")
        require(0.0 <= self.ema_rate < 1.0, "model.ema_rate", self.ema_rate, "0 <= rate < 1")
        require(self.num_scales >= 2, "model.num_scales", self.num_scales, "at least 2")


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
    score_matching_order: int
    second_order_weight: float
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
        choose(sde_lib.SDES, self.sde.lower(), "training.sde")
        other = self.importance_smallest_time
        require(other >= 0.0, "training.importance_smallest_time", other, "0 or more")
        positive = ("n_iters", "batch_size", "n_jitted_steps", "log_freq", "eval_freq",
                    "snapshot_freq_for_preemption", "snapshot_freq")  # fmt: skip
        for field in positive:
            value = getattr(self, field)
            require(value >= 1, f"training.{field}", value, "at least 1")
            if field.endswith(("_freq", "_preemption")):
                allowed = f"a multiple of training.n_jitted_steps={self.n_jitted_steps}"
                require(value % self.n_jitted_steps == 0, f"training.{field}", value, allowed)
        size = self.microbatch or self.batch_size
        allowed = f"a divisor of training.batch_size={self.batch_size}, or 0 for all of it"
        require(size >= 1 and self.batch_size % size == 0, "training.microbatch", size, allowed)
        require(self.profile_steps >= 0, "training.profile_steps", self.profile_steps, "0 or more")


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
        for field in ("n_iters", "num_times"):
            require(getattr(self, field) >= 1, f"deq.{field}", getattr(self, field), "at least 1")
        require(0.0 <= self.ema_rate < 1.0, "deq.ema_rate", self.ema_rate, "0 <= rate < 1")
        try:
            self.flow  # noqa: B018
        except ValueError as error:
            raise ValueError(f"deq.{error}") from None

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
        choose({"train": 0, "test": 0}, self.dataset, "eval.dataset")
        choose(elbo.ESTIMATORS, self.elbo_estimator, "eval.elbo_estimator")
        choose({"data": 0, "noised": 0}, self.ode_start, "eval.ode_start")
        for kind in self.dequantizations:
            choose(dict.fromkeys(DEQUANTIZATIONS), kind, "eval.dequantization")
        both = self.dequantizer and self.dequantization not in ("uniform", "variational")
        allowed = "'variational', which eval.dequantizer=True stands for, or leave that False"
        require(not both, "eval.dequantization", self.dequantization, allowed)
        require(self.tn_tau > 0.0, "eval.tn_tau", self.tn_tau, "more than 0")
        positive = ("batch_size", "num_repeats", "num_samples", "num_times", "curve_times",
                    "curve_examples", "num_importance")  # fmt: skip
        for field in positive:
            value = getattr(self, field)
            require(value >= 1, f"eval.{field}", value, "at least 1")
        for field in ("begin_ckpt", "end_ckpt", "num_examples", "wait_s"):
            value = getattr(self, field)
            require(value >= 0, f"eval.{field}", value, "0 or more")
        for lmbd in self.trajectory_lmbds:
            require(lmbd <= 1.0, "eval.trajectory_lmbds", lmbd, "λ <= 1")
        order = self.begin_ckpt <= self.end_ckpt
        allowed = f"at least eval.begin_ckpt={self.begin_ckpt}"
        require(order, "eval.end_ckpt", self.end_ckpt, allowed)

    @property
    def dequantizations(self) -> list[str]:
        """The names in `dequantization`."""
        return ["variational"] if self.dequantizer else self.dequantization.split(",")


@dataclasses.dataclass(frozen=True)
class Settings:
    """A whole config: one dataclass per section, the SDE and the network."""

    seed: int
    data: DataConfig
    model: ModelConfig
    network: Any  # a flax Module
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
            ValueError: a field is unknown, unused, missing or has a value that is not allowed.
        """
        sections = dict(config)
        sections.pop("name", None)
        known = ("seed", "data", "model", "training", "optim", "deq", "sampling", "eval")
        for name in sections:
            choose(dict.fromkeys(known), name, "config section")
        training = section(TrainingConfig, sections["training"], "training")
        if training.importance_weighting and training.importance_smallest_time:
            t_min = training.importance_smallest_time
            training = dataclasses.replace(training, smallest_time=t_min)
        data = section(DataConfig, sections["data"], "data")
        model, network, sde = _model(sections["model"], training.sde.lower())
        if hasattr(network, "centered"):
            network = network.clone(centered=data.centered or data.logit)
        return cls(
            seed=sections["seed"],
            data=data,
            model=model,
            network=network,
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
        return {
            "seed": self.seed,
            "data": dataclasses.asdict(self.data),
            "model": model,
            "training": dataclasses.asdict(self.training),
            "optim": dataclasses.asdict(self.optim),
            "deq": dataclasses.asdict(self.deq),
            "sampling": dataclasses.asdict(self.sampling),
            "eval": dataclasses.asdict(self.eval),
        }


def _model(values: Mapping[str, Any], sde_name: str) -> tuple[ModelConfig, Any, sde_lib.SDE]:
    """Distribute the open `model` section over ModelConfig, the network and the SDE."""
    given = {name: value for name, value in dict(values).items() if value is not None}
    own = {f.name for f in dataclasses.fields(ModelConfig)}
    model = section(ModelConfig, {k: v for k, v in given.items() if k in own}, "model")
    network_class, sde_class = models.MODELS[model.name], sde_lib.SDES[sde_name]
    network_fields, sde_fields = _field_names(network_class), _field_names(sde_class)
    for name in given.keys() - own - network_fields - sde_fields:
        raise ValueError(
            f"model.{name}={given[name]!r} is used neither by model.name={model.name!r} (fields "
            f"{sorted(network_fields)}) nor by training.sde={sde_name!r} (fields "
            f"{sorted(sde_fields)}){_nearest(name, own | network_fields | sde_fields)}"
        )
    network = network_class(**{k: v for k, v in given.items() if k in network_fields})
    sde = sde_class(**{k: v for k, v in given.items() if k in sde_fields})
    return model, network, sde


def _field_names(cls: type) -> set[str]:
    return {f.name for f in dataclasses.fields(cls) if f.name not in ("parent", "name")}


def _fields(instance: Any) -> dict[str, Any]:
    return {name: getattr(instance, name) for name in sorted(_field_names(type(instance)))}


def section(cls: type[T], values: Mapping[str, Any], name: str) -> T:
    """`cls(**values)`; a field that is unknown or missing is named, with the nearest known one."""
    values = dict(values)
    known = {f.name for f in dataclasses.fields(cls)}
    for field in values:
        if field not in known:
            raise ValueError(f"{name}.{field} is not a field of the config{_nearest(field, known)}")
    missing = sorted(known - values.keys())
    if missing:
        raise ValueError(f"the config lacks {', '.join(f'{name}.{f}' for f in missing)}")
    return cls(**values)


def _nearest(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def choose(table: Mapping[str, T], name: str, field: str) -> T:
    """Entry `name` of a table of names; an unknown name lists the known ones."""
    if name not in table:
        raise ValueError(
            f"{field}={name!r}: allowed {sorted(table)}{_nearest(str(name), set(table))}"
        )
    return table[name]


def require(condition: bool, field: str, value: Any, allowed: str) -> None:
    """Raise a ValueError that names field, value and what is allowed unless the condition holds."""
    if not condition:
        raise ValueError(f"{field}={value!r}: need {allowed}")
