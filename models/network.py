"""The base of the networks: a field of one name has one meaning, and is checked, in all of them."""

import dataclasses
from collections.abc import Collection
from typing import ClassVar

from flax import linen as nn

from checks import one_of, positive, rate, require
from models.layers import ACTIVATIONS, DTYPES, REMAT


class Network(nn.Module):
    """A network that refuses, when it is built, fields with a value that is not allowed.

    Attributes:
        OPTIONS: the fields that choose among names, with these names.
        COUNTS: the fields that are positive integers.
        LEVELS: the fields that hold a positive integer for every level, with what it is.

    Raises:
        FieldError: names the field, its value, and what is allowed.
    """

    OPTIONS: ClassVar[dict[str, Collection[str]]] = {
        "activation": ACTIVATIONS,
        "nonlinearity": ACTIVATIONS,
        "dtype": DTYPES,
        "remat": REMAT,
    }
    COUNTS: ClassVar = ("hidden", "depth", "nf", "num_res_blocks", "num_groups", "patch")
    LEVELS: ClassVar = {
        "ch_mult": "factor",
        "widths": "factor",
        "channels": "number",
        "blocks": "number",
    }

    def __post_init__(self) -> None:
        """Check the fields that several networks have."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name, value in values.items():
            if name in self.OPTIONS:
                one_of(name, value, self.OPTIONS[name])
            if name in self.COUNTS:
                positive(**{name: value})
            if name in self.LEVELS:
                require(len(value) > 0, name, value, f"one {self.LEVELS[name]} per level")
                positive(**{f"{name}[{i}]": one for i, one in enumerate(value)})
        if "dropout" in values:
            rate("dropout", values["dropout"])
        if "embed_dim" in values:
            require(values["embed_dim"] >= 4, "embed_dim", values["embed_dim"], "at least 4")
        super().__post_init__()
