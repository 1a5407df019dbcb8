"""Second-order Taylor mode: value, first and second derivative along a curve, in one sweep.

    x(h) with x(0) = x, x'(0) = ẋ, x''(0) = ẍ   ⇒   y = f(x),  y' = Df[ẋ],  y'' = D²f[ẋ, ẋ] + Df[ẍ]

The sweep interprets the jaxpr of f, one primitive after the other, and carries (y, y', y''). What
the curve does not reach (the parameters of a network) carries nothing, so that a convolution with
fixed weights costs three; a jvp of a jvp costs four, since it computes the first stream twice.

The result is made of ordinary primitives: it can be differentiated, jitted, mapped, scanned and
rematerialised. Reference: Griewank & Walther 2008, Evaluating Derivatives, chapter 13.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex
from jaxtyping import Array


class Series(NamedTuple):
    """y, y' and y'' of an intermediate value that the curve reaches."""

    value: Array
    first: Array
    second: Array


Value = Any  # a Series, or an array or literal that the curve does not reach

# Linear in each operand alone.
BILINEAR = frozenset({"mul", "dot_general", "conv_general_dilated"})
# Linear in all operands together.
LINEAR = frozenset({
    "add", "add_any", "sub", "neg", "reshape", "transpose", "broadcast_in_dim", "squeeze", "rev",
    "expand_dims", "reduce_sum", "cumsum", "convert_element_type", "concatenate", "slice", "pad",
    "copy", "real", "imag", "reduce_window_sum", "split",
})  # fmt: skip


def along_curve(
    function: Callable[..., Any],
    point: Sequence[Array],
    velocity: Sequence[Array],
    acceleration: Sequence[Array],
) -> tuple[Any, Any, Any]:
    """(f, df/dh, d²f/dh²) at h = 0 along x(h) = point + h velocity + ½ h² acceleration.

    Args:
        function: of as many arrays as `point` has; may close over anything.
        point: x(0), floating arrays.
        velocity: x'(0), same shapes.
        acceleration: x''(0), same shapes.

    Returns:
        Three trees of the structure of the function's result.
    """
    closed, out_shape = jax.make_jaxpr(function, return_shape=True)(*point)
    curve = [Series(*parts) for parts in zip(point, velocity, acceleration, strict=True)]
    results = _interpret(closed.jaxpr, closed.consts, curve)
    series = [_instantiate(result) for result in results]
    tree = jax.tree.structure(out_shape)
    return tuple(jax.tree.unflatten(tree, part) for part in zip(*series, strict=True))


