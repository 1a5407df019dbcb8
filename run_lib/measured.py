"""Set up measurements: the task of the `sampling` section, y, and the original examples.

y is of test examples, or of a file. A file of pictures is in grey levels, as the data are; that of
`linear`, and of real-valued data, in the units of the model.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from checks import FieldError, path_of, require
from dequantization import Pixels
from measurements import Colourise, Denoise, Inpaint, Linear, Measurement, SuperResolve
from operators import fold_in_each
from run_lib.experiment import Experiment
from run_lib.sections import SamplingConfig

Shape = tuple[int, ...]
NOISE_ID = 2**31  # folded into the key of the samples, whose ids are below it


class Measured(NamedTuple):
    """Measurements y [n, *m] and the examples [n, *d] they are of, if these are known."""

    measurement: Measurement
    y: np.ndarray
    originals: np.ndarray | None

    @property
    def protocol(self) -> dict[str, Any]:
        """Say what was measured, in numbers and digests."""
        a = self.measurement
        fields = {f.name: getattr(a, f.name) for f in dataclasses.fields(a)}
        fields |= {k: digest(v) for k, v in fields.items() if isinstance(v, np.ndarray)}
        return fields | {"shape": list(a.shape), "y": digest(self.y)}


def measurement(sampling: SamplingConfig, shape: Shape) -> Measurement:
    """The measurement of `sampling.task` of examples of a shape.

    Raises:
        FieldError: it does not fit them, or its file cannot be read.
    """
    return TASKS[sampling.task](sampling, shape)


def measured(experiment: Experiment) -> Measured:
    """The measurements of `sampling`: of a file, or of the first `num_measured` test examples.

    Raises:
        FieldError: they do not fit the data.
    """
    sampling = experiment.settings.sampling
    a = measurement(sampling, experiment.shape)
    logit = isinstance(experiment.encoding, Pixels) and experiment.encoding.logit
    allowed = "False with sampling.task: means of logits are no grey levels"
    require(not logit, "data.logit", logit, allowed)
    for field in ("lower", "upper"):
        ends = getattr(experiment.settings.data, field)
        allowed = "() with sampling.task: of a logit or a logarithm no measurement is linear"
        require(all(end is None for end in ends), f"data.{field}", ends, allowed)
    if sampling.measurements:
        return Measured(a, _of_file(experiment, a), None)
    number, size = sampling.num_measured, experiment.dataset.size("test")
    require(number <= size, "sampling.num_measured", number, f"at most {size} test examples")
    originals = experiment.dataset.examples("test", np.arange(number))
    key_encode, key_noise = jax.random.split(
        jax.random.fold_in(experiment.keys["samples"], NOISE_ID)
    )
    ids = jnp.arange(number)
    x = experiment.encoding.encode(jnp.asarray(originals), fold_in_each(key_encode, ids))
    y = a.draw(x, fold_in_each(key_noise, ids))
    return Measured(a, np.asarray(y, np.float32), originals)


def digest(array: np.ndarray) -> str:
    """Hexadecimal digits that differ where the values do."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def array_of(field: str, text: str) -> np.ndarray:
    """The array of an .npy file, read without pickle.

    Raises:
        FieldError: there is none.
    """
    path = path_of(field, text)
    require(path.is_file() and path.suffix == ".npy", field, text, "an .npy file that exists")
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise FieldError(field, text, f"cannot be read: {reason:.200}") from None


def _of_file(experiment: Experiment, a: Measurement) -> np.ndarray:
    """y of `sampling.measurements`, in the units of the model."""
    field, text = "sampling.measurements", experiment.settings.sampling.measurements
    found, encoding = array_of(field, text), experiment.encoding
    shapes = [a.measured_shape] + ([a.shape] if isinstance(a, Inpaint) else [])
    allowed = f"numbers of shape [n, *m], m one of {shapes}"
    fits = (
        found.ndim >= 1 and len(found) and found.shape[1:] in shapes and found.dtype.kind in "uif"
    )
    require(bool(fits), field, f"{text}: {found.dtype} {found.shape}", allowed)
    y = jnp.asarray(found, jnp.float32)
    if isinstance(a, Inpaint) and found.shape[1:] == a.shape:
        y = a.forward(y)
    if isinstance(encoding, Pixels) and not isinstance(a, Linear):
        steps = encoding.levels if encoding.dequantize_uniformly else encoding.levels - 1
        y = encoding.from_unit((y + 0.5 * encoding.dequantize_uniformly) / steps)
    require(bool(np.isfinite(y).all()), field, text, "finite numbers")
    return np.asarray(y)


def _mask(sampling: SamplingConfig, shape: Shape) -> np.ndarray:
    """Find which coordinates are missing, by a box or by a file."""
    text, box = sampling.mask, sampling.mask.split(",")
    if all(part.strip().isdecimal() for part in box):
        allowed = f"top,left,height,width of a box within images, for examples of shape {shape}"
        require(len(box) == 4 and len(shape) == 3, "sampling.mask", text, allowed)
        top, left, height, width = map(int, box)
        inside = 0 < height <= shape[0] - top and 0 < width <= shape[1] - left
        require(inside, "sampling.mask", text, allowed)
        missing = np.zeros(shape, bool)
        missing[top : top + height, left : left + width] = True
        return missing
    found = array_of("sampling.mask", text) != 0
    if len(shape) == 3 and found.shape == shape[:2]:
        found = np.repeat(found[..., None], shape[2], axis=2)
    return found


def _matrix(sampling: SamplingConfig) -> np.ndarray:
    found = array_of("sampling.matrix", sampling.matrix)
    require(found.dtype.kind in "uif", "sampling.matrix", str(found.dtype), "numbers")
    return found.astype(np.float64)


TASKS: dict[str, Callable[[SamplingConfig, Shape], Measurement]] = {
    "inpaint": lambda s, shape: Inpaint(shape, s.noise, _mask(s, shape)),
    "colourise": lambda s, shape: Colourise(shape, s.noise),
    "super_resolve": lambda s, shape: SuperResolve(shape, s.noise, s.factor),
    "denoise": lambda s, shape: Denoise(shape, s.noise),
    "linear": lambda s, shape: Linear(shape, s.noise, _matrix(s)),
}
