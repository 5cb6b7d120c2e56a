"""Moments of gradients of all tensors and lanes at once: a custom op, ``l2o::moments``, with a kernel for the CPU.

As `l2o.kernels.coordinatewise`, and in its library: float32 tensors of the CPU take the kernel, all others, and
derivatives, `l2o.ops.statistics.advanced`.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from l2o.kernels.arrays import Floats, Pointers, derivative_of, floats
from l2o.kernels.build import available, run
from l2o.kernels.coordinatewise_cpu import at_hand, ordinary, threads_for
from l2o.kernels.coordinatewise_plan import Field, geometry
from l2o.kernels.deferred import current
from l2o.kernels.lanes import lowered
from l2o.ops.factored import averaged, factored_axes
from l2o.ops.statistics import Decays, advanced
from l2o.types import Grads, Infos, Params, Reduce, Slots, Updates

_ADDRESSES = ("grad", "m", "v", "diag", "m_new", "v_new", "diag_new", "row", "col", "update", "param", "had_gradient")
MOMENTS = ("m", "v", "diag")
"""Slots with a number for each entry and decay."""
HAD_GRADIENT = "had_gradient"
"""The slot of a mask, bool ``[*shape]``, of a rule that does not rest: entries without move by no update."""
_NO_FACTORS = -2
"""In place of an axis, of tensors that have neither rows and columns nor ``diag``."""


class _Moments(ctypes.Structure):
    """``Moments`` of moments.h; its ``addresses`` are plain pointers here. Does not keep the tensors."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("lanes", "tensors", "m_decays", "v_decays", "factors", "threads")),
        ("fields", ctypes.POINTER(Field)),
        ("decays", ctypes.c_void_p),
        ("addresses", Pointers),
        ("steps", Floats),
        ("clip", ctypes.c_float),
    )


def advance_statistics(
    slots: Mapping[str, Slots], grads: Grads, infos: Infos, decays: Decays, reduce: Reduce, clip: float = math.inf
) -> dict[str, Slots]:
    """Return slots of `l2o.ops.statistics.init_statistics` of each tensor with its gradient averaged in.

    decays: those of factored moments are brought into 0 to 1.     clip: gradients are clipped to ± this.
    Within `l2o.kernels.deferred`, only rows and columns are new.
    """
    decays = decays._replace(factored=decays.factored.clamp(0.0, 1.0))
    axes = [axis for name in grads for axis in factored_axes(infos[name].shape) or (-1, -1)]
    if (waiting := current()) is None:
        new = _advance(slots, grads, decays, axes, clip)
    else:
        waiting.decays, waiting.clip = decays, clip
        new = _summed(slots, grads, decays, axes, clip)
    sums: dict[str, Slots] = {
        name: {slot: x for slot, x in own.items() if slot in ("row", "col")} for name, own in new.items()
    }
    factors = averaged(slots, sums, infos, decays.factored, reduce)
    return {name: own | factors[name] for name, own in new.items()}  # in place of the sums


def _summed(slots: Mapping[str, Slots], grads: Grads, decays: Decays, axes: list[int], clip: float) -> dict[str, Slots]:
    """See `_advance`; moments as they were, that is, sums with the averages of no decays."""
    moments = {name: {slot: own[slot] for slot in MOMENTS if slot in own} for name, own in slots.items()}
    none = {name: {slot: t[:0] for slot, t in own.items()} for name, own in moments.items()}
    new = _advance(none, grads, Decays(*(d[:0] for d in decays)), axes, clip)
    return {name: new[name] | moments[name] for name in grads}


