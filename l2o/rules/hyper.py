"""What VeLO and Celo share: an MLP for the entries of a tensor, and a scheduler that says how far it goes."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from l2o.checks import check_each, check_float, check_int, check_same_length
from l2o.ops.factored import row_means
from l2o.ops.features import channel_sums, entry_sum, normalised
from l2o.ops.kinds import size
from l2o.ops.networks import init_mlp, mlp
from l2o.ops.scheduler import init_scheduler
from l2o.ops.statistics import VELO_GROUPS, Decays, advance_statistics, channels, clip_gradient, statistics
from l2o.types import LOCAL, Grads, Infos, OptState, Params, Reduce, Run, Slots, Theta, UpdateRule, Updates

Network = Callable[[Tensor], tuple[Tensor]]


@dataclass(frozen=True)
class HyperRule(UpdateRule):
    """``update = -step_mult * rate * rms(p) * o0 * exp(exp_mult * o1)``; subclasses say which network, and the rate.

    The networks of the originals have a third output, which nothing reads; it is left out.
    """

    needs_loss = True

    lstm_hidden: int = 64
    inits: int = 1
    hidden: tuple[int, ...] = (4, 4)
    decays: tuple[float, ...] = (0.9, 0.99, 0.999)
    rms_decay: float = 0.999
    adafactor_decays: tuple[float, ...] = (0.9, 0.99, 0.999)
    step_mult: float = 0.001
    exp_mult: float = 0.001

    def __post_init__(self) -> None:
        check_int("lstm_hidden", self.lstm_hidden)
        check_int("inits", self.inits)
        check_each("hidden", self.hidden, check_int)
        check_each("decays", self.decays, partial(check_float, least=0.0, below=1.0))
        check_each("adafactor_decays", self.adafactor_decays, partial(check_float, least=0.0, below=1.0))
        check_same_length("adafactor_decays", self.adafactor_decays, "decays", self.decays)
        check_float("rms_decay", self.rms_decay, least=0.0, below=1.0)
        check_float("step_mult", self.step_mult, above=0.0)
        check_float("exp_mult", self.exp_mult, least=0.0)

    @abc.abstractmethod
    def schedule(
        self, theta: Theta, state: OptState, params: Params, infos: Infos, run: Run, reduce: Reduce
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
        scheduled, shared = self.schedule(theta, state, _filled(params, infos), infos, run, reduce)
        clipped = {name: clip_gradient(g) for name, g in grads.items()}
        decays = Decays.fixed(self.decays, self.rms_decay, self.adafactor_decays, shared["loss_means"])
        new = advance_statistics(state.per_param, clipped, infos, decays, reduce)
        means = row_means(new, infos, reduce)
        features = {
            name: channels(statistics(g, params[name], new[name], means[name], infos[name], diag_eps=0.0), VELO_GROUPS)
            for name, g in clipped.items()
        }
        sums = reduce.shards(
            {
                name: {"features": channel_sums(x.square()), "param": entry_sum(params[name].square())}
                for name, x in features.items()
            }
        )
        slots = {name: state.per_param[name] | own | scheduled.get(name, {}) for name, own in new.items()}
        inputs = {
            name: normalised(x, sums[name]["features"], size(infos[name]))
            for name, x in _filled(features, infos).items()
        }
        updates = {name: torch.zeros_like(g) for name, g in grads.items()}
        for name, output in self.outputs(theta, OptState(slots, shared), inputs).items():
            scale = (sums[name]["param"] / size(infos[name]) + 1e-9).sqrt()
            updates[name] = (-self.step_mult * scale * output).reshape(grads[name].shape)
        return updates, OptState(slots, shared)

    def network(self, weights: Theta) -> Network:
        """``o0 * exp(exp_mult * o1)`` of columns of features."""

        def network(x: Tensor) -> tuple[Tensor]:
            direction, magnitude = mlp(weights, x).split(1)
            return (direction * (magnitude * self.exp_mult).exp(),)

        return network


def _filled(tensors: dict[str, Tensor], infos: Infos) -> dict[str, Tensor]:
    """Those with entries: an empty parameter has nothing to say to the others, and no mean."""
    return {name: t for name, t in tensors.items() if math.prod(infos[name].shape)}
