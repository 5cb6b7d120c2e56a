"""The kernels of coordinatewise.cpp, called; `l2o.kernels.coordinatewise` says when.

What does not change from step to step is checked and described once for each set of shapes, a `Plan`: an update of a
small model takes no longer than Python's work for it.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from l2o.kernels.arrays import Floats, Int64s, Pointers, dense_lanes, floats, pointers, whole_numbers
from l2o.kernels.build import available, run
from l2o.kernels.lanes import differentiable
from l2o.ops.coordinatewise import ACTIVATIONS, NOMINAL, Nominal, Product, Recipe
from l2o.ops.statistics import GROUPS

Shapes = tuple[torch.Size, ...]

SMALL = 1 << 16
"""Elements of the largest source of any tensor, up to which autograd goes through torch's operations itself."""

_ADDRESSES = ("grad", "param", "m", "v", "row", "col", "row_mean", "sums", "update")
_PLACES = {name: i for i, name in enumerate(_ADDRESSES)} | {"diag": _ADDRESSES.index("row")}


class Field(ctypes.Structure):
    """``Field`` of coordinatewise.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("entries", "inner")),
        ("axes", ctypes.c_int64 * 5),
        *((name, ctypes.c_int64) for name in ("factored", "row_lacks_q")),
        ("count", ctypes.c_double),
    )


class _Work(ctypes.Structure):
    """``Work`` of coordinatewise.h; its ``addresses`` are plain pointers here. Does not keep the tensors."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("lanes", "tensors", "groups", "m_decays", "v_decays", "factors")),
        *((name, ctypes.c_int64) for name in ("layers", "activation", "head", "threads")),
        *((name, Int64s) for name in ("codes", "widths", "lane_strides", "net_strides")),
        ("fields", ctypes.POINTER(Field)),
        ("constants", Floats),
        *((name, Pointers) for name in ("addresses", "weights")),
        *((name, ctypes.c_void_p) for name in ("gains", "means", "output_sums")),
        *((name, ctypes.c_float) for name in ("rms_eps", "diag_eps", "scale_eps", "clip")),
    )


class Inputs(NamedTuple):
    """What the network has: weights ``w0, b0, w1, ...``, ``[1 or tensors, ...]`` after the lanes; sources one after
    the other, tensor by tensor."""

    weights: Sequence[Tensor]
    gains: Tensor
    means: Tensor | None
    sums: Sequence[Tensor]
    sources: Sequence[Tensor]


@dataclass(frozen=True, eq=False)
class Plan:
    """What the kernels are told of tensors of certain shapes.

    work: without addresses, number of threads and strides of weights; keeps the arrays it points to.
    places: of each source in the table of addresses.     first: of each tensor, its gradient among the sources.
    sums: shapes of the sums of squares of each tensor.
    """

    work: _Work
    places: tuple[int, ...]
    first: tuple[int, ...]
    sums: tuple[tuple[int, ...], ...]


def feature_sums(recipe: Recipe, lanes: int, axes: Sequence[int], sources: Sequence[Tensor]) -> list[Tensor] | None:
    """Return the sums of each tensor, as `l2o.kernels.coordinatewise_blocks` does, ``[lanes, channels, ...]``.

    None where the kernel does not fit, or cannot be had.
    """
    if not ordinary(sources):
        return None
    plan = _plan(recipe, lanes, tuple(axes), tuple(t.shape for t in sources), None)
    if plan is None or not available("coordinatewise"):
        return None
    sources = [t.contiguous() for t in sources]
    sums = [sources[0].new_zeros(shape) for shape in plan.sums]
    work, _kept = _filled(plan, sources, sums, [])
    run("coordinatewise", "l2o_feature_sums", work)
    return sums


def coordinatewise(
    recipe: Recipe, lanes: int, axes: Sequence[int], counts: Sequence[int], inputs: Inputs
) -> list[Tensor] | None:
    """Return updates like the gradients, then sums of outputs, ``[lanes, tensors, outputs]``.

    None where the kernel does not fit, or cannot be had.
    """
    weights, gains, means, sums, sources = inputs
    if not ordinary([*weights, gains, *sums, *sources, *(() if means is None else (means,))]):
        return None
    plan = _plan(recipe, lanes, tuple(axes), tuple(t.shape for t in sources), tuple(counts))
    if plan is None or not (_network_fits(recipe, lanes, plan, inputs) and available("coordinatewise")):
        return None
    sources, sums = [t.contiguous() for t in sources], [t.contiguous() for t in sums]
    weights = [dense_lanes(t) if lanes else t.contiguous() for t in weights]
    gains, means = gains.contiguous(), None if means is None else means.contiguous()
    updates = [torch.empty_like(sources[i]) for i in plan.first] if recipe.head else []
    totals = gains.new_empty(*gains.shape, weights[-1].shape[-1])
    work, _kept = _filled(plan, sources, sums, updates)
    axis = 1 if lanes else 0
    work.layers = len(weights) // 2
    work.widths = whole_numbers([sums[0].shape[axis], *(b.shape[-1] for b in weights[1::2])])
    work.lane_strides = whole_numbers([t.stride(0) if lanes else 0 for t in weights])
    work.net_strides = whole_numbers([t.stride(axis) if t.shape[axis] > 1 else 0 for t in weights])
    work.weights, work.gains, work.output_sums = pointers(weights), gains.data_ptr(), totals.data_ptr()
    work.means = None if means is None else means.data_ptr()
    run("coordinatewise", "l2o_coordinatewise", work)
    return [*updates, totals]


