"""Proposals for t: densities, inverse CDFs, published constants, stratification, ids."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import kstest

from sde_lib import SDES, VESDE, VPSDE, LinearPath, LinearVESDE, SubVPSDE
from time_sampling import (
    UNIFORMS,
    Binned,
    Debias,
    Importance,
    Uniform,
    Velocity,
    independent_uniforms,
    stratified_uniforms,
)

PROPOSALS = [
    Uniform(VPSDE(), 1e-5), Uniform(VESDE(), 0.0),
    Importance(VPSDE(), 1e-5), Importance(VPSDE(0.3, 7.0), 1e-3),
    Importance(SubVPSDE(), 1e-2), Importance(SubVPSDE(0.3, 7.0), 1e-3),
    Importance(VESDE(), 1e-5), Importance(LinearVESDE(3.0), 1e-3), Importance(LinearPath(), 1e-5),
    Debias(VPSDE()), Debias(VPSDE(0.3, 7.0), 1e-2), Debias(SubVPSDE(), 1e-2),
    Debias(VESDE(), 1e-5), Debias(LinearVESDE(3.0), 1e-2),
]  # fmt: skip
every_proposal = pytest.mark.parametrize("proposal", PROPOSALS, ids=str)
VELOCITY = [
    Velocity(VPSDE(), 1e-5), Velocity(VPSDE(0.3, 7.0), 1e-3), Velocity(SubVPSDE(), 1e-2),
    Velocity(VESDE(), 1e-5), Velocity(LinearVESDE(3.0), 1e-3), Velocity(LinearPath(), 1e-5),
]  # fmt: skip
every_velocity = pytest.mark.parametrize("law", VELOCITY, ids=str)
BINNED = [Importance(VPSDE(), 1e-5), Importance(SubVPSDE(), 1e-2), Importance(LinearPath(), 1e-5)]
every_binned = pytest.mark.parametrize("law", BINNED, ids=str)
MASSES = np.asarray([0.02, 0.3, 0.11, 0.07, 0.05, 0.001, 0.349, 0.1])


def lowest_time(proposal):
    return getattr(proposal, "t_min", 0.0)


def probability(proposal, t):
    """P(proposal ≤ t) by Gauss–Legendre quadrature of its density, cut at t_eps and at decades."""
    nodes, weights = np.polynomial.legendre.leggauss(24)
    low = lowest_time(proposal)
    top = [*np.geomspace(1e-5, proposal.sde.T, 16), 0.9 * proposal.sde.T, 0.97 * proposal.sde.T]
    cuts = sorted([low, getattr(proposal, "t_eps", 1e-6), *top])
    edges = np.clip([*cuts, proposal.sde.T], low, t)  # always as many, the last ones empty
    half = np.diff(edges)[:, None] / 2
    s = (edges[:-1, None] + half * (1.0 + nodes)).ravel()
    return np.sum((half * weights).ravel() * np.asarray(proposal.density(jnp.asarray(s))))


def tabulated_cdf(proposal):
    """CDF on a fine logarithmic grid by the trapezoidal rule, good to 1e-5."""
    low = lowest_time(proposal)
    t = np.concatenate([[low], np.geomspace(max(low, 1e-7), proposal.sde.T, 20_000)])
    p = np.asarray(proposal.density(jnp.asarray(t)))
    mass = np.concatenate([[0.0], np.cumsum(np.diff(t) * (p[1:] + p[:-1]) / 2)])
    return functools.partial(np.interp, xp=t, fp=mass)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("proposal", "expected"),
    [
        (Importance(VPSDE(), 1e-5), 23.86447),
        (Importance(VPSDE(), 5e-5), 22.251),
        (Importance(SubVPSDE(), 1e-2), 22.48413),
        (Importance(VESDE(), 1e-5), 2.0 * np.log(5000.0) * (1.0 - 1e-5)),
        (Importance(LinearVESDE(), 1e-3), 2.0 * np.log(1000.0)),
        (Debias(VPSDE(), 1e-3), 20.25594231),
        (Uniform(VPSDE(), 1e-2), 0.99),
    ],
    ids=str,
)
def test_normalisers(proposal, expected):
    digits = len(str(expected).split(".")[1])
    assert float(proposal.normalizer) == pytest.approx(
        expected, abs=max(0.6 * 10.0**-digits, 1e-12)
    )


@pytest.mark.usefixtures("x64")
@every_proposal
def test_quantile_inverts_the_integral_of_the_density(proposal):
    """To the ends of the support: the density integrates to one."""
    u = np.asarray([1e-3, 0.04, 0.3, 0.7, 0.98])
    t = np.asarray(proposal.quantile(jnp.asarray(u)))
    np.testing.assert_allclose([probability(proposal, s) for s in t], u, rtol=1e-8)
    assert probability(proposal, proposal.sde.T) == pytest.approx(1.0, rel=1e-9)
    ends = proposal.quantile(jnp.asarray([0.0, 1.0]))
    np.testing.assert_allclose(ends, [lowest_time(proposal), proposal.sde.T], rtol=1e-10)


@pytest.mark.usefixtures("x64")
@every_proposal
def test_samples_follow_the_density(proposal):
    u = independent_uniforms(jax.random.key(5), jnp.arange(20_000), 20_000, jnp.float64)
    result = kstest(np.asarray(proposal.quantile(u)), tabulated_cdf(proposal))
    assert result.pvalue > 1e-3, result


@pytest.mark.usefixtures("x64")
def test_debias_law_of_the_drift_elbo():
    """u_eps, quantiles and mean of sdeflow-light with β from 0.1 to 20 and t_eps = 1e-3."""
    law = Debias(VPSDE(), 1e-3)
    rate, flat, low, normalizer = (float(piece) for piece in law.pieces())
    assert rate == pytest.approx(1090.55563, abs=6e-6)
    assert low == pytest.approx(-9.11542987, abs=6e-9)
    assert flat / normalizer == pytest.approx(0.05383880, abs=6e-9)
    u = jnp.asarray([0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99])
    expected = [1.857397e-4, 9.286983e-4, 2.282263e-3, 1.9694857e-2]
    expected += [0.25157653, 0.70336199, 0.89304322, 0.98982097]
    np.testing.assert_allclose(law.quantile(u), expected, rtol=3e-7)
    grid = (jnp.arange(200_000.0) + 0.5) / 200_000.0
    assert float(jnp.mean(law.quantile(grid))) == pytest.approx(0.36393769, abs=1e-8)


@pytest.mark.usefixtures("x64")
@every_proposal
def test_importance_weights_make_integrals_unbiased(proposal):
    """E[h(t)/p(t)] = ∫ h dt, h = t², by the midpoint rule in u."""
    t = proposal.quantile((jnp.arange(20_000.0) + 0.5) / 20_000.0)
    estimate = float(jnp.mean(t**2 / proposal.density(t)))
    expected = (proposal.sde.T**3 - lowest_time(proposal) ** 3) / 3.0
    assert estimate == pytest.approx(expected, rel=1e-4)


@pytest.mark.usefixtures("x64")
@every_proposal
def test_quantile_is_accurate_in_float32(proposal):
    """5e-6 relative: W ≈ −14 near the data has float32 spacing 1e-6, and dt/t ≤ dW there."""
    u = jnp.asarray(np.concatenate([np.geomspace(1e-7, 0.1, 200), np.linspace(0.1, 1.0, 200)]))
    single = proposal.quantile(u.astype(jnp.float32))
    double = proposal.quantile(u.astype(jnp.float32).astype(jnp.float64))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single.astype(jnp.float64), double, rtol=5e-6)
    assert float(single.max()) <= 1.0


@pytest.mark.usefixtures("x64")
@every_velocity
def test_log_variance_is_uniform_under_the_velocity_law(law):
    """The density is d log σ²/dt over Z = 2 log(σ_T/σ_min), and the quantile inverts the CDF."""
    low, high = (2.0 * np.log(law.sde.sigma(jnp.asarray(t))) for t in (law.t_min, law.sde.T))
    u = jnp.asarray([0.0, 1e-3, 0.04, 0.3, 0.7, 0.98, 1.0])
    t = law.quantile(u)
    found = (2.0 * jnp.log(law.sde.sigma(t)) - low) / (high - low)
    np.testing.assert_allclose(found, u, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(t[jnp.asarray([0, -1])], [law.t_min, law.sde.T], rtol=1e-10)
    rate = jax.vmap(jax.grad(lambda t: 2.0 * jnp.log(law.sde.sigma(t))))(t)
    np.testing.assert_allclose(law.density(t), rate / (high - low), rtol=1e-10)
    np.testing.assert_allclose(
        [probability(law, s) for s in np.asarray(t)], u, rtol=1e-8, atol=1e-10
    )
    importance = Importance(law.sde, law.t_min).density(t)
    np.testing.assert_allclose(law.relative_weight(t) * law.density(t), importance, rtol=1e-11)
    rare = 1e-12 + (1.0 - 2e-12) * np.random.default_rng(0).random(10_000)
    times = law.quantile(jnp.asarray(rare))
    assert law.t_min <= float(times.min()) < float(times.max()) <= law.sde.T


@pytest.mark.usefixtures("x64")
@every_velocity
def test_velocity_law_in_float32(law):
    """log σ² to 4e-6: two spacings of u and one of t times its range of up to 17, and of σ near 1.

    In t that is 4e-4 at most (VP near T, where log σ² changes by α² = 4e-5 in the last unit of W;
    VE from t = 1e-5 on 3e-3, where σ is σ_min), and of integrals 1e-3 of what does not vanish with
    the signal, 1e-6 of what does.
    """
    number = 100_000
    u = ((jnp.arange(float(number)) + 0.5) / number).astype(jnp.float32)
    single, double = law.quantile(u), law.quantile(u.astype(jnp.float64))
    assert single.dtype == jnp.float32
    wide = single.astype(jnp.float64)
    exact = [2.0 * jnp.log(law.sde.sigma(t)) for t in (wide, double)]
    np.testing.assert_allclose(*exact, rtol=0, atol=4e-6)
    late = double > 1e-3
    np.testing.assert_allclose(wide[late], double[late], rtol=1e-3)
    weights = [law.relative_weight(t).astype(jnp.float64) for t in (single, double)]
    signal = law.sde.alpha(double) ** 2
    for size, tolerance in ((1.0, 1e-3), (signal, 1e-6)):
        found, expected = (float(jnp.mean(w * size)) for w in weights)
        assert found == pytest.approx(expected, rel=tolerance)


def binned(law, masses=MASSES):
    return Binned(law.sde, law.t_min, jnp.asarray(masses))


@pytest.mark.usefixtures("x64")
@every_binned
def test_bins_have_their_masses_and_equal_widths_in_weight(law):
    proposal, number = binned(law), 100_000
    t = proposal.quantile((jnp.arange(float(number)) + 0.5) / number)
    counts = np.bincount(proposal.bin(t), minlength=8)
    np.testing.assert_allclose(counts / number, MASSES, atol=1.01 / number)
    assert np.all(np.diff(t) > 0)
    edges = law.quantile(jnp.arange(9.0) / 8)
    ends = jnp.concatenate([jnp.zeros((1,)), jnp.cumsum(jnp.asarray(MASSES))])
    np.testing.assert_allclose(proposal.quantile(ends), edges, rtol=1e-9)
    np.testing.assert_allclose(edges[jnp.asarray([0, -1])], [law.t_min, law.sde.T], rtol=1e-12)
    nudge = 1e-9 * np.asarray(edges)
    np.testing.assert_array_equal(proposal.bin(edges[:-1] + nudge[:-1]), np.arange(8))
    np.testing.assert_array_equal(proposal.bin(edges[1:] - nudge[1:]), np.arange(8))
    beyond = jnp.asarray([0.5 * law.t_min, law.sde.T])
    np.testing.assert_array_equal(proposal.bin(beyond), [0, 7])
    middle = proposal.quantile(ends[:-1] + 0.5 * jnp.asarray(MASSES))  # as the importance law there
    np.testing.assert_allclose(middle, law.quantile((jnp.arange(8.0) + 0.5) / 8), rtol=1e-9)
    ratio = proposal.density(middle) / law.density(middle)
    np.testing.assert_allclose(ratio, 8 * MASSES, rtol=1e-9)


@pytest.mark.usefixtures("x64")
@every_binned
@pytest.mark.parametrize("masses", [MASSES, np.full(16, 1 / 16)], ids=["any", "equal"])
def test_any_masses_estimate_the_same_integral(law, masses):
    """E[w h] = ∫ h p dt, p the importance law, and ∫ h dt = E[h/density]; midpoint rule in u."""
    u = (jnp.arange(50_000.0) + 0.5) / 50_000
    proposal = binned(law, masses)
    t, s = proposal.quantile(u), law.quantile(u)
    for h in (jnp.ones_like, lambda t: t**2, law.sde.alpha, lambda t: jnp.log(law.sde.sigma(t))):
        found = float(jnp.mean(proposal.relative_weight(t) * h(t)))
        assert found == pytest.approx(float(jnp.mean(h(s))), rel=2e-4)
    mean = float(jnp.mean(t**2 / proposal.density(t)))
    assert mean == pytest.approx((law.sde.T**3 - law.t_min**3) / 3.0, rel=2e-4)


@pytest.mark.parametrize("kind", [Uniform, Importance, Debias, Velocity])
@pytest.mark.parametrize("lowest", [-1e-5, 1.0, 2.0])
def test_smallest_time_outside_the_interval_is_refused(kind, lowest):
    with pytest.raises(ValueError, match=f"training.smallest_time={lowest}: need"):
        kind(VPSDE(), lowest)


def test_smallest_time_zero_is_refused_where_the_weight_diverges():
    for make in (Importance, Debias, Velocity):
        for sde in (VPSDE(), SubVPSDE(), VESDE(), LinearVESDE(), LinearPath()):
            with pytest.raises(ValueError, match="0 < t"):
                make(sde, 0.0)
    with pytest.raises(ValueError, match="0 < t"):
        Uniform(LinearVESDE(), 0.0)
    assert Uniform(VPSDE(), 0.0).normalizer == 1.0


def test_stratified_uniforms_fill_every_cell_once():
    for seed in range(20):
        u = stratified_uniforms(jax.random.key(seed), jnp.arange(8), 8)
        np.testing.assert_array_equal(np.sort(np.floor(8 * np.asarray(u))), np.arange(8))


def many_uniforms(stratified, number=4000, batch_size=8):
    draw = functools.partial(
        UNIFORMS[stratified], ids=jnp.arange(batch_size), batch_size=batch_size
    )
    return np.asarray(jax.vmap(draw)(jax.random.split(jax.random.key(0), number)))


@pytest.mark.parametrize("stratified", [False, True])
def test_each_uniform_is_uniform_by_itself(stratified):
    u = many_uniforms(stratified)
    for i in (0, 3, 7):
        assert kstest(u[:, i], "uniform").pvalue > 1e-3


def test_stratified_mean_has_the_variance_of_one_cell():
    """var mean(u) = 1/(12 B) for independent u, 1/(12 B³) for stratified u."""
    for stratified, expected in ((False, 1 / 96), (True, 1 / (12 * 8**3))):
        means = many_uniforms(stratified).mean(axis=1)
        # The relative standard error of a variance is about √(2/n).
        assert means.var() == pytest.approx(expected, rel=4 * np.sqrt(2 / len(means)))
        assert abs(means.mean() - 0.5) < 4 * np.sqrt(expected / len(means))


@pytest.mark.parametrize("stratified", [False, True])
def test_time_of_an_example_depends_on_its_id_only(stratified):
    draw = functools.partial(UNIFORMS[stratified], jax.random.key(1), batch_size=8)
    whole = draw(jnp.arange(8))
    parts = jnp.concatenate([draw(jnp.arange(4)), draw(jnp.arange(4, 8))])
    np.testing.assert_array_equal(whole, parts)
    order = jnp.asarray([6, 1, 3])
    np.testing.assert_array_equal(whole[order], draw(order))
    assert len(np.unique(whole)) == 8


@pytest.mark.parametrize("stratified", [False, True])
def test_uniforms_are_never_zero_or_above_one(stratified):
    """At u = 0 the debias law gives t = 0, where σ = 0."""
    u = many_uniforms(stratified, number=500, batch_size=256)
    assert u.min() > 0.0
    assert u.max() <= 1.0


def test_smallest_uniform_is_positive(monkeypatch):
    """A generator that returns its lower limit still gives t > 0 under the debias law."""
    lowest = lambda key, shape, dtype, minval: jnp.full(shape, minval, dtype)  # noqa: E731
    monkeypatch.setattr(jax.random, "uniform", lowest)
    u = independent_uniforms(jax.random.key(0), jnp.arange(3), 3)
    assert float(Debias(VPSDE()).quantile(u).min()) > 0.0


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("make", [Uniform, Importance, Debias])
def test_compiled_with_a_sum_every_coefficient_keeps_its_value(name, make):
    """XLA on CPU may fuse coefficients with a sum over dimensions, and has got them wrong by 30 %.

    Compiled together against one by one, in float32.
    """
    sde = SDES[name]()
    proposal = make(sde, 1e-3)
    u = jax.random.uniform(jax.random.key(0), (20_000,))
    z = jax.random.normal(jax.random.key(1), (20_000, 2))

    def coefficients(u):
        t = proposal.quantile(u)
        return [
            sde.alpha(t), sde.sigma(t), sde.g2(t), sde.drift_coefficient(t), proposal.density(t),
            sde.cumulative_weight(t),
        ]  # fmt: skip

    def product(i, j, u, z):
        values = coefficients(u)
        return values[i] * jnp.sum((values[j][:, None] * z) ** 2, axis=1)

    apart = [np.asarray(value) for value in coefficients(u)]
    for i in range(len(apart)):
        for j in range(2):
            together = jax.jit(product, static_argnums=(0, 1))(i, j, u, z)
            expected = apart[i] * np.sum((apart[j][:, None] * np.asarray(z)) ** 2, axis=1)
            scale = np.abs(expected).max()
            np.testing.assert_allclose(together, expected, rtol=1e-4, atol=1e-6 * scale)
