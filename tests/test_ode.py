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
    (y, q), nfe, converged, _ = jax.block_until_ready(solve(state))
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
        (y, _), nfe, _, _ = jax.jit(lambda s, f=solver: f.integrate(decay, 0.0, 1.5, s, rates))(
            state
        )
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
    (mild, mild_nfe, _, _), (stiff, stiff_nfe, _, _) = results
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
    (y, _), _, converged, _ = jax.jit(lambda s: solver.integrate(decay, 0.0, 1.0, s, rates))(
        start()
    )
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


@pytest.mark.usefixtures("four_devices_here")
def test_field_may_close_over_traced_parameters_in_pmap():
    """In float32, each device with its own part of the batch and the same parameters."""
    solver = Solver("tsit5", 1e-5, 1e-5)
    devices = jax.devices()[:2]
    assert len(devices) == 2

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
    with pytest.raises(ValueError, match=f"{field}={value}: need more than 0"):
        Solver(**{field: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [({"num_steps": -2}, "num_steps=-2: need at least 0"), ({"num_steps": 7}, "an even number")],
)
def test_number_of_steps_must_be_even_where_the_error_is_estimated(values, message):
    with pytest.raises(ValueError, match=message):
        Solver(**values)
    assert Solver(num_steps=7, estimate_error=False).num_steps == 7


# A number of equal steps.

RATES_MILD = RATES[:3]
ORDERS = {"tsit5": 5, "dopri5": 5, "dopri8": 8, "bosh3": 3, "heun": 2}
STEPS = {"tsit5": 12, "dopri5": 12, "dopri8": 6, "bosh3": 24, "heun": 48}


def solve_fixed(solver, t0=0.0, t1=1.5, state=None, rates=RATES_MILD):
    state = start(3) if state is None else state
    solve = jax.jit(lambda s, k: solver.integrate(decay, t0, t1, s, k))
    return solve(state, jnp.asarray(rates))


def error_of(found):
    """y − y(t1) for the forced decay from 0 to 1.5."""
    return np.asarray(found.state[0]) - solution(1.5, np.asarray(start(3)[0]), RATES_MILD[:, None])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", SOLVERS)
def test_equal_steps_converge_with_the_order_of_the_method(name):
    errors = [
        np.sqrt(np.mean(error_of(solve_fixed(Solver(name, num_steps=n))) ** 2))
        for n in (STEPS[name], 2 * STEPS[name])
    ]
    assert abs(np.log2(errors[0] / errors[1]) - ORDERS[name]) < 0.8


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", SOLVERS)
def test_estimated_error_of_a_smooth_field_is_that_of_half_the_steps(name):
    """2^p − 1 times the error, to a factor of two; its sign, too, where p is small."""
    found = solve_fixed(Solver(name, num_steps=2 * STEPS[name]))
    estimate, error = np.asarray(found.error[0]), error_of(found)
    excess = np.sqrt(np.mean(estimate**2) / np.mean(error**2)) / (2 ** ORDERS[name] - 1)
    assert 0.5 < excess < 2.0
    if name == "heun":
        np.testing.assert_allclose(estimate / 3, error, rtol=0.3, atol=1e-7)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["tsit5", "dopri5", "bosh3"])
def test_estimated_error_of_a_field_with_kinks_is_from_above_and_of_its_size(name):
    """∫ |sin(20 t + φ)| dt over phases φ: any pair has order 2, so the difference is three times

    the error where kinks repeat from step to step, more where the two solutions err oppositely.
    """
    phases = jnp.linspace(0.0, np.pi, 200, endpoint=False)
    solver = Solver(name, num_steps=40)
    found = jax.jit(
        lambda y: solver.integrate(
            lambda t, y, phase: jnp.abs(jnp.sin(20.0 * t + phase)), 0.0, 1.0, y, phases
        )
    )(jnp.zeros(200))
    # An antiderivative of |sin|: 2 ⌊u/π⌋ + 1 − cos(u mod π).
    area = lambda u: 2.0 * np.floor(u / np.pi) + 1.0 - np.cos(np.mod(u, np.pi))  # noqa: E731
    exact = (area(20.0 + np.asarray(phases)) - area(np.asarray(phases))) / 20.0
    ratio = np.abs(found.error).mean() / np.abs(np.asarray(found.state) - exact).mean()
    assert 2.0 < ratio < 8.0


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("estimate", [True, False])
def test_equal_steps_cost_exactly_what_they_report(name, estimate):
    calls, state, solver = [], start(3), Solver(name, num_steps=4, estimate_error=estimate)

    def counted(t, state, rate):
        jax.debug.callback(lambda: calls.append(1))
        return decay(t, state, rate)

    solve = jax.jit(lambda s: solver.integrate(counted, 0.0, 1.5, s, jnp.asarray(RATES_MILD)))
    found = jax.block_until_ready(solve(state))
    jax.effects_barrier()
    stages = {"tsit5": 6, "dopri5": 6, "dopri8": 13, "bosh3": 3, "heun": 2}[name]
    np.testing.assert_array_equal(found.nfe, np.full(3, (6 if estimate else 4) * stages))
    assert len(calls) == found.nfe[0]
    assert bool(found.converged.all())
    assert np.isnan(found.error[0]).all() == (not estimate)


@pytest.mark.usefixtures("x64")
def test_equal_steps_of_an_example_do_not_depend_on_its_neighbours():
    solver, state = Solver("dopri5", num_steps=8), start(3)
    whole = solve_fixed(solver)
    other = solve_fixed(solver, state=state, rates=np.asarray([RATES[0], 500.0, RATES[2]]))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a[::2], b[::2], rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_equal_steps_go_backwards_in_time():
    solver = Solver("dopri5", num_steps=60)
    end = solve_fixed(solver).state
    y, q = solve_fixed(solver, 1.5, 0.0, end).state
    np.testing.assert_allclose(y, start(3)[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(q, 0.0, atol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("solver", "tolerance"), [(Solver(), 1e-4), (Solver("dopri5", num_steps=40), 2e-4)]
)
def test_a_layer_at_small_times_is_seen(solver, tolerance):
    """∫ dt/(2√(t + ε)) from t = ε = 1e-5: a twentieth of it comes from the first 0.3 % of time."""
    layer = 1e-5
    found = jax.jit(
        lambda y: solver.integrate(lambda t, y, _: 0.5 / jnp.sqrt(t + layer), layer, 1.0, y, None)
    )(jnp.zeros(2))
    exact = np.sqrt(1.0 + layer) - np.sqrt(2 * layer)
    np.testing.assert_allclose(found.state, exact, rtol=0, atol=tolerance)
