"""Data to the reals the model sees, and nats back to bits per dimension or per unit of the data.

Integers k ∈ {0..L−1}:

    w = (k + u)/L, u ∈ [0, 1)^d       y = w | 2w − 1 | logit(a + (1 − 2a) w)
    −log P(k) ≤ E_q[log q(y | k) − log p(y)],   q uniform, variational or truncated normal
    bits/dim = (log q(y | k) − log p(y))/(d ln 2)

Real values may be standardised, noised in cells of a known width and mapped from a range to the
whole line: `Reals`, in nats.

The only file that knows the number of levels L. A uniform density on the unit cube has log2 L
bits/dim under uniform q.
"""

import dataclasses
import math
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, Shaped, UInt8

from checks import require
from models.flowpp import Flowpp
from models.layers import QUICK
from operators import Batched, PerExample, dimension, inner, squared_norm, standard_normal, uniform
from standardization import Affine, Range

Images = UInt8[Array, "b *d"]
Params = Any


class Draw(NamedTuple):
    """A point of model space for given data, and the log density q it was drawn from, in nats."""

    x: Batched
    log_q: PerExample


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
        require(2 <= self.levels <= 256, "data.levels", self.levels, "2 <= levels <= 256")
        both = self.centered and self.logit
        allowed = "False with data.logit=True: the logit starts from [0, 1]"
        require(not both, "data.centered", self.centered, allowed)
        fits = self.dequantize_uniformly or not self.logit
        allowed = "True with data.logit=True"
        require(fits, "data.uniform_dequantization", self.dequantize_uniformly, allowed)

    def encode(self, image: Images, keys: Key[Array, " b"]) -> Batched:
        """Model-space y of images, with fresh dequantisation noise from one key per example."""
        if not self.dequantize_uniformly:
            return self.from_unit(image.astype(jnp.float32) / (self.levels - 1))
        return self.encode_with_noise(image, uniform(keys, image.astype(jnp.float32)))

    def encode_with_noise(self, image: Images, u: Batched) -> Batched:
        """Model-space y of images for given noise u ∈ [0, 1)."""
        return self.from_unit((image.astype(u.dtype) + u) / self.levels)

    @overload
    def from_unit(self, w: Batched) -> Batched: ...
    @overload
    def from_unit(self, w: float) -> Batched | float: ...
    def from_unit(self, w: Batched | float) -> Batched | float:
        """[0, 1] to model space; a number, such as an end of the range, stays one."""
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

    def draw(self, image: Images, keys: Key[Array, " b"]) -> Draw:
        """y of uniform noise."""
        return self.draw_of_noise(image, uniform(keys, image.astype(jnp.float32)))

    def draw_of_noise(self, image: Images, u: Batched, log_q: PerExample | float = 0.0) -> Draw:
        """y of noise u ∈ [0, 1]^d that has log density `log_q` given the image."""
        y = self.encode_with_noise(image, u)
        return Draw(y, log_q + self.uniform_log_q(y))

    def uniform_log_q(self, y: Batched) -> PerExample:
        """log q(y | k) of uniform noise: d log L − log|dy/dw|."""
        return dimension(y) * math.log(self.levels) - self.log_det(y)

    def moments_of_cells(self) -> tuple[np.ndarray, np.ndarray]:
        """E[y | k] and Var[y | k] of uniform noise for k = 0, …, L − 1, float64 [L].

        By Gauss–Legendre nodes: exact without logit, where they are the centre of the cell and
        (2 half_cell)²/12.
        """
        nodes, weights = np.polynomial.legendre.leggauss(16)
        w = (np.arange(self.levels)[:, None] + 0.5 * (nodes + 1.0)) / self.levels
        with jax.enable_x64(True):
            y = np.asarray(self.from_unit(jnp.asarray(w)))
        mean = 0.5 * y @ weights
        return mean, 0.5 * (y - mean[:, None]) ** 2 @ weights

    def truncated_normal_draw(
        self, image: Images, keys: Key[Array, " b"], alpha: float, sigma: float
    ) -> Draw:
        """x = α y_k + σ z, z ~ N(0, I) truncated to |z_i| ≤ τ: the noised image, within its cell.

        y_k is the centre of the cell of k, τ = α h/σ with h its half-width; without uniform
        dequantisation in training the cells are those around k/(L − 1).
        Reference: Zheng et al. 2023, https://arxiv.org/abs/2305.03935, section 4.1.

        Raises:
            ValueError: logit data, whose cells are not α-scaled copies of each other.
        """
        allowed = (
            "'uniform' or 'variational' with data.logit=True: the noise of the diffusion cannot "
            "stand in for that of the cells"
        )
        require(not self.logit, "eval.dequantization", "tn", allowed)
        tau = alpha * self.half_cell / sigma

        def truncated(key: Key[Array, ""]) -> Array:
            return jax.random.truncated_normal(key, -tau, tau, image.shape[1:], jnp.float32)

        z, k = jax.vmap(truncated)(keys), image.astype(jnp.float32)
        center = (k + 0.5) / self.levels if self.dequantize_uniformly else k / (self.levels - 1)
        log_mass = math.log(sigma) + 0.5 * math.log(2 * math.pi) + math.log(math.erf(tau / 2**0.5))
        x = alpha * self.from_unit(center) + sigma * z
        return Draw(x, -0.5 * squared_norm(z) - dimension(x) * log_mass)

    @property
    def half_cell(self) -> float:
        """Half the width of a cell in model space."""
        cells = self.levels if self.dequantize_uniformly else self.levels - 1
        return (1.0 if self.centered else 0.5) / cells

    def negative_log_likelihood(
        self, log_weight: PerExample, x: Shaped[Array, "b *d"]
    ) -> PerExample:
        """bits/dim of the integers, from log p(x) − log q(x | k) in nats."""
        return -log_weight / (dimension(x) * math.log(2.0))

    def decode(self, y: Batched) -> Images:
        """Nearest cell of {0..L−1}, clipped: ⌊L w⌋ (with noise-free encoding round((L − 1) w))."""
        w = self.to_unit(y)
        if self.dequantize_uniformly:
            k = jnp.floor(self.levels * w)
        else:
            k = jnp.round((self.levels - 1) * w)
        return jnp.clip(k, 0, self.levels - 1).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True)
