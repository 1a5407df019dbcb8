"""The Taylor sweep equals nested derivatives along the curve, on every kind of primitive."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import MODELS
from taylor import along_curve

pytestmark = pytest.mark.usefixtures("compiled_at_o0")

KEYS = jax.random.split(jax.random.key(0), 8)


def curve_of(*shapes):
    """(point, velocity, acceleration) with entries of order one; the point is positive."""
    draws = []
    for number, draw in enumerate((jax.random.uniform, jax.random.normal, jax.random.normal)):
        keys = jax.random.split(KEYS[number], len(shapes))
        draws.append(tuple(draw(k, s, jnp.float64) for k, s in zip(keys, shapes, strict=True)))
    draws[0] = tuple(0.5 + x for x in draws[0])
    return draws


def nested(function, point, velocity, acceleration):
    """Value, first and second derivative at h = 0 by jvp of jvp in h."""

    def on_curve(h):
        triples = zip(point, velocity, acceleration, strict=True)
        return function(*(x + h * v + 0.5 * h**2 * a for x, v, a in triples))

    def first(h):
        return jax.jvp(on_curve, (h,), (jnp.ones(()),))[1]

    zero = jnp.zeros(())
    return on_curve(zero), first(zero), jax.jvp(first, (zero,), (jnp.ones(()),))[1]


def sweep(function, point, velocity, acceleration):
    """Value, first and second derivative by the Taylor sweep."""
    value, first, (second,) = along_curve(function, point, velocity, lambda _: [acceleration])
    return value, first, second


W = np.random.default_rng(0).standard_normal((5, 5))
FUNCTIONS = {
    "dense and silu": lambda x, t: jax.nn.silu(x @ W * jnp.sin(t)[:, None]) @ W,
    "softmax": lambda x, t: jax.nn.softmax(x * t[:, None], axis=-1) @ W,
    "normalisation": lambda x, t: (
        (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1) + t)[:, None]
    ),
    "product of two": lambda x, t: jnp.einsum("bi,bj->bij", x, x * t[:, None]),
    "quotient": lambda x, t: W[0] / x + x**3 / t[:, None] + jnp.exp(-x) * jnp.log1p(x),
    "custom derivative": lambda x, t: jax.nn.relu(x - 1.0) ** 3 + jax.nn.elu(x) + t[:, None],
    "reshaping": lambda x, t: jnp.concatenate([x.T[::-1], x.T[:, :1] @ t[None, :]])[1:, None],
    "checkpoint": jax.checkpoint(lambda x, t: jnp.tanh(x @ W) * t[:, None]),
    "jit": jax.jit(lambda x, t: jnp.cos(x) @ W + t[:, None]),
    "scan": lambda x, t: jax.lax.scan(
        lambda c, w: (jnp.tanh(c * w + t[:, None]), c.sum()), x, jnp.arange(3.0)
    )[0],
    "rounded to integers": lambda x, t: (4.0 * x).astype(int).astype(float) * x * t[:, None],
    "no dependence": lambda x, t: jnp.zeros_like(x) + W[0],
}  # fmt: skip


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("name", FUNCTIONS)
def test_equals_nested_derivatives_and_so_do_its_gradients(name):
    function, (point, velocity, acceleration) = FUNCTIONS[name], curve_of((3, 5), (3,))
    results = jax.jit(lambda *parts: sweep(function, *parts))(point, velocity, acceleration)
    expected = jax.jit(lambda *parts: nested(function, *parts))(point, velocity, acceleration)
    for ours, theirs in zip(results, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)

    def gradient(method):
        total = lambda x: (method(function, x, velocity, acceleration)[2] ** 2).sum()  # noqa: E731
        return jax.jit(jax.grad(total))(point)

    for ours, theirs in zip(gradient(sweep), gradient(nested), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_accelerations_may_depend_on_the_value_and_share_a_sweep(name):
    """Two second derivatives along curves whose x'' is computed from f, with their gradients."""
    function, (point, velocity, acceleration) = FUNCTIONS[name], curve_of((3, 5), (3,))

    def both(value):
        bent = jnp.sin(value.sum())
        return acceleration, tuple(bent * a for a in acceleration)

    def swept(*x):
        _, _, seconds = along_curve(function, x, velocity, both)
        return seconds

    def expected(*x):
        return tuple(nested(function, x, velocity, a)[2] for a in both(function(*x)))

    for ours, theirs in zip(swept(*point), expected(*point), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)

    def gradient(method):
        return jax.grad(lambda x: sum((second**2).sum() for second in method(*x)))(point)

    for ours, theirs in zip(gradient(swept), gradient(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


NETWORKS = {
    "mlp": ((5,), {"hidden": 8, "depth": 2, "embed_dim": 8}),
    "ddpm": (
        (8, 8, 1),
        dict(nf=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), num_groups=4),
    ),
}  # fmt: skip


def network_function(name):
    shape, fields = NETWORKS[name]
    network = MODELS[name](**fields)

    @jax.jit
    def start(x, t):
        return jax.tree.map(lambda p: p.astype(jnp.float64) + 0.1, network.init(KEYS[4], x, t))

    params = start(jnp.ones((2, *shape), jnp.float32), jnp.ones(2, jnp.float32))
    return lambda x, t: network.apply(params, x, 99.0 * t), curve_of((2, *shape), (2,))


@pytest.mark.parametrize("name", NETWORKS)
def test_equals_nested_derivatives_on_the_networks(name):
    function, curve = network_function(name)

    def compiled(method):
        return jax.jit(lambda *c: method(function, *c))(*curve)

    for ours, theirs in zip(compiled(sweep), compiled(nested), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9 * np.abs(theirs).max())


def test_costs_at_most_3_6_forward_passes_where_nested_derivatives_cost_more_than_5():
    function, curve = network_function("ddpm")

    def flops(f, *arguments):
        return jax.jit(f).lower(*arguments).compile().cost_analysis()["flops"]

    forward = flops(function, *curve[0])
    assert flops(lambda *c: sweep(function, *c), *curve) < 3.6 * forward
    assert flops(lambda *c: nested(function, *c), *curve) > 5.0 * forward
