"""Six tasks of simulation-based inference: prior, simulator, and p(θ | y) where it is closed.

    two_moons                θ ~ U[−1, 1]², y = crescent + (−|θ1 + θ2|, θ2 − θ1)/√2
    gaussian_mixture         θ ~ U[−10, 10]², y ~ ½ N(θ, I) + ½ N(θ, .01 I)
    gaussian_linear          θ ~ N(0, .1 I), y ~ N(θ, .1 I), ten numbers
    gaussian_linear_uniform  θ ~ U[−1, 1]¹⁰, y ~ N(θ, .1 I)
    slcp                     θ ~ U[−3, 3]⁵, y: four points of a Gaussian in the plane
    bernoulli_glm            θ ~ N(0, P⁻¹), y: spike count and spike-triggered sums, ten numbers

All arrays are NumPy, [n, d]; densities are in nats.
Reference: Lueckmann et al. 2021, https://arxiv.org/abs/2101.04653, appendix T.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from scipy.special import log_ndtr, logsumexp
from scipy.stats import multivariate_normal, norm

Array = np.ndarray
Parameters = Float[np.ndarray, "n d"]
Data = Float[np.ndarray, "n m"]

VARIANCE = 0.1  # of prior and noise of the linear tasks
CRESCENT = (0.1, 0.01)  # mean and standard deviation of its radius
CENTRE = 0.25
SCALES = (1.0, 0.1)  # of the two parts of gaussian_mixture
RADII, ANGLES = 64, 256  # equally probable nodes of the quadrature over a crescent
STIMULUS = np.random.RandomState(42).randn(100).astype(np.float32).astype(np.float64)
LAGS = 9


@dataclasses.dataclass(frozen=True)
class Simulator:
    """One task: a prior, a simulator and, where it is known, the posterior.

    Attributes:
        prior: (generator, n) → θ [n, d].
        simulate: (generator, θ) → y [n, m].
        bound: the prior is uniform between ±bound; None: a Gaussian.
        log_posterior: (θ, y) → log p(θ | y) [n] in nats; None: it has no closed form.
    """

    prior: Callable[[np.random.Generator, int], Parameters]
    simulate: Callable[[np.random.Generator, Parameters], Data]
    bound: float | None = None
    log_posterior: Callable[[Parameters, Data], Float[np.ndarray, " n"]] | None = None

    def joint(self, rng: np.random.Generator, number: int) -> tuple[Parameters, Data]:
        """Draw pairs (θ, y)."""
        theta = self.prior(rng, number)
        return theta, self.simulate(rng, theta)


def _inside(theta: Parameters, bound: float) -> np.ndarray:
    return (np.abs(theta) <= bound).all(axis=1)


def _uniform(bound: float, dim: int) -> Callable[[np.random.Generator, int], Parameters]:
    """Draws of U[−bound, bound]^dim that do not become an end in float32."""
    most = bound * (1.0 - 2.0 * float(np.finfo(np.float32).eps))
    return lambda rng, n: np.clip(rng.uniform(-bound, bound, (n, dim)), -most, most)


# two_moons


def _crescent(rng: np.random.Generator, number: int) -> Array:
    """Points on the crescent: radius r ~ N(.1, .01²), angle uniform in the right half plane."""
    angle = rng.uniform(-np.pi / 2.0, np.pi / 2.0, number)
    r = rng.normal(*CRESCENT, number)
    return np.stack([r * np.cos(angle) + CENTRE, r * np.sin(angle)], axis=1)


def _rotated(theta: Parameters) -> tuple[Array, Array]:
    """(q, w) = (θ1 + θ2, θ2 − θ1)/√2."""
    return (theta[:, 0] + theta[:, 1]) / np.sqrt(2.0), (theta[:, 1] - theta[:, 0]) / np.sqrt(2.0)


def _two_moons(rng: np.random.Generator, theta: Parameters) -> Data:
    q, w = _rotated(theta)
    return _crescent(rng, len(theta)) + np.stack([-np.abs(q), w], axis=1)


def _two_moons_posterior(theta: Parameters, y: Data) -> Array:
    """log m(y1 + |q|, y2 − w) − log Z(y), m(p) = N(r; .1, .01²)/(π r), r = ‖p − (¼, 0)‖.

    Z is the integral over the box. Where neither the box nor q = 0 cuts a crescent, it is 2.
    """
    q, w = _rotated(theta)
    across, along = y[:, 0] + np.abs(q) - CENTRE, y[:, 1] - w
    r = np.hypot(across, along)
    with np.errstate(divide="ignore"):
        inside = np.log((across >= 0.0) & _inside(theta, 1.0))
    return norm.logpdf(r, *CRESCENT) - np.log(np.pi * r) + inside - np.log(_mass_in_box(y))


def _mass_in_box(y: Data) -> Array:
    """∫ m(y1 + |q|, y2 − w) dθ over [−1, 1]², by quadrature over the crescent."""
    r = norm.ppf((np.arange(RADII)[:, None] + 0.5) / RADII, *CRESCENT)
    angle = np.pi * ((np.arange(ANGLES) + 0.5) / ANGLES - 0.5)
    points = np.stack([r * np.cos(angle) + CENTRE, r * np.sin(angle)], axis=-1).reshape(-1, 2)
    different, which = np.unique(y, axis=0, return_inverse=True)
    found = np.empty(len(different))
    for i, (y1, y2) in enumerate(different):
        q, w = points[:, 0] - y1, y2 - points[:, 1]
        ends = np.abs(np.stack([q - w, q + w, -q - w, -q + w])) <= np.sqrt(2.0)
        both = (ends[0] & ends[1]).astype(float) + (ends[2] & ends[3])
        found[i] = np.mean(both * (q >= 0.0))
    return found[which]


# The Gaussian tasks


def _log_mass(y: Data, scale: float, bound: float) -> Array:
    """log Π_j P(|y_j + scale·z| ≤ bound), z ~ N(0, 1); accurate in both tails."""
    far = np.abs(y)
    upper, lower = log_ndtr((bound - far) / scale), log_ndtr((-bound - far) / scale)
    return np.sum(upper + np.log1p(-np.exp(lower - upper)), axis=1)


def _linear(rng: np.random.Generator, theta: Parameters) -> Data:
    return theta + np.sqrt(VARIANCE) * rng.normal(size=theta.shape)


def _linear_posterior(theta: Parameters, y: Data) -> Array:
    """log N(θ; y/2, .05 I)."""
    return norm.logpdf(theta, y / 2.0, np.sqrt(VARIANCE / 2.0)).sum(axis=1)


def _linear_uniform_posterior(theta: Parameters, y: Data) -> Array:
    """log N(θ; y, .1 I) within the box, over its mass there."""
    scale = np.sqrt(VARIANCE)
    return norm.logpdf(theta, y, scale).sum(axis=1) - _log_mass(y, scale, 1.0)


def _mixture(rng: np.random.Generator, theta: Parameters) -> Data:
    scale = rng.choice(SCALES, size=(len(theta), 1))
    return theta + scale * rng.normal(size=theta.shape)


def _mixture_posterior(theta: Parameters, y: Data) -> Array:
    """log Σ_k ½ N(θ; y, s_k² I) within the box, over its mass there."""
    log_p = [norm.logpdf(theta, y, scale).sum(axis=1) for scale in SCALES]
    log_mass = [_log_mass(y, scale, 10.0) for scale in SCALES]
    return logsumexp(log_p, axis=0) - logsumexp(log_mass, axis=0)


# slcp and bernoulli_glm


def _slcp(rng: np.random.Generator, theta: Parameters) -> Data:
    """Four points of N((θ1, θ2), S), S with deviations θ3², θ4² and correlation tanh θ5."""
    first, second = np.square(theta[:, 2, None]), np.square(theta[:, 3, None])
    rho = np.tanh(theta[:, 4, None])
    z = rng.normal(size=(len(theta), 4, 2))
    x1 = theta[:, 0, None] + first * z[..., 0]
    x2 = theta[:, 1, None] + second * (rho * z[..., 0] + np.sqrt(1.0 - rho**2) * z[..., 1])
    return np.stack([x1, x2], axis=-1).reshape(len(theta), 8)


def design_matrix() -> Float[np.ndarray, "100 10"]:
    """A column of ones, then the stimulus delayed by 0, …, 8 steps."""
    delayed = [np.concatenate([np.zeros(lag), STIMULUS[: 100 - lag]]) for lag in range(LAGS)]
    return np.stack([np.ones(100), *delayed], axis=1)


def _glm_precision() -> Float[np.ndarray, "10 10"]:
    """½ for the offset; FᵀF for the filter, F = D² + diag √(k/9), D the differences."""
    d = np.eye(LAGS) - np.eye(LAGS, k=-1)
    f = d @ d + np.diag(np.sqrt(np.arange(LAGS) / LAGS))
    found = np.zeros((LAGS + 1, LAGS + 1))
    found[0, 0], found[1:, 1:] = 0.5, f.T @ f
    return found


def _glm_prior(rng: np.random.Generator, number: int) -> Parameters:
    law = multivariate_normal(cov=np.linalg.inv(_glm_precision()))
    return law.rvs(number, random_state=rng).reshape(number, -1)


def _glm(rng: np.random.Generator, theta: Parameters) -> Data:
    """Xᵀs, spikes s_t ~ Bernoulli(sigmoid (Xθ)_t)."""
    x = design_matrix()
    probability = 1.0 / (1.0 + np.exp(-theta @ x.T))
    return (rng.uniform(size=probability.shape) < probability) @ x


SIMULATORS = {
    "two_moons": Simulator(_uniform(1.0, 2), _two_moons, 1.0, _two_moons_posterior),
    "gaussian_mixture": Simulator(_uniform(10.0, 2), _mixture, 10.0, _mixture_posterior),
    "gaussian_linear": Simulator(
        lambda rng, n: np.sqrt(VARIANCE) * rng.normal(size=(n, 10)),
        _linear,
        log_posterior=_linear_posterior,
    ),
    "gaussian_linear_uniform": Simulator(
        _uniform(1.0, 10), _linear, 1.0, _linear_uniform_posterior
    ),
    "slcp": Simulator(_uniform(3.0, 5), _slcp, 3.0),
    "bernoulli_glm": Simulator(_glm_prior, _glm),
}
