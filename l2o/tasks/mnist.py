"""MNIST in its official files (LeCun et al. 1998, http://yann.lecun.com/exdb/mnist): find, download, parse."""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from l2o.disk import cache_folder, user_path
from l2o.download import fetch
from l2o.types import ConfigurationError, DataError, DownloadError

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
SHA256 = {
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
MAX_BYTES = 16 * 2**20
"""The largest file has 9.9 MB."""
LEAST = 4
"""Images, one for each part of the set."""


def load_mnist(part: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return images uint8 ``[n, 784]`` and labels uint8 ``[n]`` of ``part``, ``train`` or ``t10k``; raises
    `DataError`."""
    images_path = find(f"{part}-images-idx3-ubyte.gz")
    labels_path = find(f"{part}-labels-idx1-ubyte.gz")
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.shape[1:] != (28, 28) or len(images) < LEAST:
        raise DataError(f"{images_path}: shape {images.shape}, expected [n, 28, 28], n at least {LEAST}")
    if labels.shape != images.shape[:1]:
        raise DataError(f"{labels_path}: shape {labels.shape}, expected one label for each of {len(images)} images")
    if labels.max(initial=0) > 9:
        raise DataError(f"{labels_path}: label {labels.max()}, expected 0 to 9")
    return images.reshape(len(images), -1), labels


def find(name: str) -> Path:
    """Return where the file ``name`` (``….gz``) lies: in ``$L2O_DATA_DIR/mnist``, or else in the cache, after a
    download."""
    root = os.environ.get("L2O_DATA_DIR")
    if root:
        return _find_in(user_path(root) / "mnist", name)
    try:
        path = cache_folder() / "data" / "mnist" / name
        return fetch([mirror + name for mirror in MIRRORS], path, SHA256[name], MAX_BYTES)
    except (ConfigurationError, DownloadError) as error:
        raise DataError(f"{error}\nOffline, set L2O_DATA_DIR to a folder that has mnist/{name}") from error


def _find_in(folder: Path, name: str) -> Path:
    """A set L2O_DATA_DIR is never filled by a download: whoever sets it says which data are meant."""
    for path in (folder / name, folder / name.removesuffix(".gz")):
        if path.exists():
            return path
    raise DataError(
        f"{folder / name}: no such file, nor without .gz; put it there, or unset L2O_DATA_DIR to download it"
    )


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Return the array of an IDX file of bytes, gzipped where it is named ``.gz``: uint8, of the shape in its header.

    Header: two zero bytes, the type (8: unsigned byte), the number of axes, each axis as a big-endian uint32.
    Raises `DataError` for a damaged file, another type, or a length that does not fit the header.
    """
    content = _read(path)
    if len(content) < 4 or content[:2] != b"\0\0":
        raise DataError(f"{path}: not an IDX file, starts with {content[:4]!r}, expected two zero bytes")
    if content[2] != 8:
        raise DataError(f"{path}: IDX type {content[2]:#04x}, expected 0x08 (unsigned bytes)")
    axes, start = content[3], 4 + 4 * content[3]
    shape = struct.unpack(f">{axes}I", content[4:start]) if len(content) >= start else ()
    if len(content) != start + math.prod(shape):
        raise DataError(f"{path}: {len(content)} bytes do not fit its IDX header ({axes} axes, shape {shape})")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); put a good copy there, or delete it") from error
