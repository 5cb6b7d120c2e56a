"""What the processes of a run tell each other in a step, where each holds shards of tensors, or some tensors of all."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from l2o.fused import Inputs
from l2o.types import ConfigurationError, Infos, OptState, Reduce, Slots, Sum, Updates

Group = Any
"""A process group of torch."""


class Summed(Reduce):
    """Sums over the processes of ``group``: an all-reduce for each call, none where nothing of it is elsewhere.

    axes: along which each sharded tensor is cut.    counted: tensors that count here, of those that others hold too.
    """

    def __init__(self, group: Group, axes: Mapping[str, int], counted: Iterable[str]) -> None:
        self.group, self.axes, self.counted = group, axes, frozenset(counted)

    def shards(self, sums: Mapping[str, Mapping[str, Sum]]) -> dict[str, Slots]:
        found = {name: {key: each.value for key, each in own.items()} for name, own in sums.items()}
        partial = [
            (name, key) for name, own in sums.items() for key, each in own.items() if self.axes.get(name) in each.axes
        ]
        if partial:
            flat = torch.cat([found[name][key].reshape(-1) for name, key in partial])
            dist.all_reduce(flat, group=self.group)
            for (name, key), total in zip(partial, flat.split([found[n][k].numel() for n, k in partial]), strict=True):
                found[name][key] = total.view(found[name][key].shape)
        return found

    def tensors(self, values: Mapping[str, Tensor]) -> Tensor:
        counted = [value for name, value in values.items() if name in self.counted]
        total = torch.stack(counted).sum(0) if counted else torch.zeros_like(next(iter(values.values())))
        dist.all_reduce(total, group=self.group)
        return total

    def largest(self, values: Mapping[str, Tensor]) -> Tensor:
        most = torch.stack(list(values.values())).amax(0)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.group)
        return most


class Together(Summed):
    """`Summed` where processes have other tensors each, so that a rule might not ask for the same sums in all of them.

    Before each sum all say which part of a rule it is for, and at the end that there are no more: nobody waits for a
    sum that never comes, or adds what does not belong together.
    """

    name = "rule"

    def part(self, name: str) -> Together:
        part = Together(self.group, self.axes, self.counted)
        part.name = f"{self.name}.{name}"
        return part

    def tensors(self, values: Mapping[str, Tensor]) -> Tensor:
        self._say(self.name, next(iter(values.values())))
        return super().tensors(values)

    def largest(self, values: Mapping[str, Tensor]) -> Tensor:
        self._say(self.name, next(iter(values.values())))
        return super().largest(values)

    def finish(self, like: Tensor) -> None:
        """Say that there are no more sums.  like: any tensor, for dtype and device."""
        self._say("", like)

    def _say(self, what: str, like: Tensor) -> None:
        said = zlib.crc32(what.encode())
        least = torch.tensor([said, -said], device=like.device)
        dist.all_reduce(least, dist.ReduceOp.MIN, group=self.group)
        if least.sum() != 0:
            raise ConfigurationError(
                f"the {dist.get_world_size(self.group)} processes of ZeroRedundancyOptimizer have tensors of other "
                "kinds, which the rule treats apart: expected some of each kind in each process; use fewer processes, "
                "or shard with torch.distributed.fsdp.fully_shard"
            )


def agreed(ok: Tensor, group: Group) -> Tensor:
    """Return bool, 0-d: whether ``ok`` in all processes of the group."""
    least = ok.to(torch.int32)
    dist.all_reduce(least, dist.ReduceOp.MIN, group=group)
    return least.bool()


def averaged(loss: Tensor, groups: Sequence[Group]) -> Tensor:
    """Return the mean of ``loss``, 0-d, over the processes of each of the groups."""
    mean = loss.clone()
    for group in groups:
        dist.all_reduce(mean, group=group)
        mean /= dist.get_world_size(group)
    return mean


def chunks(length: int, count: int) -> list[int]:
    """Return the lengths of ``count`` shards: equal ones, the last ones smaller or empty, as `torch.chunk` has them."""
    size = -(-length // count)
    return [max(min(size, length - i * size), 0) for i in range(count)]


def holders(whole: Sequence[str], others: Iterable[str], infos: Infos, count: int) -> dict[str, list[int]]:
    """Return the ranks that get each of the tensors ``whole``: one, that of the least work so far, which its update is
    from.

    others: tensors of which each rank has something. Rules may treat kinds of tensors apart, and then ask for sums of
    each, which all have to take part in: a rank that has no tensor of a kind gets the smallest one, too.
    """

    def work(key: str) -> float:
        """Of a product of the matrix with itself."""
        shape = infos[key].shape
        return math.prod(shape) * min(shape[0], math.prod(shape[1:]))

    load = [0.0] * count
    found: dict[str, list[int]] = {}
    for key in sorted(whole, key=lambda key: (-work(key), key)):
        rank = load.index(min(load))
        load[rank] += work(key)
        found[key] = [rank]
    known = {infos[key].kind for key in others}
    smallest = {infos[key].kind: key for key in found if infos[key].kind not in known}
    for kind, key in smallest.items():
        has = {own[0] for other, own in found.items() if infos[other].kind == kind}
        found[key] += [rank for rank in range(count) if rank not in has]
    return {key: found[key] for key in whole}


_GRAD, _PARAM = "(gradient)", "(parameter)"
"""Beside the names of slots."""


class Exchange:
    """Sends whole tensors to the processes that update them, and what comes of it to where their shards are.

    group: of processes.    holders: ranks that get each tensor; the update of the first one counts.
    axes: along which parameters are cut.    slot_axes: along which slots are, by parameter and name; None: not at all.
    """

    def __init__(
        self,
        group: Group,
        inputs: Inputs,
        holders: Mapping[str, Sequence[int]],
        axes: Mapping[str, int],
        slot_axes: Mapping[str, Mapping[str, int | None]],
    ) -> None:
        self.group, self.inputs, self.holders = group, inputs, holders
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.axes = axes
        self.here = {
            key: {_GRAD: inputs.grads[key], _PARAM: p, **inputs.state.per_param[key]}
            for key, p in inputs.params.items()
        }
        known = {key: {_GRAD: axes[key], _PARAM: axes[key], **slot_axes[key]} for key in holders}
        self.cut = {
            key: {name: axis for name in self.here[key] if (axis := own.get(name)) is not None}
            for key, own in known.items()
        }

    def gathered(self) -> Inputs:
        """Return what the rule gets here: shards, and the tensors that it updates here as wholes."""
        held = [[key for key, ranks in self.holders.items() if rank in ranks] for rank in range(self.size)]
        of = [[(key, name) for key in keys for name in self.cut[key]] for keys in held]
        mine = of[self.rank]
        shapes = [[self._shape_at(source, key, name) for key, name in mine] for source in range(self.size)]
        came = self._sent([[self.here[key][name] for key, name in some] for some in of], shapes)
        found = {key: dict(own) for key, own in self.here.items() if key not in self.holders or key in held[self.rank]}
        for (key, name), *parts in zip(mine, *came, strict=True):
            found[key][name] = torch.cat(parts, self.cut[key][name]).to(self.here[key][name].dtype)
        return self.inputs._replace(
            grads={key: own[_GRAD] for key, own in found.items()},
            params={key: own[_PARAM] for key, own in found.items()},
            state=self.inputs.state._replace(per_param={key: _slots(own) for key, own in found.items()}),
        )

    def returned(self, updates: Updates, state: OptState) -> tuple[Updates, OptState]:
        """Return the updates and the new state of what is here, where the rule's are of what it got."""
        owned = [[key for key, ranks in self.holders.items() if ranks[0] == rank] for rank in range(self.size)]
        of = [[(key, name) for key in keys for name in self.here[key] if name != _PARAM] for keys in owned]
        new = {key: {_GRAD: u, **state.per_param[key]} for key, u in updates.items()}
        parts = [self._parts(new[key][name], key, name) for key, name in of[self.rank]]
        shapes = [[self.here[key][name].shape for key, name in some] for some in of]
        came = self._sent([[part[rank] for part in parts] for rank in range(self.size)], shapes)
        found = {key: {} if key in self.holders else new[key] for key in self.here}
        for some, tensors in zip(of, came, strict=True):
            for (key, name), t in zip(some, tensors, strict=True):
                found[key][name] = t.to(self.here[key][name].dtype)
        slots = {key: _slots(own) for key, own in found.items()}
        return {key: own[_GRAD] for key, own in found.items()}, state._replace(per_param=slots)

    def _shape_at(self, rank: int, key: str, name: str) -> tuple[int, ...]:
        """Of what a process has of a tensor that is cut."""
        shape = list(self.here[key][name].shape)
        shape[self.cut[key][name]] = chunks(self.inputs.infos[key].shape[self.axes[key]], self.size)[rank]
        return tuple(shape)

    def _parts(self, whole: Tensor, key: str, name: str) -> Sequence[Tensor]:
        """What each process gets of a new tensor."""
        axis = self.cut[key].get(name)
        return [whole] * self.size if axis is None else whole.split(chunks(whole.shape[axis], self.size), axis)

    def _sent(self, sent: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[Sequence[int]]]) -> list[list[Tensor]]:
        """What came from each process, of such shapes; ``sent`` to each of them, in one message.

        Numbers go in the dtype of the arithmetic: integers stay exact below 2^24.
        """
        like = next(iter(self.inputs.params.values()))
        flat = [torch.cat([like.new_empty(0), *(t.reshape(-1).to(like.dtype) for t in some)]) for some in sent]
        lengths = [[math.prod(shape) for shape in some] for some in shapes]
        sizes = [sum(some) for some in lengths]
        out = like.new_empty(sum(sizes))
        dist.all_to_all_single(out, torch.cat(flat), sizes, [len(t) for t in flat], group=self.group)
        pieces = [t.split(some) for t, some in zip(out.split(sizes), lengths, strict=True)]
        return [
            [piece.view(tuple(shape)) for piece, shape in zip(own, some, strict=True)]
            for own, some in zip(pieces, shapes, strict=True)
        ]


def _slots(own: Slots) -> Slots:
    return {name: t for name, t in own.items() if name not in (_GRAD, _PARAM)}
