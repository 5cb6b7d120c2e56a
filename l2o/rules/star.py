"""STAR: the learned term of small_fc beside a nominal one, and weight decay.

Harrison et al. 2022, "A Closer Look at Learned Optimization: Stability, Robustness, and Inductive Biases", arXiv
2209.11208, sections 4 and 5; MLPNomLOpt of google/learned_optimization, learned_optimizers/mlp_nom_lopt.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from l2o.checks import check_choice, check_float
from l2o.kernels.coordinatewise import Tensors, completed_means, network
from l2o.ops.coordinatewise import NOMINAL, Nominal, Recipe
from l2o.ops.statistics import SMALL_FC_GROUPS
from l2o.rules.adafac_mlp import AdafacMLP
from l2o.types import Reduce, Theta


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
        check_choice("nominal", self.nominal, NOMINAL)
        for name in ("nominal_lr", "weight_decay", "nominal_exp_mult", "decay_exp_mult"):
            check_float(name, getattr(self, name), least=0.0)

    @property
    def _gain(self) -> float:
        return 1.0

    def recipe(self) -> Recipe:
        head = Nominal(
            direction=self.nominal,
            step_mult=self.step_mult,
            exp_mult=self.exp_mult,
            lr=self.nominal_lr,
            weight_decay=self.weight_decay,
            lr_exp_mult=self.nominal_exp_mult,
            decay_exp_mult=self.decay_exp_mult,
            sets_lr=self.nominal_controller,
            sets_decay=self.decay_controller,
            mean_magnitude=self.mean_magnitude,
            mean_lr=self.mean_nominal,
            mean_decay=self.mean_decay,
            normalise=self.normalise,
        )
        return Recipe(SMALL_FC_GROUPS, head)

    def _means(
        self,
        recipe: Recipe,
        weights: Theta,
        tensors: Tensors,
        sums: Mapping[str, Tensor],
        gains: Tensor,
        reduce: Reduce,
    ) -> Tensor | None:
        if not (isinstance(recipe.head, Nominal) and recipe.head.needs_means and tensors.grads):
            return None
        _, totals = network(replace(recipe, head=None), weights, tensors, sums, gains)
        return completed_means(totals, tensors.infos, tensors.grads, reduce)
