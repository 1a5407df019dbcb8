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

from checks import require
from models.conditioning import ContextArray, beside, plus_context
from models.layers import (
    ACTIVATIONS,
    DTYPES,
    AttnBlock,
    Dropout,
    Features,
    Image,
    check_sides,
    conv3x3,
    default_init,
    joined,
    rematerialized,
    sinusoidal_embedding,
    standardize,
)
from models.walk import Given, Skips, WalkedUNet


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


class UNet(WalkedUNet):
    """Residual U-Net whose blocks are modulated by the label.

    Attributes:
        channels: of every level, from the finest; each level halves the size.
        blocks: number in every level on the way down; on the way up as many, but at the coarsest.
        patch: pixels on a side that one position of the finest level holds.
        attention: after every block of the coarsest level.
        summary: width of the perceptron that sees the whole input; 0: none.
        embed_dim: size of the sinusoidal embedding of the label.
        activation: a name in `layers.ACTIVATIONS`.

    The other fields are those of `WalkedUNet`.

    Raises:
        ValueError: a field, or the size of the image, has a value that is not allowed.
    """

    channels: tuple[int, ...] = (48,)
    blocks: tuple[int, ...] = (3,)
    patch: int = 1
    attention: bool = False
    summary: int = 0
    embed_dim: int = 64
    activation: str = "swish"

    def __post_init__(self) -> None:
        """Check the fields, and that there is a number of blocks for every level."""
        super().__post_init__()
        fits = len(self.channels) == len(self.blocks)
        require(fits, "blocks", self.blocks, f"a number for each of channels={self.channels}")
        require(self.summary >= 0, "summary", self.summary, "0 (none) or a width")

    @nn.nowrap
    def levels(self) -> int:
        """The number of levels."""
        return len(self.channels)

    @nn.nowrap
    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Refuse images that cannot be cut into patches and halved by all levels but the last."""
        check_sides(shape, self.patch * 2 ** (self.levels() - 1), "channels", self.channels)

    @nn.nowrap
    def condition(
        self,
        label: Float[Array, " b"],
        x: Image,
        features: Features | None,
        context: ContextArray | None,
        train: bool,
    ) -> Float[Array, "b c"]:
        """Embed label, context and, with `summary`, the whole input: what modulates the blocks."""
        act, width = ACTIVATIONS[self.activation], self.embed_dim
        cond = act(nn.Dense(width)(sinusoidal_embedding(label, self.embed_dim)))
        cond = nn.Dense(width)(cond)
        cond = act(plus_context(cond, self.context, context, self.activation))
        if self.summary:
            mixed = None if features is None else nn.Dense(1)(features)
            flat = beside(joined(x, mixed), context).reshape(x.shape[0], -1)
            q = nn.Dense(self.summary)(flat) + nn.Dense(self.summary, use_bias=False)(cond)
            for _ in range(2):
                q = Dropout(self.dropout)(act(q), train)
                q = nn.Dense(self.summary)(q)
            cond = act(cond + nn.Dense(width)(act(q)))
        return cond

    @nn.nowrap
    def stem(self, seen: Image) -> Image:
        """Convolve the patches of pixels, and add the map of positions."""
        h = conv3x3(self.channels[0], dtype=self.dtype)(space_to_depth(seen, self.patch))
        return self._with_positions(h)

    @nn.nowrap
    def halve(self, h: Image, level: int, given: Given) -> Image:
        """Halve the size by a strided convolution, and add the map of positions."""
        width, dtype = self.channels[level], DTYPES[self.dtype]
        return self._with_positions(nn.Conv(width, (2, 2), strides=2, dtype=dtype)(h))

    @nn.nowrap
    def down(self, h: Image, level: int, skips: Skips, given: Given) -> Image:
        """Apply the blocks, at the coarsest level with attention; the skip is their output."""
        for _ in range(self.blocks[level]):
            h = self._block(h, given)
            if self.attention and self._coarsest(level):
                h = rematerialized(AttnBlock, self.remat)(None, dtype=self.dtype)(h)
        skips.append(h)
        return h

    @nn.nowrap
    def up(self, h: Image, level: int, skips: Skips, given: Given) -> Image:
        """Add the skip and apply the blocks; nothing more is done at the coarsest level."""
        skip = skips.pop()
        if self._coarsest(level):
            return h
        h = h + skip
        for _ in range(self.blocks[level]):
            h = self._block(h, given)
        return h

    @nn.nowrap
    def double(self, h: Image, level: int, given: Given) -> Image:
        """Map to four times the channels of the finer level, and make 2×2 positions of them."""
        width = 4 * self.channels[level - 1]
        h = nn.Dense(width, dtype=DTYPES[self.dtype])(standardize(h, axes=(3,)))
        return depth_to_space(h, 2)

    @nn.nowrap
    def image(self, h: Image, given: Given) -> Image:
        """Make the output: conv3×3(act(N(h))), every position a patch of pixels again."""
        h = ACTIVATIONS[self.activation](standardize(h, axes=(3,)))
        h = conv3x3(given.channels * self.patch**2, scale=0.0)(h)
        return depth_to_space(h, self.patch)

    @nn.nowrap
    def _coarsest(self, level: int) -> bool:
        return level == self.levels() - 1

    @nn.nowrap
    def _with_positions(self, h: Image) -> Image:
        """h plus a learned map that is the same for all examples, zero at the start."""
        positions = self.param(f"positions_{h.shape[1]}", nn.initializers.zeros, (1, *h.shape[1:]))
        return h + positions.astype(h.dtype)

    @nn.nowrap
    def _block(self, h: Image, given: Given) -> Image:
        block = rematerialized(ModulatedBlock, self.remat)
        return block(self.dropout, self.activation, self.dtype)(h, given.cond, given.train)


def space_to_depth(x: Image, patch: int) -> Image:
    """[B, H, W, C] as [B, H/p, W/p, p p C]: every block of pixels becomes one position."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // patch, w // patch, patch * patch * c)


def depth_to_space(x: Image, patch: int) -> Image:
    """Undo `space_to_depth`: every position becomes a block of p p pixels again."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, patch, patch, c // patch**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * patch, w * patch, -1)
