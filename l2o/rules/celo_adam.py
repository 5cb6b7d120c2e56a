"""Celo-Adam: Adam under Celo's learned schedule; celo/optimizers/celo_adam.py of amoudgl/celo (arXiv 2501.12670)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from l2o.checks import check_float, check_int
from l2o.ops.groups import SMALL, by_shape
from l2o.ops.moments import debias, init_momenta, momenta
from l2o.ops.numeric import safe_sqrt
from l2o.ops.scheduler import RUN_FEATURES, init_run_schedule, init_scheduler, learned_rate, run_schedule
from l2o.ops.statistics import clip_gradient
from l2o.types import LOCAL, Grads, Infos, OptState, Params, Reduce, Run, Slots, Theta, UpdateRule, Updates


@dataclass(frozen=True)
class CeloAdam(UpdateRule):
    """``update = -step_mult * rate * m^ / (sqrt(v^ + eps_root) + eps)``, ``rate = 0.1 exp(w_lr h + b_lr)``.

    An LSTM sees how far the run is and how its loss goes; its state ``h`` gives the rate, one for all tensors. The
    defaults are those of the released Celo-Adam.

    lstm_hidden: units of the LSTM.
    beta1, beta2, eps, eps_root: of Adam, whose moments ``m^, v^`` are bias-corrected.
    θ: ``w_in, b_in, w_mix, b_mix, lstm_w, lstm_b, lstm_h, lstm_c`` (`l2o.ops.scheduler`), ``w_lr, b_lr``.
    Slots: ``m, v, count``; shared: ``h, c, loss_means, loss_minima``.
    """

    needs_loss = True
    rests = True

    lstm_hidden: int = 64
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    eps_root: float = 1e-10
    step_mult: float = 0.001

    def __post_init__(self) -> None:
        check_int("lstm_hidden", self.lstm_hidden)
        check_float("beta1", self.beta1, least=0.0, below=1.0)
        check_float("beta2", self.beta2, least=0.0, below=1.0)
        check_float("eps", self.eps, above=0.0)
        check_float("eps_root", self.eps_root, least=0.0)
        check_float("step_mult", self.step_mult, above=0.0)

    def init_theta(self, generator: torch.Generator) -> Theta:
        return init_scheduler(generator, RUN_FEATURES, self.lstm_hidden, {"lr": 1})

    def init(self, theta: Theta, params: Params, infos: Infos) -> OptState:
        slots = {
            # Updates are counted a tensor, as in `l2o.rules.Adam`.
            name: {"m": init_momenta(p, 1), "v": init_momenta(p, 1), "count": p.new_zeros(())}
            for name, p in params.items()
        }
        return OptState(slots, init_run_schedule(theta, next(iter(params.values()))))

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
        shared = run_schedule(theta, state.shared, run)
        rate = self.step_mult * learned_rate(theta, shared["h"])
        updates: Updates = {}
        slots: dict[str, Slots] = {}
        for group in by_shape(grads, state, infos, together=SMALL):
            for name, step, own in group.each(partial(self._step, rate)):
                updates[name], slots[name] = step, own
        return updates, OptState(slots, shared)

    def _step(self, rate: Tensor, grad: Tensor, slots: Slots) -> tuple[Tensor, Slots]:
        slots = self._advance(slots, clip_gradient(grad))
        return -rate * self._direction(slots), slots

    def _advance(self, slots: Slots, grad: Tensor) -> Slots:
        return {
            "m": momenta(slots["m"], grad, [self.beta1]),
            "v": momenta(slots["v"], grad.square(), [self.beta2]),
            "count": slots["count"] + 1.0,
        }

    def _direction(self, slots: Slots) -> Tensor:
        (m,) = debias(slots["m"], [self.beta1], slots["count"])
        (v,) = debias(slots["v"], [self.beta2], slots["count"])
        return m / (safe_sqrt(v + self.eps_root) + self.eps)
