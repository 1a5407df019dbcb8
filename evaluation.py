"""Sample quality, from features h ∈ Rᵈ and class probabilities p(y|x) of a network.

    IS    exp E KL(p(y|x) ‖ p(y))
    FID   ‖μ − m‖² + tr(Σ + S − 2 (Σ S)^½)         means and covariances of h: samples, reference
    KID   unbiased MMD² of h with kernel (h·h'/d + 1)³, mean over blocks

FID and KID are computed by TF-GAN. The plain names are those of Inception's features; of any other
network they say which. TensorFlow runs on the CPU only. Reference: Salimans et al. 2016,
https://arxiv.org/abs/1606.03498; Heusel et al. 2017, https://arxiv.org/abs/1706.08500; Binkowski et
al. 2018, https://arxiv.org/abs/1801.01401.
"""

import dataclasses
import hashlib
import math
import socket
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import classifier
import npz_files
from checks import path_of, user_cache
from lazy_tensorflow import tensorflow
from streams import Dataset

ASSETS = Path(__file__).resolve().parent / "assets"
if not ASSETS.is_dir():  # of the package
    ASSETS = user_cache()
INCEPTION = "https://tfhub.dev/tensorflow/tfgan/eval/inception/1"
DOWNLOAD_SECONDS = 60.0  # without an answer
CHUNK = 64  # images at once through a SavedModel: 1 GB at Inception's 299×299
SPLITS = 10
Images = np.ndarray  # uint8 [n, H, W, C] in 0, …, levels − 1


class Features(NamedTuple):
    """Features [n, d] and logits [n, classes] of n images."""

    pool_3: np.ndarray
    logits: np.ndarray


class Measure(NamedTuple):
    """A value and its error; NaN where none can be given."""

    value: float
    error: float


# Metrics


def inception_score(logits: np.ndarray) -> Measure:
    """exp E KL(p(y|x) ‖ p(y)) on all logits at once, ± its standard error.

    log IS is the mean of KLᵢ = KL(p(y|xᵢ) ‖ p(y)), and to first order a change of p(y) adds nothing
    to it, so s.e. = IS · std(KLᵢ)/√n.
    """
    log_p = np.float64(logits) - np.logaddexp.reduce(np.float64(logits), axis=1, keepdims=True)
    log_mean = np.logaddexp.reduce(log_p, axis=0) - math.log(len(log_p))  # −800 is no zero here
    divergences = (np.exp(log_p) * (log_p - log_mean)).sum(axis=1)
    value = math.exp(divergences.mean())
    return Measure(value, float(value * divergences.std() / math.sqrt(len(log_p))))


def inception_score_of_splits(logits: np.ndarray, splits: int = SPLITS) -> Measure:
    """Mean and standard deviation over consecutive parts, as most papers quote it.

    Raises:
        ValueError: there are fewer images than parts.
    """
    if len(logits) < splits:
        raise ValueError(
            f"Inception score of {splits} splits: {len(logits)} images; need one or more each"
        )
    values = [inception_score(part).value for part in np.array_split(logits, splits)]
    return Measure(float(np.mean(values)), float(np.std(values)))


def frechet_distance(samples: np.ndarray, reference: np.ndarray) -> Measure:
    """FID of features [n, d] and [m, d], ± the standard error due to the samples.

    The reference is fixed: it belongs to the definition of the figure. With c = h − μ the distance
    changes to first order by q(h) = 2 (μ − m)·c + cᵀ(I − A) c − const for each sample, A =
    S^½ (S^½ Σ S^½)^−½ S^½ the optimal map between the Gaussians, so s.e. = std(q)/√n (infinitesimal
    jackknife: no resampling, two eigendecompositions). The bias of FID, upwards and ~ 1/n, is not
    in it: compare figures of equal n only.
    """
    value = _tfgan().eval.frechet_classifier_distance_from_activations(samples, reference)
    (mu, sigma), (m, s) = _moments(samples), _moments(reference)
    root = _power(s, 0.5)
    optimal = root @ _power(root @ sigma @ root, -0.5) @ root

    def change(h: np.ndarray) -> np.ndarray:
        c = h - mu
        return 2.0 * c @ (mu - m) + np.einsum("ij,ij->i", c, c - c @ optimal)

    parts = np.array_split(samples, math.ceil(len(samples) / 4096))  # 50,000 × 2048 are 0.8 GB
    q = np.concatenate([change(part) for part in parts])
    return Measure(float(value), float(q.std() / math.sqrt(len(q))))


