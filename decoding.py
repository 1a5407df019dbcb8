"""Splits that are decoded by TensorFlow when they are asked for, from image files or records.

Batches of a split pass through a tf.data pipeline: the bytes of the chosen examples are read in
order, decoded in parallel, flipped where a coin says so, and put together again in order.
"""

import collections
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from array_records import ArrayRecords
from lazy_tensorflow import tensorflow
from streams import Chosen, Finite, Shape
from tfrecords import Records

if TYPE_CHECKING:
    from tensorflow import Tensor
    from tensorflow.data import Options

Decode = Callable[["Tensor"], "Tensor"]  # (file name or record) → uint8 image
Inputs = Callable[[np.ndarray], np.ndarray]  # ids → what is decoded
AHEAD = 2  # batches
MOST_THREADS = 32


class _Source:
    """Examples that are decoded from files."""

    def __init__(self, decode: Decode, inputs: Inputs, name: Callable[[int], str]) -> None:
        tf = tensorflow()
        self._decode, self._inputs, self._name = decode, inputs, name
        self._kinds = tf.TensorSpec([None], tf.string), tf.TensorSpec([None], tf.bool)
        self._decode_all = tf.function(self._batch, input_signature=self._kinds)

    def examples(self, ids: np.ndarray) -> np.ndarray:
        """Those examples, decoded now; a ValueError names one that cannot be decoded."""
        try:
            return self._decode_all(self._inputs(ids), np.zeros(len(ids), bool)).numpy()
        except tensorflow().errors.OpError:
            self._name_the_damaged(ids)
            raise

    def pipeline(self, asked: Iterator[Chosen]) -> Iterator[np.ndarray]:
        """The examples of one batch after another."""
        tf = tensorflow()
        waiting: collections.deque[np.ndarray] = collections.deque()
        failures: list[Exception] = []

        def read() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            try:
                for ids, flipped, _ in asked:
                    waiting.append(ids)
                    yield self._inputs(ids), flipped
            except (OSError, ValueError) as error:  # TensorFlow would pass its text on, no more
                failures.append(error)

        batches = tf.data.Dataset.from_generator(read, output_signature=self._kinds)
        batches = batches.map(self._batch, tf.data.AUTOTUNE, deterministic=True)
        batches = batches.prefetch(AHEAD).with_options(_options())
        try:
            for batch in batches.as_numpy_iterator():
                yield batch
                waiting.popleft()
        except tf.errors.OpError:
            self._name_the_damaged(waiting[0])
            raise
        if failures:
            raise failures[0]

    def _batch(self, given: "Tensor", flipped: "Tensor") -> "Tensor":
        """Decode the images of a batch, several at a time."""
        tf = tensorflow()

        def one(pair: tuple["Tensor", "Tensor"]) -> "Tensor":
            image = self._decode(pair[0])
            return tf.cond(pair[1], lambda: tf.reverse(image, [1]), lambda: image)

        return tf.map_fn(one, (given, flipped), fn_output_signature=tf.uint8)

    def _name_the_damaged(self, ids: np.ndarray) -> None:
        for number in ids:
            if problem := _problem(self._decode, self._inputs(np.array([number]))[0]):
                raise ValueError(f"{self._name(number)} is damaged or gone: {problem}") from None


def _options() -> "Options":
    """Threads of its own, no more than the host has, so that JAX keeps its own."""
    options = tensorflow().data.Options()
    options.threading.private_threadpool_size = min(os.cpu_count() or 1, MOST_THREADS)
    options.threading.max_intra_op_parallelism = 1
    return options


def _on_demand(
    decode: Decode,
    inputs: Inputs,
    size: int,
    name: Callable[[int], str],
    files: Iterable[pathlib.Path],
) -> Finite:
    """A split whose examples are decoded from files."""
    source = _Source(decode, inputs, name)
    return Finite(size, source.examples, known_by=tuple(files), pipeline=source.pipeline)


def _problem(decode: Decode, given: bytes) -> str:
    """Say why one example cannot be decoded; '' if it can be."""
    try:
        decode(given)
    except tensorflow().errors.OpError as error:
        return error.message.splitlines()[0].rpartition("}} ")[2].partition(" [Op:")[0]
    return ""


def of_files(paths: list[pathlib.Path], shape: Shape) -> Finite:
    """Make a split of image files, all of this shape [H, W, C]."""
    tf, names = tensorflow(), np.array([bytes(path) for path in paths])

    def decode(name: "Tensor") -> "Tensor":
        image = tf.io.decode_image(tf.io.read_file(name), expand_animations=False)
        return tf.ensure_shape(image, shape)

    return _on_demand(
        decode, names.__getitem__, len(names), lambda number: str(paths[number]), paths
    )


Prepare = Callable[["Tensor", int], "Tensor"]  # (uint8 image, size) → [size, size, 3]


def as_stored(image: "Tensor", size: int) -> "Tensor":
    """Leave the image as it is."""
    del size
    return image


def celeba_crop(image: "Tensor", size: int) -> "Tensor":
    """Resize the central 140×140 pixels of a face by an antialiased bilinear filter."""
    tf = tensorflow()
    image = tf.image.resize_with_crop_or_pad(image, 140, 140)
    return _to_uint8(tf.image.resize(image, (size, size), antialias=True))


def centre_square(image: "Tensor", size: int) -> "Tensor":
    """Resize the central square as published: bilinear to 128 and below, bicubic above."""
    tf = tensorflow()
    side = tf.minimum(tf.shape(image)[0], tf.shape(image)[1])
    image = tf.image.resize_with_crop_or_pad(image, side, side)
    method = "bilinear" if size <= 128 else "bicubic"
    return _to_uint8(tf.image.resize(image, (size, size), method, antialias=True))


def _to_uint8(image: "Tensor") -> "Tensor":
    """Round to [0, 255], which a bicubic filter leaves, and which a mere cast would wrap around."""
    tf = tensorflow()
    return tf.cast(tf.clip_by_value(tf.round(image), 0.0, 255.0), tf.uint8)


def of_records(
    records: Records | ArrayRecords, parse: Decode, prepare: Prepare, size: int
) -> Finite:
    """Make a split of records: `parse` decodes one, `prepare` gives it the size [size, size, 3]."""
    tf = tensorflow()

    def one(record: "Tensor") -> "Tensor":
        return tf.ensure_shape(prepare(parse(record), size), (size, size, 3))

    def read(ids: np.ndarray) -> np.ndarray:
        return np.array(records[ids], object)

    return _on_demand(one, read, len(records), records.name, records.paths)
