"""Gradient descent with a learned learning rate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from l2o.ops.numeric import log_of, scalar_like
from l2o.rules.elementwise import ElementwiseRule
from l2o.types import Slots, Theta


@dataclass(frozen=True)
class SGD(ElementwiseRule):
    """``p - lr g``; as `torch.optim.SGD`. θ: ``log_lr``."""

    lr: float = 0.01

    rests = True

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {"log_lr": scalar_like(log_of("lr", self.lr), generator)}

    def slots(self, param: Tensor) -> Slots:
        return {}

    def advance(self, theta: Theta, grad: Tensor, slots: Slots) -> Slots:
        return {}

    def step(self, theta: Theta, grad: Tensor, slots: Slots) -> Tensor:
        return -theta["log_lr"].exp() * grad
