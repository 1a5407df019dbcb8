"""A residual U-Net with a learned map of positions, modulated by the label: x: [B, H, W, C].

    stem    h = conv3×3(patches of [x, features]) + map of positions
    down    per level n × Block, then a strided convolution after all levels but the last; at the
            coarsest level attention follows every Block, if asked for
    up      per level but the coarsest: doubled, + the skip of the level, n × Block
    out     conv3×3(act(N(h))), started near zero, back to pixels

    Block(h, c) = h + conv3×3(dropout(act(N(conv3×3(act(N(h) ⊙ (1 + γ) + δ)))))),  (γ, δ) = W c

N standardises the channels of every position. c is the embedding of the label, and with `summary`
of a perceptron that sees the whole input: what convolutions would need many blocks to learn. It
sees x, and of the features of every coordinate one mixture that all coordinates share: all of the
features would let it learn small data by heart. With one level this is a network without
downsampling; with `patch` = 2 every position of the finest level holds a 2×2 block of pixels.
Reference: Kingma et al. 2021, https://arxiv.org/abs/2107.00630, appendix B (no downsampling);
Peebles and Xie 2023, https://arxiv.org/abs/2212.09748, section 3.2 (modulation from near zero).
"""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from checks import one_of, positive, rate, require
from models.layers import (
    ACTIVATIONS,
    DTYPES,
    REMAT,
    AttnBlock,
    Dropout,
    Image,
    check_sides,
    conv3x3,
    default_init,
    joined,
    per_coordinate,
    rematerialized,
    sinusoidal_embedding,
    standardize,
)


class ModulatedBlock(nn.Module):
    """h + conv3×3(dropout(act(N(conv3×3(act(N(h) ⊙ (1 + γ) + δ)))))), (γ, δ) = W c."""

    dropout: float
    activation: str
    dtype: str

    @nn.compact
    def __call__(self, h: Image, cond: Float[Array, "b c"], train: bool) -> Image:
        """Update h: [B, H, W, F] given cond: [B, c], already passed through the activation."""
        act, width = ACTIVATIONS[self.activation], h.shape[-1]
        modulation = nn.Dense(2 * width, kernel_init=default_init(0.0))(cond)
        gamma, delta = jnp.split(modulation[:, None, None, :].astype(h.dtype), 2, axis=-1)
        u = standardize(h, axes=(3,)) * (1.0 + gamma) + delta
        u = conv3x3(width, dtype=self.dtype)(act(u))
        u = act(standardize(u, axes=(3,)))
        u = Dropout(self.dropout)(u, train)
        return h + conv3x3(width, scale=0.0, dtype=self.dtype)(u)


