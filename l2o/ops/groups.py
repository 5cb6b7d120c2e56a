"""Tensors of one shape in one operation for all: the number of operations does not grow with that of tensors."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from l2o.types import LOCAL, Grads, Infos, OptState, Reduce, Slots, Sum

SMALL = 1 << 14
"""Entries up to which stacking tensors costs less than an operation for each of them, where copies are all it saves."""

Step = Callable[[Tensor, Slots], tuple[Tensor, Slots]]
"""From the gradient and the slots of one tensor to its update and its new slots."""


class Group(NamedTuple):
    """Tensors of one shape, whole and here.

    names: of ``k`` tensors.    shape: of each as a whole.
    grad: ``[k, *shape]``, of what is here.    slots: ``[k, ...]``.
    """

    names: Sequence[str]
    shape: tuple[int, ...]
    grad: Tensor
    slots: Slots

    def each(self, step: Step) -> Iterator[tuple[str, Tensor, Slots]]:
        """Give what ``step`` makes of each tensor, by name: updates and slots, in ``step``'s shapes."""
        if len(self.names) == 1:
            update, slots = step(self.grad[0], {slot: t[0] for slot, t in self.slots.items()})
            yield self.names[0], update, slots
            return
        updates, stacked = vmap(step)(self.grad, self.slots)
        yield from zip(self.names, updates.unbind(), unstacked(stacked, len(self.names)), strict=True)


def by_shape(grads: Grads, state: OptState, infos: Infos, together: float = math.inf) -> list[Group]:
    """Return groups of all tensors.  together: entries up to which tensors share a group."""
    names: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for name, g in grads.items():
        names[g.shape, infos[name].shape, None if g.numel() <= together else name].append(name)
    return [
        Group(
            some,
            infos[some[0]].shape,
            stack([grads[name] for name in some]),
            {slot: stack([state.per_param[name][slot] for name in some]) for slot in state.per_param[some[0]]},
        )
        for some in names.values()
    ]


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """Stack ``[k, *shape]``; a large tensor that is the only one of its shape is not copied."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def unstacked(slots: Slots, count: int) -> list[Slots]:
    """Return the slots of each of ``count`` tensors, of which ``slots`` has ``[count, ...]``."""
    parts = {slot: t.unbind() for slot, t in slots.items()}
    return [{slot: each[i] for slot, each in parts.items()} for i in range(count)]


def shard_sums(groups: Sequence[Group], sums: Sequence[Mapping[str, Sum]], reduce: Reduce) -> list[Slots]:
    """Return what ``reduce.shards`` makes of the sums of each group, ``[k, ...]``; their axes are those of one
    tensor."""
    if reduce is LOCAL:
        return [{key: each.value for key, each in own.items()} for own in sums]
    single = {
        name: {key: Sum(each.value[i], each.axes) for key, each in own.items()}
        for group, own in zip(groups, sums, strict=True)
        for i, name in enumerate(group.names)
    }
    found = reduce.shards(single)
    return [
        {key: torch.stack([found[name][key] for name in group.names]) for key in own}
        for group, own in zip(groups, sums, strict=True)
    ]


def tensor_sum(groups: Sequence[Group], values: Sequence[Tensor], reduce: Reduce) -> Tensor:
    """Return what ``reduce.tensors`` makes of the values of each group, ``[k, ...]``."""
    if reduce is LOCAL:
        return torch.cat(list(values)).sum(0)
    pairs = zip(groups, values, strict=True)
    return reduce.tensors({name: x[i] for group, x in pairs for i, name in enumerate(group.names)})


def matrix_sums(group: Group, reduce: Reduce, sums: dict[str, Tensor]) -> list[Tensor]:
    """Complete the sums ``[k, ...]`` over rows, columns or all entries of matrices."""
    first, others = (0,), tuple(range(1, len(group.shape)))
    axes = {"rows": first, "columns": others, "all": first + others}
    (found,) = shard_sums([group], [{name: Sum(x, axes[name]) for name, x in sums.items()}], reduce)
    return list(found.values())
