"""TrainState, the optimizer chain, the moving average, and one train step for every objective.

    g ← pmean(1/n Σ_i ∇L_i);  g ← g min(1, c/‖g‖)
    θ ← θ − η_k (Adam(g) + λ θ);  θ̄ ← r_k θ̄ + (1 − r_k) θ
    η_k = η min(k/warmup, 1) × schedule(k),   r_k = min(r, (2 + k)/(11 + k))

at the step that k steps precede, L_i the loss of microbatch i of n.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from checks import one_of, rate, require
from losses import NUM_BINS, Batch, LossFn, Metrics
from parameterization import Params

OF_THE_STEP = ("step", "time_law")  # what a batch holds once, and not per example
MOMENTS_RATE = 0.99  # of the moving average of the moments of an adaptive law of times
# (state, seed key, batch, *frozen) → (state, metrics), for one step or for several.
Step = Callable[..., tuple["TrainState", Metrics]]

SCHEDULES: dict[str, Callable[[int], optax.Schedule]] = {
    "constant": lambda num_steps: optax.constant_schedule(1.0),
    "cosine": lambda num_steps: optax.cosine_decay_schedule(1.0, num_steps),
}


class TrainState(flax.struct.PyTreeNode):
    """Everything that training changes; arrays only, no keys.

    Annotated loosely, since transformations also store None and shapes in the leaves.
    """

    step: Any  # int32 scalar: steps taken
    params: Params
    ema_params: Params
    opt_state: Any
    time_law: Any = None  # of an adaptive law of times: [2, bins], Σ h² and Σ 1 of its bins


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The fields of the `optim` section of a config.

    Adam as published: β = (beta1, beta2), eps outside the square root, warm-up from a first step of
    zero, gradients clipped to global norm `grad_clip` (negative: not clipped), decoupled weight
    decay.
    """

    optimizer: str
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    warmup: int
    grad_clip: float
    schedule: str

    def __post_init__(self) -> None:
        require(self.optimizer.lower() == "adam", "optim.optimizer", self.optimizer, "'Adam'")
        one_of("optim.schedule", self.schedule, SCHEDULES)
        require(self.lr > 0, "optim.lr", self.lr, "more than 0")
        for name in ("warmup", "eps", "weight_decay"):
            require(getattr(self, name) >= 0, f"optim.{name}", getattr(self, name), "0 or more")
        for name in ("beta1", "beta2"):
            rate(f"optim.{name}", getattr(self, name))
        allowed = "another value: 0 would stop all learning, a negative one switches clipping off"
        require(self.grad_clip != 0, "optim.grad_clip", self.grad_clip, allowed)

    def learning_rate(self, num_steps: int) -> optax.Schedule:
        """η_k over a run of `num_steps` steps."""
        shape = SCHEDULES[self.schedule](num_steps)
        warmup = max(self.warmup, 1)
        ramp_from = 0 if self.warmup else 1  # no warm-up: the first step counts in full
        return lambda k: self.lr * jnp.minimum((k + ramp_from) / warmup, 1.0) * shape(k)

    def chain(self, num_steps: int) -> optax.GradientTransformation:
        """The optax chain; its state has the same structure whatever the numbers are."""
        clip = (
            optax.clip_by_global_norm(self.grad_clip) if self.grad_clip >= 0 else optax.identity()
        )
        return optax.chain(
            clip,
            optax.scale_by_adam(b1=self.beta1, b2=self.beta2, eps=self.eps),
            decayed_weights(self.weight_decay),
            optax.scale_by_learning_rate(self.learning_rate(num_steps)),
        )


def decayed_weights(rate: float) -> optax.GradientTransformation:
    """Add rate × parameter to every update, but those of the prior of a head, which stays."""

    def add(path: tuple, update: jax.Array, param: jax.Array) -> jax.Array:
        return update if path[0] == jax.tree_util.DictKey("prior") else update + rate * param

    return optax.stateless(functools.partial(jax.tree_util.tree_map_with_path, add))


def create(
    params: Params, optimizer: optax.GradientTransformation, *, adaptive: bool = False
) -> TrainState:
    """State before the first step; the moving average starts at the parameters.

    With `adaptive` all bins of the law of times have the same mass at first.
    """
    copy = jax.tree.map(jnp.array, params)
    moments = equal_moments() if adaptive else None
    return TrainState(jnp.zeros((), jnp.int32), params, copy, optimizer.init(params), moments)


def equal_moments() -> Float[Array, "2 n"]:
    """Return the moments that an adaptive law of times starts with: h² = 1 in every bin."""
    return jnp.ones((2, NUM_BINS), jnp.float32)


def moving_average_rate(ema_rate: float, step: Int[Array, ""]) -> Float[Array, ""]:
    """r_k = min(r, (2 + k)/(11 + k)): a short run forgets where it started, a long one has r.

    Reference: score_sde_pytorch, models/ema.py; the published JAX codes have r from the start.
    """
    k = step.astype(jnp.float32)
    return jnp.minimum(ema_rate, (2.0 + k) / (11.0 + k))


