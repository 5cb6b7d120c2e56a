"""Torch tensors as the plain C arrays that kernels take."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from l2o.ops.numeric import watched

Int64s, Floats, Pointers = (ctypes.POINTER(t) for t in (ctypes.c_int64, ctypes.c_float, ctypes.c_void_p))
"""Fields of a structure that keep the array they are given."""


def plain(tensors: Iterable[Tensor], anywhere: bool = False) -> bool:
    """Say whether all, of any shape, are float32 tensors that have memory, and no transform of torch is watching,
    forward mode included.

    anywhere: on any device, not on the CPU alone.
    """
    if watched():
        return False
    ordinary = (Tensor, torch.nn.Parameter)
    kinds = {(type(t), t.dtype, t.is_cpu) for t in tensors}  # few, of a thousand tensors
    return all(kind in ordinary and dtype == torch.float32 and (anywhere or cpu) for kind, dtype, cpu in kinds)


def derivative_of(
    reference: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], cotangents: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Differentiate for ``backward`` of a kernel's function; with a graph where grad mode is on.

    reference: what the kernel computes, in torch's operations: the outputs that ``cotangents`` belong to, from
        ``inputs``, those of the function as it was given them.     cotangents: None for 0.
    Returns a gradient like each input, None for 0.
    """
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that what an input was itself computed from other inputs by is not differentiated here.
        leaves = [t.view_as(t) if graph else t.detach().requires_grad_(t.requires_grad) for t in inputs]
        pairs = zip(reference(*leaves), cotangents, strict=True)
    outputs = [(out, d) for out, d in pairs if d is not None and out.requires_grad]
    moving = [t for t in leaves if t.requires_grad]
    if not (outputs and moving):
        return [None] * len(leaves)
    grads = iter(
        torch.autograd.grad(
            [out for out, _ in outputs], moving, [d for _, d in outputs], create_graph=graph, materialize_grads=True
        )
    )
    return [next(grads) if t.requires_grad else None for t in leaves]


def dense_lanes(t: Tensor) -> Tensor:
    """Return ``t [lanes, *shape]``, each lane contiguous; lanes may share memory, as those of `Tensor.expand` do."""
    shared = t.stride(0) == 0 and t[0].is_contiguous()
    return t if shared else t.contiguous()


def laid_out_as(t: Tensor, like: Tensor) -> Tensor:
    """Return ``t [*shape]`` with its entries where ``like [*shape]`` has them; itself where they are."""
    return t if t.stride() == like.stride() else torch.empty_like(like).copy_(t)


def pointers(tensors: Sequence[Tensor]) -> ctypes.Array[Any]:
    """Return those of each tensor's first element, of tensors of any shape; the tensors have to outlive them."""
    return (ctypes.c_void_p * len(tensors))(*[t.data_ptr() for t in tensors])


def whole_numbers(values: Sequence[int]) -> ctypes.Array[Any]:
    """Return an array of int64."""
    return (ctypes.c_int64 * len(values))(*values)


def floats(values: Sequence[float]) -> ctypes.Array[Any]:
    """Return an array of float32."""
    return (ctypes.c_float * len(values))(*values)
