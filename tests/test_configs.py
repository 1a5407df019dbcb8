"""Every config: documented, resolvable, of published size, and able to train at tiny size."""

import functools
import json
import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train_state
from configs import base
from datasets import DataConfig
from losses import mean_loss
from run_lib import devices, modes
from run_lib.experiment import Experiment
from run_lib.settings import Settings
from streams import Context, Dataset, Finite

pytestmark = pytest.mark.usefixtures("compiled_at_o0")

ROOT = Path(__file__).resolve().parents[1]
PATHS = sorted(
    path.relative_to(ROOT / "configs")
    for path in (ROOT / "configs").glob("*/**/*.py")
    if path.name != "__init__.py"
)
NAMES = [str(path.with_suffix("")) for path in PATHS]
every_config = pytest.mark.parametrize("name", NAMES)
# Exact counts of the published networks.
PARAMETERS = {
    "vp/cifar10_ddpmpp_continuous": 61_804_419,
    "vp/cifar10_ddpmpp_deep_continuous": 106_632_579,
    "subvp/imagenet32_ddpmpp_continuous": 61_804_419,
    "ve/cifar10_ncsnpp_continuous": 62_758_915,
    "ve/cifar10_ncsnpp_deep_continuous": 107_587_075,
    "score_sde/vp/cifar10_ncsnpp_continuous": 62_693_251,
    "score_sde/ve/cifar10_ncsnpp": 62_693_251,
    "score_sde/subvp/cifar10_ncsnpp_deep_continuous": 107_521_411,
    "ve/church_ncsnpp_continuous": 65_574_549,
    "score_sde/ve/ffhq_ncsnpp_continuous": 105_785_896,
    "score_sde/vp/ddpm/cifar10": 35_218_947,
    "score_sde/vp/ddpm/cifar10_unconditional": 32_329_347,
    "score_sde/vp/ddpm/bedroom": 111_569_923,
    "score_sde/ve/ncsnv2/cifar10": 33_970_563,
    "sdeflow/mnist": 1_539_329,
    "sdeflow/cifar10": 35_746_307,
}


def module(name: str):
    return __import__("configs." + name.replace("/", "."), fromlist=["get_config"])


def get_config(name: str):
    return module(name).get_config()


@every_config
def test_is_a_short_documented_delta_that_resolves(name):
    path = ROOT / "configs" / f"{name}.py"
    assert Settings.from_config(get_config(name)).network is not None
    assert len(path.read_text().split("def get_config")[1].splitlines()) <= 25
    text = module(name).__doc__
    assert "Command: " in text
    assert "Expected: " in text or name.startswith("digits")
    assert "Paper: " in text or name.startswith(("digits", "mnist", "table", "toy"))


@every_config
def test_its_command_parses(name):
    """The flags of the command are flags of main.py, the fields that it sets are fields."""
    text = module(name).__doc__.replace("\\\n", " ")
    commands = re.findall(r"python main\.py ((?:--\S+\s*)+)", text)
    assert commands or "make demo" in text
    for command in commands:
        flags = dict(part.removeprefix("--").split("=", 1) for part in shlex.split(command))
        assert Path(flags["config"]) == Path("configs") / f"{name}.py"
        assert set(flags["mode"].split(",")) <= modes.MODES.keys()
        known = base.get_config()
        for flag in flags.keys() - {"config", "workdir", "mode"}:
            section, field = flag.removeprefix("config.").split(".")
            assert field in known[section]
        needs_path = get_config(name).data.dataset in ("npz", "table", "ffhq", "celebahq")
        assert ("config.data.path" in flags) == needs_path


