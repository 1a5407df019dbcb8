"""Optimiser and moving average against NumPy, keys by step, equal results on 1, 2 and 4 devices."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from dequantization import Reals
from losses import NUM_BINS, mean_loss, score_matching, time_law
from parameterization import ScoreModel
from sde_lib import VPSDE
from terms import Terms
from time_sampling import Importance
from train_state import (
    OptimizerConfig,
    TrainState,
    create,
    decayed_weights,
    many_steps,
    moving_average_rate,
    train_step,
)


@pytest.fixture
def double():
    """Float64 without strict promotion: optax mixes its int32 counts with floats."""
    with jax.enable_x64(True):
        yield


pytestmark = pytest.mark.usefixtures("four_devices")

ADAM = OptimizerConfig(
    optimizer="Adam", lr=0.1, beta1=0.9, beta2=0.99, eps=1e-3,
    weight_decay=0.0, warmup=0, grad_clip=-1.0, schedule="constant",
)  # fmt: skip
START = {"a": np.asarray([1.0, -2.0]), "b": np.asarray([[0.5]])}
SLOPES = np.asarray([[3.0, 1.0, -2.0], [0.1, 0.02, -0.3], [-1.0, 4.0, 0.0], [0.0, 0.0, 0.1]])
EMA_RATE = 0.2  # below the warm-up from the second step on


def linear_loss(params, rng, batch):
    """A loss whose gradient is the mean of the batch's slopes, plus its parameters."""
    flat = jnp.concatenate([params["a"], params["b"].ravel()])
    slope = jnp.mean(batch["slope"], axis=0)
    loss = jnp.sum(slope * flat) + 0.5 * jnp.sum(flat**2)
    return loss, {"loss": loss, "noise": jax.random.normal(rng)}


def run(config, slopes, num_steps=100, state=None):
    """States and metrics of single steps on one device; slopes: [steps, examples, 3]."""
    optimizer = config.chain(num_steps)
    step = jax.pmap(
        train_step(linear_loss, optimizer, EMA_RATE, "batch"),
        axis_name="batch",
        in_axes=(None, None, 0),
        out_axes=None,
        devices=jax.devices()[:1],
    )
    state = create(jax.tree.map(jnp.asarray, START), optimizer) if state is None else state
    history = []
    for slope in slopes:
        state, metrics = step(state, jax.random.key(7), {"slope": jnp.asarray(slope)[None]})
        history.append((state, jax.tree.map(np.asarray, metrics)))
    return history


def flatten(params):
    return np.concatenate([np.asarray(params["a"]), np.asarray(params["b"]).ravel()])


def published_adam(config, slopes):
    """Parameters and moving average after every step; the update of mle_score_ode and score_sde."""
    p = flatten(START)
    ema, m, v, history = p.copy(), 0.0, 0.0, []
    for k, slope in enumerate(slopes):
        g = slope.mean(axis=0) + p
        if config.grad_clip >= 0:
            g = g * config.grad_clip / max(np.linalg.norm(g), config.grad_clip)
        rate = config.lr * (min(k / config.warmup, 1.0) if config.warmup else 1.0)
        m = config.beta1 * m + (1 - config.beta1) * g
        v = config.beta2 * v + (1 - config.beta2) * g**2
        m_hat, v_hat = m / (1 - config.beta1 ** (k + 1)), v / (1 - config.beta2 ** (k + 1))
        p = p - rate * (m_hat / (np.sqrt(v_hat) + config.eps) + config.weight_decay * p)
        ema_rate = min(EMA_RATE, (2 + k) / (11 + k))
        ema = ema_rate * ema + (1 - ema_rate) * p
        history.append((p, ema))
    return history


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"grad_clip": 1.0},
        {"weight_decay": 0.3},
        {"warmup": 2},
        {"grad_clip": 2.0, "weight_decay": 0.1, "warmup": 3, "beta1": 0.5},
    ],
    ids=str,
)
def test_steps_are_those_of_published_adam(options):
    """Up to the float32 rate and bias corrections of optax; a clip of 1 or 2 acts on some steps."""
    config = dataclasses.replace(ADAM, **options)
    slopes = SLOPES[:, None]
    expected = published_adam(config, slopes)
    for (state, _), (params, ema) in zip(run(config, slopes), expected, strict=True):
        np.testing.assert_allclose(flatten(state.params), params, rtol=2e-7)
        np.testing.assert_allclose(flatten(state.ema_params), ema, rtol=2e-7)
    assert int(state.step) == 4


