"""--mode=sample: samples of checkpoints of p(x), p(x | context) or p(x | y), in WORKDIR/samples/.

    <name>/<first>-<last>.npz   samples and the evaluations of each; `twisted`: log p(y) of each run
    <name>/measured.npz         y and the originals, with a task
    <name>/protocol.json        what the samples are of
    <name>/grid.png             of images: original, A⁺ y and samples, one measurement a row; or
                                samples, one context a column where there are 2 to 16

The name ends in a digest of all that the samples depend on, so that a folder is of one law and the
same command adds what is missing. Sample i is of measurement i ÷ num_samples.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import checksums
import npz_files
import plotting
from checks import require
from measurements import Measurement
from operators import fold_in_each
from parameterization import ScoreFn, ScoreModel
from posterior_sampling import (
    DiffusionPosteriorSampling,
    Guided,
    MomentMatching,
    Replacement,
    classifier_free,
    classifier_guided,
)
from run_lib import devices, folder, guide, identities, loading, measured, sampling_loop
from run_lib.experiment import METHODS, Experiment
from run_lib.guide import Guide
from run_lib.measured import Measured
from sampling import PredictorCorrector, Sampler
from streams import Context
from twisted import TwistedSampler, combine_evidence

logger = logging.getLogger("fokker")
MOST_COLUMNS = 16  # of a grid with one column for each context
EXACT_UP_TO = 16  # measured numbers: each costs a tangent of the network in every evaluation
Arrays = dict[str, jax.Array]
PosteriorSampler = Guided | Replacement | DiffusionPosteriorSampling | TwistedSampler


@dataclasses.dataclass
class Drawer:
    """Samples of p(x), p(x | context) or p(x | y), by id: a source for `sampling_loop.draw`."""

    experiment: Experiment
    data: Measured | None
    context: np.ndarray | None  # [n] or [n, *c], of measurement or sample i mod n
    batch_size: int
    guide: Guide | None = None

    def __post_init__(self) -> None:
        axes = (None, None, 0, 0)
        self._mapped = devices.map_over_devices(self._draw, in_axes=axes, out_axes=0)

    @property
    def protocol(self) -> dict[str, Any]:
        """Say what fixes the law of the samples and their noise, beside the network."""
        sampling = self.experiment.settings.sampling
        found: dict[str, Any] = {"seed": self.experiment.settings.seed}
        if self.context is not None:
            found |= {"context": measured.digest(self.context), "guidance": sampling.guidance}
        if self.guide is not None:
            found |= {"classifier": self.guide.protocol}
        if self.data is None:
            sampler = sampling_loop.sampling_protocol(self.experiment, of_evaluation=False)
            return found | {"sampler": sampler}
        fields = _scalars(self._posterior(jnp.asarray(self.data.y[:1])))
        task = {"name": sampling.task} | self.data.protocol
        return found | {"sampler": {"name": sampling.task_method} | fields, "task": task}

    def batch(self, params: Any, ids: np.ndarray, end: int) -> npz_files.Arrays:
        """Rows of those consecutive ids that are below `end`; all are drawn.

        Raises:
            FloatingPointError: a sample is not finite; names the samples.
        """
        key, inputs = self.experiment.keys["samples"], self._inputs(ids)
        both = params, None if self.guide is None else self.guide.params
        drawn = self._mapped(both, key, *devices.split((ids.astype(np.int32), inputs)))
        arrays = {name: y[ids < end] for name, y in devices.join(drawn).items()}
        sampling_loop.check_finite(arrays["samples"], ids)
        decoded = self.experiment.encoding.decode(jnp.asarray(arrays["samples"]))
        return arrays | {"samples": np.asarray(decoded)}

    def _inputs(self, ids: np.ndarray) -> npz_files.Arrays:
        """y and context of every id, where there are any."""
        found, rows = {}, ids
        if self.data is not None:
            rows = ids // self.experiment.settings.sampling.num_samples
            found["y"] = self.data.y[rows % len(self.data.y)]
        if self.context is not None:
            found["context"] = self.context[rows % len(self.context)]
        return found

    def _posterior(self, y: jax.Array) -> PosteriorSampler:
        """The sampler of p(x | y)."""
        method = POSTERIORS[self.experiment.settings.sampling.task_method]
        return method(self.experiment, self.data.measurement, y)

    def _draw(self, params: Any, key: jax.Array, ids: jax.Array, inputs: Arrays) -> Arrays:
        """Samples of one device, by name."""
        experiment = self.experiment
        model = experiment.sampled_model
        sampler: Sampler | PosteriorSampler = experiment.sampler
        if self.data is not None:
            sampler = self._posterior(inputs["y"])
            on_chain = isinstance(getattr(sampler, "sampler", sampler), PredictorCorrector)
            model = experiment.chain_model if on_chain else experiment.model
        guidance = experiment.settings.sampling.guidance
        score_params, guide_params = params
        given = inputs.get("context")
        if self.guide is None:
            score_fn = bound_score(model, score_params, given, guidance)
        else:
            likelihood = self.guide.of(guide_params, given)
            score_fn = classifier_guided(model.score(score_params), likelihood, guidance)
        like = jnp.zeros((ids.shape[0], *experiment.shape), jnp.float32)
        found = sampler(score_fn, model.sde, fold_in_each(key, ids), like)._asdict()
        return {"samples": found.pop("x")} | found


def bound_score(
    model: ScoreModel, params: Any, context: jax.Array | None, guidance: float
) -> ScoreFn:
    """The score of p(x), of p(x | context), or for a guidance w ≠ 1 their combination."""
    if context is None:
        return model.score(params)
    conditional = model.score(params, context=context)
    if guidance == 1.0:
        return conditional
    return classifier_free(conditional, model.score(params), guidance)


# The samplers of p(x | y).


def _pc_fields(experiment: Experiment) -> dict[str, Any]:
    settings = experiment.settings
    found = METHODS["pc"](settings.sampling, settings.model.num_scales)
    return {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}


def _replacement(experiment: Experiment, a: Measurement, y: jax.Array) -> PosteriorSampler:
    return Replacement(**_pc_fields(experiment), measurement=a, y=y)


def _dps(experiment: Experiment, a: Measurement, y: jax.Array) -> PosteriorSampler:
    fields = _pc_fields(experiment) | {"corrector": "none"}  # which would not know of y
    return DiffusionPosteriorSampling(**fields, measurement=a, y=y)


def _moment_matching(experiment: Experiment, a: Measurement, y: jax.Array) -> PosteriorSampler:
    return Guided(experiment.sampler, MomentMatching(a, y, _covariance(a)))


def _twisted(experiment: Experiment, a: Measurement, y: jax.Array) -> PosteriorSampler:
    sampling, number = experiment.settings.sampling, experiment.settings.model.num_scales
    return TwistedSampler(a, y, number, sampling.smallest_time, sampling.particles, _covariance(a))


POSTERIORS: dict[str, Callable[[Experiment, Measurement, jax.Array], PosteriorSampler]] = {
    "replacement": _replacement,
    "dps": _dps,
    "moment_matching": _moment_matching,
    "twisted": _twisted,
}


def _covariance(a: Measurement) -> str:
    """Choose all pairs of measured numbers where there are few, row sums otherwise."""
    return "exact" if a.number <= EXACT_UP_TO else "row_sums"


def _scalars(sampler: Any) -> dict[str, Any]:
    """The fields of a sampler, and of the dataclasses in it, that are numbers or texts."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(sampler):
        value = getattr(sampler, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, Measurement):
            found[field.name] = _scalars(value)
        elif isinstance(value, bool | int | float | str):
            found[field.name] = value
    return found


