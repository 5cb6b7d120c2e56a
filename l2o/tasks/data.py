"""Image sets as tensors, each split once and for all into meta-training and meta-test images."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from l2o.checks import lookup
from l2o.tasks.mnist import load_mnist
from l2o.types import DataError

_SPLIT_SEED = 0
_TRAIN_PARTS, _PARTS = 4, 5
"""Of each half, four fifths are for training."""


class ImageSet(NamedTuple):
    """An image set.

    load: returns images ``[n, pixels]`` and labels ``[n]``, both uint8.
    white: the pixel value that becomes 1.0.
    """

    load: Callable[[], tuple[NDArray[np.uint8], NDArray[np.uint8]]]
    pixels: int
    white: int
    classes: int


def from_scikit_learn(name: str, **settings: bool) -> Any:
    """Return what ``sklearn.datasets.load_<name>`` returns. Raises `DataError` where scikit-learn is missing.

    Its import draws from Python's generator, which a run takes for draws of its task: the state is put back.
    """
    before = random.getstate()
    try:
        return getattr(importlib.import_module("sklearn.datasets"), f"load_{name}")(**settings)
    except ImportError as error:
        raise DataError(f"{name} comes with scikit-learn: pip install 'l2o[train]'") from error
    finally:
        random.setstate(before)


def _load_digits() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    digits = from_scikit_learn("digits")
    return digits.data.astype(np.uint8), digits.target.astype(np.uint8)


IMAGE_SETS: dict[str, ImageSet] = {
    "digits": ImageSet(_load_digits, pixels=64, white=16, classes=10),
    "mnist": ImageSet(partial(load_mnist, "train"), pixels=784, white=255, classes=10),
    "mnist_t10k": ImageSet(partial(load_mnist, "t10k"), pixels=784, white=255, classes=10),
}
HALVES = {"meta_train": 0, "meta_test": 1}
SPLITS = {"train": 0, "valid": 1}


def image_split(dataset: str, half: str, split: str, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Return one part of an image set: images float32 ``[n, pixels]`` in [0, 1], labels int64 ``[n]``; not to be
    written to.

    dataset: a key of ``IMAGE_SETS``.     half: ``meta_train`` or ``meta_test``.     split: ``train`` or ``valid``.

    The four parts of a set are disjoint and the same in every process. Each is loaded once a process and device.
    Raises `UnknownNameError` for an unknown name, `DataError` where the files are missing or damaged.
    """
    lookup("dataset", dataset, IMAGE_SETS)
    lookup("half", half, HALVES)
    lookup("split", split, SPLITS)
    return _image_split(dataset, half, split, torch.device(device))


@cache
def _image_split(dataset: str, half: str, split: str, device: torch.device) -> tuple[Tensor, Tensor]:
    images, labels = _load(dataset)
    index = split_indices(len(images), half, split)
    pixels = torch.from_numpy(images[index]).to(device, torch.float32) / IMAGE_SETS[dataset].white
    return pixels, torch.from_numpy(labels[index]).to(device, torch.int64)


@cache
def _load(dataset: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    return IMAGE_SETS[dataset].load()


def split_indices(n: int, half: str, split: str) -> NDArray[np.int64]:
    """Return which of ``n`` images, int64, make up one part."""
    order = np.random.default_rng(_SPLIT_SEED).permutation(n)
    part = (order[: n // 2], order[n // 2 :])[HALVES[half]]
    cut = len(part) * _TRAIN_PARTS // _PARTS
    return (part[:cut], part[cut:])[SPLITS[split]]
