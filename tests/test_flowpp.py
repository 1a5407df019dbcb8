"""The dequantiser: density against autodiff, inverse, normalisation, published sizes.

The deep variant, which compiles for long, is held against NumPy in test_flow_importer.
"""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from models.flowpp import Flowpp, inverse_logit_mixture, logit_mixture
from models.layers import QUICK

PyTree = Any

# The compiler of production, whatever conftest.py has chosen.
PRODUCTION = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
if "fusion_emitters" in os.environ.get("XLA_FLAGS", ""):
    PRODUCTION["xla_cpu_use_fusion_emitters"] = True

TINY = Flowpp(filters=8, components=3, blocks=1, couplings=4)


@functools.cache
def tiny(shape: tuple[int, ...], batch: int = 16) -> tuple:
    """Network, parameters away from the start, fresh noise and images, all in float32."""
    with jax.enable_x64(False):
        return _tiny(shape, batch)


def _tiny(shape: tuple[int, ...], batch: int) -> tuple:
    flow, keys = TINY, jax.random.split(jax.random.key(0), 4)
    x = jax.random.uniform(keys[0], (batch, *shape))
    init = jax.jit(flow.init, compiler_options=QUICK)
    variables = init(keys[2], jax.random.normal(keys[1], x.shape), x)
    leaves, tree = jax.tree.flatten(variables)
    moved = [
        leaf + 0.1 * jax.random.normal(jax.random.fold_in(keys[2], i), leaf.shape, leaf.dtype)
        for i, leaf in enumerate(leaves)
    ]
    return flow, jax.tree.unflatten(tree, moved), jax.random.normal(keys[3], x.shape), x


def double(tree: PyTree) -> PyTree:
    """The same numbers in float64."""
    return jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), tree)


@pytest.mark.parametrize(
    ("flow", "parameters"),
    [(Flowpp(), 3_466_976), (Flowpp(128, 32, 8, 4, 8, "deep"), 35_482_720)],
    ids=["cifar10", "imagenet32"],
)
def test_published_numbers_of_parameters(flow: Flowpp, parameters: int) -> None:
    x = jnp.zeros((2, 32, 32, 3))
    variables = jax.eval_shape(flow.init, jax.random.key(0), x, x)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == parameters


@pytest.mark.usefixtures("x64")
def test_density_is_that_of_the_jacobian() -> None:
    """log q(u | x) = log N(ε) − log|det ∂u/∂ε|, by d tangents."""
    shape = (2, 4, 3)
    flow, *rest = tiny(shape)
    variables, noise, x = double(rest)

    def one(e: jax.Array, image: jax.Array) -> jax.Array:
        u = flow.apply(variables, e.reshape(1, *shape), image[None])[0]
        return u.ravel()

    _, log_q = jax.jit(flow.apply)(variables, noise, x)
    flat = noise.reshape(len(noise), -1)
    jacobian = jax.jit(jax.vmap(jax.jacfwd(one)))(flat, x)
    log_det = np.linalg.slogdet(np.asarray(jacobian))[1]
    expected = scipy.stats.norm.logpdf(flat).sum(axis=1) - log_det
    np.testing.assert_allclose(log_q, expected, rtol=0, atol=1e-9)
    assert np.ptp(expected) > 1.0


@pytest.mark.usefixtures("x64")
def test_inverse() -> None:
    flow, *rest = tiny((2, 4, 3))
    variables, noise, x = double(rest)
    u, log_q = jax.jit(flow.apply)(variables, noise, x)
    assert 0.0 < float(u.min()) < float(u.max()) < 1.0
    back, again = jax.jit(lambda *a: flow.apply(*a, inverse=True))(variables, u, x)
    np.testing.assert_allclose(back, noise, rtol=0, atol=1e-8)
    np.testing.assert_allclose(again, log_q, rtol=0, atol=1e-8)


@pytest.mark.usefixtures("x64")
def test_density_is_normalised() -> None:
    """∫ q(u | x) du = 1 by a grid of logits, and E_{u ~ q}[1/q; u ∈ A] = |A|, for every image.

    A leaves out the edges: the density there is that of Gaussian tails, so 1/q has no variance.
    """
    flow, *rest = tiny((1, 2, 1))
    variables, _, x = double(rest)
    logits, count = jnp.linspace(-25.0, 25.0, 251), 2
    pair = jnp.stack(jnp.meshgrid(logits, logits), axis=-1).reshape(-1, 1, 2, 1)
    u, apply = jax.nn.sigmoid(pair), jax.jit(flow.apply, static_argnames="inverse")
    slope = jnp.prod(u * (1.0 - u), axis=(1, 2, 3)) * (logits[1] - logits[0]) ** 2
    n, edge = 20_000, 0.2
    noise = jax.random.normal(jax.random.key(7), (n, 1, 2, 1))
    divergences = []
    for image in x[:count]:
        _, log_q = apply(variables, u, jnp.broadcast_to(image, u.shape), inverse=True)
        assert float(jnp.sum(jnp.exp(log_q) * slope)) == pytest.approx(1.0, abs=1e-3)
        drawn, log_q = apply(variables, noise, jnp.broadcast_to(image, noise.shape))
        inside = np.all((np.asarray(drawn) > edge) & (np.asarray(drawn) < 1 - edge), axis=(1, 2, 3))
        inverse = np.where(inside, np.exp(-np.asarray(log_q)), 0.0)
        assert abs(inverse.mean() - (1 - 2 * edge) ** 2) < 4 * inverse.std() / np.sqrt(n) < 0.05
        divergences.append(float(log_q.mean()))
    assert min(divergences) > 0.0  # E log q = KL(q ‖ uniform)
    assert abs(divergences[0] - divergences[1]) > 1e-3  # another density for every image


