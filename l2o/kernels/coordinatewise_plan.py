"""What the kernels of coordinatewise.cpp are told of tensors: structures, and a `Plan` for each set of shapes.

What does not change from step to step is checked and described once for each set: an update of a small model takes no
longer than Python's work for it.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from l2o.kernels.arrays import Floats, Int64s, Pointers, floats, whole_numbers
from l2o.ops.coordinatewise import ACTIVATIONS, NOMINAL, Nominal, Product, Recipe
from l2o.ops.statistics import GROUPS

Shapes = tuple[torch.Size, ...]

ADDRESSES = ("grad", "param", "m", "v", "row", "col", "row_mean", "sums", "update")
PLACES = {name: i for i, name in enumerate(ADDRESSES)} | {"diag": ADDRESSES.index("row")}


class Field(ctypes.Structure):
    """``Field`` of coordinatewise.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("entries", "inner")),
        ("axes", ctypes.c_int64 * 5),
        *((name, ctypes.c_int64) for name in ("factored", "row_lacks_q")),
        ("count", ctypes.c_double),
    )


class Work(ctypes.Structure):
    """``Work`` of coordinatewise.h; its ``addresses`` are plain pointers here. Does not keep the tensors."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("lanes", "tensors", "groups", "m_decays", "v_decays", "factors")),
        *((name, ctypes.c_int64) for name in ("layers", "activation", "head", "threads")),
        *((name, Int64s) for name in ("codes", "widths", "lane_strides", "net_strides")),
        ("fields", ctypes.POINTER(Field)),
        ("constants", Floats),
        *((name, Pointers) for name in ("addresses", "weights")),
        *((name, ctypes.c_void_p) for name in ("gains", "means", "output_sums", "decays")),
        *((name, ctypes.c_float) for name in ("rms_eps", "diag_eps", "scale_eps", "clip")),
    )


@dataclass(frozen=True, eq=False)
class Plan:
    """What the kernels are told of tensors of certain shapes.

    work: without addresses, number of threads and strides of weights; keeps the arrays it points to.
    places: of each source in the table of addresses.     first: of each tensor, its gradient among the sources.
    sums: shapes of the sums of squares of each tensor.
    """

    work: Work
    places: tuple[int, ...]
    first: tuple[int, ...]
    sums: tuple[tuple[int, ...], ...]


@functools.lru_cache(maxsize=512)
def plan_of(
    recipe: Recipe, lanes: int, flat_axes: tuple[int, ...], shapes: Shapes, counts: tuple[int, ...] | None
) -> Plan | None:
    """Return the plan of the sources, or None where the kernel would not stay inside its arrays.

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
        tuple(len(ADDRESSES) * i + PLACES[name] for i, own in enumerate(tensors) for name in own),
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
    """Say how a tensor lies, with rows and columns where it has ``axes`` (`l2o.ops.factored.factored_axes`)."""
    field = Field(entries=math.prod(shape))
    if axes is not None:
        first, last = sorted(axes)
        between, behind = shape[first + 1 : last], shape[last + 1 :]
        field.axes = math.prod(shape[:first]), shape[first], math.prod(between), shape[last], math.prod(behind)
        field.factored, field.row_lacks_q = 1, axes[1] == last
    return field


def _work(recipe: Recipe, lanes: int, fields: Sequence[Field], decays: tuple[int, int, int], width: int) -> Work:
    return Work(
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
