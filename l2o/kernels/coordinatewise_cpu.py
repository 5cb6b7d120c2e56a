"""The kernels of coordinatewise.cpp, called; `l2o.kernels.coordinatewise` says when."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from l2o.kernels.arrays import dense_lanes, pointers, whole_numbers
from l2o.kernels.build import available, run
from l2o.kernels.coordinatewise_plan import ADDRESSES, PLACES, Plan, Work, plan_of
from l2o.kernels.lanes import differentiable
from l2o.ops.coordinatewise import Nominal, Recipe

SMALL = 1 << 16
"""Elements of the largest source of any tensor, up to which autograd goes through torch's operations itself."""


class Inputs(NamedTuple):
    """What the network has: weights ``w0, b0, w1, ...``, ``[1 or tensors, ...]`` after the lanes; sources one after
    the other, tensor by tensor."""

    weights: Sequence[Tensor]
    gains: Tensor
    means: Tensor | None
    sums: Sequence[Tensor]
    sources: Sequence[Tensor]


def feature_sums(
    recipe: Recipe, lanes: int, axes: Sequence[int], sources: Sequence[Tensor], decays: Tensor | None = None
) -> list[Tensor] | None:
    """Return the sums of each tensor, as `l2o.kernels.coordinatewise_blocks` does, ``[lanes, channels, ...]``.

    decays: of moments that wait (`l2o.kernels.deferred`), without lanes.
    None where the kernel does not fit, or cannot be had.
    """
    if not ordinary(sources):
        return None
    plan = plan_of(recipe, lanes, tuple(axes), tuple(t.shape for t in sources), None)
    if plan is None or not (_decays_fit(plan, lanes, decays) and available("coordinatewise")):
        return None
    sources = [t.contiguous() for t in sources]
    sums = [sources[0].new_zeros(shape) for shape in plan.sums]
    work, _kept = _filled(plan, sources, sums, [])
    work.decays = None if decays is None else decays.data_ptr()
    run("coordinatewise", "l2o_feature_sums", work)
    return sums


def coordinatewise(
    recipe: Recipe,
    lanes: int,
    axes: Sequence[int],
    counts: Sequence[int],
    inputs: Inputs,
    decays: Tensor | None = None,
) -> list[Tensor] | None:
    """Return updates like the gradients, then sums of outputs, ``[lanes, tensors, outputs]``.

    decays: see `feature_sums`.
    None where the kernel does not fit, or cannot be had.
    """
    weights, gains, means, sums, sources = inputs
    if not ordinary([*weights, gains, *sums, *sources, *(() if means is None else (means,))]):
        return None
    plan = plan_of(recipe, lanes, tuple(axes), tuple(t.shape for t in sources), tuple(counts))
    if plan is None or not (fits(recipe, lanes, plan, inputs, decays) and available("coordinatewise")):
        return None
    weights = [dense_lanes(t) if lanes else t.contiguous() for t in weights]
    sources, sums = [t.contiguous() for t in sources], [t.contiguous() for t in sums]
    updates = [torch.empty_like(sources[i]) for i in plan.first] if recipe.head else []  # laid out as the kernel writes
    totals = gains.new_empty(*gains.shape, weights[-1].shape[-1])
    gains, means = gains.contiguous(), None if means is None else means.contiguous()
    work, _kept = described(plan, lanes, Inputs(weights, gains, means, sums, sources), updates)
    work.output_sums, work.decays = totals.data_ptr(), None if decays is None else decays.data_ptr()
    run("coordinatewise", "l2o_coordinatewise", work)
    return [*updates, totals]


def described(plan: Plan, lanes: int, inputs: Inputs, updates: Sequence[Tensor]) -> tuple[Work, object]:
    """Describe a network for the kernel, but for sums of outputs and decays; and what has to live as long.

    inputs: each lane contiguous, ``[lanes, ...]``.     updates: like the gradients, or none.
    """
    weights, gains, means, sums, sources = inputs
    work, kept = _filled(plan, sources, sums, updates)
    axis = 1 if lanes else 0
    work.layers = len(weights) // 2
    work.widths = whole_numbers([sums[0].shape[axis], *(b.shape[-1] for b in weights[1::2])])
    work.lane_strides = whole_numbers([t.stride(0) if lanes else 0 for t in weights])
    work.net_strides = whole_numbers([t.stride(axis) if t.shape[axis] > 1 else 0 for t in weights])
    work.weights, work.gains = pointers(weights), gains.data_ptr()
    work.means = None if means is None else means.data_ptr()
    return work, kept


