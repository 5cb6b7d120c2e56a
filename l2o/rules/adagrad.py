"""AdaGrad (Duchi et al. 2011, JMLR 12) with learned hyperparameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from l2o.ops.numeric import log_of, safe_sqrt, scalar_like
from l2o.rules.elementwise import ElementwiseRule
from l2o.types import Slots, Theta


@dataclass(frozen=True)
class AdaGrad(ElementwiseRule):
    """``s <- s + g^2``, ``p - lr g / (sqrt(s) + eps)``; as `torch.optim.Adagrad`. θ: ``log_lr, log_eps``."""

    lr: float = 0.01
    eps: float = 1e-10

    rests = True

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {
            "log_lr": scalar_like(log_of("lr", self.lr), generator),
            "log_eps": scalar_like(log_of("eps", self.eps), generator),
        }

    def slots(self, param: Tensor) -> Slots:
        return {"sum": torch.zeros_like(param)}

    def advance(self, theta: Theta, grad: Tensor, slots: Slots) -> Slots:
        return {"sum": slots["sum"] + grad.square()}

    def step(self, theta: Theta, grad: Tensor, slots: Slots) -> Tensor:
        return -theta["log_lr"].exp() * grad / (safe_sqrt(slots["sum"]) + theta["log_eps"].exp())
