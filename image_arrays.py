"""Arrays of images and classes from outside: what they must be, and what makes them so."""

import numpy as np

from npz_files import Part

Shape = tuple[int, ...]
LARGEST_CLASS = 65_535


def as_images(name: str, array: np.ndarray | Part) -> np.ndarray | Part:
    """The uint8 images [n, H, W, C] of 1 or 3 channels; a missing channel axis is added.

    Raises:
        ValueError: they are of another type or shape; names the array and what converts it.
    """
    if array.dtype != np.uint8:
        problem = f"is {array.dtype}: need uint8, 0 to levels - 1; {_as_uint8(array)}"
        raise ValueError(f"{name} {problem}")
    if array.ndim not in (3, 4) or array.size == 0:
        raise ValueError(
            f"{name} has shape {array.shape}: need [n, H, W(, C)], not empty; x.astype(np.float32) "
            "makes real values of it, of any shape"
        )
    array = array.reshape(*array.shape, 1) if array.ndim == 3 else array
    if advice := _as_colours(array.shape):
        raise ValueError(f"{name} has shape {array.shape}: need 1 or 3 channels, last; {advice}")
    return array


def _as_uint8(stored: np.ndarray | Part) -> str:
    """Say how to make 8-bit images of values of another type."""
    array = stored.whole if isinstance(stored, Part) else stored
    if array.dtype == bool:
        return "convert it by x.astype(np.uint8), with data.levels=2"
    if array.dtype.kind not in "iuf" or array.size == 0:
        return "it holds no numbers"
    if not np.isfinite(array).all():
        return f"{np.sum(~np.isfinite(array))} of its values are NaN or infinite: remove them first"
    low, high = array.min(), array.max()
    if low < -1 or high > 255 or (low < 0 and high > 1):
        return f"its values are {low} to {high}: scale them to 0 to 255 first"
    if low < 0:
        return f"its values are {low} to {high}: np.uint8(np.round(127.5 * (x + 1))) converts it"
    if high <= 1 and array.dtype.kind == "f":
        return f"its values are {low} to {high}: np.uint8(np.round(255 * x)) converts it"
    return f"its values are {low} to {high}: np.uint8(np.round(x)) converts it"


def _as_colours(shape: Shape) -> str:
    """Say how to bring images [n, H, W, C] to C = 1 or 3 channels; empty if they have them."""
    if shape[3] in (1, 3):
        return ""
    if shape[1] in (1, 3):
        return "its channels come first: x.transpose(0, 2, 3, 1) moves them"
    if shape[3] in (2, 4):
        return f"the last of {shape[3]} is opacity (alpha): x[..., :-1] drops it"
    return "images of other channels have no likelihood here"


def as_classes(name: str, labels: np.ndarray | None, size: int) -> np.ndarray | None:
    """The classes of a split, int32 [size], or None.

    Raises:
        ValueError: they are no integers from 0 on, one for each image.
    """
    if labels is None:
        return None
    fits = labels.shape == (size,) and np.issubdtype(labels.dtype, np.integer)
    if not fits or labels.min() < 0 or labels.max() > LARGEST_CLASS:
        column = "; y.reshape(-1) makes it so" if labels.shape == (size, 1) else ""
        values = f" from {labels.min()} to {labels.max()}" if fits else ""
        raise ValueError(
            f"{name} is {labels.dtype} {labels.shape}{values}: need integers from 0 to "
            f"{LARGEST_CLASS}, [{size}], one for each image{column}"
        )
    return labels.astype(np.int32)
