"""NCSNv2: RefineNets of score_sde that are not told the noise level, for x: [B, H, W, C].

    h_1 … h_S: stages of two residual blocks; all but the first halve, the last two dilate
    r_S = Refine(h_S),  r_i = Refine(h_i, r_{i+1}),  out = conv3×3(act(norm(r_1)))
    Refine: two residual units per input, sum at the size of the first, chained pooling, a unit

The network sees 2x − 1 unless images are centred; the division by σ is the parameterisation
`scaled_score`.
Reference: Song and Ermon 2020, https://arxiv.org/abs/2006.09011, appendix A; Lin et al. 2017,
https://arxiv.org/abs/1611.06612.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Initializer
from jaxtyping import Array, Float

from checks import require
from models.layers import ACTIVATIONS, Image, check_sides, mean_downsample
from models.network import Network
from models.walk import Skips, walk


def fan_in_init(fan_in: int, scale: float = 1.0) -> Initializer:
    """U(−w, w), w² = scale/fan_in, whatever the shape: kernels and biases start alike."""
    bound = math.sqrt(scale / fan_in)
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def conv(
    features: int, channels: int, *, size: int = 3, dilation: int = 1, bias: bool = True
) -> nn.Conv:
    """Convolution of `channels` inputs that keeps height and width."""
    init = fan_in_init(channels * size * size)
    return nn.Conv(
        features, (size, size), kernel_dilation=dilation, use_bias=bias,
        kernel_init=init, bias_init=init,
    )  # fmt: skip


class InstanceNormPlus(nn.Module):
    """γ [(x − μ)/√(v + 10⁻⁵) + α (μ − μ̄)/√(v̄ + 10⁻⁵)] + β, μ and v of each channel.

    μ̄ and v̄ are mean and variance of μ over the channels, so that their relative size survives.
    Reference: Song and Ermon 2019, https://arxiv.org/abs/1907.05600, appendix A.
    """

    @nn.compact
    def __call__(self, x: Image) -> Image:
        """Normalise x: [B, H, W, C]."""
        c = x.shape[-1]
        near_one = lambda key, shape, dtype: 1.0 + 0.02 * jax.random.normal(key, shape, dtype)  # noqa: E731
        alpha, gamma = (self.param(name, near_one, (c,), x.dtype) for name in ("alpha", "gamma"))
        beta = self.param("beta", nn.initializers.zeros, (c,), x.dtype)
        mean = jnp.mean(x, axis=(1, 2), keepdims=True)
        variance = jnp.mean((x - mean) ** 2, axis=(1, 2), keepdims=True)
        centre = jnp.mean(mean, axis=3, keepdims=True)
        spread = jnp.mean((mean - centre) ** 2, axis=3, keepdims=True)
        h = (x - mean) * jax.lax.rsqrt(variance + 1e-5)
        means = (mean - centre) * jax.lax.rsqrt(spread + 1e-5)
        alpha, beta, gamma = (p.reshape(1, 1, 1, c) for p in (alpha, beta, gamma))
        return gamma * (h + alpha * means) + beta


class ResidualBlock(nn.Module):
    """S x + conv(act(norm(conv(act(norm(x)))))); with `down`, halved or, with dilation, not.

    S is the identity, or a convolution where the number of channels changes or `down` asks for it.
    """

    features: int
    down: bool = False
    dilation: int = 1
    activation: str = "elu"

    @nn.compact
    def __call__(self, x: Image) -> Image:
        """Map x: [B, H, W, C] to [B, H or H/2, W or W/2, features]."""
        act, c, rate = ACTIVATIONS[self.activation], x.shape[-1], self.dilation
        halve = self.down and rate == 1
        middle = c if self.down else self.features
        h = conv(middle, c, dilation=rate)(act(InstanceNormPlus()(x)))
        h = act(InstanceNormPlus()(h))
        h = conv(self.features, middle, dilation=rate)(h)
        if self.down or c != self.features:
            x = conv(self.features, c, size=3 if rate > 1 else 1, dilation=rate)(x)
        return mean_downsample(x) + mean_downsample(h) if halve else x + h


def residual_units(x: Image, number: int, act: Callable[[jax.Array], jax.Array]) -> Image:
    """`number` times x + conv(act(conv(act(x)))), without biases; called inside a module."""
    c = x.shape[-1]
    for _ in range(number):
        h = conv(c, c, bias=False)(act(x))
        x = x + conv(c, c, bias=False)(act(h))
    return x


class RefineBlock(nn.Module):
    """Residual units, sum at the size of the first input, chained pooling, residual units."""

    features: int
    end: bool = False
    activation: str = "elu"

    @nn.compact
    def __call__(self, inputs: list[Image]) -> Image:
        """Map images of several sizes to [B, H, W, features], the size of the first."""
        act = ACTIVATIONS[self.activation]
        found = [residual_units(x, 2, act) for x in inputs]
        h = found[0]
        if len(found) > 1:
            b, height, width, _ = inputs[0].shape
            shape = (b, height, width, self.features)
            maps = [conv(self.features, x.shape[-1])(x) for x in found]
            h = sum(jax.image.resize(x, shape, "bilinear") for x in maps)
        h = path = act(h)
        for _ in range(2):
            path = nn.max_pool(path, (5, 5), padding="SAME")
            path = conv(self.features, self.features, bias=False)(path)
            h = h + path
        return residual_units(h, 3 if self.end else 1, act)


class NCSNv2(Network):
    """RefineNet; see the module.

    Attributes:
        nf: channels of the first stage.
        widths: channels of the stages over nf.
        activation: a name in `layers.ACTIVATIONS`.
        centered: images are in [−1, 1]; otherwise the network maps x to 2x − 1.

    The last two stages keep their size, by dilations 2 and 4; those before, but the first, halve.

    Raises:
        ValueError: a field, or the size of the image, has a value that is not allowed.
    """

    nf: int = 128
    widths: tuple[int, ...] = (1, 2, 2, 2)
    activation: str = "elu"
    centered: bool = True

    def __post_init__(self) -> None:
        """Check the fields, and that there are enough stages for both dilations."""
        require(len(self.widths) >= 4, "widths", self.widths, "at least 4 stages")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Image, label: Float[Array, " b"], train: bool = False) -> Image:
        """Map x: [B, H, W, C] to [B, H, W, C]; label and train change nothing.

        Raises:
            ValueError: x is not a batch of images, or H or W cannot be halved by every stage.
        """
        del label, train
        number = len(self.widths)
        check_sides(x.shape, 2 ** (number - 3), "widths", self.widths)
        h = conv(self.nf, x.shape[-1])(x if self.centered else 2.0 * x - 1.0)
        h = ACTIVATIONS[self.activation](InstanceNormPlus()(walk(self, number, h)))
        return conv(x.shape[-1], h.shape[-1])(h).astype(x.dtype)

    @nn.nowrap
    def halve(self, h: Image, level: int) -> Image:
        """Begin a stage with a residual block that halves or dilates."""
        return self._block(level, down=True)(h)

    @nn.nowrap
    def down(self, h: Image, level: int, skips: Skips) -> Image:
        """End the stage with a residual block, the first with two; the skip is their output."""
        for _ in range(1 if level else 2):
            h = self._block(level)(h)
        skips.append(h)
        return h

    @nn.nowrap
    def middle(self, h: Image) -> Image:
        """Nothing stands between the way down and the way up."""
        return h

    @nn.nowrap
    def up(self, h: Image, level: int, skips: Skips) -> Image:
        """Refine the stage with what came from the coarser one; the coarsest is refined alone."""
        stage = skips.pop()
        inputs = [stage, h] if level < len(self.widths) - 1 else [stage]
        return RefineBlock(stage.shape[-1], end=level == 0, activation=self.activation)(inputs)

    @nn.nowrap
    def double(self, h: Image, level: int) -> Image:
        """Leave the size as it is: the next refinement brings its inputs to one size."""
        return h

    @nn.nowrap
    def _block(self, level: int, *, down: bool = False) -> ResidualBlock:
        dilation = max(1, 2 ** (level - len(self.widths) + 3))
        return ResidualBlock(self.nf * self.widths[level], down, dilation, self.activation)


class NCSNv2Deeper(NCSNv2):
    """For 128×128: five stages."""

    widths: tuple[int, ...] = (1, 2, 2, 4, 4)


class NCSNv2Deepest(NCSNv2):
    """For 256×256: six stages."""

    widths: tuple[int, ...] = (1, 2, 2, 2, 4, 4)
