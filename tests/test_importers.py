"""Published checkpoints: outputs, likelihoods and bounds of the published codes; damaged files."""

import functools
import io
import pickle
import zipfile
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from flax.traverse_util import flatten_dict, unflatten_dict

import importers
import torch_files
import train_state
from high_order import first_order_residual
from likelihood import Divergence, gaussian_decoder, ode_log_likelihood
from losses import likelihood_weight
from models import DDPM, NCSNpp
from ode import Solver
from operators import (
    dimension,
    squared_norm,
    value_and_probed_divergence,
)
from parameterization import PARAMETERIZATIONS, TIME_LABELS, ScoreModel
from sde_lib import VESDE, VPSDE, SubVPSDE
from time_sampling import Importance

FIXTURES = Path(__file__).resolve().parents[2] / "shared" / "fixtures"
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason=f"no {FIXTURES}")
SHAPE = (16, 16, 3)
SMALL = {"nf": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (8,), "dropout": 0.1}
NCSN = {"fir": True, "progressive_input": "residual", "embedding_type": "fourier"}
CASES = {
    "mle_ddpmpp_vp": "checkpoint_7",
    "mle_ncsnpp_ve": "checkpoint_12",
    "torch_ddpmpp_vp": "checkpoint_6.pth",
}
STEPS = {"mle_ddpmpp_vp": 350001, "mle_ncsnpp_ve": 600001, "torch_ddpmpp_vp": 300001}


def score_model(name: str, **changes) -> ScoreModel:
    if name == "mle_ncsnpp_ve":
        network = NCSNpp(**(SMALL | NCSN | {"centered": False} | changes))
        to_score, label = PARAMETERIZATIONS["scaled_score"], TIME_LABELS["sigma"]
        return ScoreModel(network, VESDE(0.01, 50.0), to_score, label)
    return ScoreModel(NCSNpp(**(SMALL | changes)), VPSDE())


def optimizer():
    config = train_state.OptimizerConfig(
        "adam", 2e-4, 0.9, 0.999, 1e-8, 0.0, 5000, 1.0, "constant"
    )  # fmt: skip
    return config.chain(1000)


def load(path: Path, model: ScoreModel, shape=SHAPE) -> train_state.TrainState:
    return importers.load(path, model, shape, fresh_state(model, shape))


def fresh_state(model: ScoreModel, shape=SHAPE) -> train_state.TrainState:
    """Shapes of a state."""
    return jax.eval_shape(
        lambda: train_state.create(model.init(jax.random.key(0), shape), optimizer())
    )


@functools.cache
def imported(name: str) -> train_state.TrainState:
    return load(FIXTURES / name / CASES[name], score_model(name))


def arrays(name: str) -> dict[str, np.ndarray]:
    """The fixture's arrays, images as [B, H, W, C]."""
    turned = name.startswith("torch")
    with np.load(FIXTURES / name / "io.npz") as file:
        return {
            key: value.transpose(0, 2, 3, 1) if turned and value.ndim == 4 else value
            for key, value in file.items()
        }


def worst(found, expected) -> float:
    """Relative error of the worst example."""
    axes = tuple(range(1, expected.ndim))
    return float((np.abs(found - expected).max(axes) / np.abs(expected).max(axes)).max())


@functools.partial(jax.jit, static_argnums=0)
def score_of(model, params, x, t):
    """Parameters are an argument: the compiler would work on constants for long."""
    return model.score(params)(x, t)


def in_double(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)


@needs_fixtures
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("which", ["ema", "raw"])
def test_outputs_are_those_of_the_published_networks(name, which):
    """Scores in float32, and network and score in float64, at the published noise levels."""
    model, state, found = score_model(name), imported(name), arrays(name)
    params = {"ema": state.ema_params, "raw": state.params}[which]
    score = score_of(model, params, jnp.asarray(found["x"]), jnp.asarray(found["t"]))
    assert worst(np.asarray(score), found[f"score_{which}_f64"]) < 1e-5
    with jax.enable_x64(True):
        x, t = jnp.asarray(found["x"], jnp.float64), jnp.asarray(found["t"], jnp.float64)
        score = np.asarray(score_of(model, in_double(params), x, t))
        assert worst(score, found[f"score_{which}_f64"]) < 1e-10
        # The published VE network divides by σ itself: its output is the score.
        factor = 1.0 if name == "mle_ncsnpp_ve" else -model.sde.sigma(t)[:, None, None, None]
        assert worst(factor * score, found[f"net_{which}_f64"]) < 1e-10


