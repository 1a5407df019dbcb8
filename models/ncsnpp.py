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
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from models.ddpm import Embedding, PublishedUNet, Trail
from models.fir import FIRDownsample, FIRUpsample, check_taps, fir_downsample, fir_upsample
from models.layers import (
    ACTIVATIONS,
    DTYPES,
    Downsample,
    GroupNorm,
    Image,
    Upsample,
    conv3x3,
    default_init,
    dropout,
    mean_downsample,
    nearest_upsample,
    rematerialized,
)
from models.network import Network
from models.walk import Given, Skips

RESBLOCK_TYPES = ("ddpm", "biggan")
PROGRESSIVE = ("none", "output_skip", "residual")
PROGRESSIVE_INPUT = ("none", "input_skip", "residual")
PROGRESSIVE_COMBINE = ("sum", "cat")
EMBEDDING_TYPES = ("positional", "fourier")


def resampled(x: Image, way: str, taps: tuple[float, ...] | None) -> Image:
    """x at half ("down") or twice ("up") the size; without taps, means of 2×2 or nearest."""
    if taps is None:
        return {"down": mean_downsample, "up": nearest_upsample}[way](x)
    return {"down": fir_downsample, "up": fir_upsample}[way](x, taps)


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

    @nn.nowrap
    def _resampled(self, x: Image) -> Image:
        return resampled(x, self.resample, self.taps) if self.resample else x


class NCSNpp(PublishedUNet):
    """U-Net with every published option; GroupNorm has min(C/4, 32) groups.

    Attributes:
        resamp_with_conv: as in `PublishedUNet`, with `ddpm` blocks only.
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

    The other fields are those of `PublishedUNet` and of `WalkedUNet`.

    Raises:
        ValueError: a field, or the size of the image, has a value that is not allowed.
    """

    num_res_blocks: int = 4
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

    OPTIONS: ClassVar = Network.OPTIONS | {
        "resblock_type": RESBLOCK_TYPES,
        "progressive": PROGRESSIVE,
        "progressive_input": PROGRESSIVE_INPUT,
        "progressive_combine": PROGRESSIVE_COMBINE,
        "embedding_type": EMBEDDING_TYPES,
    }

    def __post_init__(self) -> None:
        """Check the fields, and that the filter can be normalised."""
        check_taps(self.fir_kernel)
        super().__post_init__()

    @property
    def taps(self) -> tuple[float, ...] | None:
        """The taps of the filter, if resampling filters."""
        return self.fir_kernel if self.fir else None

    @nn.nowrap
    def embedding(self, label: Float[Array, " b"]) -> Embedding:
        """The embedding of the label, shape [B, nf], or [B, 2 nf] for `fourier`."""
        if self.embedding_type == "positional":
            return super().embedding(label)
        scale, trainable = self.fourier_scale, self.trainable_embedding
        return GaussianFourierProjection(self.nf, scale, trainable)(jnp.log(label))

    @nn.nowrap
    def halve(self, trail: Trail, level: int, given: Given) -> Trail:
        """Halve the features and the pyramid of the input, and join the two."""
        h, pyramid = super().halve(trail, level, given)
        if self.progressive_input == "input_skip":
            pyramid = resampled(pyramid, "down", self.taps)
            h = Combine(self.progressive_combine, self.dtype)(pyramid, h)
        elif self.progressive_input == "residual":
            h = pyramid = self._sum(self._convolved(pyramid, "down", h.shape[-1]), h)
        return h, pyramid

    @nn.nowrap
    def up(self, trail: Trail, level: int, skips: Skips, given: Given) -> Trail:
        """Apply the blocks, double the pyramid of the output, if any, and add to it."""
        h, pyramid = super().up(trail, level, skips, given)
        if self.progressive == "output_skip":
            finer = None if pyramid is None else resampled(pyramid, "up", self.taps)
            image = self.to_image(h, given.channels, self.init_scale)
            return h, image if finer is None else finer + image
        if self.progressive == "residual":
            if pyramid is None:
                return h, self.to_image(h, h.shape[-1], 1.0)
            h = pyramid = self._sum(self._convolved(pyramid, "up", h.shape[-1]), h)
        return h, pyramid

    @nn.nowrap
    def image(self, trail: Trail, given: Given) -> Image:
        """Return the pyramid for `output_skip`, otherwise an image made of the features."""
        return trail[1] if self.progressive == "output_skip" else super().image(trail, given)

    @nn.nowrap
    def resampled(self, h: Image, way: str, given: Given) -> Image:
        """Resample in a block of its own kind, or in a layer between `ddpm` blocks."""
        if self.resblock_type == "biggan":
            return self.block(h, h.shape[-1], given, way)
        if self.resamp_with_conv:
            return self._convolved(h, way, h.shape[-1])
        return resampled(h, way, self.taps)

    @nn.nowrap
    def block(self, h: Image, features: int, given: Given, resample: str = "") -> Image:
        """One residual block, which may resample if it is of the kind `biggan`."""
        if self.resblock_type == "ddpm":
            return super().block(h, features, given)
        return rematerialized(ResnetBlockBigGAN, self.remat)(
            features,
            resample,
            self.taps,
            nonlinearity=self.nonlinearity,
            dropout=self.dropout,
            init_scale=self.init_scale,
            skip_rescale=self.skip_rescale,
            dtype=self.dtype,
        )(h, given.cond, given.train)

    @nn.nowrap
    def _convolved(self, x: Image, way: str, features: int) -> Image:
        """Resample with a 3×3 convolution to `features` channels."""
        kind: Callable[..., nn.Module]
        if self.fir:
            kind = {"down": FIRDownsample, "up": FIRUpsample}[way]
            return kind(features, self.fir_kernel, self.dtype)(x)
        kind = {"down": Downsample, "up": Upsample}[way]
        return kind(features=features, dtype=self.dtype)(x)

    @nn.nowrap
    def _sum(self, x: Image, y: Image) -> Image:
        return (x + y) * 0.5**0.5 if self.skip_rescale else x + y
