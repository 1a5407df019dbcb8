"""Flow++ dequantiser: noise u ∈ (0, 1)^d with a density q(u | x) that depends on the image x.

    ε ~ N(0, I),   (a, b) = columns of ε, even and odd
    couplings:     a, b ← W (g ⊙ · + c),   b ← e^s logit F(b) + τ,   then a and b change places
    u = sigmoid(merged),   log q(u | x) = log N(ε; 0, I) − Σ log |det|

F is the distribution function of a mixture of logistics; its parameters, s and τ come from a
network of a and of the context of x. The logit is log F − log(1 − F) from two log-sum-exps, so its
derivative pdf/(F (1 − F)) is exact in the tails, too (published: F clipped at 1e-7).
Reference: Ho et al. 2019, https://arxiv.org/abs/1902.00275, sections 3 and 4; score_flow.

Two published networks: `shallow` (CIFAR-10) and `deep` (ImageNet 32: weight normalisation,
attention in the context, no W). Scales and biases of the first call standardise the activations of
its batch, so `init` wants a batch of data and noise.
"""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Key

from checks import one_of, positive, require
from models.layers import Image, attention

Halves = tuple[Image, Image]
Step = Callable[[Halves, bool], tuple[Halves, Array]]  # (halves, inverse) → halves, log|det|
PROCESSORS = ("shallow", "deep")
NHWC = ("NHWC", "HWIO", "NHWC")
CONTEXT = 32  # channels of the context, as published
MIN_LOG_SCALE = -7.0
BISECTIONS = 60


def split_columns(x: Image) -> Halves:
    """Split an image into its even and its odd columns."""
    return x[:, :, 0::2], x[:, :, 1::2]


def merge_columns(halves: Halves) -> Image:
    """Undo `split_columns`: put the even and the odd columns in turn."""
    b, h, w, c = halves[0].shape
    return jnp.stack(halves, axis=3).reshape(b, h, 2 * w, c)


def sum_all(x: Float[Array, "b *d"]) -> Float[Array, " b"]:
    """Sum over everything but the batch."""
    return jnp.sum(x, axis=tuple(range(1, x.ndim)))


def channels(values: Float[Array, " c"]) -> Float[Array, "1 1 1 c"]:
    """Shape one number per channel so that it goes with an image or a kernel."""
    return values[None, None, None]


def concat_elu(x: Image) -> Image:
    """Apply elu to [x, −x], which has twice the channels of x."""
    return nn.elu(jnp.concatenate([x, -x], axis=-1))


def gate(x: Image) -> Image:
    """a sigmoid(b) of the two halves of the channels."""
    a, b = jnp.split(x, 2, axis=-1)
    return a * nn.sigmoid(b)


def standardizing_scale(y: Array, axes: tuple[int, ...], size: float = 1.0) -> Array:
    """size/√(variance over `axes` + 1e-6)."""
    return size * jax.lax.rsqrt(jnp.var(y, axis=axes) + 1e-6)


class Affine(nn.Module):
    """x ↦ x * kernel + bias, 1×1 or 3×3; starts with outputs of mean 0 and deviation `size`.

    `normalized`: kernel = gain · direction/‖direction‖ (weight normalisation; Salimans and Kingma
    2016, https://arxiv.org/abs/1602.07868).
    """

    features: int
    side: int = 1
    size: float = 1.0
    normalized: bool = False

    @nn.compact
    def __call__(self, x: Image) -> Image:
        """Map x: [B, H, W, C] to [B, H, W, features]."""
        shape, axes = (self.side, self.side, x.shape[-1], self.features), (0, 1, 2)

        def linear(kernel: Array) -> Image:
            return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=NHWC)

        def draw(key: Key[Array, ""]) -> Array:
            return 0.05 * jax.random.normal(key, shape, x.dtype)

        def scaled(key: Key[Array, ""]) -> Array:
            kernel = draw(key)
            return kernel * channels(standardizing_scale(linear(kernel), axes, self.size))

        if self.normalized:
            direction = self.param("direction", draw)
            unit = direction * channels(jax.lax.rsqrt(jnp.sum(jnp.square(direction), axis=axes)))
            gain = self.param("gain", lambda _: standardizing_scale(linear(unit), axes, self.size))
            kernel = channels(gain) * unit
        else:
            kernel = self.param("kernel", scaled)
        y = linear(kernel)
        bias = self.param("bias", lambda _: -jnp.mean(y, axis=axes))
        return y + channels(bias)


