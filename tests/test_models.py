"""Networks: published parameter counts, independence of examples, options, layer oracles."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from models import DDPM, MLP, MODELS, ConcatMLP, NCSNpp, UNet, layers
from models.ddpm import ResnetBlockDDPM
from models.unet import depth_to_space, space_to_depth
from models.walk import walk

pytestmark = pytest.mark.usefixtures("compiled_at_o0")

SDEFLOW = {"up_attention": "every", "downsample_padding": "symmetric"}
SDEFLOW |= {"init_mode": "fan_out", "dropout_mode": "channel"}
SMALL = {"nf": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,), "num_groups": 4}
NETS = {
    "mlp_points": (MLP(hidden=16, depth=2, embed_dim=8), (2,)),
    "mlp_images": (MLP(hidden=16, depth=2, embed_dim=8), (8, 8, 1)),
    "concat_points": (ConcatMLP(hidden=16, depth=2), (2,)),
    "concat_images": (ConcatMLP(hidden=16, depth=1), (4, 4, 3)),
    "ddpm": (DDPM(**SMALL), (8, 8, 3)),
    "ddpm_sdeflow": (DDPM(**SMALL, **SDEFLOW), (8, 8, 1)),
    "unet": (UNet(channels=(8, 16), blocks=(1, 1), summary=8, embed_dim=8), (8, 8, 3)),
    "unet_patches": (UNet(channels=(8,), blocks=(1,), patch=2, attention=True), (4, 8, 1)),
}
# Of these the output starts near zero, and they have a rate of dropout.
calm_case = pytest.mark.parametrize(
    "case", [name for name in NETS if not name.startswith("concat")], indirect=True
)


@pytest.fixture(autouse=True)
def _strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(params=NETS)
def case(request):
    """(network, perturbed parameters, x, label); no parameter is zero."""
    net, shape = NETS[request.param]
    x, label = inputs(shape)
    return net, random_params(net, x, label), x, label


def inputs(shape, batch=4, dtype=np.float32):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, *shape)).astype(dtype)
    return jnp.asarray(x), jnp.asarray(rng.uniform(0.0, 999.0, batch).astype(dtype))


def spec(*shape):
    """A stand-in for (x: [2, *shape], label: [2]) that only has a shape."""
    return tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, *shape), (2,)))


def shapes(net, *args, **kwargs):
    """Parameters are float32 whatever the dtype of the inputs: their shapes need promotion."""
    init = functools.partial(net.init, **kwargs)
    with jax.numpy_dtype_promotion("standard"):
        return jax.eval_shape(init, jax.random.key(0), *args)["params"]


def attention_blocks(net, *shape):
    return sum(name.startswith("AttnBlock") for name in shapes(net, *spec(*shape)))


def random_params(net, *args, dtype=np.float32, **kwargs):
    """Parameters of the right shapes, all of order one over √fan_in."""
    rng = np.random.default_rng(1)

    def draw(leaf):
        values = rng.normal(size=leaf.shape) / math.prod(leaf.shape[:-1]) ** 0.5
        return jnp.asarray(values.astype(dtype))

    return jax.tree.map(draw, shapes(net, *args, **kwargs))


@functools.partial(jax.jit, static_argnums=0, static_argnames="train")
def apply(net, params, *args, **kwargs):
    return net.apply({"params": params}, *args, **kwargs)


@functools.partial(jax.jit, static_argnums=0)
def init(net, *args):
    """Output and fresh parameters; keys of type rbg, as threefry takes seconds to compile."""
    out, variables = net.init_with_output(jax.random.key(0, impl="rbg"), *args)
    return out, variables["params"]


@pytest.mark.parametrize(
    ("fields", "shape", "count"),
    [
        ({}, (32, 32, 3), 35_218_947),
        ({"conditional": False}, (32, 32, 3), 32_329_347),
        ({"ch_mult": (1, 1, 2, 2, 4, 4)}, (256, 256, 3), 111_569_923),
        ({"nf": 32, "ch_mult": (1, 2, 2), **SDEFLOW}, (28, 28, 1), 1_539_329),
        (SDEFLOW, (32, 32, 3), 35_746_307),
        ({"nf": 32, "ch_mult": (1, 2, 2), **SDEFLOW}, (32, 32, 1), 1_623_169),
    ],
)
def test_parameter_counts_are_the_published_ones(fields, shape, count):
    leaves = jax.tree.leaves(shapes(DDPM(**fields), *spec(*shape)))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == count


def test_parameter_tree_has_the_published_names():
    tree = shapes(DDPM(), *spec(32, 32, 3))
    single = {"Conv_0", "Conv_1", "Dense_0", "Dense_1", "GroupNorm_0"}
    blocks = {f"ResnetBlockDDPM_{i}" for i in range(8 + 2 + 12)}
    resample = {f"{name}_{i}" for name in ("Downsample", "Upsample") for i in range(3)}
    assert set(tree) == single | blocks | resample | {f"AttnBlock_{i}" for i in range(4)}
    names = {"GroupNorm_0", "Conv_0", "Dense_0", "GroupNorm_1", "Conv_1", "NIN_0"}
    assert set(tree["ResnetBlockDDPM_2"]) == names


@pytest.mark.parametrize("form", [{}, {"resamp_with_conv": False}, SDEFLOW])
@pytest.mark.parametrize("shape", [(28, 28, 1), (12, 20, 5)])
def test_ddpm_keeps_the_shape(shape, form):
    net = DDPM(**{**SMALL, **form, "ch_mult": (1, 2, 2)})
    out, _ = jax.eval_shape(net.init_with_output, jax.random.key(0), *spec(*shape))
    assert out == spec(*shape)[0]


@pytest.mark.parametrize("name", ["mlp_points", "concat_points"])
@pytest.mark.parametrize("shape", [(), (1,), (2,), (8, 8, 1), (28, 28, 1)])
def test_perceptrons_keep_the_shape(name, shape):
    net, (x, label) = NETS[name][0], inputs(shape)
    assert apply(net, random_params(net, x, label), x, label).shape == x.shape


def test_models_are_built_from_plain_values():
    plain = {"hidden": 8, "depth": 1}
    nets = [
        MODELS["ddpm"](**SMALL, **SDEFLOW),
        *(MODELS[n](**plain) for n in ("mlp", "concat_mlp")),
    ]
    for net in nets:
        assert hash(net) == hash(net.clone())
    with pytest.raises(TypeError, match="hiden"):
        MODELS["mlp"](hiden=8)


def test_examples_do_not_mix(case):
    net, params, x, label = case
    whole = apply(net, params, x, label)
    others = x.at[1:].set(3.0 * x[:0:-1]), label.at[1:].set(5.0)
    bound = 1e-6 * float(jnp.max(jnp.abs(whole)))
    np.testing.assert_allclose(apply(net, params, *others)[0], whole[0], rtol=0, atol=bound)
    halves = [apply(net, params, x[i : i + 2], label[i : i + 2]) for i in (0, 2)]
    np.testing.assert_allclose(jnp.concatenate(halves), whole, rtol=0, atol=4 * bound)


def test_gradients_are_finite_and_do_not_mix_examples(case):
    """d/d(params, x, label) of example 0: exactly zero for other examples, no parameter unused."""
    net, params, x, label = case

    def first(params, x, label):
        return jnp.mean(net.apply({"params": params}, x, label)[0] ** 2)

    grads = jax.jit(jax.grad(first, argnums=(0, 1, 2)))(params, x, label)
    assert not np.any(grads[1][1:])
    assert not np.any(grads[2][1:])
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert bool(jnp.all(jnp.isfinite(leaf))), path
        # The bias of the keys adds one number to all logits of a query; the softmax cancels it.
        if not jax.tree_util.keystr(path).endswith("['NIN_1']['b']"):
            assert float(jnp.max(jnp.abs(leaf))) > 0.0, path


@calm_case
def test_output_starts_near_zero_and_finite(case):
    net, _, x, label = case
    out, params = init(net, x, label)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    # A last layer of scale 1e-10 turns inputs of order one into outputs of order 1e-5.
    assert float(jnp.max(jnp.abs(out))) < 1e-4
    if isinstance(net, DDPM):
        width = (3 * {"fan_avg": 0.1, "fan_out": 1.0}[net.init_mode] / 16) ** 0.5
        assert 0.97 * width < float(jnp.max(params["AttnBlock_0"]["NIN_0"]["W"])) <= width
        for last in (params["AttnBlock_0"]["NIN_3"]["W"], params["ResnetBlockDDPM_0"]["Conv_1"]):
            assert max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(last)) < 1e-5


def test_float64_in_float64_out_and_agrees_with_float32(case):
    net, params, x, label = case
    single = apply(net, params, x, label)
    with jax.enable_x64(True):
        double = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), (params, x, label))
        out = apply(net, *double)
        assert out.dtype == jnp.float64
        # Float32 sees the phase 999 t ω to 999 · 2⁻²⁴ at best.
        np.testing.assert_allclose(single, out, rtol=0, atol=1e-3 * float(jnp.max(jnp.abs(out))))


def test_output_depends_on_the_label(case):
    net, params, x, label = case
    change = apply(net, params, x, label + 100.0) - apply(net, params, x, label)
    assert min(float(jnp.max(jnp.abs(each))) for each in change) > 1e-3


HEADED = {
    "mlp": (MLP(hidden=16, depth=2, embed_dim=8, outputs=5), (3,)),
    "ddpm": (DDPM(**SMALL, outputs=5), (8, 8, 3)),
    "ncsnpp": (
        NCSNpp(nf=8, ch_mult=(1, 1), num_res_blocks=1, progressive="output_skip",
               progressive_input="residual", fir=True, outputs=5),
        (8, 8, 3),
    ),
    "unet": (UNet(channels=(8, 8), blocks=(1, 1), embed_dim=8, outputs=5), (8, 8, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADED)
def test_networks_give_several_numbers_per_coordinate_and_see_its_features(name):
    """K outputs of every coordinate, in the order of coordinates; features reach all of them."""
    net, shape = HEADED[name]
    x, label = inputs(shape)
    features = jnp.asarray(np.random.default_rng(1).normal(size=(*x.shape, 2)), jnp.float32)
    params = random_params(net, x, label, features=features)
    out = apply(net, params, x, label, features=features)
    assert out.shape == (*x.shape, 5)
    other = apply(net, params, x, label, features=features + 0.1)
    assert float(jnp.min(jnp.max(jnp.abs(out - other), axis=(0, -1)))) > 0.0
    # Coordinate c has numbers 5c, …, 5c + 4 of the last layer: change the bias of one of them.
    biases = [
        path
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if leaf.shape == (math.prod(shape[-1:]) * 5,) and "bias" in str(path[-1])
    ]
    moved = jax.tree_util.tree_map_with_path(
        lambda p, a: a.at[7].add(1.0) if p == biases[-1] else a, params
    )
    gap = np.array(apply(net, moved, x, label, features=features) - out)
    assert np.abs(gap[..., 1, 2] - 1.0).max() < 1e-4
    gap[..., 1, 2] = 0.0
    assert np.abs(gap).max() < 1e-4


def test_patches_of_pixels_and_back():
    x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    deep = space_to_depth(x, 2)
    assert deep.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(deep[0, 1, 2], x[0, 2:4, 4:6].ravel())
    np.testing.assert_array_equal(depth_to_space(deep, 2), x)


def test_cheap_dropout_keeps_the_mean_and_drops_the_stated_share():
    x = jnp.ones((200, 301))
    layer = layers.Dropout(0.2)
    out = layer.apply({}, x, True, rngs={"dropout": jax.random.key(0)})
    share = 51 / 256
    assert float(jnp.mean(out == 0.0)) == pytest.approx(share, abs=4 * (share / x.size) ** 0.5)
    np.testing.assert_allclose(jnp.max(out), 1.0 / (1.0 - share), rtol=1e-6)
    np.testing.assert_array_equal(layer.apply({}, x, False), x)
    again = layer.apply({}, x, True, rngs={"dropout": jax.random.key(1)})
    both = float(jnp.mean((out == 0.0) & (again == 0.0)))
    assert both == pytest.approx(share**2, abs=4 * share / x.size**0.5)


def test_unconditional_ddpm_ignores_the_label_and_the_padding_reaches_the_network():
    net = DDPM(**SMALL, conditional=False)
    x, label = inputs((8, 8, 3))
    params = random_params(net, x, label)
    assert not any(name.startswith("Dense") for name in params)
    out = apply(net, params, x, label)
    np.testing.assert_array_equal(apply(net, params, x, 2 * label), out)
    symmetric = apply(net.clone(downsample_padding="symmetric"), params, x, label)
    assert float(jnp.max(jnp.abs(symmetric - out))) > 1e-3


@calm_case
def test_dropout_acts_in_training_only_and_follows_its_key(case):
    net, params, x, label = case
    dropped = net.clone(dropout=0.5)
    keys = jax.random.split(jax.random.key(3))

    def train(key):
        return apply(dropped, params, x, label, train=True, rngs={"dropout": key})

    plain = apply(net, params, x, label)
    np.testing.assert_array_equal(apply(dropped, params, x, label), plain)
    np.testing.assert_array_equal(train(keys[0]), train(keys[0]))
    assert float(jnp.max(jnp.abs(train(keys[0]) - train(keys[1])))) > 1e-3
    assert float(jnp.max(jnp.abs(train(keys[0]) - plain))) > 1e-3


def test_mlp_second_derivatives_are_those_of_finite_differences():
    net = NETS["mlp_points"][0]
    with jax.enable_x64(True):
        x, label = inputs((2,), dtype=np.float64)
        params = random_params(net, x, label, dtype=np.float64)

        def slope(r):
            """Derivative at r along (1, 1e-3) in (x, label)."""
            return jax.jvp(lambda r: apply(net, params, x + r, label + 1e-3 * r), (r,), (one,))[1]

        zero, one, step = jnp.zeros(()), jnp.ones(()), 1e-4
        second = jax.jvp(slope, (zero,), (one,))[1]
        central = (slope(zero + step) - slope(zero - step)) / (2 * step)
        assert float(jnp.max(jnp.abs(second))) > 1e-3
        # The error of the central difference: step²/6 f⁗ and rounding, 1e-16 / step.
        np.testing.assert_allclose(second, central, rtol=0, atol=1e-6)


def test_mlp_is_smooth_at_the_origin_when_fresh():
    net = MLP(hidden=32, depth=1)
    x, label = jnp.zeros((1, 2), jnp.float32), jnp.ones(1, jnp.float32)
    _, params = init(net, x, label)
    params["output"]["kernel"] = jnp.full((32, 2), 32**-0.5, jnp.float32)
    params["ResidualBlock_0"]["Dense_2"]["kernel"] = jnp.eye(32, dtype=jnp.float32)
    hessian = jax.jit(jax.hessian(lambda x: net.apply({"params": params}, x, label)[0, 0]))(x)
    # A LayerNorm of W x alone has derivatives of order eps^(−1/2) = 1e3 and eps^(−1) = 1e6 here.
    assert float(jnp.max(jnp.abs(hessian))) < 100.0


def test_concat_mlp_has_the_published_size_and_fields():
    tree = shapes(MODELS["concat_mlp"](), *spec(2))
    kernels = [tree[f"Dense_{i}"]["kernel"].shape for i in range(4)]
    assert kernels == [(3, 128), (128, 128), (128, 128), (128, 2)]
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) == 33_794
    fields = {f.name for f in dataclasses.fields(ConcatMLP)} - {"parent", "name"}
    assert fields == {"hidden", "depth", "activation"}


@pytest.mark.parametrize("name", ["concat_points", "concat_images"])
def test_concat_mlp_against_numpy(name):
    net, shape = NETS[name]
    with jax.enable_x64(True):
        x, label = inputs(shape, dtype=np.float64)
        params = random_params(net, x, label, dtype=np.float64)
        ours = apply(net, params, x, label)
        trained = apply(net, params, x, label, train=True)
    np.testing.assert_array_equal(ours, trained)
    h = np.concatenate([np.asarray(x).reshape(4, -1), np.asarray(label)[:, None]], axis=1)
    layers = [jax.tree.map(np.asarray, params[f"Dense_{i}"]) for i in range(net.depth + 1)]
    for i, layer in enumerate(layers):
        h = h @ layer["kernel"] + layer["bias"]
        h = h / (1.0 + np.exp(-h)) if i < net.depth else h
    np.testing.assert_allclose(ours, h.reshape(x.shape), rtol=1e-12, atol=1e-12)


def test_concat_mlp_starts_uniform_within_one_over_the_root_of_the_fan_in():
    """Weights and biases: U(−w, w), variance w²/3, its sampling error w² √(4/45/n)."""
    _, params = init(ConcatMLP(hidden=400), *inputs((24,)))
    for i, fan_in in enumerate((25, 400, 400, 400)):
        bound = fan_in**-0.5
        for leaf in params[f"Dense_{i}"].values():
            assert float(jnp.max(jnp.abs(leaf))) <= bound * (1 + 1e-6)
            error = (4 / 45 / leaf.size) ** 0.5
            assert abs(float(jnp.var(leaf)) / bound**2 - 1 / 3) < 4 * error
            assert abs(float(jnp.mean(leaf)) / bound) < 4 * (1 / 3 / leaf.size) ** 0.5


def test_attention_is_placed_by_the_height_and_after_one_or_every_block_on_the_way_up():
    net = DDPM(**{**SMALL, "num_res_blocks": 3})  # heights 8 and 4 or 12 and 6; attention at 4
    assert attention_blocks(net, 8, 12, 3) == 3 + 1 + 1
    assert attention_blocks(net.clone(up_attention="every"), 8, 12, 3) == 3 + 1 + 4
    assert attention_blocks(net, 12, 8, 3) == 1


def test_downsample_paddings_are_centred_on_odd_and_even_pixels():
    x, _ = inputs((8, 6, 1))
    kernel = jnp.zeros((3, 3, 1, 1), jnp.float32).at[1, 1].set(1.0)
    params = {"Conv_0": {"kernel": kernel, "bias": jnp.zeros(1, jnp.float32)}}
    for padding, first in (("same", 1), ("symmetric", 0)):
        half = apply(layers.Downsample(padding=padding), params, x)
        np.testing.assert_array_equal(half, x[:, first::2, first::2])


def test_resampling_without_convolutions():
    x = np.random.default_rng(0).normal(size=(2, 4, 6, 3)).astype(np.float32)
    up = layers.nearest_upsample(jnp.asarray(x))
    np.testing.assert_array_equal(up, x.repeat(2, axis=1).repeat(2, axis=2))
    quads = [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    np.testing.assert_allclose(layers.mean_downsample(jnp.asarray(x)), sum(quads) / 4, atol=1e-6)
    np.testing.assert_array_equal(layers.mean_downsample(up), x)
    np.testing.assert_array_equal(apply(layers.Upsample(with_conv=False), {}, jnp.asarray(x)), up)


@pytest.mark.parametrize("mode", ["element", "channel"])
def test_dropout_of_elements_and_of_whole_channels(mode):
    """With an identity as second convolution, block(x) − x is the dropped feature map itself."""
    block = ResnetBlockDDPM(16, num_groups=4, dropout=0.5, dropout_mode=mode)
    x, temb = inputs((4, 4, 16))[0], inputs((8,))[0]
    params = random_params(block, x, temb, train=False)
    eye = jnp.zeros((3, 3, 16, 16), jnp.float32).at[1, 1].set(jnp.eye(16, dtype=jnp.float32))
    params["Conv_1"] = {"kernel": eye, "bias": jnp.zeros(16, jnp.float32)}
    full = np.asarray(apply(block, params, x, temb, train=False) - x)
    rngs = {"dropout": jax.random.key(0)}
    dropped = np.asarray(apply(block, params, x, temb, train=True, rngs=rngs) - x)
    kept = np.abs(dropped) > np.abs(full)
    np.testing.assert_allclose(dropped, np.where(kept, 2.0 * full, 0.0), rtol=0, atol=1e-5)
    whole = np.all(kept == kept[:, :1, :1, :], axis=(1, 2))
    assert np.all(whole) == (mode == "channel")
    # 4 · 16 channels or 1024 elements, each kept with probability ½: four standard deviations.
    assert abs(kept.mean() - 0.5) < 4 * 0.5 / {"channel": 64, "element": 1024}[mode] ** 0.5
    assert np.any(kept[0] != kept[1])


@pytest.mark.parametrize(("mode", "fan"), [("fan_avg", 9 * (24 + 40) / 2), ("fan_out", 9 * 40)])
def test_default_init_is_uniform_with_the_published_range(mode, fan):
    key = jax.random.key(0, impl="rbg")
    draws = layers.default_init(1.0, mode)(key, (3, 3, 24, 40), jnp.float32)
    width = (3.0 / fan) ** 0.5
    assert 0.99 * width < float(jnp.max(jnp.abs(draws))) < width * (1 + 1e-6)
    # Variance of U(−w, w) is w²/3, its sampling error w² √(4/45/n).
    assert abs(float(jnp.var(draws)) - width**2 / 3) < 4 * width**2 * (4 / 45 / draws.size) ** 0.5
    tiny = layers.default_init(0.0, mode)(key, (3, 3, 24, 40), jnp.float32)
    np.testing.assert_allclose(tiny, 1e-5 * draws, rtol=1e-5)


@pytest.mark.parametrize("dim", [4, 7, 64])
def test_sinusoidal_embedding_against_its_formula(dim):
    label = np.array([0.0, 1e-3, 1.0, -6.5, 999.0])
    half = dim // 2
    phase = np.array([[t * 10000.0 ** (-k / (half - 1)) for k in range(half)] for t in label])
    rows = np.concatenate([np.sin(phase), np.cos(phase), np.zeros((5, dim % 2))], axis=1)
    with jax.enable_x64(True):
        ours = layers.sinusoidal_embedding(jnp.asarray(label), dim)
    # Phases up to 999 lose 999 · 2⁻⁵² each.
    np.testing.assert_allclose(ours, rows, rtol=0, atol=1e-11)
    with pytest.raises(ValueError, match=r"embedding of the label=3: need at least 4"):
        layers.sinusoidal_embedding(ours[:, 0], 3)


def test_group_norm_keeps_digits_where_the_mean_is_large():
    """Flax's layer is the oracle where its fast variance is exact enough; 1e4 + x is not such."""
    x, _ = inputs((4, 6, 8))
    params = random_params(layers.GroupNorm(4), x)
    ours = apply(layers.GroupNorm(4), params, x)
    np.testing.assert_allclose(ours, apply(nn.GroupNorm(4), params, x), rtol=0, atol=1e-5)
    # x + 1e4 is rounded to 2⁻¹⁰: 1e-3 of its standard deviation.
    shifted = apply(layers.GroupNorm(4), params, x + 1e4)
    np.testing.assert_allclose(shifted, ours, rtol=0, atol=5e-3)


