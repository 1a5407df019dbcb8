"""Data from outside: damaged, of another kind, or legal and hardly meant."""

import io
import os
import random
import re
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import datasets
import image_files
import npz_files
from datasets import DataConfig


def config(dataset: str, path: Path | str, **changes) -> DataConfig:
    fields = dict(image_size=0, num_channels=1, levels=256, random_flip=False, centered=True,
                  uniform_dequantization=True, logit=False, num_train=0, num_test=0)  # fmt: skip
    return DataConfig(dataset=dataset, path=str(path), **(fields | changes))


def images(n: int, *shape: int, top: int = 256) -> np.ndarray:
    return np.random.default_rng(n).integers(0, top, (n, *shape), np.uint8)


def archive(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


X = images(12, 4, 4)
WHOLE = archive(x_train=X, x_test=X[:5], y_train=np.arange(12))


def with_header(header: bytes) -> bytes:
    """An archive whose x_train has this header."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as packed:
        start = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little")
        packed.writestr("x_train.npy", start + header + b"\x00" * 16)
        packed.writestr("x_test.npy", start + header + b"\x00" * 16)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", r"is empty \(0 bytes\)"),
        (WHOLE[:300], "is truncated: 300 bytes"),
        (b"a,b\n1,2\n", r"is a text, as \.csv: need .*np\.savez\(FILE, x_train=\.\.\., x_test="),
        (b"\x93NUMPY\x01\x00rest", "is damaged and cannot be read"),
        (b"\x89PNG\r\n\x1a\n\x00", r"is no \.npz file"),
        (archive(x_test=X), r"lacks \['x_train'\]; its keys are \['x_test'\]"),
        (archive(x_train=np.array([{}]), x_test=X), "x_train of .* holds objects of Python"),
        (with_header(b"{'descr': '|u1', 'fortran_order': False, 'shape': (9" + b"9" * 30 + b",)}"),
         "x_train of .* is damaged"),
        (with_header(b"{'descr': '|u1', 'fortran_order': False, 'shape': (-1,)}"), "is damaged"),
        (with_header(b"{'descr': '|u1', 'fortran_order'"), "is damaged"),
        (with_header(b"((((" * 40), "is damaged"),
        (with_header(b"\xff\xfe"), "is damaged"),
    ],
)  # fmt: skip
def test_an_archive_that_is_none_is_told_in_one_line(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "data{0}.npz"  # braces mean nothing in the name of a file
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        datasets.load(config("npz", path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_no_damage_of_an_archive_is_a_traceback_or_other_data(tmp_path: Path) -> None:
    """Bits that are flipped, bytes that are replaced, ends that are cut."""
    rng, path = random.Random(0), tmp_path / "data.npz"
    path.write_bytes(WHOLE)
    whole, refused = npz_files.read(path, ("x_train",)), 0
    for _ in range(300):
        data = bytearray(WHOLE)
        for _ in range(rng.choice((1, 1, 4))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        if rng.random() < 0.3:
            data = data[: rng.randrange(len(data))]
        path.write_bytes(data)
        try:
            found = npz_files.read(path, ("x_train",))
        except ValueError:
            refused += 1
            continue
        assert found.keys() == whole.keys()
        assert all(np.array_equal(found[key], whole[key]) for key in whole)
    assert refused > 250


def test_large_arrays_stay_in_their_file(tmp_path: Path, monkeypatch) -> None:
    """The same batches, digests and damages as in memory; no process has a copy of its own."""
    x, path = images(2100, 6, 4, 3), tmp_path / "a.npz"
    arrays = {"x_train": x[:2000], "x_test": np.asfortranarray(x[2000:])}
    path.write_bytes(archive(y_train=np.arange(2000), y_test=np.arange(100), **arrays))
    np.savez_compressed(tmp_path / "compressed.npz", **arrays)
    fields = {"num_channels": 3, "random_flip": True, "num_validation": 7}
    whole = datasets.load(config("npz", path, **fields))
    monkeypatch.setattr(npz_files, "MAPPED", 7000)
    monkeypatch.setattr(npz_files, "READ", 200)  # chunks of two images
    stored = npz_files.read(path, ("x_train", "x_test", "y_test"))
    kinds = {name: isinstance(array, np.memmap) for name, array in stored.items()}
    assert kinds == {"x_train": True, "x_test": False, "y_train": True, "y_test": False}
    mapped = datasets.load(config("npz", path, **fields))
    packed = datasets.load(config("npz", tmp_path / "compressed.npz", **fields))
    assert mapped.digests == whole.digests
    for split in ("train", "validation", "test"):
        ids = np.arange(min(whole.size(split), 9))[::-1]
        for data in (mapped, packed):
            np.testing.assert_array_equal(data.examples(split, ids), whole.examples(split, ids))
    batches = (d.train_batches(batch_size=8, seed=1, first_step=2) for d in (mapped, whole))
    np.testing.assert_array_equal(*(next(b)["image"] for b in batches))
    # In place or by another file: what is read then was never checked.
    os.utime(path, ns=(1, 1))
    with pytest.raises(ValueError, match=r"a\.npz has changed while it was in use"):
        mapped.examples("train", np.array([1]))
    content = bytearray(path.read_bytes())
    content[content.index(b"x_test.npy") - 5000] ^= 1  # in the last images of x_train
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x_train of .*a\.npz is damaged .*CRC"):
        datasets.load(config("npz", path, **fields))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_a_large_array_that_is_divided_stays_in_its_file(tmp_path, monkeypatch, dtype, suffix):
    """Also real values, and images without an axis of channels."""
    x, path = np.random.default_rng(0).integers(0, 200, (300, 6, 4)), tmp_path / f"a{suffix}"
    x = x.astype(dtype)
    np.save(path, x) if suffix == ".npy" else np.savez(path, x=x)
    fields = {"num_channels": 1, "num_validation": 20}
    whole = datasets.load(config("npz", path, **fields))
    monkeypatch.setattr(npz_files, "MAPPED", 7000)
    monkeypatch.setattr(npz_files, "READ", 200)
    read, give_back = [], npz_files._give_back
    monkeypatch.setattr(npz_files, "_give_back", lambda a: (read.append(a), give_back(a)))
    mapped = datasets.load(config("npz", path, **fields))
    mapped.examples("train", np.array([1]))
    assert len(read) > 3
    assert all(npz_files.is_mapped(array) for array in read)
    for split in ("train", "validation", "test"):
        np.testing.assert_array_equal(
            *(data.examples(split, np.arange(data.size(split))) for data in (mapped, whole))
        )
    assert mapped.digests == whole.digests
    assert mapped.describe() == whole.describe()
    os.utime(path, ns=(1, 1))
    with pytest.raises(ValueError, match="has changed while it was in use"):
        mapped.examples("test", np.array([1]))


def test_a_value_of_a_large_array_that_is_not_finite_is_named(tmp_path, monkeypatch):
    x = np.zeros((300, 5), np.float32)
    x[217, 3] = np.nan
    np.savez(tmp_path / "a.npz", x_train=x, x_test=x[:5])
    monkeypatch.setattr(npz_files, "MAPPED", 1000)
    monkeypatch.setattr(npz_files, "READ", 200)
    with pytest.raises(ValueError, match=r"value \[217, 3\] of x_train of .* is nan"):
        datasets.load(config("npz", tmp_path / "a.npz"))


def test_an_array_is_mapped_from_the_file_whose_checksum_was_compared(tmp_path, monkeypatch):
    """Another file that takes its place in between has another table of contents."""
    path, other = tmp_path / "a.npz", tmp_path / "b.npz"
    x = images(500, 4, 4)
    np.savez(path, x=x)
    np.savez(other, before=x, x=np.zeros_like(x))
    monkeypatch.setattr(npz_files, "MAPPED", 100)
    header = npz_files._header

    def meanwhile(change) -> np.ndarray:
        """The array, where the file changes after its state is known and before it is compared."""
        monkeypatch.setattr(npz_files, "_header", lambda file: (change(), header(file))[1])
        return npz_files.read(path, ("x",))["x"]

    touched = meanwhile(lambda: os.utime(path, ns=(5, 5)))
    replaced = meanwhile(lambda: other.exists() and os.replace(other, path))
    np.testing.assert_array_equal(replaced, x)
    for found in (touched, replaced):
        with pytest.raises(ValueError, match="has changed"):
            npz_files.taken(found, np.array([0]))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X > 9, r"x_train of .* is bool: .* x\.astype\(np\.uint8\), with data\.levels=2"),
        (np.full((4, 4, 4), "a"), "it holds no numbers"),
        (images(4, 5, 5, 4), r"the last of 4 is opacity \(alpha\): x\[\.\.\., :-1\]"),
        (images(4, 3, 6, 6), r"its channels come first: x\.transpose\(0, 2, 3, 1\)"),
        (images(4, 5, 5, 7), "need 1 or 3 channels, last"),
        (images(9, 4, 4, top=2), r"data\.levels=256: need 2, as all values are 0 or 1"),
    ],
)
def test_images_of_another_kind_say_what_converts_them(tmp_path: Path, x, message: str) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, x_train=x, x_test=x)
    with pytest.raises(ValueError, match=message):
        datasets.load(config("npz", path))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X / 255.0, r"float64: need uint8.*np\.uint8\(np\.round\(255 \* x\)\)"),
        (X / 127.5 - 1.0, r"np\.uint8\(np\.round\(127\.5 \* \(x \+ 1\)\)\)"),
        (X.astype(float), r"its values are 0\.0 to 252\.0: np\.uint8\(np\.round\(x\)\)"),
        (X.astype(int) * 9, "its values are 0 to 2268: scale them"),
        (np.where(X > 200, np.nan, X), r"\d+ of its values are NaN or infinite: remove"),
    ],
)
def test_real_values_beside_grey_levels_say_what_converts_them(tmp_path, x, message: str) -> None:
    np.savez(tmp_path / "data.npz", x_train=X, x_test=x)
    with pytest.raises(ValueError, match=message):
        datasets.load(config("npz", tmp_path / "data.npz"))


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.full(12, 2**31), "from 2147483648 to 2147483648: need integers from 0 to 65535"),
        (np.full(12, 2**32 + 1), "from 4294967297"),
        (np.arange(12)[:, None], r"y\.reshape\(-1\) makes it so"),
    ],
)
def test_classes_have_bounds(tmp_path: Path, y: np.ndarray, message: str) -> None:
    np.savez(tmp_path / "data.npz", x_train=X, x_test=X, y_train=y)
    with pytest.raises(ValueError, match=message):
        datasets.load(config("npz", tmp_path / "data.npz"))


@pytest.mark.parametrize(
    ("x", "changes", "message"),
    [
        (np.zeros_like(X), {}, "all images are black"),
        (images(9, 4, 4, top=16), {}, r"the largest value is 15: .*data\.levels=16\?"),
        (images(300, 1, 1), {}, "the images have a single pixel"),
        (X, {}, ""),
        (images(9, 4, 4, top=2), {"levels": 2}, ""),
    ],
)
def test_what_is_hardly_meant_is_warned_of(tmp_path, caplog, x, changes, message: str) -> None:
    np.savez(tmp_path / "data.npz", x_train=x, x_test=x)
    datasets.load(config("npz", tmp_path / "data.npz", **changes))
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warned) == (message != "")
    assert all(re.search(message, text) for text in warned)


def test_a_batch_larger_than_the_data_is_warned_of(caplog) -> None:
    data = datasets.load(config("rings", "", num_train=10, num_test=5))
    data.train_batches(batch_size=10, seed=0, first_step=0).close()
    assert not caplog.text
    data.train_batches(batch_size=16, seed=0, first_step=0).close()
    assert "batch_size=16 is more than the 10 training examples" in caplog.text


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("rings", {"num_test": 3}), "rings: drawn from its law; endless train, 3 test"),
        (
            ("digits", {"levels": 17, "num_train": 100, "num_validation": 10}),
            "every fifth for the test; 90 train, 359 test, 10 validation examples; "
            "left out: 1338 train by data.num_train",
        ),
    ],
)
def test_a_start_says_where_the_data_come_from(caplog, given, said: str) -> None:
    caplog.set_level("INFO", logger="fokker")
    datasets.load(config(given[0], "", **given[1]))
    assert said in caplog.text


@pytest.mark.parametrize("field", ["num_train", "num_test"])
def test_points_have_a_bound(field: str) -> None:
    with pytest.raises(ValueError, match=rf"data\.{field}=2147483647: need . to 10000000"):
        datasets.load(config("rings", "", **{"num_test": 5, field: 2**31 - 1}))


def write(folder: Path, n: int, suffix: str = ".png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images(n, 4, 4)):
        Image.fromarray(image).save(folder / f"{i:03d}{suffix}")


@pytest.mark.parametrize(
    ("folders", "sizes", "said"),
    [
        ({"": 20}, {"train": 18, "test": 2}, "not split into train/ and test/, every tenth image"),
        ({"train": 8, "test": 4}, {"train": 8, "test": 4}, "test/ for test, train/ for train"),
        ({"train": 8, "val": 4}, {"train": 8, "test": 4}, "val/ .* which is the test split here"),
        (
            {"train": 8, "valid": 3, "test": 4},
            {"train": 8, "validation": 3, "test": 4},
            "valid/ for validation",
        ),
        ({"train": 20, "extra": 7}, {"train": 18, "test": 2}, "; 7 outside the splits"),
    ],
)
def test_folders_have_known_names_of_splits(tmp_path: Path, folders, sizes, said: str) -> None:
    for name, n in folders.items():
        write(tmp_path / name, n)
    files, text, left_out = image_files.split_files(tmp_path)
    assert {name: len(paths) for name, paths in files.items()} == sizes
    assert re.search(said, "; ".join([text, *left_out]))
    paths = [path for split in files.values() for path in split]
    assert len(set(paths)) == len(paths)


@pytest.mark.parametrize("folders", [("val", "test"), ("train", "val", "validation")])
def test_folders_that_are_no_splits_are_refused(tmp_path: Path, folders: tuple[str, ...]) -> None:
    for name in folders:
        write(tmp_path / name, 3)
    with pytest.raises(ValueError, match=r"data\.path=.*: need train/, and one each"):
        image_files.split_files(tmp_path)


def test_what_is_no_image_is_left_out_and_told(tmp_path: Path) -> None:
    """A pipe named .png would be waited for without end."""
    write(tmp_path, 10)
    write(tmp_path, 2, ".webp")
    (tmp_path / "._000.png").write_bytes(b"resource fork")
    os.mkfifo(tmp_path / "x.png")
    files, _, left_out = image_files.split_files(tmp_path)
    assert len(files["train"]) == 9
    assert sorted(left_out) == ["1 .png, no file", "1 hidden", "2 .webp"]
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(ValueError, match=r"pipe\.npz is no file that can be read twice"):
        datasets.load(config("npz", tmp_path / "pipe.npz"))


def test_an_image_of_absurd_size_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 10)
    data = bytearray((tmp_path / "003.png").read_bytes())
    data[16:24] = (50_000).to_bytes(4, "big") * 2  # its header
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    (tmp_path / "003.png").write_bytes(data)
    with pytest.raises(ValueError, match=r"003\.png cannot be read as an image: .*bomb"):
        image_files.header(tmp_path / "003.png")