class GatedConv(nn.Module):
    """x + gate(affine(concat_elu(conv(concat_elu(x)) + affine(concat_elu(context)))))."""

    last_side: int
    normalized: bool

    @nn.compact
    def __call__(self, x: Image, context: Image | None = None) -> Image:
        """The shape of x stays."""
        width = x.shape[-1]
        h = Affine(width, 3, normalized=self.normalized, name="first")(concat_elu(x))
        if context is not None:
            h = h + Affine(width, name="context")(concat_elu(context))
        normalized = self.normalized and self.last_side > 1
        last = Affine(2 * width, self.last_side, 0.1, normalized, name="last")
        return x + gate(last(concat_elu(h)))


class GatedAttention(nn.Module):
    """x + gate(affine(attention of `heads` heads over all positions of x + position))."""

    heads: int

    @nn.compact
    def __call__(self, x: Image, position: Float[Array, "h w c"]) -> Image:
        """The shape of x stays."""
        b, h, w, c = x.shape
        mixed = Affine(3 * c, name="first")(x + position[None])
        mixed = mixed.reshape(b, h * w, 3, self.heads, c // self.heads)
        q, k, v = (
            mixed[:, :, i].transpose(0, 2, 1, 3).reshape(b * self.heads, h * w, -1)
            for i in range(3)
        )
        seen = attention(q, k, v).reshape(b, self.heads, h * w, -1).transpose(0, 2, 1, 3)
        return x + gate(Affine(2 * c, size=0.1, name="last")(seen.reshape(b, h, w, c)))


class Block(nn.Module):
    """Gated convolution, layer norm, gated attention, layer norm."""

    heads: int
    last_side: int
    normalized: bool

    @nn.compact
    def __call__(
        self, x: Image, position: Float[Array, "h w c"], context: Image | None = None
    ) -> Image:
        """The shape of x stays."""
        x = GatedConv(self.last_side, self.normalized, name="conv")(x, context)
        x = LayerNorm(name="norm_1")(x)
        x = GatedAttention(self.heads, name="attention")(x, position)
        return LayerNorm(name="norm_2")(x)


class LayerNorm(nn.Module):
    """γ (x − μ)/√(σ² + 1e-5) + β over the channels."""

    @nn.compact
    def __call__(self, x: Image) -> Image:
        """The shape of x stays."""
        gamma = self.param("scale", nn.initializers.ones, x.shape[-1:], x.dtype)
        beta = self.param("bias", nn.initializers.zeros, x.shape[-1:], x.dtype)
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        scaled = centred * jax.lax.rsqrt(variance + 1e-5)
        return scaled * channels(gamma) + channels(beta)


def position_embedding(module: nn.Module, like: Image) -> Float[Array, "h w c"]:
    """A learned vector per position, for a [B, H, W, C] image; called inside a module."""
    init = nn.initializers.normal(0.01)
    return module.param("position", init, like.shape[1:], like.dtype)


class Context(nn.Module):
    """Features of the image x ∈ [0, 1], at half its width."""

    processor: str
    heads: int

    @nn.compact
    def __call__(self, x: Image) -> Image:
        """Map x: [B, H, W, C] to [B, H, W/2, 32]."""
        deep = self.processor == "deep"
        halves = jnp.concatenate(split_columns(x - 0.5), axis=-1)
        h = Affine(CONTEXT, 3, normalized=deep, name="input")(halves)
        if not deep:
            for i in range(3):
                h = GatedConv(3, normalized=False, name=f"conv_{i}")(h)
            return h
        position = position_embedding(self, h)
        for i in range(8):
            h = Block(self.heads, 3, normalized=True, name=f"block_{i}")(h, position)
        return h


class Normalization(nn.Module):
    """x ↦ gain ⊙ x + bias with a gain and a bias per position and channel of each half."""

    @nn.compact
    def __call__(self, halves: Halves, inverse: bool = False) -> tuple[Halves, Array]:
        """The halves and log|det| (one number) of the forward map."""
        out, log_det = [], jnp.zeros((), halves[0].dtype)
        for i, x in enumerate(halves):
            gain = self.param(f"gain_{i}", lambda _, x=x: standardizing_scale(x, (0,)))
            gain = jnp.maximum(gain, 1e-7)
            bias = self.param(f"bias_{i}", lambda _, x=x, g=gain: -jnp.mean(x, axis=0) * g)
            out.append((x - bias[None]) / gain[None] if inverse else x * gain[None] + bias[None])
            log_det = log_det + jnp.sum(jnp.log(gain))
        return (out[0], out[1]), log_det


class Mixing(nn.Module):
    """x ↦ x W over the channels of each half, W near the identity at the start."""

    @nn.compact
    def __call__(self, halves: Halves, inverse: bool = False) -> tuple[Halves, Array]:
        """The halves and log|det| (one number) of the forward map."""
        out, log_det = [], jnp.zeros((), halves[0].dtype)
        for i, x in enumerate(halves):
            c = x.shape[-1]

            def near_identity(key: Key[Array, ""], c: int = c, x: Image = x) -> Array:
                noise = 0.001 * jax.random.normal(key, (c, c), x.dtype)
                return jnp.eye(c, dtype=x.dtype) + noise

            weight = self.param(f"weight_{i}", near_identity)
            out.append(x @ (jnp.linalg.inv(weight) if inverse else weight))
            log_det = log_det + x.shape[1] * x.shape[2] * jnp.linalg.slogdet(weight)[1]
        return (out[0], out[1]), log_det


def logit_mixture(x: Image, logits: Array, means: Array, log_scales: Array) -> tuple[Image, Image]:
    """(logit F(x), its log derivative), F = Σ_k π_k sigmoid((x − μ_k)/s_k); parameters [..., K]."""
    z = (x[..., None] - means) * jnp.exp(-log_scales)
    log_share = jax.nn.log_softmax(logits)
    below = jax.nn.log_sigmoid(z)
    above = below - z  # log sigmoid(−z)
    log_cdf = jax.nn.logsumexp(log_share + below, axis=-1)
    log_survival = jax.nn.logsumexp(log_share + above, axis=-1)
    log_pdf = jax.nn.logsumexp(log_share + below + above - log_scales, axis=-1)
    return log_cdf - log_survival, log_pdf - log_cdf - log_survival


def inverse_logit_mixture(y: Image, logits: Array, means: Array, log_scales: Array) -> Image:
    """x with logit F(x) = y, by bisection.

    The logit of component k is (x − μ_k)/s_k, so x lies between the smallest and the largest
    μ_k + s_k y.
    """
    ends = means + jnp.exp(log_scales) * y[..., None]

    def halve(_: int, bracket: Halves) -> Halves:
        low, high = bracket
        middle = 0.5 * (low + high)
        above = logit_mixture(middle, logits, means, log_scales)[0] > y
        return jnp.where(above, low, middle), jnp.where(above, middle, high)

    start = (jnp.min(ends, axis=-1), jnp.max(ends, axis=-1))
    low, high = jax.lax.fori_loop(0, BISECTIONS, halve, start)
    return 0.5 * (low + high)


class Coupling(nn.Module):
    """b ↦ e^s logit F(b) + τ given a and the context; a stays."""

    filters: int
    components: int
    blocks: int
    heads: int
    processor: str

    @nn.compact
    def __call__(
        self, halves: Halves, context: Image, inverse: bool = False
    ) -> tuple[Halves, Float[Array, " b"]]:
        """The halves and log|det| of the forward map at the point."""
        a, b = halves
        s, tau, mixture = self._parameters(a, context)
        if inverse:
            y = (b - tau) * jnp.exp(-s)
            b = inverse_logit_mixture(y, *mixture)
        logit, log_slope = logit_mixture(b, *mixture)
        moved = b if inverse else jnp.exp(s) * logit + tau
        return (a, moved), sum_all(log_slope + s)

    def _parameters(self, a: Image, context: Image) -> tuple[Image, Image, tuple[Array, ...]]:
        """(s, τ, mixture) of the other half."""
        deep = self.processor == "deep"
        h = Affine(self.filters, 3, normalized=deep, name="input")(a)
        position = position_embedding(self, h)
        for i in range(self.blocks):
            h = Block(self.heads, 1, deep, name=f"block_{i}")(h, position, context)
        h = concat_elu(h) if deep else h
        number = 2 + 3 * self.components
        h = Affine(a.shape[-1] * number, 3, 0.1, deep, name="output")(h)
        h = h.reshape(*a.shape, number)
        logits, means, log_scales = jnp.split(h[..., 2:], 3, axis=-1)
        mixture = (logits, means, jnp.maximum(log_scales, MIN_LOG_SCALE))
        return jnp.tanh(h[..., 0]), h[..., 1], mixture


class Flowpp(nn.Module):
    """The dequantiser; the defaults are those published for CIFAR-10.

    Attributes:
        filters: width of the networks of the couplings.
        components: logistics per dimension.
        blocks: blocks in each coupling.
        heads: of the attention; divides `filters` and 32.
        couplings: an even number, so that both halves are moved equally often.
        processor: shallow | deep.

    Raises:
        ValueError: a field has a value that is not allowed, or the width of the image is odd.
    """

    filters: int = 96
    components: int = 32
    blocks: int = 2
    heads: int = 4
    couplings: int = 4
    processor: str = "shallow"

    def __post_init__(self) -> None:
        """Check the fields, and that the heads divide the channels they share."""
        positive(filters=self.filters, components=self.components, blocks=self.blocks)
        positive(heads=self.heads, couplings=self.couplings)
        one_of("processor", self.processor, PROCESSORS)
        divides = self.filters % self.heads == CONTEXT % self.heads == 0
        require(divides, "heads", self.heads, f"a divisor of filters={self.filters} and {CONTEXT}")
        super().__post_init__()

    @nn.compact
    def __call__(
        self, noise: Image, x: Image, inverse: bool = False
    ) -> tuple[Image, Float[Array, " b"]]:
        """(u, log q(u | x)) of noise ε ~ N(0, I); `inverse`: (ε, log q(u | x)) of u in its place.

        Args:
            noise: ε, or u for the inverse, [B, H, W, C].
            x: the image k/(L − 1) in [0, 1], same shape.
            inverse: the direction.
        """
        fits = x.ndim == 4 and x.shape[2] % 2 == 0
        require(fits, "the shape of the images", x.shape, "[B, H, W, C] with even W")
        context = Context(self.processor, self.heads, name="context")(x)
        steps = list(self._steps(context))
        log_det = jnp.zeros(x.shape[:1], x.dtype)
        logits = jnp.log(noise) - jnp.log1p(-noise) if inverse else noise
        halves = split_columns(logits)
        for step in reversed(steps) if inverse else steps:
            halves, change = step(halves, inverse)
            log_det = log_det + change
        end = merge_columns(halves)
        epsilon, logits = (end, logits) if inverse else (noise, end)
        log_det = log_det + sum_all(2.0 * jax.nn.log_sigmoid(logits) - logits)
        log_noise = sum_all(jax.scipy.stats.norm.logpdf(epsilon))
        return (epsilon if inverse else nn.sigmoid(logits)), log_noise - log_det

    def _steps(self, context: Image) -> Iterable[Step]:
        """The maps of the halves, in order; log|det| is always that of the forward map."""

        def coupled(coupling: Coupling) -> Step:
            return lambda halves, inverse: coupling(halves, context, inverse)

        def swap(halves: Halves, inverse: bool) -> tuple[Halves, Array]:
            del inverse
            return halves[::-1], jnp.zeros((), halves[0].dtype)

        for i in range(self.couplings):
            yield Normalization(name=f"normalization_{i}")
            if self.processor == "shallow":
                yield Mixing(name=f"mixing_{i}")
            coupling = Coupling(
                self.filters, self.components, self.blocks, self.heads, self.processor,
                name=f"coupling_{i}",
            )  # fmt: skip
            yield coupled(coupling)
            yield swap
