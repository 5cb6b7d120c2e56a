"""Celo (Moudgil et al. 2025, arXiv 2501.12670); celo/optimizers/celo.py of amoudgl/celo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from l2o.ops.scheduler import RUN_FEATURES, head, init_run_schedule, learned_rate, mixtures, run_schedule
from l2o.ops.statistics import init_statistics
from l2o.rules.hyper import HyperRule
from l2o.types import Infos, OptState, Params, Reduce, Run, Slots, Theta


@dataclass(frozen=True)
class Celo(HyperRule):
    """VeLO made cheap to meta-train: one MLP for all entries of the model, and an LSTM that schedules its step size.

    ``update = -step_mult * rate * rms(p) * o0 * exp(exp_mult * o1)``, ``rate = 0.1 exp(w_lr h + b_lr)``, and the LSTM
    sees only how far the run is and how its loss goes. The defaults are those of the released Celo.

    lstm_hidden: units of the LSTM.    hidden: units of the MLP.
    inits: MLPs whose weights are averaged by a softmax of the LSTM's state.
    decays: of momenta.    rms_decay: of the second moment.
    adafactor_decays: of the factored second moments, as many.
    step_mult, exp_mult: of the two outputs.
    scheduled: False leaves the rate out, as in the first phase of the original's meta-training, which learns the MLP;
        the second learns the scheduler.
    θ: ``w_in, b_in, w_mix, b_mix, lstm_w, lstm_b, lstm_h, lstm_c`` (`l2o.ops.scheduler`); ``w_lr, b_lr``; where there
        is more than one MLP ``w_controls, b_controls``; ``w0, b0, ...``, ``[inits, in, out]`` and ``[inits, out]``.
    Slots: ``m, v``, ``row, col`` or ``diag``; shared: ``h, c, loss_means, loss_minima``.
    """

    scheduled: bool = True

    def init_theta(self, generator: torch.Generator) -> Theta:
        heads = {"controls": self.inits, "lr": 1} if self.inits > 1 else {"lr": 1}
        return self.init_theta_of(generator, RUN_FEATURES, heads)

    def init(self, theta: Theta, params: Params, infos: Infos) -> OptState:
        slots = {name: init_statistics(p, infos[name], len(self.decays)) for name, p in params.items()}
        return OptState(slots, init_run_schedule(theta, next(iter(params.values()))))

    def schedule(
        self, theta: Theta, state: OptState, params: Params, infos: Infos, run: Run, reduce: Reduce
    ) -> tuple[dict[str, Slots], Slots]:
        return {}, run_schedule(theta, state.shared, run)

    def mixed(self, theta: Theta, state: OptState, names: Sequence[str]) -> tuple[Theta, Tensor]:
        h = state.shared["h"].unsqueeze(-1)
        control = h.new_ones(1, 1)  # the softmax of one number
        if self.inits > 1:
            control = torch.softmax(head(theta, "controls", h), 0)
        rate = learned_rate(theta, state.shared["h"]) if self.scheduled else h.new_ones(())
        return mixtures(theta, control), rate.expand(len(names))
