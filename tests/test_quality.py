"""Sampling and its metrics as part of an evaluation: shards, resumption, refusals."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import classifier
import evaluation
import run_lib
from run_lib import quality, sampling_loop
from run_lib.experiment import Experiment
from run_lib.sampling_loop import Generator
from tests import tiny


def config(stats: Path, **changes):
    c = tiny.config()
    c.data.update(num_train=400, num_test=100)
    c.eval.update(features="classifier", stats=str(stats), enable_bpd=False, bound=False)
    c.eval.update(num_samples=20, batch_size=8)
    c.eval.update(changes)
    return c


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder, and statistics beside the classifier that all tests share."""
    workdir = tmp_path_factory.mktemp("run")
    run_lib.train(Experiment.from_config(config(workdir / "stats.npz")), workdir)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "trained", partial(classifier.trained, num_steps=50))
        run_lib.fid_stats(Experiment.from_config(config(workdir / "stats.npz")))
        yield workdir


def evaluate(workdir, eval_folder, **changes):
    experiment = Experiment.from_config(config(workdir / "stats.npz", **changes))
    run_lib.evaluate(experiment, workdir, eval_folder)
    return quality.read(workdir / eval_folder)


def all_samples(workdir, eval_folder, number=20):
    rows = sampling_loop.read(workdir / eval_folder / "samples_20", number)
    return np.concatenate([row["samples"] for row in rows])


def test_statistics_hold_each_image_of_the_split_once(trained):
    found = evaluation.read_statistics(trained / "stats.npz")
    dataset = Experiment.from_config(config(trained / "x")).dataset
    network = classifier.trained(dataset, trained)
    expected, _ = network(dataset.test.examples(np.arange(100)))
    np.testing.assert_allclose(found.pool_3, expected, rtol=1e-5, atol=1e-6)
    assert (found.dataset, found.split) == ("digits 8x8x1", "test")
    assert found.extractor == f"classifier-{network.identity}"


def test_metrics_are_those_of_the_samples_and_appear_in_the_report(trained):
    rows = {row["metric"]: row for row in evaluate(trained, "a")}
    assert rows.keys() == {f"{name} (digits classifier)" for name in ("FID", "KID", "IS")}
    dataset = Experiment.from_config(config(trained / "x")).dataset
    network = classifier.trained(dataset, trained)
    features, logits = network(all_samples(trained, "a"))
    reference = evaluation.read_statistics(trained / "stats.npz").pool_3
    fid, row = evaluation.frechet_distance(features, reference), rows["FID (digits classifier)"]
    np.testing.assert_allclose([row["value"], row["error"]], fid, rtol=1e-5)
    score = evaluation.inception_score(logits)
    np.testing.assert_allclose(rows["IS (digits classifier)"]["value"], score.value, rtol=1e-5)
    assert (row["n_samples"], row["n_reference"], row["step"]) == (20, 100, 20)
    assert row["reference"] == "digits 8x8x1 test"
    assert (row["nfe"], row["max_nfe"]) == (11.0, 11)  # 10 steps and denoising
    assert f"accuracy {network.accuracy:.4f} on 100 test images" in row["protocol"]
    assert row["protocol"].startswith("sde, denoised, num_steps 10, t_min 0.001, lmbd 0.0; ")
    page = (trained / "report.html").read_text()
    assert "<h2>Sample quality: a</h2>" in page
    assert "FID (digits classifier)" in page
    assert (trained / "samples.png").exists()
    assert evaluate(trained, "a") == list(rows.values())


def test_shards_cover_the_samples_and_do_not_depend_on_the_batch_size(trained):
    evaluate(trained, "b", batch_size=8)
    evaluate(trained, "c", batch_size=12)
    where = trained / "b" / "samples_20"
    assert [(s.first, s.last) for s in sampling_loop.shards(where)] == [(0, 7), (8, 15), (16, 19)]
    with np.load(trained / "c" / "samples_20" / "00000000-00000011.npz") as shard:
        assert shard["samples"].dtype == np.uint8
        assert shard["samples"].shape == (12, 8, 8, 1)
    one, other = all_samples(trained, "b"), all_samples(trained, "c")
    assert one.shape == (20, 8, 8, 1)
    assert np.mean(one != other) < 0.01  # rounding at the edge of a grey level
    assert len(np.unique(one.reshape(20, -1), axis=0)) == 20


def test_an_interrupted_evaluation_draws_only_what_is_missing(trained, monkeypatch):
    first, samples = evaluate(trained, "d"), all_samples(trained, "d")
    where = trained / "d" / "samples_20"
    kept = (where / "00000000-00000007.npz").stat().st_mtime_ns
    (where / "00000008-00000015.npz").unlink()
    last = where / "00000016-00000019.npz"
    last.write_bytes(last.read_bytes()[:-50])
    (where / "00000040-00000047.npz.tmp").write_bytes(b"half")
    (features,) = (path for path in where.iterdir() if path.is_dir())
    (features / "00000000-00000007.npz").write_bytes(b"")
    drawn = []
    plain = Generator.batch

    def counted(self, params, ids, end):
        drawn.append((ids[0], end))
        return plain(self, params, ids, end)

    monkeypatch.setattr(Generator, "batch", counted)
    second = evaluate(trained, "d")
    assert drawn == [(8, 16), (16, 20)]
    assert (where / "00000000-00000007.npz").stat().st_mtime_ns == kept
    np.testing.assert_array_equal(all_samples(trained, "d"), samples)
    assert second == first
    drawn.clear()
    more = evaluate(trained, "d", num_samples=30, batch_size=12)
    assert drawn == [(20, 30)]
    assert len(more) == 2 * len(first)  # figures of another number of samples are other rows
    np.testing.assert_array_equal(all_samples(trained, "d", 30)[:20], samples)
    drawn.clear()
    damaged = where / "00000008-00000015.npz"
    damaged.write_bytes(damaged.read_bytes()[:-50])
    evaluate(trained, "d", batch_size=4)
    assert drawn == [(8, 12), (12, 16)]
    assert not damaged.exists()
    assert np.mean(all_samples(trained, "d") != samples) < 0.01


