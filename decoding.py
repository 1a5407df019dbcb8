"""Splits that are decoded by TensorFlow when they are asked for, from image files or records."""

import pathlib
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np

from lazy_tensorflow import tensorflow
from streams import Finite, Shape
from tfrecords import Records

Decode = Callable[["tf.Tensor"], "tf.Tensor"]  # (file name or record) → uint8 image


def _on_demand(
    decode: Decode,
    inputs: Callable[[np.ndarray], np.ndarray],
    size: int,
    name: Callable[[int], str],
    files: Iterable[pathlib.Path],
) -> Finite:
    """Decode examples when they are asked for, and name one that cannot be decoded."""
    tf = tensorflow()
    decode_all = partial(tf.map_fn, decode, fn_output_signature=tf.uint8)
    decode_all = tf.function(decode_all, input_signature=[tf.TensorSpec([None], tf.string)])

    def examples(ids: np.ndarray) -> np.ndarray:
        given = inputs(ids)
        try:
            return decode_all(given).numpy()
        except tf.errors.OpError:
            for number, one in zip(ids, given, strict=True):
                if problem := _problem(decode, one):
                    raise ValueError(f"{name(number)} is damaged or gone: {problem}") from None
            raise

    return Finite(size, examples, known_by=tuple(files))


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

    def decode(name: "tf.Tensor") -> "tf.Tensor":
        image = tf.io.decode_image(tf.io.read_file(name), expand_animations=False)
        return tf.ensure_shape(image, shape)

    return _on_demand(
        decode, names.__getitem__, len(names), lambda number: str(paths[number]), paths
    )


Prepare = Callable[["tf.Tensor", int], "tf.Tensor"]  # (uint8 image, size) → [size, size, 3]


def as_stored(image: "tf.Tensor", size: int) -> "tf.Tensor":
    """Leave the image as it is."""
    del size
    return image


def celeba_crop(image: "tf.Tensor", size: int) -> "tf.Tensor":
    """Resize the central 140×140 pixels of a face by an antialiased bilinear filter."""
    tf = tensorflow()
    image = tf.image.resize_with_crop_or_pad(image, 140, 140)
    return _to_uint8(tf.image.resize(image, (size, size), antialias=True))


def centre_square(image: "tf.Tensor", size: int) -> "tf.Tensor":
    """Resize the central square as published: bilinear to 128 and below, bicubic above."""
    tf = tensorflow()
    side = tf.minimum(tf.shape(image)[0], tf.shape(image)[1])
    image = tf.image.resize_with_crop_or_pad(image, side, side)
    method = "bilinear" if size <= 128 else "bicubic"
    return _to_uint8(tf.image.resize(image, (size, size), method, antialias=True))


def _to_uint8(image: "tf.Tensor") -> "tf.Tensor":
    """Round to [0, 255], which a bicubic filter leaves, and which a mere cast would wrap around."""
    tf = tensorflow()
    return tf.cast(tf.clip_by_value(tf.round(image), 0.0, 255.0), tf.uint8)


def of_records(records: Records, parse: Decode, prepare: Prepare, size: int) -> Finite:
    """Make a split of records: `parse` decodes one, `prepare` gives it the size [size, size, 3]."""
    tf = tensorflow()

    def one(record: "tf.Tensor") -> "tf.Tensor":
        return tf.ensure_shape(prepare(parse(record), size), (size, size, 3))

    def read(ids: np.ndarray) -> np.ndarray:
        return np.array(records[ids], object)

    return _on_demand(one, read, len(records), records.name, records.paths)
