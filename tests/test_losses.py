"""First-order score matching against published values, Gaussian minima, and split batches."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import losses
from dequantization import Pixels, Reals
from high_order import first_order_residual
from losses import (
    FLOOR,
    LIKELIHOOD_LAWS,
    NUM_BINS,
    AdaptiveLaw,
    bin_moments,
    likelihood_weight,
    masked_mean,
    mean_loss,
    noise_weight,
    score_matching,
    time_law,
)
from operators import squared_norm
from parameterization import TIME_LABELS, ScoreModel, score_from_noise, unit_time_label
from sde_lib import SDE, VESDE, VPSDE, LinearPath, LinearVESDE, SubVPSDE
from terms import Terms
from time_sampling import Binned, Debias, Importance, Uniform, Velocity

FIXTURE = Path(__file__).resolve().parents[2] / "shared" / "fixtures" / "dsm_orders.npz"
T_MIN = 1e-3
VP = VPSDE()
SDES = [VPSDE(), SubVPSDE(), VESDE(), LinearVESDE(3.0)]
PLAIN = {
    "likelihood_weighting": False,
    "importance_weighting": False,
    "debias": False,
    "stratified": False,
}
MODES = {
    "noise": {},
    "likelihood": {"likelihood_weighting": True},
    "importance": {"likelihood_weighting": True, "importance_weighting": True},
    "debias": {"debias": True},
}


def law(sde, mode, smallest_time=T_MIN, **options):
    return time_law(sde, smallest_time=smallest_time, **(PLAIN | MODES[mode] | options))


class GaussianNoise(nn.Module):
    """The exact noise predictor σ x/v for data N(0, v0 I), told t itself; `gain` scales it."""

    sde: SDE
    v0: float
    rate: float = 0.5

    @nn.compact
    def __call__(self, x, label, train=False):
        gain = self.param("gain", nn.initializers.ones, (1,), x.dtype)
        sigma = self.sde.sigma(label)
        c = sigma / (self.sde.alpha(label) ** 2 * self.v0 + sigma**2)
        output = gain[0] * c[:, None] * x
        return nn.Dropout(self.rate)(output, deterministic=not train)


def gaussian_model(sde, v0):
    return ScoreModel(GaussianNoise(sde, v0), sde, score_from_noise, unit_time_label)


def gaussian_batch(number, v0, d=2):
    x0 = np.sqrt(v0) * np.random.default_rng(0).standard_normal((number, d))
    ids = jnp.arange(number, dtype=jnp.int32)
    return {"image": jnp.asarray(x0), "noise_id": ids, "mask": jnp.ones((number,), bool)}


def jitted_loss(mode, *, sde=VP, v0=0.25, reduce_mean=True, train=False, size=8, **options):
    """Loss per example of the exact score (at gain 1) of Gaussian data."""
    return jax.jit(
        score_matching(
            gaussian_model(sde, v0), Reals(), law(sde, mode, **options),
            Terms(reduce_mean=reduce_mean), batch_size=size, train=train,
        )
    )  # fmt: skip


PARAMS = {"gain": np.ones((1,))}


def fixture_score(x, t):
    """The analytic score field of the fixtures' README, section 5."""
    t = t[:, None]
    mean = 0.1 * jnp.mean(x, axis=1, keepdims=True)
    field = x + 0.3 * jnp.sin(2.0 * x + t) + mean + 0.2 * jnp.roll(x, -1, axis=1) * jnp.sin(x)
    return -field / (1.0 + t)


@pytest.mark.skipif(not FIXTURE.exists(), reason="shared/fixtures/dsm_orders.npz is absent")
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("name", "sde"), [("vp", VPSDE()), ("ve", VESDE())])
def test_published_first_order_losses(name, sde):
    with np.load(FIXTURE, allow_pickle=False) as data:
        x0, t, z = (jnp.asarray(data[key]) for key in ("x0", "t", "z"))
        names = ["loss1", "loss1_likelihood_weighted", "loss1_reduce_sum"]
        expected = [data[f"{name}/{loss}"] for loss in names]
    residual = first_order_residual(fixture_score(sde.perturb(x0, t, z), t), sde.sigma(t), z)
    mean = squared_norm(residual) / 6.0
    losses = [noise_weight(t, sde) * mean, likelihood_weight(t, sde) * mean, 3.0 * mean]
    np.testing.assert_allclose(losses, expected, rtol=1e-9)


