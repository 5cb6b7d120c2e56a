"""Tensors of one shape in one operation for all: the number of operations does not grow with that of tensors."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.func import vmap

from l2o.ops.numeric import watched
from l2o.types import LOCAL, Grads, Infos, OptState, Reduce, Slots, Sum

SMALL = 1 << 14
"""Entries up to which stacking tensors costs less than an operation for each of them, where copies are all it saves."""

Key = TypeVar("Key", bound=Sequence[Hashable])

Step = Callable[[Tensor, Slots], tuple[Tensor, Slots]]
"""From the gradient and the slots of one tensor to its update and its new slots."""


class Group(NamedTuple):
    """Tensors of one shape, whole and here.

    names: of ``k`` tensors.    shape: of each as a whole.
    grad: ``[k, *shape]``, of what is here.    slots: ``[k, ...]``.    table: whether they are embeddings.
    """

    names: Sequence[str]
    shape: tuple[int, ...]
    grad: Tensor
    slots: Slots
    table: bool = False

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
    tables = tables_of(infos)
    for name, g in grads.items():
        names[g.shape, infos[name].shape, name in tables, None if g.numel() <= together else name].append(name)
    return [
        Group(
            some,
            infos[some[0]].shape,
            stack([grads[name] for name in some]),
            {slot: stack([state.per_param[name][slot] for name in some]) for slot in state.per_param[some[0]]},
            some[0] in tables,
        )
        for some in names.values()
    ]


def tables_of(infos: Infos) -> set[str]:
    """Return the names of embeddings: matrices of rows that are looked up.

    Where no tensor is said to be an embedding or an output, as with ``model.parameters()``, the first matrix of those
    that come before any vector is taken for one, if it has more rows than columns, is not alone, and no vector has as
    many entries, as a bias would, and no other matrix as many inputs, as the layer after would.
    """
    kinds = {info.kind for info in infos.values()}
    if "embedding" in kinds:
        return {name for name, info in infos.items() if info.kind == "embedding" and len(info.shape) == 2}
    if "output" in kinds:
        return set()
    first = takewhile(lambda item: len(item[1].shape) == 2, infos.items())
    tall = next(((name, info.shape[0]) for name, info in first if info.shape[0] > info.shape[1]), None)
    if tall is None:
        return set()
    name, rows = tall
    others = [info.shape for other, info in infos.items() if other != name]
    used = (math.prod(shape[1:] or shape) for shape in others)
    return {name} if others and rows not in used else set()


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """Stack ``[k, *shape]``; not copied where there is one tensor alone, or where they lie stacked in memory, as slots
    do that `unstacked` gave, and nothing is differentiated."""
    first = tensors[0]
    if len(tensors) == 1:
        return first.unsqueeze(0)
    distance = _distance(tensors)
    if not distance:
        return torch.stack(list(tensors))
    return first.as_strided((len(tensors), *first.shape), (distance, *first.stride()))


def _distance(tensors: Sequence[Tensor]) -> int:
    """Entries from each tensor in memory to the next of the same kind, 0 where they do not lie so."""
    first = tensors[0]
    if torch.is_grad_enabled() or not all(type(t) is Tensor for t in tensors) or watched():
        return 0
    if any(t.shape != first.shape or t.stride() != first.stride() or t.dtype != first.dtype for t in tensors):
        return 0
    places = [int(t.storage_offset()) for t in tensors]
    step, memory = places[1] - places[0], first.untyped_storage().data_ptr()
    regular = step > 0 and places == list(range(places[0], places[0] + len(places) * step, step))
    return step if regular and all(t.untyped_storage().data_ptr() == memory for t in tensors) else 0


def bundles(tensors: Mapping[Key, Tensor]) -> list[list[Key]]:
    """Return the keys, ``(…, slot)``, of tensors to `stack` for one operation: those of one slot and shape that share
    memory, and small ones that have their own."""
    if torch.is_grad_enabled() or watched():
        return [[key] for key in tensors]
    found: dict[tuple[object, ...], list[Key]] = defaultdict(list)
    for key, t in tensors.items():
        memory = t.untyped_storage()
        own = memory.nbytes() == t.nbytes and t.numel() <= SMALL
        found[key[-1], t.shape, t.dtype, None if own else memory.data_ptr()].append(key)
    return list(found.values())


def is_same(a: Tensor, b: Tensor) -> bool:
    """Say whether ``a`` and ``b``, of one shape and dtype, are known to be one in memory."""
    return not watched() and (a.shape, a.stride(), a.data_ptr()) == (b.shape, b.stride(), b.data_ptr())


def unstacked(slots: Slots, count: int) -> list[Slots]:
    """Return the slots of each of ``count`` tensors, of which ``slots`` has ``[count, ...]``."""
    parts = {slot: t.unbind() for slot, t in slots.items()}
    return [{slot: each[i] for slot, each in parts.items()} for i in range(count)]


def split(whole: Slots, counts: Sequence[int]) -> list[Slots]:
    """Return what each group has, ``[k, ...]``, of ``[tensors, ...]``.  counts: of the groups' tensors."""
    parts = {name: t.split(counts) for name, t in whole.items()}
    return [{name: each[i] for name, each in parts.items()} for i in range(len(counts))]


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


def whole_sums(groups: Sequence[Group], sums: Slots, reduce: Reduce) -> Slots:
    """Return what ``reduce.shards`` makes of sums over all entries, ``[tensors]``, in the order of the groups."""
    if reduce is LOCAL:
        return sums
    tensors = [(name, tuple(range(len(group.shape)))) for group in groups for name in group.names]
    single = {name: {key: Sum(x[i], axes) for key, x in sums.items()} for i, (name, axes) in enumerate(tensors)}
    found = reduce.shards(single)
    return {key: torch.stack([found[name][key] for name, _ in tensors]) for key in sums}


def tensor_sum(groups: Sequence[Group], values: Tensor, reduce: Reduce) -> Tensor:
    """Return what ``reduce.tensors`` makes of ``values [tensors, ...]``, of the groups' tensors in their order."""
    if reduce is LOCAL:
        return values.sum(0)
    names = [name for group in groups for name in group.names]
    return reduce.tensors(dict(zip(names, values.unbind(), strict=True)))


def matrix_sums(group: Group, reduce: Reduce, sums: dict[str, Tensor]) -> list[Tensor]:
    """Complete the sums ``[k, ...]`` over rows, columns or all entries of matrices."""
    first, others = (0,), tuple(range(1, len(group.shape)))
    axes = {"rows": first, "columns": others, "all": first + others}
    (found,) = shard_sums([group], [{name: Sum(x, axes[name]) for name, x in sums.items()}], reduce)
    return list(found.values())
