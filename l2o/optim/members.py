"""The parameters that a plug-in optimizes: whose they are, what they are for, whether they can be optimized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from l2o.checks import check_choice, check_float
from l2o.ops.kinds import infos_of
from l2o.types import ConfigurationError, GradientError, Kind, ParameterError, ParamInfo


class Member(NamedTuple):
    """A parameter and its group; ``key``, its place in the optimizer, is its name in the dicts of the rule.

    here: what of the parameter is in this process.
    """

    key: str
    param: Tensor
    group: dict[str, Any]
    here: Tensor


def unique(groups: Sequence[dict[str, Any]]) -> list[Member]:
    """Return every parameter once, with the first of its groups, by its place among all."""
    found: dict[int, Member] = {}
    for i, (group, p) in enumerate((g, p) for g in groups for p in g["params"]):
        found.setdefault(id(p), Member(str(i), p, group, p))
    return list(found.values())


def check_params(members: Sequence[Member]) -> None:
    """Raise `ParameterError` unless all are dense floating-point tensors on one device that can be written to."""
    device = members[0].param.device if members and not is_lazy(members[0].param) else None
    for m in members:
        p = m.param
        check_shape(label(m), p)
        if not p.is_floating_point() or p.layout != torch.strided:
            raise ParameterError(
                f"{label(m)} is {p.dtype}, {p.layout}: expected dense and floating point; leave it out"
            )
        if p.device != device:
            raise ParameterError(f"{label(m)} is on {p.device}, others on {device}: make one optimizer for each device")
        if p.is_inference():
            raise ParameterError(
                f"{label(m)} was made in inference mode and cannot be written to outside; make it under torch.no_grad()"
            )
        if not p.is_contiguous() and torch._debug_has_internal_overlap(p) == 1:
            raise ParameterError(
                f"{label(m)} is expanded: several of its entries are one number in memory; make it a clone()"
            )


def check_shape(name: str, param: Tensor) -> None:
    """Raise `ParameterError` where ``param``, called ``name`` there, has no shape yet, as in a lazy module."""
    if is_lazy(param):
        raise ParameterError(f"{name} has no shape yet: run its lazy module once, then make the optimizer")


def checked_gradient(member: Member) -> Tensor:
    """Return what is here of the gradient of a parameter that has one.

    Raises `GradientError` unless it is dense, real, of the parameter's shape and device, and in as many parts.
    """
    grad: Any = member.param.grad
    p: Any = member.param
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
    return grad.detach() if member.here is p else grad.redistribute(placements=p.placements).to_local()


def settings(group: Mapping[str, Any]) -> dict[str, float]:
    """Return ``lr`` and ``weight_decay`` of a group as Python's floats; raises `ConfigurationError`.

    A tensor of one number is read, for which a device is waited for.
    """
    for name in ("lr", "weight_decay"):
        if name not in group:
            raise ConfigurationError(f"a group of parameters has no {name!r}: set group[{name!r}] to a number")
    check_choice("kind", group.get("kind", "vector"), get_args(Kind))
    return {name: check_float(name, _number(group[name]), least=0.0) for name in ("lr", "weight_decay")}


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def label(member: Member) -> str:
    """Return what messages call a parameter."""
    names, params = member.group.get("param_names"), member.group["params"]
    named = "" if names is None else next(f" ({n!r})" for n, p in zip(names, params, strict=True) if p is member.param)
    return f"parameter {member.key}{named}"


def infos(members: Sequence[Member]) -> dict[str, ParamInfo]:
    """Return what each parameter is: for what, its group says, or its axes suggest."""
    said = {m.key: m.group["kind"] for m in members if "kind" in m.group}
    return infos_of({m.key: m.param for m in members}, said)
