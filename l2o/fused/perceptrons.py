"""Perceptrons on images with cross-entropy: gradients in closed form, and batches as rows of a table."""

from __future__ import annotations

import torch
from torch import Tensor

from l2o.kernels import perceptron
from l2o.kernels.unroll import Batches
from l2o.tasks.image import ImageMLP
from l2o.types import Batch, Buffers, Grads, Params, TaskData


def gradient(
    family: ImageMLP, params: Params, buffers: Buffers, data: TaskData, batch: Batch
) -> tuple[Tensor, Buffers, Grads] | None:
    """Return losses ``[lanes]``, buffers, gradients, by the kernel where it fits, else in torch's operations."""
    if family.norm != "none" or family.criterion != "cross_entropy" or "share" in batch:
        return None
    layers = [(params[weight], params[bias]) for weight, bias in _layers(family)]
    problem = family.activation, layers, batch["x"], batch["y"]
    result = perceptron.gradient(*problem) or perceptron.closed_form(*problem)
    if result is None:
        return None
    losses, grads = result
    by_name = {
        name: g for names, pair in zip(_layers(family), grads, strict=True) for name, g in zip(names, pair, strict=True)
    }
    return losses, buffers, {name: by_name[name] for name in params}


def batches(family: ImageMLP, data: TaskData, like: torch.Generator) -> Batches | None:
    """See `l2o.fused.batches`."""
    sampled = data.keys() - {"lane", "init_scale"}  # these act at the start of a run alone
    if family.norm != "none" or family.criterion != "cross_entropy" or sampled or like.device.type != "cpu":
        return None
    images, labels = family.images("train", like.device)
    return Batches(family.activation, _layers(family), images, labels, family.classes, family.batch_size)


def _layers(family: ImageMLP) -> tuple[tuple[str, str], ...]:
    return tuple((f"{i}.weight", f"{i}.bias") for i in range(family.depth + 1))