@needs_fixtures
def test_a_network_of_the_sub_vp_sde_is_divided_by_its_sigma():
    """The same file and label: score = −net/(1 − e^{−B})."""
    state, found = imported("mle_ddpmpp_vp"), arrays("mle_ddpmpp_vp")
    model = ScoreModel(NCSNpp(**SMALL), SubVPSDE())
    with jax.enable_x64(True):
        x, t = (jnp.asarray(found[key], jnp.float64) for key in ("x", "t"))
        score = np.asarray(score_of(model, in_double(state.ema_params), x, t))
    t = found["t"].astype(np.float64)
    sigma = -np.expm1(-(0.1 * t + 0.5 * 19.9 * t**2))
    assert worst(score, -found["net_ema_f64"] / sigma[:, None, None, None]) < 1e-10


@needs_fixtures
@pytest.mark.parametrize("name", CASES)
def test_step_and_moments_of_adam_are_taken_over(name):
    state = imported(name)
    assert int(state.step) == STEPS[name]
    adam = state.opt_state[1]
    assert int(adam.count) == int(state.opt_state[3].count) > 0
    for moment in (adam.mu, adam.nu):
        assert all(np.abs(leaf).sum() > 0 for key, leaf in flatten_dict(moment).items()
                   if key[0] != "GaussianFourierProjection_0")  # fmt: skip
    if name.startswith("mle"):
        raw = serialization.msgpack_restore((FIXTURES / name / CASES[name]).read_bytes())
        moments = raw["optimizer"]["state"]["param_states"]["ResnetBlockBigGANpp_3"]["Conv_1"]
        ours = adam.nu["ResnetBlockBigGAN_3"]["Conv_1"]["kernel"]
        np.testing.assert_array_equal(ours, moments["kernel"]["grad_sq_ema"])


@needs_fixtures
def test_the_network_of_cifar10_at_its_real_size():
    """61,804,419 parameters by the recipe of the fixtures' README."""
    with np.load(FIXTURES / "full_ddpmpp_vp.npz") as file:
        expected = dict(file)
    model = ScoreModel(NCSNpp(nf=128, ch_mult=(1, 2, 2, 2), attn_resolutions=(16,)), VPSDE())
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), (32, 32, 3)))
    leaves = {}
    for path, leaf in flatten_dict(shapes, sep="/").items():
        name = path.replace("BigGAN_", "BigGANpp_").replace("AttnBlock_", "AttnBlockpp_")
        seed = zlib.crc32(name.encode()) & 0x7FFFFFFF
        z = np.random.RandomState(seed).standard_normal(leaf.size).reshape(leaf.shape)
        if name.endswith("/scale"):
            value = 1 + 0.1 * z
        elif leaf.ndim == 1:
            value = 0.1 * z
        else:
            value = z / np.sqrt(np.prod(leaf.shape[:-1]))
        leaves[path] = value.astype(np.float32)
        place = list(expected["leaf_paths"]).index(name)
        np.testing.assert_allclose(
            leaves[path].sum(dtype=np.float64), expected["leaf_sums"][place], rtol=1e-6, atol=1e-6
        )
    assert len(leaves) == len(expected["leaf_paths"])
    params = unflatten_dict(leaves, sep="/")
    score = score_of(model, params, jnp.asarray(expected["x"]), jnp.asarray(expected["t"]))
    assert worst(np.asarray(score), expected["score_f64"]) < 1e-5


