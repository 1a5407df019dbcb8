"""Integration of dy/dt = F(t, y) for a batch, in r = c(t)^{1/p}: dy/dr = p r^{p−1} (dt/dc) F(t, y).

The solver's time is u from 0 to 1, r = (1 − u) r0 + u r1: with traced ends `diffrax` would compile
a check that calls back to Python, and JAX keeps no such program in its cache on disk.

The variable c is the SDE's: σ for VE, t for all others (c = t where σ grows like t or √t).
Diffusions change fastest near t = 0. Steps in t jump over what happens there, with no sign of it in
their error estimate (0.04 bits/dim on MNIST); those in log(σ/α) crowd there. Adaptive steps are
cheapest with p = 2, equal ones err least with p = 3 (benchmarks/results/likelihood.md).

Adaptive: `diffrax` integrates one example under `vmap`, so that the error control of an example
never depends on its neighbours; the field is still evaluated on whole batches, since a mapped
network call is 1.5 times slower than a batched one.
Fixed: every example takes the same N steps of equal size in r; y_{N/2} − y_N estimates the error,
undivided. Richardson's divisor 2^p − 1 holds where a step resolves the field; trained networks are
rough on that scale, pairs of order 5 converge there with order 1 to 2, and the divided difference
and the embedded errors are several to tens of times too small. Where the field is smooth, the
estimate is 2^p − 1 times too large.
"""

import dataclasses
import functools
import itertools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from checks import one_of, positive, require
from operators import PerExample, scale
from sde_base import TIME, Variable

State = Any
Time = float | Float[Array, ""]
ADAPTIVE_POWER, FIXED_POWER = 2, 3
FIRST_STEP = 1e-3  # of the interval; a step that is too long is rejected and shortened
VectorField = Callable[[PerExample, State, Any], State]

# Name: (class of diffrax, evaluations of the field per step, evaluations before the first step).
# Where the last stage of a step is the first of the next, only the start of the solve pays for it.
SOLVERS = {
    "tsit5": ("Tsit5", 6, 1),
    "dopri5": ("Dopri5", 6, 1),
    "dopri8": ("Dopri8", 13, 1),
    "bosh3": ("Bosh3", 3, 1),
    "heun": ("Heun", 2, 0),
}


@functools.cache
def _diffrax() -> types.ModuleType:
    """Import diffrax with the first solve, since it is a quarter of what a start imports.

    The arrays that it makes while it is imported belong to no function that is being traced.
    """
    with jax.ensure_compile_time_eval():
        import diffrax
    return diffrax


class Solution(NamedTuple):
    """The result of `Solver.integrate` for a batch of examples.

    Attributes:
        state: at t1.
        nfe: evaluations of the field, of each example.
        converged: whether the example reached t1 within `max_steps`.
        error: estimate of state − truth, from above; NaN where there is none.
    """

    state: State
    nfe: Int[Array, " b"]
    converged: Bool[Array, " b"]
    error: State


