"""FID, IS and KID against formulas in float64; extractors; statistics files."""

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import scipy.special

import classifier
import evaluation
import npz_files
from datasets import DataConfig, load
from evaluation import Features, Statistics

DIGITS = DataConfig("digits", "", 0, 1, 17, False, True, True, False, 0, 0)


def normal(n, d, seed=0, shift=0.0, mix=0.3):
    """Features with correlated coordinates."""
    rng = np.random.default_rng(seed)
    factor = np.eye(d) + mix * np.random.default_rng(99).standard_normal((d, d))
    return np.float32(rng.standard_normal((n, d)) @ factor + shift)


def fid(a, b):
    a, b = np.float64(a), np.float64(b)
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cross = np.trace(scipy.linalg.sqrtm(s @ t)).real
    return np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(s) + np.trace(t) - 2 * cross


def inception_score(logits):
    p = scipy.special.softmax(np.float64(logits), axis=1)
    return np.exp(np.mean(np.sum(p * (np.log(p) - np.log(p.mean(0))), axis=1)))


def squared_mmd(a, b):
    """The unbiased estimate, as sums over pairs."""
    a, b = np.float64(a), np.float64(b)

    def kernel(x, y):
        return (np.dot(x, y) / len(x) + 1) ** 3

    aa = np.mean([kernel(x, y) for x, y in itertools.permutations(a, 2)])
    bb = np.mean([kernel(x, y) for x, y in itertools.permutations(b, 2)])
    return aa + bb - 2 * np.mean([kernel(x, y) for x in a for y in b])


def tfgan_on(function, *arrays, **options):
    import tensorflow as tf

    tfgan = evaluation._tfgan()
    return getattr(tfgan.eval, function)(*map(tf.constant, arrays), **options)


def test_frechet_distance_is_tfgans_and_the_formula():
    a, b = normal(400, 12), normal(300, 12, seed=1, shift=0.4, mix=0.2)
    found = evaluation.frechet_distance(a, b).value
    theirs = tfgan_on("frechet_classifier_distance_from_activations", a, b)
    np.testing.assert_allclose(found, theirs, rtol=1e-5)
    np.testing.assert_allclose(found, fid(a, b), rtol=1e-6)


def test_frechet_distance_of_gaussians_is_the_closed_form():
    """Diagonal Gaussians: Σ (mᵢ − nᵢ)² + (sᵢ − tᵢ)²; samples with exactly these moments."""
    rng, d = np.random.default_rng(0), 5
    white = rng.standard_normal((1000, d))
    white -= white.mean(0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white, rowvar=False))).T
    m, s, t = rng.standard_normal(d), np.linspace(0.5, 2.0, d), np.linspace(2.0, 1.0, d)
    expected = np.sum(m**2) + np.sum((s - t) ** 2)
    found = evaluation.frechet_distance(white * s + m, white[::-1] * t)
    np.testing.assert_allclose(found.value, expected, rtol=1e-9)
    assert evaluation.frechet_distance(white, white).value < 1e-3


def test_frechet_distance_of_rank_deficient_sets_is_finite():
    few = evaluation.frechet_distance(normal(6, 20), normal(8, 20, seed=1))
    assert math.isfinite(few.value)
    assert 0 < few.error < few.value
    one = evaluation.frechet_distance(normal(50, 1), normal(50, 1, seed=1, shift=1.0))
    assert one.error > 0


def test_error_of_the_frechet_distance_is_the_spread_over_samples():
    reference = normal(500, 6, seed=1, shift=0.5, mix=0.1)
    found = [evaluation.frechet_distance(normal(300, 6, seed=k), reference) for k in range(2, 202)]
    spread = np.std([m.value for m in found])
    errors = [m.error for m in found]
    np.testing.assert_allclose(np.mean(errors), spread, rtol=4 / math.sqrt(2 * 200))
    assert np.std(errors) < 0.15 * spread