@pytest.mark.usefixtures("x64")
def test_mixture_of_logistics_and_its_inverse() -> None:
    """Against SciPy; in the tails, where F rounds to 0 or 1, against one component."""
    rng = np.random.default_rng(0)
    logits, means, log_scales = rng.normal(size=(3, 5, 7, 4))
    x = 3.0 * rng.normal(size=(5, 7))
    share = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    law = scipy.stats.logistic(means, np.exp(log_scales))
    cdf = (share * law.cdf(x[..., None])).sum(axis=-1)
    survival = (share * law.sf(x[..., None])).sum(axis=-1)
    pdf = (share * law.pdf(x[..., None])).sum(axis=-1)
    value, log_slope = logit_mixture(*map(jnp.asarray, (x, logits, means, log_scales)))
    np.testing.assert_allclose(value, np.log(cdf / survival), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(log_slope, np.log(pdf / (cdf * survival)), rtol=1e-9, atol=1e-12)
    back = inverse_logit_mixture(value, *map(jnp.asarray, (logits, means, log_scales)))
    np.testing.assert_allclose(back, x, rtol=0, atol=1e-9)
    far = jnp.full((5, 7), 800.0)
    one = tuple(jnp.asarray(a[..., :1]) for a in (logits, means, log_scales))
    value, log_slope = logit_mixture(far, *one)
    np.testing.assert_allclose(value, (800.0 - one[1][..., 0]) / np.exp(one[2][..., 0]), rtol=1e-9)
    np.testing.assert_allclose(log_slope, -one[2][..., 0], rtol=1e-9, atol=1e-9)


def test_float32_agrees_with_float64() -> None:
    """What runs in production; XLA on CPU has confused two expm1 that it fuses with a sum."""
    flow, variables, noise, x = tiny((2, 4, 3))
    u, log_q = jax.jit(flow.apply, compiler_options=PRODUCTION)(variables, noise, x)
    with jax.enable_x64(True):
        exact_u, exact = jax.jit(flow.apply)(*double((variables, noise, x)))
    np.testing.assert_allclose(log_q, exact, rtol=0, atol=1e-4)
    np.testing.assert_allclose(u, exact_u, rtol=0, atol=1e-5)


def test_the_first_batch_is_standardised() -> None:
    """Scales and biases come from the first batch: fresh noise of the same law is standard, too."""
    flow = Flowpp(filters=8, components=3, blocks=1, couplings=2)
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.uniform(keys[0], (128, 4, 4, 1))
    init = jax.jit(flow.init, compiler_options=QUICK)
    variables = init(keys[1], 3.0 + 2.0 * jax.random.normal(keys[2], x.shape), x)
    noise = 3.0 + 2.0 * jax.random.normal(keys[3], x.shape)
    leaves = variables["params"]["normalization_0"]
    first = noise[:, :, 0::2] * leaves["gain_0"][None] + leaves["bias_0"][None]
    assert abs(float(first.mean())) < 0.1
    assert abs(float(first.std()) - 1.0) < 0.1


def test_an_image_depends_on_no_other() -> None:
    flow, variables, noise, x = tiny((2, 4, 3))
    whole = jax.jit(flow.apply)(variables, noise, x)
    part = jax.jit(flow.apply)(variables, noise[3:5], x[3:5])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[3:5], b, rtol=1e-4, atol=1e-5), whole, part
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"processor": "medium"}, "processor.*medium.*deep.*shallow"),
        ({"heads": 5}, "heads=5: need a divisor"),
        ({"couplings": 0}, r"couplings=0: need an integer of at least 1"),
    ],
)
def test_wrong_fields_are_named(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Flowpp(**fields)


def test_odd_width_is_refused() -> None:
    x = jnp.zeros((2, 4, 5, 1))
    with pytest.raises(ValueError, match="even W"):
        Flowpp().init(jax.random.key(0), x, x)
