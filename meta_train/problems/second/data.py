"""More of the data that scikit-image carries: pictures by name, textures, faces."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from meta_train.problems.data import single

TEXTURES = ("brick", "grass", "gravel", "coins", "page", "moon", "text", "camera")


@cache
def coloured(name: str, side: int) -> Tensor:
    """Return a picture in colour, float32 ``[side, side, 3]`` in [0, 1]."""
    from skimage import data, transform

    return single(transform.resize(getattr(data, name)(), (side, side), anti_aliasing=True))


@cache
def grey(name: str, side: int) -> Tensor:
    """Return a grey picture, float32 ``[side, side]`` in [0, 1]."""
    from skimage import data, transform

    return single(transform.resize(getattr(data, name)(), (side, side), anti_aliasing=True))


@cache
def faces() -> tuple[Tensor, Tensor]:
    """Return a hundred faces and a hundred other cuttings, float32 ``[200, 1, 25, 25]`` in [0, 1], and which are
    faces, int64 ``[200]``."""
    from skimage import data

    return single(data.lfw_subset())[:, None], (torch.arange(200) < 100).long()
