"""Linear measurements: adjoints, A Aᵀ, A⁺, the law of the noise, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from measurements import Colourise, Denoise, Inpaint, Linear, Measurement, SuperResolve
from operators import fold_in_each, inner

SHAPE = (4, 6, 3)
NOISE = 0.3


def missing() -> np.ndarray:
    found = np.zeros(SHAPE, bool)
    found[1:3, 2:5] = True
    return found


def matrix() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(5, 72))


MEASUREMENTS = {
    "inpaint": lambda: Inpaint(SHAPE, NOISE, missing()),
    "colourise": lambda: Colourise(SHAPE, NOISE),
    "super_resolve": lambda: SuperResolve(SHAPE, NOISE, 2),
    "denoise": lambda: Denoise(SHAPE, NOISE),
    "linear": lambda: Linear(SHAPE, NOISE, matrix()),
}
every = pytest.mark.parametrize("name", MEASUREMENTS)


def draw_pair(a: Measurement) -> tuple[jax.Array, jax.Array]:
    key_x, key_y = jax.random.split(jax.random.key(1))
    x = jax.random.normal(key_x, (3, *a.shape), jnp.float64)
    return x, jax.random.normal(key_y, (3, *a.measured_shape), jnp.float64)


@every
def test_the_transpose_is_the_adjoint(name: str, x64: None) -> None:
    a = MEASUREMENTS[name]()
    x, y = draw_pair(a)
    assert a.forward(x).shape == y.shape
    assert a.number == y[0].size
    np.testing.assert_allclose(inner(a.forward(x), y), inner(x, a.transpose(y)), rtol=1e-12)


@every
def test_the_pseudo_inverse_explains_y_from_the_rows_of_a(name: str, x64: None) -> None:
    a = MEASUREMENTS[name]()
    x, y = draw_pair(a)
    found = a.pseudo_inverse(y)
    np.testing.assert_allclose(a.forward(found), y, atol=1e-12)
    unseen = x - a.pseudo_inverse(a.forward(x))
    np.testing.assert_allclose(inner(found, unseen), 0.0, atol=1e-10)
    if name != "linear":
        np.testing.assert_allclose(a.forward(a.transpose(y)), a.gram * y, atol=1e-12)


def test_what_each_measures(x64: None) -> None:
    x = jnp.arange(72.0).reshape(1, *SHAPE)
    flat = np.arange(72)[~missing().reshape(-1)]
    np.testing.assert_array_equal(MEASUREMENTS["inpaint"]().forward(x)[0], flat)
    assert MEASUREMENTS["colourise"]().forward(x)[0, 0, 1, 0] == 4.0  # of 3, 4, 5
    assert MEASUREMENTS["super_resolve"]().forward(x)[0, 0, 0, 0] == (0 + 3 + 18 + 21) / 4
    expected = matrix() @ np.arange(72)
    np.testing.assert_allclose(MEASUREMENTS["linear"]().forward(x)[0], expected, rtol=1e-12)


@every
def test_the_noise_has_its_standard_deviation_and_its_keys(name: str, x64: None) -> None:
    a = MEASUREMENTS[name]()
    x = jnp.zeros((4000, *SHAPE))
    keys = fold_in_each(jax.random.key(2), jnp.arange(4000))
    y = a.draw(x, keys)
    standard_error = NOISE / np.sqrt(2.0 * y.size)
    assert abs(float(y.std()) - NOISE) < 4.0 * standard_error
    np.testing.assert_array_equal(a.draw(x[7:8], keys[7:8])[0], y[7])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Inpaint(SHAPE, NOISE, np.zeros((4, 6), bool)), r"sampling\.mask=\(4, 6\): need"),
        (lambda: Inpaint(SHAPE, NOISE, np.ones(SHAPE, bool)), r"sampling\.mask='72 of 72'"),
        (lambda: Colourise((4, 4, 1), NOISE), "they are grey"),
        (lambda: Colourise((4,), NOISE), "it needs images"),
        (lambda: SuperResolve(SHAPE, NOISE, 4), r"sampling\.factor=4: need a divisor"),
        (lambda: SuperResolve(SHAPE, NOISE, 1), r"sampling\.factor=1: need a divisor"),
        (lambda: Linear((2,), NOISE, np.ones((1, 3))), r"sampling\.matrix=\(1, 3\): need \[m, 2\]"),
        (lambda: Linear((2,), NOISE, np.ones((2, 2))), r"rank of sampling\.matrix=1: need 2"),
        (lambda: Linear((2,), NOISE, np.full((1, 2), np.nan)), r"rank of sampling\.matrix=-1"),
        (lambda: Denoise((2,), -1.0), r"sampling\.noise=-1\.0: need 0 or more"),
    ],
)
def test_what_cannot_be_measured_is_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
