"""The processes that share the lanes of a run: how many there are, which lanes are ours, and sums over all of them.

The process group is torch's default one; where there is none (no ``torchrun``), there is one rank, and nothing is sent.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map

from l2o.types import ConfigurationError


class Ranks(NamedTuple):
    """This process' number among ``size``."""

    rank: int = 0
    size: int = 1

    def share(self, count: int, what: str) -> int:
        """Return how many of ``count`` things each process has; `ConfigurationError` unless they can be shared
        evenly."""
        if count % self.size:
            raise ConfigurationError(f"{what}={count}: expected a multiple of {self.size}, the number of processes")
        return count // self.size


def ranks() -> Ranks:
    """Return those of torch's default process group."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    return Ranks()


def all_sum(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sum each tensor over all processes, in one message. They have the same names, shapes and dtypes everywhere.

    Integers go as floating-point numbers and come back as integers: counts stay exact below 2^24.
    """
    if ranks().size == 1:
        return tensors
    dtype = max((t.dtype for t in tensors.values() if t.is_floating_point()), key=lambda d: d.itemsize)
    flat = torch.cat([t.reshape(-1).to(dtype) for t in tensors.values()])
    dist.all_reduce(flat)
    parts = flat.split([t.numel() for t in tensors.values()])
    return {
        name: (part if t.is_floating_point() else part.round()).to(t.dtype).reshape(t.shape)
        for (name, t), part in zip(tensors.items(), parts, strict=True)
    }


def all_rows(own: Tensor) -> Tensor:
    """Gather ``own [rows, ...]`` of every process, as many in each, one after the other by rank."""
    if ranks().size == 1:
        return own
    parts = [torch.empty_like(own) for _ in range(ranks().size)]
    dist.all_gather(parts, own.contiguous())
    return torch.cat(parts)


def gather(tree: Any) -> Any:
    """Return a nested structure of lanes as one process would have it: 0-d tensors as they are, of the others all
    rows."""
    return tree_map(lambda t: all_rows(t) if t.ndim else t, tree)


def local_part(tree: Any) -> Any:
    """Return the part of a whole structure (see `gather`) that is ours."""
    rank, size = ranks()
    return tree_map(lambda t: t.tensor_split(size)[rank].clone() if t.ndim and size > 1 else t, tree)