@dataclasses.dataclass(frozen=True)
class Solver:
    """An explicit Runge–Kutta pair with tolerances, or a number of equal steps.

    Attributes:
        name: a name in `SOLVERS`.
        rtol: tolerance per step, relative; of the root mean square over each leaf of the state.
        atol: absolute part of the same.
        max_steps: limit of the adaptive steps.
        num_steps: number of equal steps in c^{1/3}, without regard to tolerances; 0: adaptive.
        estimate_error: of equal steps, for half as many evaluations again; needs an even number.
    """

    name: str = "tsit5"
    rtol: float = 1e-4
    atol: float = 1e-4
    max_steps: int = 4096
    num_steps: int = 0
    estimate_error: bool = True

    def __post_init__(self) -> None:
        one_of("solver", self.name, SOLVERS)
        for field in ("rtol", "atol"):
            require(getattr(self, field) > 0, field, getattr(self, field), "more than 0")
        positive(max_steps=self.max_steps)
        fits = self.num_steps >= 0 and not (self.estimate_error and self.num_steps % 2)
        allowed = "at least 0 (adaptive), and an even number with estimate_error=True"
        require(fits, "num_steps", self.num_steps, allowed)

    @property
    def estimates_error(self) -> bool:
        """Return whether a solution comes with an estimate of its error."""
        return self.num_steps > 0 and self.estimate_error

    @property
    def details(self) -> dict[str, str | float]:
        """Return by name the settings that a result by this solver depends on."""
        if self.num_steps:
            estimate = "yes" if self.estimate_error else "no"
            return {"solver": self.name, "equal steps": self.num_steps, "estimate": estimate}
        return {"solver": self.name, "rtol": self.rtol, "atol": self.atol}

    def integrate(
        self,
        field: VectorField,
        t0: Time,
        t1: Time,
        state: State,
        args: Any,
        variable: Variable = TIME,
    ) -> Solution:
        """The state at t1, from `state` at t0.

        Args:
            field: F(t: [B], state, args) → time derivative of the state; examples independent.
            t0: start time, at least 0.
            t1: end time, at least 0, larger or smaller than t0.
            state: pytree of arrays with leading axis B.
            args: pytree of per-example constants with leading axis B.
            variable: c(t), in whose root steps are taken.
        """
        power = FIXED_POWER if self.num_steps else ADAPTIVE_POWER
        ends = variable.of_time(jnp.asarray((t0, t1), jnp.result_type(float)))
        r0, r1 = ends ** (1.0 / power)

        def slope(u: PerExample, y: State, a: Any) -> State:
            r = (1.0 - u) * r0 + u * r1
            t, dt_dc = jax.jvp(variable.time_of, (r**power,), (jnp.ones_like(r),))
            return _scaled(dt_dc * (power * (r1 - r0) * r ** (power - 1)), field(t, y, a))

        return (self._fixed if self.num_steps else self._adaptive)(slope, state, args)

    def _adaptive(self, slope: VectorField, state: State, args: Any) -> Solution:
        diffrax, (kind, per_step, at_start) = _diffrax(), SOLVERS[self.name]
        start = jnp.zeros(jax.tree.leaves(state)[0].shape[:1])
        # What the field closes over becomes an argument: the batching rule needs it so.
        closed_slope, constants = _closed(slope, start, state, args)
        one = _one_example(closed_slope, start.shape[0])
        term = diffrax.ODETerm(lambda u, y, a: one(u, y, a, constants))
        controller = diffrax.PIDController(rtol=self.rtol, atol=self.atol, norm=_worst_leaf)

        def solve_one(y0: State, a: Any) -> tuple[State, Array, Array]:
            solution = diffrax.diffeqsolve(
                term, getattr(diffrax, kind)(), 0.0, 1.0, FIRST_STEP, y0, a,
                stepsize_controller=controller, max_steps=self.max_steps, throw=False,
                saveat=diffrax.SaveAt(t1=True),
                adjoint=diffrax.ForwardMode(),
            )  # fmt: skip
            nfe = per_step * solution.stats["num_steps"] + at_start
            reached = solution.result == diffrax.RESULTS.successful
            return jax.tree.map(lambda y: y[-1], solution.ys), nfe, reached

        end, nfe, reached = jax.vmap(solve_one)(state, args)
        return Solution(end, nfe, reached, _unknown(end))

    def _fixed(self, slope: VectorField, state: State, args: Any) -> Solution:
        number, batch = self.num_steps, jax.tree.leaves(state)[0].shape[:1]
        end = _equal_steps(self.name, slope, number, state, args)
        error = _unknown(end)
        if self.estimate_error:
            coarse = _equal_steps(self.name, slope, number // 2, state, args)
            error = jax.tree.map(lambda a, b: a - b, coarse, end)
            number += number // 2
        nfe = jnp.full(batch, number * _stages(self.name), jnp.int32)
        return Solution(end, nfe, jnp.full(batch, True), error)


def _unknown(state: State) -> State:
    return jax.tree.map(lambda y: jnp.full_like(y, jnp.nan), state)


def _scaled(c: PerExample, state: State) -> State:
    return jax.tree.map(lambda y: scale(c.astype(y.dtype), y), state)


def _worst_leaf(error: State) -> Float[Array, ""]:
    """The largest root mean square of a leaf: a scalar of the state counts as much as the rest."""
    return jnp.stack([jnp.sqrt(jnp.mean(e**2)) for e in jax.tree.leaves(error)]).max()


def _tableau(name: str) -> Any:
    """The coefficients of a solver."""
    return getattr(_diffrax(), SOLVERS[name][0]).tableau


def _stages(name: str) -> int:
    """Stages that the solution needs: those behind its last weight serve the embedded error."""
    return int(_tableau(name).b_sol.nonzero()[0][-1]) + 1


def _equal_steps(name: str, slope: VectorField, number: int, state: State, args: Any) -> State:
    """Steps of h = 1/number: k_i = slope(u + c_i h, y + h Σ_j a_ij k_j), y + h Σ_i b_i k_i."""
    tableau, stages = _tableau(name), _stages(name)
    rows = [*tableau.a_lower[: stages - 1], tableau.b_sol[:stages]]
    nodes = (0.0, *tableau.c)[:stages]
    batch = jax.tree.leaves(state)[0].shape[:1]

    def advance(y: State, weights: Any, slopes: list[State]) -> State:
        for weight, k in zip(weights, slopes, strict=True):
            y = jax.tree.map(lambda a, b, w=float(weight): a + w / number * b, y, k)
        return y

    def step(i: Int[Array, ""], y: State) -> State:
        stage, slopes = y, []
        for node, row in zip(nodes, rows, strict=True):
            u = jnp.full(batch, (i + float(node)) / number)
            slopes.append(slope(u, stage, args))
            stage = advance(y, row, slopes)
        return stage

    return jax.lax.fori_loop(0, number, step, state)


def _closed(
    field: VectorField, start: PerExample, state: State, args: Any
) -> tuple[Callable[..., State], list[Array]]:
    """A field that takes what the field closes over as arguments behind its own; and these.

    Unlike `jax.closure_convert` also the integers, as classes that a score is given.
    """
    closed, like = jax.make_jaxpr(field, return_shape=True)(start, state, args)
    traced = [isinstance(constant, jax.core.Tracer) for constant in closed.consts]

    def converted(t: PerExample, y: State, a: Any, *constants: Array) -> State:
        rest = iter(constants)
        consts = [
            next(rest) if is_traced else c
            for is_traced, c in zip(traced, closed.consts, strict=True)
        ]
        found = jax.core.eval_jaxpr(closed.jaxpr, consts, *jax.tree.leaves((t, y, a)))
        return jax.tree.unflatten(jax.tree.structure(like), found)

    return converted, list(itertools.compress(closed.consts, traced))


def _one_example(field: Callable[..., State], batch_size: int) -> Callable[..., State]:
    """The field of one example, which under `vmap` becomes one call of the field of the batch."""

    def spread(value: Array, is_batched: bool) -> Array:
        return value if is_batched else jnp.broadcast_to(value, (batch_size, *value.shape))

    @jax.custom_batching.custom_vmap
    def one(t: Array, y: State, args: Any, constants: list[Array]) -> State:
        t, y, args = jax.tree.map(lambda value: spread(value, False), (t, y, args))
        return jax.tree.map(lambda a: a[0], field(t, y, args, *constants))

    @one.def_vmap
    def whole_batch(
        axis_size: int, in_batched: list, t: Array, y: State, args: Any, constants: list[Array]
    ) -> tuple[State, Any]:
        del axis_size
        t, y, args = jax.tree.map(spread, (t, y, args), tuple(in_batched[:3]))
        out = field(t, y, args, *constants)
        return out, jax.tree.map(lambda _: True, out)

    return one
