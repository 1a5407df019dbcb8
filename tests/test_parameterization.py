"""Every parameterisation gives the exact score from the exact output for Gaussian data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from parameterization import PARAMETERIZATIONS, TIME_LABELS, ScoreModel, score_from_noise
from sde_lib import VESDE, VPSDE, LinearVESDE, SubVPSDE

SDES = [VPSDE(), SubVPSDE(), VESDE(), LinearVESDE()]
V0 = 0.36
every_sde = pytest.mark.parametrize("sde", SDES, ids=lambda sde: type(sde).__name__)


def exact_output(kind, x, t, sde):
    """What a perfect network returns for x0 ~ N(0, V0 I), by Bayes' rule for (x0, z) given x_t."""
    alpha, sigma = (np.asarray(c(t))[:, None] for c in (sde.alpha, sde.sigma))
    marginal = alpha**2 * V0 + sigma**2
    x0_mean, z_mean = alpha * V0 / marginal * x, sigma / marginal * x
    return {
        "score": -x / marginal,
        "scaled_score": -x * sigma / marginal,
        "noise": z_mean,
        "drift": -np.asarray(sde.g(t))[:, None] * x / marginal,
        "velocity": alpha * z_mean - sigma * x0_mean,
    }[kind]


@pytest.mark.usefixtures("x64")
@every_sde
@pytest.mark.parametrize("kind", PARAMETERIZATIONS)
def test_exact_output_gives_exact_score(kind, sde):
    t = jnp.asarray(np.geomspace(1e-5, 1.0, 20))
    x = np.random.default_rng(0).standard_normal((20, 3))
    net = jnp.asarray(exact_output(kind, x, t, sde))
    score = PARAMETERIZATIONS[kind](net, jnp.asarray(x), t, sde)
    # α ẑ and σ x̂0 cancel in the velocity of variance-exploding data, where σ ≫ α.
    tolerance = 1e-10 if kind == "velocity" else 1e-13
    np.testing.assert_allclose(score, exact_output("score", x, t, sde), rtol=tolerance)


@pytest.mark.usefixtures("x64")
@every_sde
def test_labels(sde):
    t = jnp.asarray([1e-3, 0.1, 0.7, 1.0])
    alpha, sigma = np.asarray(sde.alpha(t)), np.asarray(sde.sigma(t))
    expected = {
        "time": 999.0 * np.asarray(t),
        "level": 9.0 * np.asarray(t),
        "unit_time": np.asarray(t),
        "sigma": sigma,
        "log_snr": 10.0 * np.log(sigma / alpha),
        "reverse_index": np.asarray([9.0, 8.0, 3.0, 0.0]),
    }
    assert TIME_LABELS.keys() == expected.keys()
    for name, label in TIME_LABELS.items():
        np.testing.assert_allclose(label(t, sde, 10), expected[name], rtol=1e-12, atol=1e-13)


@every_sde
def test_logarithmic_label_resolves_small_times_in_float32(sde):
    t = jnp.asarray(np.geomspace(1e-5, 1e-2, 50), jnp.float32)
    label = np.asarray(TIME_LABELS["log_snr"](t, sde, 1000))
    assert np.all(np.isfinite(label))
    assert np.all(np.diff(label) > 0.0)


class Recorder(nn.Module):
    """Returns label + 10 per dimension, plus dropout noise when training."""

    @nn.compact
    def __call__(self, x, label, train=False):
        gain = self.param("gain", nn.initializers.ones, (1,))
        output = gain[0] * jnp.broadcast_to(label[:, None] + 10.0, x.shape)
        return nn.Dropout(0.5)(output, deterministic=not train)


def test_model_labels_time_and_converts_the_output():
    sde = VPSDE()
    model = ScoreModel(Recorder(), sde, score_from_noise, TIME_LABELS["sigma"])
    params = model.init(jax.random.key(0), (4,))
    t = jnp.asarray([0.1, 0.6])
    sigma = np.asarray(sde.sigma(t))[:, None]
    score = model.score(params)(jnp.zeros((2, 4)), t)
    np.testing.assert_allclose(score, np.repeat(-(sigma + 10.0) / sigma, 4, axis=1), rtol=1e-6)
    doubled = jax.tree.map(lambda p: 2.0 * p, params)
    np.testing.assert_allclose(model.score(doubled)(jnp.zeros((2, 4)), t), 2 * score, rtol=1e-6)


def test_dropout_needs_a_key_and_has_one_mask_per_key():
    model = ScoreModel(Recorder(), VPSDE())
    params = model.init(jax.random.key(0), (64,))
    x, t = jnp.zeros((2, 64)), jnp.full((2,), 0.5)
    plain = model.score(params)(x, t)
    first, second = (model.score(params, jax.random.key(i)) for i in (1, 2))
    assert bool(jnp.all(plain != 0.0))
    assert bool(jnp.any(first(x, t) == 0.0))
    np.testing.assert_array_equal(first(x, t), first(x, t))
    assert bool(jnp.any(first(x, t) != second(x, t)))
