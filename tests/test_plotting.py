"""Figures: pixels of image grids exactly, and files that can be opened."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import plotting


@pytest.fixture(autouse=True)
def small_figures() -> None:
    """Here all of a figure is drawn."""


def pixels(path):
    """RGB values of a PNG, [H, W, 3]."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def numbered(n, height=2, width=3, channels=1):
    """Images whose pixels are all the image's number."""
    numbers = np.arange(n, dtype=np.uint8)[:, None, None, None]
    return np.broadcast_to(numbers, (n, height, width, channels)).copy()


@pytest.mark.parametrize(
    ("n", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (3, 2, 2), (5, 2, 3), (7, 3, 3), (9, 3, 3)]
)
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_grid_places_images_row_by_row_with_white_elsewhere(n, rows, columns, padding):
    grid = plotting.image_grid(numbered(n), 99, padding)
    expected = np.full((rows, columns, 2 + padding, 3 + padding), 99, np.uint8)
    for i in range(n):
        expected[i // columns, i % columns, padding:, padding:] = i
    expected = expected.transpose(0, 2, 1, 3).reshape(
        rows * (2 + padding), columns * (3 + padding), 1
    )
    last = padding  # the frame on the right and at the bottom
    expected = np.pad(expected, ((0, last), (0, last), (0, 0)), constant_values=99)
    np.testing.assert_array_equal(grid, expected)
    assert grid.dtype == np.uint8


def test_grid_keeps_every_pixel_of_an_image():
    image = np.random.default_rng(0).integers(0, 256, (1, 4, 5, 3), np.uint8)
    np.testing.assert_array_equal(plotting.image_grid(image, 255)[1:-1, 1:-1], image[0])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("levels", [17, 256])
def test_png_maps_levels_to_black_and_white(tmp_path, levels, channels):
    """Level k is 255 k/(levels − 1), rounded down: 16 of 17 levels is white. Enlarged."""
    values = np.linspace(0, levels - 1, 16).round().astype(np.uint8).reshape(1, 4, 4, 1)
    images = np.repeat(values, channels, axis=3)
    images[..., 1:] = 0  # green and blue dark, where there are any
    plotting.save_images(tmp_path / "grid.png", images, levels)
    png = pixels(tmp_path / "grid.png").astype(int)
    enlarge = 640 // 6
    assert png.shape == (6 * enlarge, 6 * enlarge, 3)
    small = png[enlarge // 2 :: enlarge, enlarge // 2 :: enlarge]
    np.testing.assert_array_equal(np.kron(small, np.ones((enlarge, enlarge, 1), int)), png)
    expected = 255.0 * images[0] / (levels - 1)
    expected = expected if channels == 3 else expected.repeat(3, axis=2)
    tolerance = 0 if levels == 256 else 1
    assert np.abs(small[1:-1, 1:-1] - expected).max() <= tolerance
    assert (small[[0, -1]] == 255).all()
    assert (small[:, [0, -1]] == 255).all()
    assert small[1, 1, 0] == 0
    assert small[-2, -2, 0] == 255


def test_frame_is_white_around_dark_images(tmp_path):
    plotting.save_images(tmp_path / "dark.png", np.zeros((2, 4, 4, 1), np.uint8), 256)
    png = pixels(tmp_path / "dark.png")
    assert (png[0] == 255).all()
    assert (png == 0).any()


def test_large_images_are_not_enlarged(tmp_path):
    plotting.save_images(tmp_path / "large.png", np.zeros((1, 700, 10, 3), np.uint8), 256)
    assert pixels(tmp_path / "large.png").shape == (702, 12, 3)


def test_samples_are_the_first_hundred_images(tmp_path):
    path = tmp_path / "new" / "samples.png"
    plotting.save_samples(path, numbered(120, 4, 4), 256)
    png = pixels(path)
    enlarge = 640 // 51
    assert png.shape == (51 * enlarge, 51 * enlarge, 3)
    assert png[-2 * enlarge, -2 * enlarge].tolist() == [99] * 3


def test_samples_of_points_are_a_density(tmp_path):
    points = np.random.default_rng(0).standard_normal((500, 2))
    plotting.save_samples(tmp_path / "points.png", points, None)
    assert pixels(tmp_path / "points.png").shape == (550, 550, 3)


@pytest.mark.parametrize("shape", [(1,), (3,), (6, 2), (5, 4, 1), (5, 4, 3), (4, 4, 4, 1)])
def test_samples_of_real_values_of_any_shape_are_shown(tmp_path, shape):
    """In the units of the user, which may be far from zero."""
    samples = 1000.0 + np.random.default_rng(0).standard_normal((50, *shape))
    plotting.save_samples(tmp_path / "reals.png", samples.astype(np.float32), None)
    assert pixels(tmp_path / "reals.png").std() > 5.0


def test_density_is_bright_where_the_points_are(tmp_path):
    """x₁ to the right, x₂ upwards: one cluster at (1, 1), five points far left and below."""
    rng = np.random.default_rng(0)
    points = 0.1 * rng.standard_normal((2_000, 2)) + [1.0, 1.0]
    plotting.save_density(tmp_path / "density.png", np.concatenate([points, [[-1.2, -1.2]] * 5]))
    bright = pixels(tmp_path / "density.png").astype(int).sum(axis=2)
    inside = bright[60:480, 80:500]
    top, bottom = inside[:210], inside[210:]
    warm = [(part > 250) & (part < 700) for part in (top[:, 210:], top[:, :210], bottom[:, 210:])]
    assert warm[0].sum() > 100 > 10 * max(warm[1].sum(), warm[2].sum())


def test_curves_have_one_panel_per_quantity(tmp_path):
    steps = list(range(0, 100, 10))
    loss = {"train": (steps, [1.0 / (s + 1) for s in steps]), "held_out": ([0, 90], [1.0, 0.1])}
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    plotting.save_curves(one, {"loss": loss})
    plotting.save_curves(two, {"loss": loss, "constant": {"train": (steps, [2.0] * 10)}})
    height, width, _ = pixels(one).shape
    assert pixels(two).shape == (height, 2 * width, 3)
    assert pixels(two).std() > 0
    for edge in (np.s_[:2], np.s_[-2:], np.s_[:, :2], np.s_[:, -2:]):  # no text is cut off
        assert (pixels(two)[edge] == 255).all()


LINE = np.linspace(-1.0, 1.0, 20)
POINTS = np.random.default_rng(0).standard_normal((3, 50, 2))
FIGURES = {
    "save_named_images": (numbered(4), 17, list("abcd"), "title"),
    "save_error_curves": (LINE[1:] + 2.0, {"dsm": {"order 1": (np.ones(19), 0.1 * np.ones(19))}}),
    "save_density_on_a_line": (POINTS[0, :, 0], {"law": (LINE, LINE**2)}),
    "save_density_images": ({"law": np.ones((9, 9)), "model": np.eye(9)}, 2.0),
    "save_trajectories": ({"ODE": POINTS, "SDE": POINTS}, ["0", "1", "2"]),
    "save_paths_on_a_line": ({"ODE": POINTS[..., 0], "SDE": POINTS[..., 1]}, np.arange(3.0)),
    "save_score_on_a_line": (LINE, {"t = 1": {"score": LINE, "truth": -LINE}}),
    "save_comparison": ({"ODE": {"a": [1.0, 2.0], "b": [3.0]}, "bound": {"a": [1.0]}},),
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_can_be_drawn(tmp_path, name):
    """On a path that is a text."""
    getattr(plotting, name)(str(tmp_path / "figure.png"), *FIGURES[name])
    assert pixels(tmp_path / "figure.png").std() > 0


IN_A_NOTEBOOK = """
import sys
import matplotlib
matplotlib.use("svg")
import numpy as np
import plotting
assert "matplotlib.pyplot" not in sys.modules
plotting.save_curves("c.png", {"loss": {"train": ([0, 1], [1.0, 0.5])}})
plotting.save_images("i.png", np.zeros((2, 4, 4, 1), np.uint8), 256)
import matplotlib.pyplot as plt
assert matplotlib.get_backend() == "svg"
assert plt.get_fignums() == []
"""


def test_the_backend_of_a_notebook_stays(tmp_path):
    """Paths may be texts; what is drawn is closed."""
    subprocess.run(
        [sys.executable, "-c", IN_A_NOTEBOOK], cwd=tmp_path, check=True,
        env=os.environ | {"PYTHONPATH": str(Path(plotting.__file__).parent)},
    )  # fmt: skip
    assert pixels(tmp_path / "c.png").std() > 0
    assert pixels(tmp_path / "i.png").std() > 0