def _filled(
    plan: Plan, sources: Sequence[Tensor], sums: Sequence[Tensor], updates: Sequence[Tensor]
) -> tuple[_Work, object]:
    """The plan's work with addresses; and what has to live as long."""
    table: list[int | None] = [None] * (len(_ADDRESSES) * len(plan.first))
    for place, t in zip(plan.places, sources, strict=True):
        table[place] = t.data_ptr()
    table[_PLACES["sums"] :: len(_ADDRESSES)] = [t.data_ptr() for t in sums]
    if updates:
        table[_PLACES["update"] :: len(_ADDRESSES)] = [t.data_ptr() for t in updates]
    work = _Work.from_buffer_copy(plan.work)
    work.threads = threads_for(sum(sources[i].numel() for i in plan.first))
    addresses = (ctypes.c_void_p * len(table))(*table)
    work.addresses = addresses
    return work, addresses


def threads_for(elements: int) -> int:
    """How many threads share so much work: waiting for one another takes longer than a few thousand elements do."""
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


@functools.lru_cache(maxsize=512)
def _plan(
    recipe: Recipe, lanes: int, flat_axes: tuple[int, ...], shapes: Shapes, counts: tuple[int, ...] | None
) -> Plan | None:
    """Of the sources; None where the kernel would not stay inside its arrays.

    flat_axes: two of each tensor, see `l2o.kernels.coordinatewise`.     counts: see ``Field.count``; of each tensor.
    """
    tensors = _by_tensor(recipe, lanes, shapes)
    if not tensors or recipe.raw:
        return None
    decays = _decays(lanes, tensors)
    if decays[1] not in (0, 1, decays[0]) or decays[2] not in (0, decays[0]):
        return None
    axes = list(zip(flat_axes[::2], flat_axes[1::2], strict=True))
    if len(axes) != len(tensors) or any(
        own != _expected(recipe, lanes, pair, own["grad"], decays) for own, pair in zip(tensors, axes, strict=True)
    ):
        return None
    inner = [own["grad"][bool(lanes) :] for own in tensors]
    width, first = _channels(recipe, decays), (lanes,) if lanes else ()
    each = zip(inner, axes, counts or [1] * len(inner), strict=True)
    fields = [_field(recipe, shape, pair, count) for shape, pair, count in each]
    starts, at = [], 0
    for own in tensors:
        starts.append(at)
        at += len(own)
    return Plan(
        _work(recipe, lanes, fields, decays, width),
        tuple(len(_ADDRESSES) * i + _PLACES[name] for i, own in enumerate(tensors) for name in own),
        tuple(starts),
        tuple((*first, width, *recipe.sums_shape(shape)) for shape in inner),
    )


def _by_tensor(recipe: Recipe, lanes: int, shapes: Shapes) -> list[dict[str, torch.Size]]:
    found, at = [], 0
    while at < len(shapes):
        names = recipe.sources(len(shapes[at]) - bool(lanes))
        found.append(dict(zip(names, shapes[at:], strict=False)))
        at += len(names)
    return found


def _decays(lanes: int, tensors: Sequence[dict[str, torch.Size]]) -> tuple[int, int, int]:
    """How many momenta, second moments and factored moments there are of a tensor."""
    axis = 1 if lanes else 0
    factors = [shape[axis] for own in tensors for name, shape in own.items() if name in ("row", "diag")]
    v = tensors[0].get("v")
    return tensors[0]["m"][axis], 0 if v is None else v[axis], factors[0] if factors else 0


