"""Tables: columns of numbers, texts and classes; mistakes are told by column and row."""

from pathlib import Path

import numpy as np
import pytest

import datasets
import tables
from datasets import DataConfig
from streams import Context

TEXT = "a,b,city,kind\n" + "".join(
    f"{0.1 * i},{i**2},{('Rome', 'Oslo', 'Bonn')[i % 3]},{i % 2 + 4}\n" for i in range(12)
)


def config(path: Path | str, **changes) -> DataConfig:
    fields = dict(image_size=0, num_channels=1, levels=256, random_flip=False, centered=True,
                  uniform_dequantization=True, logit=False, num_train=0, num_test=0)  # fmt: skip
    return DataConfig(dataset="table", path=str(path), **(fields | changes))


def write(tmp_path: Path, text: str, name: str = "t.csv") -> Path:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path / name


def values(data: datasets.Dataset, split: str) -> np.ndarray:
    return data.examples(split, np.arange(data.size(split)))


def test_a_table_is_read_split_and_described(tmp_path: Path, caplog) -> None:
    """The same rows for the test whatever the columns; nothing is twice there or lost."""
    caplog.set_level("INFO", logger="fokker")
    path = write(tmp_path, TEXT)
    data = datasets.load(config(path, columns="b, a", test_fraction=0.25))
    assert (data.shape, data.levels, data.columns) == ((2,), None, ("b", "a"))
    train, test = values(data, "train"), values(data, "test")
    assert (len(train), len(test), train.dtype) == (9, 3, np.float32)
    assert sorted(np.concatenate([train, test])[:, 0]) == [i**2 for i in range(12)]
    np.testing.assert_allclose(train[:, 1], 0.1 * np.sqrt(train[:, 0]), rtol=1e-6)
    only = datasets.load(config(path, columns="a", context_columns="b", test_fraction=0.25))
    np.testing.assert_array_equal(values(only, "test")[:, 0], test[:, 1])
    said = (
        "t.csv, 25 % of its examples, drawn at random, for the test; real values, as they are; "
        "9 train, 3 test examples; left out: column city, column kind"
    )
    assert said in caplog.text


def test_validation_may_be_a_fraction(tmp_path: Path) -> None:
    path = write(tmp_path, TEXT)
    data = datasets.load(config(path, columns="a", validation_fraction=0.2))
    assert {name: data.size(name) for name in data.splits} == {
        "train": 9, "test": 1, "validation": 2,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"num_validation=3: need 0 with data\.validation_fract"):
        datasets.load(config(path, columns="a", validation_fraction=0.2, num_validation=3))


@pytest.mark.parametrize(
    ("given", "context", "expected"),
    [
        ("city", Context((), 3, ("Bonn", "Oslo", "Rome")), [2, 1, 0] * 4),
        ("kind:class", Context((), 2, ("4", "5")), [0, 1] * 6),
        ("kind", Context((1,), names=("kind",)), [[4], [5]] * 6),
        (
            "kind,city",
            Context((4,), names=("kind", "city=Bonn", "city=Oslo", "city=Rome")),
            [[4 + i % 2, i % 3 == 2, i % 3 == 1, i % 3 == 0] for i in range(12)],
        ),
    ],
)
def test_contexts_are_classes_or_vectors(tmp_path: Path, given, context, expected) -> None:
    found = tables.examples(write(tmp_path, TEXT), "a,b", given)
    assert found.context == context
    np.testing.assert_array_equal(found.rows.context, expected)
    data = datasets.load(config(tmp_path / "t.csv", columns="a,b", context_columns=given))
    assert data.context.describe() == (
        f"one of {context.classes} classes"
        if context.classes
        else f"floats {context.shape}, standardised"
    )
    kept = data.train.context
    assert kept.dtype == (np.int32 if context.classes else np.float32)
    if not context.classes:  # by the training split
        np.testing.assert_allclose(kept.mean(axis=0), 0.0, atol=1e-6)
        np.testing.assert_allclose(kept.std(axis=0), 1.0, rtol=1e-6)
        raw = data.test.context * data.context.scale + data.context.mean
        np.testing.assert_allclose(data.context.standardized(raw), data.test.context, atol=1e-6)
    batch = next(data.eval_batches("test", batch_size=2))
    np.testing.assert_array_equal(batch["context"][:1], data.test.context[:1])


