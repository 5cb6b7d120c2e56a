"""What keeps a step from doing harm: all of it is taken or nothing, and entries without gradients rest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from l2o.fused import HAD_GRADIENT as HAD_GRADIENT
from l2o.ops.groups import bundles, is_same, stack
from l2o.ops.numeric import constant, finite
from l2o.optim.members import Member, label
from l2o.types import Grads, OptState, Slots, Updates


@contextmanager
def plain(device: torch.device) -> Iterator[None]:
    """Keep arithmetic as it is by itself, wherever ``step`` is called: no autocast, no inference mode, no graph."""
    known = torch.amp.is_autocast_available(device.type)
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type if known else "cpu", enabled=False):
        yield


def readable(device: torch.device) -> bool:
    """Say whether the host reads a tensor's value there without waiting."""
    return device.type == "cpu"


def culprit(
    members: Sequence[Member], grads: Grads, updates: Updates, loss: Tensor | None, limit: float = math.inf
) -> str:
    """Say what is not `finite`, gradients and updates ``[*shape]`` or the 0-d loss; for the message, once that is
    known."""
    bad = "is not finite or its square is not"
    if loss is not None and not finite([loss], []):
        return f"the loss {bad}"
    for what, tensors in (("gradient", grads), ("update", updates)):
        for m in members:
            if m.key in tensors and not finite([tensors[m.key]], []):
                return f"the {what} of {label(m)} {bad}"
    if not finite(list(grads.values()), list(updates.values())):
        return f"the sum of all squared gradients and updates {bad}"
    return f"the norm of its gradients is above {limit:.3g}, far above all before"


def rest(updates: Updates, grads: Grads, seen: Slots) -> tuple[Updates, Slots]:
    """Return updates without those of entries that never had a gradient; and which have had one by now.

    seen: bool ``[*shape]`` by parameter, which had one before.
    """
    own = {(key, HAD_GRADIENT): grads[key] for key in seen}
    updates, now = dict(updates), dict[str, Tensor]()
    for keys in bundles(own):
        some = [key for key, _ in keys]
        had = stack([seen[key] for key in some]) | (stack([grads[key] for key in some]) != 0)
        moving = stack([updates[key] for key in some])
        updates |= zip(some, torch.where(had, moving, constant(0.0, moving)).unbind(), strict=True)
        now |= zip(some, had.unbind(), strict=True)
    return updates, now


def beside(state: OptState, seen: Slots) -> OptState:
    """Return ``state`` with the masks ``seen`` among the slots."""
    slots = {key: {**state.per_param[key], HAD_GRADIENT: had} for key, had in seen.items()}
    return OptState(state.per_param | slots, state.shared)


def masked(ok: Tensor, updates: Updates, new: OptState, old: OptState) -> tuple[Updates, OptState]:
    """Return ``updates`` and ``new`` where ``ok`` (bool, 0-d), else zeros and ``old``; nothing is read on the host."""
    moved = _either(ok, {(key, ""): u for key, u in updates.items()}, {})
    kept = _either(ok, _flat(new), _flat(old))
    per_param = {key: {slot: kept[key, slot] for slot in slots} for key, slots in new.per_param.items()}
    shared = {slot: kept[slot, ""] for slot in new.shared}
    return {key: moved[key, ""] for key in updates}, OptState(per_param, shared)


def _flat(state: OptState) -> dict[tuple[str, str], Tensor]:
    own = {(key, slot): t for key, slots in state.per_param.items() for slot, t in slots.items()}
    return own | {(slot, ""): t for slot, t in state.shared.items()}


def _either(ok: Tensor, new: Mapping[tuple[str, str], Tensor], old: Mapping[tuple[str, str], Tensor]) -> Any:
    """``new`` where ``ok``, else ``old``, and 0 where there is none; an operation for all that can be one tensor."""
    found: dict[tuple[str, str], Tensor] = {}
    for keys in bundles(new):
        now = stack([new[key] for key in keys])
        before = stack([old[key] for key in keys]) if keys[0] in old else constant(0.0, now)
        chosen = now if is_same(now, before) else torch.where(ok, now, before)
        found |= zip(keys, chosen.unbind(), strict=True)
    return found