@pytest.mark.usefixtures("double")
def test_clipping_bounds_the_norm_of_the_whole_gradient_unless_negative():
    """A first step with a large eps moves by lr·g/eps, so the clipped gradient can be read off."""
    gradient = flatten(START) + 100.0
    for grad_clip, norm in ((1.0, 1.0), (50.0, 50.0), (1e3, None), (-1.0, None)):
        config = dataclasses.replace(ADAM, lr=1e9, eps=1e9, grad_clip=grad_clip)
        state, metrics = run(config, np.full((1, 2, 3), 100.0))[0]
        moved = np.linalg.norm(flatten(START) - flatten(state.params))
        norm = np.linalg.norm(gradient) if norm is None else norm
        assert moved == pytest.approx(norm, rel=1e-6)
        assert metrics["grad_norm"] == pytest.approx(np.linalg.norm(gradient), rel=1e-12)


def test_warm_up_starts_at_zero_and_grows_linearly():
    rate = dataclasses.replace(ADAM, warmup=5).learning_rate(100)
    np.testing.assert_allclose(
        [rate(k) for k in (0, 1, 4, 5, 6, 99)], [0.0, 0.02, 0.08, 0.1, 0.1, 0.1], rtol=1e-6
    )
    assert float(ADAM.learning_rate(100)(0)) == pytest.approx(0.1)


def test_first_step_of_a_warm_up_changes_nothing():
    state, _ = run(dataclasses.replace(ADAM, warmup=5), SLOPES[:1, None])[0]
    np.testing.assert_array_equal(flatten(state.params), flatten(START))
    np.testing.assert_allclose(flatten(state.ema_params), flatten(START), rtol=1e-7)


def test_cosine_schedule_falls_to_zero_over_the_run():
    rate = dataclasses.replace(ADAM, schedule="cosine", warmup=10).learning_rate(100)
    expected = [
        0.1 * min(k / 10, 1.0) * 0.5 * (1 + math.cos(math.pi * k / 100)) for k in range(101)
    ]
    np.testing.assert_allclose([rate(k) for k in range(101)], expected, rtol=1e-5, atol=1e-8)


def test_state_has_one_structure_whatever_the_numbers():
    """So a checkpoint can be restored under other optimiser settings."""
    others = [{"grad_clip": 1.0}, {"weight_decay": 0.1}, {"warmup": 10}, {"schedule": "cosine"}]
    params = jax.tree.map(jnp.asarray, START)
    expected = jax.tree.structure(create(params, ADAM.chain(10)))
    for options in others:
        state = create(params, dataclasses.replace(ADAM, **options).chain(10))
        assert jax.tree.structure(state) == expected


def test_moving_average_starts_at_the_parameters_in_its_own_memory():
    params = jax.tree.map(jnp.asarray, START)
    state = create(params, ADAM.chain(10))
    assert (int(state.step), state.step.dtype) == (0, jnp.int32)
    for leaf, ema in zip(jax.tree.leaves(params), jax.tree.leaves(state.ema_params), strict=True):
        np.testing.assert_array_equal(leaf, ema)
        assert leaf.unsafe_buffer_pointer() != ema.unsafe_buffer_pointer()


def test_key_of_a_step_depends_on_the_seed_and_the_step_only():
    """Also after a restart from the state of step 2, with other data."""
    history = run(ADAM, SLOPES[:, None])
    noise = [float(metrics["noise"]) for _, metrics in history]
    expected = [
        float(jax.random.normal(jax.random.fold_in(jax.random.key(7), k))) for k in range(4)
    ]
    np.testing.assert_allclose(noise, expected, rtol=1e-6)
    resumed = run(ADAM, 2.0 * SLOPES[2:, None], state=history[1][0])
    assert [float(metrics["noise"]) for _, metrics in resumed] == noise[2:]


SIZE = 8


class Network(nn.Module):
    """One hidden layer on (x, label)."""

    @nn.compact
    def __call__(self, x, label, train=False):
        inputs = jnp.concatenate([x, 1e-3 * label[:, None]], axis=1)
        return nn.Dense(2)(nn.swish(nn.Dense(16)(inputs)))


def loss_by(name, size=SIZE):
    """The loss of a small network on real-valued data under a law of times, and the network."""
    model = ScoreModel(Network(), VPSDE())
    law = time_law(
        VPSDE(), smallest_time=1e-3, likelihood_weighting=True, name=name, stratified=True
    )
    per_example = score_matching(model, Reals(), law, Terms(), batch_size=size, train=True)
    return mean_loss(per_example), model


@functools.cache
def training(name="importance", *, size=SIZE, lr=1e-2, num_microbatches=1):
    """The step of that network and its first state."""
    loss_fn, model = loss_by(name, size)
    optimizer = dataclasses.replace(ADAM, lr=lr, eps=1e-8, grad_clip=1.0).chain(10)
    state = create(model.init(jax.random.key(0), (2,)), optimizer, adaptive=name == "adaptive")
    return train_step(loss_fn, optimizer, 0.9, "batch", num_microbatches), state


