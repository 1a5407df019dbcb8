"""A stored figure is used again only for the network, the data and the settings that it is of."""

import json
import shutil
import subprocess
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import ConfigDict

import classifier
import evaluation
import run_lib
from records import Records, Summary
from run_lib import evaluation_loop, folder, identities, page, quality, report, sampling_loop
from run_lib.experiment import Experiment
from tests import tiny

pytestmark = pytest.mark.usefixtures("compiled_at_o0")


def npz(path: Path, seed: int = 0, n_test: int = 24, brightest: int = 17) -> Path:
    """Random images under this path."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    train, test = (rng.integers(0, brightest, (n, 8, 8), np.uint8) for n in (48, n_test))
    np.savez(path, x_train=train, x_test=test)
    return path


def config(path: Path | None = None, **changes: object) -> ConfigDict:
    """A training of five steps and one estimator; of an archive where there is a path."""
    c = tiny.config("npz" if path else "digits")
    c.data.update(path=str(path or ""), num_test=0 if path else 24)
    c.training.update(n_iters=5, eval_freq=5, snapshot_freq=5)
    c.eval.update({"enable_bpd": False, "enable_sampling": False} | changes)
    return c


def rows_of(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "eval/rows.jsonl").read_text().splitlines()]


def train(c: ConfigDict, workdir: Path) -> None:
    run_lib.train(Experiment.from_config(c), workdir)


def evaluate(c: ConfigDict, workdir: Path, eval_folder: str = "eval") -> list[report.Result]:
    run_lib.evaluate(Experiment.from_config(c), workdir, eval_folder)
    return report.summaries(workdir / eval_folder)


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder, trained and evaluated once."""
    workdir = tmp_path_factory.mktemp("once")
    train(config(), workdir)
    evaluate(config(), workdir)
    return workdir


@pytest.fixture
def trained(once: Path, tmp_path: Path) -> Path:
    """A copy of that run folder."""
    return Path(shutil.copytree(once, tmp_path / "run"))


def test_a_network_trained_again_in_the_same_folder_has_figures_of_its_own(trained: Path) -> None:
    c = config(enable_sampling=True)
    (first,) = evaluate(c, trained)
    shard = next((trained / "eval/samples_5").glob("*-*.npz"))
    samples = np.load(shard)["samples"]
    assert evaluate(c, trained) == [first]
    shutil.rmtree(trained / "checkpoints")
    c.optim.lr = 0.3
    train(c, trained)
    assert report.summaries(trained / "eval") == []
    assert "bits/dim" not in (trained / "report.html").read_text()
    assert not (trained / "samples.png").exists()
    (second,) = evaluate(c, trained)
    (alone,) = evaluate(c, trained, "alone")
    assert second.value == alone.value
    assert abs(second.value.mean - first.value.mean) > 1e-3
    assert (second.value.examples, second.identity) == (24, alone.identity)
    assert len(Records(trained / "eval").rows) == 48
    np.testing.assert_array_equal(
        np.load(shard)["samples"], np.load(trained / "alone/samples_5" / shard.name)["samples"]
    )
    assert np.any(np.load(shard)["samples"] != samples)
    (earlier,) = (trained / "eval").glob("samples_5-of-*")
    np.testing.assert_array_equal(np.load(earlier / shard.name)["samples"], samples)


def test_other_data_under_the_same_path_are_refused_and_moved_ones_are_not(tmp_path: Path) -> None:
    path, workdir = npz(tmp_path / "a/data.npz"), tmp_path / "run"
    c = config(path)
    train(c, workdir)
    (before,) = evaluate(c, workdir)
    moved = tmp_path / "b/other.npz"
    moved.parent.mkdir()
    with np.load(path) as arrays:
        np.savez_compressed(moved, **arrays)
    assert evaluate(config(moved), workdir) == [before]
    for changed in ({"seed": 1}, {"n_test": 10}):
        npz(path, **changed)
        digests = Experiment.from_config(c).dataset.digests
        c.training.n_iters = 10
        for mode in (train, evaluate):
            with pytest.raises(ValueError, match="the data are not those that") as error:
                mode(c, workdir)
            then = json.loads((workdir / identities.RUN).read_text())["data"]["test"]["digest"]
            assert f"24 examples, digest {then} then" in str(error.value)
            assert f"digest {digests['test']} now" in str(error.value)
    assert report.summaries(workdir / "eval") == [before]


