"""What rules keep of the training loss: averages of ten half-lives (VeLO, Metz et al. 2022, arXiv 2211.09760, B)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from l2o.types import Run, Slots

_AVERAGES = 10
LOSS_FEATURES = _AVERAGES - 1
_NEVER = 999_999_999_999.0
"""The minimum of no losses, in the reference."""


def init_loss_averages(like: Tensor) -> Slots:
    """Return shared slots ``loss_means`` and ``loss_minima``, ``[10]``, of the dtype and device of ``like``."""
    return {"loss_means": like.new_zeros(_AVERAGES), "loss_minima": like.new_full((_AVERAGES,), _NEVER)}


def average_losses(slots: Slots, run: Run, horizon: Tensor) -> tuple[Slots, Tensor]:
    """Return the slots with ``run.loss`` in them, and the features ``[9]``.

    horizon: 0-d, steps; half-lives go from 10 to it. It is ``run.total_steps``, but for weights that were trained
    with another one. A loss of more than twice the largest average counts as that.

    Each feature compares an average with the next slower one, both over the minimum so far: -1 to 1, negative while
    the loss falls; 0 in the first two steps.
    """
    loss = run.loss
    assert loss is not None  # needs_loss
    seen = run.step.to(loss.dtype) + 1.0
    decays = _decays(horizon.to(loss.dtype))
    correction = 1.0 - decays**seen
    means, minima = slots["loss_means"], slots["loss_minima"]
    ceiling = torch.where(run.step == 0, loss, (means / correction).max())
    loss = torch.minimum(2.0 * ceiling.abs(), loss)
    means = decays * means + (1.0 - decays) * loss
    corrected = means / correction
    above = torch.relu(corrected - minima)[:-1]  # over the new minima; as a difference, its derivative would be noise
    minima = torch.minimum(minima, corrected)
    slower = (corrected[1:] - minima[:-1]).clamp(min=1e-8)
    features = torch.where(seen > 2.0, (above / slower - 1.0).clamp(-1.0, 1.0), 0.0)
    return {"loss_means": means, "loss_minima": minima}, features


def _decays(horizon: Tensor) -> Tensor:
    """``exp(-1 / halflife)``, ``[10]``, half-lives log-spaced from 10 steps to ``horizon``."""
    spacing = torch.arange(_AVERAGES, dtype=horizon.dtype, device=horizon.device) / (_AVERAGES - 1)
    return torch.exp(-1.0 / 10.0 ** (1.0 + (torch.log(horizon) / math.log(10.0) - 1.0) * spacing))