def test_a_shard_that_is_whole_but_wrong_is_named(trained):
    evaluate(trained, "e")
    where = trained / "e" / "samples_20"
    with pytest.raises(ValueError, match="has no row 20"):
        list(sampling_loop.read(where, 25))
    path = where / "00000000-00000007.npz"
    content = bytearray(path.read_bytes())
    content[300] ^= 255
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"00000000-00000007\.npz is damaged"):
        evaluate(trained, "e")


def test_samples_of_another_sampler_are_not_mixed(trained):
    evaluate(trained, "f")
    c = config(trained / "stats.npz")
    c.sampling.lmbd = 0.5
    with pytest.raises(ValueError, match=r"samples of another sampler .*lmbd 0\.0.*lmbd 0\.5"):
        run_lib.evaluate(Experiment.from_config(c), trained, "f")


def no_work(monkeypatch):
    """Make sampling and likelihoods impossible: what is refused must be refused before them."""

    def forbidden(*args, **kwargs):
        raise AssertionError("work began")

    monkeypatch.setattr(Generator, "batch", forbidden)
    monkeypatch.setattr("run_lib.evaluation_loop.fill_rows", forbidden)


def test_what_is_missing_is_said_before_any_work(trained, monkeypatch, tmp_path):
    import tensorflow_hub

    def no_network(handle):
        raise OSError("no route to host")

    no_work(monkeypatch)
    monkeypatch.setattr(tensorflow_hub, "resolve", no_network)
    monkeypatch.setattr(evaluation, "ASSETS", tmp_path)
    with pytest.raises(ValueError, match=r"no route to host.*Download https://tfhub\.dev"):
        evaluate(trained, "g", features="inception", enable_bpd=True)
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "stats.npz").unlink()
    with pytest.raises(ValueError, match=r"no statistics .*stats\.npz: make them with --mode=fid"):
        evaluate(tmp_path / "run", "g", enable_bpd=True)
    with pytest.raises(ValueError, match=r"eval\.features='classifer': allowed are"):
        evaluate(tmp_path / "run", "g", features="classifer")  # whose statistics are gone
    with pytest.raises(ValueError, match=r"eval\.num_samples=1: need 2"):
        evaluate(trained, "g", num_samples=1)
    np.savez(tmp_path / "run" / "stats.npz", pool_3=np.eye(5))
    with pytest.raises(ValueError, match="statistics of another extractor: unnamed, 5 features"):
        evaluate(tmp_path / "run", "g", bound=True)
    assert not list(trained.glob("g/samples*"))


def test_features_of_points_are_refused(tmp_path):
    c = tiny.config("swissroll")
    c.eval.update(features="classifier", enable_bpd=False, bound=False)
    experiment = Experiment.from_config(c)
    with pytest.raises(ValueError, match=r"eval\.features='classifier': swissroll are points"):
        quality.scorer(experiment, tmp_path, 1)
    c.eval.features = ""
    with pytest.raises(ValueError, match=r"--mode=fid_stats needs --config\.eval\.features"):
        run_lib.fid_stats(Experiment.from_config(c))


def test_statistics_are_made_once_and_not_overwritten(trained, caplog):
    before = (trained / "stats.npz").stat().st_mtime_ns
    run_lib.fid_stats(Experiment.from_config(config(trained / "stats.npz")))
    with pytest.raises(ValueError, match=r"100 images of split 'test'; now 400 of 'train'"):
        run_lib.fid_stats(Experiment.from_config(config(trained / "stats.npz", dataset="train")))
    assert (trained / "stats.npz").stat().st_mtime_ns == before


def test_hosts_share_the_samples_of_a_batch(trained, tmp_path, monkeypatch):
    """Two hosts, one after the other in one process: disjoint shards, the samples of one host."""
    experiment = Experiment.from_config(config(trained / "stats.npz"))
    key = experiment.keys["samples"]
    params = experiment.model.init(key, (8, 8, 1))
    generate = Generator(experiment, key, 8)
    sampling_loop.draw(generate, params, tmp_path / "one", 20, "0a1b")
    for index in (0, 1):
        host = sampling_loop.devices.host().__class__(index, 2)
        monkeypatch.setattr(sampling_loop.devices, "host", lambda host=host: host)
        everything = np.ones(20, bool)
        monkeypatch.setattr(sampling_loop, "_missing", lambda *_, all_=everything: all_)
        sampling_loop.draw(generate, params, tmp_path / "two", 20, "0a1b")
    spans = [(s.first, s.last) for s in sampling_loop.shards(tmp_path / "two")]
    assert spans == [(0, 3), (4, 7), (8, 11), (12, 15), (16, 19)]
    one, two = (
        np.concatenate([row["samples"] for row in sampling_loop.read(tmp_path / name, 20)])
        for name in ("one", "two")
    )
    assert np.mean(one != two) < 0.01


def test_rows_of_quality_are_json(trained):
    evaluate(trained, "h")
    rows = json.loads((trained / "h" / "quality.json").read_text())
    assert {"metric", "value", "error", "extractor", "step", "nfe"} <= rows[0].keys()
    quality.add(trained / "h", [rows[0] | {"value": 3.0}])
    assert len(quality.read(trained / "h")) == len(rows)
