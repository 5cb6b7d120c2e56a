"""Celo2 (Moudgil et al. 2026, arXiv 2602.19142); celo/optimizers/celo2_optax.py and celo2.py of amoudgl/celo."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from l2o.checks import check_choice, check_each, check_float, check_int, check_same_length
from l2o.kernels.coordinatewise import Tensors, feature_sums, network
from l2o.kernels.moments import advance_statistics
from l2o.ops.coordinatewise import ACTIVATIONS, Product, Recipe, raw_factors
from l2o.ops.factored import row_means
from l2o.ops.features import second_moment_scale, square_sums
from l2o.ops.kinds import size
from l2o.ops.moments import debias, momenta
from l2o.ops.networks import init_mlp
from l2o.ops.orthogonal import orthogonalize
from l2o.ops.statistics import (
    CLIP,
    UNFACTORED_GROUPS,
    VELO_GROUPS,
    Decays,
    init_statistics,
)
from l2o.types import (
    LOCAL,
    Grads,
    Infos,
    Kind,
    OptState,
    ParamInfo,
    Params,
    Reduce,
    Run,
    Slots,
    Sum,
    Theta,
    UpdateRule,
    Updates,
)

_ADAM = ("first", "second")
"""Slots of a tensor that Adam updates: its moments."""
EPS_ROOT = 1e-8
"""Beside every second moment under a root, the Adam path's too."""
EPS_NORM = 1e-9
"""Beside the mean squares that features and directions are scaled by."""


