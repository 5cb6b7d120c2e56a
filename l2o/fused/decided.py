"""What a network says of a step that a kernel takes, if the kernel has to ask: an LSTM, or one that reads the loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap

from l2o.fused.inputs import Inputs
from l2o.kernels.arrays import plain
from l2o.kernels.steered_tables import Decided
from l2o.ops.controller import SLOTS, SUMS, decide_alone
from l2o.rules import Steered
from l2o.types import Run, Slots


def remembers(inputs: Inputs) -> bool:
    """Say whether the state has what a network remembers, in float32 on the CPU."""
    slots = [inputs.state.per_param[name] for name in inputs.params]
    if "long" not in inputs.state.shared or not all({"near", "far", "factor"} <= own.keys() for own in slots):
        return False
    return plain([own[name] for own in slots for name in SLOTS if name in own])


class Deciding:
    """Decisions about one step, of all lanes at once: called once the sums of tensors are known, and kept once the step
    is taken.

    inputs: without lanes, or of all, every tensor ``[lanes, ...]``.     lanes: indices of those that take the step,
    ``[n]``.
    """

    def __init__(self, rule: Steered, inputs: Inputs, lanes: np.ndarray | None = None) -> None:
        self._rule, self._inputs = rule, inputs
        self._lanes = None if lanes is None else torch.from_numpy(lanes)
        self._new: list[Slots] = []

    def __call__(self, sums: np.ndarray) -> Decided:
        """Return what the network says.  sums: see `l2o.kernels.steered.Decide`."""
        theta, _, state, params, infos, run = self._inputs
        slots, shapes = [state.per_param[name] for name in params], [infos[name].shape for name in params]
        momenta = [self._own(each["turned" if "turned" in each else "m"]).unsqueeze(-1).flatten(1) for each in slots]
        squares = torch.stack([torch.linalg.vector_norm(m, dim=1).square() for m in momenta], 1)
        known = torch.cat([torch.from_numpy(sums).to(squares.dtype), squares.unsqueeze(2)], 2)
        own = {name: torch.stack([self._own(each[name]) for each in slots], 1) for name in SLOTS if name in slots[0]}
        clock = [self._own(t) for t in (run.step, run.total_steps, *([] if run.loss is None else [run.loss]))]
        theta, shared = ({name: self._own(t) for name, t in of.items()} for of in (theta, state.shared))

        def of_lane(theta: Any, shared: Any, own: Any, known: Any, *clock: Any) -> Any:
            factors, seen = self._rule.factors(theta, shapes), dict(zip(SUMS, known.unbind(1), strict=True))
            return decide_alone(theta, shared, seen, own, factors, shapes, Run(clock[0], clock[1], *clock[2:]))

        push, *self._new = vmap(of_lane)(theta, shared, own, known, *clock)
        return Decided(push.numpy(), own["factor"].numpy(), self._new[1]["factor"].numpy())

    def keep(self) -> None:
        """Write what the network remembers, in place, in the lanes that have taken the step."""
        (shown, decided), state = self._new, self._inputs.state
        for name, new in shown.items():
            self._write(state.shared[name], new)
        for name, new in decided.items():
            for param, own in zip(self._inputs.params, new.unbind(1), strict=True):
                self._write(state.per_param[param][name], own)

    def _own(self, t: Tensor) -> Tensor:
        return t.unsqueeze(0) if self._lanes is None else t if len(self._lanes) == len(t) else t[self._lanes]

    def _write(self, to: Tensor, new: Tensor) -> None:
        if self._lanes is None:
            to.copy_(new[0])
        else:
            to[self._lanes] = new
