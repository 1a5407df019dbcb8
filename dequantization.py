"""Integers k ∈ {0..L−1} to the reals the model sees, and nats back to bits per dimension.

    w = (k + u)/L, u ~ U[0, 1)        y = w | 2w − 1 | logit(a + (1 − 2a) w)
    bits/dim = −log p(y)/(d ln 2) + log2 L − Σ log2|dy/dw|/d

The only file that knows the number of levels L. A uniform density on the unit cube has log2 L
bits/dim.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt8

from operators import Batched, PerExample, dimension, inner, uniform

Images = UInt8[Array, "b *d"]


@dataclasses.dataclass(frozen=True)
class Pixels:
    """Quantised data: y in [0, 1], in [−1, 1] (`centered`) or on the real line (`logit`).

    Reference: Dinh et al. 2017, https://arxiv.org/abs/1605.08803, section 4.1 (logit); Uria et al.
    2013.
    """

    levels: int
    centered: bool = True
    logit: bool = False
    dequantize_uniformly: bool = True
    logit_alpha: float = 0.05

    unit = "bits/dim"

    def __post_init__(self) -> None:
        if not 2 <= self.levels <= 256:
            raise ValueError(f"data.levels={self.levels}: need 2 <= levels <= 256")
        if self.centered and self.logit:
            raise ValueError(
                "data.centered=True with data.logit=True: the logit starts from [0, 1]; choose one"
            )
        if self.logit and not self.dequantize_uniformly:
            raise ValueError("data.logit=True needs data.uniform_dequantization=True")

    def encode(self, image: Images, keys: Key[Array, " b"]) -> Batched:
        """Model-space y of images, with fresh dequantisation noise from one key per example."""
        if not self.dequantize_uniformly:
            return self.from_unit(image.astype(jnp.float32) / (self.levels - 1))
        return self.encode_with_noise(image, uniform(keys, image.astype(jnp.float32)))

    def encode_with_noise(self, image: Images, u: Batched) -> Batched:
        """Model-space y of images for given noise u ∈ [0, 1)."""
        return self.from_unit((image.astype(u.dtype) + u) / self.levels)

    def from_unit(self, w: Batched) -> Batched:
        """[0, 1] to model space."""
        if self.logit:
            s = self.logit_alpha + (1.0 - 2.0 * self.logit_alpha) * w
            return jnp.log(s) - jnp.log1p(-s)
        return 2.0 * w - 1.0 if self.centered else w

    def to_unit(self, y: Batched) -> Batched:
        """Inverse of `from_unit`, not clipped."""
        if self.logit:
            return (jax.nn.sigmoid(y) - self.logit_alpha) / (1.0 - 2.0 * self.logit_alpha)
        return 0.5 * (y + 1.0) if self.centered else y

    def log_det(self, y: Batched) -> PerExample:
        """log|dy/dw| summed over dimensions, in nats: d ln 2 when centred, 0 on [0, 1]."""
        if self.logit:
            # s(1 − s) = sigmoid(y) sigmoid(−y)
            log_slope = jax.nn.log_sigmoid(y) + jax.nn.log_sigmoid(-y)
            constant = dimension(y) * math.log1p(-2.0 * self.logit_alpha)
            return constant - inner(log_slope, jnp.ones_like(y))
        return jnp.full(y.shape[:1], dimension(y) * math.log(2.0) * self.centered, y.dtype)

    def negative_log_likelihood(self, log_p: PerExample, y: Batched) -> PerExample:
        """bits/dim of the integers, from the log density (nats) of y in model space."""
        log_p_unit = log_p + self.log_det(y)
        return -log_p_unit / (dimension(y) * math.log(2.0)) + math.log2(self.levels)

    def decode(self, y: Batched) -> Images:
        """Nearest cell of {0..L−1}, clipped: ⌊L w⌋ (with noise-free encoding round((L − 1) w))."""
        w = self.to_unit(y)
        if self.dequantize_uniformly:
            k = jnp.floor(self.levels * w)
        else:
            k = jnp.round((self.levels - 1) * w)
        return jnp.clip(k, 0, self.levels - 1).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True)
class Reals:
    """Real-valued data: nothing to dequantise, results in nats per example."""

    unit = "nats"

    def encode(self, image: Float[Array, "b *d"], keys: Key[Array, " b"]) -> Batched:
        """The data themselves."""
        del keys
        return image

    def negative_log_likelihood(self, log_p: PerExample, y: Batched) -> PerExample:
        """−log p in nats."""
        del y
        return -log_p

    def decode(self, y: Batched) -> Batched:
        """The data themselves."""
        return y


Encoding = Pixels | Reals
