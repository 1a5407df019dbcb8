"""A whole config as one frozen dataclass; an unknown field is an error that names it.

A ConfigDict stops here. `model` is open: its fields belong to the network, the SDE or to
ModelConfig, and None means "the default of the class that has the field".
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from ml_collections import ConfigDict

import models
import sde_lib
from checks import FieldError, in_section, nearest, of_type, one_of, require
from datasets import DataConfig
from dequantization import Pixels
from parameterization import HEADS, Head
from run_lib.sections import (
    ClassifierConfig,
    DeqConfig,
    EvalConfig,
    ModelConfig,
    SamplingConfig,
    TrainingConfig,
)
from train_state import OptimizerConfig

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
SAMPLED_BY_WEIGHT = ("importance", "velocity", "adaptive")


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
    classifier: ClassifierConfig
    sampling: SamplingConfig
    eval: EvalConfig

    @classmethod
    def from_config(cls, config: ConfigDict) -> "Settings":
        """Resolve a config into the settings of all sections.

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
            classifier=section(ClassifierConfig, sections["classifier"], "classifier"),
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
            "classifier": dataclasses.asdict(self.classifier),
            "sampling": dataclasses.asdict(self.sampling),
            "eval": dataclasses.asdict(self.eval),
        }


def _sections(config: ConfigDict) -> dict[str, Any]:
    """The sections of a config by name, none of them unknown or missing; and the seed."""
    sections = dict(config)
    sections.pop("name", None)
    known = ("seed", "data", "model", "training", "optim", "deq", "classifier", "sampling", "eval")
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
