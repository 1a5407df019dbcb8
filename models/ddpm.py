"""The U-Net of Ho et al. for x: [B, H, W, C], in its two published JAX and PyTorch forms.

    down:   conv3×3, then per level n × [Res, (Attn)], Downsample after all levels but the last
    middle: Res, Attn, Res
    up:     per level n + 1 × Res([h, skip]), (Attn), Upsample after all levels but the first
    out:    conv3×3(act(GroupNorm(h))), started near zero

    Res(x, c) = S x + conv3×3(dropout(act(GN(conv3×3(act(GN(x))) + W act(c)))));   S = 1 or 1×1

Attention stands where the height of the feature map is in `attn_resolutions`. The two forms
are the defaults (score_sde) and `up_attention="every", downsample_padding="symmetric",
init_mode="fan_out", dropout_mode="channel"` (sdeflow).
Reference: Ho et al. 2020, https://arxiv.org/abs/2006.11239, appendix B; Song et al. 2021,
https://arxiv.org/abs/2011.13456; Huang et al. 2021, https://arxiv.org/abs/2106.02808.
"""

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from checks import one_of, positive, rate, require
from models.layers import (
    ACTIVATIONS,
    DOWNSAMPLE_PADDING,
    DROPOUT_SHARED_AXES,
    DTYPES,
    INIT_MODES,
    NIN,
    REMAT,
    AttnBlock,
    Downsample,
    GroupNorm,
    Image,
    Upsample,
    check_levels,
    conv3x3,
    default_init,
    dropout,
    embed,
    joined,
    per_coordinate,
    rematerialized,
    sinusoidal_embedding,
)

UP_ATTENTION = ("every", "last")
PROJECTION_SCALE = {"fan_avg": 0.1, "fan_out": 1.0}  # of the 1×1 maps, as each form was published

Embedding = Float[Array, "b e"]


class ResnetBlockDDPM(nn.Module):
    """S x + conv(dropout(act(GN(conv(act(GN(x))) + W act(temb))))); /√2 if `skip_rescale`.

    S is a 1×1 map where the number of channels changes, else 1; the second convolution starts near
    zero if init_scale = 0.
    """

    features: int
    nonlinearity: str = "swish"
    num_groups: int | None = 32
    dropout: float = 0.0
    dropout_mode: str = "element"
    init_mode: str = "fan_avg"
    init_scale: float = 0.0
    skip_rescale: bool = False
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Image, temb: Embedding | None, train: bool
    ) -> Float[Array, "b h w features"]:
        """Map x: [B, H, W, C] to [B, H, W, features]; without conditioning `temb` is None."""
        act, mode, dtype = ACTIVATIONS[self.nonlinearity], self.init_mode, self.dtype
        h = act(GroupNorm(self.num_groups)(x))
        h = conv3x3(self.features, init_mode=mode, dtype=dtype)(h)
        if temb is not None:
            init = default_init(1.0, mode)
            shift = nn.Dense(self.features, kernel_init=init, dtype=DTYPES[dtype])(act(temb))
            h = h + shift[:, None, None, :]
        h = act(GroupNorm(self.num_groups)(h))
        h = dropout(self.dropout, self.dropout_mode)(h, deterministic=not train)
        h = conv3x3(self.features, scale=self.init_scale, init_mode=mode, dtype=dtype)(h)
        if x.shape[-1] != self.features:
            x = NIN(self.features, PROJECTION_SCALE[mode], mode, dtype)(x)
        return (x + h) * 0.5**0.5 if self.skip_rescale else x + h


