"""The shape that the hand-designed rules share: each tensor on its own, each entry on its own, no sums."""

from __future__ import annotations

import abc
from functools import partial

import torch
from torch import Tensor

from l2o.ops.groups import SMALL, by_shape
from l2o.types import LOCAL, Grads, Infos, OptState, Params, Reduce, Run, Slots, Theta, UpdateRule, Updates


class ElementwiseRule(UpdateRule):
    """A rule that is given by what it does to one tensor.

    The fields of a subclass are the hyperparameters that ``init_theta`` starts from; θ holds their unconstrained
    transforms (``log_*`` for positive numbers, ``logit_*`` for numbers between 0 and 1), so every θ is a valid setting.
    Raises `ConfigurationError` for a hyperparameter that has no such transform.
    """

    def __post_init__(self) -> None:
        self.init_theta(torch.Generator())  # the transforms know what they take

    @abc.abstractmethod
    def slots(self, param: Tensor) -> Slots:
        """Return the state of ``param [*shape]`` before its first update, by slot; slots have any shapes."""

    @abc.abstractmethod
    def advance(self, theta: Theta, grad: Tensor, slots: Slots) -> Slots:
        """Return the state once it has seen ``grad [*shape]``; slots keep shapes and dtypes."""

    @abc.abstractmethod
    def step(self, theta: Theta, grad: Tensor, slots: Slots) -> Tensor:
        """Return the update of one tensor, given its ``grad [*shape]`` and its advanced state."""

    def init(self, theta: Theta, params: Params, infos: Infos) -> OptState:
        return OptState({name: self.slots(p) for name, p in params.items()}, {})

    def update(
        self,
        theta: Theta,
        grads: Grads,
        state: OptState,
        params: Params,
        infos: Infos,
        run: Run,
        reduce: Reduce = LOCAL,
    ) -> tuple[Updates, OptState]:
        slots: dict[str, Slots] = {}
        updates: Updates = {}
        for group in by_shape(grads, state, infos, together=SMALL):
            for name, step, own in group.each(partial(self._step, theta)):
                updates[name], slots[name] = step, own
        return updates, OptState(slots, {})

    def _step(self, theta: Theta, grad: Tensor, slots: Slots) -> tuple[Tensor, Slots]:
        slots = self.advance(theta, grad, slots)
        return self.step(theta, grad, slots), slots
