"""The coordinatewise LSTM of Andrychowicz et al. 2016 (arXiv 1606.04474)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from l2o.checks import check_each, check_float, check_int
from l2o.ops.coordinatewise_lstm import coordinatewise_lstm, coordinatewise_slots, init_coordinatewise_lstm, readout
from l2o.ops.features import log_and_sign
from l2o.types import LOCAL, ConfigurationError, Grads, Infos, OptState, Params, Reduce, Run, Theta, UpdateRule, Updates


@dataclass(frozen=True)
class LSTM(UpdateRule):
    """Every entry of every tensor is a row of one LSTM batch: same weights, a state of its own.

    hidden: units of each layer (paper: two of 20).
    scale: of the output; the paper's MNIST setting is 0.1, DeepMind's released code has 0.01.
    preprocess: show the network log and sign of the gradient (paper, appendix A) instead of the gradient.
    k: the paper's p of that preprocessing.
    θ and slots: those of `l2o.ops.coordinatewise_lstm`.
    """

    hidden: tuple[int, ...] = (20, 20)
    scale: float = 0.1
    preprocess: bool = True
    k: float = 5.0

    learned_init = False

    def __post_init__(self) -> None:
        check_each("hidden", self.hidden, check_int)
        if not self.hidden:
            raise ConfigurationError(f"hidden={self.hidden!r}: expected at least one layer")
        check_float("scale", self.scale, above=0.0)
        check_float("k", self.k, above=0.0)

    def init_theta(self, generator: torch.Generator) -> Theta:
        return init_coordinatewise_lstm(generator, 2 if self.preprocess else 1, self.hidden)

    def init(self, theta: Theta, params: Params, infos: Infos) -> OptState:
        return OptState({name: coordinatewise_slots(p, self.hidden) for name, p in params.items()}, {})

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
        features = {name: log_and_sign(g, self.k) if self.preprocess else g.unsqueeze(0) for name, g in grads.items()}
        slots = coordinatewise_lstm(theta, features, state.per_param)
        outputs = readout(theta, slots, {name: g.shape for name, g in grads.items()})
        return {name: self.scale * x for name, x in outputs.items()}, OptState(slots, {})
