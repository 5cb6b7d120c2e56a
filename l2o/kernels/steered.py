"""`l2o.rules.Steered` over the entries of all tensors, float32, on the CPU: steps in place, and updates of lanes.

Products of large matrices stay in torch, between the two calls of a step; of lanes there are none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from l2o.kernels.arrays import plain
from l2o.kernels.build import available, run
from l2o.kernels.steered_tables import NETWORK, SHARED, Decided, Layout, Step, Tables

Decide = Callable[[np.ndarray], Decided]
"""Of the sums of tensors ``[lanes, tensors, 4]``: gradient times direction, and squares of gradient, direction and
parameter."""

_UNUSUAL = 2
_WEIGHTS = (16 * 16, 16, 16 * 2, 2)
"""Entries of ``NETWORK`` in the kernel."""
_WORTH_THREADS = 1 << 23
"""Products of entries, some 0.1 ms of one thread, from which several are sooner done: they wait for one another."""


class FusedSteps:
    """One step of some tensors. The methods are called in their order, and write to the tensors.

    shared: kept until then, for ``tables`` have addresses alone, and weights may be copies.
    """

    def __init__(self, tables: Tables, shared: Mapping[str, Tensor]) -> None:
        self._tables, self._shared = tables, shared
        self._step = Step.from_buffer(tables.steps.data)

    def begin(self, decide: Decide | None = None) -> bool:
        """Advance controller and moments, and parameters but of ``orthogonal`` and ``given`` tensors.

        Orthogonal matrices find Nesterov's momentum in ``d``, where their new direction is to be before `finish`.
        decide: what a network says once the kernel has looked, if one has to be asked.
        Returns False, with nothing written, where a number is not finite, or the norm of all gradients over its limit.
        """
        _decide(self._tables, decide)
        return run("steered", "l2o_steered_begin", self._step) != _UNUSUAL

    def finish(self) -> None:
        """Bring the directions of orthogonal matrices to size, and move their parameters, and those of given ones."""
        run("steered", "l2o_steered_finish", self._step)


def _decide(tables: Tables, decide: Decide | None, threads: int = 1) -> None:
    if decide is not None:
        run("steered", "l2o_steered_look", tables.lanes(threads=threads))
        tables.decide(decide(tables.sums))


def ordered(
    layout: Layout, grads: Sequence[Tensor], params: Sequence[Tensor], slots: Sequence[Mapping[str, Tensor]]
) -> list[Tensor] | None:
    """Return gradient, parameter and slots of each tensor, ``[..., *shape]``; None where a slot is missing."""
    try:
        own = zip(grads, params, slots, layout.slots, strict=True)
        return [t for grad, p, kept, names in own for t in (grad, p, *map(kept.__getitem__, names))]
    except KeyError:
        return None


def _are_kept(shared: Mapping[str, Tensor], lanes: int) -> bool:
    """Whether these are what the controller keeps of so many lanes, and a perceptron's weights, or nothing."""
    known = not shared or shared.keys() >= set(SHARED.values()) - {"missing", "long"}
    entries = {name: lanes * n for name, n in zip(NETWORK.values(), _WEIGHTS, strict=True)}
    return known and plain(shared.values()) and all(t.numel() == entries.get(n, lanes) for n, t in shared.items())


def fused_steps(
    layout: Layout,
    tensors: Sequence[Tensor] | None,
    factors: Sequence[tuple[float, float]],
    constants: np.ndarray,
    shared: Mapping[str, Tensor],
) -> FusedSteps | None:
    """Return the kernel for one step, or None, with nothing read, where it does not fit or cannot be had.

    tensors: `ordered`, ``[*shape]``.    factors, constants (of one lane), shared: see `Tables`.
    """
    if tensors is None or not (layout.fits(tensors) and _are_kept(shared, 1) and available("steered")):
        return None
    return FusedSteps(Tables(layout, tensors, factors, constants, shared, torch.get_num_threads()), shared)


def fits_lanes(layout: Layout, tensors: Sequence[Tensor] | None, shared: Mapping[str, Tensor], lanes: int) -> bool:
    """Say whether `step_lanes` is for these, `ordered`, ``[lanes, *shape]``, once they are contiguous."""
    if tensors is None or any(kind.path in ("orthogonal", "given") for kind in layout.kinds):
        return False
    inside = [t.numel() for t in tensors] == [lanes * n for n in layout.entries]
    return inside and plain(tensors) and _are_kept(shared, lanes) and available("steered")


def step_lanes(
    layout: Layout,
    tensors: Sequence[Tensor],
    constants: np.ndarray,
    shared: Mapping[str, Tensor],
    lanes: np.ndarray,
    moves: bool = False,
    decide: Decide | None = None,
) -> None:
    """Take one step of some lanes in place.  Tensors are ``[lanes, *shape]``, contiguous, and fit, see `fits_lanes`.

    lanes: indices of those that take it, ``[n]``.    moves: whether parameters become their updates instead.
    constants, shared: see `Tables`; the limit is not asked for.    decide: of the lanes that take the step.
    """
    if len(lanes) == 0:
        return
    tables = Tables(layout, tensors, [(1.0, float(not moves))], constants[lanes], shared, 1, lanes)
    threads = torch.get_num_threads() if len(lanes) * layout.work > _WORTH_THREADS else 1
    _decide(tables, decide, threads)
    run("steered", "l2o_steered_lanes", tables.lanes(moves, threads))
