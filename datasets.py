"""Data sets by name: where examples come from, and what is checked of them.

TensorFlow is imported for image files and records only, and never sees the GPU.
"""

import dataclasses
import itertools
import logging
import pathlib
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

import decoding
import npz_files
import tables
from array_files import stored_rows
from array_records import ArrayRecords
from checks import choose, one_of, path_of, require
from image_arrays import as_classes, as_images
from image_files import header, split_files
from lazy_tensorflow import tensorflow
from point_samplers import SAMPLERS
from real_arrays import is_real, real_set, with_classes, with_context, with_scaled_context
from splits import DataConfig, Origin, Rows, assembled, divided
from streams import Context, Dataset, Finite, Fresh, Sampler, Shape
from tfrecords import Records
from toy_data import LAWS

if TYPE_CHECKING:
    import tensorflow_datasets as tfds
    from tensorflow import Tensor

logger = logging.getLogger("fokker")
LARGE = 30.0  # of a context in standard units
MOST_POINTS = 10_000_000  # of a split of a toy set, which is held in memory


def _points(config: DataConfig, sampler: Sampler) -> Dataset:
    name, most = config.dataset.lower(), f"{MOST_POINTS} (0 train: fresh samples for ever)"
    require(config.path == "", "data.path", config.path, f"'' for {name}")
    number = config.num_validation
    require(number == 0, "data.num_validation", number, f"0 for {name}")
    fits = 0 <= config.num_train <= MOST_POINTS
    require(fits, "data.num_train", config.num_train, f"0 to {most} for a toy set")
    fits = 1 <= config.num_test <= MOST_POINTS
    require(fits, "data.num_test", config.num_test, f"1 to {most} for a toy set")

    def fixed(n: int, split: int) -> Finite:
        # Words [s] and [s, 0, 0] seed the same; no training batch has a fourth word, [seed, 0, k].
        points = sampler(np.random.default_rng([0, 0, 0, split]), n)
        return Finite(n, points.__getitem__, known_by=f"{name} {split}")

    train = fixed(config.num_train, split=1) if config.num_train else Fresh(sampler, known_by=name)
    test = fixed(config.num_test, split=2)
    law = LAWS[name]() if name in LAWS else None
    shape = test.examples(np.arange(1)).shape[1:]
    return Dataset(name, shape, None, train, test, law, source="drawn from its law")


def _check_shape(where: object, shape: Shape, config: DataConfig) -> None:
    height, width, channels = shape
    fits = config.num_channels == channels and channels in (1, 3)
    require(fits, "data.num_channels", config.num_channels, f"{channels}, as in {where}")
    allowed = f"0 or as in {where}: {height}x{width} (resize the images beforehand)"
    fits = config.image_size == 0 or config.image_size == height == width
    require(fits, "data.image_size", config.image_size, allowed)
    require(2 <= config.levels <= 256, "data.levels", config.levels, "2 to 256")


def _kind(splits: dict[str, Finite]) -> Context | None:
    """Say what the contexts of all splits are, before any is cut; None if a split has none."""
    found = [split.context for split in splits.values()]
    if any(context is None for context in found):
        return None
    if all(np.issubdtype(context.dtype, np.integer) for context in found):
        return Context((), max(int(classes.max()) for classes in found) + 1)
    largest = max(float(np.abs(context).max()) for context in found)
    if found[0].ndim > 2 and largest > LARGE:
        logger.warning("the contexts reach %g: networks learn best from numbers near 1", largest)
    return Context(found[0].shape[1:])


def _check_array(
    name: str, array: np.ndarray | npz_files.Part, config: DataConfig
) -> tuple[np.ndarray | npz_files.Part, int]:
    """(images [n, H, W, C], largest value), of the shape and the levels of the config."""
    array = as_images(name, array)
    _check_shape(name, array.shape[1:], config)
    largest = _largest([array])
    allowed = f"more than the largest value of {name}, {largest}"
    require(config.levels > largest, "data.levels", config.levels, allowed)
    return array, largest


