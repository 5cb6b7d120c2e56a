"""What small networks see: scalings of gradients and embeddings of time."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from l2o.ops.kinds import size
from l2o.ops.numeric import constant
from l2o.types import Infos, Reduce, Run, Slots, Sum

TIMESCALES = (1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)
"""Steps; Metz et al. 2020 (arXiv 2009.11243, app. A) and google/learned_optimization."""

FRACTIONS = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)
"""Centres of the training-fraction embedding; Metz et al. 2022 (VeLO, arXiv 2211.09760, app. B)."""

EPS = 1e-5
"""Of `second_moment_scale`, inside the root: a channel of zeros stays zero."""
_BLOCK = 1 << 14
"""Entries of a tensor whose distances from a mean are in the cache at once."""


def step_embedding(run: Run, like: Tensor) -> Tensor:
    """Return ``tanh(t / tau - 1)`` over `TIMESCALES`, ``[11]``: the age of the run in steps, whatever its length."""
    return torch.tanh(run.step.to(like.dtype) / constant(TIMESCALES, like) - 1.0)


def fraction_embedding(run: Run, like: Tensor) -> Tensor:
    """Return ``tanh(10 (t / total - c))`` over `FRACTIONS`, ``[9]``: how far the run is, so that a schedule can be
    learned."""
    fraction = run.step.to(like.dtype) / run.total_steps.to(like.dtype)
    return torch.tanh((fraction - constant(FRACTIONS, like)) * 10.0)


def sine_embedding(run: Run, like: Tensor) -> Tensor:
    """Return ``sin(t / (pi tau))`` over `TIMESCALES`, ``[11]`` (RNNMLPLOpt of google/learned_optimization)."""
    return torch.sin(run.step.to(like.dtype) / (constant(TIMESCALES, like) * math.pi))


def clip_log(x: Tensor) -> Tensor:
    """Return ``clip(log(1e-8 + |x|), -5, 5)``, of any shape: a statistic's magnitude (Metz et al. 2020, app. A)."""
    return torch.log(1e-8 + x.abs()).clamp(-5.0, 5.0)


def log_and_sign(grad: Tensor, k: float = 5.0) -> Tensor:
    """Return ``[2, *grad.shape]``: magnitude and sign of a gradient (Andrychowicz et al. 2016, arXiv 1606.04474, app.
    A).

    Channel 0 is ``max(log(|g| + eps) / k, -1)``, channel 1 ``clip(g exp(k), -1, 1)``: a large gradient shows its
    logarithm and its sign, a small one its value.
    """
    eps = torch.finfo(torch.float32).eps  # that of the original, in every dtype
    magnitude = ((grad.abs() + eps).log() / k).clamp(min=-1.0)
    return torch.stack([magnitude, (grad * math.exp(k)).clamp(-1.0, 1.0)])


def second_moment_scale(sum_of_squares: Tensor, count: int, eps: float = EPS) -> Tensor:
    """Return ``rsqrt(eps + mean(x^2))``, a channel at a time: times it, a channel has mean square one over its tensor.

    sum_of_squares: of any shape, which is the result's.    count: of entries that are summed over.
    """
    return torch.rsqrt(eps + sum_of_squares / count)


def channel_sums(channels: Tensor) -> Sum:
    """Return sums ``[channels]`` over the entries of ``[channels, *shape]``."""
    return Sum(columns(channels).sum(-1), tuple(range(channels.ndim - 1)))


def tensor_means(channels: Mapping[str, Mapping[str, Tensor]], infos: Infos, reduce: Reduce) -> dict[str, Slots]:
    """Return means ``[channels]`` over each whole tensor, by parameter and name, of what is ``[channels, *shape]``."""
    sums = {name: {key: channel_sums(x) for key, x in own.items()} for name, own in channels.items()}
    totals = reduce.shards(sums)
    return {name: {key: total / size(infos[name]) for key, total in own.items()} for name, own in totals.items()}


def square_sums(channels: Tensor) -> Sum:
    """Return sums ``[channels]`` of squares over the entries of ``[channels, *shape]``, without a tensor of that
    size."""
    flat = columns(channels)
    squares = torch.bmm(flat.unsqueeze(1), flat.unsqueeze(2)).reshape(len(flat))
    return Sum(squares, tuple(range(channels.ndim - 1)))


def spread_sums(channels: Tensor, centers: Tensor) -> Sum:
    """Return sums ``[channels]`` of ``(x - center)^2`` over the entries of ``[channels, *shape]``, by blocks of
    entries.

    centers: ``[channels]`` or ``[1]``.
    """
    blocks = columns(channels).split(_BLOCK, -1)
    squares = torch.stack([(x - centers.unsqueeze(-1)).square().sum(-1) for x in blocks])
    return Sum(squares.sum(0), tuple(range(channels.ndim - 1)))


def spreads(
    channels: Mapping[str, Mapping[str, Tensor]], centers: Mapping[str, Slots], infos: Infos, reduce: Reduce
) -> dict[str, Slots]:
    """Return means ``[channels]`` over each whole tensor, by parameter and name, of the squares in `spread_sums`."""
    totals = reduce.shards(
        {name: {key: spread_sums(x, centers[name][key]) for key, x in own.items()} for name, own in channels.items()}
    )
    return {name: {key: total / size(infos[name]) for key, total in own.items()} for name, own in totals.items()}


def columns(x: Tensor) -> Tensor:
    """Reshape ``x [channels, *shape] -> [channels, entries]``, scalars and empty tensors included."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))
