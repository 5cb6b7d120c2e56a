"""Image classification by small convolutional networks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from l2o.checks import check_each, check_int
from l2o.tasks.image import check_batch_norm
from l2o.tasks.image_task import ImageClassifier
from l2o.tasks.layers import ACTIVATIONS, CRITERIA, check_network, init_linear, init_norm, linear, mean_loss, norm
from l2o.types import Batch, Buffers, Params, TaskData

KERNEL = 3
"""Side of the kernels."""


@dataclass(frozen=True)
class ImageConv(ImageClassifier):
    """Convolutions of 3×3 and stride 2, zero-padded, then the mean over the positions and a linear layer.

    channels: of each convolution, which is followed by norm and activation, see `ImageMLP`.
    Images, criterion and what is sampled for each lane: see `ImageClassifier` and `ImageTask`. The work grows with the
    square of the number of pixels (see `conv`): ``dataset=mnist`` wants ``pool=2`` or 4.

    Parameters: ``{layer}.weight [lanes, out, in, 3, 3]`` (the last layer ``[lanes, out, in]``), ``{layer}.bias``, and
    with a norm ``{layer}.gain`` and ``{layer}.offset``, all ``[lanes, out]``.
    Raises `UnknownNameError` for an unknown name, `ConfigurationError` for a number out of its range.
    """

    channels: tuple[int, ...] = (8, 16)
    activation: str = "relu"
    norm: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_network(self.activation, self.norm)
        check_each("channels", self.channels, check_int)
        check_batch_norm(self.norm, self)

    def parameters(self, generator: torch.Generator, lanes: int) -> Params:
        params: Params = {}
        sizes = [1, *self.channels]
        for layer, (fan_in, fan_out) in enumerate(pairwise(sizes)):
            params |= init_linear(f"{layer}", generator, lanes, fan_out, fan_in, KERNEL, KERNEL)
            params |= init_norm(self.norm, f"{layer}", lanes, fan_out, generator.device)
        return params | init_linear(f"{len(self.channels)}", generator, lanes, self.classes, sizes[-1])

    def loss(self, params: Params, buffers: Buffers, data: TaskData, batch: Batch) -> tuple[Tensor, Buffers]:
        activation, share = ACTIVATIONS[self.activation], batch.get("share")
        x = batch["x"].to(params["0.weight"].dtype).unsqueeze(1)
        for layer in range(len(self.channels)):
            x = conv(x, params[f"{layer}.weight"]) + params[f"{layer}.bias"].unsqueeze(-1)
            x = activation(norm(self.norm, params, f"{layer}", x, share))
        logits = linear(params, f"{len(self.channels)}", x.mean(-1))
        return mean_loss(CRITERIA[self.criterion], logits, batch["y"], share), buffers


def conv(x: Tensor, weight: Tensor, stride: int = 2) -> Tensor:
    """Compute ``F.conv2d(x, weight, stride=stride, padding=1)`` of small square images as one matrix product, without
    bias.

    x: ``[batch, in, positions]``, the positions row by row.     weight: ``[out, in, 3, 3]``.
    Returns ``[batch, out, positions]``, of a side ``stride`` times shorter, rounded up.

    A convolution is linear in its kernel: the kernel times a constant basis is its dense matrix. For 8 and 64 lanes of
    batch 128 on a CPU, images of 8×8 take half to three quarters of the time of a vectorised ``conv2d``, which becomes
    one of many groups, second derivatives included; images of 14×14 the same time, of 28×28 six to eight times as long.
    """
    channels, fan_in = weight.shape[:2]
    basis = _basis(math.isqrt(x.shape[-1]), stride, x)
    after, before = basis.shape[1:]
    dense = (weight.flatten(2) @ basis.flatten(1)).view(channels, fan_in, after, before)
    matrix = dense.transpose(1, 2).reshape(channels * after, fan_in * before)
    return F.linear(x.flatten(1), matrix).view(-1, channels, after)


def _basis(side: int, stride: int, like: Tensor) -> Tensor:
    """``[9, after, before]``: 1 where an entry of the kernel leads from a position before to one after, else 0."""
    entry, after, before = (torch.arange(n, device=like.device) for n in (KERNEL, -(-side // stride), side))
    line = (before == stride * after.view(-1, 1) + entry.view(-1, 1, 1) - 1).to(
        like.dtype
    )  # of rows, and so of columns
    return torch.einsum("iar,jbc->ijabrc", line, line).reshape(KERNEL**2, -1, side**2)
