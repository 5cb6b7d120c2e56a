"""STAR: the learned term of small_fc beside a nominal one, and weight decay.

Harrison et al. 2022, "A Closer Look at Learned Optimization: Stability, Robustness, and Inductive Biases", arXiv
2209.11208, sections 4 and 5; MLPNomLOpt of google/learned_optimization, learned_optimizers/mlp_nom_lopt.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from l2o.checks import check_float
from l2o.ops.features import channel_sums
from l2o.ops.kinds import size
from l2o.ops.statistics import Statistics
from l2o.rules.adafac_mlp import AdafacMLP
from l2o.types import ConfigurationError, Infos, Reduce

_NOMINAL: dict[str, Callable[[Statistics], Tensor]] = {
    "sgd": lambda x: x.grad,
    "sgdm": lambda x: x.m[-1],
    "aggmo": lambda x: x.m.mean(0),
    "adam": lambda x: x.m[-1] * x.inv_rms[0],
    "adam_aggmo": lambda x: (x.m * x.inv_rms).mean(0),
}
"""Directions without a network: gradient, slowest momentum (the last decay), mean of the momenta; over the root mean
square or not."""


@dataclass(frozen=True)
class STAR(AdafacMLP):
    """``update = -(learned + nominal + decay)`` of four outputs d, s, n, r an entry::

        learned = step_mult * d * exp(exp_mult * s)              times rsqrt(v + 1e-6) where ``normalise``
        nominal = nominal_lr * exp(nominal_exp_mult * n) * direction
        decay   = weight_decay * exp(decay_exp_mult * r) * p

    The defaults are the reference's, whose nominal term and weight decay are off: what makes the rule stable has to be
    set. Inputs, decays, θ and slots are those of `AdafacMLP`; ``mup`` is about the first two terms.

    nominal: the direction, ``sgd, sgdm, aggmo, adam`` or ``adam_aggmo``.
    nominal_lr, weight_decay: a step's.
    nominal_controller, decay_controller: whether the network sets n and r; else they are 1 and 0.
    mean_magnitude, mean_nominal, mean_decay: replace s, n, r by their means over the tensor.
    """

    nominal: Literal["sgd", "sgdm", "aggmo", "adam", "adam_aggmo"] = "adam_aggmo"
    nominal_lr: float = 0.0
    weight_decay: float = 0.0
    nominal_exp_mult: float = 0.001
    decay_exp_mult: float = 0.001
    nominal_controller: bool = False
    decay_controller: bool = False
    mean_magnitude: bool = False
    mean_nominal: bool = False
    mean_decay: bool = False
    normalise: bool = False

    outputs: ClassVar[int] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nominal not in _NOMINAL:
            raise ConfigurationError(f"nominal={self.nominal!r}: expected one of {sorted(_NOMINAL)}")
        for name in ("nominal_lr", "weight_decay", "nominal_exp_mult", "decay_exp_mult"):
            check_float(name, getattr(self, name), least=0.0)

    def _means(self, outputs: dict[str, Tensor], infos: Infos, reduce: Reduce) -> dict[str, Tensor]:
        averaged = [
            i for i, mean in enumerate((False, self.mean_magnitude, self.mean_nominal, self.mean_decay)) if mean
        ]
        if not averaged:
            return outputs
        sums = reduce.shards({name: {"sums": channel_sums(x)} for name, x in outputs.items()})
        means = {name: sums[name]["sums"] / size(infos[name]) for name in outputs}
        return {
            name: torch.stack([means[name][i].expand_as(y) if i in averaged else y for i, y in enumerate(x)])
            for name, x in outputs.items()
        }

    def _step(self, output: Tensor, x: Statistics, width: Tensor | float) -> Tensor:
        d, s, n, r = output
        n = n if self.nominal_controller else torch.ones_like(n)
        r = r if self.decay_controller else torch.zeros_like(r)
        learned = d * (s * self.exp_mult).exp() * self.step_mult
        if self.normalise:
            learned = learned * x.inv_rms[0]
        nominal = (n * self.nominal_exp_mult).exp() * self.nominal_lr
        step = learned + nominal * _NOMINAL[self.nominal](x)
        decay = (r * self.decay_exp_mult).exp() * self.weight_decay
        return -width * step - decay * x.param