ROWS = "1.5,2\n2.5,1\n3.5,5\n4.5,3\n"


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        (TEXT, {}, r"data\.columns='': need columns of numbers, but .* text in city \(row 1 of "
                   r"city: 'Rome'\); data\.columns=a,b,kind leaves text out, "
                   r"data\.context_columns=city conditions on it"),
        ("a,b\n" + ROWS + "6,x12\n", {}, r"text in b \(row 5 of b: 'x12'\); data\.columns=a "
                                         "leaves text out$"),
        ("a,b\n" + ROWS + "6,\n", {}, r"t\.csv: row 5 of column b is missing, as 1 of its 5"),
        ("a,b\n1,NaN\n" + ROWS, {}, r"row 1 of column b is missing"),
        ("a,b\n" + ROWS + "inf,3\n", {}, r"row 5 of column a is infinite"),
        ("a,b\n1,3\n2,3\n4,3\n5,3\n", {}, r"column b: constant in the training split, 3 in .*, "
                                          r"where a density is infinite; .*by data\.columns"),
        ("a,b\n" + ROWS + "7\n", {}, r"row 5 has 1 entries, but there are 2 columns"),
        ("a,a\n" + ROWS, {}, r"several columns of the names \['a'\]"),
        ("", {}, r"t\.csv is empty"),
        ("a,b\n", {}, r"t\.csv has no rows"),
        ("a,b\n1,2\n", {}, r"data\.test_fraction=0\.1: need at least 2 examples"),
        (TEXT, {"columns": "a,bb"}, r"data\.columns='bb': allowed \['a', 'b', .*did you mean b\?"),
        (TEXT, {"columns": "a", "context_columns": "citi"}, r"context_columns='citi'.*mean city"),
        (TEXT, {"columns": "a", "context_columns": "a"}, r"columns='a': need columns other than"),
        (TEXT, {"columns": "a", "context_columns": "kind:class,b"}, "a class or a vector"),
        (TEXT, {"columns": "b", "context_columns": "a:class"}, "need integers or text for classes"),
        (TEXT, {"columns": "a", "context_columns": "b:class"}, "need columns that name groups, not "
                                                               "12 different ones in 12 rows"),
        (TEXT, {"columns": "a,b", "cell_width": (1.0, 2.0, 3.0)}, r"cell_width=.*: need one number"
                                                                  ", or 2 of them"),
        (TEXT, {"columns": "b", "cell_width": (3.0,)}, r"need at most 1, the distance of values, "
                                                       "for b: its cells overlap"),
        ("a\n16000001\n16000002\n16000004\n16000005\n", {}, "too close for float32; subtract a "
                                                            r"constant, as their mean 1\.6e\+07"),
        (TEXT, {"columns": "a", "image_size": 8}, r"data\.image_size=8: need 0 for real values"),
        (TEXT, {"columns": "a", "random_flip": True}, r"data\.random_flip=True: need False for"),
    ],
)  # fmt: skip
def test_what_is_no_table_is_told_by_name(tmp_path: Path, text, changes, message) -> None:
    with pytest.raises(ValueError, match=message) as error:
        datasets.load(config(write(tmp_path, text), **changes))
    assert "\n" not in str(error.value)


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe\x00a")
    for path, message in [
        (tmp_path / "t.csv", "is no text in UTF-8"),
        (tmp_path / "none.csv", "need an existing table"),
        (tmp_path, r"need a file, \.csv or \.parquet"),
        (write(tmp_path, "", "x.npz"), r"arrays are read by data\.dataset='npz'"),
        ("", r"data\.path='': need a \.csv or \.parquet file"),
    ]:
        with pytest.raises(ValueError, match=message):
            datasets.load(config(path))
    with pytest.raises(ValueError, match=r"tables are read by data\.dataset='table'"):
        datasets.load(DataConfig("npz", str(tmp_path / "t.csv"), *[0] * 9))
    with pytest.raises(ValueError, match=r"data\.columns='a': need '' for digits, which is no tab"):
        datasets.load(DataConfig("digits", "", 0, 1, 17, *[False] * 4, 0, 0, columns="a"))


def test_other_delimiters_names_with_commas_and_no_names(tmp_path: Path) -> None:
    path = write(tmp_path, '"a;1";b\n1;2\n3;5\n4;4\n', "t.tsv")
    assert list(tables.read(path)) == ["a;1", "b"]
    path = write(tmp_path, '"a,1",b\n1,2\n3,5\n4,4\n')
    assert tables.examples(path, '"a,1"', "").columns == ("a,1",)
    path = write(tmp_path, "\ufeff1\t2\n3\t4\n\n5\t6\n", "t.txt")
    found = tables.read(path)
    assert {name: column.tolist() for name, column in found.items()} == {
        "1": [1, 3, 5], "2": [2, 4, 6],
    }  # fmt: skip


def test_parquet_is_the_same_table(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path, table = write(tmp_path, TEXT), tables.read(tmp_path / "t.csv")
    columns = {name: pa.array(column.tolist()) for name, column in table.items()}
    parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    found = tables.read(path.with_suffix(".parquet"))
    assert found.keys() == table.keys()
    for name in table:
        np.testing.assert_array_equal(found[name], table[name])
    columns["b"] = pa.array([None, *range(11)])
    parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="row 1 of column b is missing"):
        datasets.load(config(tmp_path / "t.parquet", columns="a,b"))
    whole = (tmp_path / "t.parquet").read_bytes()
    (tmp_path / "t.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"t\.parquet is damaged or no \.parquet file"):
        tables.read(tmp_path / "t.parquet")


def test_values_that_repeat_are_warned_of_by_column(tmp_path: Path, caplog) -> None:
    """Integers and rounded values, not the continuous column; a cell width ends the warning."""
    rng = np.random.default_rng(0)
    x = np.stack([rng.standard_normal(300), rng.integers(0, 9, 300), rng.standard_normal(300)], 1)
    x[:, 2] = np.round(x[:, 2], 1)
    np.savetxt(tmp_path / "t.csv", x, "%.10g", ",", header="u,k,r", comments="")
    datasets.load(config(tmp_path / "t.csv"))
    (record,) = [r for r in caplog.records if r.levelname == "WARNING"]
    said = record.getMessage()
    assert said.startswith("columns k, r: more than 5 % of the values occur more than once")
    assert "data.cell_width=0,1,0.1 says" in said
    caplog.clear()
    datasets.load(config(tmp_path / "t.csv", cell_width=(0.0, 1.0, 0.1)))
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_a_class_without_training_example_is_warned_of(tmp_path: Path, caplog) -> None:
    lines = [f"{i},{'common' if i < 19 else 'rare'}" for i in range(20)]
    path = write(tmp_path, "\n".join(["a,kind", *lines]))
    write(tmp_path, "19 3", "ids.txt")
    ids = str(tmp_path / "ids.txt")
    datasets.load(config(path, context_columns="kind", test_ids=ids))
    assert "classes ['rare'] of the test split have no training example" in caplog.text
