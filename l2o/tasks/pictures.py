"""Pictures as tensors, the ones that scikit-image carries in its package."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from l2o.checks import lookup
from l2o.tasks.data import HALVES, SPLITS, split_indices
from l2o.types import DataError

SIDE = 128
"""Pixels along each side of a picture."""

PICTURES = {
    "meta_train": ("astronaut", "brick", "camera", "coffee", "coins", "hubble_deep_field"),
    "meta_test": ("chelsea", "grass", "gravel", "immunohistochemistry", "moon", "rocket"),
}
"""By their names in ``skimage.data``; those that it would download are not used."""


@cache
def pictures(half: str, device: torch.device) -> Tensor:
    """Return the pictures of one half, float32 ``[pictures, SIDE, SIDE, 3]`` in [0, 1]; not to be written to.

    Each is the square in the middle, averaged over areas; grey ones have three equal channels. Loaded once a process
    and device. Raises `UnknownNameError` for an unknown half, `DataError` where scikit-image is missing or damaged.
    """
    return torch.stack([_square(_load(name)) for name in lookup("half", half, PICTURES)]).to(device)


def _load(name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    try:
        from skimage import data
    except ImportError as error:
        raise DataError("the pictures come with scikit-image: pip install 'l2o[train]'") from error
    try:
        picture: np.ndarray[Any, np.dtype[np.uint8]] = getattr(data, name)()
    except (AttributeError, ImportError, OSError) as error:
        raise DataError(f"scikit-image has no picture {name!r} ({error}); install a version that has it") from error
    return picture


def _square(picture: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
    """uint8 ``[height, width]`` or ``[height, width, 3]`` to float32 ``[SIDE, SIDE, 3]``."""
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    middle = torch.from_numpy(np.ascontiguousarray(picture[top : top + side, left : left + side]))
    channels = middle.view(side, side, -1).permute(2, 0, 1).float() / 255
    return F.adaptive_avg_pool2d(channels, SIDE).expand(3, -1, -1).permute(1, 2, 0).contiguous()


def pixel_split(side: int, split: str, device: torch.device | str) -> Tensor:
    """Return which of ``side * side`` pixels, counted row by row, belong to a split: int64 ``[n]``, a random fifth for
    valid.

    Raises `UnknownNameError` for an unknown split.
    """
    lookup("split", split, SPLITS)
    return _pixel_split(side, split, torch.device(device))


@cache
def _pixel_split(side: int, split: str, device: torch.device) -> Tensor:
    # Lanes differ in their pictures, not in which pixels are held out: the like parts of both halves belong together.
    halves = [split_indices(side * side, half, split) for half in HALVES]
    return torch.from_numpy(np.concatenate(halves)).to(device)
