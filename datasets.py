"""Data sets by name: where examples come from, and what is checked of them.

TensorFlow is imported for image files and records only, and never sees the GPU.
"""

import dataclasses
import difflib
import pathlib
import types
import zipfile
from collections.abc import Callable
from functools import partial

import numpy as np

from point_samplers import SAMPLERS
from streams import Dataset, Finite, Fresh, Sampler, Shape, require
from tfrecords import Records
from toy_data import LAWS


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The `data` section of the config; toy sets ignore the image fields."""

    dataset: str  # a name in DATASETS, in any case
    path: str  # .npz file, image folder, or tfds data folder ('' = where tfds keeps its data)
    image_size: int  # height = width; 0 = as stored
    num_channels: int
    levels: int  # grey levels: values are 0, …, levels − 1
    random_flip: bool  # flip training images left–right with probability ½
    centered: bool
    uniform_dequantization: bool
    logit: bool
    num_train: int  # the first so many examples; 0 = all (toy sets: fresh samples for ever)
    num_test: int  # the first so many examples; 0 = all (toy sets: at least 1)
    num_validation: int = 0  # training examples, drawn at random, that are a split of their own
    category: str = ""  # of lsun, as church_outdoor


def _points(config: DataConfig, sampler: Sampler) -> Dataset:
    require(config.path == "", "data.path", config.path, f"'' for {config.dataset}")
    number = config.num_validation
    require(number == 0, "data.num_validation", number, f"0 for {config.dataset}")
    require(config.num_train >= 0, "data.num_train", config.num_train, "at least 0")
    require(config.num_test >= 1, "data.num_test", config.num_test, "at least 1 for a toy set")

    def fixed(n: int, split: int) -> Finite:
        # Words [s] and [s, 0, 0] seed the same; no training batch has a fourth word, [seed, 0, k].
        return Finite(n, sampler(np.random.default_rng([0, 0, 0, split]), n).__getitem__)

    train = fixed(config.num_train, split=1) if config.num_train else Fresh(sampler)
    test, name = fixed(config.num_test, split=2), config.dataset.lower()
    law = LAWS[name]() if name in LAWS else None
    return Dataset(name, test.examples(np.arange(1)).shape[1:], None, train, test, law)


def _check_shape(where: object, shape: Shape, config: DataConfig) -> None:
    height, width, channels = shape
    fits = config.num_channels == channels and channels in (1, 3)
    expected = f"1 or 3, and as in {where}: {channels}"
    require(fits, "data.num_channels", config.num_channels, expected)
    expected = f"0 or as in {where}: {height}x{width} (resize the images beforehand)"
    fits = config.image_size == 0 or config.image_size == height == width
    require(fits, "data.image_size", config.image_size, expected)
    require(2 <= config.levels <= 256, "data.levels", config.levels, "2 to 256")


def _image_set(config: DataConfig, shape: Shape, train: Finite, test: Finite) -> Dataset:
    """The data set of the first num_train and num_test examples (0: all) of the splits."""

    def first(field: str, n: int, split: Finite) -> Finite:
        require(0 <= n <= split.size, field, n, f"0 (all) to {split.size}")
        n = n or split.size
        return Finite(n, split.examples, labels=None if split.labels is None else split.labels[:n])

    train, validation = _held_out(config, first("data.num_train", config.num_train, train))
    train = dataclasses.replace(train, flip=config.random_flip)
    test = first("data.num_test", config.num_test, test)
    name = config.dataset.lower()
    return Dataset(name, shape, config.levels, train, test, validation=validation)


def _held_out(config: DataConfig, train: Finite) -> tuple[Finite, Finite | None]:
    """Training and validation split: the latter is drawn at random, the same for every seed.

    Examples are often in order, by class or by writer: the last of them are like no others.
    """
    number = config.num_validation
    require(0 <= number < train.size, "data.num_validation", number, f"0 to {train.size - 1}")
    if number == 0:
        return train, None
    drawn = np.random.default_rng([0, 0, 0, 3]).permutation(train.size)
    rest, validation = (np.sort(ids) for ids in (drawn[number:], drawn[:number]))
    return _only(train, rest), _only(train, validation)


def _only(split: Finite, chosen: np.ndarray) -> Finite:
    """The chosen examples of a split."""
    labels = None if split.labels is None else split.labels[chosen]
    return Finite(len(chosen), lambda ids: split.examples(chosen[ids]), labels=labels)


def _check_array(key: str, array: np.ndarray, config: DataConfig) -> np.ndarray:
    """The uint8 images [n, H, W, C], checked; a missing channel axis is added."""
    if array.dtype != np.uint8:
        raise ValueError(f"{key} has dtype {array.dtype}: convert it to uint8, 0 to levels - 1")
    if array.ndim not in (3, 4) or array.size == 0:
        raise ValueError(f"{key} has shape {array.shape}: expected [n, H, W(, C)], not empty")
    array = array[..., None] if array.ndim == 3 else array
    _check_shape(key, array.shape[1:], config)
    expected = f"more than the largest value of {key}, {array.max()}"
    require(config.levels > array.max(), "data.levels", config.levels, expected)
    return array


def _check_labels(key: str, labels: np.ndarray | None, size: int) -> np.ndarray | None:
    """The classes of a split, int [n], checked."""
    if labels is None:
        return None
    fits = labels.shape == (size,) and np.issubdtype(labels.dtype, np.integer)
    if not fits or labels.min() < 0:
        raise ValueError(
            f"{key} is {labels.dtype} {labels.shape}: expected integers 0, 1, … [{size}], one for "
            "each image"
        )
    return labels.astype(np.int32)


Labels = tuple[np.ndarray | None, np.ndarray | None]  # of train and test


def _arrays(
    config: DataConfig,
    source: str,
    train: np.ndarray,
    test: np.ndarray,
    labels: Labels = (None, None),
) -> Dataset:
    train = _check_array(f"x_train of {source}", train, config)
    test = _check_array(f"x_test of {source}", test, config)
    shape, found = train.shape[1:], test.shape[1:]
    require(shape == found, f"x_test of {source}: shape", found, f"that of x_train, {shape}")
    keys = (f"y_train of {source}", f"y_test of {source}")
    splits = [
        Finite(len(x), x.__getitem__, labels=_check_labels(key, y, len(x)))
        for key, x, y in zip(keys, (train, test), labels, strict=True)
    ]
    return _image_set(config, shape, *splits)


def _digits(config: DataConfig) -> Dataset:
    """The 8×8 digits of scikit-learn, grey levels 0 to 16; every fifth is a test image."""
    from sklearn.datasets import load_digits

    require(config.path == "", "data.path", config.path, "'' for digits")
    require(config.levels == 17, "data.levels", config.levels, "17 for digits")
    digits = load_digits()
    images, classes = digits.images.astype(np.uint8), digits.target
    is_test = np.arange(len(images)) % 5 == 4
    labels = classes[~is_test], classes[is_test]
    return _arrays(config, "digits", images[~is_test], images[is_test], labels)


def _npz(config: DataConfig) -> Dataset:
    """The arrays x_train and x_test, uint8 [n, H, W] or [n, H, W, C], of an .npz file.

    Classes, y_train and y_test, may be there, too.
    """
    is_npz = pathlib.Path(config.path).is_file() and zipfile.is_zipfile(config.path)
    require(is_npz, "data.path", config.path, "an existing .npz file")
    with np.load(config.path, allow_pickle=False) as file:
        for key in ("x_train", "x_test"):
            if key not in file.files:
                raise ValueError(f"data.path={config.path!r} has no {key}, its keys: {file.files}")
        labels = [file[key] if key in file.files else None for key in ("y_train", "y_test")]
        return _arrays(config, config.path, file["x_train"], file["x_test"], tuple(labels))


def _tensorflow() -> types.ModuleType:
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    return tf


def _image_files(folder: pathlib.Path) -> list[pathlib.Path]:
    paths = (p for p in folder.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".bmp"))
    return sorted(paths, key=lambda p: p.relative_to(folder).as_posix())


def _header(path: pathlib.Path) -> tuple[int, int, int]:
    """(height, width, channels) of an image file, from its header."""
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG", "JPEG", "BMP")) as image:
            mode, (width, height) = image.mode, image.size
    except OSError as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    if mode not in ("L", "RGB"):
        raise ValueError(f"{path} has mode {mode}: convert it to 8-bit grey (L) or colour (RGB)")
    return height, width, 1 if mode == "L" else 3


def _files(paths: list[pathlib.Path], shape: Shape) -> Finite:
    """The split of these image files, decoded when asked for."""
    tf, names = _tensorflow(), np.array([bytes(path) for path in paths])

    def decode(name: "tf.Tensor") -> "tf.Tensor":
        image = tf.io.decode_image(tf.io.read_file(name), expand_animations=False)
        return tf.ensure_shape(image, shape)

    decode_all = partial(tf.map_fn, decode, fn_output_signature=tf.uint8)
    decode_all = tf.function(decode_all, input_signature=[tf.TensorSpec([None], tf.string)])
    return Finite(len(names), lambda ids: decode_all(names[ids]).numpy())


def _folder(config: DataConfig) -> Dataset:
    """Images below path/train and path/test, or below path with every tenth as a test image."""
    root = pathlib.Path(config.path)
    require(config.path != "" and root.is_dir(), "data.path", config.path, "an existing folder")
    require(config.levels == 256, "data.levels", config.levels, "256 for image files")
    if (root / "train").is_dir() and (root / "test").is_dir():
        train, test = _image_files(root / "train"), _image_files(root / "test")
    else:
        images = _image_files(root)
        train, test = [path for i, path in enumerate(images) if i % 10 != 9], images[9::10]
    expected = f"png, jpg or bmp for train and test, not {len(train)} and {len(test)}"
    require(len(train) > 0 < len(test), "data.path", config.path, expected)
    shape = _header(train[0])
    for path in train + test:
        if (found := _header(path)) != shape:
            raise ValueError(f"{path} is {found}, but {train[0]} is {shape}: expected equal images")
    _check_shape(root, shape, config)
    return _image_set(config, shape, _files(train, shape), _files(test, shape))


def _builder(config: DataConfig, name: str) -> "tfds.core.DatasetBuilder":
    """A tensorflow-datasets builder whose records are there."""
    _tensorflow()
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=config.path or None)
    try:
        builder.download_and_prepare()
    except Exception as error:
        advice = f"run `tfds build {name} --data_dir=DIR` where there is a network, copy DIR here"
        found = f"{name} is not in {builder.data_dir} and preparing it failed: {error!r}"
        raise ValueError(f"{found}; {advice} and set data.path=DIR") from error
    return builder


def _tfds(config: DataConfig, name: str, splits: tuple[str, str], shape: Shape) -> Dataset:
    """Two splits of small labelled images, in memory, in the order of the records."""
    _check_shape(name, shape, config)
    builder = _builder(config, name)
    import tensorflow_datasets as tfds

    def read(split: str) -> tuple[np.ndarray, np.ndarray]:
        in_order = tfds.ReadConfig(interleave_cycle_length=1)
        examples = builder.as_dataset(split=split, shuffle_files=False, read_config=in_order)
        pairs = examples.map(lambda example: (example["image"], example["label"])).batch(1000)
        images, labels = zip(*pairs.as_numpy_iterator(), strict=True)
        return np.concatenate(images), np.concatenate(labels)

    images, labels = zip(*map(read, splits), strict=True)
    return _arrays(config, name, *images, labels)


Prepare = Callable[["tf.Tensor", int], "tf.Tensor"]  # (uint8 image, size) → [size, size, 3]


def as_stored(image: "tf.Tensor", size: int) -> "tf.Tensor":
    """The image itself."""
    del size
    return image


def celeba_crop(image: "tf.Tensor", size: int) -> "tf.Tensor":
    """The central 140×140 pixels of a face, resized by an antialiased bilinear filter."""
    tf = _tensorflow()
    image = tf.image.resize_with_crop_or_pad(image, 140, 140)
    return _to_uint8(tf.image.resize(image, (size, size), antialias=True))


def centre_square(image: "tf.Tensor", size: int) -> "tf.Tensor":
    """The central square, antialiased: bilinear to 128 and below, bicubic above, as published."""
    tf = _tensorflow()
    side = tf.minimum(tf.shape(image)[0], tf.shape(image)[1])
    image = tf.image.resize_with_crop_or_pad(image, side, side)
    method = "bilinear" if size <= 128 else "bicubic"
    return _to_uint8(tf.image.resize(image, (size, size), method, antialias=True))


def _to_uint8(image: "tf.Tensor") -> "tf.Tensor":
    """Rounded; a bicubic filter leaves 0 to 255, which a mere cast would wrap around."""
    tf = _tensorflow()
    return tf.cast(tf.clip_by_value(tf.round(image), 0.0, 255.0), tf.uint8)


def _decoded(
    records: Records, parse: Callable[["tf.Tensor"], "tf.Tensor"], prepare: Prepare, size: int
) -> Finite:
    """A split whose records are read, decoded and prepared when asked for."""
    tf = _tensorflow()

    def one(record: "tf.Tensor") -> "tf.Tensor":
        return tf.ensure_shape(prepare(parse(record), size), (size, size, 3))

    decode_all = partial(tf.map_fn, one, fn_output_signature=tf.uint8)
    decode_all = tf.function(decode_all, input_signature=[tf.TensorSpec([None], tf.string)])
    return Finite(len(records), lambda ids: decode_all(np.array(records[ids], object)).numpy())


def _check_colour(config: DataConfig, sizes: tuple[int, ...] = ()) -> None:
    name = config.dataset
    require(config.num_channels == 3, "data.num_channels", config.num_channels, f"3 for {name}")
    require(config.levels == 256, "data.levels", config.levels, f"256 for {name}")
    allowed = f"one of {sizes}" if sizes else "the size to crop and resize to, at least 1"
    good = config.image_size in sizes if sizes else config.image_size >= 1
    require(good, "data.image_size", config.image_size, f"{allowed} for {name}")


def _tfds_records(
    config: DataConfig, name: str, prepare: Prepare, sizes: tuple[int, ...] = ()
) -> Dataset:
    """Splits train and validation of a large set of tensorflow-datasets, decoded on demand.

    `{category}` and `{size}` in the name stand for data.category and data.image_size.
    """
    _check_colour(config, sizes)
    needed = "{category}" in name
    given = f"{'one' if needed else 'none'} for {config.dataset}, as church_outdoor of lsun"
    require(bool(config.category) == needed, "data.category", config.category, given)
    builder = _builder(config, name.format(category=config.category, size=config.image_size))
    features = builder.info.features

    def split(key: str) -> Finite:
        paths = [pathlib.Path(path) for path in builder.info.splits[key].filepaths]
        parse = lambda record: features.deserialize_example(record)["image"]  # noqa: E731
        return _decoded(Records(paths), parse, prepare, config.image_size)

    shape = (config.image_size, config.image_size, 3)
    return _image_set(config, shape, split("train"), split("validation"))


def _tfrecords(config: DataConfig) -> Dataset:
    """TFRecords of FFHQ and CelebA-HQ: `shape` int64 [3] and `data`, the bytes [C, H, W] of uint8.

    data.path is a file, or a folder of *.tfrecords. As published there is one split: train and test
    are the same images, so likelihoods of the test split are those of training images.
    """
    _check_colour(config)
    tf, root, size = _tensorflow(), pathlib.Path(config.path), config.image_size
    paths = sorted(root.glob("*.tfrecords")) if root.is_dir() else [root]
    there = config.path != "" and len(paths) > 0 and paths[0].is_file()
    require(there, "data.path", config.path, "a TFRecord file or a folder of *.tfrecords")
    fields = {
        "shape": tf.io.FixedLenFeature([3], tf.int64),
        "data": tf.io.FixedLenFeature([], tf.string),
    }

    def parse(record: "tf.Tensor") -> "tf.Tensor":
        found = tf.io.parse_single_example(record, fields)
        image = tf.reshape(tf.io.decode_raw(found["data"], tf.uint8), found["shape"])
        return tf.transpose(image, (1, 2, 0))

    images = _decoded(Records(paths), parse, as_stored, size)
    require(images.size > 0, "data.path", config.path, "TFRecords with at least one image")
    try:
        images.examples(np.arange(1))
    except (tf.errors.InvalidArgumentError, ValueError) as error:
        raise ValueError(
            f"data.path={config.path!r} does not hold images of data.image_size={size} in the "
            f"format of FFHQ and CelebA-HQ: {error}"
        ) from None
    return _image_set(config, (size, size, 3), images, images)


def _imagenet_npz(config: DataConfig) -> Dataset:
    """Downsampled ImageNet of Chrabaszcz et al. 2017: train_data_batch_1.npz, …, val_data.npz.

    Not the images of `imagenet` (van den Oord et al. 2016): another filter, other likelihoods. Each
    file has `data`, uint8 [n, 3 size²], channels first.
    Reference: https://arxiv.org/abs/1707.08819.
    """
    _check_colour(config, (8, 16, 32, 64))
    root, size = pathlib.Path(config.path), config.image_size
    train = sorted(root.glob("train_data*.npz"))
    there = config.path != "" and len(train) > 0 and (root / "val_data.npz").is_file()
    require(there, "data.path", config.path, "a folder with train_data*.npz and val_data.npz")

    def read(path: pathlib.Path) -> np.ndarray:
        with np.load(path, allow_pickle=False) as file:
            if "data" not in file.files:
                raise ValueError(f"{path} has no data, its keys: {file.files}")
            data = file["data"]
        if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3 * size**2:
            raise ValueError(
                f"{path}: data is {data.dtype} {data.shape}; expected uint8 [n, {3 * size**2}] for "
                f"data.image_size={size}"
            )
        return data.reshape(-1, 3, size, size).transpose(0, 2, 3, 1)

    images = np.concatenate([read(path) for path in train])
    return _arrays(config, config.path, images, read(root / "val_data.npz"))


DATASETS: dict[str, Callable[[DataConfig], Dataset]] = {
    **{name: partial(_points, sampler=sampler) for name, sampler in SAMPLERS.items()},
    "digits": _digits,
    "npz": _npz,
    "folder": _folder,
    "cifar10": partial(_tfds, name="cifar10", splits=("train", "test"), shape=(32, 32, 3)),
    "mnist": partial(_tfds, name="mnist", splits=("train", "test"), shape=(28, 28, 1)),
    "svhn": partial(_tfds, name="svhn_cropped", splits=("train", "test"), shape=(32, 32, 3)),
    "celeba": partial(_tfds_records, name="celeb_a", prepare=celeba_crop),
    "lsun": partial(_tfds_records, name="lsun/{category}", prepare=centre_square),
    "imagenet": partial(
        _tfds_records,
        name="downsampled_imagenet/{size}x{size}",
        prepare=as_stored,
        sizes=(32, 64),
    ),
    "imagenet_npz": _imagenet_npz,
    "ffhq": _tfrecords,
    "celebahq": _tfrecords,
}


def load(config: DataConfig) -> Dataset:
    """The data set of that name, its arrays or the headers of its files checked.

    Raises ValueError for an unknown name or a field that does not fit the data; it names the field.
    """
    name = config.dataset.lower()
    if name not in DATASETS:
        near = "".join(f" {n}?" for n in difflib.get_close_matches(name, DATASETS, n=1))
        raise ValueError(f"data.dataset={config.dataset!r}:{near} known are {sorted(DATASETS)}")
    return DATASETS[name](config)