# The mode.


def draw_samples(experiment: Experiment, workdir: Path) -> None:
    """Draw samples of the checkpoints that the config asks for, and show them.

    Raises:
        ValueError: there is no such checkpoint, or measurements or context do not fit.
    """
    check(experiment, workdir)
    loading.reconcile(experiment, workdir)
    if _uses_data(experiment):
        identities.claim(experiment, workdir)
    sampling = experiment.settings.sampling
    data = measured.measured(experiment) if sampling.task else None
    particles = sampling.particles if data and sampling.task_method == "twisted" else 1
    size = max(1, experiment.settings.eval.batch_size // particles)
    classifier = guide.load(experiment, workdir) if sampling.guide else None
    drawer = Drawer(experiment, data, _context(experiment), size, classifier)
    number = sampling.num_samples * (len(data.y) if data else 1)
    for step, params in loading.parameters_of(experiment, workdir):
        where, identity = _place(drawer, params, step, workdir)
        with folder.alone(where):
            sampling_loop.draw(drawer, params, where, number, identity)
            if devices.is_first():
                _show(drawer, where, number)
        devices.wait_for_all(f"grid {where}")


def check(experiment: Experiment, workdir: Path, earlier: Collection[str] = ()) -> None:
    """Check what the mode needs; modes before it may still make the checkpoints.

    Raises:
        ValueError: something is missing or does not fit.
    """
    sampling = experiment.settings.sampling
    loading.check_checkpoints(experiment.settings, workdir, earlier)
    experiment.sampler  # noqa: B018  its fields are checked
    if sampling.task:
        a = measured.measurement(sampling, experiment.shape)
        POSTERIORS[sampling.task_method](experiment, a, jnp.zeros((1, *a.measured_shape)))
    if sampling.guide and "train_classifier" not in earlier:
        guide.load(experiment, workdir)
    _context(experiment)


def _uses_data(experiment: Experiment) -> bool:
    sampling = experiment.settings.sampling
    return bool(sampling.task and not sampling.measurements) or sampling.context == "test"


def _context(experiment: Experiment) -> np.ndarray | None:
    """The contexts [n] or [n, *c] of `sampling.context`; None without.

    Raises:
        FieldError: the data have none, or of another kind.
    """
    text, guidance = experiment.settings.sampling.context, experiment.settings.sampling.guidance
    allowed = "1 without sampling.context, whose weight it is"
    require(bool(text) or guidance == 1.0, "sampling.guidance", guidance, allowed)
    guided, allowed = bool(experiment.settings.sampling.guide), "'' without sampling.context"
    require(bool(text) or not guided, "sampling.guide", "classifier", allowed)
    if not text:
        return None
    allowed = "'' for a network that is given the class: it needs no classifier"
    require(not guided or experiment.context is None, "sampling.guide", "classifier", allowed)
    dataset = (guide.labelled(experiment) if guided else experiment).dataset
    kind = dataset.context
    allowed = "'': the data have no context, so that the model is of p(x)"
    require(kind is not None, "sampling.context", text, allowed)
    if text == "test":
        return dataset.test.context
    if text.isdecimal():
        return _checked(np.asarray([int(text)]), kind, text)
    return _checked(measured.array_of("sampling.context", text), kind, text)


def _checked(found: np.ndarray, kind: Context, text: str) -> np.ndarray:
    """Contexts in the type that the network takes."""
    fits = found.ndim >= 1 and len(found) > 0 and found.shape[1:] == kind.shape
    if kind.classes:
        fits = fits and found.dtype.kind in "ui" and 0 <= found.min() <= found.max() < kind.classes
    else:
        fits = fits and found.dtype.kind in "uif" and bool(np.isfinite(found).all())
    allowed = f"{kind.describe()}: classes are 0, 1, ...; an .npy file has one context a row"
    require(bool(fits), "sampling.context", text, allowed)
    return found.astype(np.int32 if kind.classes else np.float32)


def _place(drawer: Drawer, params: Any, step: int, workdir: Path) -> tuple[Path, str]:
    """(the folder of these samples, a digest of all that they depend on)."""
    sampling = drawer.experiment.settings.sampling
    network = checksums.digest(params), identities.settings_digest(drawer.experiment)
    text = json.dumps([network, step, drawer.protocol], sort_keys=True)
    identity = hashlib.sha256(text.encode()).hexdigest()[:16]
    words = [sampling.task, sampling.task_method] if sampling.task else ["drawn"]
    return workdir / "samples" / "-".join([*words, str(step), identity[:8]]), identity


def _show(drawer: Drawer, where: Path, number: int) -> None:
    """grid.png and measured.npz, and what `twisted` says of p(y)."""
    rows = list(sampling_loop.read(where, number))
    samples, data = np.concatenate([part["samples"] for part in rows]), drawer.data
    path = where / "grid.png"
    if data is None:
        contexts = 0 if drawer.context is None else len(drawer.context)
        columns = contexts if 1 < contexts <= MOST_COLUMNS else None
        plotting.save_samples(path, samples, drawer.experiment.levels, columns)
    else:
        originals = {} if data.originals is None else {"originals": data.originals}
        npz_files.write(where / "measured.npz", {"y": data.y} | originals)
        each = samples.reshape(len(data.y), -1, *samples.shape[1:])
        _show_posteriors(path, drawer.experiment, data, each)
    if "log_evidence" in rows[0]:
        runs = np.concatenate([part["log_evidence"] for part in rows]).reshape(len(data.y), -1)
        for i, of_one in enumerate(runs):
            text = "log p(y) of measurement %d: %.3f ± %.3f nats (mean of %d runs)"
            logger.info(text, i, *combine_evidence(jnp.asarray(of_one)), len(of_one))
    logger.info("samples and %s are in %s", path.name, where)


def _show_posteriors(path: Path, experiment: Experiment, data: Measured, each: np.ndarray) -> None:
    """Draw images with one measurement a row: the original, A⁺ y and up to ten samples."""
    if experiment.levels is None:
        plotting.save_posteriors(path, each[:8], data.originals)
        return
    pictures = data.measurement.pseudo_inverse(jnp.asarray(data.y))
    columns = [np.asarray(experiment.encoding.decode(pictures))[:, None], each[:, :10]]
    if data.originals is not None:
        columns.insert(0, data.originals[:, None])
    table = np.concatenate(columns, axis=1)[:16]
    images = table.reshape(-1, *table.shape[2:])
    plotting.save_images(path, images, experiment.levels, columns=table.shape[1])