def _moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance in double precision."""
    mean = x.mean(axis=0, dtype=np.float64)
    c = x - mean
    return mean, c.T @ c / (len(c) - 1)


def _power(matrix: np.ndarray, exponent: float) -> np.ndarray:
    """A power of a positive semi-definite matrix, on its range."""
    values, vectors = np.linalg.eigh(matrix)
    positive = values > values.max() * len(values) * np.finfo(np.float64).eps
    scaled = np.where(positive, values, 1.0) ** exponent * positive
    return (vectors * scaled) @ vectors.T


def kernel_distance(samples: np.ndarray, reference: np.ndarray) -> Measure:
    """KID of features [n, d] and [m, d], ± its standard error over the blocks.

    TF-GAN's blocks of at most 1024, but ten blocks if there are fewer, for the sake of the error.
    Both sets are shuffled (fixed seed): a reference sorted by class would bias every block.
    """
    tf, tfgan = tensorflow(), _tfgan()
    larger = max(len(samples), len(reference))
    blocks = max(math.ceil(larger / 1024), SPLITS)
    blocks = max(1, min(blocks, min(len(samples), len(reference)) // 2))
    rng = np.random.default_rng(0)
    shuffled = [tf.constant(rng.permutation(x)) for x in (reference, samples)]
    found = tfgan.eval.kernel_classifier_distance_and_std_from_activations(
        *shuffled, max_block_size=math.ceil(larger / blocks), dtype=tf.float64
    )
    return Measure(float(found[0]), float(found[1]))


class Score(NamedTuple):
    """A named figure and what its error is."""

    metric: str
    value: float
    error: float
    error_is: str


def scores(samples: Features, reference: np.ndarray, title: str) -> Iterator[Score]:
    """All metrics; the title of the features, '' for Inception, becomes part of the names."""
    suffix = f" ({title})" if title else ""
    fid, kid = (f(samples.pool_3, reference) for f in (frechet_distance, kernel_distance))
    yield Score(f"FID{suffix}", *fid, "s.e. of the samples")
    yield Score(f"KID{suffix}", *kid, "s.e. over blocks")
    yield Score(f"IS{suffix}", *inception_score(samples.logits), "s.e. of the samples")
    if len(samples.logits) >= 10 * SPLITS:
        found = inception_score_of_splits(samples.logits)
        yield Score(f"IS of {SPLITS} splits{suffix}", *found, "std over splits")


def _tfgan() -> types.ModuleType:
    """TF-GAN 2.1.0, its last release, made to import.

    It wants `tf.estimator`, which TensorFlow has dropped: of it, the class of session hooks is
    given, and the subpackage that builds on it is replaced by an empty one. The metrics need none.
    """
    tf: Any = tensorflow()
    if "tensorflow_gan" not in sys.modules:
        tf.get_logger().setLevel("ERROR")  # one deprecation per block of KID
        hook = types.SimpleNamespace(SessionRunHook=tf.compat.v1.train.SessionRunHook)
        tf.estimator = hook
        name = "tensorflow_gan.python.estimator"
        sys.modules[name] = types.ModuleType(name)
    import tensorflow_gan

    return tensorflow_gan


# Extractors of features


@dataclasses.dataclass(frozen=True)
class Extractor:
    """A network that maps images to features."""

    identity: str  # stored with the features: equal identities, comparable features
    title: str  # part of the names of the metrics; '' for Inception
    note: str  # for the protocol

    def __call__(self, images: Images) -> Features:
        """Features of any number of images."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class SavedModel(Extractor):
    """A TensorFlow SavedModel: [−1, 1] images [n, H, W, 3] → {pool_3: [n, d], logits: [n, k]}.

    Images are (x − 127.5)/127.5 of x in 0, …, 255, grey ones three times. They keep their size: the
    published Inception resizes them to 299×299 itself.
    """

    levels: int
    network: Callable

    def __call__(self, images: Images) -> Features:
        """Features of any number of images."""
        chunks = [self._run(images[k : k + CHUNK]) for k in range(0, len(images), CHUNK)]
        return Features(*(np.concatenate(part) for part in zip(*chunks, strict=True)))

    def _run(self, images: Images) -> Features:
        tf = tensorflow()
        x = np.asarray(images, np.float32) * (255.0 / (self.levels - 1)) / 127.5 - 1.0
        x = np.repeat(x, 3, axis=3) if x.shape[3] == 1 else x
        outputs = self.network(tf.constant(x, tf.float32))
        found = [np.asarray(outputs[key], np.float32) for key in Features._fields]
        return Features(*(y.reshape(len(images), -1) for y in found))