@needs_fixtures
def test_pieces_of_the_variational_bound():
    """Both forms of the published bound, with its randomness, in float64."""
    with np.load(FIXTURES / "bound_vp.npz") as file:
        given = {k: v.astype(np.float64) for k, v in file.items() if v.dtype.kind in "fi"}
    model, eps = score_model("mle_ddpmpp_vp"), float(given["eps"])
    with jax.enable_x64(True):
        sde = model.sde
        score_fn = functools.partial(
            score_of, model, in_double(imported("mle_ddpmpp_vp").ema_params)
        )
        x0 = jnp.asarray(given["x0"])
        law, d = Importance(sde, eps), dimension(x0)
        integrands = {"dsm": [], "implicit": []}
        for k in range(6):
            t, z, v = (jnp.asarray(given[name][k]) for name in ("t", "noise", "probe"))
            e1 = first_order_residual(score_fn(sde.perturb(x0, t, z), t), sde.sigma(t), z)
            div_f = d * sde.drift_coefficient(t)
            weight = likelihood_weight(t, sde)
            np.testing.assert_allclose(1.0 / weight, given["inverse_weight"][k], rtol=1e-12)
            integrands["dsm"].append(
                weight * (squared_norm(e1) - squared_norm(z)) - 2.0 * div_f
            )  # fmt: skip
            x_t = sde.perturb(x0, t, z)
            field = lambda y, t=t: score_fn(y, t)  # noqa: E731
            score, div = value_and_probed_divergence(field, x_t, v[None])
            g2 = sde.g2(t)
            integrands["implicit"].append(g2 * (2.0 * div + squared_norm(score)) - 2.0 * div_f)
            w = sde.cumulative_weight(t) - sde.cumulative_weight(jnp.asarray(eps))
            np.testing.assert_allclose(w, given["cumulative_weight"][k], rtol=1e-9)
        np.testing.assert_allclose(law.normalizer, given["Z"], rtol=1e-12)
        ends = jnp.full((4,), 1.0), jnp.full((4,), eps)
        prior = -sde.prior_logp(sde.perturb(x0, ends[0], jnp.asarray(given["noise_prior"])))
        np.testing.assert_allclose(prior, given["prior_term"], rtol=1e-12)
        z = jnp.asarray(given["noise_offset"])
        x_t = sde.perturb(x0, ends[1], z)
        log_tau = jnp.log(sde.sigma(ends[1]) / sde.alpha(ends[1]))
        reconstruction = 0.5 * squared_norm(z) + d * (0.5 * np.log(2.0 * np.pi) + log_tau)
        reconstruction = reconstruction - gaussian_decoder(score_fn, sde)(x0, x_t, ends[1])
        np.testing.assert_allclose(reconstruction, given["reconstruction"], rtol=1e-9)
        for form, values in integrands.items():
            found = np.stack(values)
            np.testing.assert_allclose(found, given[f"integrand_{form}"], rtol=1e-9)
            mean = (given["inverse_weight"] * float(law.normalizer) * found).mean(axis=0)
            nll = prior + 0.5 * mean + reconstruction - given["entropy"]
            np.testing.assert_allclose(nll, given[f"nll_{form}"], rtol=1e-9)


@needs_fixtures
@pytest.mark.parametrize(("solver", "tolerance"), [(Solver("dopri8", 1e-7, 1e-7), 1e-6)])
def test_bits_per_dimension_of_the_ode(solver, tolerance):
    """The first image, against an independent solution at 1e-10, in float64, by the given probe."""
    with np.load(FIXTURES / "bpd_ode_vp.npz") as file:
        given = dict(file)
    model = score_model("mle_ddpmpp_vp")
    with jax.enable_x64(True):
        params = in_double(imported("mle_ddpmpp_vp").ema_params)
        x0, probe = (jnp.asarray(given[name][:1], jnp.float64) for name in ("x0", "probe"))

        class Given(Divergence):
            def draw(self, keys, like):
                return probe[:, None]

        @jax.jit
        def likelihood(params, x0, keys):
            return ode_log_likelihood(
                model.score(params), model.sde, x0, keys,
                t_min=float(given["eps"]), solver=solver, divergence=Given("rademacher", 1),
            )  # fmt: skip

        found = likelihood(params, x0, jax.random.split(jax.random.key(0), 1))
        bpd = -found.log_p / (dimension(x0) * np.log(2.0)) + 7.0
        np.testing.assert_allclose(bpd, given["bpd_exact"][:1], atol=tolerance)