def test_inception_score_is_tfgans_and_the_formula():
    logits = 3 * normal(500, 10)
    found = evaluation.inception_score(logits)
    np.testing.assert_allclose(
        found.value, tfgan_on("classifier_score_from_logits", logits), rtol=1e-5
    )
    np.testing.assert_allclose(found.value, inception_score(logits), rtol=1e-9)
    splits = evaluation.inception_score_of_splits(logits)
    values = [inception_score(logits[k : k + 50]) for k in range(0, 500, 50)]
    np.testing.assert_allclose(splits, [np.mean(values), np.std(values)], rtol=1e-9)


def test_inception_score_of_certain_and_evenly_spread_classes_is_their_number():
    logits = 50.0 * np.eye(7)[np.arange(70) % 7]
    np.testing.assert_allclose(evaluation.inception_score(logits), [7.0, 0.0], atol=1e-9)


def test_inception_score_of_logits_that_differ_by_thousands_is_finite():
    """e^{−800} is zero in float64, and log 0 · 0 is not a number."""
    logits = np.where(np.arange(7) == np.arange(70)[:, None] % 5, 0.0, -np.arange(7) * 1e3 - 800.0)
    np.testing.assert_allclose(evaluation.inception_score(logits), [5.0, 0.0], atol=1e-9)


def test_inception_score_of_more_splits_than_images_is_refused():
    with pytest.raises(ValueError, match="of 10 splits: 9 images"):
        evaluation.inception_score_of_splits(normal(9, 4))


def test_error_of_the_inception_score_is_the_spread_over_samples():
    found = [evaluation.inception_score(2 * normal(300, 5, seed=k)) for k in range(200)]
    spread = np.std([m.value for m in found])
    np.testing.assert_allclose(np.mean([m.error for m in found]), spread, rtol=0.2)


def test_kernel_distance_is_tfgans_and_the_formula_block_by_block():
    a, b = normal(60, 4), normal(40, 4, seed=1, shift=0.7)
    found = evaluation.kernel_distance(a, b)
    rng = np.random.default_rng(0)
    reference, samples = rng.permutation(b), rng.permutation(a)
    blocks = [squared_mmd(samples[6 * k : 6 * k + 6], reference[4 * k : 4 * k + 4])
              for k in range(10)]  # fmt: skip
    expected = np.mean(blocks), np.std(blocks, ddof=1) / math.sqrt(10)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    theirs = tfgan_on(
        "kernel_classifier_distance_and_std_from_activations",
        reference, samples, max_block_size=6,
    )  # fmt: skip
    np.testing.assert_allclose(found, theirs, rtol=1e-4)


def test_kernel_distance_of_one_law_is_zero_even_if_the_reference_is_sorted():
    a, b = normal(2000, 4), normal(1000, 4, seed=1)
    for reference in (b, b[np.argsort(b[:, 0])]):
        found = evaluation.kernel_distance(a, reference)
        assert abs(found.value) < 4 * found.error
    assert math.isnan(evaluation.kernel_distance(a[:2], b[:3]).error)


def test_names_say_whose_features_they_are():
    features = Features(normal(100, 4), normal(100, 3))
    plain, titled = (
        [s.metric for s in evaluation.scores(features, normal(50, 4), title)]
        for title in ("", "digits classifier")
    )
    assert plain == ["FID", "KID", "IS", "IS of 10 splits"]
    assert titled == [f"{name} (digits classifier)" for name in plain]
    few = Features(normal(99, 4), normal(99, 3))
    assert len(list(evaluation.scores(few, normal(50, 4), ""))) == 3


def save_model(path, *, pool="pool_3", scale=1.0, callable_=True):
    """A SavedModel as the published one: RGB means and standard deviations; means as logits."""
    import tensorflow as tf

    class Model(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None, None, None, 3], tf.float32)])
        def __call__(self, x):
            mean = scale * tf.reduce_mean(x, axis=(1, 2), keepdims=True)
            both = tf.concat([mean, tf.math.reduce_std(x, axis=(1, 2), keepdims=True)], axis=3)
            return {pool: both, "logits": tf.squeeze(mean, (1, 2))}

    tf.saved_model.save(Model() if callable_ else tf.Module(), str(path))
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "standin")