@dataclasses.dataclass(frozen=True)
class TrainedClassifier(Extractor):
    """The classifier that `classifier.trained` trains on the labelled data themselves."""

    network: classifier.Classifier

    def __call__(self, images: Images) -> Features:
        """Features of any number of images."""
        return Features(*self.network(images))


def _inception(dataset: Dataset, folder: Path) -> SavedModel:
    """Inception of TF-GAN: assets/inception, the cache of TF-Hub, or a download."""
    del folder
    local = ASSETS / "inception"
    path = local if (local / "saved_model.pb").is_file() else _from_hub(local)
    return SavedModel("inception", "", "Inception", dataset.levels, _network(path))


def _from_hub(local: Path) -> Path:
    import tensorflow_hub

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_SECONDS)
    try:
        return Path(tensorflow_hub.resolve(INCEPTION))
    except Exception as error:  # whatever network, archive or disk raise
        raise ValueError(
            f"eval.features='inception': the network is neither in {local} nor in the cache of "
            f"TF-Hub, and downloading it failed: {error!r}. Download "
            f"{INCEPTION}?tf-hub-format=compressed where there is a network and unpack it there, "
            f"so that {local / 'saved_model.pb'} exists (eval.features='': no metrics)"
        ) from error
    finally:
        socket.setdefaulttimeout(before)


def _classifier(dataset: Dataset, folder: Path) -> TrainedClassifier:
    found = classifier.trained(dataset, folder)
    title = f"{dataset.name} classifier"
    tested = f"accuracy {found.accuracy:.4f} on {found.num_test} test images"
    note = f"{title} {found.identity}, {tested}"
    return TrainedClassifier(f"classifier-{found.identity}", title, note, found)


def _folder(path: Path, dataset: Dataset) -> SavedModel:
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(file.relative_to(path).as_posix().encode() + file.read_bytes())
    identity = f"{path.name}-{digest.hexdigest()[:12]}"
    return SavedModel(identity, path.name, identity, dataset.levels, _network(path))


def _network(path: Path) -> Callable:
    tf = tensorflow()
    try:
        found = tf.saved_model.load(str(path))
    except (OSError, ValueError, RuntimeError, KeyError, tf.errors.OpError) as error:
        raise ValueError(f"{path} cannot be loaded as a SavedModel: {error}") from error
    if not callable(found):
        raise ValueError(f"{path}: the SavedModel cannot be called with images")
    return found


EXTRACTORS: dict[str, Callable[[Dataset, Path], Extractor]] = {
    "inception": _inception,
    "classifier": _classifier,
}


def extractor(features: str, dataset: Dataset, folder: Path) -> Extractor:
    """The extractor of `eval.features`, tried on two images; the folder keeps trained classifiers.

    Raises:
        ValueError: the data are no images, or the network is absent or of another kind.
    """
    check_features(features, dataset)
    if features in EXTRACTORS:
        found = EXTRACTORS[features](dataset, folder)
    else:
        found = _folder(path_of("eval.features", features), dataset)
    try:
        extract(found, np.zeros((2, *dataset.shape), np.uint8))
    except Exception as error:  # a foreign network can raise anything
        raise ValueError(
            f"eval.features={features!r}: the network does not map images {dataset.shape} to "
            f"pool_3 and logits: {error!r}"
        ) from error
    return found