def accumulated_gradient(loss_fn: LossFn, num_microbatches: int) -> Callable[..., tuple]:
    """(params, rng, batch, *frozen) → (gradient, metrics) of the mean over the batch.

    Of one part after the other, so that the memory is that of one part, B/n consecutive examples.
    The noise of an example depends on its `noise_id` alone: the sum is that of the whole batch, but
    for dropout masks and rounding.

    On CPU the loop is written out: XLA computes the gradients of convolutions inside a loop about
    thirty times more slowly there.
    """
    gradient = jax.grad(loss_fn, has_aux=True)
    if num_microbatches == 1:
        return gradient

    def accumulated(params: Params, rng: Key[Array, ""], batch: Batch, *frozen: Any) -> tuple:
        shared = {name: leaf for name, leaf in batch.items() if name in OF_THE_STEP}
        parts = {
            name: leaf.reshape(num_microbatches, -1, *leaf.shape[1:])
            for name, leaf in batch.items()
            if name not in shared
        }

        def add(total: Any, part: Batch) -> tuple[Any, None]:
            # Written out, no part begins before the one before it has ended.
            here, _ = jax.lax.optimization_barrier((params, total))
            found = gradient(here, rng, part | shared, *frozen)
            return jax.tree.map(jnp.add, total, found), None

        first = jax.tree.map(lambda leaf: leaf[0], parts)
        like = jax.eval_shape(gradient, params, rng, first | shared, *frozen)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
        unroll = jax.default_backend() == "cpu"
        total, _ = jax.lax.scan(add, zeros, parts, unroll=unroll)
        return jax.tree.map(lambda leaf: leaf / num_microbatches, total)

    return accumulated


def train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    ema_rate: float,
    axis_name: str,
    num_microbatches: int = 1,
) -> Step:
    """One step on one device: (state, seed key, its part of the batch, *frozen) → (state, metrics).

    `frozen` is what the loss needs beside its parameters and its batch. The key of step k is
    fold_in(seed key, k), and the loss finds k in the batch as `step`. Parts of equal size: the mean
    over devices is the mean over the batch.
    """
    gradient = accumulated_gradient(loss_fn, num_microbatches)

    def step_fn(state: TrainState, seed_key: Key[Array, ""], batch: Batch, *frozen: Any) -> tuple:
        rng = jax.random.fold_in(seed_key, state.step)
        known = {"step": state.step, "time_law": state.time_law}
        grads, metrics = gradient(state.params, rng, batch | known, *frozen)
        grads, metrics = jax.lax.pmean((grads, metrics), axis_name)
        moments = metrics.pop("time_law", None)
        if moments is not None:
            rate = moving_average_rate(MOMENTS_RATE, state.step)
            moments = rate * state.time_law + (1.0 - rate) * moments
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        rate = moving_average_rate(ema_rate, state.step)
        ema_params = optax.incremental_update(params, state.ema_params, 1.0 - rate)
        # The norm of the new parameters: finite exactly when what a checkpoint would hold is.
        norms = {"grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(params)}
        metrics = metrics | norms
        return TrainState(state.step + 1, params, ema_params, opt_state, moments), metrics

    return step_fn


def single_step(step_fn: Step) -> Step:
    """One step per dispatch: batch leaves are [1, B, ...], metrics come back as [1].

    Not a scan of length one: on CPU, XLA computes the gradients of convolutions inside a scan about
    thirty times more slowly.
    """

    def stepped(state: TrainState, seed_key: Key[Array, ""], batches: Batch, *frozen: Any) -> tuple:
        first = jax.tree.map(lambda leaf: leaf[0], batches)
        state, metrics = step_fn(state, seed_key, first, *frozen)
        return state, jax.tree.map(lambda metric: metric[None], metrics)

    return stepped


def many_steps(step_fn: Step) -> Step:
    """Several steps in one dispatch: batch leaves are [n, B, ...], metrics come back as [n].

    A batch whose mask is empty ends the steps, so that one program takes any number of them up to
    n. Not a scan: XLA rounds otherwise in loops of another length, and a resumed run, whose
    dispatches may have other lengths, would differ from an uninterrupted one in its last bits.
    """

    def looped(state: TrainState, seed_key: Key[Array, ""], batches: Batch, *frozen: Any) -> tuple:
        def step(number: Array, carry: tuple[TrainState, Any]) -> tuple[TrainState, Any]:
            batch = jax.tree.map(lambda leaf: leaf[number], batches)
            state, found = step_fn(carry[0], seed_key, batch, *frozen)
            return state, jax.tree.map(lambda all, one: all.at[number].set(one), carry[1], found)

        first = jax.tree.map(lambda leaf: leaf[0], batches)
        _, found = jax.eval_shape(step_fn, state, seed_key, first, *frozen)
        length = len(batches["mask"])
        metrics = jax.tree.map(lambda one: jnp.zeros((length, *one.shape), one.dtype), found)
        count = jnp.sum(jnp.any(batches["mask"], axis=1))
        return jax.lax.fori_loop(0, count, step, (state, metrics))

    return looped