# Columns of the published tables: data.centered, data.random_flip, model.dropout, model.ema_rate,
# model.num_res_blocks, training.batch_size, n_iters, smallest_time, reduce_mean, continuous,
# sampling.smallest_time, predictor, corrector, snr, eval.batch_size, eval.num_repeats.
MLE = (48, 4_000_001, 1e-5, True, True)
VALUES = {
    "vp/cifar10_ddpmpp_continuous":
        (True, True, 0.1, 0.9999, 4, *MLE, 1e-3, None, None, None, 2000, 5),
    "vp/imagenet32_ddpmpp_deep_continuous":
        (True, False, 0.0, 0.9999, 8, 48, 950_001, 1e-5, True, True, 1e-3, None, None, None, 1024,
         1),
    "subvp/cifar10_ddpmpp_continuous":
        (True, True, 0.1, 0.9999, 4, 48, 4_000_001, 1e-2, True, True, 1e-2, None, None, None, 2000,
         5),
    "ve/cifar10_ncsnpp_deep_continuous":
        (False, True, 0.1, 0.999, 8, *MLE, 1e-5, "reverse_diffusion", "langevin", 0.16, 2000, 5),
    "ve/church_ncsnpp_continuous":
        (False, True, 0.0, 0.999, 2, 50, 3_400_001, 1e-5, True, True, 1e-5, "reverse_diffusion",
         "langevin", 0.075, 100, 5),
    "score_flow/subvp/cifar10_ddpmpp_deep_continuous":
        (True, True, 0.1, 0.9999, 8, 128, 950_001, 1e-2, True, True, 1e-2, None, None, None, 1024,
         5),
    "score_sde/subvp/cifar10_ddpmpp_continuous":
        (True, True, 0.1, 0.9999, 4, 128, 1_300_001, 1e-5, True, True, 1e-3, "euler_maruyama",
         "none", None, 1024, 5),
    "score_sde/vp/ddpm/cifar10":
        (True, True, 0.1, 0.9999, 2, 128, 1_300_001, 1e-5, True, False, 1e-3, "ancestral_sampling",
         "none", None, 1024, 5),
    "score_sde/ve/celeba_ncsnpp":
        (False, True, 0.1, 0.999, 4, 128, 1_300_001, 1e-5, False, False, 1e-5, "reverse_diffusion",
         "langevin", 0.17, 1024, 5),
    "score_sde/ve/ffhq_ncsnpp_continuous":
        (False, True, 0.0, 0.9999, 1, 8, 2_400_001, 1e-5, True, True, 1e-5, "reverse_diffusion",
         "langevin", 0.15, 1024, 5),
    "score_sde/ve/ncsnv2/celeba":
        (False, True, None, 0.999, None, 128, 1_300_001, 1e-5, False, False, 1e-5, "none", "ald",
         0.128, 1024, 5),
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_values_are_the_published_ones(name):
    c = get_config(name)
    found = (
        c.data.centered, c.data.random_flip, c.model.dropout, c.model.ema_rate,
        c.model.num_res_blocks, c.training.batch_size, c.training.n_iters,
        c.training.smallest_time, c.training.reduce_mean, c.training.continuous,
        c.sampling.smallest_time, c.sampling.predictor, c.sampling.corrector, c.sampling.snr,
        c.eval.batch_size, c.eval.num_repeats,
    )  # fmt: skip
    expected = VALUES[name]
    ode = expected[11] is None  # then predictor, corrector and snr are not used
    assert (c.sampling.method == "ode") == ode
    for number, (value, wanted) in enumerate(zip(found, expected, strict=True)):
        assert wanted is None or value == wanted, (number, value, wanted)


@every_config
def test_its_sampler_can_be_built(name):
    settings = Settings.from_config(get_config(name))
    experiment = Experiment(settings, tiny_data(settings))
    sampler, model = experiment.sampler, experiment.sampled_model
    if hasattr(sampler, "_check_chain"):
        sampler._check_chain(model.sde)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_networks_have_the_published_number_of_parameters(name, count):
    settings = Settings.from_config(get_config(name))
    size, channels = settings.data.image_size, settings.data.num_channels
    model = Experiment(settings).model
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), (size, size, channels)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def tiny_settings(name: str) -> Settings:
    """The config with a network of two narrow levels (as many as published for pyramids)."""
    config = get_config(name)
    network = config.model.name
    if network in ("mlp", "concat_mlp"):
        config.model.update(hidden=8, depth=1)
    elif network == "unet":
        config.model.update(channels=(8, 8), blocks=(1, 1), summary=8)
    else:
        config.model.nf = 8
    if network in ("ddpm", "ncsnpp"):
        levels = 3 if config.model.get("progressive") else 1 if config.training.alpha else 2
        config.model.update(ch_mult=(1,) * levels, num_res_blocks=1, attn_resolutions=(4,))
    if network == "ddpm":
        config.model.num_groups = 4
    config.training.update(batch_size=4, n_iters=1, n_jitted_steps=1)
    if config.training.high_order_fraction != 1.0:
        config.training.high_order_fraction = 0.5
    return Settings.from_config(config)