class FlowDequantizer:
    """u from a flow that sees the image, with its log density."""

    flow: Flowpp
    encoding: Pixels

    def init(self, key: Key[Array, ""], image: Images) -> Params:
        """Parameters that standardise the activations for these images [B, H, W, C]."""
        key_flow, key_noise = jax.random.split(key)
        x = self._context(image)
        traced = isinstance(key, jax.core.Tracer)
        init = self.flow.init if traced else jax.jit(self.flow.init, compiler_options=QUICK)
        return init(key_flow, jax.random.normal(key_noise, x.shape, x.dtype), x)["params"]

    def draw(self, params: Params, image: Images, keys: Key[Array, " b"]) -> Draw:
        """y of noise of the flow."""
        x = self._context(image)
        found: Any = self.flow.apply({"params": params}, standard_normal(keys, x), x)
        u, log_q = found
        return self.encoding.draw_of_noise(image, u, log_q)

    def _context(self, image: Images) -> Batched:
        """Return k/(L − 1) in [0, 1], the image as the flow sees it."""
        return image.astype(jnp.float32) / (self.encoding.levels - 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Reals:
    """Real values x: y = A (v(x + w (u − ½)) − m), u ∈ [0, 1)^d; results in nats per unit of x.

        log p(x) = log p(y) + log|det A| + Σ_j log|dv_j/dx_j|
        −log P(cell of x) ≤ E_u[−log p(x + w (u − ½))] − Σ_j log w_j     where all w_j > 0

    Attributes:
        affine: A and m; None: as they are.
        widths: w, [*d], of the cells in which the values are known to lie, 0 for continuous ones;
            None: all are continuous.
        range: the ends of the coordinates, which v maps to the whole line; None: v(x) = x.
    """

    affine: Affine | None = None
    widths: np.ndarray | None = None
    range: Range | None = None

    unit = "nats"

    @property
    def is_noisy(self) -> bool:
        """Say whether `encode` adds noise within cells."""
        return self.widths is not None

    def holds_cells(self, x: np.ndarray) -> np.ndarray:
        """Say which numbers [b, *d] lie in their range together with their cells, bool."""
        if self.range is None:
            return np.full(x.shape, True)
        x = x.astype(np.float64)
        widths = np.zeros(x.shape[1:]) if self.widths is None else self.widths
        reach = 0.5 * widths - np.finfo(np.float32).eps * np.abs(x)  # x is rounded to float32
        near = self.range.touches(x - reach) & self.range.touches(x + reach)
        return self.range.holds(x) & near

    def encode(self, image: Float[Array, "b *d"], keys: Key[Array, " b"]) -> Batched:
        """Model-space y of the data, with fresh noise in their cells from one key per example."""
        return self._to_model(self.in_cells(image, keys))

    def _to_model(self, x: Batched) -> Batched:
        v = x if self.range is None else self.range.apply(x)
        return v if self.affine is None else self.affine.apply(v)

    def in_cells(self, x: Float[Array, "b *d"], keys: Key[Array, " b"]) -> Batched:
        """x + w (u − ½), in the units of the user: x itself where all values are continuous."""
        if self.widths is None:
            return x
        x = x + jnp.asarray(self.widths, x.dtype)[None] * (uniform(keys, x) - 0.5)
        return x if self.range is None else self.range.clip(x)

    def draw(self, image: Float[Array, "b *d"], keys: Key[Array, " b"]) -> Draw:
        """The same y, with −log|det dy/dx| for log q: log p(y) − log q is then a density of x."""
        x = self.in_cells(image, keys)
        log_q = jnp.full(x.shape[:1], 0.0 if self.affine is None else -self.affine.log_det, x.dtype)
        if self.range is not None:
            log_q = log_q - self.range.log_det(x)
        return Draw(self._to_model(x), log_q)

    def negative_log_likelihood(
        self, log_weight: PerExample, x: Shaped[Array, "b *d"]
    ) -> PerExample:
        """−log p in nats, from log p(y) − log q."""
        del x
        return -log_weight

    def decode(self, y: Batched) -> Batched:
        """The data in the units of the user; not rounded to the centres of cells."""
        v = y if self.affine is None else self.affine.invert(y)
        return v if self.range is None else self.range.invert(v)


Encoding = Pixels | Reals
