"""Second moments of a matrix by its rows and columns (Adafactor, Shazeer and Stern 2018, arXiv 1804.04235, section 3).

As in google/learned_optimization (learned_optimizers/common.py), from which the epsilons are. Slots: ``row`` and
``col`` of a tensor of two and more axes, ``diag`` of the others, which are not factored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from l2o.ops.moments import momenta
from l2o.types import Slots

_EPS_SQUARE = 1e-30
"""Added to squared gradients."""
_EPS = 1e-9
"""Under roots and in quotients."""


def factored_axes(shape: torch.Size) -> tuple[int, int] | None:
    """The second largest axis and the largest, of equal ones the later as the larger; None for less than two axes.

    The reference asks `numpy.argsort`, which need not be stable: numpy 2 on a processor with AVX2 swaps the two of
    ``(16, 16, 3, 3)``, but not those of ``(3, 3, 16, 16)`` or of any three axes; without AVX2 it swaps none.
    """
    if len(shape) < 2:
        return None
    by_size = sorted(range(len(shape)), key=lambda axis: shape[axis])  # a stable sort
    return by_size[-2], by_size[-1]


def init_factored(param: Tensor, decays: int) -> Slots:
    """Zeros: ``row [decays, *shape]`` without the largest axis and ``col`` without the second largest, or ``diag``."""

    def zeros(like: Tensor) -> Tensor:
        return torch.zeros_like(like).expand(decays, *like.shape).clone()

    axes = factored_axes(param.shape)
    if axes is None:
        return {"diag": zeros(param)}
    second, largest = axes
    return {"row": zeros(_mean(param, largest)), "col": zeros(_mean(param, second))}


def factored(previous: Slots, grad: Tensor, decays: Tensor) -> Slots:
    """The slots with ``grad`` averaged in.  decays: ``[decays]``, brought into 0 to 1."""
    squares, decays = grad.square() + _EPS_SQUARE, decays.clamp(0.0, 1.0)
    axes = factored_axes(grad.shape)
    if axes is None:
        return {"diag": momenta(previous["diag"], squares, decays)}
    second, largest = axes
    return {
        "row": momenta(previous["row"], _mean(squares, largest), decays),
        "col": momenta(previous["col"], _mean(squares, second), decays),
    }


def rows_and_columns(slots: Slots, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """``row`` and ``col`` as views ``[decays, *shape]``; without factors, ``diag`` twice."""
    axes = factored_axes(shape)
    if axes is None:
        return slots["diag"], slots["diag"]
    second, largest = axes
    whole = (-1, *shape)
    return slots["row"].unsqueeze(largest + 1).expand(whole), slots["col"].unsqueeze(second + 1).expand(whole)


def factors(slots: Slots, shape: torch.Size) -> Slots:
    """Of two and more axes: ``row, col`` and ``row_factor, col_factor``, with 1 for the axis that they are without.

    The factors are the inverse roots of rows over their mean, which is that of the whole tensor, and of columns. Their
    product is the inverse root of the second moment that the slots stand for.
    """
    second, largest = factored_axes(shape) or (0, 0)
    row, col = slots["row"].unsqueeze(largest + 1), slots["col"].unsqueeze(second + 1)
    measured = row / (_mean(row, second + 1, keepdim=True) + _EPS)
    factor = {f"{name}_factor": torch.rsqrt(x.clamp(min=_EPS)) for name, x in (("row", measured), ("col", col))}
    return {"row": row, "col": col, **factor}


def diagonal_factor(diag: Tensor) -> Tensor:
    """The inverse root of the second moment of a tensor that is not factored; a gradient's factor."""
    return torch.rsqrt((diag + _EPS).clamp(min=_EPS))


def preconditioner(slots: Slots, shape: torch.Size) -> Tensor:
    """``[decays, *shape]``, the inverse root of the second moment that the slots stand for; a gradient's factor."""
    if factored_axes(shape) is None:
        return diagonal_factor(slots["diag"])
    factor = factors(slots, shape)
    return factor["row_factor"] * factor["col_factor"]


def _mean(x: Tensor, axis: int, keepdim: bool = False) -> Tensor:
    """0, not NaN, over an axis of no entries: such a tensor must not disturb those it shares sums with."""
    return x.sum(axis, keepdim=keepdim) / max(x.shape[axis], 1)
