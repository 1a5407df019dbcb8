"""Contexts inside networks: classes, vectors and images; none of them; no mixing of examples."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import DDPM, MLP, NCSNpp, UNet
from models.conditioning import without
from parameterization import TIME_LABELS, HeadModel, ScoreModel
from real_heads import Mixture
from sde_lib import VPSDE
from streams import Context

pytestmark = pytest.mark.usefixtures("compiled_at_o0")

SMALL = {"nf": 4, "ch_mult": (1,), "num_res_blocks": 1, "attn_resolutions": ()}
IMAGE = (4, 4, 3)
CLASS, VECTOR, SCALAR, PICTURE = Context((), 3), Context((5,)), Context(()), Context((4, 4, 2))
CASES = {
    "mlp class": (MLP(hidden=8, depth=1, embed_dim=8, context=CLASS), (2,)),
    "mlp scalar": (MLP(hidden=8, depth=1, embed_dim=8, context=SCALAR), (2,)),
    "mlp image": (MLP(hidden=8, depth=1, embed_dim=8, context=PICTURE), IMAGE),
    "unet vector": (UNet(channels=(8,), blocks=(1,), patch=2, embed_dim=8, context=VECTOR), IMAGE),
    "unet image": (UNet(channels=(8,), blocks=(1,), summary=8, context=PICTURE), IMAGE),
    "ddpm class": (DDPM(**SMALL, num_groups=2, context=CLASS), IMAGE),
    "ddpm vector, no label": (
        DDPM(**SMALL, num_groups=2, conditional=False, context=VECTOR), IMAGE,
    ),
    "ncsnpp image": (
        NCSNpp(**SMALL, progressive="output_skip", progressive_input="input_skip",
               context=PICTURE), IMAGE,
    ),
    "ncsnpp class": (NCSNpp(**SMALL, resblock_type="biggan", context=CLASS), IMAGE),
}  # fmt: skip
embedded = pytest.mark.parametrize("case", ["mlp class", "mlp image", "unet vector"], indirect=True)


@pytest.fixture(autouse=True)
def _strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(params=CASES)
def case(request):
    """(network, x, label, contexts of four examples)."""
    net, shape = CASES[request.param]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, *shape)), jnp.float32)
    label = jnp.asarray(rng.uniform(0.0, 99.0, 4), jnp.float32)
    context = (
        rng.integers(0, 3, 4) if net.context.classes else rng.normal(size=(4, *net.context.shape))
    )
    kind = jnp.int32 if net.context.classes else jnp.float32
    return net, x, label, jnp.asarray(context, kind)


def random_params(net, *args):
    """Parameters of the right shapes, none zero."""
    rng = np.random.default_rng(1)
    with jax.numpy_dtype_promotion("standard"):
        shapes = jax.eval_shape(net.init, jax.random.key(0), *args)["params"]
    draw = lambda leaf: rng.normal(size=leaf.shape) / math.prod(leaf.shape[:-1]) ** 0.5  # noqa: E731
    return jax.tree.map(lambda leaf: jnp.asarray(draw(leaf).astype(np.float32)), shapes)


@functools.partial(jax.jit, static_argnums=0)
def apply(net, params, x, label, context=None):
    return net.apply({"params": params}, x, label, context=context)


def none_of(context):
    return without(context, jnp.ones(4, bool))


@embedded
def test_before_training_the_context_changes_nothing(case):
    """Nearly, as outputs start near zero; without one nothing, nor in the other parameters."""
    net, x, label, context = case
    key = jax.random.key(0, impl="rbg")
    params = jax.jit(net.init)(key, x, label)["params"]
    plain = net.clone(context=None)
    before = jax.jit(plain.init)(key, x, label)["params"]
    beside = {"context"} if isinstance(net, MLP) and not net.context.classes else set()
    assert params.keys() - before.keys() == {"context_embedding"} | beside
    jax.tree.map(
        np.testing.assert_array_equal, {k: v for k, v in params.items() if k in before}, before
    )
    expected = apply(plain, before, x, label)
    np.testing.assert_array_equal(apply(net, params, x, label), expected)
    np.testing.assert_allclose(apply(net, params, x, label, context), expected, atol=1e-4)


def test_every_example_sees_its_own_context_and_no_other(case):
    """Also where it has none, which is one more context, the one of the unconditional score."""
    net, x, label, context = case
    params = random_params(net, x, label)
    whole, none = (apply(net, params, x, label, c) for c in (context, none_of(context)))
    bound = 1e-5 * float(jnp.max(jnp.abs(whole)))
    other = (context + 1) % 3 if net.context.classes else context + 1.0
    changed = apply(net, params, x, label, other.at[0].set(context[0]))
    np.testing.assert_allclose(changed[0], whole[0], rtol=0, atol=bound)
    assert least_gap(changed[1:], whole[1:]) > 100 * bound
    dropped = jnp.asarray([True, False, True, False])
    some = apply(net, params, x, label, without(context, dropped))
    np.testing.assert_allclose(some[dropped], none[dropped], rtol=0, atol=bound)
    np.testing.assert_allclose(some[~dropped], whole[~dropped], rtol=0, atol=bound)
    assert least_gap(none, whole) > 100 * bound
    zero = apply(net, params, x, label, jnp.zeros_like(context))  # a value like any other
    assert least_gap(none, zero) > 100 * bound
    np.testing.assert_allclose(apply(net, params, x, label), none, rtol=0, atol=bound)


def least_gap(a, b):
    """The least over examples of the largest difference."""
    return float(jnp.min(jnp.max(jnp.abs(a - b).reshape(len(a), -1), axis=1)))


def test_the_gradient_reaches_the_context(case):
    """Of a table the rows of the classes that are there, finite without a context, too."""
    net, x, label, context = case
    params = random_params(net, x, label)
    context = without(context, jnp.asarray([False, False, True, False]))

    def loss(params):
        return jnp.mean(net.apply({"params": params}, x, label, context=context) ** 2)

    grads = jax.jit(jax.grad(loss))(params)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(grads))
    if "context_embedding" not in grads:
        return
    found = grads["context_embedding"]
    if net.context.classes:
        rows = jnp.max(jnp.abs(found["classes"]), axis=1) > 0.0
        assert set(np.flatnonzero(rows).tolist()) == {int(c) for c in context if c >= 0}
        assert float(jnp.max(jnp.abs(found["none"]))) > 0.0
    else:
        assert all(float(jnp.max(jnp.abs(leaf))) > 0.0 for leaf in jax.tree.leaves(found))
        if isinstance(net, MLP):
            assert float(jnp.max(jnp.abs(grads["context"]["kernel"]))) > 0.0


@pytest.mark.parametrize("case", ["mlp scalar", "unet image", "ddpm class"], indirect=True)
def test_float64_stays_float64(case):
    net, x, label, context = case
    params = random_params(net, x, label)
    single = apply(net, params, x, label, context)
    with jax.enable_x64(True):

        def double(a):
            kind = np.int32 if jnp.issubdtype(a.dtype, jnp.integer) else np.float64
            return jnp.asarray(np.asarray(a, kind))

        out = apply(net, *jax.tree.map(double, (params, x, label, context)))
        assert out.dtype == jnp.float64
        np.testing.assert_allclose(single, out, rtol=0, atol=1e-3 * float(jnp.max(jnp.abs(out))))


@pytest.mark.parametrize(
    ("kind", "context", "message"),
    [
        (None, jnp.zeros(4, jnp.int32), "the context=.*: need none"),
        (CLASS, jnp.zeros(4), r"the context=\(False, \(\)\): need classes \[B\]"),
        (VECTOR, jnp.zeros(4, jnp.int32), r"the context=.*: need floats .* c = \(5,\)"),
        (VECTOR, jnp.zeros((4, 3)), r"the context=\(False, \(3,\)\): need floats .* c = \(5,\)"),
        (Context((8, 8, 1)), jnp.zeros((4, 8, 8, 1)), r"the context=.*: need images of \(4, 4\)"),
    ],
)
def test_a_context_of_another_kind_is_refused(kind, context, message):
    net = UNet(channels=(8,), blocks=(1,), context=kind)
    x, label = jnp.zeros((4, *IMAGE)), jnp.zeros(4)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: net.init(jax.random.key(0), x, label, context=context))


def test_models_bind_the_context():
    """Score, decoder and the tree of a head's model; the score below is a function of x and t."""
    net = MLP(hidden=8, depth=1, embed_dim=8, context=CLASS)
    label, head = TIME_LABELS["log_snr"], Mixture(2)
    plain = ScoreModel(net, VPSDE(), label=label)
    headed = HeadModel(net.clone(outputs=head.outputs), VPSDE(), label=label, head=head)
    x, t = jnp.ones((2, 2)), jnp.full((2,), 0.5)
    for model in (plain, headed):
        params = jax.tree.map(lambda a: a + 0.1, model.init(jax.random.key(0), (2,)))
        tree = params["network"] if model is headed else params
        assert tree["context_embedding"]["classes"].shape == (3, 8)
        given = [model.score(params, context=jnp.full(2, c))(x, t) for c in (0, 2)]
        none = model.score(params)(x, t)
        assert float(jnp.min(jnp.abs(given[0] - given[1]))) > 1e-4
        assert float(jnp.min(jnp.abs(given[0] - none))) > 1e-4
        if model is headed:
            ratios = [
                model.decoder(params, context=c)(x, 0.9 * x, t) for c in (None, jnp.zeros(2, int))
            ]
            assert float(jnp.min(jnp.abs(ratios[0] - ratios[1]))) > 1e-5