# Damaged and foreign files.


def flax_bytes(change=lambda state: None) -> bytes:
    """A checkpoint of the published layout with random numbers, changed by `change`."""
    model = score_model("mle_ncsnpp_ve")
    rng = np.random.default_rng(0)

    def published(make):
        leaves = {}
        shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), SHAPE))
        for path, leaf in flatten_dict(shapes, sep="/").items():
            name = path.replace("BigGAN_", "BigGANpp_").replace("AttnBlock_", "AttnBlockpp_")
            name = name.replace("FIRDownsample_0/Conv_0/kernel", "Downsample_0/Conv2d_0/weight")
            name = name.replace("FIRDownsample_0/Conv_0/bias", "Downsample_0/Conv2d_0/bias")
            shape = leaf.shape
            if name.split("/")[-2].startswith("GroupNorm"):
                shape = (1, 1, 1, *shape)
            leaves[name] = make(rng.standard_normal(shape).astype(np.float32))
        return unflatten_dict(leaves, sep="/")

    state = {
        "step": np.asarray(5), "lr": np.asarray(2e-4), "model_state": {},
        "ema_rate": np.asarray(0.999), "rng": np.zeros(2, np.uint32),
        "params_ema": published(lambda leaf: leaf),
        "optimizer": {
            "target": published(lambda leaf: leaf),
            "state": {
                "step": np.asarray(5),
                "param_states": published(lambda z: {"grad_ema": z, "grad_sq_ema": z**2}),
            },
        },
    }  # fmt: skip
    change(state)
    return serialization.msgpack_serialize(state)


def test_groupnorm_leaves_load_in_their_old_and_their_new_shape(tmp_path):
    def flatten_norms(state):
        for tree in (state["params_ema"], state["optimizer"]["target"]):
            norm = tree["ResnetBlockBigGANpp_0"]["GroupNorm_0"]
            norm["scale"], norm["bias"] = norm["scale"].ravel(), norm["bias"].ravel()

    model = score_model("mle_ncsnpp_ve")
    (tmp_path / "old").write_bytes(flax_bytes())
    (tmp_path / "new").write_bytes(flax_bytes(flatten_norms))
    old, new = (load(tmp_path / name, model) for name in ("old", "new"))
    jax.tree.map(np.testing.assert_array_equal, old, new)


def _delete(state):
    del state["params_ema"]["Conv_1"]


def _add(state):
    state["optimizer"]["target"]["Dense_2"] = {"kernel": np.zeros((2, 2), np.float32)}


def _misshape(state):
    kernel = state["params_ema"]["Conv_0"]["kernel"]
    state["params_ema"]["Conv_0"]["kernel"] = kernel[..., :4]


def _nan(state):
    state["params_ema"]["Conv_0"]["bias"] = np.full(8, np.nan, np.float32)


def _twice(state):
    state["params_ema"]["AttnBlock_0"] = state["params_ema"]["AttnBlockpp_0"]


