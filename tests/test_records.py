"""Rows on disk: summaries against NumPy, and what survives a kill at any byte."""

import itertools
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import records as records_module
from records import (
    Records,
    Running,
    Table,
    example_means,
    key_of,
    largest_share,
    summarize,
    with_checksum,
)

VALUES = np.random.default_rng(0).standard_normal((5, 3))  # [examples, repeats]


def row(index=0, repeat=0, value=1.0, **fields):
    identity = {"estimator": "ODE", "protocol": "rtol 1e-4, ½ batch", "step": 10, "split": "test"}
    identity |= {"index": index, "repeat": repeat, "identity": "0a1b"}
    return identity | {"value": value} | fields


def line(row):
    """As it is in a file."""
    return json.dumps(with_checksum(row))


def grid_of_rows(values=VALUES, **fields):
    places = itertools.product(range(values.shape[1]), range(values.shape[0]))
    return [row(i, r, float(values[i, r]), **fields) for r, i in places]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "eval" / "rows.jsonl"


# Summaries.


def test_summary_is_mean_over_examples_of_mean_over_repeats():
    examples = VALUES.mean(axis=1)
    summary = summarize(grid_of_rows())
    assert summary.mean == pytest.approx(examples.mean(), rel=1e-14)
    assert summary.standard_error == pytest.approx(examples.std(ddof=1) / np.sqrt(5), rel=1e-14)
    assert (summary.examples, summary.repeats) == (5, 3)


def test_summary_of_an_unfinished_evaluation_weights_examples_equally():
    """The third repeat is there for two examples only."""
    rows = grid_of_rows()[:12]
    examples = [np.mean([r["value"] for r in rows if r["index"] == i]) for i in range(5)]
    summary = summarize(rows)
    assert summary.mean == pytest.approx(np.mean(examples), rel=1e-14)
    assert summary.standard_error == pytest.approx(np.std(examples, ddof=1) / np.sqrt(5))
    assert (summary.examples, summary.repeats) == (5, 2)


def test_summary_of_another_field():
    rows = [row(i, nfe=n) for i, n in enumerate([20, 26, 32])]
    assert summarize(rows, "nfe").mean == 26


def test_summary_of_one_example_has_no_standard_error():
    summary = summarize([row(repeat=0, value=1.0), row(repeat=1, value=2.0)])
    assert summary.mean == 1.5
    assert np.isnan(summary.standard_error)


def test_summary_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no rows"):
        summarize([])


# Append and resume.


def test_rows_come_back_as_they_were_written(path):
    rows = grid_of_rows(unit="bits/dim", nfe=26, seconds=0.25)
    first = Records(path.parent)
    first.append(rows[:4])
    first.append(iter(rows[4:]))
    again = Records(path.parent)
    assert list(again.rows.values()) == list(first.rows.values()) == rows
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    assert [{k: v for k, v in found.items() if k != "crc32"} for found in lines] == rows


def test_a_field_that_is_nan_comes_back(path):
    """JSON has no NaN: it must not become null. A row that lacks an error has none to give."""
    Records(path.parent).append([row(0, error=float("nan")), row(1, error=0.5)])
    table = Records(path.parent).tables()[0]
    np.testing.assert_array_equal(table.column("error"), [np.nan, 0.5])


def test_text_that_is_not_unicode_comes_back(path):
    """As in the name of a file; the fast writer refuses it."""
    Records(path.parent).append([row(0, note="\udcff")])
    assert Records(path.parent).rows[key_of(row(0))]["note"] == "\udcff"


def test_the_disk_is_waited_for_once_a_second(path, monkeypatch):
    synced = []
    monkeypatch.setattr("os.fsync", lambda number: synced.append(number))
    now = iter([10.0, 10.0, 10.4, 11.1, 11.1])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    records = Records(path.parent)
    for index in range(3):
        records.append([row(index)])
    assert len(synced) == 2
    records.sync()
    assert len(synced) == 3


def test_missing_rows_are_those_that_were_not_written(path):
    rows = grid_of_rows()
    records = Records(path.parent)
    assert records.missing(rows) == rows
    records.append(rows[3:7])
    expected = rows[:3] + rows[7:]
    wanted = [{k: v for k, v in r.items() if k != "value"} for r in rows]
    assert [key_of(r) for r in records.missing(wanted)] == [key_of(r) for r in expected]
    assert Records(path.parent).missing(rows) == expected


def test_no_row_is_written_twice(path):
    records = Records(path.parent)
    records.append([row(0, value=1.0), row(1, value=2.0)])
    records.append([row(1, value=9.0), row(2, value=3.0), row(2, value=3.0)])
    Records(path.parent).append([row(0, value=9.0)])
    values = [r["value"] for r in Records(path.parent).rows.values()]
    assert values == [1.0, 2.0, 3.0]
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_value_that_is_not_finite_is_refused_with_nothing_written(path, value):
    with pytest.raises(ValueError, match=r"'ODE'.*not finite"):
        Records(path.parent).append([row(0), row(1, value=value)])
    assert not path.exists()
    records = Records(path.parent)
    records.append([row(0)])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"not finite"):
        records.append([row(2), row(3, value=value)])
    assert path.read_bytes() == before
    assert records.missing([row(2)])


