"""Proposals for the time t of an integral over [t_min, T], each by its exact inverse CDF.

    uniform     p(t) = 1/(T − t_min)
    importance  p(t) = (g²/σ²)/Z,  Z = W(T) − W(t_min)
    debias      p(t) = r(max(t, t_eps))/Z on [0, T],  r = g²/σ²
    velocity    p(t) ∝ d log σ²/dt
    binned      as importance within each of n bins of equal width in W, with given masses
    levels      the N levels of a discrete chain

An integral ∫ h dt is E[h(t)/p(t)]. A proposal turns u ∈ [0, 1) into t, so stratified times need
nothing but stratified u.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from operators import PerExample, fold_in_each
from sde_base import check_time
from sde_lib import SDE, LinearVESDE, Time

FIELD = "training.smallest_time"  # of which t_min and t_eps are values


@dataclasses.dataclass(frozen=True)
class Uniform:
    """t ~ U[t_min, T]."""

    sde: SDE
    t_min: float

    def __post_init__(self) -> None:
        # Without σ at t = 0 the linear VE has no weight there either: g²/σ² is 0/0.
        check_time(FIELD, self.t_min, self.sde, positive=isinstance(self.sde, LinearVESDE))

    @property
    def length(self) -> float:
        """Return the length T − t_min of the interval."""
        return self.sde.T - self.t_min

    @property
    def normalizer(self) -> float:
        """Z = T − t_min."""
        return self.length

    def quantile(self, u: Time) -> Time:
        """Return the time of u by the inverse CDF."""
        return self.t_min + self.normalizer * u

    def density(self, t: Time) -> Time:
        """Return the density p(t) = 1/(T − t_min)."""
        return jnp.full_like(t, 1.0 / self.normalizer)


@dataclasses.dataclass(frozen=True)
class _Stretched:
    """A law under which a growing function of t, the `coordinate`, is uniform on [t_min, T]."""

    sde: SDE
    t_min: float

    def __post_init__(self) -> None:
        check_time(FIELD, self.t_min, self.sde, positive=True)

    @property
    def length(self) -> float:
        """Return the length T − t_min of the interval."""
        return self.sde.T - self.t_min

    def coordinate(self, t: Time) -> Time:
        """Return the function of t that is uniform under this law."""
        raise NotImplementedError

    def time_of_coordinate(self, c: Time) -> Time:
        """Return the time of a coordinate, the inverse of `coordinate`."""
        raise NotImplementedError

    def bounds(self, dtype: jnp.dtype | None = None) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The coordinate at t_min and T."""
        ends = jnp.asarray(self.t_min, dtype), jnp.asarray(self.sde.T, dtype)
        return self.coordinate(ends[0]), self.coordinate(ends[1])

    def quantile(self, u: Time) -> Time:
        """Return the time of u by the inverse CDF."""
        low, high = self.bounds(u.dtype)
        return jnp.clip(self.time_of_coordinate(low + (high - low) * u), self.t_min, self.sde.T)


@dataclasses.dataclass(frozen=True)
class Importance(_Stretched):
    """p(t) = (g²/σ²)/Z on [t_min, T], the likelihood-weighting proposal: W is uniform.

    Reference: Song et al. 2021, https://arxiv.org/abs/2101.09258, section 5.1; closed forms in
    sde_lib.
    """

    def coordinate(self, t: Time) -> Time:
        """Return the cumulative weight W(t), which is uniform."""
        return self.sde.cumulative_weight(t)

    def time_of_coordinate(self, c: Time) -> Time:
        """Return the time t = W⁻¹(c) of a coordinate c."""
        return self.sde.time_of_weight(c)

    @property
    def normalizer(self) -> Float[Array, ""]:
        """Z = W(T) − W(t_min)."""
        low, high = self.bounds()
        return high - low

    def density(self, t: Time) -> Time:
        """Return the density p(t) = (g²/σ²)/Z."""
        return self.sde.rate(t) / self.normalizer.astype(t.dtype)


