"""Second-order Taylor mode: value, first and second derivatives along curves, in one sweep.

    x(h) with x(0) = x, x'(0) = ẋ, x''(0) = ẍ   ⇒   y = f(x),  y' = Df[ẋ],  y'' = D²f[ẋ, ẋ] + Df[ẍ]

The sweep interprets the jaxpr of f twice: once for the values, which are kept, and once for the
derivatives at these values. So ẍ may depend on y, and several ẍ share y and y'. What the curve does
not reach (the parameters of a network) carries nothing: a convolution with fixed weights costs
three; a jvp of a jvp costs four, since it computes the first derivative twice.

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
    """y, y' and one y'' per acceleration, of an intermediate value that the curve reaches."""

    value: Array
    first: Array
    seconds: tuple[Array, ...]


Value = Any  # a Series, or an array or literal that the curve does not reach


class Step(NamedTuple):
    """The record of one equation in the first pass: its outputs, and the steps inside of a call."""

    outputs: list[Array]
    inside: list["Step"] | None


# Linear in each operand alone.
BILINEAR = frozenset({"mul", "dot_general", "conv_general_dilated"})
# Linear in all operands together.
LINEAR = frozenset({
    "add", "add_any", "sub", "neg", "reshape", "transpose", "broadcast_in_dim", "squeeze", "rev",
    "expand_dims", "reduce_sum", "cumsum", "convert_element_type", "concatenate", "slice", "pad",
    "copy", "real", "imag", "reduce_window_sum", "split",
})  # fmt: skip
# Calls without a meaning of their own, and where they keep what they call.
INLINED = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr"}


def along_curve(
    function: Callable[..., Any],
    point: Sequence[Array],
    velocity: Sequence[Array],
    accelerations: Callable[[Any], Sequence[Sequence[Array]]],
) -> tuple[Any, Any, tuple[Any, ...]]:
    """(f, df/dh, (d²f/dh², ...)) at h = 0 along x(h) = point + h velocity + ½ h² acceleration.

    Args:
        function: of as many arrays as `point` has; may close over anything.
        point: x(0), floating arrays.
        velocity: x'(0), same shapes.
        accelerations: f(x(0)) ↦ one or more x''(0), each of the shapes of `point`.

    Returns:
        Trees of the structure of the function's result; one second derivative per acceleration.
    """
    closed, out_shape = jax.make_jaxpr(function, return_shape=True)(*point)
    tree = jax.tree.structure(out_shape)
    outputs, steps = _values(closed, point)
    seconds = accelerations(jax.tree.unflatten(tree, outputs))
    per_argument = zip(*seconds, strict=True)
    curve = [Series(*parts) for parts in zip(point, velocity, per_argument, strict=True)]
    results = [_instantiate(r, len(seconds)) for r in _derivatives(closed, curve, steps)]
    first = jax.tree.unflatten(tree, [result.first for result in results])
    second = zip(*(result.seconds for result in results), strict=True)
    value = jax.tree.unflatten(tree, outputs)
    return value, first, tuple(jax.tree.unflatten(tree, leaves) for leaves in second)


def _values(closed: Any, arguments: Sequence[Array]) -> tuple[list[Array], list[Step]]:
    """First pass: the outputs of a jaxpr, and what every equation gave."""
    values = _bindings(closed, arguments)
    steps = []
    for equation in closed.jaxpr.eqns:
        inputs = [_read(values, atom) for atom in equation.invars]
        if equation.primitive.name in INLINED:
            step = Step(*_values(_inlined(equation), inputs))
        else:
            step = Step(_bind(equation, inputs), None)
        steps.append(step)
        values |= dict(zip(equation.outvars, step.outputs, strict=True))
    return [_read(values, atom) for atom in closed.jaxpr.outvars], steps


def _derivatives(closed: Any, arguments: Sequence[Value], steps: list[Step]) -> list[Value]:
    """Second pass: the series of the outputs, at the values of the first pass."""
    values = _bindings(closed, arguments)
    for equation, step in zip(closed.jaxpr.eqns, steps, strict=True):
        inputs = [_read(values, atom) for atom in equation.invars]
        outputs = _apply(equation, inputs, step)
        values |= dict(zip(equation.outvars, outputs, strict=True))
    return [_read(values, atom) for atom in closed.jaxpr.outvars]


def _sweep(closed: Any, arguments: Sequence[Value]) -> list[Value]:
    """Make both passes: first the values, then the derivatives at these values."""
    _, steps = _values(closed, [v.value if isinstance(v, Series) else v for v in arguments])
    return _derivatives(closed, arguments, steps)


def _bindings(closed: Any, arguments: Sequence[Value]) -> dict[Any, Value]:
    constants = zip(closed.jaxpr.constvars, closed.consts, strict=True)
    return dict(constants) | dict(zip(closed.jaxpr.invars, arguments, strict=True))


def _read(values: dict[Any, Value], atom: Any) -> Value:
    return atom.val if isinstance(atom, jex.Literal) else values[atom]


def _inlined(equation: Any) -> Any:
    return equation.params[INLINED[equation.primitive.name]]


