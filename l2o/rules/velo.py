"""VeLO (Metz et al. 2022, arXiv 2211.09760); HyperV2 of google/learned_optimization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from l2o._checks import whole
from l2o.ops.features import clip_log, fraction_embedding
from l2o.ops.losses import average_losses, init_loss_averages
from l2o.ops.networks import columns, over_entries
from l2o.ops.recurrent import lstm_slots
from l2o.ops.scheduler import RUN_FEATURES, head, mixtures, schedule
from l2o.ops.statistics import init_statistics
from l2o.rules.hyper import HyperRule
from l2o.types import Clock, Kind, OptState, Params, Slots, Theta

MAX_AXES = 5
"""Numbers of axes, 0 to 4, that the LSTM tells apart; more look like none of them."""
WEIGHT_SCALE = 100.0
"""On mixed weights, so that the controls can stay small; hyper_v2.py."""


@dataclass(frozen=True)
class VeLO(HyperRule):
    """An LSTM looks at each tensor and the loss, mixes an MLP for the tensor's entries, and gives the step size.

    ``update = -step_mult * rate * rms(p) * o0 * exp(exp_mult * o1)``; the rate is linear in the LSTM's state, and may
    be negative. The defaults are those of the released VeLO.

    lstm_hidden: units of the LSTM.
    inits: MLPs whose weights are mixed, tensor by tensor.    hidden: units of the layers of these MLPs.
    decays: of momenta.    rms_decay: of the second moment.
    adafactor_decays: of the factored second moments, as many.
    step_mult, exp_mult: of the two outputs.
    loss_horizon: steps that the averages of the loss are made for, instead of ``total_steps``. Weights learned under
        the original's ``use_bugged_loss_features`` need 10.
    θ: ``w_in, b_in, w_mix, b_mix, lstm_w, lstm_b, lstm_h, lstm_c`` (`l2o.ops.scheduler`); ``w_lr, b_lr`` and
        ``w_controls, b_controls``, which read rate and mixture off the state; ``w0, b0, ...``, ``[inits, in, out]`` and
        ``[inits, out]``.
    Slots: ``m, v``, ``row, col`` or ``diag``, ``h, c``; shared: ``loss_means, loss_minima``.
    Needs whole tensors: the LSTM sees means over a tensor, of its moments before the update.
    """

    lstm_hidden: int = 512
    inits: int = 256
    loss_horizon: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_horizon is not None:
            whole("loss_horizon", self.loss_horizon)

    def init_theta(self, generator: torch.Generator) -> Theta:
        inputs = RUN_FEATURES + 1 + MAX_AXES + 2 * len(self.decays)
        return self.init_theta_of(generator, inputs, {"controls": self.inits, "lr": 1})

    def init(self, theta: Theta, params: Params, kinds: Mapping[str, Kind]) -> OptState:
        slots = {
            name: init_statistics(p, self.decays, self.rms_decay) | lstm_slots(theta) for name, p in params.items()
        }
        return OptState(slots, init_loss_averages(next(iter(params.values()))))

    def schedule(
        self, theta: Theta, state: OptState, params: Params, clock: Clock, loss: Tensor
    ) -> tuple[dict[str, Slots], Slots]:
        total = clock.total_steps
        horizon = total if self.loss_horizon is None else torch.full_like(total, self.loss_horizon)
        shared, seen = average_losses(state.shared, loss, clock, horizon)
        if not params:
            return {}, shared
        run = torch.cat([fraction_embedding(clock, loss), seen])
        slots = {name: state.per_param[name] for name in params}
        x = [torch.cat([run, _tensor_features(slots[name], p)]) for name, p in params.items()]
        return schedule(theta, torch.stack(x, -1), slots), shared

    def outputs(self, theta: Theta, state: OptState, features: dict[str, Tensor]) -> dict[str, Tensor]:
        if not features:
            return {}
        h = torch.stack([state.per_param[name]["h"] for name in features], -1)
        control = WEIGHT_SCALE * head(theta, "controls", h)
        rates = head(theta, "lr", h).unbind(-1)
        outputs = {}
        for (name, x), weights, rate in zip(features.items(), mixtures(theta, control), rates, strict=True):
            outputs[name] = rate * over_entries(self.network(weights), {name: (x,)})[name][0]
        return outputs


def _tensor_features(slots: Slots, param: Tensor) -> Tensor:
    """What the LSTM sees of a tensor before its update, ``[6 + 2 decays]``: size of its moments, number of its axes.

    The moments are measured in units of the tensor's root mean square. The last group has the distances of ``v`` from
    the means of the momenta, as in the original, where those of ``v`` from its own mean must have been meant.
    """
    scale = torch.rsqrt(param.square().mean().clamp(min=1e-9))
    m, v = columns(slots["m"]) * scale, columns(slots["v"]) * scale
    mean = m.mean(-1, keepdim=True)
    axes = sum(size > 1 for size in param.shape)
    one_hot = torch.stack([torch.full_like(scale, float(axes == n)) for n in range(MAX_AXES)])
    spreads = [(x - mean).square().mean(-1) for x in (m, v)]
    return torch.cat([_size(v.mean(-1)), one_hot, *(_size(x) for x in spreads)])


def _size(x: Tensor) -> Tensor:
    return 0.5 * clip_log(10.0 * x)