def _transpose(state):
    norm = state["params_ema"]["AttnBlockpp_0"]["NIN_0"]
    norm["b"] = norm["b"][None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_delete, "ema does not fit the network; 2 leaves are missing: Conv_1/bias, Conv_1/kernel"),
        (_add, "params does not fit .*1 are not in the network: Dense_2/kernel"),
        (_misshape, r"Conv_0/kernel: \(3, 3, 3, 4\) instead of \(3, 3, 3, 8\); probably model.nf"),
        (_transpose, r"NIN_0/b: \(1, 16\) instead of \(16,\)"),
        (lambda state: state.pop("rng"), "is no State .* lacks .*'rng'"),
        (lambda state: state.update(ema_train_bpd=0.0), "checkpoint of a dequantiser"),
        (
            lambda state: state["optimizer"].pop("state"),
            "its State has or lacks 'state'",
        ),
        (lambda state: state["optimizer"].update(more=1), "has or lacks 'more'"),
        (lambda state: state["model_state"].update(batch_stats={"a": 1}), "an empty model_state"),
        (_nan, r"ema: Conv_0/bias is no array of finite real numbers"),
        (_twice, "has or lacks .*AttnBlock.*twice"),
        (lambda state: state.update(step=np.asarray(-1)), "step is -1, no number of steps"),
        (lambda state: state.update(step=np.asarray(2**40)), "step is 1099511627776, no number"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_with_the_reason(tmp_path, change, message):
    (tmp_path / "checkpoint_1").write_bytes(flax_bytes(change))
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "checkpoint_1", score_model("mle_ncsnpp_ve"))


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"num_res_blocks": 2}, "model.num_res_blocks"),
        ({"nf": 16}, "model.nf"),
        ({"embedding_type": "positional"}, "model.embedding_type"),
        ({"fir": False}, "model.fir"),
        ({"progressive_input": "none"}, "model.progressive_input"),
        ({"attn_resolutions": (16,)}, "model.attn_resolutions"),
        ({"progressive": "residual"}, "model.progressive"),
    ],
)
def test_the_config_field_that_differs_is_named(tmp_path, changes, hint):
    (tmp_path / "checkpoint_1").write_bytes(flax_bytes())
    with pytest.raises(ValueError, match=f"does not fit the network.*probably .*{hint}"):
        load(tmp_path / "checkpoint_1", score_model("mle_ncsnpp_ve", **changes))


def test_a_flax_file_truncated_anywhere_is_refused(tmp_path):
    data = flax_bytes()
    model = score_model("mle_ncsnpp_ve")
    fresh = fresh_state(model)
    for cut in np.random.default_rng(1).integers(0, len(data), 50):
        (tmp_path / "cut").write_bytes(data[:cut])
        with pytest.raises(ValueError, match="no Flax checkpoint, or is truncated"):
            importers.load(tmp_path / "cut", model, SHAPE, fresh)


@needs_fixtures
def test_a_torch_file_truncated_anywhere_is_refused(tmp_path):
    data = (FIXTURES / "torch_ddpmpp_vp" / "checkpoint_6.pth").read_bytes()
    for cut in np.random.default_rng(1).integers(0, len(data), 50):
        (tmp_path / "cut.pth").write_bytes(data[:cut])
        with pytest.raises(ValueError, match="is no PyTorch checkpoint that can be read"):
            torch_files.read(tmp_path / "cut.pth")


@needs_fixtures
@pytest.mark.parametrize("kind", ["unbegun", "model", "weights"])
def test_a_torch_file_without_moments_or_of_weights_alone_is_enough(monkeypatch, caplog, kind):
    """An optimizer that has taken no step has an empty state; weights may be saved alone."""
    path = FIXTURES / "torch_ddpmpp_vp" / "checkpoint_6.pth"
    state = torch_files.read(path)
    alone = {"model": state["model"]}
    unbegun = state | {"optimizer": {"state": {}, "param_groups": []}}
    given = {"unbegun": unbegun, "model": alone, "weights": state["model"]}[kind]
    monkeypatch.setattr(torch_files, "read", lambda path: given)
    model = score_model("torch_ddpmpp_vp")
    found = load(path, model)
    monkeypatch.undo()
    whole = load(path, model)
    same = functools.partial(jax.tree.map, np.testing.assert_array_equal)
    same(found.params, whole.params)
    same(found.ema_params, whole.ema_params if kind == "unbegun" else whole.params)
    assert int(found.step) == (int(whole.step) if kind == "unbegun" else 0)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(found.opt_state))
    assert f"{path} has no " in caplog.text


@needs_fixtures
@pytest.mark.parametrize("changes", [{"num_res_blocks": 2}, {"nf": 16}, {"conditional": False}])
def test_a_torch_file_of_another_network_is_refused(changes):
    with pytest.raises(ValueError, match="probably"):
        load(
            FIXTURES / "torch_ddpmpp_vp" / "checkpoint_6.pth",
            score_model("torch_ddpmpp_vp", **changes),
        )


class Malicious:
    """Unpickles to a call that leaves a file."""

    def __init__(self, call, *arguments):
        self.reduced = call, arguments

    def __reduce__(self):
        return self.reduced


