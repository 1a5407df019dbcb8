"""Laws of the data streams: a batch is a function of (seed, step) and of nothing else."""

import dataclasses
import itertools
import pathlib
import subprocess
import sys
import threading
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy.stats import kstest, norm

import datasets
import run_lib
import streams
import tfrecords
import toy_data
from array_records import ArrayRecords
from checkpoints import whole_steps
from datasets import DataConfig, load
from run_lib import image_check
from run_lib.experiment import Experiment
from sde_lib import LinearVESDE
from streams import Host
from tests import tiny
from tfrecords import Records

ROOT = pathlib.Path(__file__).resolve().parent.parent
FINITE = ("swissroll_fixed", "digits", "npz", "folder", "mnist")
SOURCES = ("swissroll", *FINITE)
NUM_TRAIN, NUM_TEST = 23, 7


def config(dataset, **changes):
    levels, no = (17 if dataset == "digits" else 256), False
    default = DataConfig(dataset, "", 0, 1, levels, no, no, no, no, 0, 0)
    return dataclasses.replace(default, **changes)


def images(n, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def write_images(folder, arrays, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(folder / f"{i:03d}{suffix}")


@pytest.fixture(scope="session")
def tfds_folder(tmp_path_factory):
    """A prepared `mnist` of 23 and 7 images: real records, written by the real builder."""
    pytest.importorskip("importlib_resources", reason="tensorflow-datasets prepares sets with it")
    tfds = pytest.importorskip("tensorflow_datasets")
    folder = tmp_path_factory.mktemp("tfds")

    def labelled(n, seed):
        pairs = enumerate(images(n, 28, 28, 1, seed=seed))
        return enumerate({"image": x, "label": i % 10} for i, x in pairs)

    splits = {"train": labelled(NUM_TRAIN, 1), "test": labelled(NUM_TEST, 2)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tfds.builder_cls("mnist"), "_split_generators", lambda *_: splits)
        tfds.builder("mnist", data_dir=folder).download_and_prepare()
    return str(folder)


@pytest.fixture(scope="session")
def make(tmp_path_factory, request):
    """make(source, **changes): a set of 23 and 7 examples from every kind of source."""
    folder = tmp_path_factory.mktemp("data")
    x_train, x_test = images(NUM_TRAIN, 6, 5, 3, seed=1), images(NUM_TEST, 6, 5, 3, seed=2)
    np.savez(folder / "data.npz", x_train=x_train, x_test=x_test)
    write_images(folder / "images" / "train", x_train)
    write_images(folder / "images" / "test", x_test)

    def build(source, **changes):
        options = {
            "swissroll": {"num_test": NUM_TEST},
            "npz": {"path": str(folder / "data.npz"), "num_channels": 3},
            "folder": {"path": str(folder / "images"), "num_channels": 3},
        }.get(source, {"num_train": NUM_TRAIN, "num_test": NUM_TEST})
        if source == "mnist":
            options = {"path": request.getfixturevalue("tfds_folder")}
        return load(config(source.removesuffix("_fixed"), **{**options, **changes}))

    return build


def train(data, n, **changes):
    arguments = {"batch_size": 8, "seed": 0, "first_step": 0, **changes}
    return list(itertools.islice(data.train_batches(**arguments), n))


def assert_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys() == {"image", "index", "mask"}
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], strict=True)


def rows(batches, part):
    return [{key: value[part] for key, value in batch.items()} for batch in batches]


def join(batches, key="image"):
    return np.concatenate([batch[key] for batch in batches])


def stored(data, split):
    return join(data.eval_batches(split, batch_size=data.size(split)))


@pytest.mark.parametrize("source", SOURCES)
def test_batches_have_the_stated_types_and_differ_between_steps_and_seeds(make, source):
    data = make(source)
    (a, b), (c, _) = train(data, 2), train(data, 2, seed=1)
    for batch in (a, *data.eval_batches("test", batch_size=8)):
        assert batch["image"].shape == (8, *data.shape)
        assert batch["image"].dtype == (np.float32 if data.levels is None else np.uint8)
        assert batch["index"].shape == batch["mask"].shape == (8,)
        assert (batch["index"].dtype, batch["mask"].dtype) == (np.int32, bool)
    assert a["mask"].all()
    assert not np.array_equal(a["image"], b["image"])
    assert not np.array_equal(a["image"], c["image"])


@pytest.mark.parametrize("source", SOURCES)
def test_batches_are_a_function_of_seed_and_step_whatever_the_start_and_the_host(make, source):
    """With flips, across the ends of epochs (23 examples, batches of 8), by a fresh object."""
    whole = train(make(source, random_flip=True), 9)
    streams._epoch.cache_clear()
    data = make(source, random_flip=True)
    for first in (1, 2, 3, 7):
        assert_equal(train(data, 9 - first, first_step=first), whole[first:])
    for count, h in ((2, 0), (2, 1), (4, 0), (4, 3)):
        part = slice(h * 8 // count, (h + 1) * 8 // count)
        assert_equal(train(data, 9, host=Host(h, count)), rows(whole, part))


@pytest.mark.parametrize("source", FINITE)
@pytest.mark.parametrize("batch_size", [1, 8, 60])
def test_every_epoch_holds_every_example_once_in_a_new_order(make, source, batch_size):
    data = make(source)
    batches = train(data, 3 * NUM_TRAIN // batch_size + 1, batch_size=batch_size)
    index = join(batches, "index")
    np.testing.assert_array_equal(join(batches), stored(data, "train")[index])
    epochs = index[: 3 * NUM_TRAIN].reshape(3, NUM_TRAIN)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(NUM_TRAIN), (3, 1)))
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[0], np.arange(NUM_TRAIN))