def _largest(arrays: Iterable[np.ndarray | npz_files.Part]) -> int:
    """The largest value of all arrays."""
    return max(int(part.max()) for array in arrays for part in npz_files.chunks(array))


Labels = tuple[np.ndarray | None, np.ndarray | None]  # of train and test


def _arrays(
    config: DataConfig,
    train: np.ndarray | npz_files.Part,
    test: np.ndarray | npz_files.Part,
    labels: Labels,
    origin: Origin,
    values: Labels = (None, None),
) -> Dataset:
    source = config.path or config.dataset.lower()
    train, largest = _check_array(f"x_train of {source}", train, config)
    test, other = _check_array(f"x_test of {source}", test, config)
    shape, others = train.shape[1:], test.shape[1:]
    if shape != others:
        raise ValueError(f"x_test of {source} has images {others}: need {shape}, as in x_train")
    _check_values(config, max(largest, other), shape)
    keys = (f"y_train of {source}", f"y_test of {source}")
    arrays = zip((train, test), labels, strict=True)
    classes = [as_classes(key, y, len(x)) for key, (x, y) in zip(keys, arrays, strict=True)]
    given = {"class": classes, "values": values}.get(config.context, (None, None))
    splits = [
        Finite(len(x), partial(npz_files.taken, x), labels=y, context=c)
        for x, y, c in zip((train, test), classes, given, strict=True)
    ]
    pairs = dict(zip(("train", "test"), splits, strict=True))
    found = assembled(config, shape, pairs, origin, config.levels)
    found = dataclasses.replace(found, context=_kind(pairs))
    is_vector = found.context is not None and len(found.context.shape) == 1
    return with_scaled_context(found) if is_vector else found


def _check_values(config: DataConfig, largest: int, shape: Shape) -> None:
    """Refuse bits in place of grey levels, and warn of what is legal but hardly meant."""
    allowed = "2, as all values are 0 or 1 (or images that are multiplied by 255)"
    require(largest != 1 or config.levels == 2, "data.levels", config.levels, allowed)
    if largest == 0:
        logger.warning("all images are black: every value is 0")
    elif largest < config.levels // 2:
        logger.warning(
            "data.levels=%d, but the largest value is %d: bits/dim count levels that never occur; "
            "data.levels=%d?",
            config.levels, largest, largest + 1,
        )  # fmt: skip
    if shape[:2] == (1, 1):
        logger.warning("the images have a single pixel: %s", shape)


def _digits(config: DataConfig) -> Dataset:
    """The 8×8 digits of scikit-learn, grey levels 0 to 16; every fifth is a test image."""
    from sklearn.datasets import load_digits

    require(config.path == "", "data.path", config.path, "'' for digits")
    require(config.levels == 17, "data.levels", config.levels, "17 for digits")
    digits = load_digits()
    images, classes = digits.images.astype(np.uint8), digits.target
    is_test = np.arange(len(images)) % 5 == 4
    labels = classes[~is_test], classes[is_test]
    origin = Origin("the digits of scikit-learn, every fifth for the test")
    return _arrays(config, images[~is_test], images[is_test], labels, origin)


def _npz(config: DataConfig) -> Dataset:
    """The arrays x_train and x_test of an .npz file, or x alone, or the array of an .npy file.

    uint8 [n, H, W] or [n, H, W, C] are images with grey levels, other numbers [n, *d] real values.
    Beside them may be classes, y_train and y_test or y; with data.context='values' the contexts
    context_train and context_test or context; and test_ids, which of the x alone are for the test.
    """
    require(config.path != "", "data.path", config.path, "an .npz file for data.dataset='npz'")
    path = path_of("data.path", config.path)
    rows, origin = stored_rows(config, path)
    rows, origin = _with_wanted_context(config, rows, origin)
    train, test = rows["train"], rows["test"]
    if is_real(train.x) and is_real(test.x):
        rows, origin = with_classes(rows, origin)
        if config.context == "class":
            rows = {name: row._replace(context=row.labels) for name, row in rows.items()}
        rows, context = with_context(rows)
        return real_set(config, rows, origin, context)
    labels = train.labels, test.labels
    words = dataclasses.replace(origin, text=f"{origin.text}, grey levels")
    return _arrays(config, train.x, test.x, labels, words, (train.context, test.context))