def test_rows_do_not_depend_on_how_many_training_examples_are_read(trained: Path) -> None:
    """Those of baselines do."""
    c = config(baselines=True)
    (before,) = report.summaries(trained / "eval")
    found = []
    for number in (100, 0):
        c.data.num_train = number
        found.append({r.estimator: r for r in evaluate(c, trained)})
        assert found[-1]["bound"].value == before.value
    assert found[0].keys() == found[1].keys()
    assert found[0]["histogram"].value.mean != found[1]["histogram"].value.mean
    assert len([row for row in rows_of(trained) if row["estimator"] == "bound"]) == 24


def test_a_test_split_of_another_size_has_rows_of_its_own(trained: Path) -> None:
    c = config()
    c.data.num_test = 12
    (fewer,) = evaluate(c, trained)
    assert fewer.value.examples == 12
    assert len(rows_of(trained)) == 36


def test_what_changes_the_network_changes_the_identity(tmp_path: Path) -> None:
    c = config()
    plain = identities.settings_digest(Experiment.from_config(c))
    for section, field, value, same in (
        ("model", "dropout", 0.5, True), ("model", "ema_rate", 0.5, True),
        ("model", "num_scales", 20, True), ("eval", "batch_size", 8, True),
        ("model", "beta_max", 10.0, False), ("data", "centered", False, False),
    ):  # fmt: skip
        changed = config()
        with changed.unlocked():
            changed[section][field] = value
        other = identities.settings_digest(Experiment.from_config(changed))
        assert (other == plain) == same, field


def test_digests_are_those_of_the_content(tmp_path: Path) -> None:
    def digests(path: Path | None, **data: object) -> dict[str, str]:
        c = config(path)
        c.data.update(data)
        return Experiment.from_config(c).dataset.digests

    first = digests(npz(tmp_path / "a.npz"))
    assert digests(npz(tmp_path / "b.npz")) == first
    other = digests(npz(tmp_path / "c.npz", n_test=25))
    assert other["train"] == first["train"]
    assert other["test"] != first["test"]
    assert digests(tmp_path / "a.npz", num_train=10)["test"] == first["test"]
    with np.load(tmp_path / "a.npz") as arrays:
        np.savez(tmp_path / "d.npz", **arrays, y_train=np.arange(48), y_test=np.arange(24))
    assert digests(tmp_path / "d.npz").keys() == first.keys()
    assert not set(digests(tmp_path / "d.npz").values()) & set(first.values())


def test_a_damaged_row_is_left_out_and_computed_again(trained: Path, caplog) -> None:
    (before,) = report.summaries(trained / "eval")
    path = trained / "eval/rows.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    row = json.loads(lines[3])
    digit = json.dumps(row["value"])
    changed = lines[3].replace(f'"value":{digit}', f'"value":{float(digit) + 1.0}')
    assert changed != lines[3]
    path.write_text("".join([*lines[:3], changed, *lines[4:]]))
    (less,) = report.summaries(trained / "eval")
    assert less.value.examples == 23
    assert "rows.jsonl: line 4 is damaged" in caplog.text
    (after,) = evaluate(config(), trained)
    assert after.value == pytest.approx(before.value, rel=1e-12)


def test_rows_of_an_older_version_are_computed_anew(trained: Path, caplog) -> None:
    (before,) = report.summaries(trained / "eval")
    path, rows = trained / "eval/rows.jsonl", rows_of(trained)
    for row in rows:
        del row["identity"], row["crc32"]
        row["value"] += 1.0
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("eval/identities.json", "identity.json"):
        (trained / name).unlink()
    caplog.clear()
    (after,) = evaluate(config(), trained)
    assert after.value == pytest.approx(before.value, rel=1e-12)
    assert caplog.text.count("24 rows of an older version") == 1
    assert len(rows_of(trained)) == 48


