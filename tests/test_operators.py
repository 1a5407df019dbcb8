"""Per-example algebra against loops, divergences against full Jacobians, noise by id."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from operators import (
    PROBES,
    dimension,
    expand,
    fold_in_all,
    fold_in_each,
    inner,
    rademacher,
    scale,
    squared_norm,
    standard_normal,
    uniform,
    value_and_divergence,
    value_and_probed_divergence,
)

SHAPES = [(4,), (2, 3), (2, 2, 3)]
DRAWS = {"gaussian": standard_normal, "rademacher": rademacher, "uniform": uniform}


def batch(shape, number=5, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((number, *shape)))


def draw(kind, key, ids):
    return DRAWS[kind](fold_in_each(key, ids), jnp.zeros((len(ids), 16)))


def field(x):
    """A field that mixes all coordinates of an example; its Jacobian is not symmetric."""
    flat = x.reshape(x.shape[0], -1)
    matrix = jnp.asarray(np.random.default_rng(7).standard_normal((flat.shape[1],) * 2))
    return (jnp.sin(flat @ matrix) + flat**3 * jnp.roll(flat, 1, axis=1)).reshape(x.shape)


def jacobians(x):
    """[B, d, d], one example at a time."""
    d = dimension(x)
    return jax.vmap(jax.jacrev(lambda y: field(y[None])[0]))(x).reshape(-1, d, d)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", SHAPES)
def test_algebra_is_per_example(shape):
    x, y, c = batch(shape), batch(shape, seed=1), batch(())
    for b in range(5):
        np.testing.assert_allclose(scale(c, x)[b], float(c[b]) * x[b], rtol=1e-15)
        np.testing.assert_allclose(inner(x, y)[b], np.vdot(x[b], y[b]), rtol=1e-13)
        np.testing.assert_allclose(squared_norm(x)[b], np.linalg.norm(x[b]) ** 2, rtol=1e-13)
    assert expand(c, x).shape == (5,) + (1,) * len(shape)
    assert dimension(x) == np.prod(shape)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", SHAPES)
def test_divergence_is_trace_of_jacobian(shape):
    x = batch(shape)
    value, divergence = jax.jit(lambda y: value_and_divergence(field, y))(x)
    np.testing.assert_allclose(value, field(x), rtol=1e-14)
    trace = np.trace(jacobians(x), axis1=1, axis2=2)
    np.testing.assert_allclose(divergence, trace, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("num_probes", [1, 3])
def test_probed_divergence_is_mean_quadratic_form(num_probes):
    x = batch((2, 3))
    probes = jnp.stack([batch((2, 3), seed=10 + i) for i in range(num_probes)])
    value, divergence = jax.jit(lambda y, v: value_and_probed_divergence(field, y, v))(x, probes)
    v = np.asarray(probes).reshape(num_probes, 5, 6)
    expected = np.einsum("pbi,bij,pbj->b", v, jacobians(x), v) / num_probes
    np.testing.assert_allclose(value, field(x), rtol=1e-14)
    np.testing.assert_allclose(divergence, expected, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_probes_with_unit_second_moment_give_the_exact_trace():
    """The d probes √d e_i have mean v vᵀ = I exactly, so no Monte-Carlo error is left."""
    x = batch((4,))
    probes = jnp.broadcast_to(2.0 * jnp.eye(4)[:, None], (4, 5, 4))
    probed = value_and_probed_divergence(field, x, probes)[1]
    np.testing.assert_allclose(probed, value_and_divergence(field, x)[1], rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", PROBES)
def test_probes_have_unit_second_moment(kind):
    n = 20_000
    v = PROBES[kind](jax.random.split(jax.random.key(0), n), jnp.zeros((n, 3)))
    outer = np.einsum("bi,bj->bij", v, v)
    error = outer.std(axis=0) / np.sqrt(n)
    assert np.all(np.abs(outer.mean(axis=0) - np.eye(3)) <= 4 * error + 1e-12)
    assert np.all(np.abs(np.mean(v, axis=0)) < 4 / np.sqrt(n))


def test_rademacher_takes_two_values_and_uniform_stays_in_its_interval():
    keys = jax.random.split(jax.random.key(0), 500)
    assert set(np.unique(rademacher(keys, jnp.zeros((500, 2))))) == {-1.0, 1.0}
    u = np.asarray(uniform(keys, jnp.zeros((500, 2))))
    assert u.min() >= 0.0
    assert u.max() < 1.0
    assert abs(u.mean() - 0.5) < 4 * np.sqrt(1 / 12 / u.size)


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_draws_have_shape_and_dtype_of_the_model(kind, dtype):
    like = jnp.zeros((3, 2, 2), dtype)
    z = DRAWS[kind](jax.random.split(jax.random.key(0), 3), like)
    assert (z.shape, z.dtype) == (like.shape, dtype)


@pytest.mark.parametrize("kind", DRAWS)
def test_noise_of_an_example_depends_on_its_id_only(kind):
    key = jax.random.key(3)
    whole = draw(kind, key, jnp.arange(8))
    parts = jnp.concatenate([draw(kind, key, jnp.arange(4)), draw(kind, key, jnp.arange(4, 8))])
    np.testing.assert_array_equal(whole, parts)
    order = jnp.asarray([5, 0, 7, 2])
    np.testing.assert_array_equal(whole[order], draw(kind, key, order))
    assert len(np.unique(whole, axis=0)) == 8


def test_folding_a_number_into_every_key_gives_new_keys():
    keys = fold_in_each(jax.random.key(0), jnp.arange(6))
    folded = [fold_in_all(keys, i) for i in range(3)]
    data = np.concatenate([jax.random.key_data(k) for k in [keys, *folded]])
    assert len(np.unique(data, axis=0)) == 24
