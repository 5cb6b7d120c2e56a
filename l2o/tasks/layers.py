"""What the networks of the task families are made of: initialisations of all lanes, and pure functions of one lane."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from l2o.checks import lookup
from l2o.random import uniform
from l2o.types import Params

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "silu": F.silu,
    "elu": F.elu,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
}
NORMS = {
    "none": "",
    "layer": "each example over its features",
    "group": "each example over groups of its features",
    "batch": "each feature over the batch",
}
"""What is brought to mean 0 and variance 1."""

_GROUPS = 4
"""Of features; as many as their number allows."""
_NORM_EPS = 1e-5
"""As in `torch.nn.BatchNorm1d` and `torch.nn.LayerNorm`."""


def init_linear(name: str, generator: torch.Generator, lanes: int, *shape: int) -> Params:
    """Return ``{name}.weight [lanes, *shape]`` and ``{name}.bias [lanes, out]``, float32, uniform within ±1/√fan_in.

    shape: ``out, in`` and the axes of a kernel, if there is one.     So does `torch.nn.Linear` by default.
    """
    bound = math.prod(shape[1:]) ** -0.5
    return {
        f"{name}.weight": uniform(generator, lanes, *shape, low=-bound, high=bound),
        f"{name}.bias": uniform(generator, lanes, shape[0], low=-bound, high=bound),
    }


def linear(params: Params, name: str, x: Tensor) -> Tensor:
    """Map ``x [..., in]`` to ``[..., out]`` by the weight and bias of that name."""
    return F.linear(x, params[f"{name}.weight"], params[f"{name}.bias"])


def init_norm(kind: str, name: str, lanes: int, features: int, device: torch.device) -> Params:
    """Return ``{name}.gain`` of ones and ``{name}.offset`` of zeros, ``[lanes, features]``; nothing for the kind
    ``none``."""
    if kind == "none":
        return {}
    return {
        f"{name}.gain": torch.ones(lanes, features, dtype=torch.float32, device=device),
        f"{name}.offset": torch.zeros(lanes, features, dtype=torch.float32, device=device),
    }


def norm(kind: str, params: Params, name: str, x: Tensor, share: Tensor | None = None) -> Tensor:
    """Normalise, by layer, group or batch, ``x [batch, features, ...]``; further axes are positions of the features.

    kind: a key of ``NORMS``.     share: ``[batch]``, each example's part in the statistics, adding up to 1.

    Layer normalisation (Ba et al. 2016, arXiv 1607.06450) takes positions and features together, group normalisation
    (Wu and He 2018, arXiv 1803.08494) those of each group. Batch normalisation
    (Ioffe and Szegedy 2015, arXiv 1502.03167) takes the statistics of the batch at hand, in validation too: there are
    no running averages, so the loss is a function of the parameters and the batch alone.
    """
    if kind == "none":
        return x
    centred = x - _mean(kind, x, share)
    scaled = centred * (_mean(kind, centred.square(), share) + _NORM_EPS).rsqrt()
    along = (-1, *[1] * (x.ndim - 2))
    return scaled * params[f"{name}.gain"].view(along) + params[f"{name}.offset"].view(along)


def _mean(kind: str, x: Tensor, share: Tensor | None) -> Tensor:
    if kind == "layer":
        return x.mean(tuple(range(1, x.ndim)), keepdim=True)
    if kind == "group":
        groups = x.unflatten(1, (math.gcd(x.shape[1], _GROUPS), -1))
        return groups.mean(tuple(range(2, groups.ndim)), keepdim=True).expand_as(groups).reshape(x.shape)
    if share is None:
        return x.mean((0, *range(2, x.ndim)), keepdim=True)
    examples = x.flatten(2).mean(2) if x.ndim > 2 else x
    return (share.to(x.dtype) @ examples).view(1, -1, *[1] * (x.ndim - 2))


def _one_hot_mse(output: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    classes = torch.arange(output.shape[-1], device=labels.device)
    return F.mse_loss(output, (labels.unsqueeze(-1) == classes).to(output.dtype), reduction=reduction)


def _error(output: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    wrong = (output.argmax(-1) != labels).to(output.dtype)
    return wrong if reduction == "none" else wrong.mean()


CRITERIA: dict[str, Callable[..., Tensor]] = {"cross_entropy": F.cross_entropy, "mse": _one_hot_mse, "error": _error}
"""Losses of a classifier, ``(output [batch, classes], labels [batch], reduction) -> loss``; error, the share of labels
that are wrong, is for measuring only: it has no derivative."""
RECONSTRUCTION: dict[str, Callable[..., Tensor]] = {
    "bernoulli": F.binary_cross_entropy_with_logits,
    "mse": F.mse_loss,
}
"""Losses of a reconstruction, ``(output, target, reduction) -> loss``; of logits and targets in [0, 1]: bernoulli."""


def mean_loss(criterion: Callable[..., Tensor], output: Tensor, target: Tensor, share: Tensor | None) -> Tensor:
    """Return the loss (0-d) of ``output`` and ``target``, both ``[batch, ...]``, averaged over examples or, where it is
    given, weighted by ``share [batch]``."""
    if share is None:
        return criterion(output, target)
    each = criterion(output, target, reduction="none")
    return share.to(output.dtype) @ (each.mean(1) if each.ndim > 1 else each)


def check_network(activation: str, norm: str = "none") -> None:
    """Raises `UnknownNameError` for names that are not in ``ACTIVATIONS`` and ``NORMS``."""
    lookup("activation", activation, ACTIVATIONS)
    lookup("norm", norm, NORMS)