def test_statistics_are_of_the_data_that_are_there(tmp_path: Path, monkeypatch) -> None:
    """Two archives of one name: each has a file; under one path, the other is refused."""
    monkeypatch.setattr(evaluation, "ASSETS", tmp_path)
    monkeypatch.setattr(classifier, "trained", partial(classifier.trained, num_steps=5))
    experiments = []
    for name in ("one", "{two}"):
        rng = np.random.default_rng(len(name))
        path = tmp_path / name / "data.npz"
        path.parent.mkdir()
        arrays = {f"x_{k}": rng.integers(0, 17, (40, 8, 8), np.uint8) for k in ("train", "test")}
        np.savez(path, **arrays, y_train=np.arange(40) % 3, y_test=np.arange(40) % 3)
        experiments.append(Experiment.from_config(config(path, features="classifier")))
        run_lib.fid_stats(experiments[-1])
    files = sorted((tmp_path / "stats").glob("data-*_classifier_stats.npz"))
    found = [evaluation.read_statistics(path).digest for path in files]
    assert sorted(found) == sorted(e.dataset.digests["test"] for e in experiments)
    for number, stats in enumerate(files):
        c = config(tmp_path / "one/data.npz", features="classifier", stats=str(stats))
        experiment = Experiment.from_config(c)
        if found[number] == experiment.dataset.digests["test"]:
            run_lib.fid_stats(experiment)
        else:
            with pytest.raises(ValueError, match=r"another extractor|was made of data"):
                run_lib.fid_stats(experiment)


def test_a_figure_of_quality_that_is_damaged_or_replaced_is_not_reported(tmp_path: Path) -> None:
    target = tmp_path / "eval"
    row = dict.fromkeys(quality.KEY, "") | {"step": 1, "value": 2.0, "identity": "x"}
    quality.add(target, [row, row | {"step": 2, "value": 3.0}])
    assert [r["value"] for r in quality.read(target)] == [2.0, 3.0]
    path = target / quality.FILE
    path.write_text(path.read_text().replace("3.0", "3.5"))
    assert [r["value"] for r in quality.read(target)] == [2.0]
    identities.declare(target, [identities.Figure("samples", 1, "test", "a", "b", "c")])
    assert quality.read(target) == []


def test_the_latest_of_two_figures_replaces_the_other(tmp_path: Path) -> None:
    """Same step, other parameters; same split, other data; other settings."""
    first = identities.Figure("model", 5, "test", "p", "d", "s")
    for changes, stays in (
        ({"parameters": "q"}, False), ({"data": "e"}, False), ({"settings": "t"}, False),
        ({"step": 6, "parameters": "q"}, True), ({"split": "train", "data": "e"}, True),
        ({"kind": "baseline", "parameters": "train"}, True),
    ):  # fmt: skip
        target = tmp_path / str(changes)
        second = first._replace(**changes)
        identities.declare(target, [first])
        identities.declare(target, [second])
        assert set(identities.current(target)) == {second.identity, *[first.identity][:stays]}


def test_pictures_are_those_of_reported_steps_and_splits(tmp_path: Path) -> None:
    """In the order of the steps; the picture of a network without figures goes."""
    of = identities.Figure("model", 5, "test", "p", "d", "s")
    identities.declare(tmp_path, [of._replace(step=10), of, of._replace(split="train", data="e")])
    names = [f"extremes_{place}.png" for place in ("5_test", "5_train", "10_test")]
    for name in (*names, "extremes_7_test.png", "extremes_10_train.png", "extremes_5.png"):
        (tmp_path / name).touch()
    assert [path.name for path in page._pictures(tmp_path, report.EXTREMES)] == names
    settings = SimpleNamespace(eval=SimpleNamespace(dataset="test"))
    here = SimpleNamespace(dataset=None, settings=settings)
    evaluation_loop._save_extremes(here, SimpleNamespace(target=tmp_path, step=5), [])
    assert [path.name for path in page._pictures(tmp_path, report.EXTREMES)] == names[1:]


