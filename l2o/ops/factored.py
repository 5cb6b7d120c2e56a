"""Second moments of a matrix by its rows and columns (Adafactor, Shazeer and Stern 2018, arXiv 1804.04235, section 3).

As in google/learned_optimization (learned_optimizers/common.py), from which the epsilons are. Slots: ``row`` and
``col`` of a tensor of two and more axes, ``diag`` of the others, which are not factored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from l2o.ops.moments import momenta
from l2o.types import Infos, ParamInfo, Reduce, Slots, Sum

_EPS_SQUARE = 1e-30
"""Added to squared gradients."""
_EPS = 1e-9
"""Under roots and in quotients."""


def factored_axes(shape: Sequence[int]) -> tuple[int, int] | None:
    """Return the second largest axis and the largest, of equal ones the later as the larger; None for less than two
    axes.

    The reference asks `numpy.argsort`, which need not be stable: numpy 2 on a processor with AVX2 swaps the two of
    ``(16, 16, 3, 3)``, but not those of ``(3, 3, 16, 16)`` or of any three axes; without AVX2 it swaps none.
    """
    if len(shape) < 2:
        return None
    by_size = sorted(range(len(shape)), key=lambda axis: shape[axis])  # a stable sort
    return by_size[-2], by_size[-1]


def init_factored(param: Tensor, info: ParamInfo, decays: int) -> Slots:
    """Return zeros for ``param``: ``row [decays, *shape]`` without the largest axis and ``col`` without the second
    largest, or ``diag``."""

    def zeros(like: Tensor) -> Tensor:
        return torch.zeros_like(like).expand(decays, *like.shape).clone()

    axes = factored_axes(info.shape)
    if axes is None:
        return {"diag": zeros(param)}
    second, largest = axes
    return {"row": zeros(param.sum(largest)), "col": zeros(param.sum(second))}


def diagonal(previous: Tensor, grad: Tensor, decays: Tensor) -> Tensor:
    """Return ``previous``, ``[decays, *shape]``, of a tensor without factors, with ``grad [*shape]`` averaged in."""
    return momenta(previous, grad.square() + _EPS_SQUARE, decays)


def square_sums(grad: Tensor, axes: tuple[int, int] | None) -> Slots:
    """Return sums of squares of ``grad [*shape]`` over the axes that ``row`` and ``col`` lack; none without
    ``axes``."""
    if axes is None:
        return {}
    second, largest = axes
    squares = grad.square() + _EPS_SQUARE
    return {"row": squares.sum(largest), "col": squares.sum(second)}


def averaged(
    previous: Mapping[str, Slots], sums: Mapping[str, Slots], infos: Infos, decays: Tensor, reduce: Reduce
) -> dict[str, Slots]:
    """Return ``row`` and ``col``, ``[decays, ...]``, of each tensor with its `square_sums` averaged in."""
    slots: tuple[str, str] = ("col", "row")  # the one lacks the second largest axis, the other the largest
    lengths = {name: dict(zip(slots, factored_axes(infos[name].shape) or (), strict=False)) for name in sums}
    totals = reduce.shards(
        {name: {slot: Sum(x, (lengths[name][slot],)) for slot, x in own.items()} for name, own in sums.items()}
    )
    return {
        name: {
            slot: momenta(previous[name][slot], x / _length(infos[name], lengths[name][slot]), decays)
            for slot, x in own.items()
        }
        for name, own in totals.items()
    }


def row_means(slots: Mapping[str, Slots], infos: Infos, reduce: Reduce) -> dict[str, Tensor | None]:
    """Return the mean of each tensor's ``row`` over the axis that it has, ``[decays, ...]``; None without factors."""
    sums = {}
    for name, own in slots.items():
        axes = factored_axes(infos[name].shape)
        sums[name] = {} if axes is None else {"row": Sum(own["row"].sum(_in_row(*axes), keepdim=True), axes[:1])}
    return {
        name: total["row"] / _length(infos[name], sums[name]["row"].axes[0]) if total else None
        for name, total in reduce.shards(sums).items()
    }


def _in_row(second: int, largest: int) -> int:
    """The second largest axis among those of ``row``, of which the first is that of the decays."""
    return second + 1 if second < largest else second


def factors(slots: Slots, row_mean: Tensor, axes: tuple[int, int]) -> Slots:
    """Return ``row, col`` and ``row_factor, col_factor``, ``[decays, *shape]`` with 1 for the axis that they are
    without.

    row_mean: see `row_means`.     axes: see `factored_axes`.
    The factors are the inverse roots of rows over their mean and of columns. Their product is the inverse root of the
    second moment that the slots stand for.
    """
    second, largest = axes
    row, col = slots["row"].unsqueeze(largest + 1), slots["col"].unsqueeze(second + 1)
    measured = (slots["row"] / (row_mean + _EPS)).unsqueeze(largest + 1)
    factor = {f"{name}_factor": torch.rsqrt(x.clamp(min=_EPS)) for name, x in (("row", measured), ("col", col))}
    return {"row": row, "col": col, **factor}


def diagonal_factor(diag: Tensor) -> Tensor:
    """Return the inverse root of the second moment ``diag [decays, *shape]``, unfactored; a gradient's factor."""
    return torch.rsqrt((diag + _EPS).clamp(min=_EPS))


def _length(info: ParamInfo, axis: int) -> int:
    """1 of no entries: the mean is then 0, not NaN, which would disturb the tensors that it shares sums with."""
    return max(info.shape[axis], 1)
