"""From gradients to parameters: the rule's updates, and how they are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from l2o import fused
from l2o.fused import Inputs
from l2o.optim.members import Member
from l2o.types import ConfigurationError, OptState, Params, UpdateRule, Updates

WORTH_A_KERNEL = 10**7
"""Updates of single entries in a run, which torch's operations take a second longer for than a kernel, on a CPU; to
compile one takes one to three, once a machine."""
_OF_A_STEP = 10**4
"""Entries that take as much longer as a step does beside what it does with entries."""


class Ready(NamedTuple):
    """Who makes a step, and what it gets.

    factors: ``lr, keep`` by the id of the group.    limit: of the norm of all gradients.
    """

    rule: UpdateRule
    inputs: Inputs
    factors: Mapping[int, tuple[float, float]]
    limit: float


def updated(rule: UpdateRule, inputs: Inputs, total_steps: int) -> tuple[Updates, OptState]:
    """Return the rule's update, by its kernel where there is one and the run is worth the seconds of compiling it.

    Raises as `checked`.
    """
    return checked(rule, inputs, *(_fused(rule, inputs, total_steps) or rule.update(*inputs)))


def checked(rule: UpdateRule, inputs: Inputs, updates: Updates, state: OptState) -> tuple[Updates, OptState]:
    """Return updates and state; raises `ConfigurationError` unless there is an update of every parameter, of its
    shape."""
    for key, p in inputs.params.items():
        if key not in updates or updates[key].shape != p.shape:
            came = tuple(updates[key].shape) if key in updates else "none"
            raise ConfigurationError(f"{rule!r}: its update of parameter {key} is {came}, expected {tuple(p.shape)}")
    return updates, state


def in_place(rule: UpdateRule, inputs: Inputs, members: Sequence[Member], total_steps: int) -> bool:
    """Say whether to ask the rule for a step in place: it may have a kernel, and the run is worth compiling it."""
    if not fused.has(fused.STEPS, rule) or not _worth_a_kernel(inputs, total_steps):
        return False
    return all(inputs.params[m.key].dtype == m.param.dtype for m in members)


def apart(state: OptState) -> OptState:
    """Return a copy for a step in place to write to."""
    return cast("OptState", tree_map_only(Tensor, torch.clone, state))


def _worth_a_kernel(inputs: Inputs, total_steps: int) -> bool:
    entries = sum(p.numel() for p in inputs.params.values())
    return (entries + _OF_A_STEP) * total_steps >= WORTH_A_KERNEL


def _fused(rule: UpdateRule, inputs: Inputs, total_steps: int) -> tuple[Updates, OptState] | None:
    if not fused.has(fused.UPDATES, rule) or not _worth_a_kernel(inputs, total_steps):
        return None
    lanes = tree_map_only(Tensor, lambda t: t.unsqueeze(0), inputs)
    found = fused.update(rule, lanes.theta, lanes.grads, lanes.state, lanes.params, lanes.run, inputs.infos)
    return cast("tuple[Updates, OptState] | None", tree_map_only(Tensor, lambda t: t.squeeze(0), found))


def write(
    members: Sequence[Member],
    params: Params,
    updates: Updates,
    factors: Mapping[int, tuple[float, float]],
    ok: Tensor | None = None,
) -> None:
    """Write ``p <- keep p + lr u``, rounded once to the dtype of the parameter.

    params: the values in the dtype of the arithmetic, the parameters themselves where they have it; written to.
    factors: ``lr, keep`` by the id of the group.    ok: bool, 0-d; where False, ``keep`` is 1.
    """
    groups: dict[int, list[str]] = {key: [] for key in factors}
    for m in members:
        groups[id(m.group)].append(m.key)
    for group, keys in groups.items():
        (lr, keep), values = factors[group], [params[key] for key in keys]
        if keep != 1.0:
            torch._foreach_mul_(values, keep if ok is None else torch.where(ok, values[0].new_full((), keep), 1.0))
        torch._foreach_add_(values, [updates[key] for key in keys], alpha=lr)
    for m in members:
        if params[m.key].dtype != m.here.dtype:
            m.here.copy_(params[m.key])