class DDPM(nn.Module):
    """U-Net with residual blocks, attention at some resolutions, and the label's embedding.

    Attributes:
        nf: channels of the first level; the embedding of the label has nf, then 4 nf components.
        ch_mult: channels of level i are nf · ch_mult[i]; each level halves the size.
        num_res_blocks: residual blocks of a level on the way down (one more on the way up).
        attn_resolutions: heights of feature maps, in pixels, that have attention.
        dropout: rate, in [0, 1).
        resamp_with_conv: resample with 3×3 convolutions, else mean and nearest neighbour.
        conditional: False ignores the label.
        nonlinearity: a name in `layers.ACTIVATIONS`.
        num_groups: groups of every GroupNorm; divides the channels of every level.
        up_attention: on the way up, attention after `every` block or after the `last` of a level.
        downsample_padding: of the strided convolution, `same` (0, 1) or `symmetric` (1, 1).
        init_mode: `fan_avg` or `fan_out`, see `layers.default_init`; `fan_avg` starts the 1×1 maps
            with scale 0.1, `fan_out` with 1.
        dropout_mode: drop every `element` on its own, or a whole `channel` of an image.
        centered: images are in [−1, 1]; otherwise the network maps x to 2x − 1.
        dtype: of convolutions and products, `float32` (as the input) or `bfloat16`.
        remat: what the reverse pass computes again, a name in `layers.REMAT`.
        outputs: numbers K per coordinate that a head asks for.

    Raises:
        ValueError: a field, or the size of the image, has a value that is not allowed.
    """

    nf: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.0
    resamp_with_conv: bool = True
    conditional: bool = True
    nonlinearity: str = "swish"
    num_groups: int = 32
    up_attention: str = "last"
    downsample_padding: str = "same"
    init_mode: str = "fan_avg"
    dropout_mode: str = "element"
    centered: bool = True
    dtype: str = "float32"
    remat: str = "none"
    outputs: int = 1

    def __post_init__(self) -> None:
        """Check the fields."""
        positive(num_res_blocks=self.num_res_blocks, num_groups=self.num_groups)
        check_levels(self.nf, self.ch_mult)
        one_of("dtype", self.dtype, DTYPES)
        one_of("remat", self.remat, REMAT)
        one_of("nonlinearity", self.nonlinearity, ACTIVATIONS)
        one_of("up_attention", self.up_attention, UP_ATTENTION)
        one_of("downsample_padding", self.downsample_padding, DOWNSAMPLE_PADDING)
        one_of("init_mode", self.init_mode, INIT_MODES)
        one_of("dropout_mode", self.dropout_mode, DROPOUT_SHARED_AXES)
        rate("dropout", self.dropout)
        for channels in (self.nf, *(self.nf * mult for mult in self.ch_mult)):
            fits = channels % self.num_groups == 0  # the skips' channels are sums of these
            allowed = f"a divisor of {channels} channels, from nf and ch_mult"
            require(fits, "num_groups", self.num_groups, allowed)
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
            ValueError: x is not a batch of images, or H or W is not divisible by 2^(levels − 1).
        """
        check_levels(self.nf, self.ch_mult, x.shape)
        temb = self._embed(label, x.dtype) if self.conditional else None
        image = x if self.centered else 2.0 * x - 1.0
        h, skips = self._down(joined(image, features), temb, train)
        h = self._res(h.shape[-1])(h, temb, train)
        h = self._attn()(h)
        h = self._res(h.shape[-1])(h, temb, train)
        h = self._up(h, skips, temb, train)
        h = ACTIVATIONS[self.nonlinearity](GroupNorm(self.num_groups)(h))
        out = conv3x3(x.shape[-1] * self.outputs, scale=0.0, init_mode=self.init_mode)(h)
        return per_coordinate(out, self.outputs).astype(x.dtype)

    @nn.nowrap
    def _embed(self, label: Float[Array, " b"], dtype: DTypeLike) -> Embedding:
        embedding = sinusoidal_embedding(label, self.nf).astype(dtype)
        act = ACTIVATIONS[self.nonlinearity]
        return embed(embedding, self.nf, act, self.init_mode, self.dtype)

    @nn.nowrap
    def _down(self, x: Image, temb: Embedding | None, train: bool) -> tuple[Image, list[Image]]:
        """The way down; the skips are the first convolution, every block, every Downsample."""
        h = conv3x3(self.nf, init_mode=self.init_mode, dtype=self.dtype)(x)
        skips = [h]
        for level, mult in enumerate(self.ch_mult):
            for _ in range(self.num_res_blocks):
                h = self._res(self.nf * mult)(h, temb, train)
                h = self._attn()(h) if self._attends(h) else h
                skips.append(h)
            if level != len(self.ch_mult) - 1:
                h = Downsample(
                    self.resamp_with_conv,
                    self.downsample_padding,
                    self.init_mode,
                    dtype=self.dtype,
                )(h)
                skips.append(h)
        return h, skips

    @nn.nowrap
    def _up(self, h: Image, skips: list[Image], temb: Embedding | None, train: bool) -> Image:
        """The way up; every block reads the skip of the same size that was stored last."""
        for level, mult in reversed(list(enumerate(self.ch_mult))):
            for block in range(self.num_res_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = self._res(self.nf * mult)(h, temb, train)
                here = self.up_attention == "every" or block == self.num_res_blocks
                h = self._attn()(h) if here and self._attends(h) else h
            if level != 0:
                h = Upsample(self.resamp_with_conv, self.init_mode, dtype=self.dtype)(h)
        return h

    @nn.nowrap
    def _res(self, features: int) -> ResnetBlockDDPM:
        return rematerialized(ResnetBlockDDPM, self.remat)(
            features,
            nonlinearity=self.nonlinearity,
            num_groups=self.num_groups,
            dropout=self.dropout,
            dropout_mode=self.dropout_mode,
            init_mode=self.init_mode,
            dtype=self.dtype,
        )

    @nn.nowrap
    def _attn(self) -> AttnBlock:
        return rematerialized(AttnBlock, self.remat)(
            self.num_groups, PROJECTION_SCALE[self.init_mode], self.init_mode, dtype=self.dtype
        )

    @nn.nowrap
    def _attends(self, h: Image) -> bool:
        return h.shape[1] in self.attn_resolutions