class UNet(nn.Module):
    """Residual U-Net whose blocks are modulated by the label.

    Attributes:
        channels: of every level, from the finest; each level halves the size.
        blocks: number in every level on the way down; on the way up as many, but at the coarsest.
        patch: pixels on a side that one position of the finest level holds.
        attention: after every block of the coarsest level.
        summary: width of the perceptron that sees the whole input; 0: none.
        embed_dim: size of the sinusoidal embedding of the label.
        dropout: rate, in [0, 1), inside each block.
        activation: a name in `layers.ACTIVATIONS`.
        dtype: of convolutions and products, `float32` (as the input) or `bfloat16`.
        remat: what the reverse pass computes again, a name in `layers.REMAT`.
        outputs: numbers K per coordinate that a head asks for.

    Raises:
        ValueError: a field, or the size of the image, has a value that is not allowed.
    """

    channels: tuple[int, ...] = (48,)
    blocks: tuple[int, ...] = (3,)
    patch: int = 1
    attention: bool = False
    summary: int = 0
    embed_dim: int = 64
    dropout: float = 0.0
    activation: str = "swish"
    dtype: str = "float32"
    remat: str = "none"
    outputs: int = 1

    def __post_init__(self) -> None:
        """Check the fields."""
        for name in ("channels", "blocks"):
            values = getattr(self, name)
            require(len(values) > 0, name, values, "one number per level")
            positive(**{f"{name}[{i}]": value for i, value in enumerate(values)})
        fits = len(self.channels) == len(self.blocks)
        require(fits, "blocks", self.blocks, f"a number for each of channels={self.channels}")
        positive(patch=self.patch)
        require(self.embed_dim >= 4, "embed_dim", self.embed_dim, "at least 4")
        rate("dropout", self.dropout)
        require(self.summary >= 0, "summary", self.summary, "0 (none) or a width")
        for field, known in (
            ("activation", ACTIVATIONS),
            ("dtype", DTYPES),
            ("remat", REMAT),
        ):
            one_of(field, getattr(self, field), known)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Image,
        label: Float[Array, " b"],
        train: bool = False,
        features: Float[Array, "b h w c f"] | None = None,
    ) -> Array:
        """Map x: [B, H, W, C] and label: [B] to the same shape, or [B, H, W, C, K] for a head.

        `features` are more numbers per coordinate, as input; dropout only if `train`.

        Raises:
            ValueError: x is no batch of images, or H or W is not divisible by the coarsest level.
        """
        divisor = self.patch * 2 ** (len(self.channels) - 1)
        check_sides(x.shape, divisor, "channels", self.channels)
        act, seen = ACTIVATIONS[self.activation], joined(x, features)
        cond = self._condition(label, x, features, train)
        h = conv3x3(self.channels[0], dtype=self.dtype)(space_to_depth(seen, self.patch))
        h, skips = self._down(self._with_positions(h), cond, train)
        h = self._up(h, skips, cond, train)
        h = act(standardize(h, axes=(3,)))
        h = conv3x3(x.shape[-1] * self.outputs * self.patch**2, scale=0.0)(h)
        return per_coordinate(depth_to_space(h, self.patch), self.outputs).astype(x.dtype)

    @nn.nowrap
    def _condition(
        self,
        label: Float[Array, " b"],
        x: Image,
        features: Float[Array, "b h w c f"] | None,
        train: bool,
    ) -> Float[Array, "b c"]:
        """What modulates the blocks: the label, and with `summary` the whole input."""
        act, width = ACTIVATIONS[self.activation], self.embed_dim
        cond = act(nn.Dense(width)(sinusoidal_embedding(label, self.embed_dim)))
        cond = act(nn.Dense(width)(cond))
        if self.summary:
            mixed = None if features is None else nn.Dense(1)(features)
            flat = joined(x, mixed).reshape(x.shape[0], -1)
            q = nn.Dense(self.summary)(flat) + nn.Dense(self.summary, use_bias=False)(cond)
            for _ in range(2):
                q = Dropout(self.dropout)(act(q), train)
                q = nn.Dense(self.summary)(q)
            cond = act(cond + nn.Dense(width)(act(q)))
        return cond

    @nn.nowrap
    def _with_positions(self, h: Image) -> Image:
        """h plus a learned map that is the same for all examples, zero at the start."""
        positions = self.param(f"positions_{h.shape[1]}", nn.initializers.zeros, (1, *h.shape[1:]))
        return h + positions.astype(h.dtype)

    @nn.nowrap
    def _down(self, h: Image, cond: Float[Array, "b c"], train: bool) -> tuple[Image, list[Image]]:
        """The way down to the coarsest level; the skips are the ends of the finer ones."""
        skips, last = [], len(self.channels) - 1
        for level, number in enumerate(self.blocks):
            for _ in range(number):
                h = self._block()(h, cond, train)
                h = self._attended(h) if level == last else h
            if level != last:
                skips.append(h)
                h = nn.Conv(
                    self.channels[level + 1], (2, 2), strides=2, dtype=DTYPES[self.dtype]
                )(h)  # fmt: skip
                h = self._with_positions(h)
        return h, skips

    @nn.nowrap
    def _up(self, h: Image, skips: list[Image], cond: Float[Array, "b c"], train: bool) -> Image:
        """The way up to the finest level."""
        for level in reversed(range(len(skips))):
            width = 4 * self.channels[level]
            h = nn.Dense(width, dtype=DTYPES[self.dtype])(standardize(h, axes=(3,)))
            h = depth_to_space(h, 2) + skips[level]
            for _ in range(self.blocks[level]):
                h = self._block()(h, cond, train)
        return h

    @nn.nowrap
    def _block(self) -> nn.Module:
        block = rematerialized(ModulatedBlock, self.remat)
        return block(self.dropout, self.activation, self.dtype)

    @nn.nowrap
    def _attended(self, h: Image) -> Image:
        block = rematerialized(AttnBlock, self.remat)
        return block(None, dtype=self.dtype)(h) if self.attention else h


def space_to_depth(x: Image, patch: int) -> Image:
    """[B, H, W, C] as [B, H/p, W/p, p p C]: every block of pixels becomes one position."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // patch, w // patch, patch * patch * c)


def depth_to_space(x: Image, patch: int) -> Image:
    """Inverse of `space_to_depth`."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, patch, patch, c // patch**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * patch, w * patch, -1)
