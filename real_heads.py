"""Heads of real values: mixtures per coordinate, and velocity in the basis of the covariance.

`mixture`: r_j = Σ_m π_m N(μ_m, s_m²), see `heads`, so

    s_j = −Σ_m p_m (x_j − α μ_m)/v_m,   p = softmax_m(log π_m + log N(x_j; α μ_m, v_m)),
    v_m = α² s_m² + σ²

`whitened`: with mean μ and covariance C = U diag(λ) Uᵀ of the data, along U,

    s = −(x − αμ)/v − U [α√λ/(σ√v)] Uᵀ n,   v = α²λ + σ²

n the output of the network: velocity prediction of every principal coordinate, by its own ratio of
signal to noise. At the zero start of the network the first is the independent model of the data
(from `marginals`), the second the score of the Gaussian that fits them. Of p(x | c) they see x less
its regression on c (`parameterization.HeadModel`).
Reference: Bishop 1994, Mixture density networks; Salimans and Ho 2022,
https://arxiv.org/abs/2202.00512 (velocity).
"""

import dataclasses
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import marginals
from checks import one_of, positive, require
from heads import Arrays, Outputs, Shape, mixed, total
from operators import Batched, PerExample, expand, scale
from sde_lib import SDE

WIDEST = 10.0  # s_m that is learned at most, in standard deviations of the coordinate


@dataclasses.dataclass(frozen=True)
class Mixture:
    """r_j = Σ_m π_m N(μ_m, s_m²), everything in units of the coordinate's standard deviation.

    The network gives (Δ log π_m, Δμ_m, Δ log s_m): π and μ start at the mixture that fits the
    coordinate, and s_m² = floor² + s_m,0² exp(2 Δ log s_m). Components that become narrower than
    the noise at t_min would make the ODE stiff. None becomes wider than `WIDEST`, or than it starts
    if this is more: far from all data, where a network says anything, a density without width has
    no score, so that samples from there would move away without end.

    Attributes:
        components: number M.
        floor: smallest s_m, in standard deviations of the coordinate; with a context, of the
            residual of its regression, or of a tenth of the coordinate's where this is more.
    """

    components: int = 8
    floor: float = 0.01

    def __post_init__(self) -> None:
        positive(components=self.components)
        require(self.floor > 0.0, "floor", self.floor, "more than 0")

    @property
    def outputs(self) -> int:
        """Numbers that the network gives per coordinate."""
        return 3 * self.components

    def arrays(self, shape: Shape) -> Arrays:
        """The arrays before the training data are seen: standard normal coordinates."""
        one = jnp.ones(shape)
        each = jnp.ones((*shape, self.components))
        logs = {"log_weights": 0.0 * each, "means": 0.0 * each, "log_deviations": 0.0 * each}
        return {"prior": {"location": 0.0 * one, "scale": one, **logs}}

    def prior(
        self, shape: Shape, batches: Iterable[np.ndarray], least: np.ndarray | float = 0.0
    ) -> Arrays:
        """Location and scale of every coordinate, and its mixture by expectation–maximisation.

        The scale is at least `least`, [n]: of residuals it must not fall far below that of x.
        """
        values = marginals.evenly(batches, marginals.FITTED).astype(np.float64)
        values = values.reshape(-1, math.prod(shape))
        location, spread = values.mean(axis=0), np.maximum(values.std(axis=0), least)
        spread = np.where(spread > 0.0, spread, 1.0)
        found = marginals.mixtures(
            (values - location) / spread, self.components, floor=self.floor
        )  # fmt: skip
        dtype = jnp.result_type(float)

        def shaped(array: np.ndarray) -> Array:
            return jnp.asarray(array.reshape(*shape, *array.shape[1:]), dtype)

        return {
            "location": shaped(location),
            "scale": shaped(spread),
            "log_weights": shaped(found.log_weights),
            "means": shaped(found.means),
            "log_deviations": shaped(np.log(found.deviations)),
        }

    def inputs(self, arrays: Arrays, x: Batched, t: PerExample, sde: SDE) -> tuple[Batched, None]:
        """(x_j − α μ_j)/√(α² var x_j + σ²), what the network sees: of unit variance at every t."""
        prior, alpha, sigma = arrays["prior"], expand(sde.alpha(t), x), expand(sde.sigma(t), x)
        variance = (alpha * prior["scale"][None]) ** 2 + sigma**2
        return (x - alpha * prior["location"][None]) * jax.lax.rsqrt(variance), None

    def score(self, arrays: Arrays, net: Outputs, x: Batched, t: PerExample, sde: SDE) -> Batched:
        """s of x: [B, *d] at t: [B], from the output of the network [B, *d, outputs]."""
        logits, means, variances = self._law(arrays, net)
        terms, slopes = self._terms(means, variances, x, t, sde)
        return mixed(logits, terms, slopes)[0]

    def log_ratio(
        self, arrays: Arrays, net: Outputs, x0: Batched, x: Batched, t: PerExample, sde: SDE
    ) -> PerExample:
        """Σ_j log r_j(x0_j)/ρ_j(y_j) in nats: the decoder less log N(y; x0, τ² I), y = x/α."""
        logits, means, variances = self._law(arrays, net)
        here = -0.5 * ((x0[..., None] - means) ** 2 / variances + jnp.log(variances))
        terms, _ = self._terms(means, variances, x, t, sde)
        log_r = jax.nn.logsumexp(logits + here, axis=-1)
        log_density = jax.nn.logsumexp(logits + terms, axis=-1)  # of x = αy
        return total(log_r - log_density - jnp.log(expand(sde.alpha(t), x)))

    def _law(self, arrays: Arrays, net: Outputs) -> tuple[Outputs, Outputs, Outputs]:
        """(log π + constant, μ, s²) in the units of x."""
        prior = jax.tree.map(lambda leaf: leaf[None], arrays["prior"])
        change = jnp.split(net, 3, axis=-1)
        means = prior["means"] + change[1]
        widest = jnp.maximum(prior["log_deviations"], math.log(WIDEST))
        log_deviations = jnp.minimum(prior["log_deviations"] + change[2], widest)
        variances = self.floor**2 + jnp.exp(2.0 * log_deviations)
        unit, origin = prior["scale"][..., None], prior["location"][..., None]
        return prior["log_weights"] + change[0], origin + unit * means, unit**2 * variances

    def _terms(
        self, means: Outputs, variances: Outputs, x: Batched, t: PerExample, sde: SDE
    ) -> tuple[Outputs, Outputs]:
        """(log N(x; α μ_m, v_m) + constant, its derivative in x)."""
        alpha, sigma = expand(sde.alpha(t), means), expand(sde.sigma(t), means)
        v = alpha**2 * variances + sigma**2
        slopes = -(x[..., None] - alpha * means) / v
        return -0.5 * (v * slopes**2 + jnp.log(v)), slopes


