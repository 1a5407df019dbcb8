"""The sections of a config as frozen dataclasses, each of which checks its own fields."""

import dataclasses

import elbo
import models
import sde_lib
from checks import one_of, positive, rate, require
from models.flowpp import Flowpp
from models.time_classifier import TimeClassifier
from parameterization import HEADS, PARAMETERIZATIONS, TIME_LABELS

DEQUANTIZATIONS = ("uniform", "variational", "tn")
TASKS = ("inpaint", "colourise", "super_resolve", "denoise", "linear")
TASK_METHODS = ("replacement", "dps", "moment_matching", "twisted")
GUIDES = ("", "classifier")


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
    """The fields of the `training` section of a config."""

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
        """Return the network of the dequantiser."""
        names = ("filters", "components", "blocks", "heads", "couplings", "processor")
        return Flowpp(**{name: getattr(self, name) for name in names})


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """The `classifier` section: p(c | x_t) that guides samples, and its training."""

    n_iters: int
    ema_rate: float
    width: int
    depth: int
    dropout: float

    def __post_init__(self) -> None:
        positive(n_iters=self.n_iters)
        rate("ema_rate", self.ema_rate)
        self.network(2)  # its fields are checked

    def network(self, classes: int) -> TimeClassifier:
        """The network for so many classes."""
        return TimeClassifier(classes, self.width, self.depth, self.dropout)


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """The fields of the `sampling` section of a config."""

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
    guide: str
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
        one_of("guide", self.guide, GUIDES)
        one_of("task", self.task, ("", *TASKS))
        one_of("task_method", self.task_method, TASK_METHODS)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """The fields of the `eval` section of a config."""

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