def archive(description: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", description)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "call", [("os", "system"), ("builtins", "eval"), ("builtins", "getattr"), ("torch", "load")]
)
def test_a_malicious_pickle_is_refused_before_it_runs(tmp_path, call):
    mark = tmp_path / "ran"
    module, name = call
    code = f"c{module}\n{name}\n(Vtouch {mark}\ntR.".encode()
    path = tmp_path / "bad.pth"
    path.write_bytes(archive(code))
    with pytest.raises(ValueError, match=f"asks for {module}.{name}, which no tensor needs"):
        torch_files.read(path)
    path.write_bytes(archive(pickle.dumps({"model": Malicious(exec, f"open({str(mark)!r}, 'w')")})))
    with pytest.raises(ValueError, match=r"asks for builtins\.exec"):
        torch_files.read(path)
    assert not mark.exists()


def test_tensors_cannot_reach_outside_their_storage(tmp_path):
    tensor, storage = torch_files._Tensor(), np.arange(6, dtype=np.float32)
    for shape, stride, offset in (
        ((7,), (1,), 0), ((2, 3), (4, 1), 0), ((2,), (-1,), 3), ((4096, 4096), (0, 0), 0),
        ((10**30,), (1,), 0), ((2,), (1, 1), 0), ((2,), (1.0,), 0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"outside its storage|a tensor has offset"):
            tensor(storage, offset, shape, stride)
    turned = tensor(storage, 0, (3, 2), (1, 3))
    np.testing.assert_array_equal(turned, storage.reshape(2, 3).T)


def test_a_file_cannot_change_what_reads_it(tmp_path):
    """A BUILD instruction sets attributes of what was called; here there are none to set."""
    path = tmp_path / "build.pth"
    path.write_bytes(archive(b"ctorch._utils\n_rebuild_parameter\n(N(dVx\nI7\nstb."))
    with pytest.raises(ValueError, match="no PyTorch checkpoint that can be read"):
        torch_files.read(path)


def test_compressed_archives_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", pickle.dumps({}))
    with pytest.raises(ValueError, match="is compressed, which PyTorch does not do"):
        torch_files.read(tmp_path / "a.pth")


def test_flipped_bytes_end_in_a_value_error_or_other_numbers(tmp_path):
    """Flips in the numbers load as other finite numbers, flips in the structure are refused."""
    data, model = bytearray(flax_bytes()), score_model("mle_ncsnpp_ve")
    fresh, rng = fresh_state(model), np.random.default_rng(2)
    path, ends = tmp_path / "flipped", {"loaded": 0, "refused": 0}
    for place in (*rng.integers(0, 400, 20), *rng.integers(0, len(data), 10)):
        broken = data.copy()
        broken[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(broken)
        try:
            state = importers.load(path, model, SHAPE, fresh)
        except ValueError as error:
            ends["refused"] += str(path) in str(error)
        else:
            leaves = zip(jax.tree.leaves(state), jax.tree.leaves(fresh), strict=True)
            ends["loaded"] += all(
                a.shape == b.shape and bool(jnp.isfinite(a).all()) for a, b in leaves
            )
    assert sum(ends.values()) == 30
    assert min(ends.values()) > 0


def test_a_run_with_an_adaptive_law_starts_from_published_parameters(tmp_path):
    """With equal masses: what it would have learned is in no published file."""
    (tmp_path / "published").write_bytes(flax_bytes())
    model = score_model("mle_ncsnpp_ve")
    fresh = jax.eval_shape(
        lambda: train_state.create(model.init(jax.random.key(0), SHAPE), optimizer(), adaptive=True)
    )
    state = importers.load(tmp_path / "published", model, SHAPE, fresh)
    np.testing.assert_array_equal(state.time_law, np.ones(fresh.time_law.shape, np.float32))


OTHER = {
    "skips": {"fir": True, "progressive": "output_skip", "progressive_input": "input_skip"},
    "residuals": {
        "fir": True, "progressive": "residual", "progressive_input": "residual",
        "resblock_type": "ddpm", "embedding_type": "fourier", "attn_resolutions": (8, 16),
    },
    "no_filter": {"progressive": "residual", "progressive_input": "residual"},
}  # fmt: skip


def random_leaves(model, shape=SHAPE):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), shape))
    return {
        path: rng.standard_normal(leaf.shape).astype(np.float32)
        for path, leaf in flatten_dict(shapes, sep="/").items()
    }