@pytest.mark.parametrize("source", ["npz", "folder", "mnist"])
def test_sources_return_the_pixels_that_were_stored(make, source):
    """In order; tensorflow-datasets has an order of its own, but keeps every image."""
    data = make(source)
    for split, n, seed in (("train", NUM_TRAIN, 1), ("test", NUM_TEST, 2)):
        found, expected = stored(data, split), images(n, *data.shape, seed=seed)
        if source == "mnist":
            found, expected = (np.unique(x, axis=0) for x in (found, expected))
        np.testing.assert_array_equal(found, expected, strict=True)
    few = make(source, num_train=5, num_test=3)
    np.testing.assert_array_equal(stored(few, "train"), stored(data, "train")[:5])
    np.testing.assert_array_equal(stored(few, "test"), stored(data, "test")[:3])
    assert set(join(train(few, 5), "index")) == set(range(5))


@pytest.mark.parametrize("source", ["npz", "folder"])
def test_flips_mirror_the_width_of_half_the_training_images_and_nothing_else(make, source):
    plain, flipping = make(source), make(source, random_flip=True)
    a, b = train(plain, 100), train(flipping, 100)
    np.testing.assert_array_equal(join(a, "index"), join(b, "index"))
    x, y = join(a), join(b)
    same, mirrored = (x == y).all((1, 2, 3)), (x[:, :, ::-1] == y).all((1, 2, 3))
    assert (same ^ mirrored).all()
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / np.sqrt(len(x))
    first = join(a, "index") == 0
    assert 0 < mirrored[first].sum() < first.sum()  # the coin belongs to a place, not an example
    np.testing.assert_array_equal(stored(plain, "train"), stored(flipping, "train"))
    np.testing.assert_array_equal(stored(plain, "test"), stored(flipping, "test"))


