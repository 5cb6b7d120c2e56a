"""How far tensors go in a step, from their shapes and from the size that they have."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from l2o.ops.numeric import constant, entries_of, of_shapes, safe_sqrt
from l2o.ops.orthogonal import as_matrix, is_matrix
from l2o.types import Slots, Theta

_FAN_IN = 64.0
"""Inputs of the matrix whose step has no factor."""
_LEAST_LIMIT = 3e-4
"""Of the root mean square of a matrix' step, so that matrices of zeros get on."""
_USUAL = 0.3
"""Root mean square of Nesterov's momentum over the root of second moments, where gradients are mostly noise."""
_UNHELD = 1e30
"""Sum of squares of what is not to be held to its size; not infinite, which has no derivatives."""

Shapes = Sequence[tuple[int, ...]]


def fan_in(shape: tuple[int, ...]) -> int:
    """Return how many inputs a tensor has: columns of a matrix, one of a vector."""
    return max(as_matrix(shape)[1], 1)


def are_matrices(shapes: Shapes, like: Tensor) -> Tensor:
    """Return 1 for matrices and 0 for vectors and scalars, ``[len(shapes)]``."""
    return of_shapes(lambda shape: float(is_matrix(shape)), shapes, like)


def matrix_factors(theta: Theta, shapes: Shapes) -> Tensor:
    """Return ``matrix * (fan-in / 64) ** -fan_in``, of θ, ``[len(shapes)]``; 1 for what is no matrix."""
    fans = of_shapes(lambda shape: math.log(fan_in(shape) / _FAN_IN), shapes, theta["log_lr"])
    factors = torch.exp(theta["log_matrix"] - fans * theta["fan_in"])
    return torch.where(are_matrices(shapes, factors) > 0.0, factors, constant(1.0, factors))


def width_factors(shapes: Shapes, forms: Shapes, power: float) -> list[float]:
    """Return ``(inputs / 64) ** -power`` of each tensor; 1 for 64 inputs and fewer, and for vectors.

    forms: the shapes that they are sized as. A matrix has its columns as inputs, one sized as a vector its short side.
    """
    inputs = [fan_in(s) if s == form else min(as_matrix(s)) for s, form in zip(shapes, forms, strict=True)]
    widths = [n if is_matrix(s) else 1 for n, s in zip(inputs, shapes, strict=True)]
    return [max(width / _FAN_IN, 1.0) ** -power for width in widths]


def limited(
    scales: Tensor, squares: Tensor, shapes: Shapes, relative: Tensor, by_gain: float, tables: Sequence[bool]
) -> Tensor:
    """Return ``scales [len(shapes)]``, softly limited for matrices: see ``relative`` of `l2o.rules.Steered`, 0-d here.

    squares: ``[len(shapes)]``, sums over their parameters.     tables: whose gain is left out.
    """
    sizes = safe_sqrt(squares / of_shapes(entries_of, shapes, squares))
    roots = of_shapes(lambda shape: fan_in(shape) ** 0.5, shapes, squares)
    gains = (sizes * roots).clamp(max=1.0)
    if by_gain and any(tables):
        gains = torch.where(constant([float(table) for table in tables], gains) > 0, constant(1.0, gains), gains)
    share = relative * gains**by_gain
    limits = share * sizes + _LEAST_LIMIT * (_FAN_IN**0.5 / roots if by_gain else 1.0)
    found = scales / (1.0 + (scales / limits).square()).sqrt()
    return torch.where(are_matrices(shapes, scales) > 0.0, found, scales)


def lengthened(
    scales: Tensor, squares: Tensor, shapes: Shapes, forms: Shapes, tables: Sequence[bool], factor: float
) -> Tensor:
    """Return ``scales [len(shapes)]``, ``factor * (1 + size)`` times as long for what is rare (`are_rare`); the size, a
    root mean square, counts up to 1, and not where there is no limit.

    Rows of a table have a gradient now and then, and as far to go as they are long: those of `torch.nn.Embedding`
    begin at 1.

    squares, tables: as in `limited`.    forms: as in `width_factors`.
    """
    rare = are_rare(shapes, forms, tables)
    if not any(rare):
        return scales
    known = torch.where(squares < _UNHELD, squares, constant(0.0, squares))
    sizes = safe_sqrt(known / of_shapes(entries_of, shapes, known)).clamp(max=1.0)
    return torch.where(constant(rare, sizes) > 0, scales * (factor * (1.0 + sizes)), scales)


def are_rare(shapes: Shapes, forms: Shapes, tables: Sequence[bool]) -> list[float]:
    """Return 1 for each tensor whose rows have a gradient now and then, else 0: ``tables``, and what has more rows than
    columns and is sized as a vector."""
    tall = [s != form and s[0] >= as_matrix(s)[1] for s, form in zip(shapes, forms, strict=True)]
    return [float(each) for each in map(max, tall, tables)]


def tempered(x: Tensor, power: float) -> Tensor:
    """Return matrices ``x [..., rows, columns]``, their root mean square ``(rms / 0.3) ** power``; zeros stay zero."""
    squares = x.square().mean((-2, -1), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    return x * (squares.pow((power - 1.0) / 2.0) * _USUAL**-power)


def unheld(squares: Tensor, parts: Sequence[tuple[Slots, int]]) -> Tensor:
    """Return ``squares [tensors]``, beyond any limit for those that began as zeros.

    parts: slots of tensors and how many they are of; ``free``, where there is one, says which of them did.
    """
    if not any("free" in slots for slots, _ in parts):
        return squares
    free = [slots["free"].reshape(count) if "free" in slots else squares.new_zeros(count) for slots, count in parts]
    return torch.where(torch.cat(free) > 0, constant(_UNHELD, squares), squares)
