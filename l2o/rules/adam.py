"""Adam (Kingma and Ba 2015, arXiv 1412.6980, algorithm 1) with learned hyperparameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from l2o.checks import check_float
from l2o.ops.moments import bias_correction, ema
from l2o.ops.numeric import log_of, logit_of, safe_sqrt, scalar_like
from l2o.rules.elementwise import ElementwiseRule
from l2o.types import Slots, Theta


@dataclass(frozen=True)
class Adam(ElementwiseRule):
    """``p - lr m^ / (sqrt(v^ + eps_root) + eps)``; as `torch.optim.Adam` where ``eps_root`` is 0.

    eps_root: not meta-learned. The field's LearnableAdam (google/learned_optimization) has 1e-8.
    θ: ``log_lr, logit_beta1, logit_beta2, log_eps``.
    """

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    eps_root: float = 0.0

    rests = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_float("eps_root", self.eps_root, least=0.0)

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {
            "log_lr": scalar_like(log_of("lr", self.lr), generator),
            "logit_beta1": scalar_like(logit_of("beta1", self.beta1), generator),
            "logit_beta2": scalar_like(logit_of("beta2", self.beta2), generator),
            "log_eps": scalar_like(log_of("eps", self.eps), generator),
        }

    def slots(self, param: Tensor) -> Slots:
        # Updates are counted a tensor: one that joins a run late gets its own bias correction, as in torch.
        return {"m": torch.zeros_like(param), "v": torch.zeros_like(param), "count": param.new_zeros(())}

    def advance(self, theta: Theta, grad: Tensor, slots: Slots) -> Slots:
        return {
            "m": ema(slots["m"], grad, theta["logit_beta1"]),
            "v": ema(slots["v"], grad.square(), theta["logit_beta2"]),
            "count": slots["count"] + 1.0,
        }

    def step(self, theta: Theta, grad: Tensor, slots: Slots) -> Tensor:
        m = slots["m"] / bias_correction(theta["logit_beta1"], slots["count"])
        v = slots["v"] / bias_correction(theta["logit_beta2"], slots["count"])
        return -theta["log_lr"].exp() * m / (safe_sqrt(v + self.eps_root) + theta["log_eps"].exp())
