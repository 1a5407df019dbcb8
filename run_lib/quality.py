"""Samples of a checkpoint, their features, and FID, KID and IS; statistics of data sets.

    eval/samples_<step>/<first>-<last>.npz               samples
    eval/samples_<step>/<extractor>/<first>-<last>.npz   their features
    eval/quality.json                                    one row per step, metric and protocol

Whatever can go wrong with the extractor or the statistics is found before anything is drawn.
"""

import dataclasses
import hashlib
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np

import evaluation
import json_files
import npz_files
import plotting
from checks import path_of, require
from evaluation import Extractor, Features, Statistics
from records import is_intact, is_older, with_checksum
from run_lib import devices, figures, folder, identities, sampling_loop
from run_lib.experiment import Experiment
from run_lib.identities import Figure
from run_lib.sampling_loop import Generator
from streams import Host

FILES = ("npz", "folder")  # data sets that are called as their file or folder
logger = logging.getLogger("fokker")
FILE = "quality.json"
KEY = ("step", "metric", "protocol", "n_samples", "reference", "n_reference", "identity")
HEADER = ("step", "metric", "value", "n", "reference", "evaluations", "protocol")
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Scorer:
    """An extractor and the statistics to compare with."""

    extractor: Extractor
    reference: Statistics
    path: Path  # of the statistics


def scorer(experiment: Experiment, target: Path, step: int) -> Scorer | None:
    """Return what the samples of a checkpoint are measured with; None if no metrics are wanted.

    Raises:
        ValueError: the extractor or the statistics are absent or do not fit, or the folder has
            samples of another sampler.
    """
    config = experiment.settings.eval
    if not config.enable_sampling:
        return None
    sampling_loop.check_samples(sampling_loop.protocol(experiment), _folder(target, step))
    return _scorer(experiment) if config.features else None


def check(experiment: Experiment, *, will_have_statistics: bool) -> None:
    """Check, before the first mode begins, what the samples of a later mode are measured with.

    Raises:
        ValueError: the extractor is absent or does not fit; so are the statistics, unless a mode
            that makes them comes before.
    """
    config = experiment.settings.eval
    if not (config.enable_sampling and config.features):
        return
    if will_have_statistics:
        evaluation.check_features(config.features, experiment.dataset)
    else:
        _scorer(experiment)


def _scorer(experiment: Experiment) -> Scorer:
    config = experiment.settings.eval
    evaluation.check_features(config.features, experiment.dataset)
    require(config.num_samples >= 2, "eval.num_samples", config.num_samples, "2 for a covariance")
    path = _path(experiment)
    if not path.exists():
        raise ValueError(
            f"there are no statistics {path}: make them with --mode=fid_stats and the same "
            "--config.eval.features and --config.eval.stats (--config.eval.dataset is their split)"
            f", or see {evaluation.ASSETS / 'stats' / 'README.md'} (eval.features='': no metrics)"
        )
    reference, extractor = evaluation.read_statistics(path), _extractor(experiment)
    _check(reference, path, extractor, experiment)
    return Scorer(extractor, reference, path)


def _folder(target: Path, step: int) -> Path:
    return target / f"samples_{step}"


def _name(experiment: Experiment) -> str:
    """Name the data as in file names; data from a file or folder are named after it."""
    data = experiment.settings.data
    named = data.dataset.lower() in FILES
    return path_of("data.path", data.path).resolve().stem if named else data.dataset.lower()


def _data(experiment: Experiment) -> str:
    """The data as written in statistics, as cifar10 32x32x3."""
    category = experiment.settings.data.category
    category = f" {category}" if category else ""
    return f"{_name(experiment)}{category} {'x'.join(map(str, experiment.dataset.shape))}"


def _path(experiment: Experiment) -> Path:
    """`eval.stats`, or the default of these data and features."""
    config = experiment.settings.eval
    if config.stats:
        return path_of("eval.stats", config.stats)
    name, data = _name(experiment), experiment.settings.data
    if data.dataset.lower() in FILES:  # others may have the same name
        name += f"-{experiment.dataset.digests['train'][:8]}"
    size = experiment.dataset.shape[0]
    return evaluation.statistics_path(name, config.features, category=data.category, size=size)


