"""Figures of a run: image grids, 2-D densities and training curves; no display needed."""

import math
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt

Curve = tuple[list[int], list[float]]


def image_grid(images: np.ndarray, white: int, padding: int = 1) -> np.ndarray:
    """Tile images [n, H, W, C] row by row into one of about square shape, `white` between them."""
    n, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    canvas = np.full(
        (rows * (height + padding) + padding, columns * (width + padding) + padding, channels),
        white,
        images.dtype,
    )
    for i, image in enumerate(images):
        top = padding + (i // columns) * (height + padding)
        left = padding + (i % columns) * (width + padding)
        canvas[top : top + height, left : left + width] = image
    return canvas


def save_samples(path: Path, samples: np.ndarray, levels: int | None) -> None:
    """A PNG of samples: the first 100 images [n, H, W, C], or the density of points [n, 2]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if levels is None:
        save_density(path, samples)
    else:
        save_images(path, samples[:100], levels)


def save_images(path: Path, images: np.ndarray, levels: int) -> None:
    """A PNG of an image grid, small images enlarged without smoothing."""
    grid = image_grid(images, levels - 1).astype(np.float64) / (levels - 1)
    enlarge = max(1, 640 // max(grid.shape[:2]))
    grid = np.clip(np.kron(grid, np.ones((enlarge, enlarge, 1))), 0.0, 1.0)
    plt.imsave(path, np.repeat(grid, 3, axis=2) if grid.shape[2] == 1 else grid)


def save_density(path: Path, points: np.ndarray, bins: int = 200) -> None:
    """A PNG of a 2-D histogram of points [n, 2], colour by square root of the count."""
    radius = 1.05 * np.quantile(np.abs(points), 0.999)
    limits = [[-radius, radius], [-radius, radius]]
    bins = int(np.clip(math.sqrt(len(points)), 30, bins))
    histogram, _, _ = np.histogram2d(points[:, 0], points[:, 1], bins=bins, range=limits)
    figure, axes = plt.subplots(figsize=(5, 5), layout="constrained")
    axes.imshow(
        np.sqrt(histogram.T),
        origin="lower",
        extent=[-radius, radius, -radius, radius],
        cmap="magma",
    )
    axes.set(xlabel="x₁", ylabel="x₂", title=f"{len(points)} points")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def save_curves(path: Path, panels: dict[str, dict[str, Curve]]) -> None:
    """A PNG with one panel per quantity, one line per split, over training steps."""
    figure, all_axes = plt.subplots(
        1, len(panels), figsize=(4.6 * len(panels), 3.4), layout="constrained", squeeze=False
    )
    for axes, (title, curves) in zip(all_axes[0], panels.items(), strict=True):
        for label, (steps, values) in curves.items():
            axes.plot(steps, values, label=label, linewidth=1.2, marker="." * (len(steps) < 40))
        axes.set(xlabel="step", title=title)
        axes.grid(alpha=0.3)
        axes.legend()
        everything = np.concatenate([values for _, values in curves.values()])
        low, high = np.quantile(everything, [0.0, 0.97])
        margin = 0.05 * (high - low) + 1e-12
        axes.set_ylim(low - margin, high + margin)
    figure.savefig(path, dpi=110)
    plt.close(figure)
