"""Running moments of gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from l2o.ops.numeric import constant


class Shares(NamedTuple):
    """What a running mean keeps and what is new in it, which make one; of any shape, both to full precision."""

    keep: Tensor
    new: Tensor


def shares(logit: Tensor) -> Shares:
    """Return those of the decay ``sigmoid(logit)``, of any shape: near 1, where decays are, the nearest number, unlike
    `torch.sigmoid`."""
    new = torch.sigmoid(-logit)
    return Shares(1.0 - new, new)


def decay(logit: Tensor) -> Tensor:
    """Return what the `shares` of ``logit`` keep, in its shape."""
    return shares(logit).keep


def ema(average: Tensor, value: Tensor, logit_decay: Tensor) -> Tensor:
    """Return ``average`` and ``value``, of one shape, `mixed` by the decay ``sigmoid(logit_decay)``, 0-d."""
    return mixed(average, value, shares(logit_decay))


def mixed(average: Tensor, value: Tensor, shares: Shares) -> Tensor:
    """Return ``keep * average + new * value``, ``[*shape]``, of ``shares``."""
    return shares.keep * average + shares.new * value


def nesterov(m: Tensor, value: Tensor, shares: Shares) -> tuple[Tensor, Tensor]:
    """Return the running mean ``m``, ``[*shape]``, with ``value`` in it, and what one more such would make it."""
    fresh = shares.new * value
    m = shares.keep * m + fresh
    return m, shares.keep * m + fresh


def bias_correction(logit_decay: Tensor, count: Tensor) -> Tensor:
    """Return ``1 - d**count``, ``d = sigmoid(logit_decay)``: what an `ema` from 0 is divided by (Adam, section 3).

    logit_decay: 0-d.    count: of updates, of any shape, which is the result's.
    """
    return -torch.expm1(count * logsigmoid(logit_decay))


def init_momenta(param: Tensor, decays: int) -> Tensor:
    """Return zero momenta ``[decays, *param.shape]``."""
    return torch.zeros_like(param).expand(decays, *param.shape).clone()


def momenta(previous: Tensor, value: Tensor, decays: Sequence[float] | Tensor) -> Tensor:
    """Return one average a decay, ``m <- d m + (1 - d) g``, without bias correction (Metz et al. 2020, arXiv
    2009.11243).

    previous: ``[len(decays), *value.shape]``.  value: a gradient for momenta, its square for second moments.
    decays: fixed, or ``[decays]`` as they were learned. ``1 - d`` is formed in the tensor's dtype, as the reference
    does.
    """
    d = decays if isinstance(decays, Tensor) else constant(decays, value)
    return torch.lerp(value.unsqueeze(0), previous, d.view(-1, *[1] * value.ndim))


def debias(moments: Tensor, decays: Sequence[float], count: Tensor) -> Tensor:
    """Return ``m / (1 - d**count)``: `momenta` as if they had not started from 0.  moments: ``[len(decays), ...]``."""
    d = constant(decays, moments)
    return moments / (1.0 - d**count).view(-1, *[1] * (moments.ndim - 1))


def learned_decays(initial: Sequence[float], shift: Tensor) -> Tensor:
    """Return ``1 - exp(10 (log(1 - initial) / 10 + shift))``, ``[len(initial)]``: at most 1, without a lower bound.

    shift: ``[len(initial)]``, the meta-parameters, 0 at first (AdafacMLPLOpt of google/learned_optimization).
    """
    return 1.0 - torch.exp(10.0 * (torch.log(1.0 - constant(initial, shift)) / 10.0 + shift))
