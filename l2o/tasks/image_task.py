"""What families on images share: their batches, and what is sampled for each lane."""

from __future__ import annotations

import abc
import math
from dataclasses import KW_ONLY, dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from l2o.checks import check_int, lookup
from l2o.random import integers, keys, log_uniform, mix, shift, uniform
from l2o.tasks.data import HALVES, IMAGE_SETS, image_split
from l2o.tasks.layers import CRITERIA
from l2o.tasks.ranges import Range, check_log_range, check_range, check_whole_range, log_whole
from l2o.types import Batch, Buffers, ConfigurationError, Params, Split, TaskData, TaskFamily

_BITS = 24
"""Of a hash, for the chance that a label is replaced and for what replaces it."""


@dataclass(frozen=True)
class ImageTask(TaskFamily):
    """Images of one part of a set; what a network makes of them is the subclass's.

    dataset, half: the images, see `l2o.tasks.data.image_split`.
    batch_size: images a batch, drawn with replacement.
    pool: side of the squares of pixels that are averaged into one; it divides the side of the images.

    A range ``[lowest, highest]`` samples a setting for each lane; with None, nothing is drawn and nothing costs.
    effective_batch: how many images of a training batch count, log-uniform, at most ``batch_size``; the rest of the
        batch has no part in the loss, nor in the statistics of batch normalisation.
    subset: how many training images, log-uniform, the lane has to learn from: its own, or all where there are fewer.
    init_scale: factor of all initial parameters but gains and offsets of normalisations, log-uniform.

    Batches: ``x [lanes, batch, pixels]`` in [0, 1] and, with ``effective_batch``, ``share [lanes, batch]``: 1 over
    the effective batch size, or 0. Validation batches are full ones of the whole ``valid`` split.
    Raises `UnknownNameError` for an unknown name, `ConfigurationError` for a number out of its range.
    """

    dataset: str = "digits"
    half: str = "meta_train"
    _: KW_ONLY
    batch_size: int = 128
    pool: int = 1
    effective_batch: Range = None
    subset: Range = None
    init_scale: Range = None

    keyed = True

    def __post_init__(self) -> None:
        lookup("dataset", self.dataset, IMAGE_SETS)
        lookup("half", self.half, HALVES)
        check_int("batch_size", self.batch_size)
        full = _side(self.dataset)
        if full % check_int("pool", self.pool):
            raise ConfigurationError(f"pool={self.pool}: expected a divisor of {full}, the side of {self.dataset}")
        check_whole_range("effective_batch", self.effective_batch, most=self.batch_size)
        check_whole_range("subset", self.subset)
        check_log_range("init_scale", self.init_scale)

    @property
    def side(self) -> int:
        """Pixels along one side of an image, after pooling."""
        return _side(self.dataset) // self.pool

    @property
    def classes(self) -> int:
        """How many labels there are."""
        return IMAGE_SETS[self.dataset].classes

    @abc.abstractmethod
    def parameters(self, generator: torch.Generator, lanes: int) -> Params:
        """Return initial parameters ``[lanes, ...]``, float32, at scale 1."""

    def sample(self, generator: torch.Generator, lanes: int) -> TaskData:
        data = {"lane": torch.arange(lanes, device=generator.device)}
        if self.effective_batch:
            data["effective_batch"] = log_whole(generator, lanes, *self.effective_batch)
        if self.subset:
            data |= self._draw_subset(generator, lanes, *self.subset)
        if self.init_scale:
            low, high = self.init_scale
            data["init_scale"] = log_uniform(generator, lanes, low=low, high=high)
        return data

    def init(self, data: TaskData, generator: torch.Generator) -> tuple[Params, Buffers]:
        params = self.parameters(generator, len(data["lane"]))
        if "init_scale" in data:
            params = {k: p if _of_norm(k) else p * _along(data["init_scale"], p) for k, p in params.items()}
        return params, {}

    def images(self, split: Split, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return all images of a split, float32 ``[n, pixels]``, and their labels, int64 ``[n]``."""
        return pooled_split(self.dataset, self.half, split, torch.device(device), self.pool)

    def draw(self, data: TaskData, split: Split, generator: torch.Generator) -> tuple[Tensor, Batch]:
        """Draw which images make up the next batch, int64 ``[lanes, batch]``, and ``share``, where it is sampled."""
        lanes, n = len(data["lane"]), len(self.images(split, generator.device)[0])
        if split == "valid":
            return integers(generator, n, lanes, self.batch_size), {}
        share = {}
        if "effective_batch" in data:
            size = data["effective_batch"].unsqueeze(1)
            share = {"share": (torch.arange(self.batch_size, device=size.device) < size) / size}
        if "subset" not in data:
            return integers(generator, n, lanes, self.batch_size), share
        member = integers(generator, data["subset"], lanes, self.batch_size)
        return (data["first"].unsqueeze(1) + data["stride"].unsqueeze(1) * member) % n, share

    def _draw_subset(self, generator: torch.Generator, lanes: int, low: float, high: float) -> TaskData:
        """The images ``first + stride * k`` for k under ``subset``; they lie in a random order that all lanes share."""
        n = len(self.images("train", generator.device)[0])
        strides = _coprimes(n, generator.device)
        return {
            "subset": log_whole(generator, lanes, low, high).clamp(max=n),
            "first": integers(generator, n, lanes),
            "stride": strides[integers(generator, len(strides), lanes)],
        }


@dataclass(frozen=True)
class ImageClassifier(ImageTask):
    """Classification of images.

    criterion: a key of ``CRITERIA``: cross-entropy, or the mean squared distance to the label as a one-hot vector.
    label_noise: range of the fraction of training labels, uniform, that are replaced by random ones, for good: each
        image keeps its label in a lane. Validation labels are the true ones.
    input_scale: range of a factor of the images, in both splits, log-uniform.
    Everything else as in `ImageTask`. Batches have int64 ``y [lanes, batch]``, too.
    """

    _: KW_ONLY
    criterion: str = "cross_entropy"
    label_noise: Range = None
    input_scale: Range = None

    def __post_init__(self) -> None:
        super().__post_init__()
        lookup("criterion", self.criterion, CRITERIA)
        check_range("label_noise", self.label_noise, most=1.0)
        check_log_range("input_scale", self.input_scale)

    def sample(self, generator: torch.Generator, lanes: int) -> TaskData:
        data = super().sample(generator, lanes)
        if self.label_noise:
            low, high = self.label_noise
            data["label_noise"] = uniform(generator, lanes, low=low, high=high)
            data["label_key"] = keys(generator, lanes)
        if self.input_scale:
            low, high = self.input_scale
            data["input_scale"] = log_uniform(generator, lanes, low=low, high=high)
        return data

    def batch(self, data: TaskData, split: Split, generator: torch.Generator) -> Batch:
        images, labels = self.images(split, generator.device)
        index, share = self.draw(data, split, generator)
        x, y = images[index], labels[index]
        if "input_scale" in data:
            x = x * _along(data["input_scale"], x)
        if "label_noise" in data and split == "train":
            y = _replace(y, index, data["label_key"], data["label_noise"], self.classes)
        return {"x": x, "y": y} | share


def _replace(labels: Tensor, index: Tensor, key: Tensor, fraction: Tensor, classes: int) -> Tensor:
    """``labels [lanes, batch]``, a ``fraction [lanes]`` of them random: hashed from the lane's key and the image."""
    bits = mix(key.unsqueeze(1) + mix(index + 1))
    chance, other = shift(bits, 64 - _BITS), shift((bits & (2**_BITS - 1)) * classes, _BITS)
    return torch.where(chance.float() * 2.0**-_BITS < fraction.unsqueeze(1), other, labels)


def _side(dataset: str) -> int:
    return math.isqrt(IMAGE_SETS[dataset].pixels)


def _along(factor: Tensor, like: Tensor) -> Tensor:
    """``factor [lanes]`` with as many axes as ``like``."""
    return factor.view(-1, *[1] * (like.ndim - 1))


def _of_norm(name: str) -> bool:
    return name.endswith((".gain", ".offset"))


@cache
def pooled_split(dataset: str, half: str, split: str, device: torch.device, pool: int) -> tuple[Tensor, Tensor]:
    """Return what `image_split` does, the images' squares of ``pool`` × ``pool`` pixels averaged: ``[n, pixels /
    pool²]``."""
    images, labels = image_split(dataset, half, split, device)
    if pool == 1:
        return images, labels
    side = _side(dataset)
    return F.avg_pool2d(images.view(-1, 1, side, side), pool).flatten(1), labels


@cache
def _coprimes(n: int, device: torch.device) -> Tensor:
    """int64: the strides that reach each of ``n`` numbers before one comes again."""
    return torch.tensor([k for k in range(1, n + 1) if math.gcd(k, n) == 1], device=device)