@pytest.mark.parametrize("skip_rescale", [False, True])
def test_attention_block_against_numpy(skip_rescale):
    block = layers.AttnBlock(num_groups=2, skip_rescale=skip_rescale)
    with jax.enable_x64(True):
        x, _ = inputs((3, 5, 6), batch=2, dtype=np.float64)
        params = random_params(block, x, dtype=np.float64)
        ours = np.asarray(apply(block, params, x))
    p = jax.tree.map(np.asarray, params)
    x = np.asarray(x).reshape(2, 15, 6)
    groups = x.reshape(2, 15, 2, 3)
    centred = groups - groups.mean(axis=(1, 3), keepdims=True)
    norm = (centred / np.sqrt(groups.var((1, 3), keepdims=True) + 1e-6)).reshape(x.shape)
    norm = norm * p["GroupNorm_0"]["scale"] + p["GroupNorm_0"]["bias"]
    q, k, v = (norm @ p[f"NIN_{i}"]["W"] + p[f"NIN_{i}"]["b"] for i in range(3))
    weights = np.exp(q @ k.transpose(0, 2, 1) / math.sqrt(6))
    mixed = weights / weights.sum(axis=-1, keepdims=True) @ v
    expected = (x + mixed @ p["NIN_3"]["W"] + p["NIN_3"]["b"]) * (0.5**0.5 if skip_rescale else 1)
    np.testing.assert_allclose(ours.reshape(x.shape), expected, rtol=0, atol=1e-12)


