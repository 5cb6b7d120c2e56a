"""Image classification by small residual networks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from l2o.checks import check_int
from l2o.tasks.conv import KERNEL, conv
from l2o.tasks.image import check_batch_norm
from l2o.tasks.image_task import ImageClassifier
from l2o.tasks.layers import ACTIVATIONS, CRITERIA, check_network, init_linear, init_norm, linear, mean_loss, norm
from l2o.types import Batch, Buffers, Params, TaskData


@dataclass(frozen=True)
class ImageResNet(ImageClassifier):
    """A convolution of stride 2, residual blocks (He et al. 2016, arXiv 1603.05027), mean over positions, linear layer.

    channels: of all convolutions.     depth: blocks ``x + conv(act(norm(conv(act(norm(x))))))``, stride 1.
    activation, norm: keys of ``ACTIVATIONS`` and ``NORMS``.
    Images, criterion and what is sampled for each lane: see `ImageClassifier` and `ImageTask`; the work: `ImageConv`.

    Parameters: ``{layer}.weight [lanes, out, in, 3, 3]`` and ``{layer}.bias``, layers counted from 0, with a norm and
    but for the first also ``{layer}.gain`` and ``{layer}.offset``, of the layer's inputs, ``[lanes, channels]`` each;
    ``output.weight`` and ``output.bias``.
    Raises `UnknownNameError` for an unknown name, `ConfigurationError` for a number out of its range.
    """

    channels: int = 16
    depth: int = 2
    activation: str = "relu"
    norm: str = "batch"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_network(self.activation, self.norm)
        check_int("channels", self.channels)
        check_int("depth", self.depth, 0)
        check_batch_norm(self.norm, self)

    def parameters(self, generator: torch.Generator, lanes: int) -> Params:
        size = self.channels
        params = init_linear("0", generator, lanes, size, 1, KERNEL, KERNEL)
        for layer in range(1, 2 * self.depth + 1):
            params |= init_linear(f"{layer}", generator, lanes, size, size, KERNEL, KERNEL)
            params |= init_norm(self.norm, f"{layer}", lanes, size, generator.device)
        return params | init_linear("output", generator, lanes, self.classes, size)

    def loss(self, params: Params, buffers: Buffers, data: TaskData, batch: Batch) -> tuple[Tensor, Buffers]:
        activation, share = ACTIVATIONS[self.activation], batch.get("share")
        x = self._conv(params, "0", batch["x"].to(params["0.weight"].dtype).unsqueeze(1), stride=2)
        for block in range(self.depth):
            branch = x
            for layer in (2 * block + 1, 2 * block + 2):
                branch = activation(norm(self.norm, params, f"{layer}", branch, share))
                branch = self._conv(params, f"{layer}", branch, stride=1)
            x = x + branch
        logits = linear(params, "output", activation(x).mean(-1))
        return mean_loss(CRITERIA[self.criterion], logits, batch["y"], share), buffers

    @staticmethod
    def _conv(params: Params, name: str, x: Tensor, stride: int) -> Tensor:
        return conv(x, params[f"{name}.weight"], stride) + params[f"{name}.bias"].unsqueeze(-1)
