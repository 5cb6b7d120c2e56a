"""State in bfloat16 between steps: which slots, and how they are rounded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from l2o.ops.groups import SMALL
from l2o.types import ConfigurationError, OptState, ParamInfo, Slots, Theta, UpdateRule

_BELOW = 0xFFFF
"""The bits of a float32 that bfloat16 lacks."""


def checked_dtype(state_dtype: Any) -> torch.dtype | None:
    """Return what state is kept in, None for the dtype of the arithmetic; raises `ConfigurationError`."""
    if state_dtype in (None, torch.bfloat16):
        found: torch.dtype | None = state_dtype
        return found
    raise ConfigurationError(
        f"state_dtype={state_dtype!r}: expected torch.bfloat16, or None for the precision of the arithmetic (float16 "
        "has too small a range for squared gradients)"
    )


def entrywise(rule: UpdateRule, theta: Theta, info: ParamInfo) -> frozenset[str]:
    """Return the names of the slots that have numbers for each entry, but for those that the rule needs exact: of the
    parameter's shape, behind axes of their own.

    Found by asking the rule for the state of two lengths of the longest axis, on no device: a hidden state of 64
    numbers is none of a bias of 64 entries. One more or one less: of these, one that the rule keeps the same slots for.
    """
    if not info.shape:
        return frozenset()
    longest = max(range(len(info.shape)), key=lambda axis: (info.shape[axis], axis))
    lengths = (info.shape[longest] + more for more in (0, 1, -1))
    shapes = [(*info.shape[:longest], max(n, 0), *info.shape[longest + 1 :]) for n in lengths]
    own, more, less = (_blank(rule, theta, dataclasses.replace(info, shape=shape)) for shape in shapes)
    other = (less, shapes[2]) if more.keys() != own.keys() == less.keys() else (more, shapes[1])
    fitting = [
        {name for name, t in slots.items() if t.is_floating_point() and t.shape[-len(shape) :] == shape}
        for slots, shape in ((own, shapes[0]), other)
    ]
    return frozenset(set.intersection(*fitting)) - rule.exact_slots(info)


def _blank(rule: UpdateRule, theta: Theta, info: ParamInfo) -> Slots:
    param = torch.empty(info.shape, device="meta")
    return rule.init({name: t.to("meta") for name, t in theta.items()}, {"p": param}, {"p": info}).per_param["p"]


def stored(state: OptState, narrow: Mapping[str, Set[str]], step: int) -> OptState:
    """Return ``state`` with the slots ``narrow``, names by parameter, in bfloat16.

    Rounded up or down at random, so that the mean is the number itself (stochastic rounding: Gupta et al. 2015, arXiv
    1502.02551; of bfloat16, Zamirai et al. 2020, arXiv 2010.06192). To the nearest, a moment with decay 0.999, which
    changes by a thousandth of itself where bfloat16 has steps of 1/128 to 1/256, would never fall again; which slots
    are such moments only the rule knows, so all are treated alike.

    step: number of steps that were called before this one, which the draw is keyed by: a resumed run draws the same.
    All tensors share the draw, so that copies of one tensor stay equal in all processes, whatever else these hold.
    """
    places = [(key, name) for key, names in narrow.items() for name in names]
    if not places:
        return state
    rounded = _rounded_all([state.per_param[key][name] for key, name in places], step)
    per_param = {key: dict(slots) for key, slots in state.per_param.items()}
    for (key, name), t in zip(places, rounded, strict=True):
        per_param[key][name] = t
    return state._replace(per_param=per_param)


def _rounded_all(tensors: Sequence[Tensor], step: int) -> list[Tensor]:
    """Small ones together, where an operation takes longer to begin than to do."""
    noise = _noise(max(t.numel() for t in tensors), step, tensors[0].device)
    rounded = {i: _rounded(t, noise[: t.numel()].view(t.shape)) for i, t in enumerate(tensors) if t.numel() > SMALL}
    small = {i: t for i, t in enumerate(tensors) if i not in rounded}
    if small:
        sizes = [t.numel() for t in small.values()]
        draws = torch.cat([noise[:size] for size in sizes])
        parts = _rounded(torch.cat([t.reshape(-1) for t in small.values()]), draws).split(sizes)
        new = {i: torch.empty_like(t, dtype=torch.bfloat16) for i, t in small.items()}
        torch._foreach_copy_(list(new.values()), [x.view(t.shape) for x, t in zip(parts, new.values(), strict=True)])
        rounded |= new
    return [rounded[i] for i in range(len(tensors))]


def _noise(count: int, step: int, device: torch.device) -> Tensor:
    """int32 ``[count]``, uniform from 0 to 65,535."""
    generator = torch.Generator(device).manual_seed(step)
    words = torch.empty(-(-count // 2), dtype=torch.int64, device=device)
    return words.random_(-(2**63), None, generator=generator).view(torch.int32)[:count].bitwise_and_(_BELOW)


def _rounded(x: Tensor, noise: Tensor) -> Tensor:
    """``x`` in bfloat16, what is representable as it is: 0 stays 0, infinities and torch's NaN stay what they are."""
    bits = x.float().view(torch.int32) + noise
    return bits.bitwise_and_(~_BELOW).view(torch.float32).to(torch.bfloat16)
