"""NCSN++ and DDPM++: the U-Nets of score_sde, for x: [B, H, W, C].

    down:   conv3×3, then per level n × [Res, (Attn)], and a halving after all levels but the last
    middle: Res, Attn, Res
    up:     per level n + 1 × Res([h, skip]), (Attn), and a doubling after all levels but the first
    out:    conv3×3(act(GN(h))), started near zero

    Res(x, c) = ρ (S x + conv3×3(dropout(act(GN(conv3×3(R act(GN(x))) + W act(c))))))
    S = 1 or 1×1 (of R x),   R = 1, halving or doubling,   ρ = 1 or 1/√2 (`skip_rescale`)

DDPM++ is `resblock_type="biggan"` with all else at its default; NCSN++ adds `fir=True`, the Fourier
embedding of log σ and a pyramid of the input. The division by σ that score_sde does inside the
network (`scale_by_sigma`) is the parameterisation `scaled_score` here.
Reference: Song et al. 2021, https://arxiv.org/abs/2011.13456, appendix H.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from checks import one_of, positive, rate
from models.ddpm import Embedding, ResnetBlockDDPM
from models.fir import (
    FIRDownsample,
    FIRUpsample,
    check_taps,
    fir_downsample,
    fir_upsample,
)
from models.layers import (
    ACTIVATIONS,
    DTYPES,
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
    mean_downsample,
    nearest_upsample,
    per_coordinate,
    rematerialized,
    sinusoidal_embedding,
)

RESBLOCK_TYPES = ("ddpm", "biggan")
PROGRESSIVE = ("none", "output_skip", "residual")
PROGRESSIVE_INPUT = ("none", "input_skip", "residual")
PROGRESSIVE_COMBINE = ("sum", "cat")
EMBEDDING_TYPES = ("positional", "fourier")


class GaussianFourierProjection(nn.Module):
    """[sin(2π W u), cos(2π W u)], W ~ N(0, scale²), for u: [B]; W is fixed unless `trainable`.

    Reference: Tancik et al. 2020, https://arxiv.org/abs/2006.10739.
    """

    features: int
    scale: float
    trainable: bool

    @nn.compact
    def __call__(self, u: Float[Array, " b"]) -> Float[Array, "b 2*features"]:
        """Map u: [B] to [B, 2 features]."""
        weight = self.param("W", nn.initializers.normal(self.scale), (self.features,))
        weight = weight if self.trainable else jax.lax.stop_gradient(weight)
        phase = 2.0 * math.pi * u[:, None] * weight.astype(u.dtype)[None, :]
        return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=1)


class Combine(nn.Module):
    """A 1×1 convolution of the pyramid, added to h or concatenated with it."""

    method: str
    dtype: str = "float32"

    @nn.compact
    def __call__(self, pyramid: Image, h: Image) -> Image:
        """Map [B, H, W, P] and [B, H, W, C] to [B, H, W, C] (sum) or [B, H, W, 2C] (cat)."""
        init = default_init()
        p = nn.Conv(h.shape[-1], (1, 1), kernel_init=init, dtype=DTYPES[self.dtype])(pyramid)
        return p + h if self.method == "sum" else jnp.concatenate([p, h], axis=-1)


class ResnetBlockBigGAN(nn.Module):
    """ρ (S R x + conv(dropout(act(GN(conv(R act(GN(x))) + W act(temb)))))).

    Attributes:
        features: channels of the output.
        resample: "down", "up" or "" for R = 1.
        taps: of the filter of R; None: mean of 2×2 blocks and nearest neighbour.
        init_scale: of the second convolution; 0 starts it near zero.
    """

    features: int
    resample: str = ""
    taps: tuple[float, ...] | None = None
    nonlinearity: str = "swish"
    dropout: float = 0.0
    init_scale: float = 0.0
    skip_rescale: bool = True
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Image, temb: Embedding | None, train: bool) -> Image:
        """Map x: [B, H, W, C] to [B, H', W', features]; without conditioning `temb` is None."""
        act, dtype = ACTIVATIONS[self.nonlinearity], self.dtype
        h = self._resampled(act(GroupNorm(None)(x)))
        h = conv3x3(self.features, dtype=dtype)(h)
        if temb is not None:
            shift = nn.Dense(self.features, kernel_init=default_init(), dtype=DTYPES[dtype])
            h = h + shift(act(temb))[:, None, None, :]
        h = act(GroupNorm(None)(h))
        h = dropout(self.dropout)(h, deterministic=not train)
        h = conv3x3(self.features, scale=self.init_scale, dtype=dtype)(h)
        if x.shape[-1] != self.features or self.resample:
            x = self._resampled(x)
            x = nn.Conv(
                self.features, (1, 1), kernel_init=default_init(), dtype=DTYPES[dtype]
            )(x)  # fmt: skip
        return (x + h) * 0.5**0.5 if self.skip_rescale else x + h

    def _resampled(self, x: Image) -> Image:
        if self.resample == "down":
            return mean_downsample(x) if self.taps is None else fir_downsample(x, self.taps)
        if self.resample == "up":
            return nearest_upsample(x) if self.taps is None else fir_upsample(x, self.taps)
        return x


class NCSNpp(nn.Module):
    """U-Net with every published option.

    Attributes:
        nf: channels of the first level; the embedding of the label has 4 nf components.
        ch_mult: channels of level i are nf · ch_mult[i]; each level halves the size.
        num_res_blocks: residual blocks of a level on the way down (one more on the way up).
        attn_resolutions: heights of feature maps, in pixels, that have attention.
        dropout: rate, in [0, 1).
        resamp_with_conv: with `ddpm` blocks, resample with 3×3 convolutions.
        conditional: False ignores the label.
        fir: resample through the filter `fir_kernel`.
        fir_kernel: its taps.
        skip_rescale: residual sums are divided by √2.
        resblock_type: `ddpm`, or `biggan`, which resample inside residual blocks.
        progressive: the output as a pyramid: `none`, `output_skip` (sum of the images of all
            levels), `residual`.
        progressive_input: the input as a pyramid: `none`, `input_skip`, `residual`.
        progressive_combine: `sum` or `cat`, how `input_skip` joins the features.
        embedding_type: of the label ℓ, `positional` in ℓ or `fourier` in log ℓ.
        fourier_scale: standard deviation of the Fourier frequencies.
        trainable_embedding: train them.
        init_scale: of the last convolution of every block and of the output; 0: near zero.
        nonlinearity: a name in `layers.ACTIVATIONS`.
        centered: images are in [−1, 1]; otherwise the network maps x to 2x − 1.
        dtype: of convolutions and products, `float32` (as the input) or `bfloat16`.
        remat: what the reverse pass computes again, a name in `layers.REMAT`.
        outputs: numbers K per coordinate that a head asks for.

    GroupNorm has min(C/4, 32) groups.

    Raises:
        ValueError: a field, or the size of the image, has a value that is not allowed.
    """

    nf: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 4
    attn_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.0
    resamp_with_conv: bool = True
    conditional: bool = True
    fir: bool = False
    fir_kernel: tuple[float, ...] = (1, 3, 3, 1)
    skip_rescale: bool = True
    resblock_type: str = "biggan"
    progressive: str = "none"
    progressive_input: str = "none"
    progressive_combine: str = "sum"
    embedding_type: str = "positional"
    fourier_scale: float = 16.0
    trainable_embedding: bool = False
    init_scale: float = 0.0
    nonlinearity: str = "swish"
    centered: bool = True
    dtype: str = "float32"
    remat: str = "none"
    outputs: int = 1

    def __post_init__(self) -> None:
        """Check the fields."""
        positive(nf=self.nf, num_res_blocks=self.num_res_blocks)
        rate("dropout", self.dropout)
        check_taps(self.fir_kernel)
        for field, known in (
            ("nonlinearity", ACTIVATIONS),
            ("resblock_type", RESBLOCK_TYPES),
            ("progressive", PROGRESSIVE),
            ("progressive_input", PROGRESSIVE_INPUT),
            ("progressive_combine", PROGRESSIVE_COMBINE),
            ("embedding_type", EMBEDDING_TYPES),
            ("dtype", DTYPES),
            ("remat", REMAT),
        ):
            one_of(field, getattr(self, field), known)
        check_levels(self.nf, self.ch_mult)
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
        channels = x.shape[-1] * self.outputs
        h, pyramid = self._up(h, skips, channels, temb, train)
        out = h if pyramid is None else pyramid
        if self.progressive != "output_skip":
            out = self._to_image(h, channels, self.init_scale)
        return per_coordinate(out, self.outputs).astype(x.dtype)

    @nn.nowrap
    def _embed(self, label: Float[Array, " b"], dtype: DTypeLike) -> Embedding:
        """W_2 act(W_1 embedding(label) + b_1) + b_2, shape [B, 4 nf]."""
        if self.embedding_type == "fourier":
            project = GaussianFourierProjection(
                self.nf, self.fourier_scale, self.trainable_embedding
            )
            embedding = project(jnp.log(label))
        else:
            embedding = sinusoidal_embedding(label, self.nf)
        act = ACTIVATIONS[self.nonlinearity]
        return embed(embedding.astype(dtype), self.nf, act, dtype=self.dtype)

    @nn.nowrap
    def _down(self, x: Image, temb: Embedding | None, train: bool) -> tuple[Image, list[Image]]:
        """The way down; the skips are the first convolution, every block, every halving."""
        h, pyramid = conv3x3(self.nf, dtype=self.dtype)(x), x
        skips = [h]
        for level, mult in enumerate(self.ch_mult):
            for _ in range(self.num_res_blocks):
                h = self._res(self.nf * mult)(h, temb, train)
                h = self._attn()(h) if self._attends(h) else h
                skips.append(h)
            if level != len(self.ch_mult) - 1:
                h = self._resampled(h, "down", temb, train)
                h, pyramid = self._join_input(h, pyramid)
                skips.append(h)
        return h, skips

    @nn.nowrap
    def _join_input(self, h: Image, pyramid: Image) -> tuple[Image, Image]:
        """(features, pyramid) after the pyramid of the input was halved."""
        if self.progressive_input == "input_skip":
            pyramid = fir_downsample(pyramid, self.fir_kernel) if self.fir else (
                mean_downsample(pyramid)
            )  # fmt: skip
            return Combine(self.progressive_combine, self.dtype)(pyramid, h), pyramid
        if self.progressive_input == "residual":
            pyramid = self._resample_with_conv("down", h.shape[-1])(pyramid)
            h = pyramid = self._sum(pyramid, h)
        return h, pyramid

    @nn.nowrap
    def _up(
        self, h: Image, skips: list[Image], channels: int, temb: Embedding | None, train: bool
    ) -> tuple[Image, Image | None]:
        """The way up: (features, pyramid of the output)."""
        pyramid = None
        for level, mult in reversed(list(enumerate(self.ch_mult))):
            for _ in range(self.num_res_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = self._res(self.nf * mult)(h, temb, train)
            h = self._attn()(h) if self._attends(h) else h
            h, pyramid = self._join_output(h, pyramid, channels)
            if level != 0:
                h = self._resampled(h, "up", temb, train)
        return h, pyramid

    @nn.nowrap
    def _join_output(
        self, h: Image, pyramid: Image | None, channels: int
    ) -> tuple[Image, Image | None]:
        """(features, pyramid) after the pyramid of the output, if any, was doubled."""
        if self.progressive == "output_skip":
            if pyramid is not None:
                pyramid = fir_upsample(pyramid, self.fir_kernel) if self.fir else (
                    nearest_upsample(pyramid)
                )  # fmt: skip
            image = self._to_image(h, channels, self.init_scale)
            return h, image if pyramid is None else pyramid + image
        if self.progressive == "residual":
            if pyramid is None:
                return h, self._to_image(h, h.shape[-1], 1.0)
            h = pyramid = self._sum(self._resample_with_conv("up", h.shape[-1])(pyramid), h)
        return h, pyramid

    @nn.nowrap
    def _to_image(self, h: Image, channels: int, scale: float) -> Image:
        h = ACTIVATIONS[self.nonlinearity](GroupNorm(None)(h))
        return conv3x3(channels, scale=scale)(h)

    @nn.nowrap
    def _sum(self, x: Image, y: Image) -> Image:
        return (x + y) * 0.5**0.5 if self.skip_rescale else x + y

    @nn.nowrap
    def _resampled(self, h: Image, way: str, temb: Embedding | None, train: bool) -> Image:
        """Half or twice the size: a block of its own kind, or a layer between `ddpm` blocks."""
        if self.resblock_type == "biggan":
            return self._res(h.shape[-1], way)(h, temb, train)
        if self.resamp_with_conv:
            return self._resample_with_conv(way, h.shape[-1])(h)
        if self.fir:
            return {"down": fir_downsample, "up": fir_upsample}[way](h, self.fir_kernel)
        return {"down": mean_downsample, "up": nearest_upsample}[way](h)

    @nn.nowrap
    def _resample_with_conv(self, way: str, features: int) -> nn.Module:
        if self.fir:
            kind = {"down": FIRDownsample, "up": FIRUpsample}[way]
            return kind(features, self.fir_kernel, dtype=self.dtype)
        kind = {"down": Downsample, "up": Upsample}[way]
        return kind(features=features, dtype=self.dtype)

    @nn.nowrap
    def _res(self, features: int, resample: str = "") -> nn.Module:
        common = {
            "nonlinearity": self.nonlinearity,
            "dropout": self.dropout,
            "init_scale": self.init_scale,
            "skip_rescale": self.skip_rescale,
            "dtype": self.dtype,
        }
        if self.resblock_type == "ddpm":
            return rematerialized(ResnetBlockDDPM, self.remat)(features, num_groups=None, **common)
        taps = self.fir_kernel if self.fir else None
        block = rematerialized(ResnetBlockBigGAN, self.remat)
        return block(features, resample=resample, taps=taps, **common)

    @nn.nowrap
    def _attn(self) -> nn.Module:
        block = rematerialized(AttnBlock, self.remat)
        return block(
            None, init_scale=self.init_scale, skip_rescale=self.skip_rescale, dtype=self.dtype
        )

    @nn.nowrap
    def _attends(self, h: Image) -> bool:
        return h.shape[1] in self.attn_resolutions
