"""`l2o.rules.Steered` over the entries of all tensors, in place: one lane, float32, on the CPU.

What is not about entries (controller, schedule, orthogonalisation) stays in torch, between the kernel's three passes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from l2o.kernels.arrays import plain
from l2o.kernels.build import available, run

PATHS = ("adam", "normalized", "orthogonal")
_SUMS = 4


class _Tensor(ctypes.Structure):
    """``Tensor`` of steered.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("path", "rows", "cols")),
        *((name, ctypes.c_void_p) for name in ("grad", "param", "m", "second", "row", "col", "count")),
        *((name, ctypes.c_double) for name in ("keep", "scale")),
        ("sums", ctypes.c_double * _SUMS),
    )


class _Step(ctypes.Structure):
    """``Step`` of steered.cpp. Keeps the array of tensors, but not their memory."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tensors", "threads")),
        *((name, ctypes.c_double) for name in ("momentum", "beta1", "beta2")),
        ("tensor", ctypes.POINTER(_Tensor)),
    )


class Matrix(NamedTuple):
    """A tensor as a matrix ``[rows, cols]`` on one of ``PATHS``; slots by name, as `l2o.rules.Steered` has them."""

    path: str
    rows: int
    cols: int
    grad: Tensor
    param: Tensor
    slots: Mapping[str, Tensor]

    def description(self) -> _Tensor:
        """For the kernel."""
        second = self.slots.get("d", self.slots.get("v"))
        pointers = {name: t.data_ptr() for name in ("row", "col", "count") if (t := self.slots.get(name)) is not None}
        return _Tensor(
            path=PATHS.index(self.path),
            rows=self.rows,
            cols=self.cols,
            grad=self.grad.data_ptr(),
            param=self.param.data_ptr(),
            m=self.slots["m"].data_ptr(),
            second=None if second is None else second.data_ptr(),
            **pointers,
        )


class Steps:
    """One step of some matrices. The methods are called in their order; tensors are written to."""

    def __init__(self, matrices: Sequence[Matrix], momentum: float, beta1: float, beta2: float) -> None:
        self._kept = matrices  # their memory
        self._tensors = (_Tensor * len(matrices))(*(m.description() for m in matrices))
        self._step = _Step(len(matrices), torch.get_num_threads(), momentum, beta1, beta2, self._tensors)

    def look(self) -> Tensor:
        """Sums ``[matrices, 4]``, float64: gradient times last direction; squares of gradient, direction, parameter."""
        run("steered", "l2o_steered_look", self._step)
        return torch.tensor([list(t.sums) for t in self._tensors], dtype=torch.float64)

    def advance(self, scales: Sequence[float], keeps: Sequence[float]) -> None:
        """Moments, and ``param <- keep param + scale direction`` but for orthogonal matrices.

        These find Nesterov's momentum in the slot ``d``, where their new direction is to be before `finish`.
        """
        for tensor, scale, keep in zip(self._tensors, scales, keeps, strict=True):
            tensor.scale, tensor.keep = scale, keep
        run("steered", "l2o_steered_advance", self._step)

    def finish(self) -> None:
        """Brings the directions of orthogonal matrices to size, and moves their parameters."""
        run("steered", "l2o_steered_finish", self._step)


def fits(matrices: Sequence[Matrix]) -> bool:
    """Whether the kernel can be had, and would stay inside the arrays of ``matrices``."""
    tensors = [t for m in matrices for t in (m.grad, m.param, *m.slots.values())]
    shapes = all(m.grad.shape == m.param.shape == m.slots["m"].shape for m in matrices)
    return (
        bool(matrices)
        and shapes
        and plain(tensors)
        and all(t.is_contiguous() for t in tensors)
        and available("steered")
    )
