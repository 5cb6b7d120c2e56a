"""`l2o.ops.eigenbasis` over the entries of matrices, in place: one lane, float32, on the CPU.

What is not about entries (products of matrices) stays in torch, before, between and after the two passes.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from l2o.kernels.build import run

_SIZES = tuple((name, ctypes.c_int64) for name in ("matrices", "entries", "threads"))


class _Weigh(ctypes.Structure):
    """``Weigh`` of whitened.h."""

    _fields_ = (
        *_SIZES,
        *((name, ctypes.c_double) for name in ("momentum", "memory", "cautious", "least")),
        *((name, ctypes.c_void_p) for name in ("seen", "m", "v", "scaled")),
    )


class _Settle(ctypes.Structure):
    """``Settle`` of whitened.h."""

    _fields_ = (
        *_SIZES,
        *((name, ctypes.c_double) for name in ("sized", "power")),
        *((name, ctypes.c_void_p) for name in ("direction", "grad", "d")),
    )


def _sizes(t: Tensor) -> tuple[int, int, int]:
    return len(t), t[0].numel(), torch.get_num_threads()


def weigh(seen: Tensor, m: Tensor, v: Tensor, momentum: float, memory: float, cautious: bool, least: float) -> Tensor:
    """Do what `l2o.ops.eigenbasis.weighed` does: ``m`` and ``v`` are written, the direction is returned.

    seen: the gradients in the basis; all are ``[matrices, rows, columns]``, contiguous, float32.
    least: share of the mean second moment.
    """
    scaled = torch.empty_like(seen)
    addresses = (t.data_ptr() for t in (seen, m, v, scaled))
    run("steered", "l2o_steered_weigh", _Weigh(*_sizes(seen), momentum, memory, cautious, least, *addresses))
    return scaled


def settle(direction: Tensor, grad: Tensor, d: Tensor, power: float | None) -> None:
    """Write to ``d`` the ``direction``, but for entries of which it and ``grad`` are 0, and bring it to size.

    All ``[matrices, rows, columns]``, contiguous float32.     power: see `l2o.ops.scales.tempered`; 0 for a root mean
    square of one, None to leave the size as it is.
    """
    addresses = (t.data_ptr() for t in (direction, grad, d))
    run("steered", "l2o_steered_settle", _Settle(*_sizes(d), power is not None, power or 0.0, *addresses))
