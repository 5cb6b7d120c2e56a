"""Where an optimizer's parameters are: all of them whole in this process, or parts of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l2o.fused import Inputs
from l2o.optim.apply import updated
from l2o.optim.members import Member
from l2o.types import OptState, Slots, UpdateRule, Updates


class Others(NamedTuple):
    """The processes that have the other tensors of a run, and the device on which to tell them something."""

    group: Any
    device: torch.device


class Place:
    """All are whole and here. What others do about it is in `l2o.optim.sharded`."""

    alone = True
    """Whether a step needs no other process."""

    def here(self, members: Sequence[Member]) -> Sequence[Member]:
        """Return ``members`` with what of each is in this process."""
        return members

    def local(self, slots: Slots) -> Slots:
        """Return what of kept ``slots`` is in this process."""
        return slots

    def kept(self, members: Sequence[Member], state: OptState) -> OptState:
        """Return ``state``, of what is in this process, as it is kept with the parameters."""
        return state

    def taken(self, member: Member, slots: Slots) -> Slots:
        """Return ``slots`` that were saved of a whole parameter, as they are kept."""
        return slots

    def update(self, rule: UpdateRule, inputs: Inputs, total_steps: int) -> tuple[Updates, OptState]:
        """Return the rule's update and new state of what is in this process."""
        return updated(rule, inputs, total_steps)

    def agree(self, ok: Tensor) -> Tensor:
        """Return bool, 0-d: whether ``ok`` in all processes."""
        return ok

    def mean(self, loss: Tensor) -> Tensor:
        """Return the loss, 0-d, of all processes' data, of which each has as much."""
        return loss


WHOLE = Place()
