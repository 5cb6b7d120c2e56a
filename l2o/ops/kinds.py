"""What a parameter tensor is for, where nobody says so, and what its width makes of a step."""

from __future__ import annotations

import math

from torch import Tensor

from l2o.types import Kind, Params


def default_kinds(params: Params) -> dict[str, Kind]:
    """``matrix`` for tensors of two and more axes, ``vector`` for the others."""
    return {name: "matrix" if p.ndim >= 2 else "vector" for name, p in params.items()}


def width_multiplier(param: Tensor, kind: Kind) -> Tensor:
    """``1 / fan_in`` of a hidden matrix, 1 of all else, 0-d: the factor on a step under which widths train alike.

    Maximal update parametrisation of learned optimizers (µLO, arXiv 2406.00153, section 4): hidden matrices 1 / fan_in,
    input, output and bias tensors 1. Of ``[out, in, ...]``, as `torch.nn` has it, fan_in is all but the first axis. The
    model itself is the user's: variance 1 / fan_in at hidden layers, output layer zero at first and divided by width.
    What a matrix is for says the ``kind`` of its parameter group; in meta-training all matrices count as hidden.
    """
    fan_in = math.prod(param.shape[1:]) if kind == "matrix" else 1
    return param.new_full((), 1.0 / max(fan_in, 1))