def _extractor(experiment: Experiment) -> Extractor:
    """The extractor; what it must make or download first, the first process makes for all."""
    named = dataclasses.replace(experiment.dataset, name=_name(experiment))
    folder, features = _path(experiment).parent, experiment.settings.eval.features
    if devices.is_first():
        found = evaluation.extractor(features, named, folder)
    devices.wait_for_all("extractor")
    return found if devices.is_first() else evaluation.extractor(features, named, folder)


def _digest_of(reference: Statistics) -> str:
    """Return the digest of the data of statistics; in files of other codes, of the features."""
    features = hashlib.sha256(np.ascontiguousarray(reference.pool_3).data).hexdigest()[:16]
    return reference.digest or features


def _check(found: Statistics, path: Path, extractor: Extractor, experiment: Experiment) -> None:
    probe = evaluation.extract(extractor, np.zeros((1, *experiment.dataset.shape), np.uint8))
    evaluation.check_statistics(
        found,
        path,
        extractor=extractor.identity,
        dataset=_data(experiment),
        width=probe.pool_3.shape[1],
        digests=experiment.dataset.digests,
    )


def sample(
    experiment: Experiment,
    params: Any,
    model: Figure,
    target: Path,
    scorer: Scorer | None,
) -> None:
    """Draw `eval.num_samples` samples, show them, and measure them.

    Args:
        experiment: settings and data.
        params: of the network.
        model: the identity of its figures.
        target: folder of the results.
        scorer: measures the samples, if there is one.
    """
    config = experiment.settings.eval
    where, number = _folder(target, model.step), config.num_samples
    identity = identities.of_samples(model).identity
    key = experiment.keys["samples"]
    generate = Generator(experiment, key, config.batch_size, config.dataset)
    sampling_loop.draw(generate, params, where, number, identity)
    if scorer is not None:
        extract_all(scorer.extractor, where, number)
    _show(experiment, params, where, target.parent)
    if devices.is_first() and scorer is not None:
        _measure(experiment, model, target, scorer)
    devices.wait_for_all(f"quality {where}")


def extract_all(extractor: Extractor, where: Path, number: int) -> None:
    """Features of every shard that has none yet, every host its share of the shards."""
    host = devices.host()
    of_first = [shard for shard in sampling_loop.shards(where) if shard.first < number]
    for shard in of_first[host.index :: host.count]:
        path = where / extractor.identity / shard.path.name
        if not npz_files.is_whole(path):
            arrays = npz_files.read(shard.path, ("samples", "identity"))
            features = evaluation.extract(extractor, arrays["samples"])._asdict()
            npz_files.write(path, features | {"identity": arrays["identity"]})
            logger.info("features of samples %d to %d are there", shard.first, shard.last)
    devices.wait_for_all(f"features {where}")


def _show(experiment: Experiment, params: Any, where: Path, workdir: Path) -> None:
    """samples.png and examples.png, or the figures of toy sets; of images the first hundred."""
    number, levels = experiment.settings.eval.num_samples, experiment.dataset.levels
    shown = number if levels is None else min(number, 100)
    samples = np.concatenate([rows["samples"] for rows in sampling_loop.read(where, shown)])
    if devices.is_first():
        plotting.save_samples(workdir / "samples.png", samples, levels)
        if levels is not None:
            split = experiment.settings.eval.dataset
            size = min(len(samples), experiment.dataset.size(split))
            examples = experiment.dataset.examples(split, np.arange(size))
            plotting.save_samples(workdir / "examples.png", examples, levels)
    if levels is None and experiment.is_marginal:  # densities are computed by all devices
        figures.save_toy(experiment, params, samples, workdir)


