"""Linear measurements y = A x + γ n, n ~ N(0, I), of examples x: [B, *d], in model space.

    inpaint        the coordinates that are not missing           A Aᵀ = I
    colourise      the mean of every pixel over its C channels    A Aᵀ = I/C
    super_resolve  the mean of every block of f × f pixels        A Aᵀ = I/f²
    denoise        x itself                                       A = I
    linear         a matrix times the flattened x

Every row of A lies in the space of examples, so that A⁺ = Aᵀ (A Aᵀ)⁻¹ is a pseudo-inverse; A⁺ y is
the smallest x that explains y, and its picture.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from checks import require
from operators import Batched, standard_normal

Measured = Float[Array, "b *m"]


@dataclasses.dataclass(frozen=True, eq=False)
class Measurement:
    """y = A x + γ n. Subclasses give A and its transpose.

    Attributes:
        shape: of one example x.
        noise: γ, in the units of model space.
    """

    shape: tuple[int, ...]
    noise: float

    def __post_init__(self) -> None:
        require(self.noise >= 0.0, "sampling.noise", self.noise, "0 or more")

    @property
    def measured_shape(self) -> tuple[int, ...]:
        """The shape of one y."""
        raise NotImplementedError

    @property
    def number(self) -> int:
        """The number of coordinates of one y."""
        return math.prod(self.measured_shape)

    @property
    def gram(self) -> float:
        """The number c of A Aᵀ = c I, where there is one."""
        raise NotImplementedError

    def forward(self, x: Batched) -> Measured:
        """Return A x, the measurement without its noise."""
        raise NotImplementedError

    def transpose(self, y: Measured) -> Batched:
        """Return Aᵀ y in the shape of x."""
        raise NotImplementedError

    def pseudo_inverse(self, y: Measured) -> Batched:
        """Return A⁺ y = Aᵀ y/c."""
        return self.transpose(y) / self.gram

    def draw(self, x: Batched, keys: Key[Array, " b"]) -> Measured:
        """Return y = A x + γ n; the noise of example b comes from keys[b]."""
        y = self.forward(x)
        return y + self.noise * standard_normal(keys, y)


@dataclasses.dataclass(frozen=True, eq=False)
class Inpaint(Measurement):
    """y: [B, m], the m coordinates that are not missing.

    Attributes:
        missing: [*d], True where a coordinate is not measured.
    """

    missing: Bool[np.ndarray, "*d"]

    def __post_init__(self) -> None:
        super().__post_init__()
        found, allowed = self.missing.shape, f"True and False of shape {self.shape}"
        require(found == self.shape, "sampling.mask", found, allowed)
        some = bool(self.missing.any()) and not self.missing.all()
        allowed = "one that leaves something out and keeps something"
        require(some, "sampling.mask", f"{self.missing.sum()} of {self.missing.size}", allowed)

    @property
    def places(self) -> np.ndarray:
        """Indices of the known coordinates in the flattened example."""
        return np.flatnonzero(~self.missing)

    @property
    def measured_shape(self) -> tuple[int, ...]:
        """One y has the shape (m,)."""
        return (len(self.places),)

    @property
    def gram(self) -> float:
        """A Aᵀ = I."""
        return 1.0

    def forward(self, x: Batched) -> Measured:
        """Return the coordinates that are not missing."""
        return x.reshape(len(x), -1)[:, self.places]

    def transpose(self, y: Measured) -> Batched:
        """Put y in its places, and 0 elsewhere."""
        flat = jnp.zeros((len(y), self.missing.size), y.dtype).at[:, self.places].set(y)
        return flat.reshape(len(y), *self.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Colourise(Measurement):
    """y: [B, H, W, 1], the mean of the channels of every pixel."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _need_images(self.shape, "colourise")
        allowed = "another task for images of one channel: they are grey"
        require(self.shape[-1] > 1, "sampling.task", "colourise", allowed)

    @property
    def measured_shape(self) -> tuple[int, ...]:
        """One y has the shape (H, W, 1)."""
        return (*self.shape[:-1], 1)

    @property
    def gram(self) -> float:
        """A Aᵀ = I/C."""
        return 1.0 / self.shape[-1]

    def forward(self, x: Batched) -> Measured:
        """Return the mean over the channels."""
        return x.mean(axis=-1, keepdims=True)

    def transpose(self, y: Measured) -> Batched:
        """Put y/C in every channel."""
        return jnp.repeat(y, self.shape[-1], axis=-1) / self.shape[-1]


