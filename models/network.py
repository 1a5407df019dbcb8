"""The base of the networks: a field of one name has one meaning, and is checked, in all of them."""

import dataclasses
from collections.abc import Iterable
from typing import ClassVar

from flax import linen as nn

from models.layers import (
    ACTIVATIONS,
    DTYPES,
    REMAT,
    check_levels,
    check_option,
    check_positive,
    check_rate,
)


class Network(nn.Module):
    """A network that refuses, when it is built, fields with a value that is not allowed.

    Attributes:
        OPTIONS: the fields that choose among names, with these names.
        COUNTS: the fields that are positive integers.
        LEVELS: the fields that hold a positive integer for every level.

    Raises:
        ValueError: names the field, its value, and what is allowed.
    """

    OPTIONS: ClassVar[dict[str, Iterable[str]]] = {
        "activation": ACTIVATIONS,
        "nonlinearity": ACTIVATIONS,
        "dtype": DTYPES,
        "remat": REMAT,
    }
    COUNTS: ClassVar = ("hidden", "depth", "nf", "num_res_blocks", "num_groups", "patch")
    LEVELS: ClassVar = ("ch_mult", "channels", "blocks", "widths")

    def __post_init__(self) -> None:
        """Check the fields that several networks have."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name, value in values.items():
            if name in self.OPTIONS:
                check_option(name, value, self.OPTIONS[name])
            if name in self.COUNTS:
                check_positive(**{name: value})
            if name in self.LEVELS:
                check_levels(name, value)
        if "dropout" in values:
            check_rate("dropout", values["dropout"])
        if values.get("embed_dim", 4) < 4:
            raise ValueError(f"embed_dim is {values['embed_dim']!r}; it must be at least 4")
        super().__post_init__()