def _with_wanted_context(
    config: DataConfig, rows: dict[str, Rows], origin: Origin
) -> tuple[dict[str, Rows], Origin]:
    """The rows with finite contexts where data.context='values' asks for them, else without."""
    there = [row.name for row in rows.values() if row.context is not None]
    if config.context == "values":
        allowed = "a file with context_train and context_test, or context, for 'values'"
        require(len(there) == len(rows), "data.context", config.context, allowed)
        return with_context(rows)[0], origin
    left_out = ("the context (data.context='values' takes it)",) if there else ()
    origin = dataclasses.replace(origin, left_out=(*origin.left_out, *left_out))
    return {name: row._replace(context=None) for name, row in rows.items()}, origin


def _table(config: DataConfig) -> Dataset:
    """The columns of a .csv or .parquet file."""
    allowed = "a .csv or .parquet file for data.dataset='table'"
    require(config.path != "", "data.path", config.path, allowed)
    allowed = "'' for a table, whose context is data.context_columns"
    require(config.context == "", "data.context", config.context, allowed)
    path = path_of("data.path", config.path)
    found = tables.examples(path, config.columns, config.context_columns)
    parts, origin = divided(config, found.rows, None, Origin(f"{path}", found.left_out))
    return real_set(config, parts, origin, found.context, found.columns)


def _folder(config: DataConfig) -> Dataset:
    """Images below path/train, path/val and path/test, or all below path.

    Without a test split, validation is the test split, or every tenth image where there is none.
    """
    require(config.path != "", "data.path", config.path, "a folder for data.dataset='folder'")
    root = path_of("data.path", config.path)
    require(root.is_dir(), "data.path", config.path, "an existing folder")
    require(config.levels == 256, "data.levels", config.levels, "256 for image files")
    splits, text, left_out = split_files(root)
    paths = [path for split in splits.values() for path in split]
    shape = header(paths[0])
    for path in paths[1:]:
        if (found := header(path)) != shape:
            raise ValueError(f"{path} is {found}, but {paths[0]} is {shape}: need equal images")
    _check_shape(root, shape, config)
    decoded = {name: decoding.of_files(files, shape) for name, files in splits.items()}
    origin = Origin(f"{root}, {text}", tuple(left_out))
    return assembled(config, shape, decoded, origin, config.levels)


def _builder(config: DataConfig, name: str) -> "tfds.core.DatasetBuilder":
    """A tensorflow-datasets builder whose records are there."""
    tensorflow()
    import tensorflow_datasets as tfds

    folder = str(path_of("data.path", config.path)) if config.path else None
    builder = tfds.builder(name, data_dir=folder)
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

    (train, train_labels), (test, test_labels) = map(read, splits)
    origin = Origin(f"splits {splits[0]} and {splits[1]} of tensorflow-datasets' {name}")
    return _arrays(config, train, test, (train_labels, test_labels), origin)


def _check_colour(config: DataConfig, sizes: tuple[int, ...] = ()) -> None:
    name = config.dataset
    require(config.num_channels == 3, "data.num_channels", config.num_channels, f"3 for {name}")
    require(config.levels == 256, "data.levels", config.levels, f"256 for {name}")
    allowed = f"one of {sizes}" if sizes else "the size to crop and resize to, at least 1"
    good = config.image_size in sizes if sizes else config.image_size >= 1
    require(good, "data.image_size", config.image_size, f"{allowed} for {name}")


