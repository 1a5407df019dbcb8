"""Layers shared by the networks; images are [B, H, W, C] and no layer mixes a batch.

    embedding(ℓ) = [sin(ℓ ω_k), cos(ℓ ω_k)],  ω_k = 10000^{−k/(half−1)},  k = 0 … half−1
    attention(q, k, v)_i = Σ_j softmax_j(⟨q_i, k_j⟩ / √C) v_j   over H·W positions, single head
    default_init(s): U(−w, w), w² = 3 s / fan,  fan = (fan_in + fan_out)/2 or fan_out

Sub-modules and leaves (`NIN_0/W`, `Conv_0/kernel`, …) are named as in published JAX checkpoints.
Reference: Ho et al. 2020, https://arxiv.org/abs/2006.11239, appendix B; Song et al. 2021,
https://arxiv.org/abs/2011.13456, appendix H.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from checks import require

Activation = Callable[[jax.Array], jax.Array]
Image = Float[Array, "b h w c"]
Features = Float[Array, "b h w c f"]  # more numbers per coordinate of an image

ACTIVATIONS: dict[str, Activation] = {
    "elu": nn.elu,
    "gelu": nn.gelu,
    "lrelu": functools.partial(nn.leaky_relu, negative_slope=0.2),
    "relu": nn.relu,
    "swish": nn.swish,
}
InitMode = Literal["fan_avg", "fan_out"]
INIT_MODES = get_args(InitMode)
# The type of convolutions and products; parameters, statistics and the output keep their type.
DTYPES: dict[str, DTypeLike | None] = {"float32": None, "bfloat16": jnp.bfloat16}
DOWNSAMPLE_PADDING: dict[str, str | Sequence[tuple[int, int]]] = {
    "same": "SAME",
    "symmetric": ((1, 1), (1, 1)),
}
DROPOUT_SHARED_AXES = {"element": (), "channel": (1, 2)}


def check_sides(shape: tuple[int, ...], divisor: int, field: str, value: object) -> None:
    """Refuse what is no batch of images [B, H, W, C] whose sides are multiples of the divisor.

    Raises:
        FieldError: names the field, and its value, that asks for it.
    """
    fits = len(shape) == 4 and shape[1] % divisor == shape[2] % divisor == 0
    sides = f"images [B, H, W, C] with H and W multiples of {divisor}; these are {shape}"
    require(fits, field, value, sides)


def _convolutions(primitive: Any, *_: Any, **__: Any) -> bool:
    """Policy of `jax.checkpoint`: the values that are kept."""
    return primitive.name == "conv_general_dilated"


# Options of XLA for a program that runs once, such as `init`: to optimise it would take longer.
QUICK = {"xla_backend_optimization_level": 0}
# The reverse pass computes nothing again, or every block, or every block but its convolutions.
REMAT: dict[str, Callable | None] = {
    "none": None,
    "block": jax.checkpoint_policies.nothing_saveable,
    "keep_convs": _convolutions,
}


@functools.cache
def rematerialized(block: type[nn.Module], remat: str) -> type[nn.Module]:
    """The class of a block under a policy of `REMAT`; parameters have the same names under all."""
    if remat == "none":
        return block
    static = (3,) if "train" in block.__call__.__annotations__ else ()
    found = nn.remat(block, static_argnums=static, policy=REMAT[remat])
    found.__name__ = block.__name__
    return found


def default_init(scale: float = 1.0, mode: InitMode = "fan_avg") -> Initializer:
    """U(−w, w) with w² = 3 scale / fan; scale 0 becomes 10⁻¹⁰, so that the layer starts near zero.

    Not exactly zero, as published. fan of a [*k, in, out] kernel: mean of |k| in and |k| out
    (`fan_avg`) or |k| out (`fan_out`).
    """
    return nn.initializers.variance_scaling(scale or 1e-10, mode, "uniform")


def sinusoidal_embedding(label: Float[Array, " b"], dim: int) -> Float[Array, "b dim"]:
    """[sin(ℓ ω_k), cos(ℓ ω_k)], ω_k = 10000^{−k/(half−1)}, half = ⌊dim/2⌋; an odd dim ends with 0.

    Raises:
        ValueError: dim < 4, for which ω is undefined.

    Reference: Ho et al. 2020, https://arxiv.org/abs/2006.11239, appendix B.
    """
    require(dim >= 4, "the dimension of the embedding of the label", dim, "at least 4")
    half = dim // 2
    log_omega = -math.log(10000.0) / (half - 1) * jnp.arange(half, dtype=label.dtype)
    phase = label[:, None] * jnp.exp(log_omega)[None, :]
    embedding = jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=1)
    return jnp.pad(embedding, ((0, 0), (0, dim % 2)))


def embed(
    embedding: Float[Array, "b e"],
    nf: int,
    act: Activation,
    init_mode: InitMode = "fan_avg",
    dtype: str = "float32",
) -> Float[Array, "b 4*nf"]:
    """W_2 act(W_1 embedding + b_1) + b_2, shape [B, 4 nf]; called inside a module."""
    init = default_init(1.0, init_mode)
    first, second = (nn.Dense(4 * nf, kernel_init=init, dtype=DTYPES[dtype]) for _ in range(2))
    return second(act(first(embedding)))


def conv3x3(
    features: int, *, scale: float = 1.0, init_mode: InitMode = "fan_avg", dtype: str = "float32"
) -> nn.Conv:
    """3×3 convolution with bias that keeps height and width."""
    return nn.Conv(
        features, (3, 3), kernel_init=default_init(scale, init_mode), dtype=DTYPES[dtype]
    )


class Dropout(nn.Module):
    """x with elements dropped at rate ⌊256 rate⌋/256, from 8 random bits each.

    Four elements share one call of the generator, which on a CPU costs as much as a convolution.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """x without change unless `train`."""
        threshold = int(256 * self.rate)
        if not train or threshold == 0:
            return x
        words = jax.random.bits(self.make_rng("dropout"), (-(-x.size // 4),), jnp.uint32)
        octets = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)[: x.size]
        kept = jax.lax.optimization_barrier(octets.reshape(x.shape) >= threshold)
        return jnp.where(kept, x * (256.0 / (256 - threshold)), 0.0).astype(x.dtype)


def dropout(rate: float, mode: str = "element") -> nn.Dropout:
    """Dropout of single elements, or of whole channels (one draw for all positions of an image)."""
    return nn.Dropout(rate, broadcast_dims=DROPOUT_SHARED_AXES[mode])


def attention(
    q: Float[Array, "b i c"], k: Float[Array, "b j c"], v: Float[Array, "b j e"]
) -> Float[Array, "b i e"]:
    """Σ_j softmax_j(⟨q_i, k_j⟩ / √C) v_j, the softmax in float32 or better.

    `jax.nn.dot_product_attention` rounds float64 to float32 inside and is no faster on CPU.
    Reference: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, eq. (1).
    """
    exact = jnp.float32 if q.dtype == jnp.bfloat16 else q.dtype
    logits = jnp.einsum("bic,bjc->bij", q, k, preferred_element_type=exact)
    share = nn.softmax(logits * q.shape[-1] ** -0.5, axis=-1)
    return jnp.einsum("bij,bje->bie", share.astype(v.dtype), v)


def joined(x: jax.Array, features: jax.Array | None) -> jax.Array:
    """x: [B, *d] with its features [B, *d, F] as more channels: [B, …, C (1 + F)]."""
    if features is None:
        return x
    flat = features.reshape(*x.shape[:-1], x.shape[-1] * features.shape[-1])
    return jnp.concatenate([x, flat], axis=-1)


def per_coordinate(out: Image, number: int) -> jax.Array:
    """[B, H, W, C K] as [B, H, W, C, K]; as it is for K = 1."""
    return out if number == 1 else out.reshape(*out.shape[:-1], -1, number)


def nearest_upsample(x: Image) -> Float[Array, "b 2*h 2*w c"]:
    """Every pixel becomes a 2×2 block."""
    b, h, w, c = x.shape
    blocks = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c))
    return blocks.reshape(b, 2 * h, 2 * w, c)