@dataclasses.dataclass(frozen=True)
class Debias:
    """p(t) = r(max(t, t_eps))/Z on [0, T], r = g²/σ², Z = t_eps r(t_eps) + W(T) − W(t_eps).

    Positive on all of [0, T], so an integral over [0, T] stays unbiased under importance weights.
    Reference: Huang et al. 2021, https://arxiv.org/abs/2106.02808, appendix.
    """

    sde: SDE
    t_eps: float = 1e-3

    def __post_init__(self) -> None:
        check_time(FIELD, self.t_eps, self.sde, positive=True)

    @property
    def length(self) -> float:
        """Return the length T of the interval."""
        return self.sde.T

    def pieces(self, dtype: jnp.dtype | None = None) -> tuple[Float[Array, ""], ...]:
        """r(t_eps), t_eps r(t_eps), W(t_eps), Z."""
        t_eps = jnp.asarray(self.t_eps, dtype)
        rate, low = self.sde.rate(t_eps), self.sde.cumulative_weight(t_eps)
        high = self.sde.cumulative_weight(jnp.asarray(self.sde.T, dtype))
        return rate, t_eps * rate, low, t_eps * rate + high - low

    @property
    def normalizer(self) -> Float[Array, ""]:
        """Return the normalizer Z of the density."""
        return self.pieces()[-1]

    def quantile(self, u: Time) -> Time:
        """Inverse CDF: linear below t_eps, W⁻¹ above."""
        rate, flat, low, normalizer = self.pieces(u.dtype)
        mass = normalizer * u
        above = self.sde.time_of_weight(jnp.maximum(mass - flat, 0.0) + low)
        return jnp.where(mass <= flat, mass / rate, jnp.minimum(above, self.sde.T))

    def density(self, t: Time) -> Time:
        """Return the density p(t) = r(max(t, t_eps))/Z."""
        return self.sde.rate(jnp.maximum(t, self.t_eps)) / self.normalizer.astype(t.dtype)


@dataclasses.dataclass(frozen=True)
class Velocity(_Stretched):
    """p(t) = (d log σ²/dt)/Z on [t_min, T]: log σ² is uniform.

    It draws fewer times than the importance law where little of the signal is left. In float32
    log σ² is exact to 4e-6, the spacing of u and t. For VP it changes by α² = 4e-5 in the last unit
    of W, where the error is 4e-4 of t. This does not matter to what vanishes with α², such as the
    loss of a velocity.
    Reference: Zheng et al. 2023, https://arxiv.org/abs/2305.03935, section 3.3.
    """

    def coordinate(self, t: Time) -> Time:
        """Return log σ² at t, which is uniform."""
        return 2.0 * jnp.log(self.sde.sigma(t))

    def time_of_coordinate(self, c: Time) -> Time:
        """t of log σ²."""
        return self.sde.time_of_sigma(jnp.exp(0.5 * c))

    def density(self, t: Time) -> Time:
        """Return the density p(t) = (d log σ²/dt)/Z."""
        return Importance(self.sde, self.t_min).density(t) / self.relative_weight(t)

    def relative_weight(self, t: Time) -> Time:
        """The density of the importance law over this one: 1/α² for VP, times a constant."""
        low, high = self.bounds(t.dtype)
        first, last = Importance(self.sde, self.t_min).bounds(t.dtype)
        return (high - low) / (last - first) / self.sde.velocity_share(t)


@dataclasses.dataclass(frozen=True, eq=False)
class Binned:
    """n bins of equal width in W = ∫ g²/σ², bin j with mass m_j; the importance law inside a bin.

    Attributes:
        sde: the SDE.
        t_min: smallest time.
        masses: [n], positive, of sum one.
    """

    sde: SDE
    t_min: float
    masses: Float[Array, " n"]

    @property
    def length(self) -> float:
        """Return the length T − t_min of the interval."""
        return self.sde.T - self.t_min

    def quantile(self, u: Time) -> Time:
        """Inverse CDF: the bin of u, and the place in it."""
        masses, n = self.masses.astype(u.dtype), self.masses.shape[0]
        ends = jnp.cumsum(masses)
        j = jnp.minimum(jnp.searchsorted(ends, u, side="right"), n - 1)
        inside = jnp.clip((u - (ends - masses)[j]) / masses[j], 0.0, 1.0)
        return Importance(self.sde, self.t_min).quantile((j.astype(u.dtype) + inside) / n)

    def bin(self, t: Time) -> Int[Array, "*t"]:
        """The bin of t."""
        low, high = Importance(self.sde, self.t_min).bounds(t.dtype)
        place = (self.sde.cumulative_weight(t) - low) / (high - low)
        n = self.masses.shape[0]
        return jnp.clip(jnp.floor(n * place).astype(jnp.int32), 0, n - 1)

    def density(self, t: Time) -> Time:
        """Return the density p(t): in bin j, n m_j times that of the importance law."""
        return Importance(self.sde, self.t_min).density(t) / self.relative_weight(t)

    def relative_weight(self, t: Time) -> Time:
        """The density of the importance law over this one, 1/(n m_j)."""
        return 1.0 / (self.masses.shape[0] * self.masses.astype(t.dtype)[self.bin(t)])


