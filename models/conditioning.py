"""The context c of a density p(x | c) inside a network: a class, numbers, or an image beside x.

    class    e = E[c],  E: [n, width];  e = e_0 without a context
    numbers  e = W_2 act(W_1 [m c, m] + b_1) + b_2,  m = 1, or 0 without a context
    image    [x, m c, m] by channels, for images of the height and the width of x

e is added to the embedding of the label. Without a context e starts at zero: before training the
network then is the one that has no contexts. E starts at N(0, 1), which leaves the near-zero start
of the output as it is: from zero, the classes of the digits had a log loss of 1.5 nats instead of
0.3 after 2,000 steps of an MLP. In a batch the class −1, and NaN among the numbers, say that an
example has no context: the network then gives the score of p(x), if it was trained to.
Reference: Ho and Salimans 2021, https://arxiv.org/abs/2207.12598 (one network for both scores).
"""

import math
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from checks import require
from models.layers import ACTIVATIONS, Image

MOST_REGRESSORS = 1000
ContextArray = Float[Array, "b *c"] | Int[Array, " b"]


class Kind(Protocol):
    """A network knows this of its contexts when it is built: `streams.Context`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one example; () for a class."""

    @property
    def classes(self) -> int:
        """The number of classes; 0: floats."""


def without(context: ContextArray, dropped: Bool[Array, " b"]) -> ContextArray:
    """The contexts [B, *c], none where `dropped`: the class −1, or NaN."""
    none = -1 if _is_class(context) else jnp.nan
    return jnp.where(jnp.expand_dims(dropped, tuple(range(1, context.ndim))), none, context)


def contexts(
    kind: Kind | None, context: ContextArray | None, x: Float[Array, "b *d"]
) -> ContextArray | None:
    """The contexts as the layers take them: int [B], floats [B, n], images [B, H, W, C].

    They are None for a network without a context. Where none are given, no example has one.

    Raises:
        FieldError: a network without a context is given one, or one of another shape.
    """
    if kind is None:
        require(context is None, "the context", context, "none: this network was built without")
        return None
    if context is None:
        like = jnp.zeros((x.shape[0], *kind.shape), jnp.int32 if kind.classes else x.dtype)
        context = without(like, jnp.ones(x.shape[:1], bool))
    found, shape = (_is_class(context), context.shape[1:]), tuple(kind.shape)
    allowed = "classes [B], as integers" if kind.classes else f"floats [B, *c] with c = {shape}"
    require(found == (kind.classes > 0, shape), "the context", found, allowed)
    if kind.classes:
        return context
    context = context.astype(x.dtype)
    return context if len(shape) == 3 else context.reshape(x.shape[0], math.prod(shape))


def beside(seen: Image, context: ContextArray | None) -> Image:
    """The input of an image network with the image that is its context, [B, H, W, …].

    Raises:
        FieldError: the context is an image of another size.
    """
    if context is None or context.ndim != 4:
        return seen
    size = seen.shape[1:3]
    fits = context.shape[1:3] == size
    require(fits, "the context", context.shape[1:], f"images of {size} as x, or vectors")
    known, there = _known(context.astype(seen.dtype))
    channel = jnp.broadcast_to(there[:, None, None, None], (*seen.shape[:3], 1))
    return jnp.concatenate([seen, known, channel], axis=-1)


def plus_context(
    cond: Float[Array, "b c"], kind: Kind | None, context: ContextArray | None, activation: str
) -> Float[Array, "b c"]:
    """The embedding of the label plus that of a class or of numbers; called inside a module."""
    if context is None or context.ndim > 2:
        return cond
    embed = ContextEmbedding(kind.classes, cond.shape[-1], activation, name="context_embedding")
    return cond + embed(context).astype(cond.dtype)


def number_of_regressors(kind: Kind | None) -> int:
    """Return how many numbers `regressors` gives.

    It is 0 without a context, for images, and where there would be more than 1,000.
    """
    if kind is None or len(kind.shape) == 3:
        return 0
    number = kind.classes or math.prod(kind.shape)
    return number if number <= MOST_REGRESSORS else 0


def regressors(
    kind: Kind, context: ContextArray | None, x: Float[Array, "b *d"]
) -> Float[Array, "b n"]:
    """The contexts as numbers of a linear regression: themselves, or which class it is.

    They are zero for examples without a context.
    """
    given = contexts(kind, context, x)
    if kind.classes:
        return jax.nn.one_hot(given, kind.classes, dtype=x.dtype)
    return _known(given)[0]


class ContextEmbedding(nn.Module):
    """A vector for every context: a row of a table, or the output of a perceptron.

    Attributes:
        classes: number of classes; 0 for floats.
        width: of the vector.
        activation: of the perceptron, a name in `layers.ACTIVATIONS`.
    """

    classes: int
    width: int
    activation: str

    @nn.compact
    def __call__(self, context: ContextArray) -> Float[Array, "b width"]:
        """Map classes [B] or numbers [B, n] to [B, width]; no context to zero at the start."""
        if self.classes:
            table = self.param("classes", nn.initializers.normal(1.0), (self.classes, self.width))
            none = self.param("none", nn.initializers.zeros, (self.width,))
            return jnp.where(context[:, None] < 0, none[None], table[jnp.maximum(context, 0)])
        h = nn.Dense(self.width)(numbers(context))
        return nn.Dense(self.width)(ACTIVATIONS[self.activation](h))


def numbers(context: Float[Array, "b n"]) -> Float[Array, "b more"]:
    """(m c, m), [B, n + 1]: the numbers and whether there are any, all zero without a context."""
    known, there = _known(context)
    return jnp.concatenate([known, there[:, None]], axis=-1)


def _known(context: Float[Array, "b *c"]) -> tuple[Float[Array, "b *c"], Float[Array, " b"]]:
    """(m c, m): the floats, zero for examples without a context, and which have one."""
    there = ~jnp.any(jnp.isnan(context), axis=tuple(range(1, context.ndim)))
    each = jnp.expand_dims(there, tuple(range(1, context.ndim)))
    return jnp.where(each, context, 0.0), there.astype(context.dtype)


def _is_class(context: jax.Array) -> bool:
    return jnp.issubdtype(context.dtype, jnp.integer)
