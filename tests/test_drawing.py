"""--mode=sample: shards and grids of p(x), p(x | y) and p(x | context), resumed and refused."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread

import npz_files
import run_lib
from run_lib import drawing, measured, sampling_loop
from run_lib.experiment import Experiment
from streams import Context
from tests import tiny

pytestmark = pytest.mark.usefixtures("compiled_at_o0")
LOWER = {"task": "inpaint", "mask": "4,0,4,8", "num_measured": 3, "num_samples": 2}


def experiment_of(dataset: str = "digits", **sampling: object) -> Experiment:
    c = tiny.config(dataset)
    c.training.update(n_iters=10)
    c.sampling.update({"num_samples": 6} | sampling)
    return Experiment.from_config(c)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for dataset in ("digits", "mixture"):
        found[dataset] = tmp_path_factory.mktemp(dataset)
        run_lib.train(experiment_of(dataset), found[dataset])
    return found


def drawn(workdir: Path, name: str, **sampling: object) -> tuple[Path, dict[str, np.ndarray]]:
    """(the folder, its arrays) of one call."""
    experiment = experiment_of(workdir.name.rstrip("0123456789"), **sampling)
    drawing.draw_samples(experiment, workdir)
    (where,) = sorted((workdir / "samples").glob(f"{name}-*"), key=lambda p: p.stat().st_mtime)[-1:]
    number = sampling_loop.shards(where)[-1].last + 1
    parts = list(sampling_loop.read(where, number))
    return where, {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def test_samples_of_the_model_are_those_of_an_evaluation_and_are_resumed(
    runs: dict[str, Path],
) -> None:
    workdir, experiment = runs["digits"], experiment_of()
    where, arrays = drawn(workdir, "drawn")
    assert arrays["samples"].shape == (6, 8, 8, 1)
    assert (where / "grid.png").exists()
    params = next(drawing.loading.parameters_of(experiment, workdir))[1]
    generate = sampling_loop.Generator(experiment, experiment.keys["samples"], 12)
    np.testing.assert_array_equal(arrays["samples"], generate(params, 6))
    sampling_loop.shards(where)[0].path.unlink()
    again, resumed = drawn(workdir, "drawn")
    assert again == where
    np.testing.assert_array_equal(arrays["samples"], resumed["samples"])
    other, _ = drawn(workdir, "drawn", lmbd=0.5)
    assert other != where


def test_the_replaced_part_is_that_of_the_measurement(runs: dict[str, Path]) -> None:
    task = LOWER | {"task_method": "replacement", "noise": 0.0}
    where, arrays = drawn(runs["digits"], "inpaint-replacement", **task)
    assert arrays["samples"].shape == (6, 8, 8, 1)
    known = npz_files.read(where / "measured.npz", ("y", "originals"))
    expected = np.repeat(known["originals"], 2, axis=0)[:, :4]
    np.testing.assert_array_equal(arrays["samples"][:, :4], expected)
    assert (where / "grid.png").exists()


def test_twisted_tells_the_evidence_of_every_run(runs: dict[str, Path], tmp_path: Path) -> None:
    matrix = tmp_path / "a.npy"
    np.save(matrix, np.asarray([[1.0, 1.0]]))
    task = {"task": "linear", "matrix": str(matrix), "task_method": "twisted", "particles": 4}
    where, arrays = drawn(runs["mixture"], "linear-twisted", num_measured=2, num_samples=3, **task)
    assert arrays["samples"].shape == (6, 2)
    assert np.isfinite(arrays["log_evidence"]).all()
    assert np.all(arrays["nfe"] == 10 * 4)
    assert (where / "grid.png").exists()


def test_a_file_of_pictures_is_in_grey_levels(tmp_path: Path) -> None:
    experiment, path = experiment_of(**LOWER), tmp_path / "y.npy"
    images = experiment.dataset.examples("test", np.arange(2))
    np.save(path, images)
    found = measured.measured(experiment_of(**LOWER, measurements=str(path)))
    assert found.originals is None
    np.testing.assert_allclose(found.y, (2.0 * (images[:, :4] + 0.5) / 17 - 1.0).reshape(2, 32))


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"task": "inpant"}, r"sampling\.task='inpant': .*did you mean inpaint"),
        ({"task": "inpaint"}, r"sampling\.mask='': need an \.npy file"),
        (LOWER | {"mask": "4,0,8,8"}, r"sampling\.mask='4,0,8,8': need top,left"),
        (LOWER | {"noise": 0.0}, r"sampling\.noise=0\.0: need more than 0"),
        ({"task": "colourise"}, "they are grey"),
        ({"task": "denoise", "task_method": "replacement"}, "nothing would be left to sample"),
        (LOWER | {"num_measured": 25}, r"sampling\.num_measured=25: need at most 24"),
        (LOWER | {"measurements": "no.npy"}, r"sampling\.measurements='no\.npy': need an \.npy"),
        ({"guidance": 2.0}, r"sampling\.guidance=2\.0: need 1 without sampling\.context"),
        ({"guidance": -1.0}, r"sampling\.guidance=-1\.0: need 0 or more"),
        ({"context": "3"}, r"sampling\.context='3': need '': the data have no context"),
    ],
)
def test_what_does_not_fit_is_refused(runs: dict[str, Path], sampling: dict, message: str) -> None:
    before = set((runs["digits"] / "samples").glob("*"))
    with pytest.raises(ValueError, match=message):
        drawing.draw_samples(experiment_of(**sampling), runs["digits"])
    assert set((runs["digits"] / "samples").glob("*")) == before


# Contexts, by a model and data that have them.


@pytest.mark.parametrize(("number", "columns"), [(3, 3), (1, 2), (17, 2)])
def test_every_context_has_a_column_of_the_grid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, columns: int
) -> None:
    rows = [{"samples": np.zeros((4, 8, 8, 1))}]
    monkeypatch.setattr(sampling_loop, "read", lambda where, total: rows)
    drawer = SimpleNamespace(
        context=np.arange(number), data=None, experiment=SimpleNamespace(levels=17)
    )
    drawing._show(drawer, tmp_path, 4)
    height, width, _ = imread(tmp_path / "grid.png").shape
    assert width / height == pytest.approx((9 * columns + 1) / (9 * -(-4 // columns) + 1))


class Conditional:
    """score(params, context=c) is c, without context 0."""

    def score(self, params: float, context: jax.Array | None = None) -> Callable:
        c = 0.0 if context is None else context
        return lambda x, t: params * jnp.ones_like(x) * c


def test_guidance_weighs_the_conditional_score() -> None:
    x, t, c = jnp.ones((2, 2)), jnp.ones(2), jnp.asarray([[1.0], [2.0]])
    for context, weight, expected in ((None, 1.0, 0.0), (c, 1.0, 3 * c), (c, 2.0, 6 * c)):
        found = drawing.bound_score(Conditional(), 3.0, context, weight)(x, t)
        np.testing.assert_allclose(found, expected * jnp.ones((2, 2)))


def test_contexts_are_classes_arrays_or_those_of_the_test_examples(tmp_path: Path) -> None:
    labels = np.asarray([2, 0, 1], np.int32)

    def found(kind: Context, text: str) -> np.ndarray:
        sampling = SimpleNamespace(context=text, guidance=1.0, guide="")
        dataset = SimpleNamespace(context=kind, test=SimpleNamespace(context=labels))
        settings = SimpleNamespace(sampling=sampling)
        return drawing._context(SimpleNamespace(settings=settings, dataset=dataset))

    classes, floats = Context((), 3), Context((2,))
    np.testing.assert_array_equal(found(classes, "2"), [2])
    assert found(classes, "2").dtype == np.int32
    np.testing.assert_array_equal(found(classes, "test"), labels)
    np.save(tmp_path / "c.npy", np.ones((4, 2)))
    assert found(floats, str(tmp_path / "c.npy")).dtype == np.float32
    for kind, text in ((classes, "3"), (classes, str(tmp_path / "c.npy")), (floats, "1")):
        with pytest.raises(ValueError, match=r"sampling\.context=.*: need "):
            found(kind, text)


def test_samples_of_a_context_repeat_it_by_measurement() -> None:
    experiment = experiment_of(num_samples=2)
    data = measured.Measured(None, np.arange(3)[:, None], None)
    drawer = drawing.Drawer(experiment, data, np.asarray([5, 6, 7]), 4)
    np.testing.assert_array_equal(drawer._inputs(np.arange(6))["context"], [5, 5, 6, 6, 7, 7])
    drawer = dataclasses.replace(drawer, data=None, context=np.asarray([5, 6]))
    np.testing.assert_array_equal(drawer._inputs(np.arange(4))["context"], [5, 6, 5, 6])
