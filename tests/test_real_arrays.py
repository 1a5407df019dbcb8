"""Real values of any shape from .npz and .npy files: kinds, splits, contexts, refusals."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import datasets
import real_arrays
from datasets import DataConfig


def config(path: Path | str, **changes) -> DataConfig:
    fields = dict(image_size=0, num_channels=1, levels=256, random_flip=False, centered=True,
                  uniform_dequantization=True, logit=False, num_train=0, num_test=0)  # fmt: skip
    return DataConfig(dataset="npz", path=str(path), **(fields | changes))


def reals(n: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(n).standard_normal((n, *shape))


def load(tmp_path: Path, changes: dict | None = None, **arrays: np.ndarray) -> datasets.Dataset:
    np.savez(tmp_path / "data.npz", **arrays)
    return datasets.load(config(tmp_path / "data.npz", **(changes or {})))


def values(data: datasets.Dataset, split: str) -> np.ndarray:
    return data.examples(split, np.arange(data.size(split)))


@pytest.mark.parametrize("shape", [(), (3,), (4, 2), (5, 4), (4, 4, 3), (4, 4, 4), (2, 3, 4, 1)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int16, np.int64])
def test_numbers_of_any_shape_but_uint8_are_real_values(tmp_path, shape, dtype) -> None:
    x = (100 * reals(30, *shape)).astype(dtype)
    data = load(tmp_path, x_train=x[:20], x_test=x[20:])
    assert (data.shape, data.levels) == (shape or (1,), None)
    found = values(data, "train")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, x[:20].reshape(20, *data.shape).astype(np.float32))
    assert data.size("test") == 10


def test_uint8_stay_grey_levels(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (20, 4, 4), np.uint8)
    data = load(tmp_path, x_train=x[:15], x_test=x[15:])
    assert (data.shape, data.levels) == ((4, 4, 1), 256)
    assert "grey levels" in data.describe()
    with pytest.raises(ValueError, match=r"\(18, 16\): need .*astype\(np\.float32\) makes real"):
        load(tmp_path, x=x.reshape(20, 16))


@pytest.mark.parametrize("kind", ["npy", "x", "x_train"])
def test_arrays_without_a_test_split_are_divided_at_random_for_all_seeds(tmp_path, kind) -> None:
    x = reals(30, 2)
    path = tmp_path / ("data.npy" if kind == "npy" else "data.npz")
    np.save(path, x) if kind == "npy" else np.savez(path, **{kind: x})
    a, b = (datasets.load(config(path, test_fraction=0.2)) for _ in range(2))
    assert (a.size("train"), a.size("test")) == (24, 6)
    assert a.digests == b.digests
    both = np.concatenate([values(a, "train"), values(a, "test")])
    np.testing.assert_array_equal(np.unique(both, axis=0), np.unique(np.float32(x), axis=0))
    assert not np.array_equal(values(a, "test"), np.float32(x[-6:]))
    assert "20 % of its examples, drawn at random, for the test" in a.describe()


def test_images_with_grey_levels_are_divided_too(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (20, 4, 4), np.uint8)
    y = np.arange(20) % 3
    data = load(tmp_path, x=x, y=y, test_ids=np.array([3, 0]))
    np.testing.assert_array_equal(values(data, "test")[..., 0], x[[0, 3]])
    np.testing.assert_array_equal(data.test.labels, y[[0, 3]])


def test_given_ids_are_the_test_split_and_a_file_of_them_comes_first(tmp_path: Path) -> None:
    x = reals(10, 2)
    data = load(tmp_path, x=x, test_ids=np.array([7, 2]))
    np.testing.assert_array_equal(values(data, "test"), np.float32(x[[2, 7]]))
    np.testing.assert_array_equal(values(data, "train"), np.float32(np.delete(x, [2, 7], axis=0)))
    (tmp_path / "ids.txt").write_text("1\n5 9\n")
    np.save(tmp_path / "ids.npy", np.array([1, 5, 9]))
    for name in ("ids.txt", "ids.npy"):
        changes = {"test_ids": str(tmp_path / name)}
        data = load(tmp_path, changes, x=x, test_ids=np.array([7, 2]))
        np.testing.assert_array_equal(values(data, "test"), np.float32(x[[1, 5, 9]]))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 10], "test_ids holds int64 0 to 10: need integers, 0 to 9"),
        ([-1], "holds int64 -1 to -1"),
        ([1.0], "holds float64"),
        ([], "holds nothing"),
        ([3, 3], "an example twice, or all 10"),
        (list(range(10)), "an example twice, or all 10"),
    ],
)
def test_ids_that_do_not_fit_are_refused(tmp_path: Path, ids, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path, x=reals(10, 2), test_ids=np.asarray(ids))


def test_files_of_ids_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("1 two")
    for name, more, message in [
        ("ids.txt", {}, "is no list of integers: .*'two'"),
        ("none.txt", {}, "need an existing file"),
        ("ids.txt", {"x_test": reals(3, 2)}, "data.test_ids=.*: need '': .* has x_test"),
    ]:
        changes = {"test_ids": str(tmp_path / name)}
        with pytest.raises(ValueError, match=message):
            load(tmp_path, changes, x_train=reals(10, 2), **more)


X = reals(40, 2, 3)
HOLE = np.where(np.arange(240).reshape(40, 2, 3) == 101, np.nan, X)


@pytest.mark.parametrize(
    ("x", "changes", "message"),
    [
        (HOLE, {}, r"value \[16, 1, 2\] of x of .*data\.npz, counted from 0, is nan"),
        (np.where(np.isnan(HOLE), -np.inf, X), {}, r"value \[16, 1, 2\] .* is -inf"),
        (np.where(np.isnan(HOLE), 1e39, X), {}, r"value \[16, 1, 2\] .* is 1e\+39"),
        (np.array([{}, 3]), {}, "x of .* holds objects of Python"),
        (np.array(["a", "b"]), {}, "it holds no numbers"),
        (X > 0, {}, r"is bool: need uint8"),
        (X + 1j, {}, "it holds no numbers"),
        (X[:0], {}, "need at least 2 examples"),
        (np.zeros((5, 0)), {}, r"x of .* is float64 \(\d, 0\): need numbers \[n, \*d\], not empty"),
        (np.float64(3.0), {}, "x of .* is a single number: need examples"),
        (X * [1.0, 0.0, 1.0], {}, r"coordinates \(0, 1\), \(1, 1\): constant in the training spl"),
        (X + 1e6, {}, r"too close for float32; subtract a constant, as their mean 1e\+06"),
        (X, {"cell_width": (1.0, 1.0)}, r"need one number, or 3 of them"),
        (X, {"lower": (0.0, None)}, r"data\.lower=.*: need one number, or 3 of them or None"),
        (X, {"lower": (9.0,), "upper": (9.0,)}, r"data\.upper=.*: need more than data\.lower="),
        (X, {"lower": (1e38,)}, r"data\.lower=.*: need at most 1e\+37"),
        (X, {"lower": (0.0,)}, r"coordinate \(0, \d\) is -.* need values above data\.lower, 0$"),
        (X, {"lower": (-1e6,)}, r"data\.lower or data\.upper is 1e\+06 away from values with"),
        (np.arange(9.0)[:, None], {"upper": (8.0,)}, "is 8 in example .* below data.upper, 8$"),
        (
            np.arange(9.0)[:, None],
            {"lower": (-0.4,), "upper": (9.0,), "cell_width": (1.0,)},
            "is 0 in example .* and their cells above data.lower, -0.4 and below data.upper, 9$",
        ),
        (
            np.arange(9.0)[:, None],
            {"upper": (8.4,), "cell_width": (1.0,)},
            "is 8 in example .* and their cells below data.upper, 8.4$",
        ),
        (0.1 * np.arange(1, 10)[:, None], {"lower": (0.1,)}, "is 0.1 in example"),
        (X, {"image_size": 3}, r"data\.image_size=3: need 0 for real values: x of .* is float64"),
        (X, {"random_flip": True}, r"need False for examples of shape \(2, 3\)"),
    ],
)
def test_arrays_without_a_density_are_refused_by_name(tmp_path, x, changes, message) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path, changes, x=x)
    assert "\n" not in str(error.value)


def test_ends_hold_for_all_splits_and_may_be_those_of_cells(tmp_path: Path) -> None:
    x = np.arange(40.0)[:, None]
    with pytest.raises(ValueError, match="is 38 in example 3 of the test split"):
        load(tmp_path, {"upper": (38.0,)}, x_train=x[:30], x_test=x[35:])
    for unit in (1.0, 0.1):  # the ends that the guide gives
        changes = {"lower": (-0.5 * unit,), "upper": (39.5 * unit,), "cell_width": (unit,)}
        load(tmp_path, changes, x=unit * x)
    for width in (0.01, 0.7):  # centres of cells that begin at the end, rounded to float32
        load(tmp_path, {"lower": (0.0,), "cell_width": (width,)}, x=width * (x + 0.5))


def test_splits_of_different_shapes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x_test of .* has examples \(3,\): need \(2, 3\)"):
        load(tmp_path, x_train=X, x_test=X[:, 0])


@pytest.mark.parametrize(
    ("context", "shape", "classes"),
    [
        (reals(40, 5), (5,), 0),
        (reals(40), (1,), 0),
        (reals(40, 3, 3, 1), (3, 3, 1), 0),
        (np.arange(40) % 4, (), 4),
        (np.arange(120).reshape(40, 3) % 7, (3,), 0),
    ],
)
def test_contexts_of_arrays_are_floats_or_classes(tmp_path, context, shape, classes) -> None:
    given = {"x_train": X[:30], "x_test": X[30:]}
    given |= {"context_train": context[:30], "context_test": context[30:]}
    assert load(tmp_path, **given).context is None
    data = load(tmp_path, {"context": "values"}, **given)
    assert (data.context.shape, data.context.classes) == (shape, classes)
    batch = next(data.eval_batches("test", batch_size=4))
    if classes:
        np.testing.assert_array_equal(batch["context"], context[30:34])
        assert batch["context"].dtype == np.int32
        return
    expected = (context - context[:30].mean(axis=0)) / context[:30].std(axis=0)
    assert batch["context"].dtype == np.float32
    np.testing.assert_allclose(batch["context"], expected[30:34].reshape(4, *shape), atol=1e-5)
    assert f"given floats {shape}, standardised" in data.describe()


@pytest.mark.parametrize("shape", [(3,), (4, 4, 1)])
@pytest.mark.parametrize("kind", [np.int64, np.float64])
def test_contexts_of_images_are_classes_as_integers_in_a_row_alone(tmp_path, shape, kind) -> None:
    rng = np.random.default_rng(2)
    x, context = rng.integers(0, 256, (40, 4, 4), np.uint8), rng.integers(0, 5, (40, *shape))
    given = {"x_train": x[:30], "x_test": x[30:]}
    given |= {"context_train": context[:30].astype(kind), "context_test": context[30:].astype(kind)}
    data = load(tmp_path, {"context": "values"}, **given)
    assert (data.context.shape, data.context.classes) == (shape, 0)
    found = next(data.eval_batches("test", batch_size=4))["context"]
    assert found.dtype == np.float32
    there = context[30:34]
    if shape == (3,):
        there = (there - context[:30].mean(axis=0)) / context[:30].std(axis=0)
    np.testing.assert_allclose(found, there, atol=1e-5)


def test_a_constant_context_keeps_its_scale(tmp_path: Path, caplog) -> None:
    """The deviation of equal float64 is some 1e-17, by which nothing may be divided."""
    context = np.stack([np.full(60, 0.1), np.arange(60.0)], axis=1)
    assert 0.0 < context[:, 0].std() < 1e-16
    x = {"x_train": reals(60, 2), "x_test": reals(9, 2)}
    contexts = {"context_train": context, "context_test": context[:9].astype(np.float32)}
    data = load(tmp_path, {"context": "values"}, **x, **contexts)
    assert data.context.scale[0] == 1.0
    assert np.abs(data.contexts("test", np.arange(9))[:, 0]).max() < 1e-6
    assert "the context says nothing in places [0]" in caplog.text


def test_contexts_and_classes_that_do_not_fit(tmp_path: Path) -> None:
    pair, wanted = {"x_train": X[:30], "x_test": X[30:]}, {"context": "values"}
    with pytest.raises(ValueError, match=r"data.context='values': need a file with context_train"):
        load(tmp_path, wanted, **pair, context_train=X[:30, 0])
    with pytest.raises(ValueError, match=r"context_train of .* \(29, 3\): need one for each image"):
        load(tmp_path, wanted, **pair, context_train=X[:29, 0], context_test=X[30:, 0])
    bad = HOLE[:, 1]
    with pytest.raises(
        ValueError, match=r"value \[16, 2\] of the context beside x_train of .* nan"
    ):
        load(tmp_path, wanted, **pair, context_train=bad[:30], context_test=bad[30:])
    data = load(tmp_path, x=X, y=X[:, 0, 0])  # a target of regression
    assert data.train.labels is None
    assert "y, no classes" in data.describe()
    labelled = load(tmp_path, {"context": "class"}, x=X, y=np.arange(40) % 3)
    assert labelled.train.labels.max() == 2
    assert labelled.context.classes == 3
    np.testing.assert_array_equal(labelled.test.context, labelled.test.labels)


def test_grey_levels_as_floats_are_told_from_real_values(tmp_path: Path, caplog) -> None:
    x = np.random.default_rng(0).integers(0, 256, (300, 4, 4)) / 255.0
    load(tmp_path, x=x)
    assert "np.uint8(np.round(255 * x)) makes grey levels of them" in caplog.text
    assert "data.cell_width=0.003922 says" in caplog.text


@pytest.mark.parametrize(
    ("column", "share", "gap"),
    [
        ([1.0, 2.0, 4.0], 0.0, 1.0),
        ([0.1, 0.2, 0.2, 0.4, 0.4], 0.8, 0.1),
        ([1000.01, 1000.02, 1000.02, 1000.05], 0.5, 0.01),
        ([3.0, 3.0], 1.0, np.inf),
    ],
)
def test_repeated_values_and_their_distance(column, share, gap) -> None:
    found = real_arrays.repeats(np.float32(column))
    assert found == (pytest.approx(share), gap)


def test_fields_of_real_values_are_refused_elsewhere() -> None:
    toy = DataConfig("rings", "", 0, 1, 256, *[False] * 4, 0, 5)
    for name, value in (
        ("standardize", "whiten"), ("cell_width", (1.0,)), ("lower", (0.0,)), ("upper", (0.0,)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"data\.{name}=.*but for arrays and tables of real"):
            datasets.load(dataclasses.replace(toy, **{name: value}))
    for changes, message in [
        ({"standardize": "zca"}, "standardize='zca': allowed"),
        ({"test_fraction": 1.0}, "test_fraction=1.0: need more than 0 and less than 1"),
        ({"validation_fraction": 1.0}, "validation_fraction=1.0: need 0 <= fraction < 1"),
        ({"cell_width": (-1.0,)}, "cell_width=.*need widths of 0"),
        ({"upper": (None, np.inf)}, "upper=.*need finite numbers, or None where"),
    ]:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(toy, **changes)
