"""Image files below a folder: which there are, how they are split, what their headers say."""

import os
import pathlib
from collections import Counter
from collections.abc import Collection, Iterator

from checks import require

IMAGES = (".png", ".jpg", ".jpeg", ".bmp")
SPLITS = {
    "train": "train", "val": "validation", "valid": "validation", "validation": "validation",
    "test": "test",
}  # fmt: skip


def _below(folder: str | pathlib.Path) -> Iterator[os.DirEntry]:
    """All that is below a folder and is no folder; links to folders are not followed."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _below(entry.path)
            else:
                yield entry


def _no_image(entry: os.DirEntry) -> str:
    """Why an entry of a folder is left out; empty for an image."""
    if entry.name.startswith("."):
        return "hidden"
    suffix = pathlib.PurePath(entry.name).suffix.lower()
    if suffix not in IMAGES:
        return suffix or "without suffix"
    return "" if entry.is_file() else f"{suffix}, no file"


def _image_files(folder: pathlib.Path, left_out: Counter[str]) -> list[pathlib.Path]:
    """Images below a folder, sorted by their path in it; counts what else is there by reason."""
    reasons = [(_no_image(entry), entry.path) for entry in _below(folder)]
    left_out.update(reason for reason, _ in reasons if reason)
    paths = (pathlib.Path(path) for reason, path in reasons if not reason)
    return sorted(paths, key=lambda p: p.relative_to(folder).as_posix())


def header(path: pathlib.Path) -> tuple[int, int, int]:
    """(height, width, channels) of an image file, from its header."""
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG", "JPEG", "BMP")) as image:
            mode, (width, height) = image.mode, image.size
    except Exception as error:  # what PIL raises for damaged headers is not documented
        raise ValueError(f"{path} cannot be read as an image: {error}") from None
    if mode not in ("L", "RGB"):
        raise ValueError(f"{path} has mode {mode}: convert it to 8-bit grey (L) or colour (RGB)")
    return height, width, 1 if mode == "L" else 3


Files = dict[str, list[pathlib.Path]]  # by the name of the split


def split_files(root: pathlib.Path) -> tuple[Files, str, list[str]]:
    """The files of every split, how they were split, and what is left out.

    Below root/train, root/val and root/test. Without a test split validation is the test split, or
    every tenth image where there is none.

    Raises:
        FieldError: the folders are no splits, or a split has no image.
    """
    folders = {p: SPLITS[p.name.lower()] for p in sorted(root.iterdir())
               if p.name.lower() in SPLITS and p.is_dir()}  # fmt: skip
    names = list(folders.values())
    left_out: Counter[str] = Counter()
    fits = len(set(names)) == len(names) and (not names or "train" in names)
    allowed = f"train/, and one each of val/ and test/ at most, not {[p.name for p in folders]}"
    require(fits, "data.path", str(root), allowed)
    if folders:
        splits = {name: _image_files(folder, left_out) for folder, name in folders.items()}
        text = ", ".join(f"{p.name}/ for {name}" for p, name in folders.items())
        left_out.update(_outside(root, folders))
    else:
        splits, text = {"train": _image_files(root, left_out)}, "not split into train/ and test/"
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
        text += ", which is the test split here"
    if "test" not in splits:
        images = splits["train"]
        splits = {"train": [p for i, p in enumerate(images) if i % 10 != 9], "test": images[9::10]}
        text += ", every tenth image for the test"
    empty = [name for name, files in splits.items() if not files]
    allowed = f"png, jpg or bmp for train and test, not {[len(f) for f in splits.values()]}"
    require(not empty, "data.path", str(root), allowed)
    return splits, text, [f"{n} {why}" for why, n in left_out.items()]


def _outside(root: pathlib.Path, folders: Collection[pathlib.Path]) -> Counter[str]:
    """Count the files of a folder with splits that lie in none of its splits."""
    within = {str(folder) for folder in folders}
    others = [entry.path for entry in os.scandir(root) if entry.path not in within]
    number = sum(1 if not os.path.isdir(p) else len(list(_below(p))) for p in others)
    return Counter({"outside the splits": number} if number else {})