@pytest.mark.parametrize("source", FINITE)
@pytest.mark.parametrize("split", ["train", "test"])
def test_evaluation_covers_the_split_once_in_order(make, source, split):
    """For sizes that divide the split or not; a host may have nothing but padding at the end."""
    data = make(source)
    n = data.size(split)
    for batch_size in (1, 4, 7, 8, 40):
        batches = list(data.eval_batches(split, batch_size=batch_size))
        position = np.arange(batch_size * -(-n // batch_size))
        np.testing.assert_array_equal(join(batches, "mask"), position < n)
        np.testing.assert_array_equal(join(batches, "index"), np.where(position < n, position, -1))
        np.testing.assert_array_equal(join(batches)[:n], stored(data, split))
    whole = list(data.eval_batches(split, batch_size=4))
    for h in range(4):
        mine = data.eval_batches(split, batch_size=4, host=Host(h, 4))
        assert_equal(mine, rows(whole, slice(h, h + 1)))


@pytest.mark.parametrize(("part", "read"), [((0, 4), [4, 2]), ((0, 2), [2, 2]), ((2, 4), [2, 1])])
def test_padding_is_not_read(part, read):
    """Of 6 examples in batches of 4: an all-padded part reads one, to have its shape and kind."""
    asked = []

    def examples(ids):
        asked.append(len(ids))
        return np.tile(ids[:, None].astype(np.float32), (1, 2))

    split = streams.Finite(6, examples)
    batches = list(split.ordered_batches(batch_size=4, part=slice(*part)))
    assert asked == read
    assert all(b["image"].shape == (part[1] - part[0], 2) for b in batches)
    for batch in batches:
        there = batch["mask"]
        np.testing.assert_array_equal(batch["image"][there, 0], batch["index"][there])


def draw(name, n=100_000):
    x = datasets.SAMPLERS[name](np.random.default_rng(0), n)
    assert (x.shape, x.dtype) == ((n, 1 if name == "mog1d" else 2), np.float32)
    np.testing.assert_array_equal(x, datasets.SAMPLERS[name](np.random.default_rng(0), n))
    return x.astype(np.float64)


def test_samplers_have_their_second_moments():
    """E|x|² within five standard errors; the spiral has θ uniform between a and b."""
    a, b = 1.5 * np.pi, 4.5 * np.pi
    moments = {"gaussian": 2, "mixture": 4 + 2 * 0.2**2, "rings": 7.5 / 4 + 2 * 0.05**2}
    moments |= {"checkerboard": 2 * 16 / 3, "moons": 2 * (0.75 + 9 / 16 - 1 / np.pi + 2 * 0.1**2)}
    moments |= {"swissroll": ((a * a + a * b + b * b) / 3 + 2 * 0.5**2) / 25}
    moments |= {"mog1d": (0.3 * (4 + 0.1) + 0.3 * (36 + 0.1) + 0.4 * (16 + 1)) / 49}
    assert moments.keys() == datasets.SAMPLERS.keys()
    for name, moment in moments.items():
        square = (draw(name) ** 2).sum(1)
        assert abs(square.mean() - moment) < 5 * square.std() / np.sqrt(len(square))


def test_samplers_have_their_shapes():
    """The cells of a law are equally likely, within five standard errors."""
    square = np.floor(draw("checkerboard") / 2)
    assert (np.abs(square + 0.5) < 2).all()
    assert (square.sum(1) % 2 == 0).all()
    ring, angle = np.round(2 * np.hypot(*draw("rings").T)), np.arctan2(*draw("mixture").T)
    for cells, k in ((square, 8), (ring, 4), (np.round(angle / (np.pi / 4)) % 8, 8)):
        _, counts = np.unique(cells, return_counts=True, axis=0)
        assert len(counts) == k
        error = np.sqrt((1 - 1 / k) / k / len(cells))
        np.testing.assert_allclose(counts / len(cells), 1 / k, atol=5 * error)
    np.testing.assert_allclose(np.cov(draw("gaussian").T), [[1, 0.6], [0.6, 1]], atol=0.02)
    np.testing.assert_allclose(draw("moons").mean(0), 0, atol=0.02)
    x, y = 5 * draw("swissroll").T
    assert np.cos(np.hypot(x, y) - np.arctan2(y, x)).mean() > 0.85  # E cos(z/2) = e^(−1/8) = 0.88


def test_mog1d_has_its_distribution_function():
    weights, means, widths = [0.3, 0.3, 0.4], [-2 / 7, -6 / 7, 4 / 7], np.sqrt([0.1, 0.1, 1]) / 7
    sample = draw("mog1d", 20_000)[:, 0]
    test = kstest(sample, lambda x: norm.cdf(x[:, None], means, widths) @ weights)
    assert test.statistic < 1.95 / np.sqrt(len(sample))  # exceeded once in a thousand


@pytest.mark.parametrize("name", datasets.SAMPLERS)
def test_points_come_with_their_law_where_it_is_known(name):
    """E x, E x xᵀ and E log p_t of the points and of the law, within five standard errors."""
    n, sde = 20_000, LinearVESDE(1.0)
    data = load(config(name, num_test=n))
    assert (data.law is not None) == (name in toy_data.LAWS)
    assert data.shape == ((1,) if name == "mog1d" else (2,))
    if data.law is None:
        return

    def features(x):
        log_p = data.law.log_prob(jnp.asarray(x), jnp.full(n, 0.1), sde)
        return np.concatenate([x, np.einsum("bi,bj->bij", x, x).reshape(n, -1), log_p[:, None]], 1)

    ours, exact = features(stored(data, "test")), features(data.law.sample(jax.random.key(0), n))
    error = np.sqrt((ours.var(0) + exact.var(0)) / n)
    np.testing.assert_array_less(np.abs(ours.mean(0) - exact.mean(0)), 5 * error)


def test_the_checkerboard_fills_the_boxes_of_its_law_alike():
    x, law = draw("checkerboard"), load(config("checkerboard", num_test=1)).law
    inside = np.abs(x[:, None] - np.asarray(law.centers)).max(axis=2) <= law.half_width
    assert inside.any(axis=1).all()  # a corner rounded to float32 may lie in two
    error = np.sqrt(1 / 8 * 7 / 8 / len(x))
    np.testing.assert_allclose(inside.mean(axis=0), 1 / 8, atol=5 * error)


def test_images_have_no_known_law():
    assert load(config("digits")).law is None


def test_fresh_samples_are_numbered_and_never_repeat(make):
    data = make("swissroll")
    assert (data.size("train"), data.size("test")) == (None, NUM_TEST)
    batches = train(data, 5)
    np.testing.assert_array_equal(join(batches, "index"), np.arange(40))
    assert len(np.unique(join(batches), axis=0)) == 40
    late = train(data, 2, first_step=2**31 // 8 - 1)
    np.testing.assert_array_equal(join(late, "index"), [*range(2**31 - 8, 2**31), *range(8)])


@pytest.mark.parametrize("num_train", [0, 50])
def test_no_seed_trains_on_the_test_points(num_train):
    """Among the seeds are all that a test split could use as its only word of entropy."""
    a, b = (load(config("rings", num_train=num_train, num_test=50)) for _ in range(2))
    points = stored(a, "test")
    np.testing.assert_array_equal(points, stored(b, "test"))
    seeds = (*range(8), 2**32 - 1)
    seen = {x.tobytes() for s in seeds for x in join(train(a, 3, batch_size=50, seed=s))}
    assert not seen & {x.tobytes() for x in points}
    assert len(seen) == (num_train or len(seeds) * 150)


def test_digits_keep_every_image_once():
    from sklearn.datasets import load_digits

    data, source = load(config("digits", image_size=8)), load_digits().images[..., None]
    assert (data.size("train"), data.size("test")) == (1438, 359)
    assert (data.shape, data.levels) == ((8, 8, 1), 17)
    np.testing.assert_array_equal(stored(data, "test"), source[4::5])
    np.testing.assert_array_equal(stored(data, "train"), np.delete(source, np.s_[4::5], axis=0))
    assert stored(data, "train").max() == stored(data, "test").max() == 16


def test_a_folder_without_splits_gives_every_tenth_image_to_the_test(tmp_path):
    x = images(23, 4, 4, 1)
    write_images(tmp_path / "a", x[:12, ..., 0])
    write_images(tmp_path / "b/c", x[12:, ..., 0], ".PNG")
    (tmp_path / "README.txt").write_text("not an image")
    data = load(config("folder", path=str(tmp_path), image_size=4))
    np.testing.assert_array_equal(stored(data, "test"), x[9::10])
    np.testing.assert_array_equal(stored(data, "train"), np.delete(x, [9, 19], axis=0))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".bmp"])
@pytest.mark.parametrize("channels", [1, 3])
def test_all_formats_decode_in_grey_and_colour(tmp_path, suffix, channels):
    """A smooth image: JPEG decoders may round differently, by a few grey levels."""
    ramp = np.linspace(0, 255, 64).reshape(8, 8).astype(np.uint8)
    image = ramp if channels == 1 else np.stack([ramp, ramp.T, ramp[::-1]], -1)
    write_images(tmp_path, [image] * 10, suffix)
    found = stored(load(config("folder", path=str(tmp_path), num_channels=channels)), "test")
    expected = np.asarray(Image.open(tmp_path / f"009{suffix}")).reshape(1, 8, 8, channels)
    assert np.abs(found.astype(int) - expected).max() <= (4 if suffix in (".jpg", ".jpeg") else 0)


def prefetching():
    return any(thread.name.startswith("prefetch") for thread in threading.enumerate())


@pytest.mark.parametrize("source", ["npz", "folder", "swissroll"])
def test_dropping_an_iterator_ends_its_thread(make, source):
    data = make(source)
    stream = data.train_batches(batch_size=8, seed=0, first_step=0)
    assert next(stream)["mask"].all()
    assert prefetching()
    stream.close()
    assert not prefetching()
    for _ in data.train_batches(batch_size=8, seed=0, first_step=0):
        break
    assert not prefetching()
    assert len(list(data.eval_batches("test", batch_size=4))) == 2
    assert not prefetching()


def test_two_batches_are_computed_ahead_and_an_error_comes_out_at_its_own_batch():
    computed, steps = threading.Semaphore(0), []

    def batch(step):
        steps.append(step)
        computed.release()
        return 6 // (3 - step)

    stream = streams.ahead(map(batch, itertools.count()))
    assert steps == []
    assert next(stream) == 2
    assert all(computed.acquire(timeout=5) for _ in range(3))
    assert not computed.acquire(timeout=0.1)
    assert [next(stream), next(stream)] == [3, 6]
    with pytest.raises(ZeroDivisionError):
        next(stream)
    assert list(stream) == []
    assert not prefetching()


def test_sets_in_memory_need_no_tensorflow_and_open_streams_let_the_process_end(tmp_path):
    path = str(tmp_path / "data.npz")
    np.savez(path, x_train=images(4, 3, 3), x_test=images(2, 3, 3))
    code = f"""
import sys, datasets
sets = [("npz", {path!r}, 256), ("digits", "", 17), *((s, "", 0) for s in datasets.SAMPLERS)]
configs = [datasets.DataConfig(n, p, 0, 1, k, *[False] * 4, 0, 2) for n, p, k in sets]
arguments = dict(batch_size=2, seed=0, first_step=0)
streams = [datasets.load(config).train_batches(**arguments) for config in configs]
assert all(next(stream)["mask"].all() for stream in streams)
assert not any(name.startswith("tensorflow") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=True)


def refused(message, name, **changes):
    with pytest.raises(ValueError, match=message):
        load(config(name, **changes))


def test_names_and_fields_that_do_not_fit_are_refused():
    assert load(config("SwissRoll", num_test=1)).name == "swissroll"
    known = r"allowed \['celeba', 'celebahq', 'checkerboard'"
    refused(rf"data\.dataset='swisroll': {known}.*did you mean swissroll", "swisroll")
    refused(rf"data\.dataset='zzz': {known}", "zzz")
    refused(r"data\.num_test=0: need 1 to 10000000", "rings")
    refused(r"data\.num_train=-1: need 0 to 10000000", "rings", num_test=1, num_train=-1)
    refused(r"data\.path='x': need '' for rings", "rings", num_test=1, path="x")
    refused(r"data\.path='x': need '' for digits", "digits", path="x")
    refused(r"data\.levels=256: need 17", "digits", levels=256)
    refused(r"data\.num_channels=3: need 1, as in .*digits", "digits", num_channels=3)
    refused(r"data\.image_size=28: need 0 or as in .*: 8x8", "digits", image_size=28)
    refused(r"data\.num_train=1439: need 0 \(all\) to 1438", "digits", num_train=1439)
    refused(r"data\.num_test=-1: need 0 \(all\) to 359", "digits", num_test=-1)
    refused(r"data\.num_channels=3: need 1, as in mnist", "mnist", num_channels=3)
    refused(r"data\.image_size=64: .* 32x32", "CIFAR10", image_size=64, num_channels=3)
    refused(r"datasets\.py is a text, as \.csv: need an archive", "npz", path=__file__)
    refused(r"data\.path='': need a folder", "folder")
    refused(r"data\.levels=17: need 256", "folder", path=".", levels=17)


def test_arrays_that_do_not_fit_are_refused(tmp_path):
    good, path = images(4, 5, 5), str(tmp_path / "data.npz")

    def check(message, x_train=good, x_test=good, **changes):
        np.savez(path, x_train=x_train, x_test=x_test)
        refused(message, "npz", path=path, **changes)

    check(r"x_train .*float64: need uint8.*round\(255 \* x", x_train=good / 255.0)
    check(r"x_test .*int64: need uint8.*round\(x\)", x_test=good.astype(int))
    check(r"x_train .*shape \(5, 5\): need \[n, H, W", x_train=good[0])
    check(r"x_test .*shape \(0, 5, 5\): .* not empty", x_test=good[:0])
    check(r"x_test .*\(4, 5, 1\): need \(5, 5, 1\), as in x_train", x_test=good[:, :4])
    check(r"data\.num_channels=3: need 1, as in x_train", num_channels=3)
    check(
        r"need 1 or 3 channels.*opacity.*x\[\.\.\., :-1\]",
        x_train=images(2, 5, 5, 4),
        num_channels=4,
    )
    check(r"data\.image_size=4: .* 5x5", image_size=4)
    check(r"data\.image_size=5: .* 4x5", x_train=good[:, :4], image_size=5)
    check(r"levels=16: .*more than the largest .*x_test .*, 2\d\d", x_train=good // 16, levels=16)
    check(r"data\.levels=257: need 2 to 256", levels=257)
    check(r"x_train of .*data\.npz holds objects of Python", x_train=np.array([{}], object))
    np.savez(path, x_train=good // 16, x_test=good // 16)
    assert load(config("npz", path=path, levels=16)).levels == good.max() // 16 + 1
    refused(r"data\.levels=15: need more than .*, 15", "npz", path=path, levels=15)
    np.savez(path, x_test=good, y=good)
    refused(r"lacks \['x_train'\]; its keys are \['x_test', 'y'\]", "npz", path=path)


def test_classes_belong_to_their_images_and_are_cut_with_them(make, tmp_path):
    from sklearn.datasets import load_digits

    digits = load(config("digits", num_train=100))
    source = load_digits()
    np.testing.assert_array_equal(digits.train.labels[:5], source.target[[0, 1, 2, 3, 5]])
    assert len(digits.train.labels) == 100
    np.testing.assert_array_equal(digits.test.labels, source.target[4::5])
    mnist = make("mnist").test  # its records are in an order of their own; image i has label i
    assert sorted(mnist.labels) == list(range(NUM_TEST))
    written = images(NUM_TEST, 28, 28, 1, seed=2)
    np.testing.assert_array_equal(mnist.examples(np.arange(NUM_TEST)), written[mnist.labels])
    assert make("npz").train.labels is None
    x, y = images(4, 5, 5), np.array([0, 1, 2, 1])
    np.savez(tmp_path / "some.npz", x_train=x, x_test=x, y_train=y)
    some = load(config("npz", path=str(tmp_path / "some.npz")))
    np.testing.assert_array_equal(some.train.labels, y)
    assert some.test.labels is None
    for wrong in (y[:3], y - 1, y.astype(float), np.stack([y, y], axis=1)):
        np.savez(tmp_path / "wrong.npz", x_train=x, x_test=x, y_train=y, y_test=wrong)
        with pytest.raises(ValueError, match=r"y_test of .*wrong\.npz is .*one for each image"):
            load(config("npz", path=str(tmp_path / "wrong.npz")))


@pytest.mark.parametrize("source", ["npz", "folder", "digits", "mnist"])
def test_validation_is_drawn_from_the_training_images_and_training_never_sees_it(make, source):
    """Of the num_train first ones, where that is set, too; unflipped; the test split stays."""
    whole = make(source, num_train=20)
    data = make(source, num_train=20, num_validation=6, random_flip=source != "digits")
    assert (data.size("train"), data.size("validation"), data.held_out) == (14, 6, "validation")
    assert (whole.held_out, sorted(whole.splits)) == ("test", ["test", "train"])
    images_of = stored(whole, "train")
    drawn = np.random.default_rng([0, 0, 0, 3]).permutation(20)
    rest, chosen = np.sort(drawn[6:]), np.sort(drawn[:6])
    assert not np.array_equal(chosen, np.arange(14, 20))  # data in order of classes, say
    np.testing.assert_array_equal(stored(data, "train"), images_of[rest])
    np.testing.assert_array_equal(stored(data, "validation"), images_of[chosen])
    np.testing.assert_array_equal(stored(data, "test"), stored(whole, "test"))
    found = data.examples("validation", np.asarray([1, 5]))
    np.testing.assert_array_equal(found, images_of[chosen[[1, 5]]])
    batches = train(data, 20)
    assert set(join(batches, "index")) == set(range(14))
    seen = {image.tobytes() for image in join(batches)}
    assert not seen & {image.tobytes() for image in images_of[chosen]}
    if whole.train.labels is not None:
        np.testing.assert_array_equal(data.train.labels, whole.train.labels[rest])
        np.testing.assert_array_equal(data.validation.labels, whole.train.labels[chosen])
    else:
        assert data.train.labels is data.validation.labels is None
    halves = make(source, num_train=20, num_validation=10)  # of equal sizes
    assert halves.train.digest() != halves.validation.digest()


def test_validation_splits_that_do_not_fit_are_refused(make):
    for number in (NUM_TRAIN, 1000, -1):
        with pytest.raises(ValueError, match=rf"data\.num_validation={number}: need 0 to 22"):
            make("npz", num_validation=number)
    with pytest.raises(ValueError, match=r"data\.num_validation=5: need 0 for swissroll"):
        make("swissroll", num_validation=5)
    with pytest.raises(ValueError, match=r"split='validation': allowed \['test', 'tra"):
        make("npz").size("validation")


def test_odd_images_of_a_folder_are_refused_by_file_name(tmp_path):
    write_images(tmp_path, images(9, 4, 4))
    refused(r"data\.path=.*not \[9, 0\]", "folder", path=str(tmp_path))
    for odd, message in (
        (images(1, 4, 5), r"009\.png is \(4, 5, 1\), but .*000\.png is \(4, 4, 1\)"),
        (images(1, 4, 4, 3), r"009\.png is \(4, 4, 3\), but"),
        (images(1, 4, 4, 4), r"009\.png has mode RGBA: convert"),
        (np.zeros((1, 4, 4), np.uint16), r"009\.png has mode I;16.*: convert"),
    ):
        write_images(tmp_path, [*images(9, 4, 4), *odd])
        refused(message, "folder", path=str(tmp_path))
    write_images(tmp_path, images(10, 32, 32))
    file = tmp_path / "009.png"
    file.write_bytes(file.read_bytes()[:200])  # the header is right, the pixels are cut off
    data = load(config("folder", path=str(tmp_path)))
    with pytest.raises(ValueError, match=r"009\.png is damaged or gone: Invalid PNG"):
        next(data.eval_batches("test", batch_size=1))
    file.write_text("not a picture")
    refused(r"009\.png cannot be read as an image", "folder", path=str(tmp_path))


def test_damaged_images_are_met_before_training_and_whole_sets_are_decoded_once(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "images"
    write_images(folder, images(90, 8, 8))
    c = tiny.config()
    c.data.update(dataset="folder", path=str(folder), levels=256, num_test=0)
    experiment = Experiment.from_config(c)
    file = folder / "088.png"
    whole = file.read_bytes()
    file.write_bytes(whole[:-30])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"088\.png is damaged or gone"):
            run_lib.train(experiment, tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"checkpoints", "lock"}
    assert not whole_steps(tmp_path / "run")
    file.write_bytes(whole)
    decoded, decode = [], image_check._decode
    monkeypatch.setattr(image_check, "_decode", lambda d, n: (decoded.append(n), decode(d, n)))
    for _ in range(2):
        image_check.check(Experiment.from_config(c).dataset)
    assert decoded == ["train", "test"]
    write_images(folder, images(90, 8, 8, seed=1))
    image_check.check(Experiment.from_config(c).dataset)
    assert decoded == ["train", "test"] * 2
    second = Host(1, 2)  # which decodes the second half of every batch of 128
    monkeypatch.setattr(image_check.devices, "host", lambda: second)
    read, batches = [], streams.Dataset.eval_batches

    def eval_batches(self, split, **options):
        for batch in batches(self, split, **options):
            read.extend(batch["index"][batch["mask"]].tolist())
            yield batch

    monkeypatch.setattr(streams.Dataset, "eval_batches", eval_batches)
    image_check.check(Experiment.from_config(c).dataset)
    assert len(decoded) == 6
    assert read == list(range(64, 81))  # of 81 for training, and none of 9 for the test
    assert {path.name[-7:] for path in (tmp_path / "cache" / "fokker").iterdir()} == {
        "-0-of-1", "-1-of-2",
    }  # fmt: skip
    monkeypatch.setattr(streams, "READ_BYTES", 1000)  # too much to be read at every start
    write_images(folder, images(90, 8, 8, seed=2))
    image_check.check(Experiment.from_config(c).dataset)
    assert len(decoded) == 6


def test_stream_arguments_are_refused_before_the_first_batch(make):
    data, endless, host = make("npz"), make("swissroll"), Host(0, 2)
    with pytest.raises(ValueError, match=r"batch_size=0: need a positive multiple of 1"):
        train(data, 0, batch_size=0)
    with pytest.raises(ValueError, match=r"batch_size=9: need a positive multiple of 2"):
        train(data, 0, batch_size=9, host=host)
    with pytest.raises(ValueError, match=r"host=Host\(index=2, count=2\): need 0 <= index < c"):
        train(data, 0, host=Host(2, 2))
    with pytest.raises(ValueError, match=r"seed=-1: need 0 <= seed < 2\*\*32"):
        train(data, 0, seed=-1)
    with pytest.raises(ValueError, match=r"first_step=-1: need at least 0"):
        train(data, 0, first_step=-1)
    with pytest.raises(ValueError, match=r"batch_size=9: need a positive multiple of 2"):
        data.eval_batches("test", batch_size=9, host=host)
    with pytest.raises(ValueError, match=r"split='valid': allowed \['test', 'train'\]"):
        data.size("valid")
    with pytest.raises(ValueError, match=r"split='train' of swissroll is endless"):
        endless.eval_batches("train", batch_size=2)


def test_a_set_that_cannot_be_downloaded_says_what_to_run(tmp_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    no_network = mock.Mock(side_effect=ConnectionError("no route to host"))
    monkeypatch.setattr(tfds.builder_cls("cifar10"), "download_and_prepare", no_network)
    message = r"cifar10 is not in .*no route to host.*`tfds build cifar10 --data_dir=DIR`"
    with pytest.raises(ValueError, match=message):
        load(config("CIFAR10", path=str(tmp_path), num_channels=3))
    no_network.assert_called_once()


# Large sets, in the format of their real files; JPEG moves a grey level by so much.
JPEG = 8.0


def faces(n, height, width, *, seed):
    """Triangle waves that differ by image: JPEG keeps them, a shifted crop shows."""
    slopes = np.random.default_rng(seed).uniform(0.01, 0.03, (n, 2, 1, 1))
    y, x = np.mgrid[0:height, 0:width]
    wave = 255 * np.abs((slopes[:, 0] * y + slopes[:, 1] * x) % 2 - 1)
    return np.repeat(np.uint8(wave)[..., None], 3, axis=3)


def write_tfds(folder, name, splits, features=("image",), **options):
    """Records of a real builder: `splits` maps split names to images."""
    tfds = pytest.importorskip("tensorflow_datasets")
    filler = {"label": 0, "id": "x"}

    def examples(given):
        return enumerate({"image": x, **{k: filler[k] for k in features[1:]}} for x in given)

    found = {key: examples(given) for key, given in splits.items()}
    cls = tfds.builder_cls(name.split("/")[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cls, "_split_generators", lambda *_: found)
        if name == "celeb_a":
            info = cls._info

            def images_only(self):
                whole = info(self)
                only = tfds.features.FeaturesDict({"image": whole.features["image"]})
                return tfds.core.DatasetInfo(builder=self, features=only)

            patch.setattr(cls, "_info", images_only)
        tfds.builder(name, data_dir=folder, **options).download_and_prepare()
        yield


def expected_area(image, top, left, side, size):
    """Mean of equal blocks of the square."""
    square = image[top : top + side, left : left + side].astype(np.float64)
    k = side // size
    return square.reshape(size, k, size, k, 3).mean(axis=(1, 3))


def test_celeba_is_the_central_140_pixels_averaged(tmp_path):
    given = faces(3, 218, 178, seed=1)
    for _ in write_tfds(tmp_path, "celeb_a", {"train": given, "validation": given[:2]}):
        data = load(config("celeba", path=str(tmp_path), num_channels=3, image_size=70))
        found = join(data.eval_batches("train", batch_size=3))
        for block in (expected_area(x, 39, 19, 140, 70) for x in given):  # builders shuffle
            assert min(np.abs(found - block).max(axis=(1, 2, 3))) <= JPEG
        assert data.size("test") == 2
        with pytest.raises(ValueError, match=r"data.image_size=0: need the size to crop"):
            load(config("celeba", path=str(tmp_path), num_channels=3))


def test_lsun_is_the_central_square_and_never_wraps_around(tmp_path):
    block = np.zeros((300, 300, 3), np.uint8)
    block[100:200, 100:200] = 255  # a bicubic filter overshoots at this edge
    given = [faces(1, 40, 64, seed=1)[0], faces(1, 64, 32, seed=2)[0], block]
    splits = {"train": given, "validation": given[:1]}
    for _ in write_tfds(tmp_path, "lsun/church_outdoor", splits, ("image", "id")):
        options = {"path": str(tmp_path), "num_channels": 3, "category": "church_outdoor"}

        def images_of(size, options=options):
            data = load(config("lsun", **options, image_size=size))
            return join(data.eval_batches("train", batch_size=3))

        squares = given[0][:, 12:52], given[1][16:48], block
        means = sorted(square.mean() for square in squares)
        np.testing.assert_allclose(sorted(images_of(8).mean(axis=(1, 2, 3))), means, atol=1.0)
        large = next(x for x in images_of(256) if np.median(x) == 0)
        assert large[100:150, 100:150].min() > 250
        assert large[:70].max() < 5
        with pytest.raises(ValueError, match=r"data.category='': need one for lsun"):
            images_of(8, options | {"category": ""})


@pytest.mark.parametrize("kept_as", ["tfrecord", "array_record"])
def test_imagenet_of_tensorflow_datasets(tmp_path, kept_as):
    given = faces(5, 32, 32, seed=3)
    splits, name = {"train": given, "validation": given[:2]}, "downsampled_imagenet/32x32"
    for _ in write_tfds(tmp_path, name, splits, file_format=kept_as):
        assert list(tmp_path.rglob(f"*.{kept_as}-*"))
        data = load(config("imagenet", path=str(tmp_path), num_channels=3, image_size=32))
        found = join(data.eval_batches("train", batch_size=5))
        for image in given.astype(float):
            assert min(np.abs(found - image).max(axis=(1, 2, 3))) <= JPEG
        with pytest.raises(ValueError, match=r"image_size=48: need one of \(32, 64\)"):
            load(config("imagenet", path=str(tmp_path), num_channels=3, image_size=48))


def write_tfrecords(path, given):
    tf = pytest.importorskip("tensorflow")
    with tf.io.TFRecordWriter(str(path)) as writer:
        for image in given:
            turned = image.transpose(2, 0, 1)
            shape = tf.train.Feature(int64_list=tf.train.Int64List(value=turned.shape))
            data = tf.train.Feature(bytes_list=tf.train.BytesList(value=[turned.tobytes()]))
            features = tf.train.Features(feature={"shape": shape, "data": data})
            writer.write(tf.train.Example(features=features).SerializeToString())


@pytest.mark.parametrize("name", ["ffhq", "celebahq"])
def test_tfrecords_of_ffhq_and_celeba_hq(tmp_path, name):
    given = faces(5, 16, 16, seed=4)
    write_tfrecords(tmp_path / "a.tfrecords", given[:3])
    write_tfrecords(tmp_path / "b.tfrecords", given[3:])
    data = load(config(name, path=str(tmp_path), num_channels=3, image_size=16))
    for split in ("train", "test"):
        np.testing.assert_array_equal(join(data.eval_batches(split, batch_size=5)), given)
    one = load(config(name, path=str(tmp_path / "b.tfrecords"), num_channels=3, image_size=16))
    np.testing.assert_array_equal(join(one.eval_batches("test", batch_size=2)), given[3:])
    with pytest.raises(ValueError, match="does not hold images of"):
        load(config(name, path=str(tmp_path), num_channels=3, image_size=8))
    with pytest.raises(ValueError, match=r"data.path='': need a TFRecord file"):
        load(config(name, num_channels=3, image_size=16))


def test_a_damaged_array_record_is_named(tmp_path):
    module = pytest.importorskip("array_record.python.array_record_module")
    path, given = tmp_path / "a.array_record", [bytes([i] * 8) + b"%d" % i for i in range(3)]
    writer = module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for record in given:
        writer.write(record)
    writer.close()
    assert ArrayRecords([path])[np.array([2, 0])] == [given[2], given[0]]
    damaged = bytearray(path.read_bytes())
    damaged[damaged.find(given[1])] ^= 1
    path.write_bytes(bytes(damaged))
    records = ArrayRecords([path])
    assert records[np.array([0, 2])] == [given[0], given[2]]
    with pytest.raises(ValueError, match=f"record 1 of {tmp_path} is damaged: Corrupted"):
        records[np.array([0, 1])]
    path.write_bytes(bytes(damaged[:500]))
    with pytest.raises(ValueError, match="no ArrayRecords"):
        ArrayRecords([path])


def first_batch(of):
    return next(load(of).train_batches(batch_size=3, seed=0, first_step=0))


def test_a_damaged_tfrecord_is_named_and_never_becomes_a_pixel(tmp_path):
    given, path = faces(3, 16, 16, seed=4), tmp_path / "a.tfrecords"
    write_tfrecords(path, given)
    whole, options = path.read_bytes(), {"num_channels": 3, "image_size": 16}
    path.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="ends within record 2: truncated, or no TFRecord"):
        load(config("ffhq", path=str(path), **options))
    third = len(whole) // 3
    for at, said in (
        (third + 100, "record 1 of .*a.tfrecords is damaged: its checksum does not fit"),
        (2 * third - 2, "record 1 of .*a.tfrecords is damaged: its checksum does not fit"),
        (third, "a.tfrecords: the length of record 1 is damaged|ends within record 1"),
        (third + 9, "a.tfrecords: the length of record 1 is damaged"),
    ):
        damaged = bytearray(whole)
        damaged[at] ^= 4
        path.write_bytes(bytes(damaged))
        with pytest.raises(ValueError, match=said):
            first_batch(config("ffhq", path=str(path), **options))


def test_the_places_of_many_records_are_found_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tfrecords, "MANY", 3)
    path = tmp_path / "a.tfrecords"
    write_tfrecords(path, faces(3, 8, 8, seed=1))
    first = Records([path])[np.arange(3)]
    with monkeypatch.context() as without:
        without.setattr(tfrecords, "_positions", None)
        assert Records([path])[np.arange(3)] == first
    (kept,) = (tmp_path / "cache" / "fokker").iterdir()
    kept.write_bytes(kept.read_bytes()[:-5])  # as a crash may leave it
    assert Records([path])[np.arange(3)] == first
    write_tfrecords(path, faces(2, 8, 8, seed=2))  # another file of the same name
    assert len(Records([path])) == 2


def test_files_give_the_batches_of_arrays(tmp_path):
    """Order, flips and padding of the pipeline are those of examples in memory."""
    given = faces(11, 8, 8, seed=3)
    for i, image in enumerate(given):
        Image.fromarray(image).save(tmp_path / f"{i:02d}.png")
    np.savez(tmp_path / "a.npz", x_train=given[np.arange(11) != 9], x_test=given[[9]])
    options = {"num_channels": 3, "image_size": 8, "random_flip": True, "num_validation": 3}
    folder, npz = (
        load(config(name, path=str(path), **options))
        for name, path in (("folder", tmp_path), ("npz", tmp_path / "a.npz"))
    )
    np.testing.assert_array_equal(*(d.examples("validation", np.arange(3)) for d in (folder, npz)))
    for first_step in (0, 5):
        batches = [
            itertools.islice(d.train_batches(batch_size=4, seed=2, first_step=first_step), 6)
            for d in (folder, npz)
        ]
        for one, other in zip(*batches, strict=True):
            assert_equal([one], [other])
    for host in (Host(), Host(3, 4)):
        ordered = [d.eval_batches("train", batch_size=4, host=host) for d in (folder, npz)]
        assert_equal(*ordered)


def test_imagenet_of_the_npz_archives(tmp_path):
    given = faces(7, 8, 8, seed=5)
    flat = given.transpose(0, 3, 1, 2).reshape(7, -1)
    np.savez(tmp_path / "train_data_batch_1.npz", data=flat[:3], labels=np.ones(3))
    np.savez(tmp_path / "train_data_batch_2.npz", data=flat[3:5], labels=np.ones(2))
    np.savez(tmp_path / "val_data.npz", data=flat[5:], labels=np.ones(2))
    options = {"path": str(tmp_path), "num_channels": 3}
    data = load(config("imagenet_npz", **options, image_size=8))
    np.testing.assert_array_equal(join(data.eval_batches("train", batch_size=5)), given[:5])
    np.testing.assert_array_equal(join(data.eval_batches("test", batch_size=2)), given[5:])
    ids = np.array([4, 0, 3, 2, 4])
    np.testing.assert_array_equal(data.examples("train", ids), given[ids])
    with pytest.raises(ValueError, match=r"data is uint8 \(3, 192\); need uint8 \[n, 768\]"):
        load(config("imagenet_npz", **options, image_size=16))
    (tmp_path / "val_data.npz").unlink()
    with pytest.raises(ValueError, match=r"train_data\*.npz and val_data.npz"):
        load(config("imagenet_npz", **options, image_size=8))
