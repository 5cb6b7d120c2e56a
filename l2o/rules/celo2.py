"""Celo2 (Moudgil et al. 2026, arXiv 2602.19142); celo/optimizers/celo2_optax.py and celo2.py of amoudgl/celo."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from l2o._checks import as_many, each, real, whole
from l2o.ops.factored import preconditioner
from l2o.ops.features import second_moment_scale
from l2o.ops.moments import debias, momenta
from l2o.ops.networks import columns, init_mlp, mlp, over_entries
from l2o.ops.orthogonal import orthogonalize
from l2o.ops.statistics import (
    UNFACTORED_GROUPS,
    VELO_GROUPS,
    advance_statistics,
    channels,
    clip_gradient,
    init_statistics,
    statistics,
)
from l2o.types import Clock, ConfigurationError, Grads, Kind, OptState, Params, Slots, Stats, Theta, UpdateRule, Updates

_ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh}
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
    Needs whole tensors: for the scaling of its output, and Newton-Schulz for all of a matrix at once.
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
        each("hidden", self.hidden, whole)
        if self.activation not in _ACTIVATIONS:
            raise ConfigurationError(f"activation={self.activation!r}: expected one of {sorted(_ACTIVATIONS)}")
        each("decays", self.decays, partial(real, least=0.0, below=1.0))
        each("adafactor_decays", self.adafactor_decays, partial(real, least=0.0, below=1.0))
        as_many("adafactor_decays", self.adafactor_decays, "decays", self.decays)
        each("adam", self.adam, _kind)
        for name in ("rms_decay", "adam_beta1", "adam_beta2"):
            real(name, getattr(self, name), least=0.0, below=1.0)
        for name in ("step_mult", "adam_mult"):
            real(name, getattr(self, name), above=0.0)
        for name in ("exp_mult", "weight_decay"):
            real(name, getattr(self, name), least=0.0)

    def init_theta(self, generator: torch.Generator) -> Theta:
        return init_mlp(generator, [6 + 8 * len(self.decays), *self.hidden, 2])

    def init(self, theta: Theta, params: Params, kinds: Mapping[str, Kind]) -> OptState:
        return OptState({name: self._slots(p, kinds[name]) for name, p in params.items()}, {})

    def _slots(self, param: Tensor, kind: Kind) -> Slots:
        if kind in self.adam:
            return {slot: torch.zeros_like(param) for slot in _ADAM}
        return init_statistics(param, self.decays, self.rms_decay) | {"count": param.new_zeros(())}

    def accumulate(
        self, theta: Theta, grads: Grads, state: OptState, params: Params, clock: Clock, loss: Tensor | None
    ) -> tuple[OptState, Stats]:
        slots = {name: self._advance(state.per_param[name], g) for name, g in grads.items()}
        stats: Stats = {}
        for name, g in _learned(grads, slots).items():
            squares = self._features(g, params[name], slots[name]).square()
            stats[name] = {
                "sum_of_squares": _matrix_sum(squares, g.ndim),
                "sum_of_squared_entries": params[name].square().sum(),
            }
        return OptState(slots, {}), stats

    def _advance(self, slots: Slots, grad: Tensor) -> Slots:
        if _ADAM[0] in slots:
            seen = zip(_ADAM, (grad, grad.square()), (self.adam_beta1, self.adam_beta2), strict=True)
            return {slot: momenta(slots[slot].unsqueeze(0), x, [beta]).squeeze(0) for slot, x, beta in seen}
        own = advance_statistics(slots, clip_gradient(grad), self.decays, self.rms_decay, self.adafactor_decays)
        return own | {"count": slots["count"] + 1.0}

    def apply(self, theta: Theta, state: OptState, stats: Stats, grads: Grads, params: Params, clock: Clock) -> Updates:
        features: dict[bool, dict[str, tuple[Tensor]]] = {False: {}, True: {}}
        for name, g in _learned(grads, state.per_param).items():
            x = self._features(g, params[name], state.per_param[name])
            scale = second_moment_scale(stats[name]["sum_of_squares"], _matrix_size(g), EPS_NORM)
            features[g.ndim >= 2][name] = (columns(x * scale),)  # two numbers of channels, so two calls
        outputs = over_entries(partial(self._network, theta), features[False])
        outputs |= over_entries(partial(self._network, theta), features[True])
        updates = {}
        for name, p in params.items():
            if name in outputs:
                step = self._direction(outputs[name][0].reshape(p.shape), stats[name]) + self.weight_decay * p
            else:
                first, second = (state.per_param[name][slot] for slot in _ADAM)
                step = self.adam_mult * (first * torch.rsqrt(second + EPS_ROOT) + self.weight_decay * p)
            updates[name] = -self.step_mult * step
        return updates

    def _features(self, grad: Tensor, param: Tensor, slots: Slots) -> Tensor:
        """``[15 or 30, *shape]`` with three decays."""
        seen = slots
        if self.bias_correction:
            decays = {"m": self.decays, "v": (self.rms_decay,)}
            seen = {
                slot: debias(moments, decays.get(slot, self.adafactor_decays), slots["count"])
                for slot, moments in slots.items()
                if slot != "count"
            }
        x = statistics(clip_gradient(grad), param, seen, rms_eps=EPS_ROOT)
        x = x._replace(grad_factor=preconditioner(slots, grad.shape))  # which the original never corrects
        return channels(x, UNFACTORED_GROUPS if grad.ndim < 2 else VELO_GROUPS)

    def _network(self, theta: Theta, x: Tensor) -> tuple[Tensor]:
        weights = theta | {"w0": theta["w0"][: len(x)]}
        direction, magnitude = mlp(weights, x, activation=_ACTIVATIONS[self.activation]).split(1)
        return (direction * (magnitude * self.exp_mult).exp(),)

    def _direction(self, d: Tensor, stats: Slots) -> Tensor:
        """What is left of the network's output ``d``, of the tensor's shape: of unit size."""
        if self.param_scale:
            d = d * (stats["sum_of_squared_entries"] / max(d.numel(), 1) + EPS_NORM).sqrt()
        if self.orthogonalize and d.ndim >= 2:
            d = orthogonalize(d)
        return d * second_moment_scale(_matrix_sum(d.square(), d.ndim), _matrix_size(d), EPS_NORM)


def _kind(name: str, value: Any) -> None:
    if value not in get_args(Kind):
        raise ConfigurationError(f"{name}={value!r}: expected one of {', '.join(get_args(Kind))}")


def _learned(grads: Grads, slots: Mapping[str, Slots]) -> Grads:
    """The gradients of the tensors that Adam does not update."""
    return {name: g for name, g in grads.items() if _ADAM[0] not in slots[name]}


def _matrix_sum(x: Tensor, ndim: int) -> Tensor:
    """``x [..., *shape]`` summed over the last two of the ``ndim`` axes of a tensor, which stay at size 1."""
    return x.sum(tuple(range(-min(ndim, 2), 0)), keepdim=True) if ndim else x


def _matrix_size(x: Tensor) -> int:
    return max(math.prod(x.shape[-2:]), 1)
