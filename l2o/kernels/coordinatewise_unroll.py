"""Whole unrolls of perceptrons that a rule with a network over channels trains, by one kernel: gradients, moments and
updates lane by lane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from l2o.kernels import coordinatewise_cpu as cpu
from l2o.kernels.arrays import plain, pointers
from l2o.kernels.build import available, run
from l2o.kernels.coordinatewise import Tensors
from l2o.kernels.coordinatewise_plan import Work, plan_of
from l2o.kernels.perceptron import Perceptron
from l2o.kernels.unroll import Batches, Unroll, after
from l2o.ops.coordinatewise import Recipe
from l2o.ops.kinds import lane_infos
from l2o.types import InnerState, OptState, Params, Slots


class Learner(NamedTuple):
    """A rule over the steps of an unroll: moments by `l2o.ops.statistics.advanced`, then the network of ``recipe``.

    weights: ``w0, b0, w1, ...``, each ``[lanes, ...]``.     biases: ``b0`` of each step, ``[lanes, steps, units]``.
    decays: ``[lanes, all]``, joined as `Decays` has them.     gains: on updates, ``[lanes, tensors]``.
    """

    recipe: Recipe
    weights: Sequence[Tensor]
    biases: Tensor
    decays: Tensor
    gains: Tensor


@dataclass(frozen=True)
class Prepared:
    """An unroll that waits for its batches: descriptions for the kernel, the tensors that it moves, in the order of
    layers, and all else that has to live as long."""

    state: InnerState
    params: Params
    slots: Mapping[str, Slots]
    problem: Perceptron
    work: Work
    kept: object

    def run(self, batches: Batches) -> tuple[InnerState, Tensor]:
        """Return the state after the batches' steps and the losses before each, ``[steps, lanes]``; once."""
        assert batches.rows is not None
        x, y, rows, left = batches.x.contiguous(), batches.y.contiguous(), batches.rows.contiguous(), self._left
        losses = x.new_empty(len(rows), len(left))
        unroll = Unroll(len(rows), batches.copies, len(x), 0, *(t.data_ptr() for t in (x, y, rows, left)))
        unroll.params, unroll.losses = pointers(list(self.params.values())), losses.data_ptr()
        run("coordinatewise_unroll", "l2o_coordinatewise_unroll", unroll, self.problem, self.work)
        slots = {name: own | self.slots[name] for name, own in self.state.opt.per_param.items()}
        return after(self.state, self.params, OptState(slots, {}), losses), losses

    @property
    def _left(self) -> Tensor:
        return (self.state.total_steps - self.state.step).contiguous()


def prepared(learner: Learner, state: InnerState, batches: Batches) -> Prepared | None:
    """Copy what moves and describe the rest; None where the kernel does not fit, or cannot be had.

    batches: of parameters that ``state`` has, no others; their rows need not be drawn yet.
    The same bits whatever the number of threads. Not differentiable.
    """
    params = {name: _copy(state.params[name]) for name in batches.names}
    grads = {name: torch.empty_like(p) for name, p in params.items()}
    slots = {name: {slot: _copy(t) for slot, t in state.opt.per_param[name].items()} for name in params}
    means = {name: own["row"].mean(-1, keepdim=True) for name, own in slots.items() if "row" in own}
    tensors = Tensors(grads, params, slots, lane_infos(params), means)
    problem = batches.problem(list(params.values()), list(grads.values()))
    found = _described(learner, tensors, len(state.step))
    if problem is None or found is None or not available("coordinatewise_unroll"):
        return None
    return Prepared(state, params, slots, problem, found[0], (learner, tensors, found))


def _described(learner: Learner, tensors: Tensors, lanes: int) -> tuple[Work, object] | None:
    """The rule for the kernel, and what has to live as long; None where it does not fit.  tensors: ``[lanes, ...]``."""
    recipe, weights, biases, decays, gains = learner
    sources = tensors.sources(recipe)
    if not plain([*weights, biases, decays, gains, *sources]):
        return None
    counts = tuple(recipe.count(info.shape) for info in tensors.infos.values())
    plan = plan_of(recipe, lanes, tuple(tensors.axes), tuple(t.shape for t in sources), counts)
    if plan is None or decays.shape != (lanes, plan.work.m_decays + plan.work.v_decays + plan.work.factors):
        return None
    layers = [t.contiguous().unsqueeze(1) for t in weights]
    layers[1] = biases.contiguous()[:, :1]  # where the kernel begins
    sums = [gains.new_empty(shape) for shape in plan.sums]
    inputs = cpu.Inputs(layers, gains.contiguous(), None, sums, sources)
    if not cpu.fits(recipe, lanes, plan, inputs, None):
        return None
    updates = [torch.empty_like(p) for p in tensors.params.values()]
    work, kept = cpu.described(plan, lanes, inputs, updates)
    work.decays = (decays := decays.contiguous()).data_ptr()
    return work, (kept, inputs, updates, decays)


def _copy(t: Tensor) -> Tensor:
    return t.detach().clone(memory_format=torch.contiguous_format)
