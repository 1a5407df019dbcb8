"""Passes through the training split for what is taken from it before training.

Standardisation, the priors of heads and the baselines are of the whole split, without augmentation
and in the order of the ids. Of an endless split they are of its first examples.
"""

import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

import real_arrays
import standardization
from dequantization import Encoding, Reals
from models.conditioning import number_of_regressors, regressors
from operators import fold_in_each
from splits import DataConfig
from streams import Context, Dataset

BATCH = 500
ENDLESS = 20_000  # examples that stand for an endless split


def pairs(dataset: Dataset) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Batches of examples [b, *d] as they are, and of their contexts [b, *c], None without."""
    if dataset.size("train") is None:
        batches = dataset.train_batches(batch_size=BATCH, seed=0, first_step=0)
        batches = itertools.islice(batches, ENDLESS // BATCH)
    else:
        batches = dataset.eval_batches("train", batch_size=BATCH)
    for batch in batches:
        there = batch["mask"]
        context = batch["context"][there] if "context" in batch else None
        yield batch["image"][there], context


def examples(dataset: Dataset) -> Iterator[np.ndarray]:
    """The same without contexts."""
    for image, _ in pairs(dataset):
        yield image


def encoded_pairs(
    dataset: Dataset, encoding: Encoding, context: Context | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The examples in model space, with noise in their cells, and the numbers of their contexts.

    The numbers [b, n] are those that regressions are on; n is 0 where there are none.
    """
    encode = _encoder(encoding)
    for image, given in pairs(dataset):
        x, known = encode(image), np.empty((len(image), 0))
        if number_of_regressors(context):
            known = np.asarray(regressors(context, jnp.asarray(given), jnp.asarray(x)))
        yield x, known


def _encoder(encoding: Encoding) -> Callable[[np.ndarray], np.ndarray]:
    """Return what encodes one batch after another; the noise is that of an example's number."""
    encode, first = jax.jit(encoding.encode), 0

    def encoded(image: np.ndarray) -> np.ndarray:
        nonlocal first
        keys = fold_in_each(jax.random.key(0), first + jnp.arange(len(image)))
        first += len(image)
        return np.asarray(encode(image, keys))

    return encoded


def encoding_of_reals(data: DataConfig, dataset: Dataset) -> Reals:
    """Real values, standardised by the training split.

    Raises:
        FieldError: a field of the data does not fit them.
    """
    shape, kind, found = dataset.shape, data.standardize, examples(dataset)
    widths, ends = real_arrays.cell_widths(data, shape), real_arrays.ends(data, shape)
    if ends is None:
        return Reals(standardization.fitted(kind, found, shape, widths), widths)
    # The map to the whole line changes the noise in the cells, so it is in these moments already.
    moved = map(_encoder(Reals(None, widths, ends)), found)
    return Reals(standardization.fitted(kind, moved, shape, None), widths, ends)