def mean_downsample(x: Image) -> Float[Array, "b h//2 w//2 c"]:
    """Mean of every 2×2 block; height and width are even."""
    b, h, w, c = x.shape
    return jnp.mean(x.reshape(b, h // 2, 2, w // 2, 2, c), axis=(2, 4))


def standardize(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """(x − μ) / √(σ² + 10⁻⁶), μ and σ² the mean and the variance over `axes`.

    The variance is that of x − μ and not E[x²] − μ², which cancels where |μ| ≫ σ and has to be
    clipped at 0: every derivative exists, and is as accurate as the value.
    """
    centred = x - jnp.mean(x, axis=axes, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=axes, keepdims=True)
    return centred * jax.lax.rsqrt(variance + 1e-6)


class GroupNorm(nn.Module):
    """γ standardize(x) + β, statistics over the positions and the adjacent channels of a group.

    Flax's layer of this name cannot run in float64 under strict promotion: it promotes to float32
    or, told not to, rounds γ and β to float32. Statistics and affine map are float32 (float64 for
    such x); the result has the type of x. Leaves scale: [C] and bias: [C].
    Reference: Wu and He 2018, https://arxiv.org/abs/1803.08494.
    """

    num_groups: int | None = 32  # None: min(C/4, 32)

    @nn.compact
    def __call__(self, x: Image) -> Image:
        """Normalise x: [B, H, W, C].

        Raises:
            ValueError: the number of groups does not divide C.
        """
        b, h, w, c = x.shape
        num_groups = min(max(c // 4, 1), 32) if self.num_groups is None else self.num_groups
        require(c % num_groups == 0, "num_groups", num_groups, f"a divisor of {c} channels (nf)")
        gamma = self.param("scale", nn.initializers.ones, (c,))
        beta = self.param("bias", nn.initializers.zeros, (c,))
        y, gamma, beta = promote_dtype(x, gamma, beta)
        groups = y.reshape(b, h, w, num_groups, c // num_groups)
        y = standardize(groups, axes=(1, 2, 4)).reshape(x.shape)
        return (y * gamma.reshape(1, 1, 1, c) + beta.reshape(1, 1, 1, c)).astype(x.dtype)


class NIN(nn.Module):
    """Affine map of the last axis (1×1 convolution): x W + b, W: [in, out], b: [out].

    The leaves are called W and b, as in the published checkpoints.
    """

    features: int
    scale: float = 0.1
    init_mode: InitMode = "fan_avg"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b features"]:
        """Map x: [..., in] to [..., out]."""
        init = default_init(self.scale, self.init_mode)
        weight = self.param("W", init, (x.shape[-1], self.features))
        bias = self.param("b", nn.initializers.zeros, (self.features,))
        x, weight, bias = promote_dtype(x, weight, bias, dtype=DTYPES[self.dtype])
        return x @ weight + bias.reshape((1,) * (x.ndim - 1) + (-1,))


class AttnBlock(nn.Module):
    """x + NIN(attention(q, k, v)), (q, k, v) = NIN(GroupNorm(x)); /√2 if `skip_rescale`.

    Single head over the H·W positions; the last NIN starts near zero if init_scale = 0.
    """

    num_groups: int | None = 32
    projection_scale: float = 0.1
    init_mode: InitMode = "fan_avg"
    init_scale: float = 0.0
    skip_rescale: bool = False
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Image) -> Image:
        """Let every position of an image look at all others; the shape of x: [B, H, W, C] stays."""
        b, h, w, c = x.shape
        u = GroupNorm(self.num_groups)(x).reshape(b, h * w, c)
        mode, dtype = self.init_mode, self.dtype
        q, k, v = (NIN(c, self.projection_scale, mode, dtype)(u) for _ in range(3))
        u = NIN(c, self.init_scale, mode, dtype)(attention(q, k, v)).reshape(b, h, w, c)
        return (x + u) * 0.5**0.5 if self.skip_rescale else x + u


class Downsample(nn.Module):
    """Halve height and width: a strided 3×3 convolution, or the mean of 2×2 blocks.

    padding `same` pads (0, 1) on an even size, `symmetric` pads (1, 1): the kernels are centred on
    the odd or on the even pixels.
    """

    with_conv: bool = True
    padding: str = "same"
    init_mode: InitMode = "fan_avg"
    features: int | None = None  # of the convolution; None: as x
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Image) -> Image:
        """Map x: [B, H, W, C] to [B, H/2, W/2, features]."""
        if not self.with_conv:
            return mean_downsample(x)
        return nn.Conv(
            self.features or x.shape[-1],
            (3, 3),
            strides=2,
            padding=DOWNSAMPLE_PADDING[self.padding],
            kernel_init=default_init(1.0, self.init_mode),
            dtype=DTYPES[self.dtype],
        )(x)


class Upsample(nn.Module):
    """Double height and width: nearest neighbour, then a 3×3 convolution if `with_conv`."""

    with_conv: bool = True
    init_mode: InitMode = "fan_avg"
    features: int | None = None  # of the convolution; None: as x
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Image) -> Image:
        """Map x: [B, H, W, C] to [B, 2H, 2W, features]."""
        h = nearest_upsample(x)
        if not self.with_conv:
            return h
        return conv3x3(
            self.features or x.shape[-1], init_mode=self.init_mode, dtype=self.dtype
        )(h)  # fmt: skip