def test_the_drawing_of_the_headline_tells_splits_apart(tmp_path: Path, monkeypatch) -> None:
    names, drawn = ("ODE", "Gaussian"), []
    value = Summary(1.0, 0.1, 9, 1)
    results = [
        report.Result(5, split, name, "p", "i", "nats", value, 1.0, 1, 0.0, [], None, [], [])
        for split in ("test", "train")
        for name in names
    ]
    monkeypatch.setattr(page.plotting, "save_marks", lambda path, marks, label: drawn.append(marks))
    monkeypatch.setattr(page, "picture", lambda path, seen, numbers: numbers)
    for shown in (results, results[:2]):
        list(page._headline(tmp_path, shown))
    assert [mark.name for mark in drawn[0]] == [
        "ODE, test", "Gaussian, test", "ODE, train", "Gaussian, train"
    ]  # fmt: skip
    assert [mark.name for mark in drawn[1]] == ["ODE", "Gaussian"]


def test_a_damaged_list_of_identities_is_named(tmp_path: Path) -> None:
    identities.declare(tmp_path, [identities.Figure("model", 5, "test", "p", "d", "s")])
    path = tmp_path / identities.CURRENT
    path.write_text(path.read_text().replace('"test"', '"tent"'))
    with pytest.raises(ValueError, match=r"identities\.json is damaged: delete it"):
        identities.current(tmp_path)


@pytest.mark.parametrize(
    ("name", "other"),
    [("config.seed", {"seed": 1}), ("digest of the data.test", {"test": 12}), ("", {})],
)
def test_processes_agree_on_config_and_data(monkeypatch, name: str, other: dict) -> None:
    """The same data may be elsewhere on the machine of another process."""
    told = []

    def tell(which: str, text: str) -> list[str]:
        told.append(text)
        return told

    monkeypatch.setattr(identities.jax, "process_count", lambda: 2)
    monkeypatch.setattr(identities.devices, "told_by_all", tell)
    monkeypatch.setattr(identities, "GRACE_S", 0.0)
    identities.agree(Experiment.from_config(config()), {"mode": "eval"})
    c = config()
    c.seed = other.get("seed", c.seed)
    c.data.num_test = other.get("test", c.data.num_test)
    if not name:
        return identities.agree(Experiment.from_config(c), {"mode": "eval"})
    with pytest.raises(ValueError, match=rf"different configs or data.*{name}: .* in process 1"):
        identities.agree(Experiment.from_config(c), {"mode": "eval"})


def test_samples_of_another_network_are_never_read(tmp_path: Path) -> None:
    where = tmp_path / "samples_5"
    folder.write_json(where / "protocol.json", {"identity": "a"})
    path = sampling_loop.shard_path(where, 0, 0)
    np.savez(path, samples=np.zeros((1, 8, 8, 1), np.uint8), nfe=np.ones(1), identity="b")
    with pytest.raises(ValueError, match=r"00000000-00000000\.npz is not of a, the samples of"):
        list(sampling_loop.read(where, 1))


def test_results_do_not_go_into_the_folder_of_a_dequantiser(trained: Path) -> None:
    (trained / "flowpp_dequantizer/checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"--eval_folder='flowpp_dequantizer': .* a dequantiser"):
        evaluate(config(), trained, "flowpp_dequantizer")
    assert not (trained / "flowpp_dequantizer/rows.jsonl").exists()


def test_a_copy_inside_another_repository_has_no_commit(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(["git", "-C", tmp_path, *arguments], check=True, capture_output=True)

    (tmp_path / "copy").mkdir()
    (tmp_path / "copy/file").write_text("text")
    git("init")
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "first")
    assert len(folder.git_commit(tmp_path)) >= 7
    assert folder.git_commit(tmp_path / "copy") == "unknown"