def _apply(equation: Any, inputs: list[Value], step: Step) -> list[Value]:
    """Series of the outputs of one equation."""
    name = equation.primitive.name
    on_curve = [i for i, value in enumerate(inputs) if isinstance(value, Series)]
    if not on_curve:
        return step.outputs
    if name in INLINED:
        return _derivatives(_inlined(equation), inputs, step.inside)
    if name in CALLS:
        series = CALLS[name](equation, inputs)
        return [_with_value(s, value) for s, value in zip(series, step.outputs, strict=True)]
    if name in LINEAR:
        return _linear(equation, inputs, step.outputs)
    if name in BILINEAR and len(on_curve) == 1:
        return _linear_in_one(equation, inputs, on_curve[0], step.outputs)
    if name == "div" and on_curve == [0]:
        return _linear_in_one(equation, inputs, 0, step.outputs)
    if name in BILINEAR:
        return _bilinear(equation, inputs, step.outputs)
    return _smooth(equation, inputs, on_curve, step.outputs)


def _bind(equation: Any, inputs: Sequence[Array]) -> list[Array]:
    params = equation.primitive.get_bind_params(equation.params)
    result = equation.primitive.bind(*inputs, **params)
    return list(result) if equation.primitive.multiple_results else [result]


def _with_value(series: Value, value: Array) -> Value:
    return series._replace(value=value) if isinstance(series, Series) else value


def _instantiate(value: Value, number: int) -> Series:
    if isinstance(value, Series):
        return value
    zero = jnp.zeros_like(value)
    return Series(value, zero, (zero,) * number)


def _number(inputs: Sequence[Value]) -> int:
    """Return how many second derivatives the series carry."""
    return next(len(value.seconds) for value in inputs if isinstance(value, Series))


def _linear(equation: Any, inputs: list[Value], outputs: list[Array]) -> list[Value]:
    """y^(k) = f(x^(k)), operands that the curve does not reach as zeros; integers do not move."""
    if not jnp.issubdtype(outputs[0].dtype, jnp.inexact):
        return outputs
    series = [_instantiate(value, _number(inputs)) for value in inputs]
    first = _bind(equation, [s.first for s in series])
    seconds = [_bind(equation, part) for part in zip(*(s.seconds for s in series), strict=True)]
    return [Series(*y) for y in zip(outputs, first, zip(*seconds, strict=True), strict=True)]


def _linear_in_one(
    equation: Any, inputs: list[Value], position: int, outputs: list[Array]
) -> list[Value]:
    """y^(k) = f(c, x^(k)) with all other operands fixed."""

    def at(operand: Array) -> Array:
        return _bind(equation, [*inputs[:position], operand, *inputs[position + 1 :]])[0]

    moving = inputs[position]
    return [Series(outputs[0], at(moving.first), tuple(map(at, moving.seconds)))]


def _bilinear(equation: Any, inputs: list[Value], outputs: list[Array]) -> list[Value]:
    """y'' = f(ẍ, u) + 2 f(ẋ, u̇) + f(x, ü)."""
    (x, dx, ddxs), (u, du, ddus) = inputs

    def product(a: Array, b: Array) -> Array:
        return _bind(equation, [a, b])[0]

    first = product(dx, u) + product(x, du)
    mixed = 2.0 * product(dx, du)
    pairs = zip(ddxs, ddus, strict=True)
    return [
        Series(outputs[0], first, tuple(product(a, u) + mixed + product(x, b) for a, b in pairs))
    ]


def _smooth(
    equation: Any, inputs: list[Value], on_curve: list[int], outputs: list[Array]
) -> list[Value]:
    """Any primitive with a jvp rule: y'' by a jvp of its jvp along (ẋ, ẍ)."""

    def function(*moving: Array) -> list[Array]:
        operands = list(inputs)
        for position, value in zip(on_curve, moving, strict=True):
            operands[position] = value
        return _bind(equation, operands)

    value, first, seconds = zip(*(inputs[i] for i in on_curve), strict=True)

    def first_derivative(x: tuple, dx: tuple) -> list[Array]:
        return jax.jvp(function, x, dx)[1]

    along = [
        jax.jvp(first_derivative, (value, first), (first, second))
        for second in zip(*seconds, strict=True)
    ]
    dys = along[0][0]
    ddys = zip(*(ddy for _, ddy in along), strict=True)
    series = [Series(*y) for y in zip(outputs, dys, ddys, strict=True)]
    return [s if jnp.issubdtype(s.value.dtype, jnp.inexact) else s.value for s in series]


def _remat(equation: Any, inputs: list[Value]) -> list[Value]:
    """The sweep of a checkpointed function is checkpointed with the same policy."""
    params = equation.params
    closed = jex.ClosedJaxpr(params["jaxpr"], ())
    body = jax.checkpoint(
        lambda values: _sweep(closed, values),
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
    params, number = equation.params, _number(inputs)
    closed, (num_consts, num_carry) = params["jaxpr"], _scan_sizes(params)

    def lift(value: Value) -> Value:
        inexact = not isinstance(value, Series) and jnp.issubdtype(value.dtype, jnp.inexact)
        return _instantiate(value, number) if inexact else value

    consts, carry = inputs[:num_consts], list(map(lift, inputs[num_consts:][:num_carry]))

    def body(carry: list[Value], x: list[Value]) -> tuple[list[Value], list[Value]]:
        results = list(map(lift, _sweep(closed, [*consts, *carry, *x])))
        return results[:num_carry], results[num_carry:]

    carry, ys = jax.lax.scan(
        body, carry, inputs[num_consts + num_carry :],
        length=params["length"], reverse=params["reverse"], unroll=params["unroll"],
    )  # fmt: skip
    return [*carry, *ys]


CALLS: dict[str, Callable[[Any, list[Value]], list[Value]]] = {
    "checkpoint": _remat,
    "remat": _remat,
    "remat2": _remat,
    "scan": _scan,
}
