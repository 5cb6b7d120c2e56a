"""`l2o.rules.Steered` over the entries of all tensors, in place: one lane, float32, on the CPU.

What is not about entries (controller, schedule, orthogonalisation) stays in torch, between the kernel's three passes.
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
}
"""Those that the kernel reads and writes, by path, in the order of ``Path`` of steered.h; the direction of ``given``
ones comes from elsewhere before `finish`."""
_POINTERS = ("grad", "param", "m", "d", "v", "row", "col", "count")
_ORDER = {
    path: (number, tuple(name if name in slots else "" for name in _POINTERS[2:]))
    for number, (path, slots) in enumerate(SLOTS.items())
}
"""By path: its number, and the slots that ``_POINTERS`` from ``m`` on are of."""
_LENGTHS: Mapping[str, Callable[[int, int], int]] = {
    "row": lambda rows, _: rows,
    "col": lambda _, columns: columns,
    "count": lambda *_: 1,
}
_SUMS = 4


class _Tensor(ctypes.Structure):
    """``Tensor`` of steered.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("path", "rows", "cols")),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_double) for name in ("keep", "scale")),
        ("sums", ctypes.c_double * _SUMS),
    )


_FIELDS = ctypes.sizeof(_Tensor) // 8


class _Step(ctypes.Structure):
    """``Step`` of steered.h. Keeps neither the array of tensors nor their memory."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tensors", "threads")),
        *((name, ctypes.c_double) for name in ("momentum", "beta1", "beta2", "memory", "cautious", "power")),
        ("tensor", ctypes.POINTER(_Tensor)),
    )


class Entries(NamedTuple):
    """A tensor as a matrix of ``shape`` on a path of ``SLOTS``, and the slots that `l2o.rules.Steered` has for it.

    factors: ``lr, keep`` of ``param <- keep param + lr update``.

    Channels may be last in memory; ``col`` is then in that order, and only the kernel's next step reads it.
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
        arrays = [slots[name].data_ptr() if name else 0 for name in order]
        return number, *self.shape, self.grad.data_ptr(), self.param.data_ptr(), *arrays

    @property
    def fits(self) -> bool:
        """Whether the kernel would stay inside its arrays, and see every entry at one place in all of them."""
        param, grad, slots = self.param, self.grad, self.slots
        if slots.keys() != SLOTS[self.path] or grad.shape != param.shape:
            return False
        contiguous = param.is_contiguous() and grad.is_contiguous()
        if not contiguous and (grad.stride() != param.stride() or not _channels_last(param)):
            return False
        for name, t in slots.items():
            if name in _LENGTHS:
                inside = t.is_contiguous() and t.numel() == _LENGTHS[name](*self.shape)
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

    def __init__(self, tensors: Sequence[Entries], numbers: Sequence[Tensor | float]) -> None:
        self._rates = torch.tensor([t.factors[0] for t in tensors], dtype=torch.float64, device="cpu")
        described = np.array([t.description() for t in tensors], np.int64)
        # Every field has eight bytes: a column each, written and read for all tensors at once.
        self._fields = np.zeros((len(tensors), _FIELDS), np.int64)
        self._fields[:, : described.shape[1]] = described
        self._numbers = torch.from_numpy(self._fields.view(np.float64)[:, described.shape[1] :])
        self._numbers[:, 0] = torch.tensor([t.factors[1] for t in tensors], dtype=torch.float64, device="cpu")
        table = self._fields.ctypes.data_as(ctypes.POINTER(_Tensor))
        self._step = _Step(len(tensors), torch.get_num_threads(), *map(float, numbers), table)

    def look(self) -> Tensor:
        """Return sums ``[4, tensors]``, float64: gradient times last direction; squares of gradient, direction,
        parameter."""
        run("steered", "l2o_steered_look", self._step)
        return self._numbers[:, 2:].T.clone()

    def advance(self, scales: Tensor) -> None:
        """Advance moments, and ``param <- keep param + lr scale direction`` but for what has a slot ``d``.

        Orthogonal matrices find Nesterov's momentum there, where their new direction is to be before `finish`.

        scales: ``[tensors]``.
        """
        self._numbers[:, 1] = self._rates * scales
        run("steered", "l2o_steered_advance", self._step)

    def finish(self) -> None:
        """Bring the directions of orthogonal matrices to size, and move their parameters, and those of given ones."""
        run("steered", "l2o_steered_finish", self._step)


def fused_steps(tensors: Sequence[Entries], numbers: Sequence[Tensor | float]) -> FusedSteps | None:
    """Return the kernel for one step, or None, with nothing read, where it does not fit or cannot be had.

    numbers: 0-d or plain, momentum, beta1, beta2; of diagonal ones memory, whether they are cautious, ``by_signal``.
    """
    ordinary = plain([each for t in tensors for each in (t.grad, t.param, *t.slots.values())])
    if not (ordinary and all(t.fits for t in tensors) and available("steered")):
        return None
    return FusedSteps(tensors, numbers)
