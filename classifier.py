"""Features of images from a small classifier that is trained here, in about a minute.

    h = silu(W₁ c(x) + b₁) ∈ R⁶⁴,   logits = W₂ h + b₂,   c: 3×3 convolutions, halving down to 4×4
    features h/√(mean h² over the training images), for the kernel of KID has a scale

For labelled sets where Inception is no use (digits) or cannot be had. Distances between these
features order models of one data set; they are not comparable with FID, and carry another name.
Training is deterministic (same images, labels, recipe and kind of device: same parameters), and the
result is kept in a file whose name is a hash of all that it depends on.
"""

import dataclasses
import hashlib
import itertools
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

import npz_files
from streams import Dataset, Finite

logger = logging.getLogger("fokker")
VERSION = 1  # of everything below that changes the parameters; part of the hash
STEPS, BATCH_SIZE, LEARNING_RATE, WIDTH = 800, 128, 2e-3, 64
Images = np.ndarray  # uint8 [n, H, W, C]


class Network(nn.Module):
    """Convolutions, halving the size until it is at most 4; one hidden layer; logits."""

    classes: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b 64"], Float[Array, "b k"]]:
        """Penultimate features and logits."""
        x, width = nn.silu(nn.Conv(16, (3, 3))(x)), 32
        while x.shape[1] > 4:
            x, width = nn.silu(nn.Conv(width, (3, 3), strides=(2, 2))(x)), 64
        h = nn.silu(nn.Dense(WIDTH)(x.reshape(x.shape[0], -1)))
        return h, nn.Dense(self.classes)(h)


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A trained classifier: images to features [n, 64] and logits [n, classes]."""

    identity: str  # a hash of data and recipe
    params: Any
    scale: float  # √ of the mean of h² over the training images
    accuracy: float  # on the test split
    num_test: int
    apply: Callable  # (params, uint8 [B, H, W, C]) → features and logits

    def __call__(self, images: Images) -> tuple[np.ndarray, np.ndarray]:
        """Features and logits of any number of images."""
        found = []
        for first in range(0, len(images), BATCH_SIZE):
            batch = images[first : first + BATCH_SIZE]
            padded = np.concatenate([batch, np.repeat(batch[-1:], BATCH_SIZE - len(batch), axis=0)])
            found.append([np.asarray(y)[: len(batch)] for y in self.apply(self.params, padded)])
        features, logits = zip(*found, strict=True)
        return np.concatenate(features) / np.float32(self.scale), np.concatenate(logits)


def trained(dataset: Dataset, folder: Path, num_steps: int = STEPS) -> Classifier:
    """The classifier of a labelled set, from its file in the folder or trained now.

    Raises:
        ValueError: the set has no labels, or the file is damaged.
    """
    train, test = _labelled(dataset)
    identity = _identity(dataset, num_steps)
    path = folder / f"classifier_{identity}.npz"
    network = Network(1 + int(train.labels.max()))
    apply = _apply(network, dataset.levels)
    if path.exists():
        arrays = npz_files.read(path, ("scale", "accuracy"))
        params = _from_arrays(arrays, network, dataset.shape, path)
        scale, accuracy = float(arrays["scale"]), float(arrays["accuracy"])
        return Classifier(identity, params, scale, accuracy, dataset.test.size, apply)
    logger.info("training the classifier of %s, %d steps", dataset.name, num_steps)
    params = _train(network, dataset, apply, num_steps)
    raw = Classifier(identity, params, 1.0, math.nan, dataset.test.size, apply)
    features = np.concatenate([h for h, _ in _of_split(raw, train)])
    guesses = np.concatenate([y.argmax(axis=1) for _, y in _of_split(raw, test)])
    accuracy = float(np.mean(guesses == test.labels))
    scale = float(np.sqrt(np.square(features, dtype=np.float64).mean()))
    npz_files.write(path, _to_arrays(params) | {"scale": scale, "accuracy": accuracy})
    logger.info("wrote %s: accuracy %.4f on the test split", path, accuracy)
    return dataclasses.replace(raw, scale=scale, accuracy=accuracy)


def _labelled(dataset: Dataset) -> list[Finite]:
    """The training and the test split, which must have labels."""
    found = []
    for split, data in (("train", dataset.train), ("test", dataset.test)):
        if not isinstance(data, Finite) or data.labels is None:
            raise ValueError(
                f"eval.features='classifier': {dataset.name} has no labels of its {split} split "
                "(an .npz file needs y_train and y_test); need 'inception' or a SavedModel folder"
            )
        found.append(data)
    return found


def _identity(dataset: Dataset, num_steps: int) -> str:
    """A hash of recipe, images and labels."""
    recipe = (VERSION, num_steps, BATCH_SIZE, LEARNING_RATE, WIDTH, dataset.levels, dataset.shape)
    digest = hashlib.sha256(repr(recipe).encode())
    for split in ("train", "test"):
        for batch in dataset.eval_batches(split, batch_size=1000):
            digest.update(batch["image"][batch["mask"]].tobytes())
        digest.update(dataset.finite(split).labels.tobytes())
    return digest.hexdigest()[:12]


def _apply(network: Network, levels: int) -> Callable:
    def apply(params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = 2.0 * images.astype(jnp.float32) / (levels - 1) - 1.0
        features_and_logits: Any = network.apply(params, x)
        return features_and_logits

    return jax.jit(apply)


def _train(network: Network, dataset: Dataset, apply: Callable, num_steps: int) -> Any:
    """Cross-entropy, Adam, cosine decay; the batches of `streams` without flips."""
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, num_steps))

    def loss(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = apply(params, images)[1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(params: Any, state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
        updates, state = optimizer.update(jax.grad(loss)(params, images, labels), state)
        return optax.apply_updates(params, updates), state

    params = network.init(jax.random.key(0), jnp.zeros((1, *dataset.shape)))
    state, plain = optimizer.init(params), dataclasses.replace(dataset.finite("train"), flip=False)
    batches = plain.training_batches(0, seed=0, batch_size=BATCH_SIZE, part=slice(None))
    for batch in itertools.islice(batches, num_steps):
        params, state = step(params, state, batch["image"], plain.labels[batch["index"]])
    return jax.device_get(params)


def _of_split(classifier: Classifier, split: Finite) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for first in range(0, split.size, 1000):
        yield classifier(split.examples(np.arange(first, min(first + 1000, split.size))))


def _to_arrays(params: Any) -> npz_files.Arrays:
    return flax.traverse_util.flatten_dict(params, sep=".")


def _from_arrays(
    arrays: npz_files.Arrays, network: Network, shape: tuple[int, ...], path: Path
) -> Any:
    """The parameters, checked leaf by leaf."""
    like = jax.eval_shape(lambda: network.init(jax.random.key(0), jnp.zeros((1, *shape))))
    wanted = flax.traverse_util.flatten_dict(like, sep=".")
    wrong = [name for name, leaf in wanted.items()
             if name not in arrays or arrays[name].shape != leaf.shape]  # fmt: skip
    if wrong:
        raise ValueError(f"{path} does not fit the classifier, wrong: {wrong}; delete it")
    return flax.traverse_util.unflatten_dict({name: arrays[name] for name in wanted}, sep=".")
