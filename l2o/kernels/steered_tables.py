"""What the kernel of `l2o.kernels.steered` reads: the structures of steered.h, and where in them tensors go."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from l2o.kernels.arrays import plain

SLOTS: Mapping[str, Mapping[str, str]] = {
    "adam": {"m": "m", "v": "v", "count": "count"},
    "normalized": {"m": "m", "row": "row", "col": "col"},
    "diagonal": {"m": "m", "d": "d", "v": "v"},
    "orthogonal": {"m": "m", "d": "d"},
    "given": {"d": "d"},
    "eigenbasis": {"m": "turned", "d": "d", "v": "v"},
}
"""Those that the kernel reads and writes, by path, in the order of ``Path`` of steered.h, and by the arrays that they
are there; the direction of ``given`` ones comes from elsewhere before `FusedSteps.finish`."""
_BASES = ({"left": "left", "row_basis": "rows"}, {"right": "right", "column_basis": "columns"})
"""Further ones of a basis, of each side that has more than one entry."""
FACTS = ("is_matrix", "sized", "fan", "entries", "table", "rare", "width", "columns_in", "rows_in")
"""Numbers that say how far a tensor goes, see steered.h."""
CONSTANTS = (
    *("momentum", "fresh1", "fresh2", "memory", "cautious", "by_signal", "due", "carried", "step", "total", "limit"),
    *("log_lr", "warmup", "decays", "fall", "haste", "matrix", "fan_in", "relative", "by_gain", "longer"),
    *("deep", "gain", "slope", "band_up", "band_down", "fast", "slow", "sure", "range", "leak", "own", "more"),
)
"""Of a step, see steered.h."""
SHARED = {"log_step": "log_step", "fast_mean": "fast", "slow_mean": "slow", "square_mean": "square"}
SHARED |= {"missing": "missing", "long_mean": "long"}
"""What the controller keeps, by field."""
NETWORK = {"w0": "decide_w0", "b0": "decide_b0", "w1": "decide_w1", "b1": "decide_b1"}
"""What of θ a perceptron that decides is, by field."""
_SIZES = ("path", "rows", "cols")
_ARRAYS = (
    *("grad", "param", "m", "d", "v", "row", "col", "count"),
    *("left", "right", "row_basis", "column_basis", "free", "own"),
    *("near", "far", "factor"),
)
_NUMBERS = (*FACTS, "before", "after", "near_new", "far_new", "momenta", "keep", "rate", "scale")
_HEAD = ("tensors", "threads", "looked")
_SUMS = 4
_ONLY = np.zeros(1, np.int64)


class _Tensor(ctypes.Structure):
    """``Tensor`` of steered.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_void_p) for name in _ARRAYS),
        *((name, ctypes.c_double) for name in _NUMBERS),
        ("sums", ctypes.c_double * _SUMS),
    )


_FIELDS = [*_SIZES, *_ARRAYS, *_NUMBERS]
_WIDTH = ctypes.sizeof(_Tensor) // 8
"""Fields of a tensor, of eight bytes each: tensors are a table with a column for each field."""
_FACTORS, _DECIDED = ([_FIELDS.index(name) for name in names] for names in (("rate", "keep"), ("before", "after")))
_FIRST = len(_HEAD)
"""The place of the first constant of a step."""


class Step(ctypes.Structure):
    """``Step`` of steered.h. Keeps neither the array of tensors nor their memory."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _HEAD),
        *((name, ctypes.c_double) for name in CONSTANTS),
        *((name, ctypes.c_void_p) for name in (*SHARED, *NETWORK)),
        ("tensor", ctypes.POINTER(_Tensor)),
    )


class Decided(NamedTuple):
    """What a network says, see `l2o.ops.controller`, ``push [lanes]`` and logarithms of factors ``[lanes, tensors]``,
    in the step before and in this one."""

    push: np.ndarray
    before: np.ndarray
    after: np.ndarray


class Kind(NamedTuple):
    """What of a tensor stays from step to step.

    path: of ``SLOTS``.     shape: as a matrix.     facts: ``FACTS``, by name.     free, own: whether it has such slots.
    decides: whether the kernel's perceptron decides about it.
    stride: of the parameter and all that is like it, where it is not contiguous: of channels that are last in memory.
        Columns in another order are the same to every formula, but for those of a basis; ``col`` is then in that order,
        and only the kernel's next step reads it.
    """

    path: str
    shape: tuple[int, int]
    facts: Mapping[str, float]
    free: bool = False
    own: bool = False
    decides: bool = False
    stride: tuple[int, ...] | None = None

    @property
    def slots(self) -> dict[str, tuple[str, int]]:
        """By arrays of the kernel the slots that they are, and their numbers of entries."""
        rows, columns = self.shape
        of_one = {"row": rows, "col": columns, "count": 1}
        found = {array: (slot, of_one.get(array, rows * columns)) for array, slot in SLOTS[self.path].items()}
        found |= {name: (name, n) for name, n, kept in (("free", 1, self.free), ("own", 4, self.own)) if kept}
        if self.decides:
            found |= {name: (name, 1) for name in ("near", "far", "factor")}
            found |= {"m": ("turned", rows * columns)} if self.path == "given" else {}
        if self.path == "eigenbasis":
            for side, n in zip(_BASES, self.shape, strict=True):
                arrays = _BASES[1] if columns == 1 else side  # to the kernel a column of entries is a row
                if n > 1:
                    found |= {array: (slot, n * n) for array, slot in zip(arrays, side.values(), strict=True)}
        return found


def is_channels_last(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Say whether the matrix of a tensor lies row by row in memory, in an order of columns of its own."""
    if len(shape) != 4:
        return False
    like = torch.empty(tuple(shape), device="meta", memory_format=torch.channels_last)
    return like.stride() == tuple(stride)


