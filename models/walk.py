"""The walk through the levels of a U-Net: to the coarsest and back, with skips in between.

    for level = 0 … L − 1:  h = halve(h) unless level = 0,  h = down(h), which keeps skips
    h = middle(h)
    for level = L − 1 … 0:  h = up(h), which takes these skips,  h = double(h) unless level = 0

Level 0 is the finest. Each network defines the five functions; the walk does not look into h.
Reference: Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597.
"""

from typing import Any, NamedTuple, Protocol, TypeVar

from flax import linen as nn
from jaxtyping import Array, Float

from models.conditioning import ContextArray, Kind, beside, contexts
from models.layers import Features, Image, joined, per_coordinate
from models.network import Network

State = TypeVar("State")  # an image, or an image and what travels with it
Skips = list[Image]


class Levels(Protocol[State]):
    """A network that can be walked through; the walk passes `given` on to every function."""

    def halve(self, h: State, level: int, *given: Any) -> State:
        """Enter this level from the finer one, of twice the size."""

    def down(self, h: State, level: int, skips: Skips, *given: Any) -> State:
        """Apply the layers of this level on the way down, and append skips."""

    def middle(self, h: State, *given: Any) -> State:
        """Apply the layers between the way down and the way up."""

    def up(self, h: State, level: int, skips: Skips, *given: Any) -> State:
        """Apply the layers of this level on the way up, and pop the skips that `down` appended."""

    def double(self, h: State, level: int, *given: Any) -> State:
        """Leave this level for the finer one, of twice the size."""


def walk(net: Levels[State], number: int, h: State, *given: Any) -> State:
    """Lead h through `number` levels, down and up; called inside a module."""
    skips: Skips = []
    for level in range(number):
        h = net.halve(h, level, *given) if level else h
        h = net.down(h, level, skips, *given)
    h = net.middle(h, *given)
    for level in reversed(range(number)):
        h = net.up(h, level, skips, *given)
        h = net.double(h, level, *given) if level else h
    return h


class Given(NamedTuple):
    """Arguments of one call that the layers of all levels are given.

    Attributes:
        cond: the embedding of the label, [B, c]; None without conditioning.
        train: whether dropout acts.
        channels: of the output, K numbers for each channel of x.
    """

    cond: Float[Array, "b c"] | None
    train: bool
    channels: int


class WalkedUNet(Network):
    """A U-Net for x: [B, H, W, C].

    A subclass defines the five functions of `Levels`, and besides them `levels`, their number,
    `check_shape` of x, `condition`, the embedding of the label and of the context, which may look
    at x and its features, `stem`, from the image to what travels, and `image`, from what travels to
    the output.

    Attributes:
        dropout: rate, in [0, 1), inside each block.
        dtype: of convolutions and products, `float32` (as the input) or `bfloat16`.
        remat: what the reverse pass computes again, a name in `layers.REMAT`.
        outputs: numbers K per coordinate that a head asks for.
        context: what the contexts are; None: there are none.
    """

    dropout: float = 0.0
    dtype: str = "float32"
    remat: str = "none"
    outputs: int = 1
    context: Kind | None = None

    @nn.compact
    def __call__(
        self,
        x: Image,
        label: Float[Array, " b"],
        train: bool = False,
        features: Features | None = None,
        context: ContextArray | None = None,
    ) -> Array:
        """Map x: [B, H, W, C] and label: [B] to the same shape, or [B, H, W, C, K] for a head.

        `features` are more numbers per coordinate, as input; dropout only if `train`. `context` is
        a class or floats for every example; an image is joined to x by channels.

        Raises:
            ValueError: x is not a batch of images, or H or W cannot be halved by every level.
        """
        self.check_shape(x.shape)
        known = contexts(self.context, context, x)
        cond = self.condition(label, x, features, known, train)
        given = Given(cond, train, x.shape[-1] * self.outputs)
        h = self.stem(beside(joined(self.scaled(x), features), known))
        h = walk(self, self.levels(), h, given)
        return per_coordinate(self.image(h, given), self.outputs).astype(x.dtype)

    @nn.nowrap
    def scaled(self, x: Image) -> Image:
        """The image as the first convolution sees it."""
        return x

    @nn.nowrap
    def middle(self, h: Any, given: Given) -> Any:
        """Nothing stands between the way down and the way up."""
        return h
