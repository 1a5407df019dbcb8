"""The configs that `DensityModel` chooses by the kind and the number of the examples."""

import math

import jax
import numpy as np
from ml_collections import ConfigDict

from checks import require
from configs.mnist import sharp as images
from configs.table import vp as table

STEPS = ((2000, 2000), (5000, 4000), (math.inf, 10_000))  # below so many examples
EXACT_UP_TO = 16  # coordinates, whose divergence needs no probe


def of_reals(X: np.ndarray) -> ConfigDict:
    """Real values: more steps for more examples."""
    config, small = table.get_config(), X[0].size <= EXACT_UP_TO
    config.data.update(validation_fraction=0.0)
    config.training.update(n_iters=next(steps for most, steps in STEPS if len(X) < most))
    config.training.update(batch_size=_for_all_devices(min(256, len(X) // 4)))
    config.eval.update(num_steps=64, divergence="exact" if small else "rademacher")
    return config


def _for_all_devices(batch_size: int) -> int:
    """A batch of about this size that all devices share alike."""
    number = jax.device_count()
    return max(batch_size // number, 1) * number


def of_images(X: np.ndarray) -> ConfigDict:
    """Grey levels: the U-Net, with as many levels as the sides can be halved."""
    allowed = "uint8 images [n, H, W] or [n, H, W, C], or other types for a table of numbers"
    require(X.ndim in (3, 4), "X", f"{X.dtype} {X.shape}", allowed)
    config = images.get_config()
    halvings = next(k for k in (2, 1, 0) if all(side % 2**k == 0 for side in X.shape[1:3]))
    config.training.update(batch_size=_for_all_devices(config.training.batch_size))
    config.data.update(image_size=0, num_channels=1 if X.ndim == 3 else X.shape[3])
    config.model.update(channels=(32, 64, 96)[: halvings + 1], blocks=(1, 2, 2)[: halvings + 1])
    config.eval.update(enable_bpd=True, num_steps=32)
    return config
