"""Samples of a checkpoint, their features, and FID, KID and IS; statistics of data sets.

    eval/samples_<step>/<first>-<last>.npz               samples
    eval/samples_<step>/<extractor>/<first>-<last>.npz   their features
    eval/quality.json                                    one row per step, metric and protocol

Whatever can go wrong with the extractor or the statistics is found before anything is drawn.
"""

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np

import datasets
import evaluation
import npz_files
import plotting
from checks import path_of, require
from evaluation import Extractor, Features, Statistics
from run_lib import build, figures, parallel, quality, sampling_loop
from run_lib.sampling_loop import Generator
from run_lib.settings import Settings
from streams import Dataset, Host

logger = logging.getLogger("fokker")


@dataclasses.dataclass(frozen=True)
class Scorer:
    """An extractor and the statistics to compare with."""

    extractor: Extractor
    reference: Statistics
    path: Path  # of the statistics


def scorer(settings: Settings, dataset: Dataset, target: Path, step: int) -> Scorer | None:
    """What the samples of a checkpoint are measured with; None where no metrics are asked for.

    Raises:
        ValueError: the extractor or the statistics are absent or do not fit, or the folder has
            samples of another sampler.
    """
    config = settings.eval
    if not config.enable_sampling:
        return None
    sampling_loop.check_samples(settings, _folder(target, step))
    if not config.features:
        return None
    evaluation.check_features(config.features, dataset)
    require(config.num_samples >= 2, "eval.num_samples", config.num_samples, "2 for a covariance")
    path = _path(settings, dataset)
    if not path.exists():
        raise ValueError(
            f"there are no statistics {path}: make them with --mode=fid_stats and the same "
            "--config.eval.features and --config.eval.stats (--config.eval.dataset is their split)"
            f", or see {evaluation.ASSETS / 'stats' / 'README.md'} (eval.features='': no metrics)"
        )
    reference, extractor = evaluation.read_statistics(path), _extractor(settings, dataset)
    _check(reference, path, extractor, dataset, settings)
    return Scorer(extractor, reference, path)


def _folder(target: Path, step: int) -> Path:
    return target / f"samples_{step}"


def _name(settings: Settings) -> str:
    """What the data are called in file names: files and folders by their own name."""
    data = settings.data
    named = data.dataset.lower() in ("npz", "folder")
    return path_of("data.path", data.path).resolve().stem if named else data.dataset.lower()


def _data(settings: Settings, dataset: Dataset) -> str:
    """The data as written in statistics, as cifar10 32x32x3."""
    category = f" {settings.data.category}" if settings.data.category else ""
    return f"{_name(settings)}{category} {'x'.join(map(str, dataset.shape))}"


def _path(settings: Settings, dataset: Dataset) -> Path:
    """`eval.stats`, or the default of these data and features."""
    if settings.eval.stats:
        return path_of("eval.stats", settings.eval.stats)
    return evaluation.statistics_path(
        _name(settings),
        settings.eval.features,
        category=settings.data.category,
        size=dataset.shape[0],
    )


def _extractor(settings: Settings, dataset: Dataset) -> Extractor:
    """The extractor; what it must make or download first, the first process makes for all."""
    named = dataclasses.replace(dataset, name=_name(settings))
    folder, features = _path(settings, dataset).parent, settings.eval.features
    if parallel.is_first():
        found = evaluation.extractor(features, named, folder)
    parallel.wait_for_all("extractor")
    return found if parallel.is_first() else evaluation.extractor(features, named, folder)


def _check(
    found: Statistics, path: Path, extractor: Extractor, dataset: Dataset, settings: Settings
) -> None:
    probe = evaluation.extract(extractor, np.zeros((1, *dataset.shape), np.uint8))
    evaluation.check_statistics(
        found,
        path,
        extractor=extractor.identity,
        dataset=_data(settings, dataset),
        width=probe.pool_3.shape[1],
    )


