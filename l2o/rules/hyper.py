"""What VeLO and Celo share: an MLP for the entries of a tensor, and a scheduler that says how far it goes."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from l2o.checks import check_each, check_float, check_int, check_same_length
from l2o.kernels.coordinatewise import Tensors, feature_sums, network
from l2o.kernels.moments import advance_statistics
from l2o.ops.coordinatewise import Product, Recipe
from l2o.ops.factored import row_means
from l2o.ops.features import square_sums
from l2o.ops.kinds import size
from l2o.ops.networks import init_mlp
from l2o.ops.scheduler import init_scheduler
from l2o.ops.statistics import CLIP, VELO_GROUPS, Decays
from l2o.types import LOCAL, Grads, Infos, OptState, Params, Reduce, Run, Slots, Theta, UpdateRule, Updates


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
        """Take one step of the scheduler; return slots that it changes of each of ``params``, and all shared ones."""

    @abc.abstractmethod
    def mixed(self, theta: Theta, state: OptState, names: Sequence[str]) -> tuple[Theta, Tensor]:
        """Return the network, one or one a tensor (see `l2o.kernels.coordinatewise.network`), and rates ``[tensors]``.

        state: after `schedule`.     names: of the tensors that have entries, one at least.
        """

    def init_theta_of(self, generator: torch.Generator, inputs: int, heads: Mapping[str, int]) -> Theta:
        """Return a scheduler with ``inputs`` and ``heads``, and a stack of MLPs."""
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
        decays = Decays.fixed(self.decays, self.rms_decay, self.adafactor_decays, shared["loss_means"])
        new = advance_statistics(state.per_param, grads, infos, decays, reduce, CLIP)
        recipe = Recipe(VELO_GROUPS, Product(self.exp_mult), diag_eps=0.0, clip=CLIP)
        tensors = Tensors(grads, params, new, infos, row_means(new, infos, reduce))
        parts = {name: {"features": own} for name, own in feature_sums(recipe, tensors).items()}
        sums = reduce.shards(
            {name: own | {"param": square_sums(params[name].unsqueeze(0))} for name, own in parts.items()}
        )
        slots = {name: state.per_param[name] | own | scheduled.get(name, {}) for name, own in new.items()}
        filled = _filled(grads, infos)
        updates = {name: torch.zeros_like(g) for name, g in grads.items() if name not in filled}
        if names := list(filled):
            weights, rates = self.mixed(theta, OptState(slots, shared), names)
            sizes = torch.cat([sums[name]["param"] / size(infos[name]) for name in names])
            gains = -self.step_mult * rates * (sizes + 1e-9).sqrt()
            features = {name: sums[name]["features"] for name in names}
            updates |= network(recipe, weights, tensors.only(names), features, gains)[0]
        return {name: updates[name] for name in grads}, OptState(slots, shared)


def _filled(tensors: dict[str, Tensor], infos: Infos) -> dict[str, Tensor]:
    """Those with entries: an empty parameter has nothing to say to the others, and no mean."""
    return {name: t for name, t in tensors.items() if math.prod(infos[name].shape)}
