"""What unrolls of perceptrons by a kernel have in common, whatever the rule."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from l2o.kernels import perceptron
from l2o.kernels.arrays import Pointers, plain
from l2o.random import hashed_integers, several_keys
from l2o.types import InnerState, OptState, Params


class Batches(NamedTuple):
    """The training batches of several steps, of perceptrons with cross-entropy, as rows of a table.

    activation: ``relu``, ``tanh`` or ``gelu``.     layers: names of each layer's weight and bias among the parameters.
    x: float32 ``[n, in]``.     y: int64 classes ``[n]``, all below ``classes``.
    size: rows a batch.     copies: how many adjacent lanes share a problem.
    rows: int64 ``[steps, lanes / copies, size]``; none before they are drawn.
    """

    activation: str
    layers: tuple[tuple[str, str], ...]
    x: Tensor
    y: Tensor
    classes: int
    size: int
    copies: int = 1
    rows: Tensor | None = None

    @property
    def names(self) -> list[str]:
        """Of the parameters, a weight and a bias for each layer."""
        return [name for layer in self.layers for name in layer]

    def repeated(self, copies: int) -> Batches:
        """Return those of lanes that share each problem ``copies`` times."""
        return self._replace(copies=copies * self.copies)

    def drawn(self, steps: int, lanes: int, generator: torch.Generator) -> Batches:
        """Return these with the rows that ``steps`` calls of `TaskFamily.batch` would draw."""
        keys = several_keys(generator, lanes // self.copies, steps)
        return self._replace(rows=hashed_integers(keys, len(self.x), self.size))

    def problem(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> perceptron.Perceptron | None:
        """Describe one step of all lanes for a kernel, but for its images, labels and losses; None where it does not
        fit.  params, grads: ``[lanes, ...]`` in the order of ``names``; the rows need not be drawn yet."""
        lanes, x, y = len(params[0]), self.x, self.y
        table = y.dtype == torch.int64 and y.is_cpu and plain([x]) and x.ndim == 2 and y.shape == x.shape[:1]
        # A thread takes whole lanes, so there have to be as many.
        if not table or len(y) == 0 or lanes < torch.get_num_threads() or lanes % self.copies:
            return None
        found = perceptron.describe(self.activation, params, grads, (self.size, x.shape[1]))
        return found if self.classes <= params[-1].shape[-1] else None


class Unroll(ctypes.Structure):
    """``Unroll`` of unroll.h. Keeps the arrays it points to, but not the tensors."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("steps", "copies", "n", "kept")),
        *((name, ctypes.c_void_p) for name in ("x", "y", "rows", "left")),
        ("params", Pointers),
        ("losses", ctypes.c_void_p),
    )


def after(state: InnerState, params: Params, opt: OptState, losses: Tensor) -> InnerState:
    """Return ``state`` after an unroll that had these ``losses [steps, lanes]`` and ended with these parameters, by
    name, and optimizer state."""
    return state._replace(
        params={name: params[name] for name in state.params},
        opt=opt,
        step=torch.minimum(state.step + len(losses), state.total_steps),
        first_loss=torch.where(state.step == 0, losses[0].detach(), state.first_loss),
    )