@dataclasses.dataclass(frozen=True)
class Levels:
    """t uniform on the N levels i T/(N − 1) of a discrete chain; a stand-in for uniform t."""

    sde: SDE
    number: int

    @property
    def length(self) -> float:
        """Return the length T of the interval."""
        return self.sde.T

    def quantile(self, u: Time) -> Time:
        """Return the time i T/(N − 1) of level i = ⌊u N⌋."""
        index = jnp.minimum(jnp.floor(u * self.number), self.number - 1)
        return index * (self.sde.T / (self.number - 1))

    def density(self, t: Time) -> Time:
        """1/T, of the uniform law that the levels stand for."""
        return jnp.full_like(t, 1.0 / self.length)


Proposal = Uniform | Importance | Debias | Velocity | Binned | Levels


def independent_uniforms(
    key: Key[Array, ""], ids: Int[Array, " b"], batch_size: int, dtype: DTypeLike = jnp.float32
) -> PerExample:
    """u_i ~ U(0, 1), one per id; never 0, where the debias law would give t = 0 and σ = 0."""
    del batch_size
    smallest = jnp.finfo(dtype).epsneg
    draw = partial(jax.random.uniform, shape=(), dtype=dtype, minval=smallest)
    return jax.vmap(draw)(fold_in_each(key, ids))


def stratified_uniforms(
    key: Key[Array, ""], ids: Int[Array, " b"], batch_size: int, dtype: DTypeLike = jnp.float32
) -> PerExample:
    """u_i = ((i + shift) mod B + U_i)/B: one jittered u in each of the B cells, ids 0..B−1.

    Each u_i is U[0, 1) by itself (the shift is uniform over the cells), so the estimate stays
    unbiased.
    """
    key_shift, key_jitter = jax.random.split(key)
    shift = jax.random.randint(key_shift, (), 0, batch_size, ids.dtype)
    jitter = independent_uniforms(key_jitter, ids, batch_size, dtype)
    return (((ids + shift) % batch_size).astype(dtype) + jitter) / batch_size


def draws(
    function: Callable[[Key[Array, "b 2"], PerExample], PerExample],
    keys: Key[Array, " b"],
    number: int,
    dtype: DTypeLike,
    *,
    stratified: bool = True,
    smallest: float = 0.0,
) -> Float[Array, "n b"]:
    """function(two keys per example, u) of `number` draws of u ~ U(0, 1), one row each.

    Stratified: u of row i is uniform in the i-th of as many cells of [0, 1). `smallest` is the
    least u within a cell, for laws that must not see u = 0.
    """

    def draw(i: Int[Array, ""]) -> PerExample:
        keys_now = jax.vmap(lambda k: jax.random.split(jax.random.fold_in(k, i), 3))(keys)
        u = jax.vmap(lambda k: jax.random.uniform(k, (), dtype, smallest))(keys_now[:, 0])
        u = (i.astype(dtype) + u) / number if stratified else u
        return function(keys_now[:, 1:], u)

    if number == 1:  # no loop: XLA on CPU is slow at gradients of convolutions inside one
        return draw(jnp.zeros((), jnp.int32))[None]
    return jax.lax.map(draw, jnp.arange(number))


UNIFORMS = {False: independent_uniforms, True: stratified_uniforms}
