"""Torch tensors as the plain C arrays that kernels take."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from l2o.types import L2OError

Int64s, Floats, Pointers = (ctypes.POINTER(t) for t in (ctypes.c_int64, ctypes.c_float, ctypes.c_void_p))
"""Fields of a structure that keep the array they are given."""


def plain(tensors: Iterable[Tensor], anywhere: bool = False) -> bool:
    """Whether all are float32 tensors that have memory, and no transform of torch is watching.

    anywhere: on any device, not on the CPU alone.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    ordinary = (Tensor, torch.nn.Parameter)
    return all(type(t) in ordinary and t.dtype == torch.float32 and (anywhere or t.is_cpu) for t in tensors)


def first_derivative_only(kernel: str) -> None:
    """For ``backward`` of a kernel's function. Raises `L2OError` where its result is to be differentiated again.

    Not torch's once_differentiable, which drops second derivatives silently where what comes in is constant.
    """
    if torch.is_grad_enabled():
        raise L2OError(
            f"create_graph=True: the CPU kernel of {kernel} has first derivatives only; L2O_KERNELS=0 has all"
        )


def dense_lanes(t: Tensor) -> Tensor:
    """``[lanes, *shape]``, each lane contiguous; lanes may share memory, as those of `Tensor.expand` do."""
    shared = t.stride(0) == 0 and t[0].is_contiguous()
    return t if shared else t.contiguous()


def pointers(tensors: Sequence[Tensor]) -> ctypes.Array[Any]:
    """Of each tensor's first element; the tensors have to outlive them."""
    return (ctypes.c_void_p * len(tensors))(*[t.data_ptr() for t in tensors])


def whole_numbers(values: Sequence[int]) -> ctypes.Array[Any]:
    """int64."""
    return (ctypes.c_int64 * len(values))(*values)


def floats(values: Sequence[float]) -> ctypes.Array[Any]:
    """float32."""
    return (ctypes.c_float * len(values))(*values)