def write(
    slots: Mapping[str, Slots],
    grads: Grads,
    decays: Decays,
    clip: float,
    params: Params,
    updates: Updates,
    factors: Mapping[str, tuple[float, float]],
) -> None:
    """Average gradients into `MOMENTS`, note in `HAD_GRADIENT` which are not 0, and move parameters where one never
    was: each where there is such a slot, in place, in one pass.

    factors: ``lr, keep`` of ``p <- keep p + lr update``.     updates: finite.
    All tensors but masks float32 of the CPU, slots and parameters contiguous; the kernel is `available`.
    """
    kept, rows = [], []
    for name in factors:
        own, read = slots[name], {"grad": grads[name].contiguous(), "update": updates[name].contiguous()}
        kept.append(read)  # as long as the kernel runs
        written = {slot: own[slot] for slot in MOMENTS if slot in own}
        every = {**read, **written, **{f"{slot}_new": t for slot, t in written.items()}, "param": params[name]}
        every |= {HAD_GRADIENT: own[HAD_GRADIENT]} if HAD_GRADIENT in own else {}
        rows += [every[key].data_ptr() if key in every else None for key in _ADDRESSES]
    joined = torch.cat(list(decays))
    work = _Moments(1, len(factors), *map(len, decays), threads_for(sum(grads[name].numel() for name in factors)))
    work.fields = (Field * len(factors))(*(Field(entries=params[name].numel()) for name in factors))
    work.decays, work.clip, work.addresses = joined.data_ptr(), clip, (ctypes.c_void_p * len(rows))(*rows)
    work.steps = floats([x for pair in factors.values() for x in pair])
    run("coordinatewise", "l2o_moments", work)


def advance_moments(slots: Mapping[str, Slots], grads: Grads, decays: Decays) -> dict[str, Slots]:
    """Return ``m`` and ``v`` of each tensor with its gradient averaged in."""
    return _advance(slots, grads, decays, [_NO_FACTORS] * (2 * len(grads)), math.inf)


def _advance(
    slots: Mapping[str, Slots], grads: Grads, decays: Decays, axes: list[int], clip: float
) -> dict[str, Slots]:
    """See `advanced`, of each tensor."""
    if not grads:
        return {}
    sources = [
        t for (name, g), axis in zip(grads.items(), axes[::2], strict=True) for t in (g, *_old(slots[name], axis))
    ]
    if at_hand([*decays, *sources]):
        flat = lowered(lambda lanes, own: _moments(clip, lanes, axes, *own), [list(decays), sources])
    else:
        flat = in_torch(clip, 0, axes, list(decays), sources)
    results = iter(flat)
    return {name: {slot: next(results) for slot in _results(axis)} for name, axis in zip(grads, axes[::2], strict=True)}


def _old(slots: Slots, axis: int) -> list[Tensor]:
    return [slots[slot] for slot in ("m", "v", *(("diag",) if axis == -1 else ()))]


def _results(axis: int) -> tuple[str, ...]:
    """What there is of a tensor, by the first of its axes."""
    return "m", "v", *(("diag",) if axis == -1 else ("row", "col") if axis >= 0 else ())


@torch.library.custom_op("l2o::moments", mutates_args=())
def _moments(
    clip: float, lanes: int, axes: Sequence[int], decays: Sequence[Tensor], sources: Sequence[Tensor]
) -> list[Tensor]:
    """lanes: 0 where tensors have no axis of lanes.     axes: two of each tensor.     decays: see `Decays`.

    sources: gradient, ``m``, ``v`` and, of a tensor without rows and columns, ``diag``. Returns ``m``, ``v``, and
    ``diag`` or the sums for ``row`` and ``col``.
    """
    found = _by_kernel(clip, lanes, axes, decays, sources)
    return in_torch(clip, lanes, axes, decays, sources) if found is None else found


def in_torch(
    clip: float, lanes: int, axes: Sequence[int], decays: Sequence[Tensor], sources: Sequence[Tensor]
) -> list[Tensor]:
    """Do what ``_moments`` does, tensors ``[lanes, ...]``, in torch's operations."""
    found, rest = [], list(sources)
    for second, largest in zip(axes[::2], axes[1::2], strict=True):
        grad, *old = (rest.pop(0) for _ in range(4 if second == -1 else 3))
        pair = (second, largest) if second >= 0 else None

        def one(
            grad: Tensor, old: list[Tensor], decays: Sequence[Tensor], pair: tuple[int, int] | None = pair
        ) -> Slots:
            return advanced(dict(zip(("m", "v", "diag"), old, strict=False)), grad, Decays(*decays), pair, clip)

        new = (vmap(one) if lanes else one)(grad, old, list(decays))
        found += [new[slot] for slot in _results(second)]
    return found


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.clip, ctx.lanes, ctx.axes, decays, sources = inputs
    ctx.save_for_backward(*decays, *sources)


