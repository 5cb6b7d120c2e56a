"""Settings that are sampled for each lane: ranges, and what is drawn from them."""

from __future__ import annotations

import torch
from torch import Tensor

from l2o.checks import check_each, check_float, check_int
from l2o.random import log_uniform
from l2o.types import ConfigurationError

Range = tuple[float, float] | None
"""(lowest, highest), or None for a setting that does not vary."""


def check_range(name: str, value: Range, most: float, least: float = 0.0) -> None:
    """Raises `ConfigurationError` for what is not None nor two numbers with least <= lowest <= highest <= most."""
    if value is not None:
        check_each(name, value, lambda part, number: check_float(part, number, least))
        _check_ends(name, value, most)


def check_log_range(name: str, value: Range) -> None:
    """Raises `ConfigurationError` for what is not None nor two positive numbers, the lower one first."""
    if value is not None:
        check_each(name, value, lambda part, number: check_float(part, number, above=0.0))
        _check_ends(name, value)


def check_whole_range(name: str, value: Range, least: int = 1, most: float = 2.0**24) -> None:
    """Raises `ConfigurationError` for what is not None nor two whole numbers, the lower one first, in those bounds."""
    if value is not None:
        check_each(name, value, lambda part, number: check_int(part, number, least))
        _check_ends(name, value, most)


def _check_ends(name: str, value: tuple[float, float], most: float = float("inf")) -> None:
    if len(value) != 2 or not value[0] <= value[1] <= most:
        limit = "" if most == float("inf") else f" <= {most:g}"
        raise ConfigurationError(f"{name}={list(value)}: expected [lowest, highest] with lowest <= highest{limit}")


def log_whole(generator: torch.Generator, lanes: int, low: float, high: float) -> Tensor:
    """Return int64 ``[lanes]``: whole numbers from ``low`` to ``high``, both included, log-uniform."""
    return log_uniform(generator, lanes, low=low, high=high + 1).long().clamp(int(low), int(high))