def sample(
    settings: Settings,
    dataset: Dataset,
    params: Any,
    step: int,
    target: Path,
    scorer: Scorer | None,
) -> None:
    """Draw `eval.num_samples` samples, show them, and measure them."""
    where, number = _folder(target, step), settings.eval.num_samples
    key, size = build.keys(settings)["samples"], settings.eval.batch_size
    sampling_loop.draw(Generator(settings, dataset, key, size), params, where, number)
    if scorer is not None:
        extract_all(scorer.extractor, where, number)
    _show(settings, dataset, params, where, target.parent)
    if parallel.is_first() and scorer is not None:
        _measure(settings, dataset, step, target, scorer)
    parallel.wait_for_all(f"quality {where}")


def extract_all(extractor: Extractor, where: Path, number: int) -> None:
    """Features of every shard that has none yet, every host its share of the shards."""
    host = parallel.host()
    of_first = [shard for shard in sampling_loop.shards(where) if shard.first < number]
    for shard in of_first[host.index :: host.count]:
        path = where / extractor.identity / shard.path.name
        if not npz_files.is_whole(path):
            images = npz_files.read(shard.path, ("samples",))["samples"]
            npz_files.write(path, evaluation.extract(extractor, images)._asdict())
            logger.info("features of samples %d to %d are there", shard.first, shard.last)
    parallel.wait_for_all(f"features {where}")


def _show(settings: Settings, dataset: Dataset, params: Any, where: Path, workdir: Path) -> None:
    """samples.png, and the figures of toy sets; of images the first hundred are read."""
    number = settings.eval.num_samples
    shown = number if dataset.levels is None else min(number, 100)
    samples = np.concatenate([rows["samples"] for rows in sampling_loop.read(where, shown)])
    if parallel.is_first():
        plotting.save_samples(workdir / "samples.png", samples, dataset.levels)
    if dataset.levels is None:  # densities are computed by all devices
        figures.save_toy(settings, dataset, params, samples, workdir)


def _measure(settings: Settings, dataset: Dataset, step: int, target: Path, scorer: Scorer) -> None:
    """Write the rows of this checkpoint into quality.json."""
    where, number = _folder(target, step), settings.eval.num_samples
    extractor, reference = scorer.extractor, scorer.reference
    parts = list(sampling_loop.read(where, number, extractor.identity))
    features = Features(*(np.concatenate([p[key] for p in parts]) for key in Features._fields))
    nfe = np.concatenate([rows["nfe"] for rows in sampling_loop.read(where, number)])
    shared = {
        "step": step,
        "n_samples": number,
        "extractor": extractor.identity,
        "nfe": float(nfe.mean()),
        "max_nfe": int(nfe.max()),
        "protocol": f"{sampling_loop.sampling_protocol(settings)}; {extractor.note}",
        "data": _data(settings, dataset),
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
    quality.add(target, rows)


def fid_stats(settings: Settings) -> None:
    """Features of every image of the split `eval.dataset`, once, in order, into one file.

    Raises:
        ValueError: the extractor is absent, or the file holds something else.
    """
    config = settings.eval
    if not config.features:
        raise ValueError(
            "--mode=fid_stats needs --config.eval.features: "
            f"allowed {sorted(evaluation.EXTRACTORS)} or the folder of a SavedModel"
        )
    dataset = datasets.load(settings.data)
    extractor, path = _extractor(settings, dataset), _path(settings, dataset)
    if parallel.is_first():
        _write_statistics(settings, dataset, extractor, path)
    parallel.wait_for_all("statistics")


def _write_statistics(
    settings: Settings, dataset: Dataset, extractor: Extractor, path: Path
) -> None:
    split = settings.eval.dataset
    if path.exists():
        found = evaluation.read_statistics(path)
        _check(found, path, extractor, dataset, settings)
        if (found.split, len(found.pool_3)) != (split, dataset.size(split)):
            raise ValueError(
                f"{path} has statistics of {len(found.pool_3)} images of split {found.split!r}; "
                f"now {dataset.size(split)} of {split!r}. Delete it, or set eval.stats"
            )
        logger.info("%s is there already", path)
        return
    parts, size = [], settings.eval.batch_size
    for batch in dataset.eval_batches(split, batch_size=size, host=Host()):
        parts.append(evaluation.extract(extractor, batch["image"][batch["mask"]]).pool_3)
    pool_3 = np.concatenate(parts)
    Statistics(pool_3, extractor.identity, _data(settings, dataset), split).write(path)
    logger.info("wrote %s: %d images of %s %s", path, len(pool_3), _data(settings, dataset), split)
