"""Which place parameters are in: whole here, shards, or one process' share of all tensors."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from l2o.optim.members import Member, label
from l2o.optim.place import WHOLE, Others, Place
from l2o.types import ParameterError, Theta, UpdateRule

_DEEP = 8
"""Calls between an optimizer's construction and whoever asked for it, subclasses of ours included."""


def placed(members: Sequence[Member], rule: UpdateRule, theta: Theta, others: Others | None) -> Place:
    """Say where ``members`` are; raises `ParameterError` where rules cannot follow.  others: that have other
    tensors."""
    if others is None and not any(hasattr(m.param, "device_mesh") for m in members):
        return WHOLE
    from l2o.optim import sharded  # what it imports takes a second, and needs torch.distributed

    return sharded.Shards(members, rule, theta) if others is None else sharded.Spread(others)


def zero_group() -> Others | None:
    """Return the processes of torch's `ZeroRedundancyOptimizer`, if the optimizer that is being made is for it, else
    None.

    It gives each process some of the tensors and does not say so; hence the look at who calls.
    """
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame = sys._getframe(1) if module else None
    for _ in range(_DEEP):
        if module is None or frame is None:
            break
        caller = frame.f_locals.get("self")
        if isinstance(caller, module.ZeroRedundancyOptimizer):
            return Others(caller.process_group, caller._default_device)
        frame = frame.f_back
    return None


def check_flat(members: Sequence[Member]) -> None:
    """Raise `ParameterError` for the flat shards of FSDP1, which have lost the shapes that rules go by."""
    flat = [m for m in members if getattr(m.param, "_fsdp_flattened", False)]
    if flat and all(m.param.ndim == 1 for m in flat):  # with NO_SHARD they have their shapes
        raise ParameterError(
            f"{label(flat[0])} is a flat shard of FullyShardedDataParallel: expected the tensor's own axes, which "
            "rules go by; shard with torch.distributed.fsdp.fully_shard (FSDP2)"
        )