@dataclasses.dataclass(frozen=True, eq=False)
class SuperResolve(Measurement):
    """y: [B, H/f, W/f, C], the mean of every block of f × f pixels.

    Attributes:
        factor: f, a divisor of H and W.
    """

    factor: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _need_images(self.shape, "super_resolve")
        fits = self.factor >= 2 and all(side % self.factor == 0 for side in self.shape[:2])
        allowed = f"a divisor of both sides of {self.shape[0]}×{self.shape[1]} pixels, at least 2"
        require(fits, "sampling.factor", self.factor, allowed)

    @property
    def measured_shape(self) -> tuple[int, ...]:
        """One y has the shape (H/f, W/f, C)."""
        height, width, channels = self.shape
        return (height // self.factor, width // self.factor, channels)

    @property
    def gram(self) -> float:
        """A Aᵀ = I/f²."""
        return 1.0 / self.factor**2

    def forward(self, x: Batched) -> Measured:
        """Return the mean over every block."""
        height, width, channels = self.measured_shape
        blocks = x.reshape(len(x), height, self.factor, width, self.factor, channels)
        return blocks.mean(axis=(2, 4))

    def transpose(self, y: Measured) -> Batched:
        """Put y/f² in every pixel of its block."""
        rows = jnp.repeat(y, self.factor, axis=1)
        return jnp.repeat(rows, self.factor, axis=2) * self.gram


@dataclasses.dataclass(frozen=True, eq=False)
class Denoise(Measurement):
    """y: [B, *d], x itself with noise."""

    @property
    def measured_shape(self) -> tuple[int, ...]:
        """One y has the shape of x."""
        return self.shape

    @property
    def gram(self) -> float:
        """A Aᵀ = I."""
        return 1.0

    def forward(self, x: Batched) -> Measured:
        """Return x itself, since A is the identity."""
        return x

    def transpose(self, y: Measured) -> Batched:
        """Return y itself, since A is the identity."""
        return y


@dataclasses.dataclass(frozen=True, eq=False)
class Linear(Measurement):
    """y: [B, m] = A x of the flattened x.

    Attributes:
        matrix: A, [m, d], m ≤ d, its rows linearly independent.
    """

    matrix: Float[np.ndarray, "m d"]

    def __post_init__(self) -> None:
        super().__post_init__()
        size, found = math.prod(self.shape), self.matrix.shape
        fits = len(found) == 2 and 1 <= found[0] <= size and found[1] == size
        allowed = f"[m, {size}], 1 <= m <= {size}: one row per measured number"
        require(fits, "sampling.matrix", found, allowed)
        finite = bool(np.isfinite(self.matrix).all())
        rank = int(np.linalg.matrix_rank(self.matrix)) if finite else -1
        allowed = f"{found[0]}, finite and linearly independent rows"
        require(rank == found[0], "the rank of sampling.matrix", rank, allowed)

    @property
    def measured_shape(self) -> tuple[int, ...]:
        """One y has the shape (m,)."""
        return (len(self.matrix),)

    def forward(self, x: Batched) -> Measured:
        """Return A x of the flattened x, [B, m]."""
        return x.reshape(len(x), -1) @ jnp.asarray(self.matrix.T, x.dtype)

    def transpose(self, y: Measured) -> Batched:
        """Return Aᵀ y in the shape of x, [B, *d]."""
        return (y @ jnp.asarray(self.matrix, y.dtype)).reshape(len(y), *self.shape)

    def pseudo_inverse(self, y: Measured) -> Batched:
        """Return A⁺ y = Aᵀ (A Aᵀ)⁻¹ y."""
        inverse = np.linalg.pinv(self.matrix)
        return (y @ jnp.asarray(inverse.T, y.dtype)).reshape(len(y), *self.shape)


def _need_images(shape: tuple[int, ...], task: str) -> None:
    allowed = f"'inpaint', 'denoise' or 'linear' for examples of shape {shape}: it needs images"
    require(len(shape) == 3, "sampling.task", task, allowed)
