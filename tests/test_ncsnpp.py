"""NCSN++ and NCSNv2: every option, filters against SciPy, bfloat16, rematerialisation."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from scipy import signal

from dequantization import Pixels
from high_order import HighOrder
from losses import mean_loss, score_matching, time_law
from models import MODELS, NCSNpp
from models.fir import FIRDownsample, FIRUpsample, fir_downsample, fir_upsample
from models.ncsnpp import Combine
from operators import value_hvp_and_directional
from parameterization import ScoreModel
from sde_lib import VPSDE
from taylor import along_curve
from terms import Terms

pytestmark = pytest.mark.usefixtures("compiled_at_o0")

SMALL = {"nf": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,)}
TAPS = (1.0, 2.0, 4.0, 3.0)  # not symmetric: a flipped filter shows


def make(dtype=np.float32, shape=(8, 8, 3), name="ncsnpp", **fields):
    """(network, parameters that are all of order one, x, label)."""
    small = {"nf": 8} if name.startswith("ncsnv2") else SMALL
    net = MODELS[name](**(small | fields))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, *shape)), dtype)
    label = jnp.asarray([0.5, 30.0], dtype)
    with jax.numpy_dtype_promotion("standard"):
        shapes = jax.eval_shape(net.init, jax.random.key(0), x, label)["params"]
    draw = lambda leaf: rng.standard_normal(leaf.shape) / np.prod(leaf.shape[:-1]) ** 0.5  # noqa: E731
    return net, jax.tree.map(lambda leaf: jnp.asarray(draw(leaf), dtype), shapes), x, label


def apply(net, params, x, label):
    return net.apply({"params": params}, x, label)


OPTIONS = {
    "resblock_type": ("biggan", "ddpm"),
    "fir": (False, True),
    "progressive": ("none", "output_skip", "residual"),
    "progressive_input": ("none", "input_skip", "residual"),
}


@pytest.mark.parametrize("values", list(itertools.product(*OPTIONS.values())), ids=str)
def test_every_combination_of_options_builds_and_keeps_the_shape(values):
    fields = dict(zip(OPTIONS, values, strict=True))
    net = NCSNpp(**SMALL, **fields, progressive_combine="cat", embedding_type="fourier")
    x = jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32)
    label = jax.ShapeDtypeStruct((2,), jnp.float32)
    out, _ = jax.eval_shape(net.init_with_output, jax.random.key(0), x, label)
    assert (out.shape, out.dtype) == (x.shape, x.dtype)


WHOLE = {
    "skips": {"fir": True, "progressive": "output_skip", "progressive_input": "input_skip"},
    "residuals": {
        "resblock_type": "ddpm", "fir": True, "progressive": "residual",
        "progressive_input": "residual", "embedding_type": "fourier", "skip_rescale": False,
    },
    "plain_ddpm": {"resblock_type": "ddpm", "progressive_input": "residual", "centered": False},
    "ncsnv2_64": {"name": "ncsnv2_64"},
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_every_parameter_counts_examples_do_not_mix_and_float64_stays(name):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        net, params, x, label = make(np.float64, **WHOLE[name])

        def first(params, x):
            return jnp.sum(apply(net, params, x, label)[0] ** 2)

        grads, towards = jax.jit(jax.grad(first, argnums=(0, 1)))(params, x)
        assert not np.any(towards[1])
        assert np.any(towards[0])
        frozen = ("['GaussianFourierProjection_0']['W']", "['NIN_1']['b']")
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
            where = jax.tree_util.keystr(path)
            assert bool(jnp.all(jnp.isfinite(leaf))), where
            assert where.endswith(frozen) or float(jnp.max(jnp.abs(leaf))) > 1e-12, where
        assert leaf.dtype == jnp.float64


@pytest.mark.parametrize("name", ["skips", "residuals"])
def test_one_taylor_sweep_gives_the_nested_derivatives(name):
    """Through filters, pyramids and the logarithm of the label, in space and time at once."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        net, params, x, label = make(np.float64, **WHOLE[name])
        v, w = jnp.cos(3.0 * x), jnp.sin(label)
        field = lambda y, t: apply(net, params, y, t)  # noqa: E731

        def nested(x, label):
            inner = lambda *point: jax.jvp(field, point, (v, w))[1]  # noqa: E731
            return jax.jvp(inner, (x, label), (v, w))

        def sweep(x, label):
            zero = (jnp.zeros_like(x), jnp.zeros_like(label))
            _, first, (second,) = along_curve(field, (x, label), (v, w), lambda _: [zero])
            return first, second

        for found, expected in zip(
            jax.jit(sweep)(x, label), jax.jit(nested)(x, label), strict=True
        ):
            scale = float(jnp.max(jnp.abs(expected)))
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10 * scale)


