"""Heavy-ball and Nesterov momentum with learned learning rate and momentum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from l2o.ops.moments import decay
from l2o.ops.numeric import log_of, logit_of, scalar_like
from l2o.rules.elementwise import ElementwiseRule
from l2o.types import Slots, Theta


@dataclass(frozen=True)
class Momentum(ElementwiseRule):
    """``u <- mu u + g``, ``p - lr u`` (Nesterov: ``p - lr (g + mu u)``); as `torch.optim.SGD`.

    θ: ``log_lr, logit_momentum``. Slot: ``velocity``.
    """

    lr: float = 0.01
    momentum: float = 0.9
    nesterov: bool = False

    rests = True

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {
            "log_lr": scalar_like(log_of("lr", self.lr), generator),
            "logit_momentum": scalar_like(logit_of("momentum", self.momentum), generator),
        }

    def slots(self, param: Tensor) -> Slots:
        return {"velocity": torch.zeros_like(param)}

    def advance(self, theta: Theta, grad: Tensor, slots: Slots) -> Slots:
        return {"velocity": decay(theta["logit_momentum"]) * slots["velocity"] + grad}

    def step(self, theta: Theta, grad: Tensor, slots: Slots) -> Tensor:
        u = slots["velocity"]
        if self.nesterov:
            u = grad + decay(theta["logit_momentum"]) * u
        return -theta["log_lr"].exp() * u
