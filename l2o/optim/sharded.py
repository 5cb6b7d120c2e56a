"""Parameters of which each process holds a part: shards (FSDP2's `fully_shard`), or some tensors of all (ZeRO).

A rule's sums are completed by one all-reduce each. Tensors that a rule takes as a whole only are sent to one process
each, updated there and sent back, all in two messages a step, as sharded forms of Muon do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from l2o.fused import Inputs
from l2o.optim.apply import checked
from l2o.optim.exchange import Exchange, Summed, Together, agreed, averaged, chunks, holders
from l2o.optim.guard import HAD_GRADIENT
from l2o.optim.members import Member, infos, label
from l2o.optim.place import Others, Place
from l2o.types import ConfigurationError, OptState, ParameterError, ParamInfo, Slots, Theta, UpdateRule, Updates


class Shards(Place):
    """Tensors that are cut along one axis each over the processes of one dimension of one mesh, or whole in all."""

    alone = False

    def __init__(self, members: Sequence[Member], rule: UpdateRule, theta: Theta) -> None:
        """Raises `ParameterError` for other placements."""
        self.mesh, self.dimension, self.axes = _cuts(members)
        self.group = self.mesh.get_group(self.dimension)
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        blank = {name: t.to("meta") for name, t in theta.items()}
        known = infos(members)
        self.slot_axes = {key: slot_axes(rule, blank, known[key], axis) for key, axis in self.axes.items()}
        self._lengths = {key: known[key].shape[axis] for key, axis in self.axes.items()}

    def here(self, members: Sequence[Member]) -> Sequence[Member]:
        return [m._replace(here=_local(m.param)) for m in members]

    def local(self, slots: Slots) -> Slots:
        return {name: _local(t) for name, t in slots.items()}

    def kept(self, members: Sequence[Member], state: OptState) -> OptState:
        per_param = {m.key: self._kept(m.key, state.per_param[m.key]) for m in members}
        return state._replace(per_param=per_param)

    def taken(self, member: Member, slots: Slots) -> Slots:
        axes = {k: a for k, a in self.slot_axes.get(member.key, {}).items() if a is not None}
        ours = {
            name: t.split(chunks(t.shape[axes[name]], self.size), axes[name])[self.rank].clone()
            for name, t in slots.items()
            if name in axes and not isinstance(t, DTensor)
        }
        return slots | self._kept(member.key, ours)

    def _kept(self, key: str, slots: Slots) -> Slots:
        return {name: self._distributed(key, name, t) for name, t in slots.items()}

    def _distributed(self, key: str, name: str, slot: Tensor) -> Tensor:
        """A slot of what is here as part of that of the whole parameter, which tools can put together."""
        axis = self.slot_axes.get(key, {}).get(name)
        if axis is None:
            return slot
        places: list[Any] = [Replicate()] * self.mesh.ndim
        places[self.dimension] = Shard(axis)
        shape = torch.Size([*slot.shape[:axis], self._lengths[key], *slot.shape[axis + 1 :]])
        stride = torch.empty(shape, device="meta").stride()
        # torch (2.13) cannot deepcopy a DTensor of a view that begins further on, as of several tensors in a stack.
        own = slot.clone() if slot.storage_offset() else slot.contiguous()
        return DTensor.from_local(own, self.mesh, places, run_check=False, shape=shape, stride=stride)

    def agree(self, ok: Tensor) -> Tensor:
        return agreed(ok, self.group)

    def mean(self, loss: Tensor) -> Tensor:
        return averaged(loss, [self.mesh.get_group(i) for i in range(self.mesh.ndim)])

    def update(self, rule: UpdateRule, inputs: Inputs, total_steps: int) -> tuple[Updates, OptState]:
        whole = [key for key in inputs.params if key in self.axes and rule.needs_whole(inputs.infos[key])]
        others = [key for key in inputs.params if key not in whole]
        ranks = holders(whole, others, inputs.infos, self.size)
        exchange = Exchange(self.group, inputs, ranks, self.axes, self.slot_axes)
        given = exchange.gathered() if whole else inputs
        counted = [key for key in given.params if ranks.get(key, [0])[0] == self.rank]
        reduce = Summed(self.group, {key: axis for key, axis in self.axes.items() if key not in ranks}, counted)
        new = checked(rule, given, *rule.update(*given, reduce))
        return exchange.returned(*new) if whole else new


class Spread(Place):
    """Whole tensors, of which each process of a group has some: torch's `ZeroRedundancyOptimizer`.

    A step waits for the device: what differs between processes has to be known before the next message.
    """

    alone = False

    def __init__(self, others: Others) -> None:
        self.group, self.device = others

    def here(self, members: Sequence[Member]) -> Sequence[Member]:
        """Raises `ConfigurationError` where some processes have tensors with gradients and others none."""
        some = torch.full((), bool(members), device=self.device)
        if agreed(some, self.group) != (~agreed(~some, self.group)):
            raise ConfigurationError(
                f"one of the {dist.get_world_size(self.group)} processes of ZeroRedundancyOptimizer has no parameter "
                "with a gradient: expected some in each; use fewer processes, leave out frozen parameters, or shard "
                "with torch.distributed.fsdp.fully_shard"
            )
        return members

    def agree(self, ok: Tensor) -> Tensor:
        return agreed(ok, self.group)

    def mean(self, loss: Tensor) -> Tensor:
        return averaged(loss, [self.group])

    def update(self, rule: UpdateRule, inputs: Inputs, total_steps: int) -> tuple[Updates, OptState]:
        reduce = Together(self.group, {}, inputs.params)
        new = checked(rule, inputs, *rule.update(*inputs, reduce))
        reduce.finish(next(iter(inputs.params.values())))
        return new


def slot_axes(rule: UpdateRule, theta: Theta, info: ParamInfo, axis: int) -> dict[str, int | None]:
    """Return the axis of each slot that is as long as ``axis`` of what is here of a parameter; None where none is.

    Found by asking the rule for the state of shards of two lengths.  theta: on no device.
    """
    states = []
    for length in (2, 3):
        shape = [*info.shape[:axis], length, *info.shape[axis + 1 :]]
        p = torch.empty(shape, dtype=next(iter(theta.values())).dtype, device="meta")
        states.append(rule.init(theta, {"p": p}, {"p": info}).per_param["p"])
    found: dict[str, int | None] = {HAD_GRADIENT: axis}
    for name, slot in states[0].items():
        pairs = zip(slot.shape, states[1][name].shape, strict=True)
        found[name] = next((i for i, (short, long) in enumerate(pairs) if short != long), None)
    return found


def _local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def _cuts(members: Sequence[Member]) -> tuple[DeviceMesh, int, dict[str, int]]:
    """The mesh, its dimension over which parameters are cut, and along which axis each is that is."""
    found: dict[str, int] = {}
    where: tuple[DeviceMesh, int] | None = None
    for m in members:
        p = m.param
        cuts = [i for i, place in enumerate(getattr(p, "placements", ())) if not isinstance(place, Replicate)]
        if not isinstance(p, DTensor) or not cuts:
            continue
        place, here = p.placements[cuts[0]], (p.device_mesh, cuts[0])
        if len(cuts) > 1 or type(place) is not Shard or (where or here) != here:
            raise ParameterError(
                f"{label(m)} has the placements {p.placements} on {p.device_mesh}: expected all to be cut over one "
                "dimension of one mesh, as fully_shard does; make one optimizer for each mesh, and do without tensor "
                "parallelism"
            )
        where, found[m.key] = here, place.dim % p.ndim
    mesh = next(m.param.device_mesh for m in members if isinstance(m.param, DTensor))
    return *(where or (mesh, 0)), found
