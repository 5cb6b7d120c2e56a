"""`l2o.rules.Steered` over the entries of all tensors, in place: one lane, float32, on the CPU.

Products of large matrices stay in torch, between the two calls of a step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from l2o.kernels.arrays import plain
from l2o.kernels.build import available, run

SLOTS = {
    "adam": {"m", "v", "count"},
    "normalized": {"m", "row", "col"},
    "diagonal": {"m", "d", "v"},
    "orthogonal": {"m", "d"},
    "given": {"d"},
    "eigenbasis": {"turned", "d", "v", "left", "right", "rows", "columns"},
}
"""Those that the kernel reads and writes, by path, in the order of ``Path`` of steered.h; the direction of ``given``
ones comes from elsewhere before `finish`."""
_ARRAYS = ("m", "d", "v", "row", "col", "count", "left", "right", "row_basis", "column_basis", "free")
_NAMED = {"row_basis": "rows", "column_basis": "columns"}
"""Slots that the structure has by another name; so it has momentum in a basis, ``turned``, as ``m``."""
_SIDES = {"left": 0, "rows": 0, "right": 1, "columns": 1}
"""Which side of a matrix a slot of a basis is of."""
_LENGTHS: Mapping[str, Callable[[int, int], int]] = {
    "row": lambda rows, _: rows,
    "col": lambda _, columns: columns,
    "count": lambda *_: 1,
    "free": lambda *_: 1,
    **{name: lambda *shape, side=side: shape[side] ** 2 for name, side in _SIDES.items()},
}
_SUMS = 4
_UNUSUAL = 2
FACTS = ("is_matrix", "sized", "fan", "entries", "table", "rare", "width")
"""Numbers that say how far a tensor goes, see steered.h."""
CONSTANTS = (
    *("momentum", "beta1", "beta2", "memory", "cautious", "by_signal", "due", "carried", "step", "total", "limit"),
    *("log_lr", "warmup", "decays", "fall", "haste", "matrix", "fan_in", "relative", "by_gain", "longer"),
    *("deep", "gain", "slope", "band_up", "band_down", "fast", "slow", "sure", "range", "leak"),
)
"""Of a step, see steered.h."""
_SHARED = {"log_step": "log_step", "fast_mean": "fast", "slow_mean": "slow", "square_mean": "square"}
_SHARED |= {"missing": "missing"}
"""What the controller keeps, by field."""
_ORDER = {
    path: (
        number,
        tuple("turned" if (path, name) == ("eigenbasis", "m") else _NAMED.get(name, name) for name in _ARRAYS),
    )
    for number, path in enumerate(SLOTS)
}
"""By path: its number, and the slots that ``_ARRAYS`` are of, where there are such."""


class _Tensor(ctypes.Structure):
    """``Tensor`` of steered.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("path", "rows", "cols")),
        *((name, ctypes.c_void_p) for name in ("grad", "param", *_ARRAYS)),
        *((name, ctypes.c_double) for name in ("keep", "rate", *FACTS, "scale")),
        ("sums", ctypes.c_double * _SUMS),
    )


_FIELDS = ctypes.sizeof(_Tensor) // 8
_FACTS = _Tensor.is_matrix.offset // 8


