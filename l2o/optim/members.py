"""The parameters that a plug-in optimizes: whose they are, what they are for, whether they can be optimized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l2o.ops.kinds import default_kinds
from l2o.types import GradientError, Kind, ParameterError


class Member(NamedTuple):
    """A parameter and its group; ``key``, its place in the optimizer, is its name in the dicts of the rule."""

    key: str
    param: Tensor
    group: dict[str, Any]


def check_params(members: Sequence[Member]) -> None:
    """Raise `ParameterError` unless all are dense floating-point tensors on one device."""
    for m in members:
        p, device = m.param, members[0].param.device
        if not p.is_floating_point() or p.layout != torch.strided:
            raise ParameterError(
                f"{label(m)} is {p.dtype}, {p.layout}: expected dense and floating point; leave it out"
            )
        if p.device != device:
            raise ParameterError(f"{label(m)} is on {p.device}, others on {device}: make one optimizer for each device")


def checked_gradient(member: Member) -> Tensor:
    """The gradient of a parameter that has one; `GradientError` unless it is dense, real, of its shape and device."""
    grad, p = member.param.grad, member.param
    assert grad is not None
    if grad.layout != torch.strided or not grad.is_floating_point():
        raise GradientError(
            f"the gradient of {label(member)} is {grad.dtype}, {grad.layout}: expected real and dense "
            "(embeddings: sparse=False)"
        )
    if grad.shape != p.shape or grad.device != p.device:
        raise GradientError(
            f"the gradient of {label(member)} is {tuple(grad.shape)} on {grad.device}, expected {tuple(p.shape)} on "
            f"{p.device}; call zero_grad() and backward() once more after a parameter was resized or moved"
        )
    return grad.detach()


def label(member: Member) -> str:
    """What messages call a parameter."""
    names, params = member.group.get("param_names"), member.group["params"]
    named = "" if names is None else next(f" ({n!r})" for n, p in zip(names, params, strict=True) if p is member.param)
    return f"parameter {member.key}{named}"


def kinds(members: Sequence[Member]) -> dict[str, Kind]:
    """What each parameter is for: what its group says, or what its axes suggest."""
    default = default_kinds({m.key: m.param for m in members})
    return {m.key: m.group.get("kind", default[m.key]) for m in members}
