"""The terms of a training objective at (x_t, t): every term that is asked for from one evaluation.

    dsm   R‖e1‖²,  e1 = σ s + z                     R = mean over dimensions or ½ sum
    ism   R(σ²‖s‖² + 2σ² vᵀHv + 1) per dimension    the same expectation, without z
    orders 2 and 3 (high_order), Fokker–Planck residual (fokker_planck)

E_z[σ s·z] = σ² E div s gives ism (Hyvärinen 2005; Huang et al. 2021, 2106.02808, section 3): with
the weight g²/σ² its minimum is the maximum of the ELBO. The terms of one example share the
evaluation of the network, its dropout mask and the probes: one sweep per probe for all terms.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from checks import one_of, require
from fokker_planck import FORMS, Derivatives, FokkerPlanck
from high_order import THIRD_ORDER_FORMS, HighOrder, first_order_residual
from operators import (
    PROBES,
    Batched,
    PerExample,
    dimension,
    fold_in_all,
    inner,
    squared_norm,
    value_and_jacobian,
    value_jacobian_and_trace_gradient,
)
from parameterization import ScoreFn
from sde_lib import SDE

Parts = dict[str, PerExample]
# Forms of the third order that come with a form of the Fokker–Planck residual.
SHARED_THIRD = {"gradient": "gradient", "advective": "directional"}


class Point(NamedTuple):
    """The point of the terms: x_t = α x0 + σ z at t, and one key per example for its probes.

    `target` takes the place of z in order 1: z as it is known from x_t and part of x0.
    """

    x: Batched
    t: PerExample
    z: Batched
    keys: Key[Array, " b"]
    target: Batched | None = None

    def rows(self, index: np.ndarray) -> "Point":
        """The examples of these rows."""
        return jax.tree.map(lambda part: part[index], self)


@dataclasses.dataclass(frozen=True)
class Terms:
    """The terms that an objective consists of, and how they are estimated.

    Attributes:
        objective: "dsm" or "ism", the term of order 1 that is optimised.
        reduce_mean: R is the mean over dimensions; False: half the sum.
        estimator: of ism and orders 2 and 3, "probe" or "exact" (d tangents; small d only).
        num_probes: Rademacher probes per example of the same.
        high_order: orders 2 and 3; None for order 1.
        fokker_planck: the regulariser; None for none.
    """

    objective: str = "dsm"
    reduce_mean: bool = True
    estimator: str = "probe"
    num_probes: int = 1
    high_order: HighOrder | None = None
    fokker_planck: FokkerPlanck | None = None

    def __post_init__(self) -> None:
        one_of("training.objective", self.objective, ("dsm", "ism"))
        one_of("training.derivative_estimator", self.estimator, ("probe", "exact"))
        allowed = "at least 1, and 1 with training.derivative_estimator='exact'"
        fits = self.num_probes == 1 or (self.num_probes > 1 and self.estimator == "probe")
        require(fits, "training.num_probes", self.num_probes, allowed)
        allowed = (
            "True with training.score_matching_order > 1: the parts of orders 2 and 3 are "
            "normalised by d² and d³, which goes with the mean over dimensions"
        )
        fits = self.high_order is None or self.reduce_mean
        require(fits, "training.reduce_mean", self.reduce_mean, allowed)
        self.strides()

    def everywhere(self) -> "Terms":
        """The same terms for every example of every batch, for evaluation."""
        whole = {"high_order": {"fraction": 1.0}, "fokker_planck": {"fraction": 1.0, "every": 1}}
        changes = {
            name: dataclasses.replace(getattr(self, name), **fields)
            for name, fields in whole.items()
            if getattr(self, name) is not None
        }
        return dataclasses.replace(self, **changes)

    def strides(self) -> tuple[int, int]:
        """Orders 2 and 3, and the residual, are taken for each n-th example; 0: for none."""
        return (
            _stride(self.high_order, "high_order_fraction"),
            _stride(self.fokker_planck, "fp_fraction"),
        )

    def parts(
        self,
        score_fn: ScoreFn,
        sde: SDE,
        point: Point,
        score_of: Callable[[np.ndarray], ScoreFn] | None = None,
    ) -> Parts:
        """Unweighted terms of every example of a batch.

        `score_of` gives the score of some rows of the batch, where that is another function, as
        with a context; otherwise it is `score_fn`.

        A term that is taken for a fraction 1/n of the examples is n times its value there and zero
        elsewhere, so that its mean over the batch has the same expectation.
        """
        number, strides = len(point.t), self.strides()
        high, residual = (_taken(n, number) for n in strides)
        groups = sorted(set(zip(high.tolist(), residual.tolist(), strict=True)), reverse=True)
        if len(groups) == 1:
            return self.shared_parts(score_fn, sde, point)
        factors = self._factors(*strides)
        whole: Parts = {}
        for with_high, with_residual in groups:
            rows = np.flatnonzero((high == with_high) & (residual == with_residual))
            terms = dataclasses.replace(
                self,
                high_order=self.high_order if with_high else None,
                fokker_planck=self.fokker_planck if with_residual else None,
            )
            score = score_fn if score_of is None else score_of(rows)
            for name, values in terms.shared_parts(score, sde, point.rows(rows)).items():
                start = whole.get(name, jnp.zeros(number, values.dtype))
                whole[name] = start.at[rows].set(values)
        return {name: factors.get(name, 1) * values for name, values in whole.items()}

    def _factors(self, high: int, residual: int) -> dict[str, int]:
        """Return by name the factor n of every part that is taken for each n-th example."""
        pairs = ((self.high_order, high), (self.fokker_planck, residual))
        return {name: n for term, n in pairs if term is not None for name in term.names}

    def shared_parts(self, score_fn: ScoreFn, sde: SDE, point: Point) -> Parts:
        """All terms of all examples."""
        curvature = self.objective == "ism" or self.high_order is not None
        if curvature and self.estimator == "exact":
            return self._exact(score_fn, sde, point)
        if not curvature and self.fokker_planck is None:
            return self._first(score_fn(point.x, point.t), sde, point)
        return self._probed(score_fn, sde, point, self.num_probes if curvature else 0)

    def weighted(
        self, parts: Parts, sde: SDE, t: PerExample, weight: PerExample, to_uniform: PerExample
    ) -> PerExample:
        """weight × (order 1 + weighted orders 2, 3) + to_uniform × weighted residual."""
        total = parts[self.objective]
        if self.high_order is not None:
            total = total + self.high_order.weighted(parts)
        total = weight * total
        if self.fokker_planck is not None:
            total = total + to_uniform * self.fokker_planck.weighted(parts, t, sde)
        return total

    def _first(
        self, score: Batched, sde: SDE, point: Point, div: PerExample | None = None
    ) -> Parts:
        """dsm, and ism where div s is known."""
        d = dimension(point.x)
        reduce = (1.0 / d) if self.reduce_mean else 0.5
        target = point.z if point.target is None else point.target
        e1 = first_order_residual(score, sde.sigma(point.t), target)
        parts = {"dsm": reduce * squared_norm(e1)}
        if div is not None and self.objective == "ism":
            variance = sde.sigma(point.t) ** 2
            parts["ism"] = reduce * (variance * (squared_norm(score) + 2.0 * div) + d)
        return parts

    def _exact(self, score_fn: ScoreFn, sde: SDE, point: Point) -> Parts:
        trace_gradient = None
        field = lambda y: score_fn(y, point.t)  # noqa: E731
        if self.high_order is not None and self.high_order.order == 3:
            score, jacobian, trace_gradient = value_jacobian_and_trace_gradient(field, point.x)
        else:
            score, jacobian = value_and_jacobian(field, point.x)
        parts = self._first(score, sde, point, jnp.trace(jacobian, axis1=1, axis2=2))
        if self.high_order is not None:
            sigma = sde.sigma(point.t)
            e1 = first_order_residual(score, sigma, point.z)
            parts |= self.high_order.exact_parts(e1, jacobian, trace_gradient, sigma)
        if self.fokker_planck is not None:
            alone = dataclasses.replace(self, objective="dsm", high_order=None)
            parts = alone.shared_parts(score_fn, sde, point) | parts
        return parts

    def _probed(self, score_fn: ScoreFn, sde: SDE, point: Point, num_curvature: int) -> Parts:
        num_residual = self.fokker_planck.num_probes if self.fokker_planck is not None else 0
        found, averaged = [], []
        for i in range(max(num_curvature, num_residual)):
            v = PROBES["rademacher"](fold_in_all(point.keys, i), point.x)
            now = self._derivatives(score_fn, sde, point, v, i < num_curvature, i < num_residual)
            if i < num_residual:
                found.append((v, now))
            if i < num_curvature:
                parts = self._first(now.score, sde, point, inner(v, now.hv))
                if self.high_order is not None:
                    sigma = sde.sigma(point.t)
                    e1 = first_order_residual(now.score, sigma, point.z)
                    parts |= self.high_order.parts(e1, now.hv, now.third, v, sigma)
                averaged.append(parts)
        if not averaged:
            averaged.append(self._first(found[0][1].score, sde, point))
        parts = jax.tree.map(lambda *values: sum(values) / len(values), *averaged)
        if found:
            parts |= self.fokker_planck.parts(found, point.x, point.t, sde)
        return parts

    def _derivatives(
        self, score_fn: ScoreFn, sde: SDE, point: Point, v: Batched, curvature: bool, residual: bool
    ) -> Derivatives:
        """Compute what the terms need along one probe, in as few sweeps as possible."""
        x, t = point.x, point.t
        field = lambda y: score_fn(y, t)  # noqa: E731
        third = curvature and self.high_order is not None and self.high_order.order == 3
        if not residual and not third:
            score, hv = jax.jvp(field, (x,), (v,))
            return Derivatives(score, hv, third=None, residual=None)
        if not residual:
            form = THIRD_ORDER_FORMS[self.high_order.third_order_form]
            score, hv, along = form(field, x, v)
            return Derivatives(score, hv, along, residual=None)
        name = self.fokker_planck.form
        if third and SHARED_THIRD[name] != self.high_order.third_order_form:
            form = THIRD_ORDER_FORMS[self.high_order.third_order_form]
            return FORMS[name](score_fn, sde, x, t, v)._replace(third=form(field, x, v)[2])
        return FORMS[name](score_fn, sde, x, t, v, third=third)


def _stride(term: HighOrder | FokkerPlanck | None, field: str) -> int:
    """n of a fraction 1/n; 0 where the term is absent."""
    if term is None:
        return 0
    n = round(1.0 / term.fraction) if term.fraction > 0 else 0
    fits = n >= 1 and abs(n * term.fraction - 1.0) <= 5e-3
    require(fits, f"training.{field}", term.fraction, "1, 1/2, 1/3, 1/4, ...")
    return n


def _taken(stride: int, number: int) -> np.ndarray:
    """Mark the examples of a device for which a term is taken: each `stride`-th, none for 0."""
    if stride == 0:
        return np.zeros(number, bool)
    allowed = f"a multiple of {stride} for a fraction of 1/{stride}"
    require(number % stride == 0, "training.batch_size on each device", number, allowed)
    return np.arange(number) % stride == 0
