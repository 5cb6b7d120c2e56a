"""small_fc: a per-parameter MLP that sees momenta, second moments and factored second moments.

Metz et al. 2022 (arXiv 2203.11860, section 3 and app. B), after Metz et al. 2020 (arXiv 2009.11243); AdafacMLPLOpt of
google/learned_optimization, learned_optimizers/adafac_mlp_lopt.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from l2o._checks import as_many, each, real, whole
from l2o.ops.factored import factored, init_factored
from l2o.ops.features import TIMESCALES, normalised, square_sums, step_embedding
from l2o.ops.kinds import width_multiplier
from l2o.ops.moments import init_momenta, learned_decays, momenta
from l2o.ops.networks import init_mlp, mlp, over_entries
from l2o.ops.statistics import SMALL_FC_GROUPS, Statistics, channels, statistics
from l2o.types import Clock, Grads, Kind, OptState, Params, Slots, Stats, Theta, UpdateRule, Updates


@dataclass(frozen=True)
class AdafacMLP(UpdateRule):
    """``update = -step_mult * o0 * exp(exp_mult * o1)``, of two outputs an entry.

    Inputs are the channels of `l2o.ops.statistics`, each divided by its root mean square over the tensor, and the
    number of updates, embedded. The decays are learned with the network.

    hidden: units of the hidden layers (released weights of the field: (4, 4), (32, 32)).
    momentum_decays, rms_decay, adafactor_decays: where the decays start; as many of the last as of the first.
    step_mult, exp_mult: of the two outputs.
    mup: multiply the step of hidden matrices by 1 / fan_in (µLO, arXiv 2406.00153): `l2o.ops.kinds.width_multiplier`.
    θ: ``w0, b0, ...``; ``momentum_decays, rms_decays, adafactor_decays``, shifts on a logarithmic scale, at first 0.
    Slots: ``m [decays, *shape]``, ``v [1, *shape]``, ``row`` and ``col`` or ``diag`` of `l2o.ops.factored`, and with
    ``mup`` ``width``, 0-d.
    """

    hidden: tuple[int, ...] = (4, 4)
    momentum_decays: tuple[float, ...] = (0.9, 0.99, 0.999)
    rms_decay: float = 0.999
    adafactor_decays: tuple[float, ...] = (0.9, 0.99, 0.999)
    step_mult: float = 0.001
    exp_mult: float = 0.001
    mup: bool = False

    outputs: ClassVar[int] = 2

    def __post_init__(self) -> None:
        each("hidden", self.hidden, whole)
        decay = partial(real, least=0.0, below=1.0)
        each("momentum_decays", self.momentum_decays, decay)
        each("adafactor_decays", self.adafactor_decays, decay)
        decay("rms_decay", self.rms_decay)
        real("step_mult", self.step_mult, above=0.0)
        real("exp_mult", self.exp_mult, least=0.0)
        as_many("adafactor_decays", self.adafactor_decays, "momentum_decays", self.momentum_decays)

    def init_theta(self, generator: torch.Generator) -> Theta:
        inputs = 4 + 8 * len(self.momentum_decays) + len(TIMESCALES)
        theta = init_mlp(generator, [inputs, *self.hidden, self.outputs])
        return theta | {
            name: torch.zeros(n, dtype=torch.float32, device=generator.device)
            for name, n in self._decay_counts().items()
        }

    def _decay_counts(self) -> dict[str, int]:
        decays = len(self.momentum_decays)
        return {"momentum_decays": decays, "rms_decays": 1, "adafactor_decays": decays}

    def init(self, theta: Theta, params: Params, kinds: Mapping[str, Kind]) -> OptState:
        return OptState({name: self._slots(p, kinds[name]) for name, p in params.items()}, {})

    def _slots(self, param: Tensor, kind: Kind) -> Slots:
        slots = {"m": init_momenta(param, self.momentum_decays), "v": torch.zeros_like(param).unsqueeze(0)}
        slots |= init_factored(param, len(self.adafactor_decays))
        return slots | ({"width": width_multiplier(param, kind)} if self.mup else {})

    def accumulate(
        self, theta: Theta, grads: Grads, state: OptState, params: Params, clock: Clock, loss: Tensor | None
    ) -> tuple[OptState, Stats]:
        momentum = learned_decays(self.momentum_decays, theta["momentum_decays"])
        rms = learned_decays((self.rms_decay,), theta["rms_decays"]).clamp(0.0, 1.0)
        adafactor = learned_decays(self.adafactor_decays, theta["adafactor_decays"])
        slots = {}
        for name, g in grads.items():
            old = state.per_param[name]
            moments = {"m": momenta(old["m"], g, momentum), "v": momenta(old["v"], g.square(), rms)}
            slots[name] = old | moments | factored(old, g, adafactor)
        seen = {name: statistics(g, params[name], slots[name]) for name, g in grads.items()}
        return OptState(slots, {}), {name: square_sums(channels(x, SMALL_FC_GROUPS)) for name, x in seen.items()}

    def apply(self, theta: Theta, state: OptState, stats: Stats, grads: Grads, params: Params, clock: Clock) -> Updates:
        def network(x: Tensor) -> tuple[Tensor]:
            return (mlp(theta, x, step_embedding(clock, x)),)

        seen = {name: statistics(g, params[name], state.per_param[name]) for name, g in grads.items()}
        inputs = {name: (normalised(channels(x, SMALL_FC_GROUPS), stats[name]),) for name, x in seen.items()}
        updates = {}
        for name, (output,) in over_entries(network, inputs).items():
            width = state.per_param[name]["width"] if self.mup else 1.0
            updates[name] = self._step(output.reshape(self.outputs, *grads[name].shape), seen[name], width)
        return updates

    def _step(self, output: Tensor, x: Statistics, width: Tensor | float) -> Tensor:
        """The update of one tensor.  output: ``[outputs, *shape]``.  width: factor on its step."""
        direction, magnitude = output
        return direction * (magnitude * self.exp_mult).exp() * (-self.step_mult * width)