def by_scipy(x, taps, pad, *, up=1, down=1, gain=1.0):
    """Zero insertion, padding, true convolution, subsampling, in two dimensions."""
    b, h, w, c = x.shape
    wide = np.zeros((b, up * h, up * w, c))
    wide[:, ::up, ::up] = x
    wide = np.pad(wide, ((0, 0), pad, pad, (0, 0)))
    kernel = gain**2 * np.outer(taps, taps) / np.sum(taps) ** 2
    planes = np.moveaxis(wide, 3, 1).reshape(b * c, *wide.shape[1:3])
    out = np.stack([signal.convolve2d(plane, kernel, "valid") for plane in planes])
    return np.moveaxis(out.reshape(b, c, *out.shape[1:]), 1, 3)[:, ::down, ::down]


def test_filters_against_scipy():
    with jax.enable_x64(True):
        x = np.random.default_rng(0).standard_normal((2, 6, 8, 3))
        down, up = fir_downsample(jnp.asarray(x), TAPS), fir_upsample(jnp.asarray(x), TAPS)
        np.testing.assert_allclose(down, by_scipy(x, TAPS, (1, 1), down=2), atol=1e-13)
        np.testing.assert_allclose(up, by_scipy(x, TAPS, (2, 1), up=2, gain=2.0), atol=1e-13)
        constant = jnp.ones((1, 8, 8, 1))
        np.testing.assert_allclose(fir_upsample(constant, (1, 3, 3, 1))[:, 2:-2, 2:-2], 1.0)


def test_filters_with_convolutions_against_scipy():
    """Down: filter, then stride 2. Up: convolution between zeros, then filter, then the bias."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        rng = np.random.default_rng(0)
        x, kernel = rng.standard_normal((1, 6, 6, 2)), rng.standard_normal((3, 3, 2, 4))
        bias = rng.standard_normal(4)

        def correlate(image, stride):
            size = (image.shape[1] - 3) // stride + 1
            out = np.zeros((1, size, size, 4))
            for i, j in itertools.product(range(size), repeat=2):
                patch = image[0, stride * i : stride * i + 3, stride * j : stride * j + 3]
                out[0, i, j] = np.einsum("hwc,hwco->o", patch, kernel)
            return out

        params = {"Conv_0": {"kernel": kernel, "bias": bias}}
        found = FIRDownsample(4, TAPS).apply({"params": params}, jnp.asarray(x))
        expected = correlate(by_scipy(x, TAPS, (2, 2)), 2) + bias
        np.testing.assert_allclose(found, expected, atol=1e-12)
        params = {"Conv_0": {"kernel": kernel}, "bias": bias}
        found = FIRUpsample(4, TAPS).apply({"params": params}, jnp.asarray(x))
        wide = np.zeros((1, 11, 11, 2))
        wide[:, ::2, ::2] = x
        between = correlate(np.pad(wide, ((0, 0), (2, 2), (2, 2), (0, 0))), 1)
        expected = by_scipy(between, TAPS, (1, 1), gain=2.0) + bias
        np.testing.assert_allclose(found, expected, atol=1e-12)


def zeroed(**fields):
    """(network, a function that sets leaves of parameters that are zero, x, label)."""
    net, params, x, label = make(np.float64, **fields)
    zeros = jax.tree.map(jnp.zeros_like, params)

    def output(changes):
        flat = flatten_dict(zeros, sep="/")
        assert changes.keys() <= flat.keys()
        flat |= {path: jnp.asarray(value) for path, value in changes.items()}
        return apply(net, unflatten_dict(flat, sep="/"), x, label)

    return output


def centre_tap(matrix):
    """Kernel of a 3×3 convolution that maps every pixel by the matrix."""
    kernel = np.zeros((3, 3, *matrix.shape))
    kernel[1, 1] = matrix
    return kernel


def test_output_skip_adds_the_images_of_all_levels():
    """Where no feature lives, each level paints its bias."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        biases = np.random.default_rng(0).standard_normal((2, 3))
        output = zeroed(progressive="output_skip")
        found = output({"Conv_1/bias": biases[0], "Conv_2/bias": biases[1]})
        np.testing.assert_allclose(found, np.broadcast_to(biases.sum(0), found.shape), rtol=1e-12)