def tiny_data(settings: Settings) -> Dataset:
    """Noise in the place of the data of the config."""
    data: DataConfig = settings.data
    points = {"mog1d": 1}.get(data.dataset, 2)
    images = settings.network.__class__.__name__ not in ("ConcatMLP",) and data.dataset not in (
        "swissroll", "checkerboard", "mog1d", "table",
    )  # fmt: skip
    shape = (8, 8, data.num_channels) if images else (points,)
    noise = np.random.default_rng(0).standard_normal((4, *shape)).astype(np.float32)
    x = np.zeros((4, *shape), np.uint8) if images else noise
    given = {"": (None, None), "class": (Context((), 4), np.arange(4, dtype=np.int32))}
    kind, context = given[data.context]
    split, levels = Finite(4, x.__getitem__, context=context), data.levels if images else None
    return Dataset(data.dataset, shape, levels, split, split, context=kind)


@functools.cache
def losses_of_one_step(key: str, name: str) -> dict[str, float]:
    """Metrics of a training step; `key` is what matters of the config."""
    del key
    settings = tiny_settings(name)
    dataset = tiny_data(settings)
    experiment = Experiment(settings, dataset)
    loss_fn = mean_loss(experiment.per_example_loss(train=True))
    optimizer = settings.optim.chain(1)
    step = train_state.train_step(loss_fn, optimizer, settings.model.ema_rate, devices.AXIS_NAME)
    model, rng = experiment.model, np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), dataset.shape))
    params = jax.tree.map(lambda leaf: np.float32(0.1 * rng.standard_normal(leaf.shape)), shapes)
    adaptive = settings.training.time_law == "adaptive"
    state = train_state.create(params, optimizer, adaptive=adaptive)
    batch = {
        "image": dataset.train.examples(np.arange(4)),
        "noise_id": np.arange(4, dtype=np.int32),
        "mask": np.ones(4, bool),
    }
    if dataset.context is not None:
        batch["context"] = dataset.contexts("train", np.arange(4))
    one_device = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], batch)
    mapped = jax.vmap(step, (None, None, 0), axis_name=devices.AXIS_NAME)
    family = settings.model.name
    if settings.training.alpha:  # its derivatives of convolutions compile for half a minute
        family = "residual"
    if FAMILIES.setdefault(family, name) != name:  # another of them runs; here types and shapes
        _, metrics = jax.eval_shape(mapped, state, jax.random.key(1), one_device)
        return {metric: 1.0 for metric, value in metrics.items() if value.shape == (1,)}
    _, metrics = jax.jit(mapped)(state, jax.random.key(1), one_device)
    return {metric: float(value[0]) for metric, value in metrics.items()}


@pytest.mark.slow
@every_config
def test_trains_at_tiny_size(name):
    """One step can be built, and is finite for a config of every network."""
    settings = tiny_settings(name)
    resolved = settings.resolved()
    training = {k: v for k, v in resolved["training"].items() if "freq" not in k}
    training = {k: v for k, v in training.items() if "smallest_time" not in k}
    ignored = ("ema_rate", "sigma_max", "dropout", "num_scales")
    model = {k: v for k, v in resolved["model"].items() if k not in ignored}
    shape = tiny_data(settings).shape
    key = json.dumps([training, model, shape, resolved["data"]["logit"]], sort_keys=True)
    first = KEYS.setdefault(key, name)
    metrics = losses_of_one_step(key, first)
    assert all(np.isfinite(value) for value in metrics.values()), metrics
    assert metrics["param_norm"] > 0


KEYS: dict[str, str] = {}
FAMILIES: dict[str, str] = {}


def test_the_importance_time_is_chosen_when_the_run_starts():
    """Published: when the file was loaded, before the command line was read."""
    config = get_config("vp/imagenet32_ddpmpp_continuous")
    assert Settings.from_config(config).training.smallest_time == 1e-5
    config.training.update(likelihood_weighting=True, importance_weighting=True)
    assert Settings.from_config(config).training.smallest_time == 5e-5