@pytest.mark.parametrize(
    "other",
    [{"protocol": "rtol 1e-5"}, {"estimator": "bound"}, {"step": 20}, {"split": "train"}],
    ids=lambda other: next(iter(other)),
)
def test_rows_of_different_settings_never_mix(path, other):
    records = Records(path.parent)
    records.append(grid_of_rows())
    others = grid_of_rows(VALUES + 100.0, **other)
    assert records.missing(others) == others
    records.append(others[:5])
    again = Records(path.parent)
    (theirs,) = again.tables(**other)
    assert list(theirs) == others[:5]
    (mine,) = again.tables(**{field: row()[field] for field in other})
    assert list(mine) == grid_of_rows()
    assert summarize(mine).mean == pytest.approx(VALUES.mean())
    assert again.missing(others) == others[5:]
    assert len(again.tables()) == 2


def test_every_field_of_the_key_identifies(path):
    changed = {"estimator": "bound", "protocol": "other", "step": 11, "split": "train",
               "index": 1, "repeat": 1, "identity": "0a1c"}  # fmt: skip
    keys = {key_of(row())} | {key_of(row() | {k: v}) for k, v in changed.items()}
    assert len(keys) == 8


ANYTHING = st.one_of(
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False),
    st.text(max_size=3),
    st.booleans(),
    st.none(),
    st.lists(st.floats(allow_nan=False), max_size=3),
    st.lists(st.integers(), max_size=2),
)


@settings(max_examples=150, deadline=None)
@given(
    fields=st.lists(st.dictionaries(st.sampled_from("abc"), ANYTHING, max_size=3), max_size=12),
    waiting=st.integers(1, 5),
)
def test_columns_give_back_any_rows(fields, waiting):
    """Of whatever kinds, with fields that come and go; read in between or not."""
    table, rows = Table({"step": 3}), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records_module, "WAITING", waiting)
        for number, more in enumerate(fields):
            rows.append({"step": 3, "index": number, "repeat": 0} | more)
            table.add(rows[-1])
            table.add(rows[-1] | {"a": "another row of this place"})
            if number % 3 == 0:
                assert table[number] == rows[-1]
    assert [json.dumps(one, sort_keys=True) for one in table] == [
        json.dumps(one, sort_keys=True) for one in rows
    ]  # which tells 1, 1.0 and true apart
    assert len(table) == len(rows)
    for name in "abc":
        there = [row[name] for row in rows if name in row]
        assert table.knows(name) == (0 < len(there) == len(rows))
        if table.knows(name) and all(type(value) is float for value in there):
            assert table.column(name).dtype == np.float64
            np.testing.assert_array_equal(table.column(name), there)


def test_of_several_files_the_first_process_is_believed(path):
    """And fields that some rows lack are those of the others."""
    Records(path.parent).append([row(0, value=1.0), row(1, value=2.0, largest=9.0)])
    path.rename(path.with_name("aside"))
    Records(path.parent, host=1).append([row(0, value=5.0), row(2, value=3.0)])
    path.with_name("aside").rename(path)
    (table,) = Records(path.parent).tables()
    assert sorted(table.column("value").tolist()) == [1.0, 2.0, 3.0]
    assert table.present("largest") == [9.0]
    assert largest_share(table) == pytest.approx(9.0 / 6.0)
    assert not table.knows("largest")
    assert example_means(Table({})) == {}


def test_columns_of_lists_are_matrices():
    table = Table({})
    for index in range(3):
        table.add(row(index, bins=[float(index), 2.0]))
    np.testing.assert_array_equal(table.column("bins"), [[0.0, 2.0], [1.0, 2.0], [2.0, 2.0]])
    table.add(row(3, bins=[1.0]))
    assert [one["bins"] for one in table] == [[0.0, 2.0], [1.0, 2.0], [2.0, 2.0], [1.0]]
    assert table.lacks([0, 4], 0)
    assert not table.lacks([0, 3], 0)
    assert table.lacks([0], 1)


# A kill at any byte.


def test_half_written_line_is_cut_and_the_next_append_is_readable(path):
    Records(path.parent).append([row(0), row(1)])
    whole = path.read_bytes()
    path.write_bytes(whole + line(row(2)).encode()[:-5])
    records = Records(path.parent)
    assert path.read_bytes() != whole  # a reader leaves the line that another may be writing
    assert records.missing([row(0), row(1), row(2)]) == [row(2)]
    records.append([row(2)])
    assert list(Records(path.parent).rows.values()) == [row(0), row(1), row(2)]


