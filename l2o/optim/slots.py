"""What a plug-in keeps in ``optimizer.state``: a rule's slots, beside what other code keeps there, and the counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from l2o.optim.guard import HAD_GRADIENT
from l2o.optim.members import Member
from l2o.types import OptState, Params, Slots

State = dict[Any, Any]
"""Of a `torch.optim.Optimizer`."""


def counts(state: State) -> tuple[int, int | Tensor]:
    """Steps that were called, and of these, that were skipped: a number, or int64 0-d where reading it would wait."""
    clock = state.get("clock", {})
    return clock.get("step", 0), clock.get("skipped", 0)


def own(kept: Slots, layout: Mapping[str, Any]) -> Slots:
    """The rule's slots among what is ``kept`` of a parameter, by their names; none before its first step."""
    return {name: kept[name] for name in layout} if layout.keys() <= kept.keys() else {}


def seen(state: State, member: Member, started: bool) -> Tensor:
    """Bool: which entries of a parameter have had a gradient; all, where an older l2o has ``started`` it."""
    kept = state.get(member.param) or {}
    mask: Tensor | None = kept.get(HAD_GRADIENT)
    return torch.full_like(member.param, started, dtype=torch.bool) if mask is None else mask


def store(state: State, members: Sequence[Member], params: Params, new: OptState) -> None:
    """Keep the new slots. Dicts are replaced, not changed, so that ``state_dict()`` stays what it was."""
    # A rule may return an input as a slot (the last gradient, say), and inputs are written to after this.
    inputs = {t.untyped_storage().data_ptr() for m in members for t in (params[m.key], m.param.grad) if t is not None}
    per_param = {m.key: _apart(new.per_param[m.key], inputs) for m in members}
    keep(state, members, OptState(per_param, _apart(new.shared, inputs)))


def keep(state: State, members: Sequence[Member], new: OptState) -> None:
    """`store` for slots that are no inputs."""
    for m in members:
        state[m.param] = {**state.get(m.param, {}), **new.per_param[m.key]}
    if new.shared:
        state["shared"] = new.shared


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """``tensors``, of any shapes, the floating-point ones in ``dtype``."""
    return {k: t if t.dtype == dtype or not t.is_floating_point() else t.to(dtype) for k, t in tensors.items()}


def _apart(slots: Slots, inputs: set[int]) -> Slots:
    """``slots``, copied where they are views of the storages ``inputs``."""
    return {k: t.clone() if t.untyped_storage().data_ptr() in inputs else t for k, t in slots.items()}
