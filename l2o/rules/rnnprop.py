"""RNNprop (Lv, Jiang and Li 2017, "Learning Gradient Descent: Better Generalization and Longer Horizons").

arXiv 1703.03633, section 4; settings of VITA-Group/Open-L2O ("L2O-DM and L2O-RNNProp"), where it is meta-trained with
100 steps of 20 in a truncation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import elu

from l2o.checks import check_each, check_float, check_int
from l2o.ops.coordinatewise_lstm import coordinatewise_lstm, coordinatewise_slots, init_coordinatewise_lstm, readout
from l2o.ops.networks import init_linear, linear
from l2o.ops.numeric import safe_sqrt
from l2o.types import (
    LOCAL,
    ConfigurationError,
    Grads,
    Infos,
    OptState,
    Params,
    Reduce,
    Run,
    Slots,
    Theta,
    UpdateRule,
    Updates,
)

_EPS = 1e-8
"""Added to the root of the second moment, as in Adam."""


@dataclass(frozen=True)
class RNNprop(UpdateRule):
    """An LSTM over the entries sees Adam's direction and the gradient over its root mean square; the step is bounded.

    ``update = scale * tanh(readout)``, with inputs ``m^ / (sqrt(v^) + 1e-8)`` and ``g / (sqrt(v^) + 1e-8)``.

    hidden: units of each LSTM layer.    projected: units of the ELU layer before them.
    scale: the largest step of an entry.    beta1, beta2: of the moments, not learned.
    θ: ``w_in, b_in`` of the ELU layer; those of `l2o.ops.coordinatewise_lstm`.
    Slots: ``m, v``; ``count``, 0-d, of updates; ``h0, c0, ...``, ``[hidden, *shape]``.
    """

    hidden: tuple[int, ...] = (20, 20)
    projected: int = 20
    scale: float = 0.01
    beta1: float = 0.95
    beta2: float = 0.95

    def __post_init__(self) -> None:
        check_each("hidden", self.hidden, check_int)
        if not self.hidden:
            raise ConfigurationError(f"hidden={self.hidden!r}: expected at least one layer")
        check_int("projected", self.projected)
        check_float("scale", self.scale, above=0.0)
        check_float("beta1", self.beta1, least=0.0, below=1.0)
        check_float("beta2", self.beta2, least=0.0, below=1.0)

    def init_theta(self, generator: torch.Generator) -> Theta:
        w_in, b_in = init_linear(generator, 2, self.projected)
        return {"w_in": w_in, "b_in": b_in, **init_coordinatewise_lstm(generator, self.projected, self.hidden)}

    def init(self, theta: Theta, params: Params, infos: Infos) -> OptState:
        return OptState({name: self._slots(p) for name, p in params.items()}, {})

    def _slots(self, param: Tensor) -> Slots:
        moments = {"m": torch.zeros_like(param), "v": torch.zeros_like(param), "count": param.new_zeros(())}
        return moments | coordinatewise_slots(param, self.hidden)

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
        def project(x: Tensor) -> Tensor:
            return elu(linear(x, theta["w_in"], theta["b_in"]))

        moments = {name: self._moments(g, state.per_param[name]) for name, g in grads.items()}
        features = {name: self._features(g, moments[name]) for name, g in grads.items()}
        cells = coordinatewise_lstm(theta, features, state.per_param, project)
        outputs = readout(theta, cells, {name: g.shape for name, g in grads.items()})
        updates = {name: self.scale * torch.tanh(x) for name, x in outputs.items()}
        return updates, OptState({name: moments[name] | cells[name] for name in grads}, {})

    def _moments(self, grad: Tensor, slots: Slots) -> Slots:
        return {
            "m": self.beta1 * slots["m"] + (1.0 - self.beta1) * grad,
            "v": self.beta2 * slots["v"] + (1.0 - self.beta2) * grad.square(),
            "count": slots["count"] + 1.0,
        }

    def _features(self, grad: Tensor, slots: Slots) -> Tensor:
        """``[2, *shape]``."""
        m = slots["m"] / (1.0 - self.beta1 ** slots["count"])
        v = slots["v"] / (1.0 - self.beta2 ** slots["count"])
        return torch.stack([m, grad]) / (safe_sqrt(v) + _EPS)
