"""From the output of a network to the score, and from time to what the network is told.

    score     s = net                      noise     s = −net/σ
    drift     s = net/g                    velocity  s = −(α net + σ x)/(σ (α² + σ²))
    scaled_score  s = net/σ

x_t = α x0 + σ z, velocity = α z − σ x0 (Salimans & Ho 2022). The networks know nothing of SDEs:
only this file and the heads divide by σ or g.

These take one number per coordinate. `HEADS` take several, or know the moments of the training
data; their arrays stand beside the network's in the parameters, {network, prior, …}.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

import marginals
from checks import in_section
from heads import Atoms, Cells, Levels
from models.conditioning import ContextArray, number_of_regressors, regressors
from models.layers import QUICK
from operators import Batched, PerExample, scale
from real_heads import Mixture, Whitened
from sde_lib import SDE

MOST_SLOPES = 2**22  # numbers of B; more are not stored with every state
LEAST_RESIDUAL = 0.1  # least scale of a residual in a mixture, in standard deviations of x
Params = Any
ScoreFn = Callable[[Batched, PerExample], Batched]
DecoderFn = Callable[[Batched, Batched, PerExample], PerExample]
Head = Cells | Atoms | Mixture | Whitened
Pairs = Iterator[tuple[np.ndarray, np.ndarray]]  # x [b, *d] and φ(c) [b, n], see `regressors`


def score_from_score(net: Batched, x: Batched, t: PerExample, sde: SDE) -> Batched:
    """Return s = net: the network predicts the score itself."""
    del x, t, sde
    return net


def score_from_scaled_score(net: Batched, x: Batched, t: PerExample, sde: SDE) -> Batched:
    """s = net/σ, of published networks with `scale_by_sigma` (Song & Ermon 2020)."""
    del x
    return scale(1.0 / sde.sigma(t), net)


def score_from_noise(net: Batched, x: Batched, t: PerExample, sde: SDE) -> Batched:
    """s = −net/σ: the network predicts z (Ho et al. 2020)."""
    del x
    return scale(-1.0 / sde.sigma(t), net)


def score_from_drift(net: Batched, x: Batched, t: PerExample, sde: SDE) -> Batched:
    """s = net/g: the network is the drift a = g s (Huang et al. 2021)."""
    del x
    return scale(1.0 / sde.g(t), net)


def score_from_velocity(net: Batched, x: Batched, t: PerExample, sde: SDE) -> Batched:
    """s = −ẑ/σ with ẑ = (α net + σ x)/(α² + σ²)."""
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    noise = scale(alpha, net) + scale(sigma, x)
    return scale(-1.0 / (sigma * (alpha**2 + sigma**2)), noise)


PARAMETERIZATIONS = {
    "score": score_from_score,
    "scaled_score": score_from_scaled_score,
    "noise": score_from_noise,
    "drift": score_from_drift,
    "velocity": score_from_velocity,
}

HEADS: dict[str, type[Head]] = {
    "cells": Cells,
    "atoms": Atoms,
    "mixture": Mixture,
    "whitened": Whitened,
}


def time_label(t: PerExample, sde: SDE, num_scales: int) -> PerExample:
    """999 t, the label of the published VP and sub-VP networks, whatever N is.

    In continuous time `num_scales` is the number of steps of a sampler. It may differ between
    training and sampling, and the network must not see that.
    """
    del sde, num_scales
    return 999.0 * t


def level_label(t: PerExample, sde: SDE, num_scales: int) -> PerExample:
    """(N − 1) t, the label of the published networks of N discrete levels (Ho et al. 2020).

    Equal to `time_label` at N = 1000, the number of levels of the published networks.
    """
    del sde
    return (num_scales - 1) * t


def unit_time_label(t: PerExample, sde: SDE, num_scales: int) -> PerExample:
    """t itself, the label of the published drift networks."""
    del sde, num_scales
    return t


def sigma_label(t: PerExample, sde: SDE, num_scales: int) -> PerExample:
    """σ(t), the label of the published VE networks."""
    del num_scales
    return sde.sigma(t)


def log_snr_label(t: PerExample, sde: SDE, num_scales: int) -> PerExample:
    """10 log(σ/α): equal steps for equal ratios of noise to signal, down to t_min."""
    del num_scales
    return 10.0 * (jnp.log(sde.sigma(t)) - jnp.log(sde.alpha(t)))


def reverse_index_label(t: PerExample, sde: SDE, num_scales: int) -> PerExample:
    """The nearest integer to (1 − t/T)(N − 1), as published for SMLD: 0 is the largest σ."""
    return jnp.round((1.0 - t / sde.T) * (num_scales - 1))


TIME_LABELS = {
    "time": time_label,
    "level": level_label,
    "unit_time": unit_time_label,
    "sigma": sigma_label,
    "log_snr": log_snr_label,
    "reverse_index": reverse_index_label,
}


@dataclasses.dataclass(frozen=True)
class ScoreModel:
    """A network, the SDE it belongs to and the meaning of its input and output."""

    network: nn.Module
    sde: SDE
    to_score: Callable[[Batched, Batched, PerExample, SDE], Batched] = score_from_noise
    label: Callable[[PerExample, SDE, int], PerExample] = time_label
    num_scales: int = 1000

    @in_section("model")
    def init(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Params:
        """Parameters for examples of the given shape.

        Raises:
            FieldError: the network has no values for examples of this shape.
        """
        if isinstance(key, jax.core.Tracer):
            return self.init_in_order(key, shape)
        # Compiled as a whole, without care: it runs once, and op by op takes many times as long.
        init = jax.jit(self.init_in_order, static_argnums=1, compiler_options=QUICK)
        return init(key, shape)

    def init_in_order(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Params:
        """The same, not compiled: a dict in order of evaluation."""
        x, t = jnp.zeros((1, *shape)), jnp.ones((1,))
        return self.network.init(key, x, self.label(t, self.sde, self.num_scales))["params"]

    def score(
        self,
        params: Params,
        dropout_key: Key[Array, ""] | None = None,
        *,
        context: ContextArray | None = None,
    ) -> ScoreFn:
        """s(x, t), of p(x | c) for the context c of every example, at these parameters.

        Dropout is on when a key is given, one mask per key. Without a context this is the score of
        p(x), of a network that has contexts if it was trained for both.
        """

        def score_fn(x: Batched, t: PerExample) -> Batched:
            net = self._output(params, x, t, dropout_key, context)
            return self.to_score(net, x, t, self.sde)

        return score_fn

    def decoder(self, params: Params, *, context: ContextArray | None = None) -> DecoderFn | None:
        """(x0, x_t, t) ↦ log p(x0 | x_t) − log N(x_t/α; x0, σ²/α² I) of a head that has one."""
        del params, context
        return None

    def log_probability(
        self, params: Params, *, context: ContextArray | None = None
    ) -> DecoderFn | None:
        """(x0, x_t, t) ↦ log P(levels of x0 | x_t) of a head of atoms."""
        del params, context
        return None

    def target(self, x0: Batched, x: Batched, t: PerExample, z: Batched) -> Batched:
        """Return the noise z, which −σ s is matched to at x = α x0 + σ z."""
        del x0, x, t
        return z

    def _output(
        self,
        params: Params,
        x: Batched,
        t: PerExample,
        dropout_key: Key[Array, ""] | None,
        context: ContextArray | None,
        features: Array | None = None,
    ) -> Array:
        """The output of the network at its parameters."""
        train = dropout_key is not None
        rngs = {"dropout": dropout_key} if train else None
        label = self.label(t, self.sde, self.num_scales)
        more = {"features": features, "context": context}
        given: dict[str, Any] = {name: value for name, value in more.items() if value is not None}
        net: Any = self.network.apply({"params": params}, x, label, train=train, rngs=rngs, **given)
        return net


@dataclasses.dataclass(frozen=True)
class HeadModel(ScoreModel):
    """A network with a head: its parameters are {network, prior, and what the head learns}.

    Of p(x | c) of real values the head describes what the regression of x on c leaves over. With
    φ(c) from `regressors` and B = prior["slope"], [n, *d],

        s(x, t | c) = s_head(x − α φ(c) B, t | c),   log p(x0 | x_t, c) = the same of x0 − φ(c) B

    because noise is added to x0 − φ(c) B as it is to x0.
    """

    head: Head = dataclasses.field(kw_only=True)

    def regressors(self, shape: tuple[int, ...]) -> int:
        """The number n of the columns of φ(c); 0: there is no regression of x of this shape."""
        if isinstance(self.head, Levels):
            return 0
        number = number_of_regressors(getattr(self.network, "context", None))
        return number if number * math.prod(shape) <= MOST_SLOPES else 0

    def prior_of_reals(
        self, shape: tuple[int, ...], pairs: Callable[[], Pairs], *, is_marginal: bool
    ) -> dict[str, Any]:
        """The prior of a head of real values, from the training data in model space.

        Args:
            shape: of one example.
            pairs: starts a pass through batches of examples x [b, *d] and their φ(c) [b, n].
            is_marginal: the model gives p(x), too. B is then zero: a head of residuals would be too
                narrow for x without a context.
        """
        head = self.head
        assert isinstance(head, Mixture | Whitened)
        number = self.regressors(shape)
        if not number:
            return head.prior(shape, (x for x, _ in pairs()))
        slope = np.zeros((number, *shape))
        if not is_marginal:
            slope = marginals.slope(pairs()).reshape(slope.shape)
        residuals = (x - np.tensordot(known, slope, axes=1) for x, known in pairs())
        if isinstance(head, Mixture):
            spread = marginals.moments((x for x, _ in pairs()), full=False).variances ** 0.5
            prior = head.prior(shape, residuals, LEAST_RESIDUAL * spread)
        else:
            prior = head.prior(shape, residuals)
        return prior | {"slope": jnp.asarray(slope, jnp.result_type(float))}

    def init_in_order(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Params:
        """The network's parameters, and the arrays of the head before it has seen data."""
        x, t, arrays = jnp.zeros((1, *shape)), jnp.ones((1,)), self.head.arrays(shape)
        inputs, features = self.head.inputs(arrays, x, t, self.sde)
        if number := self.regressors(shape):
            arrays["prior"]["slope"] = jnp.zeros((number, *shape))
        more: dict[str, Any] = {} if features is None else {"features": features}
        label = self.label(t, self.sde, self.num_scales)
        return {"network": self.network.init(key, inputs, label, **more)["params"]} | arrays

    def score(
        self,
        params: Params,
        dropout_key: Key[Array, ""] | None = None,
        *,
        context: ContextArray | None = None,
    ) -> ScoreFn:
        """s(x, t) at these parameters, as of any `ScoreModel`."""
        outputs, arrays, mean = self._bound(params, dropout_key, context)

        def score_fn(x: Batched, t: PerExample) -> Batched:
            x = x - mean(x, self.sde.alpha(t))
            return self.head.score(arrays, outputs(x, t), x, t, self.sde)

        return score_fn

    def decoder(self, params: Params, *, context: ContextArray | None = None) -> DecoderFn | None:
        """(x0, x_t, t) ↦ log p(x0 | x_t) − log N(x_t/α; x0, σ²/α² I) of cells and mixtures."""
        head = self.head
        if not isinstance(head, Cells | Mixture):
            return None
        outputs, arrays, mean = self._bound(params, None, context)

        def decoder(x0: Batched, x: Batched, t: PerExample) -> PerExample:
            alpha = self.sde.alpha(t)
            x0, x = x0 - mean(x0, jnp.ones_like(alpha)), x - mean(x, alpha)
            return head.log_ratio(arrays, outputs(x, t), x0, x, t, self.sde)

        return decoder

    def target(self, x0: Batched, x: Batched, t: PerExample, z: Batched) -> Batched:
        """Return what −σ s is matched to: z, or for cells the noise known from x_t and cell."""
        head = self.head
        return head.known_noise(x0, x, t, self.sde) if isinstance(head, Cells) else z

    def log_probability(
        self, params: Params, *, context: ContextArray | None = None
    ) -> DecoderFn | None:
        """(x0, x_t, t) ↦ log P(levels of x0 | x_t) of atoms."""
        head = self.head
        if not isinstance(head, Atoms):
            return None
        outputs, arrays, _ = self._bound(params, None, context)
        return lambda x0, x, t: head.log_probability(arrays, outputs(x, t), x0, x, t, self.sde)

    def _bound(
        self, params: Params, dropout_key: Key[Array, ""] | None, context: ContextArray | None
    ) -> tuple[ScoreFn, dict[str, Any], Callable[[Batched, PerExample], Batched | float]]:
        """Return the network's output of (x, t), the arrays of the head, and α φ(c) B of (x, α).

        The prior is not trained: it is what the data say before any network. To train it, too, made
        no difference on the digits (docs/results.md).
        """
        arrays = {name: leaf for name, leaf in params.items() if name != "network"}
        arrays["prior"] = prior = jax.lax.stop_gradient(arrays["prior"])
        slope = prior.get("slope") if isinstance(prior, dict) else None

        def outputs(x: Batched, t: PerExample) -> Array:
            inputs, features = self.head.inputs(arrays, x, t, self.sde)
            return self._output(params["network"], inputs, t, dropout_key, context, features)

        def mean(like: Batched, alpha: PerExample) -> Batched | float:
            if slope is None:
                return 0.0
            given = regressors(self.network.context, context, like)
            found = jnp.tensordot(given, slope, axes=1, precision=jax.lax.Precision.HIGHEST)
            return scale(alpha, found)

        return outputs, arrays, mean
