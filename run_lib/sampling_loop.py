"""Any number of samples from a checkpoint, batch by batch over the devices."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from operators import fold_in_each
from run_lib import build, parallel
from run_lib.settings import Settings
from streams import Dataset


@dataclasses.dataclass
class Generator:
    """Samples as the data are: uint8 images or real points.

    Sample i depends on (key, i) only, but for the `langevin` corrector, whose step size is a mean
    over the batch.
    """

    settings: Settings
    dataset: Dataset
    key: jax.Array
    batch_size: int

    def __post_init__(self) -> None:
        sampler = build.sampler(self.settings)
        model = build.score_model(
            self.settings, on_levels=self.settings.sampling.method == "pc"
        )  # fmt: skip

        def generate(params: Any, key: jax.Array, ids: jax.Array) -> jax.Array:
            like = jnp.zeros((ids.shape[0], *self.dataset.shape), jnp.float32)
            samples = sampler(model.score(params), model.sde, fold_in_each(key, ids), like)
            return samples.x

        self._mapped = parallel.map_over_devices(generate, in_axes=(None, None, 0), out_axes=0)
        self._encoding = build.encoding(self.settings, self.dataset)

    def __call__(self, params: Any, number: int) -> np.ndarray:
        """`number` samples.

        Raises:
            FloatingPointError: a sample is not finite (the solver ran out of steps, or the network
                is not usable yet); names the samples.
        """
        devices = jax.local_device_count()
        size = min(self.batch_size, number)
        size = -(-size // devices) * devices
        batches = []
        for first in range(0, number, size):
            ids = np.arange(first, first + size, dtype=np.int32)
            x = parallel.join(self._mapped(params, self.key, parallel.split(ids)))[: number - first]
            bad = np.flatnonzero(~np.isfinite(x.reshape(len(x), -1)).all(axis=1))
            if bad.size:
                raise FloatingPointError(
                    f"{bad.size} of samples {first} to {first + len(x) - 1} are not finite (first: "
                    f"{(first + bad[:5]).tolist()}); raise sampling.rtol and sampling.atol, or use "
                    "sampling.method='pc'"
                )
            batches.append(np.asarray(self._encoding.decode(jnp.asarray(x))))
        return np.concatenate(batches)
