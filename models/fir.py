"""Resampling by two through a finite impulse response, for x: [B, H, W, C].

    down: keep each second pixel of f ∗ x       up: 4 f ∗ (x with zeros between its pixels)
    f = taps ⊗ taps / (Σ taps)²;  [1, 3, 3, 1] removes what the coarser grid would alias

Each with a 3×3 convolution on the coarse side of the filter, if asked for. Borders are padded with
zeros. The filters are sums of shifted images: derivatives of every order cost what values cost.
Reference: Karras et al. 2020, https://arxiv.org/abs/1912.04958, appendix B; Zhang 2019,
https://arxiv.org/abs/1904.11486.
"""

import functools
import operator

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float

from checks import require
from models.layers import DTYPES, Image, default_init

Taps = tuple[float, ...]


def check_taps(taps: Taps) -> None:
    """Refuse a filter that cannot be normalised.

    Raises:
        FieldError: fewer than two taps, or a sum that is not positive.
    """
    fits = len(taps) >= 2 and sum(taps) > 0
    require(fits, "fir_kernel", taps, "two taps or more, of positive sum")


def filtered(
    x: Image, taps: Taps, pad: tuple[int, int], *, up: int = 1, down: int = 1, gain: float = 1.0
) -> Float[Array, "b i j c"]:
    """gain² f ∗ x: up − 1 zeros after each pixel, padding, filter, each down-th pixel."""
    zero, scale = jnp.zeros((), x.dtype), gain / sum(taps)
    for axis in (1, 2):
        padding = [(0, 0, 0)] * 4
        padding[axis] = (pad[0], pad[1] + up - 1, up - 1)
        x = jax.lax.pad(x, zero, padding)
        length = (x.shape[axis] - len(taps)) // down + 1
        stops = [k + down * (length - 1) + 1 for k in range(len(taps))]
        parts = [
            jax.lax.slice_in_dim(x, k, stop, stride=down, axis=axis) for k, stop in enumerate(stops)
        ]
        terms = (scale * tap * part for tap, part in zip(reversed(taps), parts, strict=True))
        x = functools.reduce(operator.add, terms)
    return x


def fir_downsample(x: Image, taps: Taps) -> Float[Array, "b h//2 w//2 c"]:
    """Halve height and width."""
    extra = len(taps) - 2
    return filtered(x, taps, ((extra + 1) // 2, extra // 2), down=2)


def fir_upsample(x: Image, taps: Taps) -> Float[Array, "b 2*h 2*w c"]:
    """Double height and width."""
    extra = len(taps) - 2
    return filtered(x, taps, ((extra + 1) // 2 + 1, extra // 2), up=2, gain=2.0)


class FIRDownsample(nn.Module):
    """Filter, then a 3×3 convolution of stride 2 to `features` channels."""

    features: int
    taps: Taps
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Image) -> Float[Array, "b h//2 w//2 features"]:
        """Map x: [B, H, W, C] to [B, H/2, W/2, features]."""
        extra = len(self.taps)
        h = filtered(x, self.taps, ((extra + 1) // 2, extra // 2))
        return nn.Conv(
            self.features,
            (3, 3),
            strides=2,
            padding="VALID",
            kernel_init=default_init(),
            dtype=DTYPES[self.dtype],
        )(h)


class FIRUpsample(nn.Module):
    """A 3×3 convolution of x with zeros between its pixels, filter, bias."""

    features: int
    taps: Taps
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Image) -> Float[Array, "b 2*h 2*w features"]:
        """Map x: [B, H, W, C] to [B, 2H, 2W, features]."""
        h = nn.Conv(
            self.features,
            (3, 3),
            padding=((2, 2), (2, 2)),
            input_dilation=2,
            use_bias=False,
            kernel_init=default_init(),
            dtype=DTYPES[self.dtype],
        )(x)
        extra = len(self.taps) - 4
        h = filtered(h, self.taps, ((extra + 1) // 2 + 1, extra // 2 + 1), gain=2.0)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        h, bias = promote_dtype(h, bias, dtype=DTYPES[self.dtype])
        return h + bias.reshape(1, 1, 1, -1)