def _tfds_records(
    config: DataConfig, name: str, prepare: decoding.Prepare, sizes: tuple[int, ...] = ()
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
    kind = ArrayRecords if builder.info.file_format.value == "array_record" else Records

    def split(key: str) -> Finite:
        paths = [pathlib.Path(path) for path in builder.info.splits[key].filepaths]
        parse = lambda record: features.deserialize_example(record)["image"]  # noqa: E731
        return decoding.of_records(kind(paths), parse, prepare, config.image_size)

    shape = (config.image_size, config.image_size, 3)
    splits = {"train": split("train"), "test": split("validation")}
    origin = Origin(f"splits train and validation (for the test) of {builder.data_dir}")
    return assembled(config, shape, splits, origin, config.levels)


def _tfrecords(config: DataConfig) -> Dataset:
    """TFRecords of FFHQ and CelebA-HQ: `shape` int64 [3] and `data`, the bytes [C, H, W] of uint8.

    data.path is a file, or a folder of *.tfrecords. As published there is one split: train and test
    are the same images, so likelihoods of the test split are those of training images.
    """
    _check_colour(config)
    tf, root, size = tensorflow(), path_of("data.path", config.path), config.image_size
    paths = sorted(root.glob("*.tfrecords")) if root.is_dir() else [root]
    there = config.path != "" and len(paths) > 0 and all(path.is_file() for path in paths)
    require(there, "data.path", config.path, "a TFRecord file or a folder of *.tfrecords")
    fields = {
        "shape": tf.io.FixedLenFeature([3], tf.int64),
        "data": tf.io.FixedLenFeature([], tf.string),
    }

    def parse(record: "Tensor") -> "Tensor":
        found = tf.io.parse_single_example(record, fields)
        image = tf.reshape(tf.io.decode_raw(found["data"], tf.uint8), found["shape"])
        return tf.transpose(image, (1, 2, 0))

    images = decoding.of_records(Records(paths), parse, decoding.as_stored, size)
    require(images.size > 0, "data.path", config.path, "TFRecords with at least one image")
    try:
        images.examples(np.arange(1))
    except ValueError as error:
        raise ValueError(
            f"data.path={config.path!r} does not hold images of data.image_size={size} in the "
            f"format of FFHQ and CelebA-HQ: {error}"
        ) from None
    origin = Origin(f"{root}, train and test are the same images")
    splits = {"train": images, "test": images}
    return assembled(config, (size, size, 3), splits, origin, config.levels)


def _imagenet_npz(config: DataConfig) -> Dataset:
    """Downsampled ImageNet of Chrabaszcz et al. 2017: train_data_batch_1.npz, …, val_data.npz.

    Not the images of `imagenet` (van den Oord et al. 2016): another filter, other likelihoods. Each
    file has `data`, uint8 [n, 3 size²], channels first.
    Reference: https://arxiv.org/abs/1707.08819.
    """
    _check_colour(config, (8, 16, 32, 64))
    root, size = path_of("data.path", config.path), config.image_size
    train = sorted(root.glob("train_data*.npz"))
    there = config.path != "" and len(train) > 0 and (root / "val_data.npz").is_file()
    require(there, "data.path", config.path, "a folder with train_data*.npz and val_data.npz")

    def read(path: pathlib.Path) -> np.ndarray:
        data = npz_files.read(path, ("data",), ())["data"]
        fits = data.dtype == np.uint8 and data.size > 0 and data.shape[1:] == (3 * size**2,)
        if not fits:
            raise ValueError(
                f"{path}: data is {data.dtype} {data.shape}; need uint8 [n, {3 * size**2}] for "
                f"data.image_size={size}"
            )
        return data

    files = {"train": [read(path) for path in train], "test": [read(root / "val_data.npz")]}
    shape = (size, size, 3)
    _check_shape(f"{root}", shape, config)
    _check_values(config, _largest(itertools.chain(*files.values())), shape)
    splits = {name: _joined(arrays, shape) for name, arrays in files.items()}
    origin = Origin(f"{len(train)} files train_data*.npz, and val_data.npz, of {root}")
    return assembled(config, shape, splits, origin, config.levels)


def _joined(arrays: list[np.ndarray], shape: Shape) -> Finite:
    """One split of arrays [n, C H W] of images whose channels come first."""
    ends, (height, width, channels) = np.cumsum([len(array) for array in arrays]), shape

    def examples(ids: np.ndarray) -> np.ndarray:
        found = np.empty((len(ids), channels, height, width), np.uint8)
        places = np.searchsorted(ends, ids, side="right")
        for number in np.unique(places):
            here = places == number
            first = ends[number] - len(arrays[number])
            rows = npz_files.taken(arrays[number], ids[here] - first)
            found[here] = rows.reshape(-1, channels, height, width)
        return found.transpose(0, 2, 3, 1)

    return Finite(int(ends[-1]), examples)


DATASETS: dict[str, Callable[[DataConfig], Dataset]] = {
    **{name: partial(_points, sampler=sampler) for name, sampler in SAMPLERS.items()},
    "digits": _digits,
    "npz": _npz,
    "table": _table,
    "folder": _folder,
    "cifar10": partial(_tfds, name="cifar10", splits=("train", "test"), shape=(32, 32, 3)),
    "mnist": partial(_tfds, name="mnist", splits=("train", "test"), shape=(28, 28, 1)),
    "svhn": partial(_tfds, name="svhn_cropped", splits=("train", "test"), shape=(32, 32, 3)),
    "celeba": partial(_tfds_records, name="celeb_a", prepare=decoding.celeba_crop),
    "lsun": partial(_tfds_records, name="lsun/{category}", prepare=decoding.centre_square),
    "imagenet": partial(
        _tfds_records,
        name="downsampled_imagenet/{size}x{size}",
        prepare=decoding.as_stored,
        sizes=(32, 64),
    ),
    "imagenet_npz": _imagenet_npz,
    "ffhq": _tfrecords,
    "celebahq": _tfrecords,
}


CONTEXTS = {  # what data.context may be, and which data have it
    "": "",
    "class": "'class' takes y_train and y_test of an npz, or digits, mnist, cifar10, svhn",
    "values": "'values' takes context_train and context_test of an npz",
}


def load(config: DataConfig) -> Dataset:
    """The data set of that name, its arrays or the headers of its files checked.

    Raises ValueError for an unknown name or a field that does not fit the data; it names the field.
    """
    name = config.dataset.lower()
    make = choose(DATASETS, name, "data.dataset")
    one_of("data.context", config.context, CONTEXTS)
    if name != "table":
        for field in ("columns", "context_columns"):
            value = getattr(config, field)
            require(value == "", f"data.{field}", value, f"'' for {name}, which is no table")
    dataset = make(config)
    allowed = f"'' for data.dataset={config.dataset!r}, which has none; {CONTEXTS[config.context]}"
    there = config.context == "" or dataset.context is not None
    require(there, "data.context", config.context, allowed)
    if dataset.levels is not None or name in SAMPLERS:
        _check_no_reals(config)
    logger.info("%s", dataset.describe())
    return dataset


def _check_no_reals(config: DataConfig) -> None:
    """The fields of real values have no effect on grey levels and toy sets."""
    kind = config.standardize
    require(kind == "none", "data.standardize", kind, "'none' but for arrays and tables of reals")
    allowed = "() but for arrays and tables of real values"
    require(not any(config.cell_width), "data.cell_width", config.cell_width, allowed)
    for field in ("lower", "upper"):
        known = [end for end in getattr(config, field) if end is not None]
        require(not known, f"data.{field}", getattr(config, field), allowed)
