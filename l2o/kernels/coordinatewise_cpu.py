"""The kernels of coordinatewise.cpp, called; `l2o.kernels.coordinatewise` says when."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from l2o.kernels.arrays import Floats, Int64s, Pointers, dense_lanes, floats, pointers, whole_numbers
from l2o.kernels.build import available, run
from l2o.ops.coordinatewise import ACTIVATIONS, NOMINAL, Nominal, Product, Recipe
from l2o.ops.factored import factored_axes
from l2o.ops.statistics import GROUPS
from l2o.types import Slots

_ADDRESSES = ("grad", "param", "m", "v", "row", "col", "sums", "update")


class _Field(ctypes.Structure):
    """``Field`` of coordinatewise.h. Does not keep the tensors."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("entries", "inner")),
        ("axes", ctypes.c_int64 * 5),
        *((name, ctypes.c_int64) for name in ("factored", "row_lacks_q")),
        ("count", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in _ADDRESSES),
    )


class _Work(ctypes.Structure):
    """``Work`` of coordinatewise.h. Keeps the arrays it points to, but not the tensors."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("lanes", "tensors", "groups", "m_decays", "v_decays", "factors")),
        *((name, ctypes.c_int64) for name in ("layers", "nets", "activation", "head", "threads")),
        *((name, Int64s) for name in ("codes", "widths", "lane_strides", "net_strides")),
        ("weights", Pointers),
        ("fields", ctypes.POINTER(_Field)),
        *((name, ctypes.c_void_p) for name in ("gains", "means", "output_sums")),
        ("constants", Floats),
        *((name, ctypes.c_float) for name in ("rms_eps", "diag_eps", "scale_eps", "clip")),
    )


class Inputs(NamedTuple):
    """What the network has: weights ``w0, b0, w1, ...``, ``[1 or tensors, ...]`` after the lanes; sources by tensor."""

    weights: Sequence[Tensor]
    gains: Tensor
    means: Tensor | None
    sums: Sequence[Tensor]
    sources: Sequence[Slots]


def feature_sums(recipe: Recipe, lanes: int, sources: Sequence[Slots]) -> list[Tensor] | None:
    """None where the kernel does not fit, or cannot be had."""
    if not (_fit(recipe, lanes, sources) and available("coordinatewise")):
        return None
    sources = _dense(sources)
    width = _channels(recipe, lanes, sources[0])
    sums = [
        own["grad"].new_zeros(*own["grad"].shape[: bool(lanes)], width, *recipe.sums_shape(_shape(own, lanes)))
        for own in sources
    ]
    fields = [_field(recipe, lanes, own, 1, total, None) for own, total in zip(sources, sums, strict=True)]
    run("coordinatewise", "l2o_feature_sums", _work(recipe, lanes, sources, fields, [width]))
    return sums


def coordinatewise(recipe: Recipe, lanes: int, counts: Sequence[int], inputs: Inputs) -> list[Tensor] | None:
    """Updates, then sums of outputs; None where the kernel does not fit, or cannot be had."""
    if not (_fit(recipe, lanes, inputs.sources) and _network_fits(recipe, lanes, inputs) and available("coordinatewise")):
        return None
    sources, like = _dense(inputs.sources), inputs.gains
    weights = [dense_lanes(t) if lanes else t.contiguous() for t in inputs.weights]
    sums = [t.contiguous() for t in inputs.sums]
    gains, means = inputs.gains.contiguous(), None if inputs.means is None else inputs.means.contiguous()
    updates = [torch.empty_like(own["param"]) if recipe.head else None for own in sources]
    biases = weights[1::2]
    totals = like.new_empty(*gains.shape, biases[-1].shape[-1])
    fields = [
        _field(recipe, lanes, own, *each) for own, *each in zip(sources, counts, sums, updates, strict=True)
    ]
    work = _work(recipe, lanes, sources, fields, [sums[0].shape[bool(lanes)], *(b.shape[-1] for b in biases)])
    axis = 1 if lanes else 0
    work.layers, work.nets = len(biases), max(t.shape[axis] for t in weights)
    work.lane_strides = whole_numbers([t.stride(0) if lanes else 0 for t in weights])
    work.net_strides = whole_numbers([t.stride(axis) if t.shape[axis] > 1 else 0 for t in weights])
    work.weights, work.gains, work.output_sums = pointers(weights), gains.data_ptr(), totals.data_ptr()
    work.means = None if means is None else means.data_ptr()
    run("coordinatewise", "l2o_coordinatewise", work)
    return [*(t for t in updates if t is not None), totals]


def _dense(sources: Sequence[Slots]) -> list[Slots]:
    return [{name: t.contiguous() for name, t in own.items()} for own in sources]


def _shape(own: Slots, lanes: int) -> torch.Size:
    return own["grad"].shape[bool(lanes) :]


def _fit(recipe: Recipe, lanes: int, sources: Sequence[Slots]) -> bool:
    """Whether dtypes, devices and shapes are such that the kernel stays inside its arrays."""
    if not sources or not all(_ordinary(own.values()) for own in sources):
        return False
    decays, seconds, factors = _decays(lanes, sources)
    return (seconds in (0, 1, decays)) and (factors in (0, decays)) and all(
        {name: t.shape for name, t in own.items()} == _shapes(recipe, lanes, own, (decays, seconds, factors))
        for own in sources
    )


def _ordinary(tensors: Iterable[Tensor]) -> bool:
    return all(type(t) in (Tensor, torch.nn.Parameter) and t.dtype == torch.float32 and t.is_cpu for t in tensors)


def _decays(lanes: int, sources: Sequence[Slots]) -> tuple[int, int, int]:
    """How many momenta, second moments and factored moments there are of a tensor."""
    axis = 1 if lanes else 0
    factors = [t.shape[axis] for own in sources for name, t in own.items() if name in ("row", "diag")]
    v = sources[0].get("v")
    return sources[0]["m"].shape[axis], 0 if v is None else v.shape[axis], factors[0] if factors else 0


def _shapes(recipe: Recipe, lanes: int, own: Slots, decays: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
    """What the sources of a tensor have to be."""
    shape = _shape(own, lanes)
    axes = factored_axes(shape) or (0, 0)
    row, col = ((*shape[:axis], *shape[axis + 1 :]) for axis in reversed(axes))
    first = (lanes,) if lanes else ()
    momenta, seconds, factors = ((*first, n) for n in decays)
    every = {
        "grad": (*first, *shape),
        "param": (*first, *shape),
        "m": (*momenta, *shape),
        "v": (*seconds, *shape),
        "row": (*factors, *row),
        "col": (*factors, *col),
        "diag": (*factors, *shape),
    }
    return {name: every[name] for name in recipe.sources(len(shape))}


def _network_fits(recipe: Recipe, lanes: int, inputs: Inputs) -> bool:
    rest = [*inputs.weights, inputs.gains, *inputs.sums, *(() if inputs.means is None else (inputs.means,))]
    tensors, first = len(inputs.sources), (lanes,) if lanes else ()
    if not _ordinary(rest) or inputs.gains.shape != (*first, tensors):
        return False
    width = _channels(recipe, lanes, inputs.sources[0])
    sums = [(*first, width, *recipe.sums_shape(_shape(own, lanes))) for own in inputs.sources]
    widths = [width, *(b.shape[-1] for b in inputs.weights[1::2])]
    layers = [shape for pair in pairwise(widths) for shape in (pair, pair[1:])]
    nets = [t.shape[len(first)] for t in inputs.weights]
    return (
        [t.shape for t in inputs.sums] == sums
        and [t.shape for t in inputs.weights] == [(*first, n, *shape) for n, shape in zip(nets, layers, strict=True)]
        and all(n in (1, tensors) for n in nets)
        and (recipe.head is None or widths[-1] >= recipe.head.least_outputs)
        and (inputs.means is None or inputs.means.shape == (*first, tensors, widths[-1]))
        and (inputs.means is not None or not (isinstance(recipe.head, Nominal) and recipe.head.needs_means))
    )


def _channels(recipe: Recipe, lanes: int, own: Slots) -> int:
    momenta, seconds, factors = _decays(lanes, [own])
    counts = {"m": momenta, "m_over_rms": momenta, "factored_m": momenta}
    counts |= dict.fromkeys(("v", "inv_rms", "grad_over_rms"), seconds)
    counts |= dict.fromkeys(("factored_grad", "row", "col", "inv_root_row", "inv_root_col"), factors)
    return sum(counts.get(group, 1) for group in recipe.groups)


def _field(
    recipe: Recipe, lanes: int, own: Slots, count: int, sums: Tensor, update: Tensor | None
) -> _Field:
    shape = _shape(own, lanes)
    entries = math.prod(shape)
    field = _Field(entries=entries, count=count)
    field.inner = math.prod(shape[axis] for axis in recipe.scaled_axes(len(shape)))
    found = {**own, "row": own.get("row", own.get("diag")), "sums": sums, "update": update}
    for name in _ADDRESSES:
        if (t := found.get(name)) is not None:
            setattr(field, name, t.data_ptr())
    axes = factored_axes(shape)
    if axes is not None and "row" in own:
        first, last = sorted(axes)
        cuts = (shape[:first], shape[first : first + 1], shape[first + 1 : last], shape[last : last + 1], shape[last + 1 :])
        field.axes = tuple(math.prod(part) for part in cuts)
        field.factored, field.row_lacks_q = 1, axes[1] == last
    return field


def _work(
    recipe: Recipe, lanes: int, sources: Sequence[Slots], fields: Sequence[_Field], widths: Sequence[int]
) -> _Work:
    """What both kernels read.  widths: of the layers, channels first."""
    head = {type(None): 0, Product: 1, Nominal: 2}[type(recipe.head)]
    decays, seconds, factors = _decays(lanes, sources)
    return _Work(
        lanes=max(lanes, 1),
        tensors=len(fields),
        groups=len(recipe.groups),
        m_decays=decays,
        v_decays=seconds,
        factors=factors,
        activation=list(ACTIVATIONS).index(recipe.activation),
        head=head,
        threads=torch.get_num_threads(),
        codes=whole_numbers([GROUPS.index(group) for group in recipe.groups]),
        widths=whole_numbers(widths),
        fields=(_Field * len(fields))(*fields),
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