class _Step(ctypes.Structure):
    """``Step`` of steered.h. Keeps neither the array of tensors nor their memory."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tensors", "threads")),
        *((name, ctypes.c_double) for name in CONSTANTS),
        *((name, ctypes.c_void_p) for name in _SHARED),
        ("tensor", ctypes.POINTER(_Tensor)),
    )


class Entries(NamedTuple):
    """A tensor as a matrix of ``shape`` on a path of ``SLOTS``, and the slots that `l2o.rules.Steered` has for it.

    factors: ``lr, keep`` of ``param <- keep param + lr update``.

    Channels may be last in memory, but not of one in a basis; ``col`` is then in that order, and only the kernel's next
    step reads it.
    """

    path: str
    shape: tuple[int, int]
    grad: Tensor
    param: Tensor
    slots: Mapping[str, Tensor]
    factors: tuple[float, float]

    def description(self) -> tuple[int, ...]:
        """Return the first fields of `_Tensor`, before ``keep``; 0 for arrays that there are none of."""
        number, order = _ORDER[self.path]
        slots = self.slots
        arrays = [slots[name].data_ptr() if name in slots else 0 for name in order]
        return number, *self.shape, self.grad.data_ptr(), self.param.data_ptr(), *arrays

    @property
    def fits(self) -> bool:
        """Whether the kernel would stay inside its arrays, and see every entry at one place in all of them."""
        param, grad, slots, shape = self.param, self.grad, self.slots, self.shape
        expected = SLOTS[self.path] - {side for side, axis in _SIDES.items() if shape[axis] == 1}
        if slots.keys() - {"free"} != expected or grad.shape != param.shape:
            return False
        contiguous = param.is_contiguous() and grad.is_contiguous()
        permuted = self.path != "eigenbasis" and grad.stride() == param.stride() and _channels_last(param)
        if not (contiguous or permuted):
            return False
        for name, t in slots.items():
            if name in _LENGTHS:
                inside = t.is_contiguous() and t.numel() == _LENGTHS[name](*shape)
            else:
                inside = t.shape == param.shape and (t.is_contiguous() if contiguous else t.stride() == param.stride())
            if not inside:
                return False
        return True


def _channels_last(t: Tensor) -> bool:
    """Whether its matrix lies row by row in memory, in an order of columns of its own, which no formula here sees."""
    return t.ndim == 4 and t.is_contiguous(memory_format=torch.channels_last)


class FusedSteps:
    """One step of some tensors. The methods are called in their order, and write to the tensors."""

    def __init__(
        self,
        tensors: Sequence[Entries],
        facts: np.ndarray,
        constants: Mapping[str, float],
        shared: Mapping[str, Tensor],
    ) -> None:
        # Every field has eight bytes: a column each, written for all tensors at once.
        self._fields = np.zeros((len(tensors), _FIELDS), np.int64)
        described = [t.description() for t in tensors]
        self._fields[:, : _FACTS - 2] = described
        numbers = self._fields.view(np.float64)
        numbers[:, _FACTS - 2 : _FACTS] = [(keep, lr) for lr, keep in (t.factors for t in tensors)]
        numbers[:, _FACTS : _FACTS + len(FACTS)] = facts
        kept = {field: shared[name].data_ptr() for field, name in _SHARED.items() if name in shared}
        table = self._fields.ctypes.data_as(ctypes.POINTER(_Tensor))
        sizes = {"tensors": len(tensors), "threads": torch.get_num_threads()}
        self._step = _Step(**sizes, **constants, **kept, tensor=table)

    def begin(self) -> bool:
        """Advance controller and moments, and parameters but of ``orthogonal`` and ``given`` tensors.

        Orthogonal matrices find Nesterov's momentum in ``d``, where their new direction is to be before `finish`.
        Returns False, with nothing written, where a number is not finite, or the norm of all gradients over its limit.
        """
        return run("steered", "l2o_steered_begin", self._step) != _UNUSUAL

    def finish(self) -> None:
        """Bring the directions of orthogonal matrices to size, and move their parameters, and those of given ones."""
        run("steered", "l2o_steered_finish", self._step)


def fused_steps(
    tensors: Sequence[Entries], facts: np.ndarray, constants: Mapping[str, float], shared: Mapping[str, Tensor]
) -> FusedSteps | None:
    """Return the kernel for one step, or None, with nothing read, where it does not fit or cannot be had.

    facts: ``FACTS`` of each tensor, ``[tensors, facts]``.     constants: ``CONSTANTS``, by name.
    shared: what the controller keeps, 0-d, by the names of `l2o.ops.alignment.init_alignment`; written.
    """
    every = [each for t in tensors for each in (t.grad, t.param, *t.slots.values())]
    if not (plain([*every, *shared.values()]) and all(t.fits for t in tensors) and available("steered")):
        return None
    return FusedSteps(tensors, facts, constants, shared)