def test_residual_output_adds_the_enlarged_pyramid_to_the_features():
    """Features e/√2 at the first level, pyramid b of the second: (A b + e/√2)/√2, normed."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        rng = np.random.default_rng(0)
        b, e = rng.standard_normal(16), rng.standard_normal(8)
        enlarge, last = rng.standard_normal((16, 8)), rng.standard_normal((8, 3))
        found = zeroed(progressive="residual")({
            "Conv_1/bias": b, "Upsample_0/Conv_0/kernel": centre_tap(enlarge),
            "ResnetBlockBigGAN_9/Conv_1/bias": e, "GroupNorm_1/scale": np.ones(8),
            "Conv_2/kernel": centre_tap(last),
        })  # fmt: skip
        groups = ((b @ enlarge + e / 2**0.5) / 2**0.5).reshape(2, 4)
        centred = groups - groups.mean(1, keepdims=True)
        y = (centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-6)).ravel()
        expected = (y / (1.0 + np.exp(-y))) @ last
        np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), rtol=1e-10)


@pytest.mark.parametrize("method", ["sum", "cat"])
def test_combine_maps_the_pyramid_and_joins_it_before_the_features(method):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        rng = np.random.default_rng(0)
        pyramid, h = rng.standard_normal((1, 2, 2, 3)), rng.standard_normal((1, 2, 2, 4))
        kernel, bias = rng.standard_normal((1, 1, 3, 4)), rng.standard_normal(4)
        arrays = jax.tree.map(jnp.asarray, (pyramid, h, {"kernel": kernel, "bias": bias}))
        found = Combine(method).apply({"params": {"Conv_0": arrays[2]}}, *arrays[:2])
        mapped = pyramid @ kernel[0, 0] + bias
        expected = mapped + h if method == "sum" else np.concatenate([mapped, h], axis=3)
        np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("name", ["ncsnpp", "ddpm"])
def test_bfloat16_computes_coarsely_and_returns_float32(name):
    """Parameters and output stay float32; the result is that of float32 to a few per cent."""
    fields = {"num_groups": 4} if name == "ddpm" else {"fir": True}
    net, params, x, label = make(name=name, shape=(8, 8, 3), **fields)
    exact = jax.jit(functools.partial(apply, net))(params, x, label)
    coarse = jax.jit(functools.partial(apply, net.clone(dtype="bfloat16")))(params, x, label)
    assert coarse.dtype == jnp.float32
    error = float(jnp.linalg.norm(coarse - exact) / jnp.linalg.norm(exact))
    assert 1e-4 < error < 0.05


@pytest.mark.parametrize(
    ("name", "order", "remat"), [("ncsnpp", 3, "keep_convs"), ("ddpm", 2, "block")]
)
def test_rematerialisation_changes_neither_names_nor_gradients(name, order, remat):
    """Of a loss that is itself a derivative of the network, with dropout."""
    fields = {"num_groups": 4} if name == "ddpm" else {}
    net, params, _, _ = make(name=name, ch_mult=(1,), dropout=0.5, **fields)
    law = time_law(VPSDE(), smallest_time=1e-3)
    terms = Terms(high_order=HighOrder(order, third_order_form="directional"))
    batch = {
        "image": jnp.zeros((2, 8, 8, 3), jnp.uint8), "noise_id": jnp.arange(2),
        "mask": jnp.ones(2, bool),
    }  # fmt: skip

    def gradient(remat):
        model = ScoreModel(net.clone(remat=remat), VPSDE())
        per_example = score_matching(model, Pixels(256), law, terms, batch_size=2, train=True)
        step = jax.jit(jax.grad(mean_loss(per_example), has_aux=True))
        return step(params, jax.random.key(0), batch)[0]

    leaves = jax.tree_util.tree_leaves_with_path(gradient("none"))
    for (path, a), b in zip(leaves, jax.tree.leaves(gradient(remat)), strict=True):
        scale = float(jnp.max(jnp.abs(a))) + 1e-3
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-4 * scale, err_msg=str(path))


def test_hv_of_the_filters_is_the_filter_of_v():
    """They are linear: the second derivative vanishes."""
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 4, 2)))
        field = lambda y: fir_downsample(fir_upsample(y, TAPS), TAPS)  # noqa: E731
        _, hv, second = value_hvp_and_directional(field, x, jnp.cos(x))
        np.testing.assert_allclose(hv, field(jnp.cos(x)), atol=1e-14)
        assert not np.any(second)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"resblock_type": "resnet"}, r"resblock_type='resnet': allowed \['biggan', 'ddpm'"),
        ({"progressive": "skip"}, r"progressive='skip': allowed \['none', 'output_skip'"),
        (
            {"progressive_input": "skip"},
            r"progressive_input='skip': allowed \['input_skip', 'none'",
        ),
        ({"progressive_combine": "mean"}, r"progressive_combine='mean': allowed \['cat', 'sum'"),
        ({"embedding_type": "sine"}, r"embedding_type='sine': allowed \['fourier', 'positional'"),
        ({"fir_kernel": (1.0, -1.0)}, r"fir_kernel=\(1.0, -1.0\): need two taps"),
        ({"dtype": "float16"}, r"dtype='float16': allowed \['bfloat16', 'float32'"),
        ({"remat": "all"}, r"remat='all': allowed \['block', 'keep_convs', 'none'"),
        ({"ch_mult": (1, 0)}, r"ch_mult\[1\]=0: need"),
    ],
)
def test_wrong_options_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        NCSNpp(**fields)
    with pytest.raises(ValueError, match="widths="):
        MODELS["ncsnv2_64"](widths=(1, 2))