def _filled(
    plan: Plan, sources: Sequence[Tensor], sums: Sequence[Tensor], updates: Sequence[Tensor]
) -> tuple[Work, object]:
    """The plan's work with addresses; and what has to live as long."""
    table: list[int | None] = [None] * (len(ADDRESSES) * len(plan.first))
    for place, t in zip(plan.places, sources, strict=True):
        table[place] = t.data_ptr()
    table[PLACES["sums"] :: len(ADDRESSES)] = [t.data_ptr() for t in sums]
    if updates:
        table[PLACES["update"] :: len(ADDRESSES)] = [t.data_ptr() for t in updates]
    work = Work.from_buffer_copy(plan.work)
    work.threads = threads_for(sum(sources[i].numel() for i in plan.first))
    addresses = (ctypes.c_void_p * len(table))(*table)
    work.addresses = addresses
    return work, addresses


def threads_for(elements: int) -> int:
    """Say how many threads share so much work: waiting for one another takes longer than a few thousand elements do."""
    return min(torch.get_num_threads(), 1 + elements // 4096)


def at_hand(tensors: Sequence[Tensor]) -> bool:
    """Say whether these, of any shape, are for kernels, which can be had; seen from within `torch.func.vmap` too.

    Small ones whose derivatives are wanted are not: to compute them again takes longer than to keep autograd's graph.
    """
    if torch.compiler.is_compiling():  # first: what asks functorch is a break in the graph
        return False
    # Custom ops have no rules for any transform but `vmap`, and none for forward mode.
    others = any(x.key() != _functorch.TransformType.Vmap for x in _functorch.get_interpreter_stack() or ())
    if forward_ad._current_level >= 0 or others or not ordinary(tensors):
        return False
    small = max((t.numel() for t in tensors), default=0) <= SMALL
    return not (small and differentiable(tensors)) and available("coordinatewise")


def ordinary(tensors: Iterable[Tensor]) -> bool:
    """Say whether all, of any shape, are float32 tensors of the CPU that have memory."""
    return all(type(t) in (Tensor, torch.nn.Parameter) and t.dtype == torch.float32 and t.is_cpu for t in tensors)


def _decays_fit(plan: Plan, lanes: int, decays: Tensor | None) -> bool:
    work = plan.work
    expected = work.m_decays + work.v_decays + work.factors
    return decays is None or (lanes == 0 and ordinary([decays]) and decays.shape == (expected,))


def fits(recipe: Recipe, lanes: int, plan: Plan, inputs: Inputs, decays: Tensor | None) -> bool:
    """Say whether a network fits its plan, so that the kernel stays inside its arrays; see `coordinatewise`.

    decays: see `feature_sums`, ``[all]``.
    """
    tensors, first = len(plan.first), (lanes,) if lanes else ()
    axis, head = len(first), recipe.head
    widths = [plan.sums[0][axis], *(b.shape[-1] for b in inputs.weights[1::2])]
    layers = [shape for pair in pairwise(widths) for shape in (pair, pair[1:])]
    return (
        _decays_fit(plan, lanes, decays)
        and tuple(t.shape for t in inputs.sums) == plan.sums
        and all(t.shape[axis] in (1, tensors) for t in inputs.weights)
        and [t.shape for t in inputs.weights]
        == [(*first, t.shape[axis], *shape) for t, shape in zip(inputs.weights, layers, strict=True)]
        and inputs.gains.shape == (*first, tensors)
        and (head is None or widths[-1] >= head.least_outputs)
        and (inputs.means is None or inputs.means.shape == (*first, tensors, widths[-1]))
        and (inputs.means is not None or not (isinstance(head, Nominal) and head.needs_means))
    )
