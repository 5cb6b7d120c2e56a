"""`l2o.ops.eigenbasis` over the entries of matrices, in place: one lane, float32, on the CPU.

Products of matrices stay in torch, before, between and after the two passes; but for those by which bases follow.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from l2o.kernels.arrays import plain
from l2o.kernels.build import run
from l2o.types import L2OError

_SIZES = tuple((name, ctypes.c_int64) for name in ("matrices", "entries"))


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


class _Follow(ctypes.Structure):
    """``Follow`` of eigenbasis.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("matrices", "rows", "cols")),
        ("carried", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("left", "right", "row_basis", "column_basis", "m", "v")),
    )


def _plan(*tensors: Tensor) -> tuple[int, ...]:
    """Sizes and addresses; raises `L2OError` for what the kernel would read or write beyond, or as something else."""
    first = tensors[0]
    for t in tensors:
        if not (t.shape == first.shape and t.ndim == 3 and t.is_contiguous() and plain([t])):
            raise L2OError(f"expected contiguous float32 of {tuple(first.shape)} on the CPU, got {t.dtype} {t.shape}")
    return len(first), first[:1].numel(), *(t.data_ptr() for t in tensors)


def weigh(seen: Tensor, m: Tensor, v: Tensor, momentum: float, memory: float, cautious: bool, least: float) -> Tensor:
    """Do what `l2o.ops.eigenbasis.weighed` does: ``m`` and ``v`` are written, the direction is returned.

    seen: the gradients in the basis; all are ``[matrices, rows, columns]``, contiguous, float32, else `L2OError`.
    least: share of the mean second moment.
    """
    scaled = torch.empty_like(seen)
    matrices, entries, *addresses = _plan(seen, m, v, scaled)
    run("steered", "l2o_steered_weigh", _Weigh(matrices, entries, momentum, memory, cautious, least, *addresses))
    return scaled


def settle(direction: Tensor, grad: Tensor, d: Tensor, power: float | None) -> None:
    """Write to ``d`` the ``direction``, but for entries of which it and ``grad`` are 0, and bring it to size.

    All are ``[matrices, rows, columns]``, contiguous, float32, else `L2OError`.
    power: see `l2o.ops.scales.tempered`; 0 for a root mean square of one, None to leave the size as it is.
    """
    matrices, entries, *addresses = _plan(direction, grad, d)
    run("steered", "l2o_steered_settle", _Settle(matrices, entries, power is not None, power or 0.0, *addresses))


def follow(means: Sequence[Tensor | None], bases: Sequence[Tensor | None], m: Tensor, v: Tensor, carried: bool) -> None:
    """Do what `l2o.ops.eigenbasis.followed` does, where it is due, in place.

    means, bases: of rows and of columns, ``[matrices, n, n]``; None for a side without a basis.
    m, v: ``[matrices, rows, columns]``.    All are contiguous and float32, else `L2OError`.
    """
    matrices, _, *moments = _plan(m, v)
    rows, columns = m.shape[1:]
    addresses: list[tuple[int | None, ...]] = []
    for n, mean, basis in zip((rows, columns), means, bases, strict=True):
        if mean is None or basis is None:
            addresses.append((None, None))
            continue
        if mean.shape != (matrices, n, n):
            raise L2OError(f"expected means of {(matrices, n, n)}, got {tuple(mean.shape)}")
        addresses.append(_plan(mean, basis)[2:])
    if columns == 1:  # to the kernel a column of entries is a row
        rows, columns, addresses = columns, rows, addresses[::-1]
    (left, row_basis), (right, column_basis) = addresses
    sides = (left, right, row_basis, column_basis)
    run("steered", "l2o_steered_follow", _Follow(matrices, rows, columns, carried, *sides, *moments))
