"""Residual, time-modulated perceptron for x of any shape [B, *d], d flattened inside.

    h_0 = W_x x + W_t τ + W_k k,     τ = embedding(label)
    h_{l+1} = h_l + W_2 dropout(act(W_1 [LN(h_l) ⊙ (1 + γ_l) + δ_l])),   (γ_l, δ_l) = W_l c
    out = W_out h_L + gain ⊙ x,     gain = W_g c,     c = act(W act(W' τ) + e)

(all but W_t and W_k have a bias; LN is `layers.standardize` over the width; k are the numbers of a
context, and e is its embedding, see `conditioning`, if there is one). LN(h_0) is smooth thanks to
W_t τ: of W_x x alone it would have a kink at x = 0. The gain represents the score of a Gaussian,
linear in x at every time. The modulation γ, δ, the last layer of each block, W_out and the gain
start near zero. With a smooth activation (swish, gelu) every derivative in x and label exists.
A mean that is linear in k needs W_k and W_out alone: of the modulation it is learned slowly.
Reference: Perez et al. 2018, https://arxiv.org/abs/1709.07871 (feature-wise modulation);
Peebles and Xie 2023, https://arxiv.org/abs/2212.09748, section 3.2 (its near-zero start).
"""

import math

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from models.conditioning import ContextArray, Kind, contexts, numbers, plus_context
from models.layers import (
    ACTIVATIONS,
    default_init,
    joined,
    sinusoidal_embedding,
    standardize,
)
from models.network import Network


class ResidualBlock(nn.Module):
    """h + W_2 dropout(act(W_1 [LN(h) ⊙ (1 + γ) + δ])), (γ, δ) affine in the conditioning."""

    dropout: float
    activation: str

    @nn.compact
    def __call__(
        self, h: Float[Array, "b hidden"], cond: Float[Array, "b hidden"], train: bool
    ) -> Float[Array, "b hidden"]:
        """Update h: [B, hidden] given cond: [B, hidden], already passed through the activation."""
        width = h.shape[-1]
        modulation = nn.Dense(2 * width, kernel_init=default_init(0.0))(cond)
        gamma, delta = jnp.split(modulation, 2, axis=-1)
        u = standardize(h, axes=(1,)) * (1.0 + gamma) + delta
        u = ACTIVATIONS[self.activation](nn.Dense(width)(u))
        u = nn.Dropout(self.dropout)(u, deterministic=not train)
        return h + nn.Dense(width, kernel_init=default_init(0.0))(u)


class MLP(Network):
    """Residual perceptron with `depth` blocks of width `hidden`, modulated by the label.

    Attributes:
        hidden: width.
        depth: number of residual blocks.
        embed_dim: size of the sinusoidal embedding of the label.
        dropout: rate, in [0, 1), inside each block.
        activation: a name in `layers.ACTIVATIONS`.
        outputs: numbers K per coordinate that a head asks for; there is no gain with several.
        context: what the contexts are; None: there are none.

    Raises:
        ValueError: a field has a value that is not allowed; names the field and what is allowed.
    """

    hidden: int = 256
    depth: int = 4
    embed_dim: int = 64
    dropout: float = 0.0
    activation: str = "swish"
    outputs: int = 1
    context: Kind | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b *d"],
        label: Float[Array, " b"],
        train: bool = False,
        features: Float[Array, "b *d f"] | None = None,
        context: ContextArray | None = None,
    ) -> Float[Array, "b *d_and_k"]:
        """Map x: [B, *d] and label: [B] to [B, *d], or [B, *d, K] for a head.

        `features` are more numbers per coordinate, as input; dropout only if `train`. `context` is
        a class or floats for every example.
        """
        act = ACTIVATIONS[self.activation]
        dim = math.prod(x.shape[1:])
        flat = x.reshape(x.shape[0], dim)
        tau = sinusoidal_embedding(label, self.embed_dim)
        cond = act(nn.Dense(self.hidden, name="cond_in")(tau))
        cond = nn.Dense(self.hidden, name="cond_out")(cond)
        known = contexts(self.context, context, x)
        if known is not None and known.ndim > 2:
            known = known.reshape(x.shape[0], -1)
        cond = act(plus_context(cond, self.context, known, self.activation))
        seen = joined(x, features).reshape(x.shape[0], -1)
        h = nn.Dense(self.hidden, name="input")(seen)
        h = h + nn.Dense(self.hidden, use_bias=False, name="time")(tau)
        if known is not None and not self.context.classes:
            beside = nn.Dense(self.hidden, use_bias=False, name="context")
            h = h + beside(numbers(known).astype(h.dtype))
        for _ in range(self.depth):
            h = ResidualBlock(self.dropout, self.activation)(h, cond, train)
        if self.outputs > 1:
            out = nn.Dense(dim * self.outputs, kernel_init=default_init(0.0), name="output")(h)
            return out.reshape(*x.shape, self.outputs)
        gain = nn.Dense(dim, kernel_init=default_init(0.0), name="gain")(cond)
        out = nn.Dense(dim, kernel_init=default_init(0.0), name="output")(h) + gain * flat
        return out.reshape(x.shape)
