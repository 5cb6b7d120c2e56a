"""VeLO (Metz et al. 2022, arXiv 2211.09760); HyperV2 of google/learned_optimization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from l2o.checks import check_int
from l2o.ops.features import clip_log, fraction_embedding, spreads, square_sums, tensor_means
from l2o.ops.kinds import size
from l2o.ops.losses import average_losses, init_loss_averages
from l2o.ops.numeric import constant
from l2o.ops.recurrent import lstm_slots
from l2o.ops.scheduler import RUN_FEATURES, head, mixtures, schedule
from l2o.ops.statistics import init_statistics
from l2o.rules.hyper import HyperRule
from l2o.types import Infos, OptState, Params, Reduce, Run, Slots, Theta

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
    The LSTM sees means over a tensor, of its moments before the update.
    """

    lstm_hidden: int = 512
    inits: int = 256
    loss_horizon: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_horizon is not None:
            check_int("loss_horizon", self.loss_horizon)

    def init_theta(self, generator: torch.Generator) -> Theta:
        inputs = RUN_FEATURES + 1 + MAX_AXES + 2 * len(self.decays)
        return self.init_theta_of(generator, inputs, {"controls": self.inits, "lr": 1})

    def init(self, theta: Theta, params: Params, infos: Infos) -> OptState:
        slots = {
            name: init_statistics(p, infos[name], len(self.decays)) | lstm_slots(theta) for name, p in params.items()
        }
        return OptState(slots, init_loss_averages(next(iter(params.values()))))

    def schedule(
        self, theta: Theta, state: OptState, params: Params, infos: Infos, run: Run, reduce: Reduce
    ) -> tuple[dict[str, Slots], Slots]:
        total = run.total_steps
        horizon = total if self.loss_horizon is None else torch.full_like(total, self.loss_horizon)
        shared, seen = average_losses(state.shared, run, horizon)
        if not params:
            return {}, shared
        of_run = torch.cat([fraction_embedding(run, seen), seen])
        slots = {name: state.per_param[name] for name in params}
        x = [torch.cat([of_run, own]) for own in _tensor_features(slots, params, infos, reduce).values()]
        return schedule(theta, torch.stack(x, -1), slots, reduce), shared

    def mixed(self, theta: Theta, state: OptState, names: Sequence[str]) -> tuple[Theta, Tensor]:
        h = torch.stack([state.per_param[name]["h"] for name in names], -1)
        control = WEIGHT_SCALE * head(theta, "controls", h)
        return mixtures(theta, control), head(theta, "lr", h).squeeze(0)


def _tensor_features(slots: Mapping[str, Slots], params: Params, infos: Infos, reduce: Reduce) -> dict[str, Tensor]:
    """What the LSTM sees of a tensor before its update, ``[6 + 2 decays]``: size of its moments, number of its axes.

    The moments are measured in units of the tensor's root mean square. The last group has the distances of ``v`` from
    the means of the momenta, as in the original, where those of ``v`` from its own mean must have been meant.
    """
    squares = reduce.shards({name: {"param": square_sums(p.unsqueeze(0))} for name, p in params.items()})
    scales = {name: torch.rsqrt((own["param"] / size(infos[name])).clamp(min=1e-9)) for name, own in squares.items()}
    moments = {name: {slot: slots[name][slot] for slot in "mv"} for name in params}
    means = tensor_means(moments, infos, reduce)
    centers = {name: dict.fromkeys("mv", own["m"]) for name, own in means.items()}
    variances = spreads(moments, centers, infos, reduce)
    seen = {}
    for name, own in means.items():
        axes = sum(length > 1 for length in infos[name].shape)
        one_hot = [float(axes == n) for n in range(MAX_AXES)]
        parts = (_size(variances[name][slot] * scales[name].square()) for slot in "mv")
        seen[name] = torch.cat([_size(own["v"] * scales[name]), constant(one_hot, own["v"]), *parts])
    return seen


def _size(x: Tensor) -> Tensor:
    return 0.5 * clip_log(10.0 * x)