def test_every_truncation_loses_only_the_rows_it_touches(path):
    """At each byte of the last two lines: the untouched rows stay, the others can be redone."""
    rows = [row(i, value=float(v), unit="bits/dim") for i, v in enumerate(VALUES[:, 0])]
    Records(path.parent).append(rows)
    whole = path.read_bytes()
    ends = np.cumsum([len(line) for line in whole.splitlines(keepends=True)])
    for length in range(ends[-3], len(whole) + 1):
        path.write_bytes(whole[:length])
        records = Records(path.parent)
        complete = int(np.sum(ends <= length))
        assert list(records.rows.values()) == rows[:complete]
        records.append(records.missing(rows))
        assert path.read_bytes() == whole


@settings(max_examples=60, deadline=None)
@given(
    batches=st.lists(
        st.lists(
            st.tuples(st.integers(0, 5), st.integers(0, 1), st.floats(-1e9, 1e9), st.text()),
            max_size=4,
        ),
        max_size=4,
    ),
    fraction=st.floats(0.0, 1.0),
)
def test_any_history_with_a_kill_is_a_prefix_of_the_rows(batches, fraction):
    """Any text in a row, any order, any repetition, cut anywhere: distinct rows, first come."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        expected = {}
        for batch in batches:
            rows = [row(i, r, value, note=note) for i, r, value, note in batch]
            Records(path.parent).append(rows)
            expected = {key_of(new): new for new in rows} | expected
        whole = path.read_bytes() if path.exists() else b""
        path.write_bytes(whole[: round(fraction * len(whole))])
        kept = Records(path.parent).rows
        content = path.read_bytes()
        lines = content[: content.rfind(b"\n") + 1].splitlines()  # half a line stays until then
        assert len(lines) == len(kept)
        assert path.read_bytes() == whole[: len(path.read_bytes())]
        assert all(expected[key] == value for key, value in kept.items())
        if fraction == 1.0:
            assert kept == expected
        Records(path.parent).append([row(6, 0)])
        assert list(Records(path.parent).rows.values()) == [*kept.values(), row(6, 0)]


def test_each_process_appends_to_a_file_of_its_own_and_reads_all(path: Path) -> None:
    first, second = Records(path.parent), Records(path.parent, host=1)
    first.append([row(0)])
    second.append([row(1)])
    assert [p.name for p in sorted(path.parent.iterdir())] == ["rows-1.jsonl", "rows.jsonl"]
    assert list(Records(path.parent, host=1).rows) == list(Records(path.parent).rows)
    assert Records(path.parent).missing([row(0), row(1), row(2)]) == [row(2)]


DAMAGED = {
    "no object": "[0]",
    "no text": "\0\0\0",
    "brackets": "[" * 100_000,
    "key": line(row(1)).replace("index", "indox"),
    "index": line(row(1)).replace(": 1,", ": 2,"),
    "list for a text": line(row(1)).replace('"test"', '["test"]'),
    "digit of the value": line(row(1)).replace("1.0", "1.5"),
    "endless value": line(row(1)).replace("1.0", "1e999"),
    "identity": line(row(1)).replace("0a1b", "0a1c"),
    "digit of the checksum": line(row(1))[:-3] + "x" + line(row(1))[-2:],
    "no checksum": json.dumps(row(1)),
}


@pytest.mark.parametrize("damaged", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_line_is_left_out_and_said_and_its_row_is_missing(path, caplog, damaged) -> None:
    rows = [row(0), row(1), row(2)]
    Records(path.parent).append(rows)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], damaged, lines[2], ""]))
    records = Records(path.parent)
    assert f"{path}: line 2 is damaged and is left out" in caplog.text
    assert records.missing(rows) == [row(1)]
    records.append(rows)
    assert sorted(Records(path.parent).rows.values(), key=key_of) == rows


def test_the_running_mean_is_that_of_the_rows_so_far():
    rows, running = grid_of_rows(), Running()
    for number, one in enumerate(rows, 1):
        running.add(one["index"], one["value"])
        if number > 1:
            expected = summarize(rows[:number])
            found = running.so_far("ODE")
            assert running.rows == number
            assert found["ODE"] == pytest.approx(expected.mean, rel=1e-12)
            assert found["s.e."] == pytest.approx(expected.standard_error, rel=1e-9)


def test_stored_tables_are_parsed_again_where_a_file_changed(path: Path) -> None:
    Records(path.parent).append([row(0)])
    (first,) = records_module.stored(path.parent)
    assert records_module.stored(path.parent)[0] is first
    Records(path.parent).append([row(2)])
    (second,) = records_module.stored(path.parent)
    Records(path.parent, host=1).append([row(1)])
    (third,) = records_module.stored(path.parent)
    assert (len(first), len(second), len(third)) == (1, 2, 3)
    assert records_module.stored(path.parent / "none") == []