class Layout:
    """Where in the kernel's table what of tensors of these kinds is, made once for many steps."""

    def __init__(self, kinds: Sequence[Kind]) -> None:
        self.kinds, self.slots = kinds, [[slot for slot, _ in kind.slots.values()] for kind in kinds]
        entries = [math.prod(kind.shape) for kind in kinds]
        own = [[n, n, *(m for _, m in kind.slots.values())] for n, kind in zip(entries, kinds, strict=True)]
        self.entries = list(chain(*own))
        arrays = [["grad", "param", *kind.slots] for kind in kinds]
        laid = [{"grad", "param", "m", "d", "v"} - ({"m"} if k.path == "given" else set()) for k in kinds]  # in a basis
        each = zip(kinds, arrays, laid, strict=True)
        self.strides = [k.stride if a in here else None for k, some, here in each for a in some]
        self.work = sum(n * sum(kind.shape) for n, kind in zip(entries, kinds, strict=True))
        self.table = np.zeros((len(kinds), _WIDTH), np.int64)
        self.places = np.array([i * _WIDTH + _FIELDS.index(a) for i, some in enumerate(arrays) for a in some])
        numbers, paths = self.table.view(np.float64), list(SLOTS)
        for i, (path, (rows, columns), facts, *_) in enumerate(kinds):
            row = path == "eigenbasis" and columns == 1
            self.table[i, : len(_SIZES)] = [paths.index(path), *((columns, rows) if row else (rows, columns))]
            numbers[i, [_FIELDS.index(name) for name in FACTS]] = [facts[name] for name in FACTS]

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Say whether the kernel would stay inside its arrays, and see every entry at one place in all of them.

        tensors: gradient, parameter and slots of each, ``[*shape]``, in the order of ``entries``.
        """
        if not plain(tensors) or [t.numel() for t in tensors] != self.entries:
            return False
        if not any(self.strides):
            return all(map(Tensor.is_contiguous, tensors))
        pairs = zip(tensors, self.strides, strict=True)
        return all(t.is_contiguous() if stride is None else t.stride() == stride for t, stride in pairs)


class Lanes(ctypes.Structure):
    """``Lanes`` of steered.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("lanes", "threads", "moves")),
        ("step", ctypes.POINTER(Step)),
    )


class Tables:
    """What the kernel reads of a step: a table of tensors and one of ``steps``, ``[lanes, ...]``. Keeps no tensors.

    factors: ``lr, keep`` of ``param <- keep param + lr update``.    constants: ``CONSTANTS``, ``[lanes, constants]``.
    shared: what the controller keeps, 0-d, by the names of `l2o.ops.alignment.init_alignment`; written. Of a perceptron
        that decides also ``long``, and ``NETWORK`` of θ, which is only read. All have to outlive the kernel's calls.
    chosen: which lanes of ``tensors`` and ``shared`` these are; by default the only one.
    """

    def __init__(
        self,
        layout: Layout,
        tensors: Sequence[Tensor],
        factors: Sequence[tuple[float, float]],
        constants: np.ndarray,
        shared: Mapping[str, Tensor],
        threads: int,
        chosen: np.ndarray = _ONLY,
    ) -> None:
        lanes, places = len(constants), layout.places
        self._tensors = np.tile(layout.table, (lanes, 1, 1))
        self._tensors.view(np.float64)[..., _FACTORS] = factors
        self._tensors.reshape(lanes, -1)[:, places] = _addresses(tensors, layout.entries, chosen)
        self.steps = np.zeros((lanes, ctypes.sizeof(Step) // 8), np.int64)
        self.steps[:, :2] = len(layout.kinds), threads
        self.steps.view(np.float64)[:, _FIRST : _FIRST + len(CONSTANTS)] = constants
        fields = enumerate((*SHARED.values(), *NETWORK.values()), _FIRST + len(CONSTANTS))
        kept = {i: shared[name] for i, name in fields if name in shared}
        if kept:
            own, every = list(kept.values()), shared["log_step"].numel()
            self.steps[:, list(kept)] = _addresses(own, [t.numel() // every for t in own], chosen)
        tensor_tables = self._tensors.ctypes.data + self._tensors.strides[0] * np.arange(lanes)
        self.steps[:, -1] = tensor_tables

    @property
    def sums(self) -> np.ndarray:
        """Of each tensor, once the kernel has looked: ``[lanes, tensors, 4]``, see steered.h."""
        return self._tensors.view(np.float64)[..., -_SUMS:]

    def decide(self, decided: Decided) -> None:
        """Enter what a network says."""
        self.steps.view(np.float64)[:, _FIRST + CONSTANTS.index("more")] = decided.push
        self._tensors.view(np.float64)[..., _DECIDED] = np.stack([decided.before, decided.after], -1)

    def lanes(self, moves: bool = False, threads: int = 1) -> Lanes:
        """Return the steps of all lanes.  moves: whether parameters become their updates.  threads: over lanes."""
        return Lanes(len(self.steps), threads, moves, self.steps.ctypes.data_as(ctypes.POINTER(Step)))


def _addresses(tensors: Sequence[Tensor], entries: Sequence[int], lanes: np.ndarray) -> np.ndarray:
    """Those of the lanes' parts of ``tensors``, contiguous float32, ``[lanes, tensors]``.  lanes: indices."""
    first, bytes_of = np.array([t.data_ptr() for t in tensors]), 4 * np.array(entries)
    return first + bytes_of * lanes[:, None]
