"""Moments that wait: while a step in place is under way, nothing is written before all that it reads has been read.

`l2o.kernels.moments.advance_statistics` then leaves ``m``, ``v`` and ``diag`` as they were and notes the decays; the
ops of `l2o.kernels.coordinatewise` average gradients in as they read, block by block in the cache; and
`l2o.kernels.moments.write` writes moments and parameters in one last pass. Rules know nothing of it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from l2o.ops.coordinatewise import Recipe
from l2o.ops.statistics import Decays

Found = TypeVar("Found")


class NoKernelError(Exception):
    """Raised within `deferred` where a kernel does not fit or cannot be had; nothing is written then."""


@dataclass
class Deferred:
    """What moments wait for.  decays: see `Decays`; None before they are known.     clip: of gradients, to ± this."""

    decays: Decays | None = None
    clip: float = math.inf

    def joined(self, recipe: Recipe) -> Tensor:
        """Join the decays as ops take them, ``[all]``; raises `NoKernelError` where ``recipe`` clips otherwise."""
        if self.decays is None or self.clip != (math.inf if recipe.clip is None else recipe.clip):
            raise NoKernelError
        return torch.cat(list(self.decays))


_current: ContextVar[Deferred | None] = ContextVar("deferred", default=None)


def current() -> Deferred | None:
    """Return what is under way here, if anything; nothing is compiled there, and asking would break the graph."""
    return None if torch.compiler.is_compiling() else _current.get()


@contextlib.contextmanager
def deferred() -> Iterator[Deferred]:
    """Let moments wait, of whatever this thread computes within."""
    token = _current.set(now := Deferred())
    try:
        yield now
    finally:
        _current.reset(token)


def required(found: Found | None) -> Found:
    """Return what a kernel gave; raises `NoKernelError` where it gave nothing."""
    if found is None:
        raise NoKernelError
    return found
