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

from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from checks import require
from models.conditioning import ContextArray, plus_context
from models.layers import (
    ACTIVATIONS,
    DOWNSAMPLE_PADDING,
    DROPOUT_SHARED_AXES,
    DTYPES,
    INIT_MODES,
    NIN,
    AttnBlock,
    Downsample,
    Features,
    GroupNorm,
    Image,
    InitMode,
    Upsample,
    check_sides,
    conv3x3,
    default_init,
    dropout,
    embed,
    rematerialized,
    sinusoidal_embedding,
)
from models.network import Network
from models.walk import Given, Skips, WalkedUNet

UP_ATTENTION = ("every", "last")
PROJECTION_SCALE = {"fan_avg": 0.1, "fan_out": 1.0}  # of the 1×1 maps, as each form was published

Embedding = Float[Array, "b e"]
Trail = tuple[Image, Image | None]  # (features, pyramid)


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
    init_mode: InitMode = "fan_avg"
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


class PublishedUNet(WalkedUNet):
    """The walk of Ho et al., of which `DDPM` and `NCSNpp` are forms.

    What travels is (h, pyramid): the features, and the pyramid of NCSN++ at their size, which is
    that of the input on the way down and that of the output on the way up.

    Attributes:
        nf: channels of the first level; the embedding of the label has nf, then 4 nf components.
        ch_mult: channels of level i are nf · ch_mult[i]; each level halves the size.
        num_res_blocks: residual blocks of a level on the way down (one more on the way up).
        attn_resolutions: heights of feature maps, in pixels, that have attention.
        resamp_with_conv: resample with 3×3 convolutions, else mean and nearest neighbour.
        conditional: False ignores the label.
        nonlinearity: a name in `layers.ACTIVATIONS`.
        centered: images are in [−1, 1]; otherwise the network maps x to 2x − 1.
    """

    nf: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = (16,)
    resamp_with_conv: bool = True
    conditional: bool = True
    nonlinearity: str = "swish"
    centered: bool = True

    # Each of these is a field of one of the two forms; the other form has this value.
    num_groups: ClassVar[int | None] = None
    up_attention: ClassVar[str] = "last"
    init_mode: ClassVar[InitMode] = "fan_avg"
    dropout_mode: ClassVar[str] = "element"
    init_scale: ClassVar[float] = 0.0
    skip_rescale: ClassVar[bool] = False

    @nn.nowrap
    def levels(self) -> int:
        """The number of levels."""
        return len(self.ch_mult)

    @nn.nowrap
    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Refuse images that cannot be halved by all levels but the last."""
        check_sides(shape, 2 ** (self.levels() - 1), "ch_mult", self.ch_mult)

    @nn.nowrap
    def scaled(self, x: Image) -> Image:
        """Bring the image into [−1, 1]."""
        return x if self.centered else 2.0 * x - 1.0

    @nn.nowrap
    def condition(
        self,
        label: Float[Array, " b"],
        x: Image,
        features: Features | None,
        context: ContextArray | None,
        train: bool,
    ) -> Embedding | None:
        """Embed label, W_2 act(W_1 embedding(label) + b_1) + b_2, and context: [B, 4 nf]."""
        if not self.conditional and (context is None or context.ndim > 2):
            return None
        if not self.conditional:
            cond = jnp.zeros((x.shape[0], 4 * self.nf), x.dtype)
        else:
            embedding, act = self.embedding(label).astype(x.dtype), ACTIVATIONS[self.nonlinearity]
            cond = embed(embedding, self.nf, act, self.init_mode, self.dtype)
        return plus_context(cond, self.context, context, self.nonlinearity)

    @nn.nowrap
    def embedding(self, label: Float[Array, " b"]) -> Embedding:
        """The sinusoidal embedding of the label, shape [B, nf]."""
        return sinusoidal_embedding(label, self.nf)

    @nn.nowrap
    def stem(self, seen: Image) -> Trail:
        """The first convolution, and the image as its pyramid."""
        return conv3x3(self.nf, init_mode=self.init_mode, dtype=self.dtype)(seen), seen

    @nn.nowrap
    def halve(self, trail: Trail, level: int, given: Given) -> Trail:
        """Halve the features and leave the pyramid as it is."""
        return self.resampled(trail[0], "down", given), trail[1]

    @nn.nowrap
    def down(self, trail: Trail, level: int, skips: Skips, given: Given) -> Trail:
        """Apply the blocks; the skips are what enters the level and the output of every block."""
        h, pyramid = trail
        skips.append(h)
        for _ in range(self.num_res_blocks):
            h = self.attended(self.block(h, self.nf * self.ch_mult[level], given))
            skips.append(h)
        return h, pyramid

    @nn.nowrap
    def middle(self, trail: Trail, given: Given) -> Trail:
        """Apply a block, attention and a block; the pyramid of the output is still missing."""
        features = trail[0].shape[-1]
        h = self.attention()(self.block(trail[0], features, given))
        return self.block(h, features, given), None

    @nn.nowrap
    def up(self, trail: Trail, level: int, skips: Skips, given: Given) -> Trail:
        """Apply one block to every skip, the last first, joined with the features."""
        h, pyramid = trail
        for number in range(self.num_res_blocks + 1):
            h = jnp.concatenate([h, skips.pop()], axis=-1)
            h = self.block(h, self.nf * self.ch_mult[level], given)
            if self.up_attention == "every" or number == self.num_res_blocks:
                h = self.attended(h)
        return h, pyramid

    @nn.nowrap
    def double(self, trail: Trail, level: int, given: Given) -> Trail:
        """Double the features and leave the pyramid as it is."""
        return self.resampled(trail[0], "up", given), trail[1]

    @nn.nowrap
    def image(self, trail: Trail, given: Given) -> Image:
        """Make the output, an image of K times the channels of x, from the features."""
        return self.to_image(trail[0], given.channels, self.init_scale)

    @nn.nowrap
    def to_image(self, h: Image, channels: int, scale: float) -> Image:
        """Map the features to an image: conv3×3(act(GroupNorm(h)))."""
        h = ACTIVATIONS[self.nonlinearity](GroupNorm(self.num_groups)(h))
        return conv3x3(channels, scale=scale, init_mode=self.init_mode)(h)

    @nn.nowrap
    def block(self, h: Image, features: int, given: Given) -> Image:
        """Apply one residual block to the features."""
        return rematerialized(ResnetBlockDDPM, self.remat)(
            features,
            nonlinearity=self.nonlinearity,
            num_groups=self.num_groups,
            dropout=self.dropout,
            dropout_mode=self.dropout_mode,
            init_mode=self.init_mode,
            init_scale=self.init_scale,
            skip_rescale=self.skip_rescale,
            dtype=self.dtype,
        )(h, given.cond, given.train)

    @nn.nowrap
    def attention(self) -> nn.Module:
        """Make a block of attention."""
        return rematerialized(AttnBlock, self.remat)(
            self.num_groups,
            PROJECTION_SCALE[self.init_mode],
            self.init_mode,
            self.init_scale,
            self.skip_rescale,
            self.dtype,
        )

    @nn.nowrap
    def attended(self, h: Image) -> Image:
        """h after attention, at the sizes that have it."""
        return self.attention()(h) if h.shape[1] in self.attn_resolutions else h


class DDPM(PublishedUNet):
    """U-Net with residual blocks, attention at some resolutions, and the label's embedding.

    Attributes:
        num_groups: groups of every GroupNorm; divides the channels of every level.
        up_attention: on the way up, attention after `every` block or after the `last` of a level.
        downsample_padding: of the strided convolution, `same` (0, 1) or `symmetric` (1, 1).
        init_mode: `fan_avg` or `fan_out`, see `layers.default_init`; `fan_avg` starts the 1×1 maps
            with scale 0.1, `fan_out` with 1.
        dropout_mode: drop every `element` on its own, or a whole `channel` of an image.

    The other fields are those of `PublishedUNet` and of `WalkedUNet`.

    Raises:
        ValueError: a field, or the size of the image, has a value that is not allowed.
    """

    num_groups: int = 32
    up_attention: str = "last"
    downsample_padding: str = "same"
    init_mode: InitMode = "fan_avg"
    dropout_mode: str = "element"

    OPTIONS: ClassVar = Network.OPTIONS | {
        "up_attention": UP_ATTENTION,
        "downsample_padding": DOWNSAMPLE_PADDING,
        "init_mode": INIT_MODES,
        "dropout_mode": DROPOUT_SHARED_AXES,
    }

    def __post_init__(self) -> None:
        """Check the fields, and that GroupNorm can divide the channels of every level."""
        super().__post_init__()
        for channels in (self.nf, *(self.nf * mult for mult in self.ch_mult)):
            fits = channels % self.num_groups == 0  # the skips' channels are sums of these
            allowed = f"a divisor of {channels} channels, from nf and ch_mult"
            require(fits, "num_groups", self.num_groups, allowed)

    @nn.nowrap
    def resampled(self, h: Image, way: str, given: Given) -> Image:
        """h at half ("down") or twice ("up") the size."""
        if way == "up":
            return Upsample(self.resamp_with_conv, self.init_mode, dtype=self.dtype)(h)
        padding = self.downsample_padding
        return Downsample(self.resamp_with_conv, padding, self.init_mode, dtype=self.dtype)(h)
