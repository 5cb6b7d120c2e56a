"""What VeLO and Celo share: an MLP for the entries of a tensor, and a scheduler that says how far it goes."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from l2o._checks import as_many, each, real, whole
from l2o.ops.features import normalised, square_sums
from l2o.ops.networks import init_mlp, mlp
from l2o.ops.scheduler import init_scheduler
from l2o.ops.statistics import VELO_GROUPS, advance_statistics, channels, clip_gradient, statistics
from l2o.types import Clock, Grads, OptState, Params, Slots, Stats, Theta, UpdateRule, Updates

Network = Callable[[Tensor], tuple[Tensor]]


@dataclass(frozen=True)
class HyperRule(UpdateRule):
    """``update = -step_mult * rate * rms(p) * o0 * exp(exp_mult * o1)``; subclasses say which network, and the rate.

    The networks of the originals have a third output, which nothing reads; it is left out.
    Needs whole tensors: factored statistics are means over axes, and VeLO's scheduler sees means over a tensor.
    """

    needs_loss: ClassVar[bool] = True

    lstm_hidden: int = 64
    inits: int = 1
    hidden: tuple[int, ...] = (4, 4)
    decays: tuple[float, ...] = (0.9, 0.99, 0.999)
    rms_decay: float = 0.999
    adafactor_decays: tuple[float, ...] = (0.9, 0.99, 0.999)
    step_mult: float = 0.001
    exp_mult: float = 0.001

    def __post_init__(self) -> None:
        whole("lstm_hidden", self.lstm_hidden)
        whole("inits", self.inits)
        each("hidden", self.hidden, whole)
        each("decays", self.decays, partial(real, least=0.0, below=1.0))
        each("adafactor_decays", self.adafactor_decays, partial(real, least=0.0, below=1.0))
        as_many("adafactor_decays", self.adafactor_decays, "decays", self.decays)
        real("rms_decay", self.rms_decay, least=0.0, below=1.0)
        real("step_mult", self.step_mult, above=0.0)
        real("exp_mult", self.exp_mult, least=0.0)

    @abc.abstractmethod
    def schedule(
        self, theta: Theta, state: OptState, params: Params, clock: Clock, loss: Tensor
    ) -> tuple[dict[str, Slots], Slots]:
        """One step of the scheduler: the slots that it changes of each tensor of ``params``, and all shared ones."""

    @abc.abstractmethod
    def outputs(self, theta: Theta, state: OptState, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """``rate * o0 * exp(exp_mult * o1)``, ``[1, entries]``, of the ``features [channels, entries]`` of tensors."""

    def init_theta_of(self, generator: torch.Generator, inputs: int, heads: Mapping[str, int]) -> Theta:
        """A scheduler with ``inputs`` and ``heads``, and a stack of MLPs."""
        theta = init_scheduler(generator, inputs, self.lstm_hidden, heads)
        sizes = [6 + 8 * len(self.decays), *self.hidden, 2]
        stack = [init_mlp(generator, sizes) for _ in range(self.inits)]
        return theta | {name: torch.stack([weights[name] for weights in stack]) for name in stack[0]}

    def accumulate(
        self, theta: Theta, grads: Grads, state: OptState, params: Params, clock: Clock, loss: Tensor | None
    ) -> tuple[OptState, Stats]:
        assert loss is not None  # needs_loss
        scheduled, shared = self.schedule(theta, state, _filled(params), clock, loss)
        slots, stats = {}, {}
        for name, g in grads.items():
            own = advance_statistics(
                state.per_param[name], clip_gradient(g), self.decays, self.rms_decay, self.adafactor_decays
            )
            slots[name] = state.per_param[name] | own | scheduled.get(name, {})
            squares = {"sum_of_squared_entries": params[name].square().sum()}
            stats[name] = square_sums(_features(g, params[name], own)) | squares
        return OptState(slots, shared), stats

    def apply(self, theta: Theta, state: OptState, stats: Stats, grads: Grads, params: Params, clock: Clock) -> Updates:
        features = {
            name: normalised(_features(g, params[name], state.per_param[name]), stats[name])
            for name, g in _filled(grads).items()
        }
        updates = {name: torch.zeros_like(g) for name, g in grads.items()}
        for name, output in self.outputs(theta, state, features).items():
            size = (stats[name]["sum_of_squared_entries"] / stats[name]["count"] + 1e-9).sqrt()
            updates[name] = (-self.step_mult * size * output).reshape(grads[name].shape)
        return updates

    def network(self, weights: Theta) -> Network:
        """``o0 * exp(exp_mult * o1)`` of columns of features."""

        def network(x: Tensor) -> tuple[Tensor]:
            direction, magnitude = mlp(weights, x).split(1)
            return (direction * (magnitude * self.exp_mult).exp(),)

        return network


def _features(grad: Tensor, param: Tensor, slots: Slots) -> Tensor:
    """``[channels, *shape]``, not normalised."""
    return channels(statistics(clip_gradient(grad), param, slots, diag_eps=0.0), VELO_GROUPS)


def _filled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those with entries: an empty parameter has nothing to say to the others, and no mean."""
    return {name: t for name, t in tensors.items() if t.numel()}
