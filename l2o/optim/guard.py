"""What keeps a step from doing harm: all of it is taken or nothing, and entries without gradients rest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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
    kind = device.type if torch.amp.is_autocast_available(device.type) else "cpu"
    if torch.is_inference_mode_enabled() or torch.is_autocast_enabled(kind):
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(kind, enabled=False):
            yield
    else:  # as nearly always; what is off takes time to turn off
        with torch.no_grad():
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
    """Return ``updates`` and ``new`` where ``ok`` (bool, 0-d), else zeros and ``old``; nothing is read on the host.

    Tensors are replaced in the dicts that came, so that each is freed before the next is made: a second new state would
    be memory of the state's size. An operation is for all that can be one tensor.
    """
    pairs = [(updates, {}), (new.shared, old.shared), *((own, old.per_param[k]) for k, own in new.per_param.items())]
    every = {(i, name, name if i > 1 else i): t for i, (own, _) in enumerate(pairs) for name, t in own.items()}
    for keys in bundles(every):
        now = stack([every.pop(key) for key in keys])
        before = stack([pairs[i][1][name] for i, name, _ in keys]) if keys[0][0] else constant(0.0, now)
        chosen = now if is_same(now, before) else torch.where(ok, now, before)
        for (i, name, _), t in zip(keys, chosen.unbind(), strict=True):
            pairs[i][0][name] = t
    return updates, new