def other_model(name):
    if name == "ddpm":
        network = DDPM(nf=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(8,), num_groups=4)
        return ScoreModel(network, VPSDE())
    return ScoreModel(NCSNpp(**(SMALL | OTHER[name])), VPSDE(), label=TIME_LABELS["unit_time"])


@pytest.mark.parametrize("name", [*OTHER, "ddpm"])
def test_pytorch_layout_of_other_networks(name):
    """Modules by number, with gaps for those without parameters; frozen weights have no EMA."""
    model = other_model(name)
    leaves = random_leaves(model)
    order = importers.modules_in_order(model, SHAPE)
    state = {}
    for number, child in enumerate(order):
        for path in (path for path in leaves if path.startswith(child + "/")):
            *inner, leaf = path.split("/")[1:]
            value = leaves[path]
            if child.startswith("FIR"):
                inner = ["Conv2d_0"]
            if leaf == "kernel":
                value = value.transpose((3, 2, 0, 1) if value.ndim == 4 else (1, 0))
            leaf = {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)
            state[".".join(["module.all_modules", str(2 * number + 1), *inner, leaf])] = value
    trained = [
        key
        for key in state
        if not (name == "residuals" and key.endswith(".W") and state[key].ndim == 1)
    ]
    index = {key: i for i, key in enumerate(state)}
    moment = lambda key: {"step": 7, "exp_avg": 2 * state[key], "exp_avg_sq": state[key] ** 2}  # noqa: E731
    found = importers._torch_state(
        {
            "model": state | {"module.sigmas": np.ones(3)}, "step": 7,
            "ema": {"shadow_params": [3 * state[key] for key in trained]},
            "optimizer": {"state": {index[key]: moment(key) for key in trained}},
        },
        order,
    )  # fmt: skip
    assert found.params.keys() == leaves.keys()
    frozen = len(state) - len(trained)
    assert frozen == (name == "residuals")
    for path, value in leaves.items():
        np.testing.assert_array_equal(found.params[path], value)
        fixed = path.startswith("GaussianFourier")
        np.testing.assert_array_equal(found.ema[path], value if fixed else 3 * value)
        np.testing.assert_array_equal(found.first_moment[path], 0 * value if fixed else 2 * value)


@pytest.mark.parametrize("name", OTHER)
def test_published_names_of_other_networks(name):
    """Samplers without parameters took numbers in the published trees."""
    leaves = random_leaves(other_model(name))
    published = {}
    for path, value in leaves.items():
        first, *rest = path.split("/")
        kind, _, number = first.rpartition("_")
        if kind in ("ResnetBlockBigGAN", "ResnetBlockDDPM", "AttnBlock"):
            kind += "pp"
        if kind.endswith("sample"):
            number = str(3 * int(number) + 1)
        if kind.startswith("FIR"):
            kind = kind.removeprefix("FIR")
            rest = ["Conv2d_0", {"kernel": "weight"}.get(rest[-1], rest[-1])]
        published["/".join([f"{kind}_{number}", *rest])] = value
    found = importers._renamed(published)
    assert found.keys() == leaves.keys()
    for path, value in leaves.items():
        np.testing.assert_array_equal(found[path], value)


def test_other_files_are_refused(tmp_path):
    model = score_model("torch_ddpmpp_vp")
    with pytest.raises(ValueError, match=r"init_from='.*none': there is no such file"):
        load(tmp_path / "none", model)
    (tmp_path / "text.pth").write_text("no archive")
    with pytest.raises(ValueError, match=r"File is not a zip file .*before PyTorch 1\.6"):
        load(tmp_path / "text.pth", model)
    (tmp_path / "list.pth").write_bytes(archive(pickle.dumps([1, 2])))
    with pytest.raises(ValueError, match="is no checkpoint of score_sde_pytorch"):
        load(tmp_path / "list.pth", model)