def _expected(
    recipe: Recipe, lanes: int, axes: tuple[int, int], grad: torch.Size, decays: tuple[int, int, int]
) -> dict[str, tuple[int, ...]]:
    """What the sources of a tensor have to be; nothing where ``axes`` do not fit it."""
    first, shape = (lanes,) if lanes else (), grad[bool(lanes) :]
    names = recipe.sources(len(shape))
    if "row" in names and not (axes[0] != axes[1] and all(0 <= axis < len(shape) for axis in axes)):
        return {}
    second, largest = axes
    row, col = ((*shape[:axis], *shape[axis + 1 :]) for axis in (largest, second))
    mean = tuple(1 if axis == second else n for axis, n in enumerate(shape) if axis != largest)
    momenta, seconds, factors = ((*first, n) for n in decays)
    every = {
        "grad": (*first, *shape),
        "param": (*first, *shape),
        "m": (*momenta, *shape),
        "v": (*seconds, *shape),
        "row": (*factors, *row),
        "col": (*factors, *col),
        "row_mean": (*factors, *mean),
        "diag": (*factors, *shape),
    }
    return {name: every[name] for name in names}


def _network_fits(recipe: Recipe, lanes: int, plan: Plan, inputs: Inputs) -> bool:
    tensors, first = len(plan.first), (lanes,) if lanes else ()
    axis, head = len(first), recipe.head
    widths = [plan.sums[0][axis], *(b.shape[-1] for b in inputs.weights[1::2])]
    layers = [shape for pair in pairwise(widths) for shape in (pair, pair[1:])]
    return (
        tuple(t.shape for t in inputs.sums) == plan.sums
        and all(t.shape[axis] in (1, tensors) for t in inputs.weights)
        and [t.shape for t in inputs.weights]
        == [(*first, t.shape[axis], *shape) for t, shape in zip(inputs.weights, layers, strict=True)]
        and inputs.gains.shape == (*first, tensors)
        and (head is None or widths[-1] >= head.least_outputs)
        and (inputs.means is None or inputs.means.shape == (*first, tensors, widths[-1]))
        and (inputs.means is not None or not (isinstance(head, Nominal) and head.needs_means))
    )


def _channels(recipe: Recipe, decays: tuple[int, int, int]) -> int:
    momenta, seconds, factors = decays
    counts = dict.fromkeys(("m", "m_over_rms", "factored_m"), momenta)
    counts |= dict.fromkeys(("v", "inv_rms", "grad_over_rms"), seconds)
    counts |= dict.fromkeys(("factored_grad", "row", "col", "inv_root_row", "inv_root_col"), factors)
    return sum(counts.get(group, 1) for group in recipe.groups)


def _field(recipe: Recipe, shape: torch.Size, axes: tuple[int, int], count: int) -> Field:
    field = geometry(shape, axes if "row" in recipe.sources(len(shape)) else None)
    field.inner = math.prod(shape[axis] for axis in recipe.scaled_axes(len(shape)))
    field.count = count
    return field


def geometry(shape: torch.Size, axes: tuple[int, int] | None) -> Field:
    """How a tensor lies, with rows and columns where it has ``axes`` (`l2o.ops.factored.factored_axes`)."""
    field = Field(entries=math.prod(shape))
    if axes is not None:
        first, last = sorted(axes)
        between, behind = shape[first + 1 : last], shape[last + 1 :]
        field.axes = math.prod(shape[:first]), shape[first], math.prod(between), shape[last], math.prod(behind)
        field.factored, field.row_lacks_q = 1, axes[1] == last
    return field


def _work(recipe: Recipe, lanes: int, fields: Sequence[Field], decays: tuple[int, int, int], width: int) -> _Work:
    return _Work(
        lanes=max(lanes, 1),
        tensors=len(fields),
        groups=len(recipe.groups),
        m_decays=decays[0],
        v_decays=decays[1],
        factors=decays[2],
        activation=list(ACTIVATIONS).index(recipe.activation),
        head={type(None): 0, Product: 1, Nominal: 2}[type(recipe.head)],
        codes=whole_numbers([GROUPS.index(group) for group in recipe.groups]),
        widths=whole_numbers([width]),
        fields=(Field * len(fields))(*fields),
        constants=floats(_constants(recipe)),
        rms_eps=recipe.rms_eps,
        diag_eps=recipe.rms_eps if recipe.diag_eps is None else recipe.diag_eps,
        scale_eps=recipe.scale_eps,
        clip=math.inf if recipe.clip is None else recipe.clip,
    )


def _constants(recipe: Recipe) -> list[float]:
    """Of the head, in the order of its fields."""
    head = recipe.head
    if head is None:
        return []
    if isinstance(head, Product):
        return [head.exp_mult]
    return [float(list(NOMINAL).index(head.direction)), *(float(x) for x in list(vars(head).values())[1:])]
