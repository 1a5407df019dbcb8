"""Published dequantisers: outputs against the published layout, written out in NumPy; damage."""

import functools
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import serialization
from flax.traverse_util import flatten_dict, unflatten_dict

import flow_importer
import run_lib
import train_state
from dequantization import FlowDequantizer, Pixels
from models.flowpp import Flowpp
from run_lib.dequantizer_training import load_dequantizer
from run_lib.experiment import Experiment
from tests import tiny

SHAPE = (6, 6, 3)
FLOWS = {
    "shallow": Flowpp(filters=8, components=3, blocks=2, couplings=4),
    "deep": Flowpp(filters=8, components=3, blocks=1, couplings=4, processor="deep"),
}
Leaves = dict[str, np.ndarray]


class Published:
    """The published network as a function of its leaves, which are drawn when first asked for."""

    def __init__(self, kind: str, seed: int) -> None:
        self.deep, self.seed, self.leaves = kind == "deep", seed, {}

    def leaf(self, name: str, *shape: int) -> np.ndarray:
        if name not in self.leaves:
            rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
            near_one = name.endswith("_g")
            size = 0.1 if near_one or len(shape) == 1 else 0.5 / np.sqrt(np.prod(shape[:-1]))
            drawn = size * rng.normal(size=shape) + near_one
            if "Pointwise" in name:
                drawn = drawn + np.eye(shape[0])
            self.leaves[name] = drawn.astype(np.float32)
        return self.leaves[name].astype(np.float64)

    def convolve(self, x: np.ndarray, name: str, width: int) -> np.ndarray:
        """3×3: weight-normalised, or with height and width of the kernel exchanged."""
        shape = (3, 3, x.shape[-1], width)
        if self.deep:
            v = self.leaf(f"{name}_V", *shape)
            kernel = v / np.sqrt((v**2).sum(axis=(0, 1, 2))) * self.leaf(f"{name}_g", width)
        else:
            kernel = self.leaf(f"{name}_W", *shape).transpose(1, 0, 2, 3)
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        h, w = x.shape[1:3]
        parts = (padded[:, i : i + h, j : j + w] @ kernel[i, j] for i in range(3) for j in range(3))
        return sum(parts) + self.leaf(f"{name}_b", width)

    def product(self, x: np.ndarray, name: str, width: int) -> np.ndarray:
        return x @ self.leaf(f"{name}_W", x.shape[-1], width) + self.leaf(f"{name}_b", width)

    def gated_conv(
        self, x: np.ndarray, name: str, a: np.ndarray | None, last: Callable
    ) -> np.ndarray:
        width = x.shape[-1]
        h = self.convolve(elu2(x), f"{name}_c1", width)
        if a is not None:
            h = h + self.product(elu2(a), f"{name}_a_proj", width)
        return x + gate(last(elu2(h), f"{name}_c2", 2 * width))

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        shape = (1, 1, 1, x.shape[-1])
        u = x - x.mean(axis=-1, keepdims=True)
        u = u / np.sqrt((u**2).mean(axis=-1, keepdims=True) + 1e-5)
        return u * self.leaf(f"{name}_g", *shape) + self.leaf(f"{name}_b", *shape)

    def attention(self, x: np.ndarray, name: str, position: np.ndarray) -> np.ndarray:
        b, h, w, c = x.shape
        mixed = self.product(x + position, f"{name}_proj1", 3 * c).reshape(b, h * w, 3, 4, c // 4)
        q, k, v = (mixed[:, :, i] for i in range(3))
        share = np.einsum("bihd,bjhd->bhij", q, k) / np.sqrt(c / 4)
        seen = np.einsum("bhij,bjhd->bihd", scipy.special.softmax(share, axis=-1), v)
        return x + gate(self.product(seen.reshape(b, h, w, c), f"{name}_proj2", 2 * c))

    def context(self, x: np.ndarray) -> np.ndarray:
        name = "DeepProcessor_0" if self.deep else "ShallowProcessor_0"
        x = x - 0.5
        h = self.convolve(np.concatenate([x[:, :, ::2], x[:, :, 1::2]], -1), f"{name}/proj", 32)
        if not self.deep:
            for i in range(3):
                h = self.gated_conv(h, f"{name}/c{i}", None, self.convolve)
            return h
        position = self.leaf(f"{name}/pos_emb_dq", *h.shape[1:])
        for i in range(8):
            h = self.gated_conv(h, f"{name}/c{i}", None, self.convolve)
            h = self.norm(h, f"{name}/dqln{i}")
            h = self.norm(self.attention(h, f"{name}/dqattn{i}", position), f"{name}/ln{i}")
        return h

    def coupling(self, name: str, a: np.ndarray, b: np.ndarray, context: np.ndarray) -> tuple:
        flow = FLOWS["deep" if self.deep else "shallow"]
        h = self.convolve(a, f"{name}/{'c1' if self.deep else 'proj_in'}", flow.filters)
        position = self.leaf(f"{name}/pos_emb", *h.shape[1:])
        for i in range(flow.blocks):
            block = f"{name}/block{i}"
            h = self.gated_conv(h, f"{block}_conv", context, self.product)
            h = self.attention(self.norm(h, f"{block}_ln1"), f"{block}_attn", position)
            h = self.norm(h, f"{block}_ln2")
        h = elu2(h) if self.deep else h
        k, last = flow.components, "c2" if self.deep else "proj_out"
        h = self.convolve(h, f"{block}_{last}", a.shape[-1] * (2 + 3 * k)).reshape(*a.shape, -1)
        s, t, logits, means, scales = np.split(h, [1, 2, 2 + k, 2 + 2 * k], axis=-1)
        s, t, scales = np.tanh(s[..., 0]), t[..., 0], np.maximum(scales, -7.0)
        z = (b[..., None] - means) * np.exp(-scales)
        share = scipy.special.softmax(logits, axis=-1)
        cdf = (share * scipy.special.expit(z)).sum(axis=-1)
        slope = scipy.special.expit(z) * scipy.special.expit(-z) * np.exp(-scales)
        log_det = np.log((share * slope).sum(axis=-1)) - np.log(cdf) - np.log1p(-cdf) + s
        return np.exp(s) * scipy.special.logit(cdf) + t, log_det.sum(axis=(1, 2, 3))

    def __call__(self, noise: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        context = self.context(x)
        a, b = noise[:, :, ::2], noise[:, :, 1::2]
        log_det = np.zeros(len(x))
        for i in range(4):
            halves = []
            for j, h in enumerate((a, b)):
                gain = self.leaf(f"Norm_{i}/norm{j}_g", *h.shape[1:])
                h = h * gain + self.leaf(f"Norm_{i}/norm{j}_b", *h.shape[1:])
                log_det += np.log(gain).sum()
                if not self.deep:
                    weight = self.leaf(f"Pointwise_{i}/W{j}", 3, 3)
                    h = h @ weight
                    log_det += h.shape[1] * h.shape[2] * np.linalg.slogdet(weight)[1]
                halves.append(h)
            a, b = halves
            b, change = self.coupling(f"MixLogisticAttnCoupling_{i}", a, b, context)
            log_det += change
            a, b = b, a
        h = np.empty_like(noise)
        h[:, :, ::2], h[:, :, 1::2] = a, b
        u = scipy.special.expit(h)
        log_det += (np.log(u) + np.log1p(-u)).sum(axis=(1, 2, 3))
        log_noise = (-0.5 * noise**2 - 0.5 * np.log(2 * np.pi)).sum(axis=(1, 2, 3))
        return u, log_noise - log_det


def elu2(x: np.ndarray) -> np.ndarray:
    both = np.concatenate([x, -x], axis=-1)
    return np.where(both > 0, both, np.expm1(np.minimum(both, 0)))


def gate(x: np.ndarray) -> np.ndarray:
    a, b = np.split(x, 2, axis=-1)
    return a * scipy.special.expit(b)


@functools.cache
def case(kind: str) -> tuple[dict, dict[str, Leaves], np.ndarray, np.ndarray]:
    """(DeqState, its leaves, noise, images)."""
    rng = np.random.default_rng(0)
    noise, x = rng.normal(size=(3, *SHAPE)), rng.uniform(size=(3, *SHAPE))
    leaves = {}
    for seed, name in enumerate(("target", "ema", "grad_ema", "grad_sq_ema")):
        network = Published(kind, seed)
        network(noise, x)
        leaves[name] = network.leaves

    def tree(found: Leaves) -> dict:
        return {"params": unflatten_dict(found, sep="/")}

    moments = {
        f"{path}/{moment}": leaves[moment][path]
        for path in leaves["target"]
        for moment in ("grad_ema", "grad_sq_ema")
    }
    state = {
        "step": np.int32(300001),
        "optimizer": {
            "target": tree(leaves["target"]),
            "state": {"step": np.int32(300001), "param_states": tree(moments)},
        },
        "lr": np.float32(2e-4),
        "ema_rate": np.float32(0.99),
        "params_ema": tree(leaves["ema"]),
        "ema_train_bpd": np.float32(3.0),
        "ema_eval_bpd": np.float32(3.1),
        "rng": np.zeros(2, np.uint32),
    }
    return state, leaves, noise, x


def written(state: dict, folder: Path) -> Path:
    path = folder / "checkpoint_6"
    path.write_bytes(serialization.to_bytes(state))
    return path


def fresh(flow: Flowpp, shape: tuple[int, ...] = SHAPE) -> train_state.TrainState:
    optimizer = train_state.OptimizerConfig(
        "adam", 2e-4, 0.9, 0.999, 1e-8, 0.0, 5000, 1.0, "constant"
    ).chain(1000)  # fmt: skip
    dequantizer = FlowDequantizer(flow, Pixels(256))
    image = jnp.zeros((1, *shape), jnp.uint8)
    return jax.eval_shape(
        lambda: train_state.create(dequantizer.init(jax.random.key(0), image), optimizer)
    )


@pytest.mark.parametrize("kind", sorted(FLOWS))
def test_outputs_are_those_of_the_published_layout(kind: str, tmp_path: Path) -> None:
    """Noise and density of the parameters and of their average, in float64."""
    state, _, noise, x = case(kind)
    loaded = flow_importer.load(written(state, tmp_path), fresh(FLOWS[kind]))
    with jax.enable_x64(True):
        apply = jax.jit(FLOWS[kind].apply)
        for seed, params in enumerate((loaded.params, loaded.ema_params)):
            double = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), params)
            u, log_q = apply({"params": double}, jnp.asarray(noise), jnp.asarray(x))
            expected_u, expected = Published(kind, seed)(noise, x)
            np.testing.assert_allclose(u, expected_u, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(log_q, expected, rtol=1e-9)


def test_steps_and_moments_are_taken_over(tmp_path: Path) -> None:
    state, leaves, *_ = case("shallow")
    loaded = flow_importer.load(written(state, tmp_path), fresh(FLOWS["shallow"]))
    assert int(loaded.step) == 300001
    adam = loaded.opt_state[1]
    assert int(adam.count) == 300001
    name = "MixLogisticAttnCoupling_2/block1_conv_c1_W"
    for moment, tree in (("grad_ema", adam.mu), ("grad_sq_ema", adam.nu)):
        found = tree["coupling_2"]["block_1"]["conv"]["first"]["kernel"]
        np.testing.assert_array_equal(found, leaves[moment][name].swapaxes(0, 1))


def test_every_leaf_has_a_place_of_its_own() -> None:
    for kind, flow in FLOWS.items():
        expected = flatten_dict(fresh(flow).params, sep="/")
        found = flow_importer.renamed(
            {f"params/{key}": value for key, value in case(kind)[1]["target"].items()}
        )
        assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    state = case("shallow")[0]
    path = written(state, tmp_path)
    with pytest.raises(ValueError, match=r"does not fit.*deq\.filters, deq\.components"):
        flow_importer.load(path, fresh(Flowpp(filters=8, components=4, blocks=2)))
    with pytest.raises(ValueError, match=r"block_2.*deq\.blocks"):
        flow_importer.load(path, fresh(Flowpp(filters=8, components=3, blocks=3)))
    with pytest.raises(ValueError, match="another shape"):
        flow_importer.load(path, fresh(FLOWS["shallow"], (8, 6, 3)))
    lacking = {key: value for key, value in state.items() if key != "ema_eval_bpd"}
    with pytest.raises(ValueError, match=r"no DeqState.*lacks \['ema_eval_bpd'\]"):
        flow_importer.load(written(lacking, tmp_path), fresh(FLOWS["shallow"]))
    with pytest.raises(ValueError, match=r"deq\.init_from=.*no such file"):
        flow_importer.load(tmp_path / "nothing", fresh(FLOWS["shallow"]))


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    content = serialization.to_bytes(case("shallow")[0])
    state = fresh(FLOWS["shallow"])
    path = tmp_path / "checkpoint_6"
    for offset in np.random.default_rng(0).integers(0, len(content), 20):
        path.write_bytes(content[:offset])
        with pytest.raises(ValueError, match=r"checkpoint_6"):
            flow_importer.load(path, state)


def test_import_mode_writes_a_dequantiser_that_evaluation_finds(tmp_path: Path) -> None:
    state, leaves, *_ = case("shallow")
    images = np.random.default_rng(0).integers(0, 256, (20, *SHAPE), np.uint8)
    np.savez(tmp_path / "data.npz", x_train=images, x_test=images[:4])
    config = tiny.config("npz")
    config.data.update(path=str(tmp_path / "data.npz"), num_channels=3, levels=256, num_test=0)
    config.deq.update(filters=8, components=3, blocks=2)
    config.deq.init_from = str(written(state, tmp_path))
    experiment, run = Experiment.from_config(config), tmp_path / "run"
    run_lib.import_given(experiment, run, "deq")
    run_lib.import_given(experiment, run, "deq")  # again: there is nothing left to do
    assert not (run / "checkpoints").exists()
    params, name = load_dequantizer(experiment, run, "deq")
    assert name.startswith("deq step 300001 ")
    np.testing.assert_array_equal(params["mixing_1"]["weight_0"], leaves["ema"]["Pointwise_1/W0"])