def _measure(experiment: Experiment, model: Figure, target: Path, scorer: Scorer) -> None:
    """Write the rows of this checkpoint into quality.json."""
    step = model.step
    where, number = _folder(target, step), experiment.settings.eval.num_samples
    extractor, reference = scorer.extractor, scorer.reference
    parts = list(sampling_loop.read(where, number, extractor.identity))
    features = Features(*(np.concatenate([p[key] for p in parts]) for key in Features._fields))
    nfe = np.concatenate([rows["nfe"] for rows in sampling_loop.read(where, number)])
    figure = identities.of_samples(model, reference.split, _digest_of(reference))
    identities.declare(target, [figure])
    shared = {
        "identity": figure.identity,
        "step": step,
        "n_samples": number,
        "extractor": extractor.identity,
        "nfe": float(nfe.mean()),
        "max_nfe": int(nfe.max()),
        "protocol": f"{sampling_loop.sampling_protocol(experiment)}; {extractor.note}",
        "data": _data(experiment),
    }
    against = " ".join(filter(None, [reference.dataset or scorer.path.name, reference.split]))
    compared = {"reference": against, "n_reference": len(reference.pool_3)}
    alone = {"reference": "", "n_reference": 0}
    rows = []
    for score in evaluation.scores(features, reference.pool_3, extractor.title):
        finite = score._replace(error=score.error if math.isfinite(score.error) else None)
        to = alone if score.metric.startswith("IS") else compared
        rows.append(shared | to | finite._asdict())
        logger.info("%s of step %d: %.5g ± %.2g", score.metric, step, score.value, score.error)
    add(target, rows)


def fid_stats(experiment: Experiment) -> None:
    """Features of every image of the split `eval.dataset`, once, in order, into one file.

    Raises:
        ValueError: the extractor is absent, or the file holds something else.
    """
    check_fid_stats(experiment)
    extractor, path = _extractor(experiment), _path(experiment)
    if devices.is_first():
        _write_statistics(experiment, extractor, path)
    devices.wait_for_all("statistics")


def check_fid_stats(experiment: Experiment) -> None:
    """Check that the features are named and can be taken of the data.

    Raises:
        ValueError: they are not or cannot.
    """
    features = experiment.settings.eval.features
    if not features:
        raise ValueError(
            "--mode=fid_stats needs --config.eval.features: "
            f"allowed {sorted(evaluation.EXTRACTORS)} or the folder of a SavedModel"
        )
    evaluation.check_features(features, experiment.dataset)


def _write_statistics(experiment: Experiment, extractor: Extractor, path: Path) -> None:
    config, dataset = experiment.settings.eval, experiment.dataset
    split = config.dataset
    if path.exists():
        found = evaluation.read_statistics(path)
        _check(found, path, extractor, experiment)
        if (found.split, len(found.pool_3)) != (split, dataset.size(split)):
            raise ValueError(
                f"{path} has statistics of {len(found.pool_3)} images of split {found.split!r}; "
                f"now {dataset.size(split)} of {split!r}. Delete it, or set eval.stats"
            )
        logger.info("%s is there already", path)
        return
    parts, size = [], config.batch_size
    for batch in dataset.eval_batches(split, batch_size=size, host=Host()):
        parts.append(evaluation.extract(extractor, batch["image"][batch["mask"]]).pool_3)
    pool_3 = np.concatenate(parts)
    statistics = Statistics(
        pool_3, extractor.identity, _data(experiment), split, dataset.digests[split]
    )
    statistics.write(path)
    logger.info("wrote %s: %d images of %s %s", path, len(pool_3), _data(experiment), split)


# The rows of quality.json.


def read(eval_folder: Path) -> list[Row]:
    """All rows that are reported, in order."""
    whole = [row for row in _stored(eval_folder) if not is_older(row)]
    return identities.reported(eval_folder, whole)


def add(eval_folder: Path, rows: list[Row]) -> None:
    """Add rows, in the place of older ones of the same key."""
    both = [*_stored(eval_folder), *map(with_checksum, rows)]
    everything = {tuple(row.get(field, "") for field in KEY): row for row in both}
    folder.write_json(eval_folder / FILE, [everything[key] for key in sorted(everything)])


def _stored(eval_folder: Path) -> list[Row]:
    """All rows of the file but damaged ones, which are said."""
    path = eval_folder / FILE
    rows = json_files.read(path) if path.exists() else []
    found = [row for row in rows if is_older(row) or is_intact(row)]
    if len(found) < len(rows):
        logger.warning("%s: %d damaged rows are left out", path, len(rows) - len(found))
    return found


def cells(row: Row) -> list[str]:
    """The columns of `HEADER` as text."""
    error = "" if row["error"] is None else f" ± {row['error']:.2g} ({row['error_is']})"
    return [
        str(row["step"]),
        row["metric"],
        f"{row['value']:.5g}{error}",
        str(row["n_samples"]),
        f"{row['reference']}, n = {row['n_reference']}" if row["reference"] else "",
        f"{row['nfe']:.0f} (max {row['max_nfe']})",
        row["protocol"],
    ]
