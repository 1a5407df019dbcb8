"""Figures of a run: image grids, densities, trajectories and curves.

They are drawn without pyplot, so that no display is needed and the backend of a notebook stays.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from checks import writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = tuple[Sequence[int], Sequence[float]]


def _panels(
    rows: int,
    columns: int,
    *,
    figsize: tuple[float, float],
    layout: Literal["constrained"] | None = "constrained",
) -> tuple["Figure", np.ndarray]:
    """A figure and its axes [rows, columns], which pyplot does not know."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=figsize, layout=layout)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: "Figure", path: str | Path) -> None:
    """Write the PNG of a figure."""
    with writing(path):
        figure.savefig(path, dpi=110)


def image_grid(
    images: np.ndarray, white: int, padding: int = 1, columns: int | None = None
) -> np.ndarray:
    """Tile images [n, H, W, C] row by row into one, `white` between them; about square if None."""
    n, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(n))
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


def save_samples(
    path: str | Path, samples: np.ndarray, levels: int | None, columns: int | None = None
) -> None:
    """A PNG of samples: the first 100 images [n, H, W, C], or the density of real values.

    Real values of the shape of grey or colour images are shown as such, from their 1 % quantile,
    black, to the one of 99 %; of others the first two coordinates.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if levels is not None:
        save_images(path, samples[:100], levels, columns)
        return
    if samples.ndim == 4 and samples.shape[3] in (1, 3):
        low, high = np.quantile(samples[:100], [0.01, 0.99])
        grey = np.clip((samples[:100] - low) / max(high - low, 1e-30), 0.0, 1.0)
        save_images(path, np.round(255 * grey), 256, columns)
        return
    points = samples.reshape(len(samples), -1)
    if points.shape[1] == 1:
        save_density_on_a_line(path, points[:, 0], {})
    else:
        save_density(path, points[:, :2])


def save_images(
    path: str | Path, images: np.ndarray, levels: int, columns: int | None = None
) -> None:
    """A PNG of an image grid, small images enlarged without smoothing."""
    grid = image_grid(images, levels - 1, columns=columns).astype(np.float64) / (levels - 1)
    enlarge = max(1, 640 // max(grid.shape[:2]))
    grid = np.clip(np.kron(grid, np.ones((enlarge, enlarge, 1))), 0.0, 1.0)
    from matplotlib.image import imsave

    with writing(path):
        imsave(path, np.repeat(grid, 3, axis=2) if grid.shape[2] == 1 else grid)


def save_named_images(
    path: str | Path, images: np.ndarray, levels: int, names: list[str], title: str
) -> None:
    """A PNG of images [2n, H, W, C] in two rows, each with its name above it."""
    columns = len(images) // 2
    figure, axes = _panels(2, columns, figsize=(1.3 * columns, 3.4), layout=None)
    scaled = images.astype(np.float32) / (levels - 1)
    for axis, image, name in zip(axes.flat, scaled, names, strict=True):
        axis.imshow(
            image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=1
        )
        axis.set_title(name, fontsize=9)
        axis.axis("off")
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def save_density(path: str | Path, points: np.ndarray, bins: int = 200) -> None:
    """A PNG of a 2-D histogram of points [n, 2], colour by square root of the count."""
    ends = np.quantile(points.astype(np.float64), [0.0005, 0.9995], axis=0)
    margin = 0.05 * (ends[1] - ends[0]) + 1e-12
    limits = np.stack([ends[0] - margin, ends[1] + margin], axis=1)
    bins = int(np.clip(math.sqrt(len(points)), 30, bins))
    histogram, _, _ = np.histogram2d(points[:, 0], points[:, 1], bins=bins, range=limits)
    figure, ((axes,),) = _panels(1, 1, figsize=(5, 5))
    axes.imshow(
        np.sqrt(histogram.T),
        origin="lower",
        extent=limits.ravel(),
        aspect="auto",
        cmap="magma",
    )
    axes.set(xlabel="x₁", ylabel="x₂", title=f"{len(points)} points")
    _save(figure, path)


def save_posteriors(path: str | Path, samples: np.ndarray, originals: np.ndarray | None) -> None:
    """A PNG with one panel per measurement: its samples [n, s, d] and the original [n, d].

    Of points on the line the histogram, of others the first two coordinates.
    """
    columns = min(4, len(samples))
    rows = math.ceil(len(samples) / columns)
    figure, all_axes = _panels(rows, columns, figsize=(3.2 * columns, 3.0 * rows))
    for axes in all_axes.ravel()[len(samples) :]:
        axes.axis("off")
    for i, (axes, points) in enumerate(zip(all_axes.ravel(), samples, strict=False)):
        if samples.shape[-1] == 1:
            axes.hist(points[:, 0], bins=40, density=True, color="0.7", label="samples")
            if originals is not None:
                axes.axvline(originals[i, 0], color="C3", label="original")
        else:
            axes.plot(points[:, 0], points[:, 1], ".", markersize=3, label="samples")
            if originals is not None:
                axes.plot(*originals[i, :2], "x", color="C3", label="original")
        axes.set_title(f"measurement {i}", fontsize="small")
    all_axes[0, 0].legend(fontsize="small")
    _save(figure, path)


class Mark(NamedTuple):
    """A figure with its standard error in a row of its own."""

    name: str
    mean: float
    error: float
    is_baseline: bool


def save_marks(path: str | Path, marks: list[Mark], unit: str) -> None:
    """A PNG of figures on one axis, from the best to the worst; baselines are grey."""
    order = sorted(marks, key=lambda mark: -mark.mean)
    figure, ((axes,),) = _panels(1, 1, figsize=(8.0, 0.6 + 0.34 * len(order)))
    for place, mark in enumerate(order):
        color = "0.6" if mark.is_baseline else "C0"
        axes.errorbar(mark.mean, place, xerr=mark.error, fmt="o", color=color, capsize=3)
        axes.annotate(
            f"{mark.mean:.3f}", (mark.mean, place), (7, 4), textcoords="offset points", color=color
        )
    axes.set_yticks(range(len(order)), [mark.name for mark in order])
    axes.set(xlabel=unit, ylim=(-0.6, len(order) - 0.3))
    axes.margins(x=0.12)
    axes.grid(alpha=0.3)
    _save(figure, path)


def save_curves(path: str | Path, panels: dict[str, dict[str, Curve]]) -> None:
    """A PNG with one panel per quantity, three in a row, one line per split, over the steps."""
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    width, height = 4.2 * columns, 3.1 * rows
    # Every run draws these curves, and a constrained layout would draw each of them twice.
    figure, all_axes = _panels(rows, columns, figsize=(width, height), layout=None)
    figure.subplots_adjust(
        left=0.75 / width, right=1 - 0.15 / width, wspace=0.9 / 3.3,
        bottom=0.5 / height, top=1 - 0.35 / height, hspace=0.85 / 2.25,
    )  # fmt: skip
    for axes in all_axes.ravel()[len(panels) :]:
        axes.axis("off")
    for axes, (title, curves) in zip(all_axes.ravel(), panels.items(), strict=False):
        for label, (steps, values) in curves.items():
            axes.plot(steps, values, label=label, linewidth=1.2, marker="." * (len(steps) < 40))
        axes.set(xlabel="step", title=title)
        axes.grid(alpha=0.3)
        axes.legend()
        everything = np.concatenate([values for _, values in curves.values()])
        low, high = np.quantile(everything, [0.0, 0.97])
        margin = 0.05 * (high - low) + 1e-12
        axes.set_ylim(low - margin, high + margin)
    _save(figure, path)


Band = tuple[np.ndarray, np.ndarray]  # mean and standard error over t


def save_error_curves(path: str | Path, t: np.ndarray, panels: dict[str, dict[str, Band]]) -> None:
    """A PNG with one panel per group of errors, mean ± 2 s.e. over t, logarithmic if positive."""
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, all_axes = _panels(rows, columns, figsize=(4.4 * columns, 3.3 * rows))
    for axes in all_axes.ravel()[len(panels) :]:
        axes.axis("off")
    for axes, (title, curves) in zip(all_axes.ravel(), panels.items(), strict=False):
        for label, (mean, error) in curves.items():
            (line,) = axes.plot(t, mean, label=label, linewidth=1.3)
            axes.fill_between(
                t, mean - 2 * error, mean + 2 * error, color=line.get_color(), alpha=0.2
            )
        lowest = min(float(np.min(mean)) for mean, _ in curves.values())
        if lowest > 0.0:
            axes.set_yscale("log")
            axes.set_ylim(bottom=0.5 * lowest)
        axes.set(xlabel="t", title=title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    _save(figure, path)


class Bits(NamedTuple):
    """The parts of a bound over log(σ/α), each (mean, standard error), in `unit`."""

    title: str
    subtitle: str
    unit: str
    edges: Sequence[float]  # of n bins
    bins: tuple[Sequence[float], Sequence[float]]  # [n] each
    cumulative: tuple[Sequence[float], Sequence[float]]  # [n + 2]: first term, + bins, + last term
    ends: dict[str, tuple[float, float]]  # the first and the last term, by name
    baseline: float | None = None  # of the independent histogram


NOISE_LEVEL = "log(σ/α), noise over signal"


def save_bits(path: str | Path, bounds: list[Bits]) -> None:
    """A PNG with one row per bound: the cost of a unit of log(σ/α), and the sum from low noise."""
    figure, all_axes = _panels(len(bounds), 2, figsize=(11.0, 4.1 * len(bounds)))
    for (left, right), bits in zip(all_axes, bounds, strict=True):
        _draw_rate(left, bits)
        _draw_sum(right, bits)
        left.set_title(f"{bits.title}\n", loc="left", fontsize="medium")
        left.text(0.0, 1.02, bits.subtitle, transform=left.transAxes, fontsize="x-small")
        for axes in (left, right):
            axes.axhline(0.0, color="0.4", linewidth=0.6)
            axes.set_xlabel(NOISE_LEVEL)
            axes.grid(alpha=0.3)
    _save(figure, path)


def _draw_rate(axes: "Axes", bits: Bits) -> None:
    """The bins over their widths, as steps."""
    mean, error = np.asarray(bits.bins) / np.diff(bits.edges)
    axes.stairs(mean, bits.edges, fill=True, alpha=0.15, color="C0")
    axes.stairs(mean, bits.edges, baseline=None, color="C0", linewidth=1.4)
    band: dict[str, Any] = {"fill": True, "alpha": 0.4, "color": "C0"}
    band |= {"label": "± 1 standard error"}
    axes.stairs(mean + error, bits.edges, baseline=mean - error, **band)
    axes.set_ylabel(f"{bits.unit} per unit of log(σ/α)")
    axes.legend(fontsize="small")


def _draw_sum(axes: "Axes", bits: Bits) -> None:
    """The cumulative sum at the edges, the first and the last term as bars at the ends."""
    edges, (mean, error) = np.asarray(bits.edges), np.asarray(bits.cumulative)
    (first, low), (last, high) = bits.ends.items()
    bar: dict[str, Any] = {"linewidth": 5.0, "solid_capstyle": "butt", "zorder": 3}
    bar |= {"marker": "s", "markevery": [1]}
    axes.plot(edges[[0, 0]], [0.0, mean[0]], color="C1", label=_term(first, *low), **bar)
    axes.fill_between(edges, (mean - error)[:-1], (mean + error)[:-1], color="C0", alpha=0.3)
    integral = f"integral {math.fsum(bits.bins[0]):.4f}"
    axes.plot(edges, mean[:-1], ".-", color="C0", linewidth=1.4, label=integral)
    axes.plot(edges[[-1, -1]], mean[-2:], color="C2", label=_term(last, *high), **bar)
    total = _term("total", mean[-1], error[-1])
    axes.axhline(mean[-1], color="black", linestyle=":", linewidth=1.2, label=total)
    if bits.baseline is not None:
        histogram = f"independent histogram {bits.baseline:.4f}"
        axes.axhline(bits.baseline, color="C3", linestyle="--", linewidth=1.2, label=histogram)
    axes.set_ylabel(f"{bits.unit}, sum from low noise on")
    axes.legend(fontsize="small", loc="lower right")


def _term(name: str, mean: float, error: float) -> str:
    return f"{name} {_number(mean)} ± {_number(error)}"


def _number(value: float) -> str:
    """Write a number as the tables do, but keep small values from becoming zero."""
    return f"{value:.0e}" if 0.0 < abs(value) < 5e-5 else f"{value:.4f}"


def save_density_on_a_line(
    path: str | Path, samples: np.ndarray, curves: dict[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    """A PNG of densities over x as lines, over the histogram of samples [n]."""
    figure, ((axes,),) = _panels(1, 1, figsize=(6.5, 3.8))
    low, high = np.quantile(samples, [0.001, 0.999])
    margin = 0.15 * (high - low)
    limits = (low - margin, high + margin)
    axes.hist(samples, bins=120, range=limits, density=True, color="0.8", label="samples")
    for label, (x, density) in curves.items():
        axes.plot(x, density, label=label, linewidth=1.4)
    axes.set(xlabel="x", ylabel="density", xlim=limits)
    axes.legend()
    _save(figure, path)


def save_density_images(path: str | Path, images: dict[str, np.ndarray], radius: float) -> None:
    """A PNG of densities [n, n] on [−radius, radius]², side by side on one colour scale."""
    figure, all_axes = _panels(1, len(images), figsize=(4.2 * len(images), 4.4))
    top = max(float(np.nanquantile(image, 0.999)) for image in images.values())
    extent = [-radius, radius, -radius, radius]
    for axes, (title, image) in zip(all_axes[0], images.items(), strict=True):
        axes.imshow(image.T, origin="lower", extent=extent, cmap="magma", vmin=0.0, vmax=top)
        axes.set(title=title, xlabel="x₁", ylabel="x₂")
    _save(figure, path)


def save_trajectories(path: str | Path, rows: dict[str, np.ndarray], names: list[str]) -> None:
    """A PNG of densities of points [k, n, 2] at k moments (columns), one row per process."""
    last = next(iter(rows.values()))[-1]
    radius = 1.2 * float(np.quantile(np.abs(last), 0.999))
    figure, all_axes = _panels(len(rows), len(names), figsize=(1.7 * len(names), 1.8 * len(rows)))
    for row, (label, moments) in enumerate(rows.items()):
        for column, points in enumerate(moments):
            limits = [[-radius, radius]] * 2
            histogram, _, _ = np.histogram2d(points[:, 0], points[:, 1], bins=100, range=limits)
            axes = all_axes[row, column]
            axes.imshow(np.sqrt(histogram.T), origin="lower", cmap="magma")
            axes.set(xticks=[], yticks=[])
            if row == len(rows) - 1:
                axes.set_xlabel(names[column])
            if column == 0:
                axes.set_ylabel(label)
    _save(figure, path)


def save_paths_on_a_line(
    path: str | Path, panels: dict[str, np.ndarray], times: np.ndarray
) -> None:
    """A PNG of the density of x over time, one panel per process: x [k, n] at the k times."""
    figure, all_axes = _panels(1, len(panels), figsize=(4.4 * len(panels), 3.4))
    radius = 3.0 * float(np.quantile(np.abs(next(iter(panels.values()))[0]), 0.99))
    bins = np.linspace(-radius, radius, 161)
    for axes, (title, x) in zip(all_axes[0], panels.items(), strict=True):
        columns = [np.histogram(moment, bins=bins, density=True)[0] for moment in x]
        edges = np.concatenate([[times[0]], 0.5 * (times[1:] + times[:-1]), [times[-1]]])
        axes.pcolormesh(edges, bins, np.log1p(np.stack(columns, axis=1)), cmap="magma")
        axes.set(xlabel="t", ylabel="x", title=title)
    _save(figure, path)


def save_score_on_a_line(
    path: str | Path, x: np.ndarray, panels: dict[str, dict[str, np.ndarray]]
) -> None:
    """A PNG of scores over x as lines, one panel per time."""
    figure, all_axes = _panels(1, len(panels), figsize=(4.4 * len(panels), 3.4))
    for axes, (title, curves) in zip(all_axes[0], panels.items(), strict=True):
        for (label, values), style in zip(curves.items(), ("-", "--", ":"), strict=False):
            axes.plot(x, values, style, label=label, linewidth=1.4)
        axes.set(xlabel="x", title=title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    _save(figure, path)


def save_calibration(path: str | Path, levels: np.ndarray, ranks: np.ndarray, title: str) -> None:
    """A PNG of distribution functions of numbers in [0, 1], less that of the uniform law.

    Left the levels [n], right the ranks [n, d], a line for each coordinate. In the grey band lie
    95 of 100 such lines of uniform numbers, each as a whole.
    """
    figure, (both,) = _panels(1, 2, figsize=(10.0, 3.8))
    columns = {"levels": levels[:, None], "ranks of coordinates": ranks}
    for axes, (name, values) in zip(both, columns.items(), strict=True):
        n = len(values)
        width = KOLMOGOROV / math.sqrt(n)
        axes.axhspan(-width, width, color="0.9", label="95 % if calibrated")
        for j, column in enumerate(np.sort(values, axis=0).T):
            place = np.concatenate([[0.0], np.repeat(column, 2), [1.0]])
            share = np.repeat(np.arange(n + 1) / n, 2)
            label = f"{j}" if values.shape[1] > 1 else None
            axes.plot(place, share - place, linewidth=1.2, label=label)
        axes.set(xlabel="u", ylabel="share below u, less u", title=f"{name}, n = {n}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.suptitle(title, fontsize="small", wrap=True)
    _save(figure, path)


KOLMOGOROV = 1.358  # 95 % quantile of √n sup |F_n − F|


def save_comparison(path: str | Path, panels: dict[str, dict[str, list[float]]]) -> None:
    """A PNG with one panel per quantity: the value of every seed, mean ± s.e., by config."""
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, all_axes = _panels(rows, columns, figsize=(4.2 * columns, 3.2 * rows))
    for axes in all_axes.ravel()[len(panels) :]:
        axes.axis("off")
    for axes, (title, groups) in zip(all_axes.ravel(), panels.items(), strict=False):
        for place, values in enumerate(groups.values()):
            axes.plot([place] * len(values), values, ".", color="0.6")
            error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
            axes.errorbar(place, np.mean(values), error, fmt="o", capsize=4)
        axes.set_xticks(range(len(groups)), list(groups), rotation=20, ha="right", fontsize="small")
        axes.set_title(title, fontsize="medium")
        axes.grid(alpha=0.3)
    _save(figure, path)
