"""How an op that knows of lanes meets `torch.func.vmap`: the axis that is mapped over is its lanes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack

Nest = list[Any]
"""Tensors, lists of tensors and None, as ops of this package take them."""


def lowered(call: Callable[[int, Nest], list[Tensor]], tensors: Nest) -> list[Tensor]:
    """Return ``call(lanes, tensors)`` with tensors as they are below each `vmap` that is at work, ``[lanes, ...]``.

    torch would ask the rule that an op has for `vmap`, to the same end, but takes a millisecond for forty tensors.
    """
    stack = _functorch.peek_interpreter_stack()
    if stack is None or stack.key() != _functorch.TransformType.Vmap:
        return call(0, tensors)
    layer = _functorch.CVmapInterpreterPtr(stack)
    level, size = layer.level(), layer.batchSize()
    below = [
        [_below(t, level, size) for t in own] if isinstance(own, list) else _below(own, level, size) for own in tensors
    ]
    with temporarily_pop_interpreter_stack():
        results = lowered(lambda lanes, own: _in_lanes(call, lanes, size, own), below)
    return [_functorch._add_batch_dim(t, 0, level) for t in results]


def differentiable(tensors: Sequence[Tensor]) -> bool:
    """Say whether autograd has to know of what is computed from ``tensors``, of any shape, also those of lanes, which
    do not say so themselves."""
    return torch.is_grad_enabled() and any(_innermost(t).requires_grad for t in tensors)


def _innermost(t: Tensor) -> Tensor:
    while _functorch.is_functorch_wrapped_tensor(t) and not t.requires_grad:
        t = _functorch.get_unwrapped(t)
    return t


def _below(t: Tensor | None, level: int, size: int) -> Tensor | None:
    if t is None:
        return None
    value, axis = _functorch._unwrap_batched(t, level)
    return leading(value, axis, size)


def leading(t: Tensor, axis: int | None, size: int) -> Tensor:
    """Return ``t`` with the axis that is mapped over first, ``[size, ...]``; expanded, where it has none."""
    if axis is None:
        return t.expand(size, *t.shape)
    return t if axis == 0 else t.movedim(axis, 0)


def _in_lanes(call: Callable[[int, Nest], list[Tensor]], outer: int, size: int, tensors: Nest) -> list[Tensor]:
    """``call`` for lanes within ``outer`` lanes, if there are any."""
    if not outer:
        return call(size, tensors)
    merged = [
        [t.flatten(0, 1) for t in own] if isinstance(own, list) else own if own is None else own.flatten(0, 1)
        for own in tensors
    ]
    return [t.unflatten(0, (outer, size)) for t in call(outer * size, merged)]