def batches(number, devices, size=SIZE):
    """[devices, number, size / devices, ...]: consecutive parts of the same global batches."""
    x = np.random.default_rng(0).standard_normal((number, size, 2)).astype(np.float32)
    ids = np.tile(np.arange(size, dtype=np.int32), (number, 1))
    batch = {"image": x, "noise_id": ids, "mask": np.ones((number, size), bool)}

    def spread(leaf):
        parts = leaf.reshape(number, devices, size // devices, *leaf.shape[2:])
        return np.moveaxis(parts, 1, 0)

    return jax.tree.map(spread, batch)


@functools.cache
def several_steps(devices, number=4, name="importance", **options):
    """State and metrics after the steps, with the leading axis of the devices."""
    step_fn, state = training(name, **options)
    parallel = jax.pmap(
        many_steps(step_fn),
        axis_name="batch",
        in_axes=(None, None, 0),
        devices=jax.devices()[:devices],
    )
    size = options.get("size", SIZE)
    return parallel(state, jax.random.key(1), batches(number, devices, size))


def test_an_empty_batch_ends_the_steps():
    """As many steps in a longer dispatch give the same bits: it is the same loop."""
    step_fn, state = training()
    run = jax.pmap(
        many_steps(step_fn), axis_name="batch", in_axes=(None, None, 0), devices=jax.devices()[:1]
    )
    data = batches(4, 1)
    data["mask"][:, 3] = False
    found, metrics = run(state, jax.random.key(1), data)
    three = jax.tree.map(lambda leaf: leaf[:, :3], data)
    expected, _ = run(state, jax.random.key(1), three)
    assert int(found.step[0]) == 3
    assert np.all(metrics["loss"][0, :3] > 0.0)
    assert metrics["loss"][0, 3] == 0.0
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_steps_of_one_dispatch_equal_single_steps():
    step_fn, state = training()
    scanned, metrics = several_steps(1)
    single = jax.pmap(
        step_fn, axis_name="batch", in_axes=(None, None, 0), out_axes=None,
        devices=jax.devices()[:1],
    )  # fmt: skip
    losses, data = [], batches(4, 1)
    for k in range(4):
        batch = jax.tree.map(lambda leaf, k=k: leaf[:, k], data)
        state, step_metrics = single(state, jax.random.key(1), batch)
        losses.append(step_metrics["loss"])
    np.testing.assert_allclose(metrics["loss"][0], losses, rtol=1e-5)
    assert metrics["grad_norm"].shape == (1, 4)
    for leaf, expected in zip(jax.tree.leaves(scanned), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(leaf[0], expected, rtol=1e-5, atol=1e-6)


def test_result_does_not_depend_on_the_number_of_devices():
    """Times, noise and gradients of the same global batches, split over 1, 2 and 4 devices."""
    expected, metrics = several_steps(1)
    for devices in (2, 4):
        other, other_metrics = several_steps(devices)
        for name, values in metrics.items():
            np.testing.assert_allclose(
                other_metrics[name], np.repeat(values, devices, axis=0), rtol=1e-5, atol=1e-6
            )
        for leaf, first in zip(jax.tree.leaves(other), jax.tree.leaves(expected), strict=True):
            assert leaf.shape[0] == devices
            np.testing.assert_allclose(
                leaf, np.repeat(first, devices, axis=0), rtol=1e-5, atol=1e-6
            )
    start = training()[1].params
    moved = jax.tree.map(lambda a, b: float(np.abs(a[0] - b).max()), expected.params, start)
    assert max(jax.tree.leaves(moved)) > 1e-2
    assert isinstance(expected, TrainState)


def test_an_adaptive_law_is_the_moving_average_of_the_moments_of_its_steps():
    """r_k = min(.99, (2 + k)/(11 + k)), r_0 = 2/11; of the batch and of the masses of each step."""
    state, _ = several_steps(1, 1, "adaptive")
    loss_fn, _ = loss_by("adaptive")
    params, moments = training("adaptive")[1].params, jnp.ones((2, NUM_BINS))
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf[0, 0]), batches(4, 1))
    known = batch | {"step": jnp.int32(0), "time_law": moments}
    key = jax.random.fold_in(jax.random.key(1), 0)
    found = loss_fn(params, key, known)[1]["time_law"]
    assert float(found[1].sum()) == pytest.approx(1.0, rel=1e-6)  # every example is in one bin
    assert float(jnp.abs(found - moments).max()) > 0.1
    np.testing.assert_allclose(
        state.time_law[0], 2 / 11 * moments + 9 / 11 * found, rtol=1e-5, atol=1e-7
    )
    rates = [float(moving_average_rate(0.99, jnp.int32(k))) for k in (0, 10, 10_000)]
    np.testing.assert_allclose(rates, [2 / 11, 12 / 21, 0.99], rtol=1e-6)
    importance, metrics = several_steps(1, 4)
    assert importance.time_law is None
    assert metrics.keys() == several_steps(1, 4, "adaptive")[1].keys()  # no moments


