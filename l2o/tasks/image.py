"""Image classification by small multi-layer perceptrons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor

from l2o.checks import check_int
from l2o.tasks.image_task import ImageClassifier
from l2o.tasks.layers import ACTIVATIONS, CRITERIA, check_network, init_linear, init_norm, linear, mean_loss, norm
from l2o.types import Batch, Buffers, ConfigurationError, Params, TaskData


@dataclass(frozen=True)
class ImageMLP(ImageClassifier):
    """A perceptron with ``depth`` hidden layers of ``width`` units.

    activation, norm: keys of ``ACTIVATIONS`` and ``NORMS``; each hidden layer is linear, norm, activation.
    Images, criterion and what is sampled for each lane: see `ImageClassifier` and `ImageTask`.

    Parameters: ``{layer}.weight [lanes, out, in]`` and ``{layer}.bias [lanes, out]``, layers counted from 0, with a
    norm also ``{layer}.gain`` and ``{layer}.offset [lanes, out]``; initially as `init_linear` and `init_norm` have it.
    Batches: ``x [lanes, batch, pixels]`` and int64 ``y [lanes, batch]``.
    Raises `UnknownNameError` for an unknown name, `ConfigurationError` for a number out of its range.
    """

    width: int = 32
    depth: int = 1
    activation: str = "relu"
    norm: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_network(self.activation, self.norm)
        check_int("width", self.width)
        check_int("depth", self.depth, 0)
        check_batch_norm(self.norm, self)

    def parameters(self, generator: torch.Generator, lanes: int) -> Params:
        sizes = [self.side**2, *[self.width] * self.depth, self.classes]
        params: Params = {}
        for layer, (fan_in, fan_out) in enumerate(pairwise(sizes)):
            params |= init_linear(f"{layer}", generator, lanes, fan_out, fan_in)
            if layer < self.depth:
                params |= init_norm(self.norm, f"{layer}", lanes, fan_out, generator.device)
        return params

    def loss(self, params: Params, buffers: Buffers, data: TaskData, batch: Batch) -> tuple[Tensor, Buffers]:
        activation, share = ACTIVATIONS[self.activation], batch.get("share")
        # Images are float32; parameters of another dtype (float64 in gradient checks) decide the arithmetic.
        x = batch["x"].to(params["0.weight"].dtype)
        for layer in range(self.depth):
            x = activation(norm(self.norm, params, f"{layer}", linear(params, f"{layer}", x), share))
        logits = linear(params, f"{self.depth}", x)
        return mean_loss(CRITERIA[self.criterion], logits, batch["y"], share), buffers


def check_batch_norm(norm: str, family: ImageClassifier) -> None:
    """Raises `ConfigurationError` where batch normalisation would see batches of a single image."""
    least = family.effective_batch[0] if family.effective_batch else family.batch_size
    if norm == "batch" and least < 2:
        raise ConfigurationError(f"norm='batch' with batches of {least} image: expected at least 2; or norm='layer'")


def image_mlps(
    widths: Sequence[int] = (32,),
    depths: Sequence[int] = (1,),
    activations: Sequence[str] = ("relu",),
    norms: Sequence[str] = ("none",),
    criteria: Sequence[str] = ("cross_entropy",),
    **settings: Any,
) -> dict[str, ImageMLP]:
    """Return an `ImageMLP` for every combination, named by what tells it apart, such as
    ``mlp_32x1_relu_none_cross_entropy``.

    settings: of all of them.
    """
    return {
        f"mlp_{width}x{depth}_{activation}_{norm}_{criterion}": ImageMLP(
            width=width, depth=depth, activation=activation, norm=norm, criterion=criterion, **settings
        )
        for width, depth, activation, norm, criterion in product(widths, depths, activations, norms, criteria)
    }
