"""The coordinatewise LSTM of Andrychowicz et al. 2016 (arXiv 1606.04474)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from l2o._checks import each, real, whole
from l2o.ops.features import log_and_sign
from l2o.ops.networks import columns, init_linear, linear, lstm_cell, over_entries
from l2o.types import Clock, ConfigurationError, Grads, Kind, OptState, Params, Slots, Stats, Theta, UpdateRule, Updates


@dataclass(frozen=True)
class LSTM(UpdateRule):
    """Every entry of every tensor is a row of one LSTM batch: same weights, a state of its own.

    hidden: units of each layer (paper: two of 20).
    scale: of the output; the paper's MNIST setting is 0.1, DeepMind's released code has 0.01.
    preprocess: show the network log and sign of the gradient (paper, appendix A) instead of the gradient.
    k: the paper's p of that preprocessing.
    θ: ``w0, b0, w1, b1, ...`` of the cells and ``w_out, b_out``. Slots: ``h0, c0, h1, c1, ...``, ``[hidden, *shape]``.
    """

    hidden: tuple[int, ...] = (20, 20)
    scale: float = 0.1
    preprocess: bool = True
    k: float = 5.0

    def __post_init__(self) -> None:
        each("hidden", self.hidden, whole)
        if not self.hidden:
            raise ConfigurationError(f"hidden={self.hidden!r}: expected at least one layer")
        real("scale", self.scale, above=0.0)
        real("k", self.k, above=0.0)

    def init_theta(self, generator: torch.Generator) -> Theta:
        theta: Theta = {}
        fan_in = 2 if self.preprocess else 1
        for i, units in enumerate(self.hidden):
            theta[f"w{i}"], theta[f"b{i}"] = init_linear(generator, fan_in + units, 4 * units)
            fan_in = units
        theta["w_out"], theta["b_out"] = init_linear(generator, fan_in, 1)
        return theta

    def init(self, theta: Theta, params: Params, kinds: Mapping[str, Kind]) -> OptState:
        return OptState({name: self._slots(p) for name, p in params.items()}, {})

    def _slots(self, param: Tensor) -> Slots:
        return {
            f"{slot}{i}": torch.zeros_like(param).expand(units, *param.shape).clone()
            for i, units in enumerate(self.hidden)
            for slot in "hc"
        }

    def accumulate(
        self, theta: Theta, grads: Grads, state: OptState, params: Params, clock: Clock, loss: Tensor | None
    ) -> tuple[OptState, Stats]:
        def cells(x: Tensor, *previous: Tensor) -> tuple[Tensor, ...]:
            new: list[Tensor] = []
            for i, (h, c) in enumerate(zip(previous[::2], previous[1::2], strict=True)):
                x, c = lstm_cell(x, h, c, theta[f"w{i}"], theta[f"b{i}"])
                new += [x, c]
            return tuple(new)

        names = [f"{slot}{i}" for i in range(len(self.hidden)) for slot in "hc"]
        inputs = {
            name: (self._features(g), *(columns(state.per_param[name][slot]) for slot in names))
            for name, g in grads.items()
        }
        new = over_entries(cells, inputs)
        slots = {
            name: {slot: x.reshape(x.shape[0], *g.shape) for slot, x in zip(names, new[name], strict=True)}
            for name, g in grads.items()
        }
        return OptState(slots, {}), {}

    def apply(self, theta: Theta, state: OptState, stats: Stats, grads: Grads, params: Params, clock: Clock) -> Updates:
        def readout(h: Tensor) -> tuple[Tensor]:
            return (self.scale * linear(h, theta["w_out"], theta["b_out"]),)

        last = f"h{len(self.hidden) - 1}"
        outputs = over_entries(readout, {name: (columns(state.per_param[name][last]),) for name in grads})
        return {name: outputs[name][0].reshape(g.shape) for name, g in grads.items()}

    def _features(self, grad: Tensor) -> Tensor:
        return columns(log_and_sign(grad, self.k) if self.preprocess else grad.unsqueeze(0))
