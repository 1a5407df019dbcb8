"""A classifier of noised examples, p(c | x_t): the gradient of its logarithm guides samples.

    points   h = W x,  then `depth` residual blocks;                         logits = W_out h
    images   h = conv3×3(x), then `depth` levels of a residual block and a strided convolution that
             halves the size and adds half of `width` channels;              logits = W_out mean(h)

All blocks are modulated by the embedding of the label of the time, as those of `mlp` and `unet`.
The output starts near zero: at first all classes have the same probability.
Reference: Dhariwal and Nichol 2021, https://arxiv.org/abs/2105.05233, section 4 (a classifier of
x_t, of the downsampling half of a U-Net).
"""

import flax.linen as nn
from jaxtyping import Array, Float

from checks import positive, rate
from models.layers import ACTIVATIONS, conv3x3, default_init, sinusoidal_embedding, standardize
from models.mlp import ResidualBlock
from models.unet import ModulatedBlock

EMBED_DIM = 64
ACTIVATION = "swish"


class TimeClassifier(nn.Module):
    """Logits of the classes of x_t: images [B, H, W, C], or any other shape [B, *d], flattened.

    Attributes:
        classes: their number.
        width: of the first layer.
        depth: number of residual blocks.
        dropout: rate, in [0, 1), inside each block.

    Raises:
        ValueError: a field has a value that is not allowed.
    """

    classes: int
    width: int = 64
    depth: int = 3
    dropout: float = 0.1

    def __post_init__(self) -> None:
        """Check that every field has an allowed value."""
        super().__post_init__()
        positive(classes=self.classes, width=self.width, depth=self.depth)
        rate("dropout", self.dropout)

    @nn.compact
    def __call__(
        self, x: Float[Array, "b *d"], label: Float[Array, " b"], train: bool = False
    ) -> Float[Array, "b classes"]:
        """Map x_t and the label of its time to logits; dropout only if `train`."""
        act = ACTIVATIONS[ACTIVATION]
        cond = act(nn.Dense(EMBED_DIM)(sinusoidal_embedding(label, EMBED_DIM)))
        cond = act(nn.Dense(EMBED_DIM)(cond))
        h = self._of_image(x, cond, train) if x.ndim == 4 else self._of_points(x, cond, train)
        return nn.Dense(self.classes, kernel_init=default_init(0.0), name="logits")(act(h))

    @nn.nowrap
    def _of_points(self, x: Array, cond: Array, train: bool) -> Float[Array, "b width"]:
        h = nn.Dense(self.width)(x.reshape(x.shape[0], -1))
        for _ in range(self.depth):
            h = ResidualBlock(self.dropout, ACTIVATION)(h, cond, train)
        return standardize(h, axes=(1,))

    @nn.nowrap
    def _of_image(self, x: Array, cond: Array, train: bool) -> Float[Array, "b f"]:
        h = conv3x3(self.width)(x)
        for level in range(self.depth):
            h = ModulatedBlock(self.dropout, ACTIVATION, "float32")(h, cond, train)
            if level < self.depth - 1 and min(h.shape[1:3]) > 1:
                h = nn.Conv(h.shape[-1] + self.width // 2, (2, 2), strides=2)(h)
        return standardize(h, axes=(3,)).mean(axis=(1, 2))
