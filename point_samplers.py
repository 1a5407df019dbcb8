"""Samplers of the toy sets: (rng, n) → n points in the plane or on the line, float32 [n, d].

Those of a known law (`toy_data.LAWS`) have its name.
"""

import numpy as np

from toy_data import MOG1D_MEANS, MOG1D_VARIANCES, MOG1D_WEIGHTS


def _polar(radius: np.ndarray | float, angle: np.ndarray) -> np.ndarray:
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def swissroll(rng: np.random.Generator, n: int) -> np.ndarray:
    """((θ cos θ, θ sin θ) + ½ z)/5 with θ = 3π/2 (1 + 2u)."""
    theta = 1.5 * np.pi * (1.0 + 2.0 * rng.random(n))
    return np.asarray((_polar(theta, theta) + 0.5 * rng.standard_normal((n, 2))) / 5.0, np.float32)


def checkerboard(rng: np.random.Generator, n: int) -> np.ndarray:
    """2(a, b) with a = 4u − 2, b = u' − 2 Bern(½) + (⌊a⌋ mod 2): half the squares of [−4, 4]²."""
    a = 4.0 * rng.random(n) - 2.0
    b = rng.random(n) - 2.0 * rng.integers(0, 2, n) + np.floor(a) % 2
    return np.asarray(2.0 * np.stack([a, b], axis=1), np.float32)


def moons(rng: np.random.Generator, n: int) -> np.ndarray:
    """√2 × two centred half circles with noise 0.1; mean variance of a coordinate about 1."""
    angle, lower = np.pi * rng.random(n), rng.integers(0, 2, n)
    circles = _polar(1.0 - 2.0 * lower, angle) + np.outer(lower, [1.0, 0.5]) - [0.5, 0.25]
    return np.asarray(np.sqrt(2.0) * (circles + 0.1 * rng.standard_normal((n, 2))), np.float32)


def rings(rng: np.random.Generator, n: int) -> np.ndarray:
    """Circles of radius ½, 1, 3/2, 2, equally likely, with noise 0.05."""
    circles = _polar(0.5 * rng.integers(1, 5, n), 2.0 * np.pi * rng.random(n))
    return np.asarray(circles + 0.05 * rng.standard_normal((n, 2)), np.float32)


def mixture(rng: np.random.Generator, n: int) -> np.ndarray:
    """Eight equally likely Gaussians of standard deviation 0.2 on the circle of radius 2."""
    centres = _polar(2.0, 0.25 * np.pi * rng.integers(0, 8, n))
    return np.asarray(centres + 0.2 * rng.standard_normal((n, 2)), np.float32)


def gaussian(rng: np.random.Generator, n: int) -> np.ndarray:
    """N(0, [[1, 0.6], [0.6, 1]])."""
    factor = np.array([[1.0, 0.0], [0.6, 0.8]])
    return np.asarray(rng.standard_normal((n, 2)) @ factor.T, np.float32)


def mog1d(rng: np.random.Generator, n: int) -> np.ndarray:
    """Σ_k w_k N(m_k, v_k) on the line, as `toy_data.mog1d`."""
    k = rng.choice(len(MOG1D_WEIGHTS), n, p=MOG1D_WEIGHTS)
    points = np.take(MOG1D_MEANS, k) + np.sqrt(MOG1D_VARIANCES)[k] * rng.standard_normal(n)
    return np.asarray(points[:, None], np.float32)


SAMPLERS = {
    f.__name__: f for f in (swissroll, checkerboard, moons, rings, mixture, gaussian, mog1d)
}
