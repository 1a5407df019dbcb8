"""DensityModel of images: probabilities of grey levels, networks that fit every size."""

import jax
import numpy as np
import pytest

import default_configs
from density_model import DensityModel
from run_lib.experiment import Experiment

pytestmark = pytest.mark.usefixtures("compiled_at_o0")


def test_images_have_probabilities_of_grey_levels():
    """Of noise in four levels, which nothing can predict: log P(x) is −d log 4 at the best.

    The head starts with the histogram of 54 images. A perceptron takes the place of the U-Net,
    which is slow.
    """
    rng, shape = np.random.default_rng(0), (4, 4)
    changes = {"model.name": "mlp", "model.hidden": 8, "model.depth": 1, "optim.warmup": 1}
    changes |= dict.fromkeys(["model.channels", "model.blocks", "model.summary"])
    changes |= {"eval.num_steps": 0}  # by the tolerances, without an estimate of the error
    changes |= {"training.n_iters": 2, "optim.lr": 1e-6, "data.levels": 4}
    model = DensityModel(changes=changes).fit(rng.integers(0, 4, (60, *shape), np.uint8))
    found, errors = model.log_prob(rng.integers(0, 4, (20, *shape), np.uint8))
    assert 0.99 < -found.mean() / (16 * np.log(4)) < 1.2
    assert np.isnan(errors).all()
    sample = model.sample(2)
    assert sample.shape == (2, *shape)
    assert sample.dtype == np.uint8


@pytest.mark.usefixtures("four_devices_here")
def test_all_devices_share_a_batch_and_its_contexts():
    """Of 60 examples a batch of 15 would be; 12 have their contexts with them on 4 devices."""
    x = np.random.default_rng(1).standard_normal((60, 1))
    changes = {"model.hidden": 8, "model.depth": 1, "training.n_iters": 1, "eval.num_steps": 4}
    changes |= {"training.n_jitted_steps": 1, "optim.warmup": 1}
    model = DensityModel(changes=changes).fit(x, context=x[:, 0])
    assert model.experiment_.settings.training.batch_size == 12
    assert np.isfinite(model.score(x[:8], context=x[:8, 0]))


def test_a_batch_is_a_multiple_of_the_devices(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 3)
    of_images = default_configs.of_images(np.zeros((2, 8, 8), np.uint8))
    of_reals = default_configs.of_reals(np.zeros((2000, 2)))
    assert [config.training.batch_size for config in (of_images, of_reals)] == [15, 255]
    assert default_configs.of_reals(np.zeros((8, 2))).training.batch_size == 3  # one for each


@pytest.mark.parametrize(
    ("shape", "resolutions"), [((28, 28), 3), ((6, 6, 3), 2), ((7, 5), 1), ((12, 10, 1), 2)]
)
def test_the_network_of_images_fits_their_sides(shape, resolutions):
    """It halves the sides as often as both can be halved, at most twice, and gives them back."""
    config = default_configs.of_images(np.zeros((2, *shape), np.uint8))
    config.data.dataset = "digits"
    network = Experiment.from_config(config).settings.network
    assert len(network.channels) == len(network.blocks) == resolutions
    x = jax.ShapeDtypeStruct((1, *(shape if len(shape) == 3 else (*shape, 1))), np.float32)
    label = jax.ShapeDtypeStruct((1,), np.float32)
    features = jax.ShapeDtypeStruct((*x.shape, 4), np.float32)
    found, _ = jax.eval_shape(
        lambda x, label, features: network.init_with_output(
            jax.random.key(0), x, label, features=features
        ),
        x, label, features,
    )  # fmt: skip
    assert found.shape[:4] == x.shape