@dataclass(frozen=True)
class Celo2(UpdateRule):
    """An MLP an entry gives a direction, of which only the shape counts: it is orthogonalised and scaled to unit size.

    ``update = -step_mult * (N(orthogonalize(o0 * exp(exp_mult * o1))) + weight_decay * p)``, where N divides by the
    root mean square over the last two axes (of which vectors have one, scalars none); so are the features scaled.

    hidden: units of the MLP.    activation: of its hidden layers, ``relu`` or ``tanh``.
    decays: of momenta.    rms_decay: of the second moment.
    adafactor_decays: of the factored second moments, as many.
    orthogonalize: make matrices nearly orthogonal, in larger tensors those of the last two axes. Celo2-base does not.
    adam: kinds of tensors that Adam updates instead, without bias correction:
        ``-step_mult * adam_mult * (m / sqrt(v + 1e-8) + weight_decay * p)``, moments by
        ``adam_beta1, adam_beta2``. The full Celo2 has ``("vector", "embedding")``. What kind a tensor is its group
        says, or else its axes do.
    bias_correction: show the MLP bias-corrected moments.
    param_scale: multiply the network's output by the tensor's root mean square, which N undoes but for its epsilon.
    weight_decay: decoupled, a part of each step; independent of the plug-in's, which is measured over the run.
    θ: ``w0, b0, ...``. Scalars and vectors have no rows and columns and use the first half of ``w0``.
    Slots: ``m, v, count``, ``row, col`` or ``diag``; on the Adam path ``first, second``.
    """

    hidden: tuple[int, ...] = (8, 8)
    activation: Literal["relu", "tanh"] = "relu"
    decays: tuple[float, ...] = (0.9, 0.99, 0.999)
    rms_decay: float = 0.95
    adafactor_decays: tuple[float, ...] = (0.9, 0.99, 0.999)
    step_mult: float = 0.001
    exp_mult: float = 0.0
    orthogonalize: bool = True
    adam: tuple[Kind, ...] = ()
    adam_mult: float = 20.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    bias_correction: bool = False
    param_scale: bool = False
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_each("hidden", self.hidden, check_int)
        check_choice("activation", self.activation, ACTIVATIONS)
        check_each("decays", self.decays, partial(check_float, least=0.0, below=1.0))
        check_each("adafactor_decays", self.adafactor_decays, partial(check_float, least=0.0, below=1.0))
        check_same_length("adafactor_decays", self.adafactor_decays, "decays", self.decays)
        check_each("adam", self.adam, lambda name, kind: check_choice(name, kind, get_args(Kind)))
        for name in ("rms_decay", "adam_beta1", "adam_beta2"):
            check_float(name, getattr(self, name), least=0.0, below=1.0)
        for name in ("step_mult", "adam_mult"):
            check_float(name, getattr(self, name), above=0.0)
        for name in ("exp_mult", "weight_decay"):
            check_float(name, getattr(self, name), least=0.0)

    def init_theta(self, generator: torch.Generator) -> Theta:
        return init_mlp(generator, [6 + 8 * len(self.decays), *self.hidden, 2])

    def init(self, theta: Theta, params: Params, infos: Infos) -> OptState:
        return OptState({name: self._slots(p, infos[name]) for name, p in params.items()}, {})

    def _slots(self, param: Tensor, info: ParamInfo) -> Slots:
        if info.kind in self.adam:
            return {slot: torch.zeros_like(param) for slot in _ADAM}
        return init_statistics(param, info, len(self.decays)) | {"count": param.new_zeros(())}

    def needs_whole(self, info: ParamInfo) -> bool:
        return self.orthogonalize and len(info.shape) >= 2 and info.kind not in self.adam

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
        learned = {name: g for name, g in grads.items() if infos[name].kind not in self.adam}
        moved, own = self._adam({name: g for name, g in grads.items() if name not in learned}, state, params)
        old = {name: state.per_param[name] for name in learned}
        decays = Decays.fixed(self.decays, self.rms_decay, self.adafactor_decays, next(iter(grads.values())))
        new = advance_statistics(old, learned, infos, decays, reduce, CLIP)
        slots = {name: {**x, "count": old[name]["count"] + 1.0} for name, x in new.items()}
        seen = {name: self._debiased(own) for name, own in slots.items()}
        means = row_means(seen, infos, reduce)
        if self.bias_correction:  # of the momenta's factor alone: the original never corrects the gradient's
            raw = row_means(slots, infos, reduce)
            seen = {name: own | raw_factors(slots[name], raw[name]) for name, own in seen.items()}
        tensors = Tensors(learned, params, seen, infos, means)
        # Two numbers of channels, so two calls.
        flat, matrices = (
            tensors.only([n for n in learned if (len(infos[n].shape) >= 2) is two]) for two in (False, True)
        )
        recipes = {two: self._recipe(two) for two in (False, True)}
        squares = feature_sums(recipes[False], flat) | feature_sums(recipes[True], matrices)
        sums = reduce.shards({name: {"features": own, **self._size(params[name])} for name, own in squares.items()})
        outputs = self._outputs(theta, recipes[False], flat, sums) | self._outputs(theta, recipes[True], matrices, sums)
        steps = self._steps(outputs, sums, params, infos, reduce)
        updates = steps | moved
        return {name: updates[name] for name in grads}, OptState({name: (slots | own)[name] for name in grads}, {})

    def _size(self, param: Tensor) -> dict[str, Sum]:
        """The sum that the root mean square of a tensor is made of, where it counts."""
        return {"param": square_sums(param.unsqueeze(0))} if self.param_scale else {}

    def _recipe(self, matrices: bool) -> Recipe:
        return Recipe(
            VELO_GROUPS if matrices else UNFACTORED_GROUPS,
            Product(self.exp_mult),
            self.activation,
            rms_eps=EPS_ROOT,
            clip=CLIP,
            scale_eps=EPS_NORM,
            matrices=True,
            raw=self.bias_correction,
        )

    def _debiased(self, slots: Slots) -> Slots:
        """The slots that the MLP is shown."""
        if not self.bias_correction:
            return slots
        decays = {"m": self.decays, "v": (self.rms_decay,)}
        return {
            slot: debias(moments, decays.get(slot, self.adafactor_decays), slots["count"])
            for slot, moments in slots.items()
            if slot != "count"
        }

    def _adam(self, grads: Grads, state: OptState, params: Params) -> tuple[Updates, dict[str, Slots]]:
        """Updates and new slots of the tensors of kinds that Adam updates."""
        updates, slots = {}, {}
        for name, g in grads.items():
            seen = zip(_ADAM, (g, g.square()), (self.adam_beta1, self.adam_beta2), strict=True)
            old = state.per_param[name]
            slots[name] = {slot: momenta(old[slot].unsqueeze(0), x, [beta]).squeeze(0) for slot, x, beta in seen}
            first, second = slots[name].values()
            step = self.adam_mult * (first * torch.rsqrt(second + EPS_ROOT) + self.weight_decay * params[name])
            updates[name] = -self.step_mult * step
        return updates, slots

    def _outputs(self, theta: Theta, recipe: Recipe, tensors: Tensors, sums: Mapping[str, Slots]) -> dict[str, Tensor]:
        """What the network says of each tensor, in its shape."""
        if not tensors.grads:
            return {}
        features = {name: sums[name]["features"] for name in tensors.grads}
        own = next(iter(features.values())).shape[0]
        gains = [theta["b0"].new_ones(1)] * len(features)
        if self.param_scale:
            gains = [(sums[name]["param"] / size(tensors.infos[name]) + EPS_NORM).sqrt() for name in features]
        weights = theta | {"w0": theta["w0"][:own]}
        return network(recipe, weights, tensors, features, torch.cat(gains))[0]

    def _steps(
        self, outputs: dict[str, Tensor], sums: Mapping[str, Slots], params: Params, infos: Infos, reduce: Reduce
    ) -> Updates:
        """The updates: what is left of the network's outputs, of unit size, and weight decay."""
        directions = {name: orthogonalize(d) if self.needs_whole(infos[name]) else d for name, d in outputs.items()}
        squares = reduce.shards({name: {"d": _matrix_sum(d.square(), infos[name])} for name, d in directions.items()})
        updates = {}
        for name, d in directions.items():
            scale = second_moment_scale(squares[name]["d"], _matrix_size(infos[name]), EPS_NORM)
            updates[name] = d * (scale * -self.step_mult)
            if self.weight_decay:
                updates[name] = updates[name] - self.step_mult * self.weight_decay * params[name]
        return updates


def _matrix_sum(x: Tensor, info: ParamInfo) -> Sum:
    """``x [..., *shape]`` summed over the last two of the tensor's axes, which stay at size 1."""
    axes = len(info.shape)
    last = range(max(axes - 2, 0), axes)
    return Sum(x.sum([axis - axes for axis in last], keepdim=True) if axes else x, tuple(last))


def _matrix_size(info: ParamInfo) -> int:
    return max(math.prod(info.shape[-2:]), 1)
