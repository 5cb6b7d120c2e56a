"""The per-parameter MLP of Metz et al. 2020 (arXiv 2009.11243, appendix A), MLPLOpt of google/learned_optimization."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from l2o.checks import check_choice, check_each, check_float, check_int
from l2o.kernels.coordinatewise import Tensors, completed_sums, network
from l2o.ops.coordinatewise import Product, Recipe
from l2o.ops.features import FRACTIONS, TIMESCALES, fraction_embedding, step_embedding
from l2o.ops.kinds import width_multiplier
from l2o.ops.moments import init_momenta, momenta
from l2o.ops.networks import init_mlp, with_shared
from l2o.ops.numeric import constant
from l2o.types import (
    LOCAL,
    Grads,
    Infos,
    OptState,
    ParamInfo,
    Params,
    Reduce,
    Run,
    Slots,
    Theta,
    UpdateRule,
    Updates,
)

_GROUPS = ("grad", "param", "m")
"""What the network sees of each element (`l2o.ops.statistics`)."""
_TIME = {"steps": (len(TIMESCALES), step_embedding), "fraction": (len(FRACTIONS), fraction_embedding)}


@dataclass(frozen=True)
class MLP(UpdateRule):
    """A small network turns gradient, parameter, momenta and time into a direction and a log-magnitude, entry by entry.

    Each channel is divided by its root mean square over the tensor, so the rule does not see scales.
    ``update = -step_mult * o0 * exp(exp_mult * o1)``.

    hidden: units of the hidden layers.          decays: of the momenta.
    step_mult, exp_mult: of the two outputs (MLPLOpt: both 0.001, which needs far longer meta-training).
    time: ``fraction`` embeds how much of ``total_steps`` is done, so that a schedule stretches with the run;
        ``steps`` the number of updates (MLPLOpt).
    mup: multiply the step of hidden matrices by 1 / fan_in (µLO, arXiv 2406.00153): `l2o.ops.kinds.width_multiplier`.
    θ: ``w0, b0, ...``, inputs in the order gradient, parameter, momenta, time.
    Slots: ``m``, ``[len(decays), *shape]``, and with ``mup`` ``width``, 0-d.
    """

    hidden: tuple[int, ...] = (32, 32)
    decays: tuple[float, ...] = (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
    step_mult: float = 0.01
    exp_mult: float = 0.01
    time: Literal["fraction", "steps"] = "fraction"
    mup: bool = False

    learned_init = False

    def __post_init__(self) -> None:
        check_choice("time", self.time, _TIME)
        check_each("hidden", self.hidden, check_int)
        check_each("decays", self.decays, partial(check_float, least=0.0, below=1.0))
        check_float("step_mult", self.step_mult, above=0.0)
        check_float("exp_mult", self.exp_mult, least=0.0)

    def init_theta(self, generator: torch.Generator) -> Theta:
        return init_mlp(generator, [2 + len(self.decays) + _TIME[self.time][0], *self.hidden, 2])

    def init(self, theta: Theta, params: Params, infos: Infos) -> OptState:
        return OptState({name: self._slots(p, infos[name]) for name, p in params.items()}, {})

    def _slots(self, param: Tensor, info: ParamInfo) -> Slots:
        width = {"width": width_multiplier(param, info)} if self.mup else {}
        return {"m": init_momenta(param, len(self.decays))} | width

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
        old = state.per_param
        slots = {name: {**old[name], "m": momenta(old[name]["m"], g, self.decays)} for name, g in grads.items()}
        recipe, tensors = Recipe(_GROUPS, Product(self.exp_mult)), Tensors(grads, params, slots, infos)
        sums = completed_sums(recipe, tensors, reduce)
        weights = with_shared(theta, 2 + len(self.decays), self.time_embedding(run, theta["b0"]))
        gains = constant([-self.step_mult] * len(grads), theta["b0"])
        if self.mup:
            gains = gains * torch.stack([own["width"] for own in slots.values()])
        return network(recipe, weights, tensors, sums, gains)[0], OptState(slots, {})

    def time_embedding(self, run: Run, like: Tensor) -> Tensor:
        """Return the last inputs of each entry, ``[k]``, in the dtype of ``like``."""
        return _TIME[self.time][1](run, like)
