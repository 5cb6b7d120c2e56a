"""How far tensors go in a step, from their shapes and from the size that they have."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from l2o.ops.numeric import constant, entries_of, of_shapes, safe_sqrt
from l2o.ops.orthogonal import as_matrix, is_matrix
from l2o.types import Theta

_FAN_IN = 64.0
"""Inputs of the matrix whose step has no factor."""
_LEAST_LIMIT = 3e-4
"""Of the root mean square of a matrix' step, so that matrices of zeros get on."""

Shapes = Sequence[tuple[int, ...]]


def matrix_factors(theta: Theta, shapes: Shapes) -> Tensor:
    """Return ``matrix * (fan-in / 64) ** -fan_in``, of θ, ``[len(shapes)]``; 1 for what is no matrix."""
    fans = of_shapes(lambda shape: math.log(_fan_in(shape) / _FAN_IN), shapes, theta["log_lr"])
    factors = torch.exp(theta["log_matrix"] - fans * theta["fan_in"])
    return torch.where(_are_matrices(shapes, factors), factors, constant(1.0, factors))


def limited(scales: Tensor, squares: Tensor, shapes: Shapes, relative: Tensor, by_gain: float) -> Tensor:
    """Return ``scales [len(shapes)]``, softly limited for matrices: see ``relative`` of `l2o.rules.Steered`, 0-d here.

    squares: ``[len(shapes)]``, sums over their parameters.
    """
    sizes = safe_sqrt(squares / of_shapes(entries_of, shapes, squares))
    roots = of_shapes(lambda shape: _fan_in(shape) ** 0.5, shapes, squares)
    share = relative * (sizes * roots).clamp(max=1.0) ** by_gain
    limits = share * sizes + _LEAST_LIMIT * (_FAN_IN**0.5 / roots if by_gain else 1.0)
    found = scales / (1.0 + (scales / limits).square()).sqrt()
    return torch.where(_are_matrices(shapes, scales), found, scales)


def _are_matrices(shapes: Shapes, like: Tensor) -> Tensor:
    """Bool ``[len(shapes)]``."""
    return of_shapes(lambda shape: float(is_matrix(shape)), shapes, like) > 0.0


def _fan_in(shape: tuple[int, ...]) -> int:
    return max(as_matrix(shape)[1], 1)
