"""What a plug-in keeps: a rule's slots in ``optimizer.state``, beside what other code keeps there, and its run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from l2o.optim.guard import HAD_GRADIENT
from l2o.optim.members import Member
from l2o.types import Grads, OptState, Params, Slots

RUN = "run"
"""Of the first group: the numbers of steps, rule and θ, and the slots that belong to no single parameter. There, and
not in the state, where distributed checkpoints and sharded optimizers know of nothing but parameters."""


def run_of(optimizer: torch.optim.Optimizer) -> Mapping[str, Any]:
    """Return what is kept of the run, also where a group was taken from before the first one."""
    for group in optimizer.param_groups:
        if RUN in group:
            run: Mapping[str, Any] = group[RUN]
            return run
    return {}


def record(optimizer: torch.optim.Optimizer, **facts: Any) -> None:
    """Keep ``facts`` of the run. The dict is replaced, not changed, so that ``state_dict()`` stays what it was."""
    optimizer.param_groups[0][RUN] = {**run_of(optimizer), **facts}


def counts(optimizer: torch.optim.Optimizer) -> tuple[int, int | Tensor]:
    """Return steps that were called, and of these, that were skipped: a number, or int64 0-d where reading it would
    wait."""
    run = run_of(optimizer)
    return run.get("step", 0), run.get("skipped", 0)


def renew(optimizer: torch.optim.Optimizer) -> bool:
    """Start the run anew where somebody cleared the state after a step, and say so."""
    called, skipped = counts(optimizer)
    cleared = not optimizer.state and called != skipped
    if cleared:
        record(optimizer, step=0, skipped=0, shared={}, guard={})
    return cleared


def own(kept: Slots, layout: Mapping[str, Any]) -> Slots:
    """Return the rule's slots among what is ``kept`` of a parameter, by their names; none before its first step."""
    return {name: kept[name] for name in layout} if layout.keys() <= kept.keys() else {}


def seen(state: Mapping[Any, Any], member: Member, started: bool) -> Tensor:
    """Return a mask like the parameter: which entries had a gradient; all, where an older l2o has ``started`` it."""
    kept = state.get(member.param) or {}
    mask: Tensor | None = kept.get(HAD_GRADIENT)
    return torch.full_like(member.here, started, dtype=torch.bool) if mask is None else mask


def apart(members: Sequence[Member], params: Params, grads: Grads, new: OptState) -> OptState:
    """Return ``new`` without what a step writes to."""
    # A rule may return an input as a slot (the last gradient, say), and inputs are written to after this.
    inputs = {t.untyped_storage().data_ptr() for m in members for t in (params[m.key], grads[m.key])}
    per_param = {m.key: _apart(new.per_param[m.key], inputs) for m in members}
    return OptState(per_param, _apart(new.shared, inputs))


def keep(optimizer: torch.optim.Optimizer, members: Sequence[Member], new: OptState) -> None:
    """Keep the new slots. Dicts are replaced, not changed, so that ``state_dict()`` stays what it was."""
    state = optimizer.state
    for m in members:
        state[m.param] = {**state.get(m.param, {}), **new.per_param[m.key]}
    if new.shared:
        record(optimizer, shared=new.shared)


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return ``tensors``, of any shapes, the floating-point ones in ``dtype``."""
    return {k: t if t.dtype == dtype or not t.is_floating_point() else t.to(dtype) for k, t in tensors.items()}


def at_hand(kept: Mapping[str, Slots], like: Tensor) -> dict[str, Slots]:
    """Return all ``kept`` slots, of any shapes, in the dtype of ``like`` and on its device, to which some tools do not
    take all that they save."""
    if like.is_cpu and {t.dtype for own in kept.values() for t in own.values()} <= {like.dtype}:
        return dict(kept)
    found = {name: cast(own, like.dtype) for name, own in kept.items()}
    if like.is_cpu:
        return found
    return {name: {k: t.to(like.device) for k, t in own.items()} for name, own in found.items()}


def _apart(slots: Slots, inputs: set[int]) -> Slots:
    """``slots``, copied where they are views of the storages ``inputs``."""
    return {k: t.clone() if t.untyped_storage().data_ptr() in inputs else t for k, t in slots.items()}
