"""Training objectives, each a pure function (params, rng, batch) → (loss, metrics).

    L = E_{t ~ p, z} w(t) (order 1 + parts of orders 2 and 3) + E_{t uniform} weighted residual
    w = 1 (noise weighting) | g²/σ² (likelihood weighting) | 1 under p(t) ∝ g²/σ² (importance
    sampled)

The terms are those of `terms`; order 1 is denoising or implicit score matching.

A batch is {image: [B, *d], noise_id: int32 [B], mask: bool [B]}, with context: [B, *c] for
p(x | c). A training step adds to the batch its number, as `step`, and the moments that an adaptive
law of times has learned, as `time_law`. The noise of an example, and whether its context is
dropped, is a function of (rng, noise_id) only. The optimised loss leaves
out the constant Z of the importance proposal.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from checks import one_of, require
from dequantization import Encoding, FlowDequantizer
from likelihood import variational_bound
from models.conditioning import without
from operators import PerExample, fold_in_all, fold_in_each, standard_normal
from parameterization import Params, ScoreFn, ScoreModel
from sde_lib import SDE
from terms import Point, Terms
from time_sampling import (
    UNIFORMS,
    Binned,
    Debias,
    Importance,
    Levels,
    Proposal,
    Uniform,
    Velocity,
)

Metrics = dict[str, Float[Array, ""]]
Batch = dict[str, Array]
LossFn = Callable[[Params, Key[Array, ""], Batch], tuple[Float[Array, ""], Metrics]]


def noise_weight(t: PerExample, sde: SDE) -> PerExample:
    """Weight every time alike: w = 1."""
    del sde
    return jnp.ones_like(t)


def likelihood_weight(t: PerExample, sde: SDE) -> PerExample:
    """w = g²/σ², so that w‖e1‖² = g²‖s − ∇log q(x_t|x0)‖² (Song et al. 2021, 2101.09258)."""
    return sde.rate(t)


@dataclasses.dataclass(frozen=True)
class TimeLaw:
    """A law of times: `proposal` draws them from uniform numbers, and w(t) is their weight."""

    proposal: Proposal
    weight: Callable[[PerExample, SDE], PerExample]
    stratified: bool = False

    def at(self, batch: Batch) -> "TimeLaw":
        """The law of this step: this law itself, unless it learns from earlier steps."""
        del batch
        return self

    def sample(
        self, key: Key[Array, ""], batch: Batch, batch_size: int, dtype: DTypeLike = jnp.float32
    ) -> PerExample:
        """One time per example of the batch."""
        u = UNIFORMS[self.stratified](key, batch["noise_id"], batch_size, dtype)
        return self.proposal.quantile(u)


@dataclasses.dataclass(frozen=True)
class BinnedLaw(TimeLaw):
    """The law of one step of `AdaptiveLaw`."""

    proposal: Binned


@dataclasses.dataclass(frozen=True)
class AdaptiveLaw(TimeLaw):
    """Bins of equal width in W with masses m_j ∝ √E[h² | bin j], never below FLOOR/n.

    h is the integrand of ∫ h dW. The second moments come from earlier steps (`bin_moments`), so
    the masses of a step do not depend on its noise. Its estimate is unbiased for all masses.
    """

    proposal: Importance

    def at(self, batch: Batch) -> BinnedLaw:
        """The law of this step, from the moments [2, n] in the batch: ΣE h², Σ1 of every bin."""
        squares, counts = batch["time_law"]
        roots = jnp.sqrt(squares / counts) + jnp.finfo(squares.dtype).tiny  # all may be zero
        masses = (1.0 - FLOOR) * roots / jnp.sum(roots) + FLOOR / len(roots)
        proposal = Binned(self.proposal.sde, self.proposal.t_min, masses)
        return BinnedLaw(proposal, _relative_weight(proposal), self.stratified)


NUM_BINS = 16
NUM_KEYS = 5  # of an example's noise
FLOOR = 0.2  # share of the times that are spread evenly over W, whatever was learned


def bin_moments(law: BinnedLaw, t: PerExample, h: PerExample) -> Float[Array, "b 2 n"]:
    """(h², 1) of every example in the column of its bin, zero elsewhere."""
    which = jax.nn.one_hot(law.proposal.bin(t), NUM_BINS, dtype=h.dtype)
    h = jax.lax.stop_gradient(h)
    return jnp.stack([(h**2)[:, None] * which, which], axis=1)


def _relative_weight(proposal: Velocity | Binned) -> Callable[[PerExample, SDE], PerExample]:
    """w = density of the importance law over that of the proposal: the same mean as under it."""
    return lambda t, sde: proposal.relative_weight(t)


def _velocity_law(sde: SDE, t_min: float, stratified: bool) -> TimeLaw:
    proposal = Velocity(sde, t_min)
    return TimeLaw(proposal, _relative_weight(proposal), stratified)


# Proposals of the likelihood weight g²/σ², by name: (sde, t_min, stratified) → law.
LIKELIHOOD_LAWS: dict[str, Callable[[SDE, float, bool], TimeLaw]] = {
    "uniform": lambda sde, t_min, s: TimeLaw(Uniform(sde, t_min), likelihood_weight, s),
    "importance": lambda sde, t_min, s: TimeLaw(Importance(sde, t_min), noise_weight, s),
    "debias": lambda sde, t_min, s: TimeLaw(Debias(sde, t_min), noise_weight, s),
    "velocity": _velocity_law,
    "adaptive": lambda sde, t_min, s: AdaptiveLaw(Importance(sde, t_min), noise_weight, s),
}


def time_law(
    sde: SDE,
    *,
    smallest_time: float,
    likelihood_weighting: bool = False,
    importance_weighting: bool = False,
    debias: bool = False,
    stratified: bool = False,
    levels: int = 0,
    name: str = "",
) -> TimeLaw:
    """The law by its name, or by the published switches where the name is "".

    Under `debias`, t_eps is the smallest time. With levels > 0 the times are those of a discrete
    chain and w = 1. These are the objectives of SMLD (Song and Ermon 2019, σ² weight) and DDPM (Ho
    et al. 2020, eq. 14). All other laws estimate ∫ (g²/σ²) h dt, except uniform times with w = 1.
    The laws `importance`, `velocity` and `adaptive` estimate it divided by W(T) − W(t_min).

    Raises:
        ValueError: the name is unknown or contradicts a switch; importance weighting without
            likelihood weighting (it would have no effect), debias together with either, or levels
            together with any of them.
    """
    switches = (likelihood_weighting, importance_weighting, debias, name)
    allowed = (
        "True, or training.likelihood_weighting, training.importance_weighting and training.debias "
        "False and training.time_law='': discrete levels are uniform, of weight 1"
    )
    require(not (levels and any(switches)), "training.continuous", False, allowed)
    if levels:
        return TimeLaw(Levels(sde, levels), noise_weight, stratified)
    allowed = (
        "False, or training.likelihood_weighting=False and training.importance_weighting=False: "
        "its proposal already weights by g²/σ²"
    )
    twice = debias and (likelihood_weighting or importance_weighting)
    require(not twice, "training.debias", debias, allowed)
    allowed = (
        "False, or training.likelihood_weighting=True: it is the proposal for the weight g²/σ²"
    )
    fits = likelihood_weighting or not importance_weighting
    require(fits, "training.importance_weighting", importance_weighting, allowed)
    switched = "debias" if debias else "importance" if importance_weighting else ""
    _check_name(name, switched, likelihood_weighting or debias)
    if not (likelihood_weighting or debias):
        return TimeLaw(Uniform(sde, smallest_time), noise_weight, stratified)
    return LIKELIHOOD_LAWS[name or switched or "uniform"](sde, smallest_time, stratified)


def _check_name(name: str, switched: str, weighted: bool) -> None:
    """A name must be known, go with the switches, and have the likelihood weight to propose for."""
    one_of("training.time_law", name, ["", *LIKELIHOOD_LAWS])
    allowed = (
        f"'' or {switched!r}, or training.importance_weighting=False and training.debias=False, "
        f"which mean {switched!r}"
    )
    fits = not name or not switched or name == switched
    require(fits, "training.time_law", name, allowed)
    allowed = "training.likelihood_weighting=True: it proposes times for the weight g²/σ²"
    require(weighted or name in ("", "uniform"), "training.time_law", name, allowed)


PerExampleLoss = Callable[[Params, Key[Array, ""], Batch], tuple[PerExample, dict[str, PerExample]]]


def score_matching(
    model: ScoreModel,
    encoding: Encoding,
    law: TimeLaw,
    terms: Terms,
    *,
    batch_size: int,
    train: bool,
    context_dropout: float = 0.0,
) -> PerExampleLoss:
    """The objective as one value per example.

    Args:
        model: network, SDE and parameterisation.
        encoding: integers to model space; dequantisation happens here, inside the jitted step.
        law: distribution and weight of t.
        terms: what is summed at (x_t, t).
        batch_size: global batch size, the number of strata of stratified times.
        train: apply dropout, and take terms for the fraction of examples and steps that they ask
            for; otherwise all terms of all examples.
        context_dropout: probability that an example is seen without its context in training, so
            that the network learns p(x), too.

    Returns:
        (params, rng, batch) → (w(t) (order 1 + weighted orders 2, 3) + weighted residual,
        unweighted terms). With `fokker_planck.every` > 1 a training batch must hold the number of
        the step as `step`.
    """
    sde = model.sde
    terms = terms if train else terms.everywhere()

    def per_example(
        params: Params, rng: Key[Array, ""], batch: Batch
    ) -> tuple[PerExample, dict[str, PerExample]]:
        key_data, key_time, key_noise, key_dropout, key_probe = jax.random.split(rng, NUM_KEYS)
        ids = batch["noise_id"]
        x0 = encoding.encode(batch["image"], fold_in_each(key_data, ids))
        law_now = law.at(batch) if train else law
        t = law_now.sample(key_time, batch, batch_size, x0.dtype)
        z = standard_normal(fold_in_each(key_noise, ids), x0)
        # Devices hold different ids, so their masks differ.
        key_dropout = jax.random.fold_in(key_dropout, ids[0])
        context = batch.get("context")
        if train and context_dropout > 0.0 and context is not None:
            context = without(context, _dropped(rng, ids, context_dropout))

        def score_of(rows: np.ndarray | slice) -> ScoreFn:
            known = None if context is None else context[rows]
            return model.score(params, key_dropout if train else None, context=known)

        x_t = sde.perturb(x0, t, z)
        point = Point(x_t, t, z, fold_in_each(key_probe, ids), model.target(x0, x_t, t, z))
        parts = _parts_of_step(terms, score_of, sde, point, batch)
        to_uniform = 1.0 / (law_now.proposal.density(t) * law_now.proposal.length)
        weight = law_now.weight(t, sde)
        values = terms.weighted(parts, sde, t, weight, to_uniform)
        if isinstance(law_now, BinnedLaw) and train:
            parts = parts | {"time_law": bin_moments(law_now, t, values / weight)}
        return values, parts

    return per_example


def _dropped(rng: Key[Array, ""], ids: Int[Array, " b"], rate: float) -> Bool[Array, " b"]:
    """Draw which examples lose their context, by a key other than those that rng is split into."""
    keys = fold_in_each(jax.random.fold_in(rng, NUM_KEYS), ids)
    return jax.vmap(lambda key: jax.random.bernoulli(key, rate))(keys)


def _parts_of_step(
    terms: Terms,
    score_of: Callable[[np.ndarray | slice], ScoreFn],
    sde: SDE,
    point: Point,
    batch: Batch,
) -> dict[str, PerExample]:
    """The parts; those of the residual at every n-th step only, times n."""
    residual, score_fn = terms.fokker_planck, score_of(slice(None))
    if residual is None or residual.every == 1:
        return terms.parts(score_fn, sde, point, score_of)
    others = dataclasses.replace(terms, fokker_planck=None)
    absent = dict.fromkeys(residual.names, jnp.zeros_like(point.t))

    def with_residual() -> dict[str, PerExample]:
        parts = terms.parts(score_fn, sde, point, score_of)
        return parts | {name: residual.every * parts[name] for name in residual.names}

    return jax.lax.cond(
        batch["step"] % residual.every == 0,
        with_residual,
        lambda: others.parts(score_fn, sde, point, score_of) | absent,
    )


def dequantizer_loss(
    dequantizer: FlowDequantizer,
    model: ScoreModel,
    proposal: Uniform | Importance,
    *,
    num_times: int,
) -> Callable[..., tuple[PerExample, dict[str, PerExample]]]:
    """E_{y ~ q(y|k)}[bound on −log p(y) + log q(y|k)] in bits/dim, one value per example.

    Returns:
        (parameters of the flow, rng, batch, frozen parameters of the score) → (bits/dim,
        {log_q: bits/dim by which q is denser than uniform noise}).

    Reference: Ho et al. 2019, https://arxiv.org/abs/1902.00275, eq. (6); Song et al. 2021,
    https://arxiv.org/abs/2101.09258, section 5.2.
    """
    encoding = dequantizer.encoding

    def per_example(
        params: Params, rng: Key[Array, ""], batch: Batch, score_params: Params
    ) -> tuple[PerExample, dict[str, PerExample]]:
        keys = fold_in_each(rng, batch["noise_id"])
        draw = dequantizer.draw(params, batch["image"], fold_in_all(keys, 0))
        bound = variational_bound(
            model.score(score_params, context=batch.get("context")), model.sde, draw.x,
            fold_in_all(keys, 1), proposal=proposal, num_times=num_times,
        )  # fmt: skip
        bits = encoding.negative_log_likelihood(-bound.nll - draw.log_q, draw.x)
        log_q = -encoding.negative_log_likelihood(
            draw.log_q - encoding.uniform_log_q(draw.x), draw.x
        )
        return bits, {"log_q": log_q}

    return per_example


def classifier_loss(
    log_prob: Callable[..., Float[Array, "b n"]],
    sde: SDE,
    encoding: Encoding,
    law: TimeLaw,
    *,
    batch_size: int,
    train: bool,
) -> PerExampleLoss:
    """−log p(c | x_t) of the class of every example, in nats, at times of the law, all of weight 1.

    The minimum is reached by the true p(c | x_t), whatever the law of the times.
    Reference: Dhariwal and Nichol 2021, https://arxiv.org/abs/2105.05233, section 4.

    Args:
        log_prob: (params, x_t, t, key of the dropout or None) ↦ log p(c | x_t) of all classes.
        sde: noises the examples.
        encoding: maps them to model space.
        law: draws the times.
        batch_size: global batch size, the number of strata of stratified times.
        train: apply dropout.

    Returns:
        (params, rng, batch with the classes as `context`) → (loss, {accuracy}).
    """

    def per_example(
        params: Params, rng: Key[Array, ""], batch: Batch
    ) -> tuple[PerExample, dict[str, PerExample]]:
        key_data, key_time, key_noise, key_dropout = jax.random.split(rng, 4)
        ids, truth = batch["noise_id"], batch["context"]
        x0 = encoding.encode(batch["image"], fold_in_each(key_data, ids))
        t = law.sample(key_time, batch, batch_size, x0.dtype)
        x_t = sde.perturb(x0, t, standard_normal(fold_in_each(key_noise, ids), x0))
        key = jax.random.fold_in(key_dropout, ids[0]) if train else None
        log_p = log_prob(params, x_t, t, key)
        chosen = jnp.argmax(log_p, axis=1).astype(truth.dtype)
        of_truth = jnp.take_along_axis(log_p, truth[:, None], axis=1)[:, 0]
        return -of_truth, {"accuracy": (chosen == truth).astype(log_p.dtype)}

    return per_example


def mean_loss(per_example: Callable[..., tuple[PerExample, dict[str, PerExample]]]) -> LossFn:
    """Mean over the batch; the metrics are `loss` and the mean of every unweighted part."""

    def loss_fn(
        params: Params, rng: Key[Array, ""], batch: Batch, *frozen: Params
    ) -> tuple[Float[Array, ""], Metrics]:
        values, parts = per_example(params, rng, batch, *frozen)
        loss = masked_mean(values, batch["mask"])
        means = {name: masked_mean(part, batch["mask"]) for name, part in parts.items()}
        return loss, {"loss": loss, **means}

    return loss_fn


def masked_mean(values: Float[Array, "b *s"], mask: Array) -> Float[Array, "*s"]:
    """Mean over the real examples [B, ...]; padding enters neither the sum nor the number."""
    count = jnp.sum(mask, dtype=values.dtype)
    real = jnp.where(jnp.expand_dims(mask, tuple(range(1, values.ndim))), values, 0.0)
    return jnp.sum(real, axis=0) / jnp.maximum(count, 1.0)
