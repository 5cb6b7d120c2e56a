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

from l2o.checks import check_each, check_float, check_int, check_same_length
from l2o.kernels.coordinatewise import Tensors, completed_sums, network
from l2o.kernels.moments import advance_statistics
from l2o.ops.coordinatewise import Product, Recipe
from l2o.ops.factored import row_means
from l2o.ops.features import TIMESCALES, step_embedding
from l2o.ops.kinds import width_multiplier
from l2o.ops.moments import learned_decays
from l2o.ops.networks import init_mlp, with_shared
from l2o.ops.numeric import constant
from l2o.ops.statistics import SMALL_FC_GROUPS, Decays, init_statistics
from l2o.types import LOCAL, Grads, Infos, OptState, ParamInfo, Params, Reduce, Run, Slots, Theta, UpdateRule, Updates


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

    learned_init = False
    outputs: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_each("hidden", self.hidden, check_int)
        decay = partial(check_float, least=0.0, below=1.0)
        check_each("momentum_decays", self.momentum_decays, decay)
        check_each("adafactor_decays", self.adafactor_decays, decay)
        decay("rms_decay", self.rms_decay)
        check_float("step_mult", self.step_mult, above=0.0)
        check_float("exp_mult", self.exp_mult, least=0.0)
        check_same_length("adafactor_decays", self.adafactor_decays, "momentum_decays", self.momentum_decays)

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

    def init(self, theta: Theta, params: Params, infos: Infos) -> OptState:
        return OptState({name: self._slots(p, infos[name]) for name, p in params.items()}, {})

    def _slots(self, param: Tensor, info: ParamInfo) -> Slots:
        slots = init_statistics(param, info, len(self.momentum_decays))
        return slots | ({"width": width_multiplier(param, info)} if self.mup else {})

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
        new = advance_statistics(state.per_param, grads, infos, self.decays(theta), reduce)
        recipe, tensors = self.recipe(), Tensors(grads, params, new, infos, row_means(new, infos, reduce))
        sums = completed_sums(recipe, tensors, reduce)
        weights, gains = self.weights(theta, run), self.gains(state.per_param, theta["b0"])
        means = self._means(recipe, weights, tensors, sums, gains, reduce)
        updates, _ = network(recipe, weights, tensors, sums, gains, means)
        return updates, OptState({name: {**state.per_param[name], **own} for name, own in new.items()}, {})

    def decays(self, theta: Theta) -> Decays:
        """Return those of moments as they were learned, also ``[lanes, decays]`` of ``theta [lanes, ...]``."""
        return Decays(
            learned_decays(self.momentum_decays, theta["momentum_decays"]),
            learned_decays((self.rms_decay,), theta["rms_decays"]).clamp(0.0, 1.0),
            learned_decays(self.adafactor_decays, theta["adafactor_decays"]),
        )

    def weights(self, theta: Theta, run: Run) -> Theta:
        """Return the network's for channels alone, the time being a part of ``b0``.

        Of lanes with ``run.step [lanes, 1, 1]`` and ``b0 [lanes, 1, units]``, which is then the result's shape.
        """
        return with_shared(theta, theta["w0"].shape[-2] - len(TIMESCALES), step_embedding(run, theta["b0"]))

    def gains(self, slots: Mapping[str, Slots], like: Tensor) -> Tensor:
        """Return factors of the head's outputs, ``[tensors]``; ``[lanes, tensors]`` where the widths are of lanes."""
        gains = constant([-self._gain] * len(slots), like)
        return gains * torch.stack([own["width"] for own in slots.values()], -1) if self.mup else gains

    @property
    def _gain(self) -> float:
        """What the head's output is multiplied with, but for the sign and ``mup``."""
        return self.step_mult

    def recipe(self) -> Recipe:
        """Return what the network sees of each entry, and what is made of its outputs."""
        return Recipe(SMALL_FC_GROUPS, Product(self.exp_mult))

    def _means(
        self,
        recipe: Recipe,
        weights: Theta,
        tensors: Tensors,
        sums: Mapping[str, Tensor],
        gains: Tensor,
        reduce: Reduce,
    ) -> Tensor | None:
        """Those of the outputs that the head reads, ``[tensors, outputs]``."""
        return None