def test_a_saved_model_sees_images_from_minus_one_to_one_in_three_colours(saved):
    dataset = load(DIGITS)
    found = evaluation.extractor(str(saved), dataset, saved.parent)
    images = dataset.test.examples(np.arange(150))
    features = evaluation.extract(found, images)
    expected = (2.0 * images / 16 - 1).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(features.pool_3[:, :3], np.stack([expected] * 3, 1), atol=1e-6)
    np.testing.assert_allclose(features.logits, features.pool_3[:, :3], atol=1e-6)
    assert features.pool_3.shape == (150, 6)
    assert found.identity.startswith("standin-")
    other = save_model(saved.parent / "other" / "standin", scale=2.0)
    assert evaluation.extractor(str(other), dataset, saved.parent).identity != found.identity


def test_other_networks_and_data_are_refused(tmp_path):
    dataset = load(DIGITS)
    wrong = save_model(tmp_path / "wrong", pool="pool")
    mute = save_model(tmp_path / "mute", callable_=False)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "saved_model.pb").write_bytes(b"no model")
    for features, message in (
        (str(wrong), r"does not map images \(8, 8, 1\) to pool_3 and logits: KeyError"),
        (str(mute), "cannot be called"),
        (str(tmp_path / "damaged"), "cannot be loaded as a SavedModel"),
        ("incption", r"eval.features='incption': allowed are \['classifier', 'inception'\] and"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluation.extractor(features, dataset, tmp_path)
    points = DataConfig("moons", "", 0, 1, 256, False, True, True, False, 0, 8)
    with pytest.raises(ValueError, match="moons are points"):
        evaluation.extractor("classifier", load(points), tmp_path)


def test_inception_comes_from_assets_or_says_where_to_get_it(tmp_path, monkeypatch):
    import tensorflow_hub

    def no_network(handle):
        raise OSError(f"no route to {handle}")

    monkeypatch.setattr(evaluation, "ASSETS", tmp_path)
    monkeypatch.setattr(tensorflow_hub, "resolve", no_network)
    message = r"no route to .*Download https://tfhub.dev/.*/1\?tf-hub-format=compressed .*unpack"
    with pytest.raises(ValueError, match=message):
        evaluation.extractor("inception", load(DIGITS), tmp_path)
    save_model(tmp_path / "inception")
    found = evaluation.extractor("inception", load(DIGITS), tmp_path)
    assert (found.identity, found.title) == ("inception", "")


def test_the_classifier_is_deterministic_cached_and_right(tmp_path, monkeypatch):
    dataset = load(DIGITS)
    one = classifier.trained(dataset, tmp_path / "one", num_steps=200)
    other = classifier.trained(dataset, tmp_path / "other", num_steps=200)
    images = dataset.test.examples(np.arange(200))
    features, logits = one(images)
    np.testing.assert_array_equal(other(images)[0], features)
    assert one.accuracy > 0.93
    assert np.mean(logits.argmax(1) == dataset.test.labels[:200]) > 0.9
    everything, _ = one(dataset.train.examples(np.arange(dataset.train.size)))
    np.testing.assert_allclose(np.mean(np.float64(everything) ** 2), 1.0, rtol=1e-5)
    monkeypatch.setattr(classifier, "_train", None)  # now it must come from its file
    again = classifier.trained(dataset, tmp_path / "one", num_steps=200)
    np.testing.assert_array_equal(again(images)[0], features)
    assert again.accuracy == one.accuracy
    assert classifier._identity(load(DIGITS), 201) != one.identity
    (path,) = (tmp_path / "one").glob("*.npz")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is truncated: 1000 bytes"):
        classifier.trained(dataset, tmp_path / "one", num_steps=200)


def test_a_set_without_labels_has_no_classifier(tmp_path):
    x = np.zeros((4, 5, 5), np.uint8)
    np.savez(tmp_path / "x.npz", x_train=x, x_test=x)
    config = DataConfig("npz", str(tmp_path / "x.npz"), 0, 1, 256, False, True, True, False, 0, 0)
    with pytest.raises(ValueError, match="npz has no labels of its train split"):
        evaluation.extractor("classifier", load(config), tmp_path)


def test_statistics_round_trip_and_the_published_format(tmp_path):
    pool_3 = normal(5, 3)
    written = Statistics(pool_3, "inception", "cifar10 32x32x3", "train", "d1")
    written.write(tmp_path / "a.npz")
    found = evaluation.read_statistics(tmp_path / "a.npz")
    np.testing.assert_array_equal(found.pool_3, pool_3, strict=True)
    for name in ("extractor", "dataset", "split", "digest"):
        assert getattr(found, name) == getattr(written, name)
    np.savez(tmp_path / "published.npz", pool_3=pool_3)
    published = evaluation.read_statistics(tmp_path / "published.npz")
    assert published.extractor == published.dataset == ""

    def check(statistics: Statistics, **changes) -> None:
        right = {"extractor": "inception", "dataset": "cifar10 32x32x3", "width": 3}
        right |= {"digests": {"train": "d1", "test": "d2"}}
        evaluation.check_statistics(statistics, tmp_path, **right | changes)

    check(found)
    check(published)
    for statistics, changes, message in (
        (published, {"width": 4}, "another extractor: unnamed, 3 features; .*4 features"),
        (found, {"extractor": "mine"}, "another extractor: inception"),
        (found, {"dataset": "svhn 32x32x3"}, "statistics of cifar10 32x32x3, the data are svhn"),
        (found, {"digests": {"train": "d3", "test": "d2"}}, "d1"),
    ):
        with pytest.raises(ValueError, match=message):
            check(statistics, **changes)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, r"lacks \['pool_3'\]"),
        ({"pool_3": np.zeros(3)}, r"pool_3 is float64 \(3,\)"),
        ({"pool_3": np.zeros((1, 3))}, r"need finite floats \[n, d\], n >= 2"),
        ({"pool_3": np.full((4, 3), np.nan)}, "need finite floats"),
        ({"pool_3": np.zeros((4, 3), int)}, "pool_3 is int64"),
        ({"pool_3": np.array([[1.0, None]])}, "pool_3 of .* holds objects of Python"),
    ],
)
def test_statistics_that_are_none_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=message) as error:
        evaluation.read_statistics(tmp_path / "bad.npz")
    assert "bad.npz" in str(error.value)


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "stats.npz"
    with pytest.raises(ValueError, match=r"stats\.npz does not exist"):
        evaluation.read_statistics(path)
    npz_files.write(path, {"pool_3": normal(50, 3)})
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[400] ^= 255
    for content in (b"", whole[:-10], whole[:100], b"no zip", bytes(flipped)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"stats\.npz is (damaged|truncated|empty|a text)"):
            evaluation.read_statistics(path)


def test_statistics_are_found_in_the_repository_under_published_names():
    def name(dataset, features="inception", category="", size=32):
        path = evaluation.statistics_path(dataset, features, category=category, size=size)
        assert path.parent == evaluation.ASSETS / "stats"
        return path.name

    assert name("cifar10") == "cifar10_stats.npz"
    assert name("celeba", size=64) == "celeba_stats.npz"
    assert name("lsun", category="church_outdoor", size=256) == "lsun_church_outdoor_256_stats.npz"
    assert name("imagenet", size=64) == "imagenet64_stats.npz"
    assert name("svhn") == "svhn_inception_stats.npz"
    assert name("cifar10", "classifier") == "cifar10_classifier_stats.npz"
    assert name("cifar10", "/some/net") == "cifar10_net_stats.npz"
    assert evaluation.ASSETS.is_absolute()
