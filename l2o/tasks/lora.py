"""Low-rank adapters of a frozen network (Hu et al. 2021, LoRA, arXiv 2106.09685)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from l2o.checks import check_int, lookup
from l2o.random import integers, normal, uniform
from l2o.tasks.image_task import ImageClassifier, pooled_split
from l2o.tasks.layers import ACTIVATIONS, CRITERIA, check_network, linear, mean_loss
from l2o.types import Batch, Buffers, Params, Split, TaskData

SHIFTS = {"labels": "labels under a random permutation", "images": "images moved by up to a quarter of their side"}
"""What sets a lane's task apart from the one that the frozen network was fitted to."""

_BASE_SEED = 0x10A
_RIDGE = 1.0
"""What is added to the covariance of the features, in units of their mean variance: of 0.01, 0.1, 0.3, 1 and 3 the one
with the lowest validation loss on digits of the ``meta_train`` half (0.35); less makes the network overconfident."""


@dataclass(frozen=True)
class ImageLoRA(ImageClassifier):
    """Adaptation of a network that classifies images to a shifted task, by adapters of low rank in every layer.

    The frozen network is a perceptron with random hidden layers and an output layer in closed form, fitted once a
    process to the training images of its half: all lanes have the same one. Each lane has a shift of its own.

    width, depth: of the frozen hidden layers.     activation: a key of ``ACTIVATIONS``.
    rank: of the adapters; a layer computes ``W x + c + b (a x)``, the paper's α equal to the rank.
    shift: a key of ``SHIFTS``, in both splits. Images move in a circle: what leaves on one side returns on the other.
    Images, criterion and what is sampled for each lane: see `ImageClassifier` and `ImageTask`.

    Data: ``order [lanes, classes or pixels]``, the permutation. Parameters: ``{layer}.a [lanes, rank, in]``, initially
    uniform within ±1/√in, and ``{layer}.b [lanes, out, rank]``, initially 0: the first loss is that of the frozen
    network. Buffers, which stay as they are: its ``{layer}.weight`` and ``{layer}.bias``.
    Raises `UnknownNameError` for an unknown name, `ConfigurationError` for a number out of its range.
    """

    width: int = 64
    depth: int = 1
    activation: str = "relu"
    rank: int = 4
    shift: str = "labels"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_network(self.activation)
        check_int("width", self.width)
        check_int("depth", self.depth)
        check_int("rank", self.rank)
        lookup("shift", self.shift, SHIFTS)

    def sample(self, generator: torch.Generator, lanes: int) -> TaskData:
        data = super().sample(generator, lanes)
        if self.shift == "labels":
            return data | {"order": uniform(generator, lanes, self.classes).argsort(1)}
        reach = self.side // 4
        down, right = integers(generator, 2 * reach + 1, lanes, 2).sub(reach).T.unsqueeze(-1)
        line = torch.arange(self.side, device=generator.device)
        row, column = (line - down) % self.side, (line - right) % self.side
        return data | {"order": (row.unsqueeze(2) * self.side + column.unsqueeze(1)).flatten(1)}

    def parameters(self, generator: torch.Generator, lanes: int) -> Params:
        params = {}
        for layer, (fan_in, fan_out) in enumerate(pairwise(self._sizes())):
            bound = fan_in**-0.5
            params[f"{layer}.a"] = uniform(generator, lanes, self.rank, fan_in, low=-bound, high=bound)
            params[f"{layer}.b"] = torch.zeros(lanes, fan_out, self.rank, dtype=torch.float32, device=generator.device)
        return params

    def init(self, data: TaskData, generator: torch.Generator) -> tuple[Params, Buffers]:
        params, _ = super().init(data, generator)
        base = _fitted(self.dataset, self.half, self.pool, self.activation, tuple(self._sizes()))
        lanes = len(data["lane"])
        return params, {k: t.to(generator.device).expand(lanes, *t.shape) for k, t in base.items()}

    def batch(self, data: TaskData, split: Split, generator: torch.Generator) -> Batch:
        batch = super().batch(data, split, generator)
        if self.shift == "labels":
            return batch | {"y": data["order"].gather(1, batch["y"])}
        return batch | {"x": batch["x"].gather(2, data["order"].unsqueeze(1).expand_as(batch["x"]))}

    def loss(self, params: Params, buffers: Buffers, data: TaskData, batch: Batch) -> tuple[Tensor, Buffers]:
        dtype = params["0.a"].dtype
        frozen = {name: t.to(dtype) for name, t in buffers.items()}
        x = batch["x"].to(dtype)
        for layer in range(self.depth + 1):
            x = ACTIVATIONS[self.activation](x) if layer else x
            x = linear(frozen, f"{layer}", x) + x @ params[f"{layer}.a"].T @ params[f"{layer}.b"].T
        return mean_loss(CRITERIA[self.criterion], x, batch["y"], batch.get("share")), buffers

    def _sizes(self) -> list[int]:
        return [self.side**2, *[self.width] * self.depth, self.classes]


