"""Adaptive integration of dy/dt = F(t, y) for a batch, every example with its own steps.

`diffrax` integrates one example under `vmap`, so that the error control of an example never depends
on its neighbours; the field is still evaluated on whole batches, since a mapped network call is 1.5
times slower than a batched one.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from operators import PerExample

State = Any
Time = float | Float[Array, ""]
FIRST_STEP = 0.01  # of the interval; a step that is too long is rejected and shortened
VectorField = Callable[[PerExample, State, Any], State]

# Name: (solver, evaluations of the field per step, evaluations before the first step). Where the
# last stage of a step is the first of the next, only the start of the solve pays for it.
SOLVERS = {
    "tsit5": (diffrax.Tsit5, 6, 1),
    "dopri5": (diffrax.Dopri5, 6, 1),
    "dopri8": (diffrax.Dopri8, 13, 1),
    "bosh3": (diffrax.Bosh3, 3, 1),
    "heun": (diffrax.Heun, 2, 0),
}


@dataclasses.dataclass(frozen=True)
class Solver:
    """An explicit Runge–Kutta pair with tolerances for the root-mean-square error per step."""

    name: str = "tsit5"
    rtol: float = 1e-4
    atol: float = 1e-4
    max_steps: int = 4096

    def __post_init__(self) -> None:
        if self.name not in SOLVERS:
            raise ValueError(f"solver={self.name!r}: allowed {sorted(SOLVERS)}")
        if not (self.rtol > 0 and self.atol > 0):
            raise ValueError(f"rtol={self.rtol}, atol={self.atol}: need both > 0")
        if self.max_steps < 1:
            raise ValueError(f"max_steps={self.max_steps}: need at least 1")

    @property
    def details(self) -> dict[str, str | float]:
        """What a result by this solver depends on, by name."""
        return {"solver": self.name, "rtol": self.rtol, "atol": self.atol}

    def integrate(
        self, field: VectorField, t0: Time, t1: Time, state: State, args: Any
    ) -> tuple[State, Int[Array, " b"], Bool[Array, " b"]]:
        """The state at t1, from `state` at t0.

        Args:
            field: F(t: [B], state, args) → time derivative of the state; examples independent.
            t0: start time.
            t1: end time, larger or smaller than t0.
            state: pytree of arrays with leading axis B.
            args: pytree of per-example constants with leading axis B.

        Returns:
            The final state, the number of evaluations of each example, and whether each example
            reached t1 within `max_steps`.
        """
        kind, per_step, at_start = SOLVERS[self.name]
        times = jnp.full(jax.tree.leaves(state)[0].shape[:1], t0, jnp.result_type(float))
        # Parameters that the field closes over become arguments: the batching rule needs them so.
        closed_field, constants = jax.closure_convert(field, times, state, args)
        one = _one_example(closed_field, times.shape[0])
        term = diffrax.ODETerm(lambda t, y, a: one(t, y, a, constants))
        controller = diffrax.PIDController(rtol=self.rtol, atol=self.atol)

        def solve_one(y0: State, a: Any) -> tuple[State, Array, Array]:
            solution = diffrax.diffeqsolve(
                term, kind(), t0, t1, FIRST_STEP * (t1 - t0), y0, a,
                stepsize_controller=controller, max_steps=self.max_steps, throw=False,
                saveat=diffrax.SaveAt(t1=True),
                adjoint=diffrax.ForwardMode(),
            )  # fmt: skip
            nfe = per_step * solution.stats["num_steps"] + at_start
            reached = solution.result == diffrax.RESULTS.successful
            return jax.tree.map(lambda y: y[-1], solution.ys), nfe, reached

        return jax.vmap(solve_one)(state, args)


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
