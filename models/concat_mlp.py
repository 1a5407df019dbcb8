"""Plain perceptron on [x, label] for x of any shape [B, *d], d flattened inside.

    h_0 = [x, label],   h_{l+1} = act(W_l h_l + b_l),   out = W_L h_L + b_L,   L = depth
    W_l, b_l ~ U(−1/√fan_in, 1/√fan_in)

The drift network of the swiss-roll study of plug-in reverse SDEs: 33,794 parameters for d = 2. The
label enters as it comes, so it should be of order one (`unit_time`). The law of the start, for
weights and biases alike, is the default of the published code's framework, not Flax's.
Reference: Huang et al. 2021, https://arxiv.org/abs/2106.02808, figure 5 (code: swiss roll).
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Initializer
from jaxtyping import Array, Float

from models.layers import ACTIVATIONS
from models.network import Network


def uniform_init(fan_in: int) -> Initializer:
    """U(−1/√fan_in, 1/√fan_in), whatever the shape: a bias has the fan-in of its layer."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


class ConcatMLP(Network):
    """Perceptron with `depth` hidden layers of width `hidden` and an affine output.

    Attributes:
        hidden: width.
        depth: number of hidden layers.
        activation: a name in `layers.ACTIVATIONS`.

    Raises:
        ValueError: a field has a value that is not allowed; names the field and what is allowed.
    """

    hidden: int = 128
    depth: int = 3
    activation: str = "swish"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b *d"], label: Float[Array, " b"], train: bool = False
    ) -> Float[Array, "b *d"]:
        """Map x: [B, *d] and label: [B] to [B, *d]; `train` changes nothing."""
        del train
        dim = math.prod(x.shape[1:])
        h = jnp.concatenate([x.reshape(x.shape[0], dim), label[:, None]], axis=1)
        for _ in range(self.depth):
            h = ACTIVATIONS[self.activation](self._affine(h, self.hidden))
        return self._affine(h, dim).reshape(x.shape)

    def _affine(self, h: Float[Array, "b i"], features: int) -> Float[Array, "b o"]:
        init = uniform_init(h.shape[1])
        return nn.Dense(features, kernel_init=init, bias_init=init)(h)