@dataclass(frozen=True)
class ImageFineTune(ImageLoRA):
    """The same adaptation by all of the network's own parameters, which the frozen ones are the start of.

    Parameters: ``{layer}.weight [lanes, out, in]`` and ``{layer}.bias [lanes, out]``; no adapters, so that ``rank``
    says nothing, and no buffers. Everything else as in `ImageLoRA`.
    """

    def parameters(self, generator: torch.Generator, lanes: int) -> Params:
        base = _fitted(self.dataset, self.half, self.pool, self.activation, tuple(self._sizes()))
        return {k: t.to(generator.device).expand(lanes, *t.shape).clone() for k, t in base.items()}

    def init(self, data: TaskData, generator: torch.Generator) -> tuple[Params, Buffers]:
        return ImageClassifier.init(self, data, generator)

    def loss(self, params: Params, buffers: Buffers, data: TaskData, batch: Batch) -> tuple[Tensor, Buffers]:
        x = batch["x"].to(params["0.weight"].dtype)
        for layer in range(self.depth + 1):
            x = linear(params, f"{layer}", ACTIVATIONS[self.activation](x) if layer else x)
        return mean_loss(CRITERIA[self.criterion], x, batch["y"], batch.get("share")), buffers


@cache
def _fitted(dataset: str, half: str, pool: int, activation: str, sizes: tuple[int, ...]) -> Params:
    """The frozen network, ``{layer}.weight [out, in]`` and ``{layer}.bias [out]``, float32 on the CPU."""
    images, labels = pooled_split(dataset, half, "train", torch.device("cpu"), pool)
    generator = torch.Generator().manual_seed(_BASE_SEED)
    params: Params = {}
    x = images.double()
    for layer, (fan_in, fan_out) in enumerate(pairwise(sizes[:-1])):
        # Variances are kept through layers of ReLU (He et al. 2015, arXiv 1502.01852, section 2.2).
        params[f"{layer}.weight"] = normal(generator, fan_out, fan_in) * (2.0 / fan_in) ** 0.5
        params[f"{layer}.bias"] = torch.zeros(fan_out, dtype=torch.float32)
        x = ACTIVATIONS[activation](x @ params[f"{layer}.weight"].double().T)
    weight, bias = linear_discriminant(x, labels, sizes[-1])
    last = len(sizes) - 2
    return params | {f"{last}.weight": weight.float(), f"{last}.bias": bias.float()}


def linear_discriminant(x: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return weight ``[classes, features]`` and bias ``[classes]`` of the logits of normal classes that share a
    covariance.

    x: ``[n, features]``.     labels: int64 ``[n]``, every class at least once.
    Source: Hastie, Tibshirani and Friedman 2009, "The elements of statistical learning", sections 4.3 and 4.3.1.
    """
    members = torch.eye(classes, dtype=x.dtype)[labels]
    count = members.sum(0)
    means = members.T @ x / count.unsqueeze(1)
    within = x - means[labels]
    covariance = within.T @ within / len(x)
    variance = covariance.diagonal().mean()
    weight = torch.linalg.solve(covariance + _RIDGE * variance * torch.eye(x.shape[1], dtype=x.dtype), means.T).T
    return weight, (count / len(x)).log() - 0.5 * (weight * means).sum(1)
