"""Image sets: the splits, the official MNIST files, and downloads that go wrong."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import random
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from server import Page, Server

from l2o.download import cache_folder
from l2o.tasks import data, mnist
from l2o.tasks.data import HALVES, SPLITS, image_split, split_indices
from l2o.tasks.mnist import find, load_mnist, read_idx
from l2o.types import DataError, UnknownNameError

NAME = "t10k-labels-idx1-ubyte.gz"


def idx(array: np.ndarray, kind: int = 8) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, kind, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def packed(content: bytes) -> bytes:
    """Without the time, which would be another in each worker's names of tests."""
    return gzip.compress(content, mtime=0)


IMAGES = np.random.default_rng(0).integers(0, 256, (50, 28, 28))
LABELS = np.arange(50) % 10
CONTENT = packed(idx(LABELS))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder, in use, with a small ``t10k`` in it: one file gzipped, one not."""
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "t10k-images-idx3-ubyte").write_bytes(idx(IMAGES))
    (tmp_path / "mnist" / NAME).write_bytes(CONTENT)
    monkeypatch.setenv("L2O_DATA_DIR", str(tmp_path))
    data._load.cache_clear()
    data._image_split.cache_clear()
    return tmp_path / "mnist"


@pytest.mark.parametrize("n", [10, 11, 1797])
def test_the_parts_of_a_set_are_disjoint_and_complete(n: int) -> None:
    parts = {(half, split): split_indices(n, half, split) for half in HALVES for split in SPLITS}
    assert np.array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(n))
    assert len(parts["meta_train", "train"]) == n // 2 * 4 // 5
    assert len(parts["meta_test", "train"]) == (n - n // 2) * 4 // 5


def test_the_split_is_the_one_of_every_run() -> None:
    """Results are compared across versions: a changed permutation would move test images into training."""
    assert split_indices(1797, "meta_train", "train")[:5].tolist() == [360, 1773, 1482, 600, 850]
    assert split_indices(1797, "meta_test", "valid")[-5:].tolist() == [1449, 184, 1528, 975, 607]


def test_digits_are_scaled_and_loaded_once() -> None:
    parts = [image_split("digits", half, split, "cpu") for half in HALVES for split in SPLITS]
    images, labels = (torch.cat(each) for each in zip(*parts, strict=True))
    assert (images.shape, images.dtype, labels.dtype) == ((1797, 64), torch.float32, torch.int64)
    assert (images.min(), images.max()) == (0.0, 1.0)
    assert sorted(set(labels.tolist())) == list(range(10))
    assert image_split("digits", "meta_train", "train", torch.device("cpu"))[0] is parts[0][0]


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"pip install 'l2o\[train\]"):
        data.IMAGE_SETS["digits"].load()


def test_the_import_of_scikit_learn_leaves_the_global_generator_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawing(name: str) -> object:
        random.random()  # as its first import does
        return imported(name)

    imported, before = importlib.import_module, random.getstate()
    monkeypatch.setattr(importlib, "import_module", drawing)
    assert len(data.from_scikit_learn("digits").data)
    assert random.getstate() == before


def test_mnist_files_become_tensors(folder: Path) -> None:
    images, labels = image_split("mnist_t10k", "meta_train", "train", "cpu")
    order = split_indices(50, "meta_train", "train")
    torch.testing.assert_close(images, torch.from_numpy(IMAGES[order]).reshape(-1, 784).float() / 255)
    assert labels.tolist() == LABELS[order].tolist()


@pytest.mark.parametrize(
    "names", [("imagenet", "meta_train", "train"), ("digits", "train", "train"), ("digits", "meta_test", "test")]
)
def test_unknown_names(names: tuple[str, str, str]) -> None:
    with pytest.raises(UnknownNameError, match="valid: "):
        image_split(*names, "cpu")


@pytest.mark.parametrize("n", range(4))
def test_too_few_images_to_be_split_are_refused(folder: Path, n: int) -> None:
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx(IMAGES[:n]))
    (folder / NAME).write_bytes(packed(idx(LABELS[:n])))
    with pytest.raises(DataError, match=rf"t10k-images-idx3-ubyte: shape \({n}, .*n at least 4"):
        load_mnist("t10k")


def test_a_set_data_folder_is_never_filled_silently(folder: Path) -> None:
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz.*unset L2O_DATA_DIR"):
        load_mnist("train")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (CONTENT[:-9], "end-of-stream"),
        (CONTENT[:20] + bytes([CONTENT[20] ^ 255]) + CONTENT[21:], "cannot be read"),
        (b"<html>not found</html>", "gzip"),
        (packed(b""), "not an IDX file"),
        (packed(b"\x01" + idx(LABELS)[1:]), "two zero bytes"),
        (packed(idx(LABELS, kind=0x0D)), "0x0d, expected 0x08"),
        (packed(idx(LABELS)[:-1]), "do not fit"),
        (packed(idx(LABELS) + b"\0"), "do not fit"),
        (packed(b"\0\0\x08\x03\0\0"), "do not fit"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / NAME
    path.write_bytes(content)
    with pytest.raises(DataError, match=text) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "array", "text"),
    [
        ("t10k-images-idx3-ubyte", np.zeros((50, 28, 27)), "expected .n, 28, 28"),
        (NAME.removesuffix(".gz"), np.zeros(49), "one label for each of 50"),
        (NAME.removesuffix(".gz"), np.full(50, 10), "label 10"),
    ],
)
def test_files_that_are_not_mnist(folder: Path, name: str, array: np.ndarray, text: str) -> None:
    (folder / f"{name}.gz").unlink(missing_ok=True)
    (folder / name).write_bytes(idx(array))
    with pytest.raises(DataError, match=text):
        load_mnist("t10k")


@pytest.fixture
def mirror(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A server of good and bad copies, in folders named after what they are, with an empty cache to download to."""
    monkeypatch.delenv("L2O_DATA_DIR", raising=False)
    monkeypatch.setitem(mnist.SHA256, NAME, hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(mnist, "MAX_BYTES", len(CONTENT) + 100)
    server.pages[f"/good/{NAME}"] = Page(CONTENT)
    server.pages[f"/altered/{NAME}"] = Page(CONTENT[:-1] + b"x")
    server.pages[f"/truncated/{NAME}"] = Page(CONTENT, breaks_at=len(CONTENT) - 5)
    server.pages[f"/oversized/{NAME}"] = Page(CONTENT + bytes(1000))
    return server


@pytest.mark.parametrize("first", ["good", "altered", "truncated", "oversized", "missing"])
def test_the_next_mirror_serves_where_one_fails(mirror: Server, monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    monkeypatch.setattr(mnist, "MIRRORS", (f"{mirror.url}/{first}/", f"{mirror.url}/good/"))
    path = find(NAME)
    assert path == cache_folder() / "data" / "mnist" / NAME
    assert path.read_bytes() == CONTENT
    assert read_idx(path).tolist() == LABELS.tolist()
    monkeypatch.setattr(mnist, "MIRRORS", ())
    assert find(NAME) == path  # from the cache


@pytest.mark.parametrize(
    ("bad", "text"),
    [("altered", "expected"), ("truncated", "broke off"), ("oversized", "longer than"), ("missing", "404")],
)
def test_a_failed_download_is_no_file_and_says_what_to_do(
    mirror: Server, monkeypatch: pytest.MonkeyPatch, bad: str, text: str
) -> None:
    monkeypatch.setattr(mnist, "MIRRORS", (f"{mirror.url}/{bad}/",))
    with pytest.raises(DataError, match=f"{bad}.*{text}[^$]*set L2O_DATA_DIR"):
        find(NAME)
    left = [path.name for path in cache_folder().rglob("*") if path.is_file()]
    assert all(name.endswith(".part") for name in left)
    assert len(left) == (bad == "truncated")  # to go on from there


def test_a_damaged_file_in_the_cache_is_downloaded_again(mirror: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mnist, "MIRRORS", (f"{mirror.url}/good/",))
    find(NAME).write_bytes(CONTENT[:-1])
    assert find(NAME).read_bytes() == CONTENT


def test_an_unreachable_mirror_is_a_data_error(mirror: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mnist, "MIRRORS", ("http://127.0.0.1:1/",))
    with pytest.raises(DataError, match="set L2O_DATA_DIR"):
        find(NAME)
