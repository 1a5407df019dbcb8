"""The batched solver: closed-form solutions, independence of examples, budget, jit and pmap."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ode import SOLVERS, Solver

TIGHT = Solver("dopri8", 1e-10, 1e-10)
RATES = np.asarray([0.5, 2.0, -1.0, 8.0])


def decay(t, state, rate):
    """d(y, q)/dt = (−k y + k cos t, y): a forced line, and its integral as a second leaf."""
    y, _ = state
    return rate[:, None] * (jnp.cos(t)[:, None] - y), jnp.sum(y, axis=1)


def solution(t, y0, k):
    """y(t) of y' = k (cos t − y), y(0) = y0."""
    forced = lambda t: k * (k * np.cos(t) + np.sin(t)) / (1.0 + k**2)  # noqa: E731
    return forced(t) + (y0 - forced(0.0)) * np.exp(-k * t)


def start(number=4):
    y0 = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3))[:number])
    return y0, jnp.zeros((number,))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", SOLVERS)
def test_solves_forced_decay_and_reports_its_cost(name):
    """Error at most 100 times the tolerance per step; cost as counted, to 2 calls of the batch."""
    tolerance = 1e-5 if name == "heun" else 1e-8
    state, rates, calls = start(), jnp.asarray(RATES), []
    solver = Solver(name, tolerance, tolerance)

    def counted(t, state, rate):
        jax.debug.callback(lambda: calls.append(1))
        return decay(t, state, rate)

    solve = jax.jit(lambda s: solver.integrate(counted, 0.0, 1.5, s, rates))
    (y, q), nfe, converged = jax.block_until_ready(solve(state))
    jax.effects_barrier()
    expected = solution(1.5, np.asarray(state[0]), RATES[:, None])
    np.testing.assert_allclose(y, expected, rtol=0, atol=100 * tolerance)
    # Integrating y' = k (cos t − y) gives q = Σ_i (sin t − (y_i(t) − y_i(0))/k).
    integral = (np.sin(1.5) - (expected - np.asarray(state[0])) / RATES[:, None]).sum(axis=1)
    np.testing.assert_allclose(q, integral, rtol=0, atol=300 * tolerance)
    assert bool(jnp.all(converged))
    assert 0 <= len(calls) - int(nfe.max()) <= 2
    assert int(nfe.min()) < int(nfe.max())


@pytest.mark.usefixtures("x64")
def test_integrates_backwards_in_time():
    state, rates = start(), jnp.asarray(RATES)

    @jax.jit
    def there_and_back(state):
        end = TIGHT.integrate(decay, 0.0, 1.5, state, rates)[0]
        return TIGHT.integrate(decay, 1.5, 0.0, end, rates)[0]

    y, q = there_and_back(state)
    # Backwards, k = 8 multiplies an error by e^{12} ≈ 1.6e5.
    np.testing.assert_allclose(y, state[0], rtol=0, atol=1e-4)
    np.testing.assert_allclose(y[:3], state[0][:3], rtol=0, atol=1e-8)
    np.testing.assert_allclose(q[:3], 0.0, atol=1e-8)


@pytest.mark.usefixtures("x64")
def test_tighter_tolerances_cost_more_and_err_less():
    state, rates = start(), jnp.asarray(RATES)
    expected = solution(1.5, np.asarray(state[0]), RATES[:, None])
    errors, costs = [], []
    for tolerance in (1e-3, 1e-7):
        solver = Solver("tsit5", tolerance, tolerance)
        (y, _), nfe, _ = jax.jit(lambda s, f=solver: f.integrate(decay, 0.0, 1.5, s, rates))(state)
        errors.append(np.abs(np.asarray(y) - expected).max())
        costs.append(int(nfe.max()))
    assert errors[0] > 100 * errors[1]
    assert 2 * costs[0] < costs[1]


@pytest.mark.usefixtures("x64")
def test_result_of_an_example_does_not_depend_on_its_neighbours():
    """The step sizes of an easy example ignore a stiff neighbour: same value, same cost."""
    solver = Solver("tsit5", 1e-5, 1e-5)
    solve = jax.jit(lambda state, rates: solver.integrate(decay, 0.0, 1.0, state, rates))
    state = start()
    results = []
    for neighbour in (1.0, 500.0):
        rates = jnp.asarray([0.5, neighbour, 2.0, neighbour])
        results.append(solve(state, rates))
    (mild, mild_nfe, _), (stiff, stiff_nfe, _) = results
    for leaf_mild, leaf_stiff in zip(mild, stiff, strict=True):
        np.testing.assert_allclose(leaf_mild[::2], leaf_stiff[::2], rtol=1e-12)
    np.testing.assert_array_equal(mild_nfe[::2], stiff_nfe[::2])
    assert np.all(np.asarray(stiff_nfe[1::2]) > 2 * np.asarray(mild_nfe[1::2]))
    alone = solve(start(1), jnp.asarray([0.5]))
    np.testing.assert_allclose(alone[0][0][0], mild[0][0], rtol=1e-12)
    assert int(alone[1][0]) == int(mild_nfe[0])


@pytest.mark.usefixtures("x64")
def test_too_few_steps_are_reported_per_example():
    solver = Solver("tsit5", 1e-8, 1e-8, max_steps=60)
    rates = jnp.asarray([0.5, 2000.0, 1.0, 2000.0])
    (y, _), _, converged = jax.jit(lambda s: solver.integrate(decay, 0.0, 1.0, s, rates))(start())
    np.testing.assert_array_equal(converged, [True, False, True, False])
    expected = solution(1.0, np.asarray(start()[0])[::2], np.asarray([[0.5], [1.0]]))
    np.testing.assert_allclose(y[::2], expected, atol=1e-6)


@pytest.mark.usefixtures("x64")
def test_field_may_close_over_traced_parameters_in_jit():
    solve = jax.jit(
        lambda theta, y: TIGHT.integrate(lambda t, y, a: -theta * y, 0.0, 1.0, y, ())[0]
    )
    for theta in (0.3, 2.0):
        y = solve(jnp.asarray(theta), jnp.ones((3,)))
        np.testing.assert_allclose(y, np.exp(-theta), rtol=1e-8)


def test_field_may_close_over_traced_parameters_in_pmap():
    """In float32, each device with its own part of the batch and the same parameters."""
    solver = Solver("tsit5", 1e-5, 1e-5)
    devices = jax.devices()[:2]
    if len(devices) < 2:
        pytest.skip("needs two devices")

    def solve(theta, y, rates):
        return solver.integrate(lambda t, y, k: -theta * k * y, 0.0, 1.0, y, rates)[0]

    rates = np.asarray([[0.5, 1.0, 2.0], [3.0, 4.0, 5.0]], np.float32)
    parallel = jax.pmap(solve, axis_name="batch", in_axes=(None, 0, 0), devices=devices)
    y = parallel(jnp.asarray(0.7), np.ones((2, 3), np.float32), rates)
    np.testing.assert_allclose(y, np.exp(-0.7 * rates), rtol=1e-4, atol=1e-5)


def test_unknown_solver_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"solver='euler'.*bosh3.*dopri5.*dopri8.*heun.*tsit5"):
        Solver("euler")


@pytest.mark.parametrize("field", ["rtol", "atol"])
@pytest.mark.parametrize("value", [0.0, -1e-5, float("nan")])
def test_tolerances_must_be_positive(field, value):
    with pytest.raises(ValueError, match="need both > 0"):
        Solver(**{field: value})
