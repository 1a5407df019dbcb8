"""Per-example algebra and first derivatives of plain functions x ↦ s(x), x: [B, *d].

    scale(c, x)_b = c_b x_b,   inner(x, y)_b = ⟨x_b, y_b⟩,   (s, Hv) by one jvp,
    div s = tr H = Σ_i e_iᵀ H e_i = E_v[vᵀ H v]   for E[v vᵀ] = I.

Every function of a batch treats its examples as independent (no network mixes them), so one jvp
with tangents v: [B, *d] gives H_b v_b for every example b.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Shaped

from taylor import along_curve

Batched = Float[Array, "b *d"]
PerExample = Float[Array, " b"]
Field = Callable[[Batched], Batched]


def expand(c: PerExample, like: Batched) -> Float[Array, "b *ones"]:
    """Append unit axes to c: [B] so that it broadcasts against like: [B, *d]."""
    return jnp.expand_dims(c, tuple(range(1, like.ndim)))


def scale(c: PerExample, x: Batched) -> Batched:
    """Multiply example b of x: [B, *d] by the scalar c_b."""
    return expand(c, x) * x


def inner(x: Batched, y: Batched) -> PerExample:
    """Inner product ⟨x_b, y_b⟩ of every example, shape [B]."""
    return jnp.sum(x * y, axis=tuple(range(1, x.ndim)))


def squared_norm(x: Batched) -> PerExample:
    """Squared Euclidean norm ‖x_b‖² of every example, shape [B]."""
    return inner(x, x)


def dimension(x: Shaped[Array, "b *d"]) -> int:
    """Number of dimensions d of one example."""
    return x[0].size


def fold_in_each(key: Key[Array, ""], ids: Int[Array, " b"]) -> Key[Array, " b"]:
    """One key per example, from a key and the examples' integer ids.

    The noise of an example then depends on its id alone, not on how a batch is split over devices.
    """
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)


def fold_in_all(keys: Key[Array, " b"], number: int | Int[Array, ""]) -> Key[Array, " b"]:
    """Fold one number into every key of a batch."""
    return jax.vmap(lambda k: jax.random.fold_in(k, number))(keys)


def standard_normal(keys: Key[Array, " b"], like: Batched) -> Batched:
    """z ~ N(0, I), example b from keys[b]; shape and dtype of `like`."""
    return jax.vmap(lambda k: jax.random.normal(k, like.shape[1:], like.dtype))(keys)


def rademacher(keys: Key[Array, " b"], like: Batched) -> Batched:
    """v uniform on {−1, +1}^d, example b from keys[b]; shape and dtype of `like`."""
    return jax.vmap(lambda k: jax.random.rademacher(k, like.shape[1:], like.dtype))(keys)


def uniform(keys: Key[Array, " b"], like: Batched) -> Batched:
    """u ~ U[0, 1)^d, example b from keys[b]; shape and dtype of `like`."""
    return jax.vmap(lambda k: jax.random.uniform(k, like.shape[1:], like.dtype))(keys)


PROBES = {"rademacher": rademacher, "gaussian": standard_normal}


def value_and_divergence(field: Field, x: Batched) -> tuple[Batched, PerExample]:
    """(s(x), tr H) exactly, by d tangents through one linearisation; for small d only."""
    value, tangent_map = jax.linearize(field, x)
    basis = jnp.eye(dimension(x), dtype=x.dtype)

    def diagonal_entry(e: Float[Array, " n"]) -> PerExample:
        direction = jnp.broadcast_to(e.reshape(x.shape[1:]), x.shape)
        return inner(direction, tangent_map(direction))

    return value, jnp.sum(jax.lax.map(diagonal_entry, basis), axis=0)


def value_and_probed_divergence(
    field: Field, x: Batched, probes: Float[Array, "p b *d"]
) -> tuple[Batched, PerExample]:
    """(s(x), mean_p v_pᵀ H v_p) with one shared primal; unbiased for tr H when E[v vᵀ] = I.

    Reference: Skilling 1989; Hutchinson 1989; Grathwohl et al. 2019,
    https://arxiv.org/abs/1810.01367.
    """
    if probes.shape[0] == 1:
        value, hv = jax.jvp(field, (x,), (probes[0],))
        return value, inner(probes[0], hv)
    value, tangent_map = jax.linearize(field, x)
    return value, jnp.mean(jax.vmap(lambda v: inner(v, tangent_map(v)))(probes), axis=0)


def value_and_jacobian(field: Field, x: Batched) -> tuple[Batched, Float[Array, "b n n"]]:
    """(s(x), H), H[b, i, j] = ∂s_i/∂x_j over flattened dimensions, by d tangents; small d only."""
    value, tangent_map = jax.linearize(field, x)
    basis = jnp.eye(dimension(x), dtype=x.dtype)

    def column(e: Float[Array, " n"]) -> Float[Array, "b n"]:
        direction = jnp.broadcast_to(e.reshape(x.shape[1:])[None], x.shape)
        return tangent_map(direction).reshape(x.shape[0], -1)

    return value, jnp.moveaxis(jax.vmap(column)(basis), 0, 2)


def value_jacobian_and_trace_gradient(
    field: Field, x: Batched
) -> tuple[Batched, Float[Array, "b n n"], Batched]:
    """(s, H, ∇ₓ tr H), exactly; small d only."""

    def total_trace(y: Batched) -> tuple[Float[Array, ""], tuple]:
        value, jacobian = value_and_jacobian(field, y)
        return jnp.trace(jacobian, axis1=1, axis2=2).sum(), (value, jacobian)

    gradient, (value, jacobian) = jax.grad(total_trace, has_aux=True)(x)
    return value, jacobian, gradient


def value_hvp_and_gradient(
    field: Field, x: Batched, v: Batched
) -> tuple[Batched, Batched, Batched]:
    """(s, Hv, ∇ₓ(vᵀHv)): one reverse pass over one jvp, with one primal."""

    def quadratic_form(y: Batched) -> tuple[Float[Array, ""], tuple[Batched, Batched]]:
        value, hv = jax.jvp(field, (y,), (v,))
        return jnp.sum(v * hv), (value, hv)

    gradient, (value, hv) = jax.grad(quadratic_form, has_aux=True)(x)
    return value, hv, gradient


def value_hvp_and_directional(
    field: Field, x: Batched, v: Batched
) -> tuple[Batched, Batched, Batched]:
    """(s, Hv, D²s[v, v]) by one Taylor sweep, forward only; D²s[v, v] = ∇ₓ(vᵀHv) if H = Hᵀ."""
    value, hv, (second,) = along_curve(field, (x,), (v,), lambda _: [(jnp.zeros_like(x),)])
    return value, hv, second
