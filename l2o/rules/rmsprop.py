"""RMSProp (Tieleman and Hinton 2012, lecture 6.5) with learned hyperparameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from l2o.ops.moments import ema
from l2o.ops.numeric import log_of, logit_of, safe_sqrt, scalar_like
from l2o.rules.elementwise import ElementwiseRule
from l2o.types import Slots, Theta


@dataclass(frozen=True)
class RMSProp(ElementwiseRule):
    """``v <- a v + (1 - a) g^2``, ``p - lr g / (sqrt(v) + eps)``; as `torch.optim.RMSprop`.

    θ: ``log_lr, logit_alpha, log_eps``. Slot: ``v``.
    """

    lr: float = 0.01
    alpha: float = 0.99
    eps: float = 1e-8

    rests = True

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {
            "log_lr": scalar_like(log_of("lr", self.lr), generator),
            "logit_alpha": scalar_like(logit_of("alpha", self.alpha), generator),
            "log_eps": scalar_like(log_of("eps", self.eps), generator),
        }

    def slots(self, param: Tensor) -> Slots:
        return {"v": torch.zeros_like(param)}

    def advance(self, theta: Theta, grad: Tensor, slots: Slots) -> Slots:
        return {"v": ema(slots["v"], grad.square(), theta["logit_alpha"])}

    def step(self, theta: Theta, grad: Tensor, slots: Slots) -> Tensor:
        return -theta["log_lr"].exp() * grad / (safe_sqrt(slots["v"]) + theta["log_eps"].exp())