def _derivative(ctx: Any, d_outputs: Sequence[Tensor | None]) -> tuple[Any, ...]:
    def again(*tensors: Tensor) -> list[Tensor]:
        return in_torch(ctx.clip, ctx.lanes, ctx.axes, tensors[:3], tensors[3:])

    found = derivative_of(again, ctx.saved_tensors, d_outputs)
    return None, None, None, found[:3], found[3:]


_moments.register_autograd(_derivative, setup_context=_keep)


def _by_kernel(
    clip: float, lanes: int, axes: Sequence[int], decays: Sequence[Tensor], sources: Sequence[Tensor]
) -> list[Tensor] | None:
    """None where the kernel does not fit, or cannot be had."""
    if not ordinary([*decays, *sources]):
        return None
    plan = _plan(lanes, tuple(axes), tuple(t.shape for t in decays), tuple(t.shape for t in sources))
    if plan is None or not available("coordinatewise"):
        return None
    work, places, shapes = plan
    sources = [t.contiguous() for t in sources]
    results = [sources[0].new_empty(shape) for shape in shapes]
    table: list[int | None] = [None] * (len(_ADDRESSES) * work.tensors)
    for place, t in zip(places, [*sources, *results], strict=True):
        table[place] = t.data_ptr()
    joined = torch.cat(list(decays), -1)
    own = _Moments.from_buffer_copy(work)
    own.decays, own.clip = joined.data_ptr(), clip
    own.threads = threads_for(sum(t.numel() for t in sources) // 3)
    own.addresses = (ctypes.c_void_p * len(table))(*table)
    run("coordinatewise", "l2o_moments", own)
    return results


@functools.lru_cache(maxsize=512)
def _plan(
    lanes: int, axes: tuple[int, ...], decays: tuple[torch.Size, ...], shapes: tuple[torch.Size, ...]
) -> tuple[_Moments, tuple[int, ...], tuple[tuple[int, ...], ...]] | None:
    """Work without addresses; the places of sources and results in its table of addresses; shapes of the results.

    None where the kernel would not stay inside its arrays.
    """
    first = (lanes,) if lanes else ()
    counts = [shape[-1] if shape else 0 for shape in decays]
    if [tuple(shape) for shape in decays] != [(*first, n) for n in counts]:
        return None
    expected: list[tuple[int, ...]] = []
    inputs: list[int] = []
    outputs: list[int] = []
    results: list[tuple[int, ...]] = []
    fields = []
    at = 0
    for i, (second, largest) in enumerate(zip(axes[::2], axes[1::2], strict=True)):
        shape = tuple(shapes[at][len(first) :])
        if second >= 0 and not (largest != second and max(second, largest) < len(shape)):
            return None
        every = {slot: (*first, n, *shape) for slot, n in zip(("m", "v", "diag"), counts, strict=True)}
        every |= {
            slot: (*first, *shape[:axis], *shape[axis + 1 :]) for slot, axis in (("row", largest), ("col", second))
        }
        old = ("m", "v", "diag") if second == -1 else ("m", "v")
        expected += [(*first, *shape), *(every[slot] for slot in old)]
        results += [every[slot] for slot in _results(second)]
        inputs += [len(_ADDRESSES) * i + _ADDRESSES.index(name) for name in ("grad", *old)]
        new = (slot if slot in ("row", "col") else f"{slot}_new" for slot in _results(second))
        outputs += [len(_ADDRESSES) * i + _ADDRESSES.index(name) for name in new]
        fields.append(geometry(torch.Size(shape), (second, largest) if second >= 0 else None))
        at += 1 + len(old)
    if [tuple(shape) for shape in shapes] != expected:
        return None
    sizes = dict(zip(("m_decays", "v_decays", "factors"), counts, strict=True))
    work = _Moments(lanes=max(lanes, 1), tensors=len(fields), fields=(Field * len(fields))(*fields), **sizes)
    return work, (*inputs, *outputs), tuple(results)