def check_features(features: str, dataset: Dataset) -> None:
    """Raise a ValueError where the name is none, or the data are points; quick."""
    if (
        features not in EXTRACTORS
        and not (path_of("eval.features", features) / "saved_model.pb").is_file()
    ):
        raise ValueError(
            f"eval.features={features!r}: allowed are {sorted(EXTRACTORS)} and the folder of a "
            "SavedModel (saved_model.pb, variables/)"
        )
    if dataset.levels is None:
        raise ValueError(
            f"eval.features={features!r}: {dataset.name} are points, features are those of images; "
            "need ''"
        )


def extract(extractor: Extractor, images: Images) -> Features:
    """Features of images, one row each and finite.

    Raises:
        ValueError: they are not.
    """
    found = extractor(images)
    for name, values in zip(Features._fields, found, strict=True):
        if values.ndim != 2 or len(values) != len(images) or not np.isfinite(values).all():
            raise ValueError(
                f"{extractor.identity}: {name} {values.shape} of {len(images)} images; need finite "
                "numbers, one row per image"
            )
    return found


# Statistics of a data set


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Features pool_3 [n, d] of a data set; the names are '' in files of other codes."""

    pool_3: np.ndarray
    extractor: str = ""
    dataset: str = ""
    split: str = ""
    digest: str = ""  # of the data of the split

    def write(self, path: Path) -> None:
        """Write the published format, and the names as arrays of their own."""
        npz_files.write(path, {k: np.asarray(v) for k, v in dataclasses.asdict(self).items()})


PUBLISHED = {"cifar10": "cifar10", "celeba": "celeba", "lsun": "lsun_{category}_{size}",
             "imagenet": "imagenet{size}"}  # fmt: skip


def statistics_path(dataset: str, features: str, *, category: str, size: int) -> Path:
    """assets/stats/, in the repository: published names for Inception of published sets."""
    published = PUBLISHED.get(dataset) if features == "inception" else None
    name = f"{dataset}_{Path(features).name}"
    if published is not None:
        name = published.format(category=category, size=size)
    return ASSETS / "stats" / f"{name}_stats.npz"


def read_statistics(path: Path) -> Statistics:
    """The statistics of a file, checked.

    Raises:
        ValueError: the file is absent, damaged, holds objects, or is not of this format.
    """
    arrays = npz_files.read(path, ("pool_3",))
    pool_3 = arrays["pool_3"]
    fits = pool_3.ndim == 2 and len(pool_3) >= 2 and np.issubdtype(pool_3.dtype, np.floating)
    if not fits or not np.isfinite(pool_3).all():
        raise ValueError(
            f"{path}: pool_3 is {pool_3.dtype} {pool_3.shape}; need finite floats [n, d], n >= 2"
        )
    names = {key: str(arrays.get(key, "")) for key in ("extractor", "dataset", "split", "digest")}
    return Statistics(pool_3, **names)


def check_statistics(
    found: Statistics,
    path: Path,
    *,
    extractor: str,
    dataset: str,
    width: int,
    digests: dict[str, str],
) -> None:
    """Refuse statistics of another network or other data.

    Args:
        found: the statistics; those of other codes have no names, and their data are not checked.
        path: their file.
        extractor: the identity of the network.
        dataset: the name of the data.
        width: the number of features.
        digests: of the splits of the data.

    Raises:
        ValueError: says which.
    """
    if found.pool_3.shape[1] != width or found.extractor not in ("", extractor):
        raise ValueError(
            f"{path} holds statistics of another extractor: {found.extractor or 'unnamed'}, "
            f"{found.pool_3.shape[1]} features; eval.features is {extractor}, {width} features"
        )
    if found.dataset not in ("", dataset):
        raise ValueError(f"{path} holds statistics of {found.dataset}, the data are {dataset}")
    now = digests.get(found.split, "none")
    if found.extractor and found.digest != now:
        made = f"of data with digest {found.digest}" if found.digest else "by an older version"
        raise ValueError(
            f"{path} was made {made}; the digest of the {found.split} split is {now} now. Delete "
            "the file and make it by --mode=fid_stats, or set eval.stats"
        )