def _interpret(jaxpr: Any, consts: Sequence[Array], arguments: Sequence[Value]) -> list[Value]:
    values: dict[Any, Value] = dict(zip(jaxpr.constvars, consts, strict=True))
    values |= dict(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Value:
        return atom.val if isinstance(atom, jex.Literal) else values[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        outputs = _apply(equation, inputs)
        values |= dict(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _apply(equation: Any, inputs: list[Value]) -> list[Value]:
    """Outputs of one equation."""
    name = equation.primitive.name
    on_curve = [i for i, value in enumerate(inputs) if isinstance(value, Series)]
    if not on_curve:
        return _as_list(equation, _bind(equation, inputs))
    if name in CALLS:
        return CALLS[name](equation, inputs)
    if name in LINEAR:
        return _linear(equation, inputs)
    if name in BILINEAR and len(on_curve) == 1:
        return _linear_in_one(equation, inputs, on_curve[0])
    if name == "div" and on_curve == [0]:
        return _linear_in_one(equation, inputs, 0)
    if name in BILINEAR:
        return _bilinear(equation, inputs)
    return _smooth(equation, inputs, on_curve)


def _bind(equation: Any, inputs: Sequence[Array]) -> Any:
    params = equation.primitive.get_bind_params(equation.params)
    return equation.primitive.bind(*inputs, **params)


def _as_list(equation: Any, result: Any) -> list[Any]:
    return list(result) if equation.primitive.multiple_results else [result]


def _instantiate(value: Value) -> Series:
    if isinstance(value, Series):
        return value
    zero = jnp.zeros_like(value)
    return Series(value, zero, zero)


def _parts(values: Sequence[Value]) -> list[list[Array]]:
    """Values, first and second derivatives of all operands, zeros where there are none."""
    return [list(part) for part in zip(*map(_instantiate, values), strict=True)]


def _linear(equation: Any, inputs: list[Value]) -> list[Value]:
    """y^(k) = f(x^(k))."""
    streams = [_as_list(equation, _bind(equation, part)) for part in _parts(inputs)]
    return [Series(*parts) for parts in zip(*streams, strict=True)]


def _linear_in_one(equation: Any, inputs: list[Value], position: int) -> list[Value]:
    """y^(k) = f(c, x^(k)) with all other operands fixed."""

    def at(operand: Array) -> Array:
        return _bind(equation, [*inputs[:position], operand, *inputs[position + 1 :]])

    return [Series(*map(at, inputs[position]))]


def _bilinear(equation: Any, inputs: list[Value]) -> list[Value]:
    """y'' = f(ẍ, u) + 2 f(ẋ, u̇) + f(x, ü)."""
    (x, dx, ddx), (u, du, ddu) = inputs

    def product(a: Array, b: Array) -> Array:
        return _bind(equation, [a, b])

    first = product(dx, u) + product(x, du)
    second = product(ddx, u) + 2.0 * product(dx, du) + product(x, ddu)
    return [Series(product(x, u), first, second)]


def _smooth(equation: Any, inputs: list[Value], on_curve: list[int]) -> list[Value]:
    """Any primitive with a jvp rule: y'' by a jvp of its jvp along (ẋ, ẍ)."""

    def function(*moving: Array) -> list[Array]:
        operands = list(inputs)
        for position, value in zip(on_curve, moving, strict=True):
            operands[position] = value
        return _as_list(equation, _bind(equation, operands))

    value, first, second = zip(*(inputs[i] for i in on_curve), strict=True)

    def with_first(x: tuple, dx: tuple) -> tuple[list[Array], list[Array]]:
        return jax.jvp(function, x, dx)

    (y, dy), (_, ddy) = jax.jvp(with_first, (value, first), (first, second))
    outputs = zip(y, dy, ddy, strict=True)
    return [Series(*o) if jnp.issubdtype(o[0].dtype, jnp.inexact) else o[0] for o in outputs]


def _inline(closed: Any, inputs: list[Value]) -> list[Value]:
    return _interpret(closed.jaxpr, closed.consts, inputs)


def _jit(equation: Any, inputs: list[Value]) -> list[Value]:
    return _inline(equation.params["jaxpr"], inputs)


def _closed_call(equation: Any, inputs: list[Value]) -> list[Value]:
    return _inline(equation.params["call_jaxpr"], inputs)


def _remat(equation: Any, inputs: list[Value]) -> list[Value]:
    """The sweep of a checkpointed function is checkpointed with the same policy."""
    params = equation.params
    body = jax.checkpoint(
        lambda values: _interpret(params["jaxpr"], (), values),
        prevent_cse=params["prevent_cse"],
        policy=params["policy"],
    )
    return body(inputs)


def _scan_sizes(params: dict[str, Any]) -> tuple[int, int]:
    """Numbers of constants and carries of a scan; jax 0.12 keeps them as a tree of three parts."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def _scan(equation: Any, inputs: list[Value]) -> list[Value]:
    """A scan whose floating carries and inputs all carry series."""
    params = equation.params
    closed, (num_consts, num_carry) = params["jaxpr"], _scan_sizes(params)

    def lift(value: Value) -> Value:
        inexact = not isinstance(value, Series) and jnp.issubdtype(value.dtype, jnp.inexact)
        return _instantiate(value) if inexact else value

    consts, carry = inputs[:num_consts], list(map(lift, inputs[num_consts:][:num_carry]))

    def body(carry: list[Value], x: list[Value]) -> tuple[list[Value], list[Value]]:
        results = list(map(lift, _inline(closed, [*consts, *carry, *x])))
        return results[:num_carry], results[num_carry:]

    carry, ys = jax.lax.scan(
        body, carry, inputs[num_consts + num_carry :],
        length=params["length"], reverse=params["reverse"], unroll=params["unroll"],
    )  # fmt: skip
    return [*carry, *ys]


CALLS: dict[str, Callable[[Any, list[Value]], list[Value]]] = {
    "jit": _jit,
    "pjit": _jit,
    "closed_call": _closed_call,
    "checkpoint": _remat,
    "remat": _remat,
    "remat2": _remat,
    "scan": _scan,
}
