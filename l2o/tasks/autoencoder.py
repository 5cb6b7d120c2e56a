"""Autoencoders of images."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from l2o.checks import check_each, check_int, lookup
from l2o.tasks.image_task import ImageTask
from l2o.tasks.layers import ACTIVATIONS, RECONSTRUCTION, check_network, init_linear, linear, mean_loss
from l2o.types import Batch, Buffers, Params, Split, TaskData


@dataclass(frozen=True)
class ImageAutoencoder(ImageTask):
    """A perceptron that reproduces its input through a code of few numbers (Hinton and Salakhutdinov 2006).

    hidden: widths of the layers between image and code; from the code to the image they come in reverse.
    code: width of the code, which is linear.     activation: of the hidden layers, a key of ``ACTIVATIONS``.
    criterion: ``bernoulli``, the cross-entropy of each pixel as a probability; or ``mse``; both are means over pixels.
    Images and what is sampled for each lane: see `ImageTask`.

    Parameters: ``{layer}.weight [lanes, out, in]`` and ``{layer}.bias [lanes, out]``, layers counted from 0.
    Raises `UnknownNameError` for an unknown name, `ConfigurationError` for a number out of its range.
    """

    hidden: tuple[int, ...] = (32,)
    code: int = 8
    activation: str = "relu"
    criterion: str = "bernoulli"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_each("hidden", self.hidden, check_int)
        check_int("code", self.code)
        check_network(self.activation)
        lookup("criterion", self.criterion, RECONSTRUCTION)

    def parameters(self, generator: torch.Generator, lanes: int) -> Params:
        pixels = self.side**2
        params: Params = {}
        for layer, (fan_in, fan_out) in enumerate(
            pairwise([pixels, *self.hidden, self.code, *self.hidden[::-1], pixels])
        ):
            params |= init_linear(f"{layer}", generator, lanes, fan_out, fan_in)
        return params

    def batch(self, data: TaskData, split: Split, generator: torch.Generator) -> Batch:
        index, share = self.draw(data, split, generator)
        return {"x": self.images(split, generator.device)[0][index]} | share

    def loss(self, params: Params, buffers: Buffers, data: TaskData, batch: Batch) -> tuple[Tensor, Buffers]:
        activation, half = ACTIVATIONS[self.activation], len(self.hidden)
        target = batch["x"].to(params["0.weight"].dtype)
        x = target
        for layer in range(2 * half + 1):
            x = linear(params, f"{layer}", x)
            x = x if layer == half else activation(x)
        output = linear(params, f"{2 * half + 1}", x)
        return mean_loss(RECONSTRUCTION[self.criterion], output, target, batch.get("share")), buffers