@dataclasses.dataclass(frozen=True)
class Whitened:
    """Velocity prediction along the principal axes of the data, one number per coordinate.

    Vectors are turned into the basis U before the network sees them, and its output back. Images
    stay images: the network works on U v^{-1/2} Uᵀ (x − αμ), and its output is that of pixels.

    Attributes:
        whitening: "full" covariance, or its "diagonal"; "" is full up to 4000 dimensions.
    """

    whitening: str = ""

    outputs = 1

    def __post_init__(self) -> None:
        one_of("whitening", self.whitening, ("", "full", "diagonal"))

    def is_full(self, shape: Shape) -> bool:
        """Say whether examples of this shape have a full covariance."""
        few = math.prod(shape) <= marginals.MAX_COVARIANCE
        return self.whitening == "full" or (self.whitening == "" and few)

    def arrays(self, shape: Shape) -> Arrays:
        """The arrays before the training data are seen: N(0, I)."""
        n = math.prod(shape)
        found = {"mean": jnp.zeros(n), "variances": jnp.ones(n)}
        return {"prior": found | ({"basis": jnp.eye(n)} if self.is_full(shape) else {})}

    def prior(self, shape: Shape, batches: Iterable[np.ndarray]) -> Arrays:
        """Mean and principal axes of the training data."""
        found = marginals.moments(batches, full=self.is_full(shape))
        dtype = jnp.result_type(float)
        arrays = {"mean": found.mean, "variances": found.variances}
        if self.is_full(shape):
            values, basis = np.linalg.eigh(found.covariance)
            arrays |= {"variances": np.maximum(values, 0.0), "basis": basis}
        return {name: jnp.asarray(array, dtype) for name, array in arrays.items()}

    def inputs(self, arrays: Arrays, x: Batched, t: PerExample, sde: SDE) -> tuple[Batched, None]:
        """v^{-1/2} Uᵀ (x − αμ), what the network sees: of unit variance at every time."""
        prior = arrays["prior"]
        whitened = self._gap(prior, x, t, sde) * jax.lax.rsqrt(self._variances(prior, t, sde))
        seen = self._back(prior, whitened, x) if x.ndim > 2 else whitened.reshape(x.shape)
        return seen, None

    def score(self, arrays: Arrays, net: Batched, x: Batched, t: PerExample, sde: SDE) -> Batched:
        """s of x: [B, *d] at t: [B], from the output of the network [B, *d]."""
        prior = arrays["prior"]
        v, net = self._variances(prior, t, sde), net.reshape(net.shape[0], -1)
        signal = scale(sde.alpha(t) / sde.sigma(t), jnp.sqrt(prior["variances"][None] / v))
        learned = self._along(prior, net) if x.ndim > 2 else net
        s = -self._gap(prior, x, t, sde) / v - signal * learned
        return self._back(prior, s, x)

    def _variances(self, prior: Arrays, t: PerExample, sde: SDE) -> Float[Array, "b n"]:
        """v = α²λ + σ²."""
        alpha2, sigma2 = sde.alpha(t)[:, None] ** 2, sde.sigma(t)[:, None] ** 2
        return alpha2 * prior["variances"][None] + sigma2

    def _gap(self, prior: Arrays, x: Batched, t: PerExample, sde: SDE) -> Float[Array, "b n"]:
        """Uᵀ (x − αμ)."""
        flat = x.reshape(x.shape[0], -1)
        return self._along(prior, flat - sde.alpha(t)[:, None] * prior["mean"][None])

    def _along(self, prior: Arrays, flat: Float[Array, "b n"]) -> Float[Array, "b n"]:
        """Return Uᵀ x of every row; x itself where there is no basis U."""
        return flat @ prior["basis"] if "basis" in prior else flat

    def _back(self, prior: Arrays, flat: Float[Array, "b n"], like: Batched) -> Batched:
        """U y, in the shape of the data."""
        return (flat @ prior["basis"].T if "basis" in prior else flat).reshape(like.shape)
