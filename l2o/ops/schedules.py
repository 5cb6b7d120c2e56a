"""Schedules of learning rates, as factors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from l2o.ops.numeric import constant

_SHORT = 150.0
"""Steps of a run that is too short for steps of the usual size to get anywhere."""
_SHORTEST = 1.0 / 3.0
"""Share of these under which longer steps were not tried."""


def warmup_cosine(step: Tensor, total: Tensor, warmup: Tensor, floor: float = 0.0) -> Tensor:
    """Rise linearly from 0 over ``warmup`` steps, then half a cosine down to ``floor`` at ``total`` steps; then
    ``floor``.

    All of one shape, numbers of steps; the first step is 0 and has the factor ``1 / warmup``.
    """
    progress = ((step - warmup) / (total - warmup).clamp(min=1)).clamp(0.0, 1.0)
    cosine = floor + (1.0 - floor) * 0.5 * (1.0 + torch.cos(math.pi * progress))
    return torch.where(step < warmup, (step + 1) / warmup.clamp(min=1), cosine)


def linear_warmup(step: Tensor, warmup: Tensor) -> Tensor:
    """Rise linearly from 0 over ``warmup`` steps, then 1; the first step is 0, its factor ``min(1, 1 / warmup)``.  All
    0-d."""
    return ((step + 1.0) / warmup).clamp(max=1.0)


def hastened(schedule: Tensor, total: Tensor, power: float) -> Tensor:
    """Return ``schedule`` times ``(150 / total) ** power`` for runs of fewer than 150 steps, those of fewer than 50 as
    of 50.  All 0-d."""
    return schedule * (total / _SHORT).clamp(_SHORTEST, 1.0) ** -power if power else schedule


def power_decay(step: Tensor, total: Tensor, power: Tensor, floor: float = 0.01) -> Tensor:
    """Fall as ``(1 - step / total) ** power`` from 1 down to ``floor`` at ``total`` steps; then ``floor``.  All 0-d."""
    left = 1.0 - step / total
    ahead = left > 0.0  # the power of 0 has no derivative
    return floor + (1.0 - floor) * torch.where(
        ahead, torch.where(ahead, left, constant(1.0, left)) ** power, constant(0.0, left)
    )