def integral(function, lowest):
    """∫ over [lowest, 1] by Gauss–Legendre, cut at 1e-3 and 0.05."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    edges = np.asarray([lowest, *[b for b in (1e-3, 0.05) if b > lowest], 1.0])
    half = np.diff(edges)[:, None] / 2
    t = (edges[:-1, None] + half * (1.0 + nodes)).ravel()
    return float(np.sum((half * weights).ravel() * np.asarray(function(jnp.asarray(t)))))


def minimum(sde, mode, v0):
    """The loss per dimension of the exact score, c = 1 − σ²/v, averaged from T_MIN to T."""

    def c(t):
        sigma2 = sde.sigma(t) ** 2
        return 1.0 - sigma2 / (sde.alpha(t) ** 2 * v0 + sigma2)

    def rate(t):
        t = jnp.maximum(t, T_MIN)
        return sde.g2(t) / sde.sigma(t) ** 2

    lowest = 0.0 if mode == "debias" else T_MIN
    if mode == "noise":
        return integral(c, lowest) / (1.0 - T_MIN)
    weighted = integral(lambda t: rate(t) * c(t), lowest)
    return weighted / ((1.0 - T_MIN) if mode == "likelihood" else integral(rate, lowest))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("sde", SDES, ids=lambda sde: type(sde).__name__)
@pytest.mark.parametrize("mode", MODES)
def test_exact_score_of_gaussian_data_reaches_the_known_minimum(sde, mode):
    """Within 4 standard errors, for the weighted loss and for the unweighted part `dsm`."""
    v0, n = 0.25, 20_000
    loss_fn = jitted_loss(mode, sde=sde, v0=v0, size=n)
    values, parts = loss_fn(PARAMS, jax.random.key(2), gaussian_batch(n, v0))
    values = np.asarray(values)
    error = values.std() / np.sqrt(n)
    assert abs(values.mean() - minimum(sde, mode, v0)) < 4 * error
    unweighted = "noise" if mode == "likelihood" else mode
    dsm = np.asarray(parts["dsm"])
    expected = minimum(sde, unweighted, v0)
    assert abs(dsm.mean() - expected) < 4 * dsm.std() / np.sqrt(n)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("v0", "expected"), [(0.25, 0.21771111), (1.0, 0.25192593)])
def test_published_minimum_of_the_debiased_loss(v0, expected):
    """½ E_q c per dimension, tabulated for sdeflow-light (β from 0.1 to 20, t_eps = 1e-3)."""
    assert 0.5 * minimum(VPSDE(), "debias", v0) == pytest.approx(expected, abs=1e-6)
    n, d = 20_000, 2
    loss_fn = jitted_loss("debias", v0=v0, size=n, stratified=True, reduce_mean=False)
    values, _ = loss_fn(PARAMS, jax.random.key(1), gaussian_batch(n, v0, d))
    assert abs(float(values.mean()) / d - expected) < 4 * float(values.std()) / d / np.sqrt(n)


@pytest.mark.usefixtures("x64")
def test_exact_score_is_the_minimiser():
    """∂L/∂gain = 0 at the exact score within 4 standard errors, and ≠ 0 beside it."""
    n = 20_000
    batch, loss_fn = gaussian_batch(n, 0.25), jitted_loss("importance", size=n)

    @jax.jit
    def slopes(gain):
        tangent = {"gain": jnp.ones((1,))}
        values = lambda p: loss_fn(p, jax.random.key(0), batch)[0]  # noqa: E731
        return jax.jvp(values, ({"gain": gain},), (tangent,))[1]

    for gain, at_minimum in ((1.0, True), (0.9, False), (1.1, False)):
        slope = np.asarray(slopes(jnp.full((1,), gain)))
        assert (abs(slope.mean()) < 4 * slope.std() / np.sqrt(n)) == at_minimum


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("stratified", [False, True])
def test_loss_does_not_depend_on_how_the_batch_is_split_or_ordered(stratified):
    batch, loss_fn = gaussian_batch(8, 0.25), jitted_loss("likelihood", stratified=stratified)
    whole = loss_fn(PARAMS, jax.random.key(0), batch)[0]
    for part in (slice(0, 4), slice(4, 8), jnp.asarray([6, 1, 3, 0])):
        piece = jax.tree.map(lambda leaf, part=part: leaf[part], batch)
        values = loss_fn(PARAMS, jax.random.key(0), piece)[0]
        np.testing.assert_allclose(values, whole[part], rtol=1e-13)
    other = loss_fn(PARAMS, jax.random.key(1), batch)[0]
    assert bool(jnp.all(other != whole))


@pytest.mark.usefixtures("x64")
def test_stratified_times_lower_the_variance_of_the_loss():
    batch = gaussian_batch(16, 0.25)
    variances = []
    for stratified in (False, True):
        loss_fn = mean_loss(jitted_loss("noise", size=16, stratified=stratified))
        losses = jax.jit(jax.vmap(lambda key, f=loss_fn: f(PARAMS, key, batch)[0]))
        variances.append(np.var(losses(jax.random.split(jax.random.key(0), 2000))))
    assert variances[1] < 0.8 * variances[0]


@pytest.mark.usefixtures("x64")
def test_mean_loss_ignores_padding():
    batch = gaussian_batch(8, 0.25) | {"mask": jnp.asarray([True] * 4 + [False] * 4)}
    per_example = jitted_loss("likelihood")
    values, parts = per_example(PARAMS, jax.random.key(0), batch)
    loss, metrics = mean_loss(per_example)(PARAMS, jax.random.key(0), batch)
    assert metrics.keys() == {"loss", "dsm"}
    np.testing.assert_allclose([loss, metrics["loss"]], np.mean(values[:4]), rtol=1e-14)
    np.testing.assert_allclose(metrics["dsm"], np.mean(parts["dsm"][:4]), rtol=1e-14)


def test_masked_mean_counts_real_examples_only():
    values = jnp.asarray([1.0, 2.0, jnp.nan, jnp.inf])
    mask = jnp.asarray([True, True, False, False])
    assert float(masked_mean(values, mask)) == 1.5
    assert float(masked_mean(values, jnp.zeros((4,), bool))) == 0.0


@pytest.mark.usefixtures("x64")
def test_half_sum_is_half_d_times_the_mean():
    batch = gaussian_batch(8, 0.25, d=6)
    values = [
        jitted_loss("noise", reduce_mean=reduce_mean)(PARAMS, jax.random.key(0), batch)[0]
        for reduce_mean in (True, False)
    ]
    np.testing.assert_allclose(values[1], 3.0 * values[0], rtol=1e-14)


def test_dropout_is_on_in_training_only():
    """It zeroes half of the outputs, for which the residual is z: larger than for exact scores."""
    batch = gaussian_batch(64, 0.25)
    params = {"gain": jnp.ones((1,))}
    values = [
        np.asarray(jitted_loss("noise", train=train)(params, jax.random.key(0), batch)[0])
        for train in (False, True)
    ]
    assert np.mean(values[0] != values[1]) > 0.5


class RecordingPixels(Pixels):
    """Keeps what it encoded."""

    def encode(self, image, keys):
        y = super().encode(image, keys)
        RECORD["x0"] = np.asarray(y)
        return y


class RecordingZero(nn.Module):
    """A zero score that keeps its input."""

    def __call__(self, x, label, train=False):
        RECORD.update(x=np.asarray(x), t=np.asarray(label))
        return jnp.zeros_like(x)


RECORD = {}


def recorded_noise(seed, number):
    """Dequantisation noise, time and z of one loss evaluation on identical images."""
    image = jnp.zeros((number, 1), jnp.uint8)
    batch = {"image": image, "noise_id": jnp.arange(number), "mask": jnp.ones((number,), bool)}
    sde = VPSDE()
    score_matching(
        ScoreModel(RecordingZero(), sde, score_from_noise, unit_time_label),
        RecordingPixels(2), law(sde, "noise"),
        Terms(), batch_size=number, train=False,
    )({}, jax.random.key(seed), batch)  # fmt: skip
    t, x0 = RECORD["t"], RECORD["x0"][:, 0]
    alpha, sigma = (np.asarray(c(jnp.asarray(t))) for c in (sde.alpha, sde.sigma))
    return np.stack([x0, t, (RECORD["x"][:, 0] - alpha * x0) / sigma])


def test_dequantisation_time_and_noise_are_independent_and_new_in_every_step():
    """Correlations of the three draws of an id, and of two steps, within 4 standard errors."""
    n = 4000
    draws = np.concatenate([recorded_noise(seed, n) for seed in (0, 1)])
    assert np.all(np.abs(np.corrcoef(draws) - np.eye(6)) < 4 / np.sqrt(n))
    assert all(len(np.unique(draw)) > 0.99 * n for draw in draws)


def test_published_switches_give_the_documented_laws():
    sde = VPSDE()
    expected = {
        "noise": (Uniform, noise_weight),
        "likelihood": (Uniform, likelihood_weight),
        "importance": (Importance, noise_weight),
        "debias": (Debias, noise_weight),
    }
    for mode, (proposal, weight) in expected.items():
        for stratified in (False, True):
            chosen = law(sde, mode, 1e-4, stratified=stratified)
            assert chosen.proposal == proposal(sde, 1e-4)
            assert (chosen.weight, chosen.stratified) == (weight, stratified)


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        (
            {"importance_weighting": True},
            "importance_weighting=True: need False, or .*likelihood_weighting",
        ),
        (
            {"debias": True, "likelihood_weighting": True},
            "debias=True: need False.*already weights",
        ),
        (
            {"debias": True, "importance_weighting": True},
            "debias=True: need False.*already weights",
        ),
    ],
)
def test_switches_without_effect_are_refused(switches, message):
    with pytest.raises(ValueError, match=message):
        time_law(VPSDE(), smallest_time=1e-3, **(PLAIN | switches))


def test_names_give_the_documented_laws():
    sde = VPSDE()
    weighted = {"likelihood_weighting": True, "stratified": True}
    for name, proposal, weight in (
        ("uniform", Uniform, likelihood_weight), ("importance", Importance, noise_weight),
        ("debias", Debias, noise_weight), ("adaptive", Importance, noise_weight),
        ("velocity", Velocity, lambda t, sde: Velocity(sde, 1e-4).relative_weight(t)),
    ):  # fmt: skip
        found = time_law(sde, smallest_time=1e-4, name=name, **weighted)
        assert (found.proposal, found.stratified) == (proposal(sde, 1e-4), True)
        assert isinstance(found, AdaptiveLaw) == (name == "adaptive")
        t = jnp.asarray([1e-3, 0.3, 0.9])
        np.testing.assert_array_equal(found.weight(t, sde), weight(t, sde))
    for switches, name in (
        ({"importance_weighting": True, "likelihood_weighting": True}, "importance"),
        ({"debias": True}, "debias"), ({}, "uniform"), ({"likelihood_weighting": True}, "uniform"),
    ):  # fmt: skip
        named = time_law(sde, smallest_time=1e-4, name=name, **switches)
        assert named == time_law(sde, smallest_time=1e-4, **switches)


@pytest.mark.parametrize(
    ("name", "switches", "message"),
    [
        ("adaptiv", {"likelihood_weighting": True}, r"law='adaptiv': allowed \['', 'adaptive'"),
        ("velocity", {}, "'velocity': need .*likelihood_weighting=True: it proposes times"),
        ("importance", {}, "'importance': need .*it proposes times for the weight"),
        (
            "velocity", {"likelihood_weighting": True, "importance_weighting": True},
            "'velocity': need '' or 'importance', or .*importance_weighting=False",
        ),
        ("uniform", {"debias": True}, "'uniform': need '' or 'debias'"),
        ("adaptive", {"levels": 10}, "continuous=False: need True, or .*time_law=''"),
    ],
)  # fmt: skip
def test_names_that_contradict_are_refused(name, switches, message):
    with pytest.raises(ValueError, match=message):
        time_law(VPSDE(), smallest_time=1e-3, name=name, **switches)


def moments_of(squares, counts):
    return jnp.asarray(np.stack([squares, counts]))


@pytest.mark.usefixtures("x64")
def test_masses_of_an_adaptive_law_are_roots_of_second_moments_with_a_floor():
    """m_j = (1 − FLOOR) √E[h²|j]/Σ + FLOOR/n, from sums that count differently often."""
    rng = np.random.default_rng(0)
    squares, counts = rng.random(NUM_BINS) ** 4, rng.random(NUM_BINS) + 0.1
    squares[3], squares[5] = 0.0, 1e6 * counts[5]
    adaptive = AdaptiveLaw(Importance(VP, T_MIN), noise_weight, True)
    found = adaptive.at({"time_law": moments_of(squares, counts)})
    roots = np.sqrt(squares / counts)
    expected = 0.8 * roots / roots.sum() + 0.2 / NUM_BINS
    assert isinstance(found.proposal, Binned)
    assert (FLOOR, found.stratified) == (0.2, True)
    np.testing.assert_allclose(found.proposal.masses, expected, rtol=1e-14)
    assert float(found.proposal.masses.sum()) == pytest.approx(1.0, rel=1e-14)
    assert float(found.proposal.masses.min()) == pytest.approx(0.2 / NUM_BINS, rel=1e-14)
    t = found.proposal.quantile(jnp.linspace(0.01, 0.99, 50))
    density = Importance(VP, T_MIN).density(t) / found.proposal.density(t)
    np.testing.assert_allclose(found.weight(t, VP), density, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_moments_of_bins_are_those_of_the_real_examples():
    """Mean over the batch of (h², 1) in the bin of t: their ratio is the mean of h² in a bin."""
    equal = jnp.full((NUM_BINS,), 1 / NUM_BINS)
    law_now = losses.BinnedLaw(Binned(VP, T_MIN, equal), noise_weight)
    n = 64
    u, h = np.random.default_rng(1).random((2, n))
    t = law_now.proposal.quantile(jnp.asarray(u))
    rows, mask = bin_moments(law_now, t, jnp.asarray(h)), np.arange(n) < 50
    found = masked_mean(rows, jnp.asarray(mask))
    which, h, mask = np.floor(NUM_BINS * u).astype(int), h[mask], mask.sum()
    squares = np.bincount(which[:mask], h**2, NUM_BINS) / mask
    counts = np.bincount(which[:mask], minlength=NUM_BINS) / mask
    np.testing.assert_allclose(found, np.stack([squares, counts]), rtol=1e-13)


SLOW = [VPSDE(0.3, 7.0), SubVPSDE(0.3, 7.0), VESDE(0.05, 5.0), LinearVESDE(3.0), LinearPath(0.9)]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("sde", SLOW, ids=lambda sde: type(sde).__name__)
def test_every_law_has_the_gradient_of_the_importance_law(sde, monkeypatch):
    """∂L/∂gain by the midpoint rule in u at fixed x0 and z, times the constant that is left out.

    `uniform` estimates the integral over T − t_min, the others over W(T) − W(t_min).
    """
    n, image, z = 20_000, jnp.asarray([[0.4, -0.3]]), jnp.asarray([[1.3, -0.2]])
    monkeypatch.setitem(
        losses.UNIFORMS, False, lambda key, ids, n, dtype: (ids.astype(dtype) + 0.5) / n
    )
    monkeypatch.setattr(
        losses, "standard_normal", lambda keys, like: jnp.broadcast_to(z, like.shape)
    )
    batch = gaussian_batch(n, 1.0) | {"image": jnp.broadcast_to(image, (n, 2))}
    rough = np.random.default_rng(0).random((2, NUM_BINS)) ** 2 + 0.01
    batch["time_law"] = jnp.asarray(rough)
    importance = Importance(sde, T_MIN)

    def slope(name):
        chosen = time_law(sde, smallest_time=T_MIN, likelihood_weighting=True, name=name)
        model = gaussian_model(sde, 0.25)
        model = ScoreModel(model.network.clone(rate=0.0), sde, model.to_score, model.label)
        per_example = score_matching(model, Reals(), chosen, Terms(), batch_size=n, train=True)
        gradient = jax.jit(jax.grad(mean_loss(per_example), has_aux=True))
        found = gradient({"gain": jnp.full((1,), 0.7)}, jax.random.key(0), batch)[0]["gain"]
        length = chosen.proposal.length if name == "uniform" else float(importance.normalizer)
        return float(found[0]) * length

    expected = slope("importance")
    assert abs(expected) > 0.1
    for name in LIKELIHOOD_LAWS.keys() - {"importance", "debias"}:  # debias: of [0, T]
        assert slope(name) == pytest.approx(expected, rel=3e-4), name


def test_levels_are_uniform_on_the_grid_with_weight_one():
    """The times of SMLD and DDPM; α and σ there are those of the chain."""
    n, number = 20_000, 10
    chain = VPSDE(beta_max=5.0).chain(number)
    found = law(chain, "noise", levels=number)
    batch = {"noise_id": jnp.arange(n, dtype=jnp.int32)}
    t = np.asarray(found.sample(jax.random.key(0), batch, n))
    index = t * (number - 1)
    np.testing.assert_allclose(index, np.round(index), atol=1e-5)
    counts = np.bincount(np.round(index).astype(int), minlength=number)
    assert np.abs(counts - n / number).max() < 4 * np.sqrt(n / number)
    np.testing.assert_array_equal(found.weight(jnp.asarray(t), chain), 1.0)
    variance = 1.0 - np.cumprod(1.0 - np.linspace(0.1, 5.0, number) / number)
    expected = variance[np.round(index).astype(int)]
    np.testing.assert_allclose(chain.sigma(jnp.asarray(t)) ** 2, expected, rtol=1e-4)
    for mode in ("likelihood", "importance", "debias"):
        with pytest.raises(
            ValueError, match=r"continuous=False: need True, or .*discrete levels are uniform"
        ):
            law(chain, mode, levels=number)


def test_the_label_of_smld_counts_levels_from_the_largest():
    t = jnp.linspace(0.0, 1.0, 232)
    label = TIME_LABELS["reverse_index"](t, VESDE(), 232)
    np.testing.assert_array_equal(label, np.arange(231, -1, -1))
    sigmas = np.exp(np.linspace(np.log(50.0), np.log(0.01), 232))
    np.testing.assert_allclose(VESDE().sigma(t), sigmas[np.asarray(label, int)], rtol=1e-5)


class SeesContext(ScoreModel):
    """A score of zero, and of 1/σ in every coordinate without a context: σ s + z tells which."""

    def score(self, params, dropout_key=None, *, context=None):
        del params, dropout_key
        return lambda x, t: jnp.where(
            (context < 0)[:, None], jnp.broadcast_to(1.0 / self.sde.sigma(t)[:, None], x.shape), 0.0
        )


def test_contexts_are_dropped_by_example_whatever_batch_it_is_in():
    """At the stated rate, by (rng, noise_id); never in evaluation, nor without dropout."""
    n, rate = 4000, 0.2
    model = SeesContext(gaussian_model(VP, 0.25).network, VP)
    batch = gaussian_batch(n, 1.0) | {"context": jnp.zeros(n, jnp.int32)}

    def dsm(rng, batch, *, train=True, **dropout):
        per_example = score_matching(
            model, Reals(), law(VP, "noise"), Terms(), batch_size=n, train=train, **dropout
        )
        return np.asarray(jax.jit(per_example)({}, rng, batch)[1]["dsm"])

    key = jax.random.key(0)
    kept = dsm(key, batch)
    evaluated = dsm(key, batch, train=False, context_dropout=rate)
    np.testing.assert_allclose(evaluated, kept, rtol=1e-5)
    whole = dsm(key, batch, context_dropout=rate)
    dropped = ~np.isclose(whole, kept, rtol=1e-5)
    assert abs(dropped.mean() - rate) < 4 * (rate * (1 - rate) / n) ** 0.5
    halves = [
        dsm(key, {name: leaf[rows] for name, leaf in batch.items()}, context_dropout=rate)
        for rows in (slice(n // 2), slice(n // 2, n))
    ]
    np.testing.assert_allclose(np.concatenate(halves), whole, rtol=1e-5)
    later = [dsm(jax.random.key(1), batch, context_dropout=r) for r in (rate, 0.0)]
    both = np.mean(~np.isclose(*later, rtol=1e-5) & dropped)  # independent of the step before
    assert abs(both - rate**2) < 4 * (rate**2 / n) ** 0.5