def test_activations():
    expected = {
        "elu": [math.expm1(-2.0), 3.0],
        "lrelu": [-0.4, 3.0],
        "relu": [0.0, 3.0],
        "swish": [x / (1 + math.exp(-x)) for x in (-2.0, 3.0)],
        "gelu": [x * (1 + math.erf(x / math.sqrt(2))) / 2 for x in (-2.0, 3.0)],
    }
    for name, act in layers.ACTIVATIONS.items():  # gelu by tanh, ± 5e-4
        values = act(jnp.asarray([-2.0, 3.0], jnp.float32))
        np.testing.assert_allclose(values, expected[name], atol=5e-4 if name == "gelu" else 1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"nonlinearity": "tanhh"}, r"nonlinearity='tanhh': allowed \['elu', 'gelu', 'lrelu'"),
        ({"up_attention": "all"}, r"up_attention='all': allowed \['every', 'last'"),
        (
            {"downsample_padding": "valid"},
            r"downsample_padding='valid': allowed \['same', 'symmetric'",
        ),
        ({"init_mode": "fan_in"}, r"init_mode='fan_in': allowed \['fan_avg', 'fan_out'"),
        ({"dropout_mode": "pixel"}, r"dropout_mode='pixel': allowed \['channel', 'element'"),
        ({"dropout": 1.0}, r"dropout=1.0: need 0 <= dropout < 1"),
        ({"num_res_blocks": 0}, r"num_res_blocks=0: need an integer of at least 1"),
        ({"num_groups": 0, "nf": 32}, r"num_groups=0: need"),
        ({"nf": -32}, r"nf=-32: need"),
        ({"ch_mult": ()}, r"ch_mult=\(\): need one factor"),
        ({"nf": 32, "ch_mult": (1, 1.5)}, r"ch_mult\[1\]=1.5: need"),
        ({"widths": (1, 2, 2, 0)}, r"widths\[3\]=0: need"),
        ({"nf": 48, "num_groups": 32}, r"num_groups=32: need a divisor of 48 channels"),
        ({"activation": "swich"}, r"activation='swich': allowed \['elu'.*did you mean swish"),
        ({"activation": "elu", "dropout": -0.1}, r"dropout=-0.1: need"),
        ({"hidden": 0}, r"hidden=0: need"),
        ({"depth": 0}, r"depth=0: need"),
        ({"embed_dim": 3}, r"embed_dim=3: need at least 4"),
    ],
)
def test_a_field_is_refused_by_name_value_and_what_is_allowed(fields, message):
    known = {net: {f.name for f in dataclasses.fields(net)} for net in MODELS.values()}
    nets = [net for net in known if fields.keys() <= known[net]]
    assert nets
    for net in nets:
        with pytest.raises(ValueError, match=message):
            net(**fields)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            (30, 32, 3),
            r"ch_mult=\(1, 2, 2\): need images .* multiples of 4; these are \(2, 30, 32, 3\)",
        ),
        ((32, 18, 3), r"ch_mult=.* multiples of 4; these are \(2, 32, 18, 3\)"),
        ((8,), r"ch_mult=.* images \[B, H, W, C\] .*; these are \(2, 8\)"),
    ],
)
def test_ddpm_refuses_images(shape, message):
    with pytest.raises(ValueError, match=message):
        shapes(DDPM(**{**SMALL, "ch_mult": (1, 2, 2)}), *spec(*shape))


def test_a_refine_net_refuses_images_by_the_name_of_its_own_field():
    with pytest.raises(ValueError, match=r"widths=.* multiples of 4; these are \(2, 8, 18, 1\)"):
        shapes(MODELS["ncsnv2_128"](nf=4), *spec(8, 18, 1))


def test_a_walk_visits_every_level_down_and_up_and_returns_each_skip_to_its_level():
    class Diary:
        """What travels is the list of the places; the skips are the levels that kept them."""

        def halve(self, h, level):
            return [*h, f"halve {level}"]

        def down(self, h, level, skips):
            skips.extend([level] * (level + 1))
            return [*h, f"down {level}"]

        def middle(self, h):
            return [*h, "middle"]

        def up(self, h, level, skips):
            assert [skips.pop() for _ in range(level + 1)] == [level] * (level + 1)
            return [*h, f"up {level}"]

        def double(self, h, level):
            return [*h, f"double {level}"]

    down = ["down 0", "halve 1", "down 1", "halve 2", "down 2"]
    up = ["up 2", "double 2", "up 1", "double 1", "up 0"]
    assert walk(Diary(), 3, []) == [*down, "middle", *up]
    assert walk(Diary(), 1, []) == ["down 0", "middle", "up 0"]