def test_an_adaptive_law_does_not_depend_on_devices_or_microbatches():
    expected, metrics = several_steps(1, 4, "adaptive")
    for other, found in (
        several_steps(2, 4, "adaptive"), several_steps(1, 4, "adaptive", num_microbatches=2),
    ):  # fmt: skip
        np.testing.assert_allclose(other.time_law[0], expected.time_law[0], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(found["loss"][0], metrics["loss"][0], rtol=1e-5)
        for leaf, first in zip(
            jax.tree.leaves(other.params), jax.tree.leaves(expected.params), strict=True
        ):
            np.testing.assert_allclose(leaf[0], first[0], rtol=1e-5, atol=1e-6)


def test_an_adaptive_law_learns_the_second_moments_of_the_loss():
    """Of a network that hardly moves: √E[h² | bin] to 12% in every bin, by 60,000 times at once.

    200 steps of 256 examples with weights .99^k count as 50,000/2: at least 300 in each bin, and h²
    varies by 1.1 of its mean.
    """
    size, number = 256, 200
    state, _ = several_steps(1, number, "adaptive", size=size, lr=1e-12)
    squares, counts = np.asarray(state.time_law[0])
    n = 60_000
    _, model = loss_by("importance", n)
    law = time_law(VPSDE(), smallest_time=1e-3, likelihood_weighting=True, name="importance")
    per_example = score_matching(model, Reals(), law, Terms(), batch_size=n, train=False)
    x = jax.random.normal(jax.random.key(3), (n, 2))
    batch = {"image": x, "noise_id": jnp.arange(n, dtype=jnp.int32), "mask": jnp.ones((n,), bool)}
    params, key = training("adaptive")[1].params, jax.random.key(4)
    h = np.asarray(jax.jit(per_example)(params, key, batch)[0])
    t = law.sample(jax.random.split(key, 5)[1], batch, n)
    place = VPSDE().cumulative_weight(t) - Importance(VPSDE(), 1e-3).bounds()[0]
    which = np.clip(NUM_BINS * place / law.proposal.normalizer, 0, NUM_BINS - 1).astype(int)
    expected = np.bincount(which, h.astype(float) ** 2) / np.bincount(which)
    assert expected.max() > 1.5 * expected.min()
    np.testing.assert_allclose(np.sqrt(squares / counts), np.sqrt(expected), rtol=0.12)


def test_weight_decay_leaves_the_prior_of_a_head_alone():
    """Whatever is below `prior` at the top, and nothing else of that name."""
    leaf = jnp.asarray([1.0, -2.0])
    params = {"prior": {"mean": leaf}, "network": {"prior": leaf, "w": leaf}, "matrix": leaf}
    update = jax.tree.map(lambda a: 0.5 * jnp.ones_like(a), params)
    found, _ = decayed_weights(0.1).update(update, (), params)
    decayed = [0.6, 0.3]
    expected = {"prior": {"mean": [0.5, 0.5]}, "network": {"prior": decayed, "w": decayed}}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        found, jax.tree.map(jnp.asarray, expected | {"matrix": decayed},
                            is_leaf=lambda a: isinstance(a, list)),
    )  # fmt: skip


def test_the_moving_average_of_what_stays_stays():
    """100,000 steps at the default rate: rounding does not add up, 1e-6 relative at most."""
    params = {"prior": jnp.asarray(np.random.default_rng(0).standard_normal(1000), jnp.float32)}

    @jax.jit
    def averaged(ema):
        step = lambda _, e: optax.incremental_update(params, e, 1.0 - jnp.float32(0.9999))  # noqa: E731
        return jax.lax.fori_loop(0, 100_000, step, ema)

    np.testing.assert_allclose(averaged(params)["prior"], params["prior"], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "sgd"}, "optim.optimizer='sgd'.*Adam"),
        ({"schedule": "linear"}, "optim.schedule='linear'.*constant.*cosine"),
        ({"lr": 0.0}, "optim.lr=0.0"),
        ({"lr": float("nan")}, "optim.lr=nan"),
        ({"warmup": -1}, "optim.warmup=-1"),
        ({"weight_decay": -0.1}, "optim.weight_decay=-0.1"),
        ({"beta2": 1.0}, "optim.beta2=1.0"),
        ({"grad_clip": 0.0}, "optim.grad_clip=0"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ADAM, **options)
