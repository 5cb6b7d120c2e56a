"""What a parameter tensor is for, where nobody says so."""

from __future__ import annotations

from l2o.types import Kind, Params


def default_kinds(params: Params) -> dict[str, Kind]:
    """``matrix`` for tensors of two and more axes, ``vector`` for the others."""
    return {name: "matrix" if p.ndim >= 2 else "vector" for name, p in params.items()}
