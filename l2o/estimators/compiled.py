"""A rule and a family compiled by ``torch.compile``: what all lanes do in an inner step, in few fused loops.

The update of a rule with a state of many small tensors is some hundred small operations, whose dispatch takes longer
than their arithmetic. Each combination of rule, family and number of lanes is compiled once, at its first step, in 10
to 60 s; torch keeps the result on disk for other runs. Results differ from the engine's own by rounding.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

from l2o.types import (
    Batch,
    Buffers,
    Clock,
    Grads,
    Kind,
    OptState,
    Params,
    Split,
    Stats,
    TaskData,
    TaskFamily,
    Theta,
    UpdateRule,
    Updates,
)


class CompiledRule(UpdateRule):
    """``rule``, whose update of all lanes is compiled; for unrolls without derivatives."""

    def __init__(self, rule: UpdateRule) -> None:
        self.rule = rule
        self.needs_loss, self.learned_init, self.rests = rule.needs_loss, rule.learned_init, rule.rests  # type: ignore[misc]
        self._update = _compiled(self._all)

    def init_theta(self, generator: torch.Generator) -> Theta:
        return self.rule.init_theta(generator)

    def init(self, theta: Theta, params: Params, kinds: Mapping[str, Kind]) -> OptState:
        return self.rule.init(theta, params, kinds)

    def accumulate(
        self, theta: Theta, grads: Grads, state: OptState, params: Params, clock: Clock, loss: Tensor | None
    ) -> tuple[OptState, Stats]:
        return self.rule.accumulate(theta, grads, state, params, clock, loss)

    def apply(self, theta: Theta, state: OptState, stats: Stats, grads: Grads, params: Params, clock: Clock) -> Updates:
        return self.rule.apply(theta, state, stats, grads, params, clock)

    def fused_update(
        self, theta: Theta, grads: Grads, state: OptState, params: Params, clock: Clock, loss: Tensor | None
    ) -> tuple[Updates, OptState] | None:
        return cast("tuple[Updates, OptState]", self._update(theta, grads, state, params, clock, loss))

    def _all(self, *arguments: Any) -> Any:
        # Contiguous, as at the start of a run: with other strides all would be compiled again.
        return tree_map(lambda t: t.contiguous(), vmap(self._one)(*arguments))

    def _one(
        self, theta: Theta, grads: Grads, state: OptState, params: Params, clock: Clock, loss: Tensor
    ) -> tuple[Updates, OptState]:
        return self.rule.update(theta, grads, state, params, clock, loss if self.needs_loss else None)


class CompiledFamily(TaskFamily):
    """``family``, whose losses and gradients of all lanes are compiled where it has no closed form of them."""

    def __init__(self, family: TaskFamily) -> None:
        self.family = family
        self._losses = _compiled(vmap(family.loss))

    @property
    def keyed(self) -> bool:  # type: ignore[override]  # not of the class: it is that of the family
        return self.family.keyed

    def sample(self, generator: torch.Generator, lanes: int) -> TaskData:
        return self.family.sample(generator, lanes)

    def init(self, data: TaskData, generator: torch.Generator) -> tuple[Params, Buffers]:
        return self.family.init(data, generator)

    def batch(self, data: TaskData, split: Split, generator: torch.Generator) -> Batch:
        return self.family.batch(data, split, generator)

    def loss(self, params: Params, buffers: Buffers, data: TaskData, batch: Batch) -> tuple[Tensor, Buffers]:
        return self.family.loss(params, buffers, data, batch)

    def fused_gradient(
        self, params: Params, buffers: Buffers, data: TaskData, batch: Batch
    ) -> tuple[Tensor, Buffers, Grads] | None:
        result = self.family.fused_gradient(params, buffers, data, batch)
        if result is not None:
            return result
        with torch.enable_grad():
            leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
            losses, after = self._losses(leaves, buffers, data, batch)
            grads = torch.autograd.grad(losses.sum(), list(leaves.values()), materialize_grads=True)
        after = {name: b.detach() for name, b in after.items()}
        return losses.detach(), after, dict(zip(params, grads, strict=True))

    def transform_gradients(
        self, grads: Grads, buffers: Buffers, data: TaskData, batch: Batch
    ) -> tuple[Grads, Buffers]:
        return self.family.transform_gradients(grads, buffers, data, batch)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` of tensors, compiled by itself: torch would count the recompilations of all lanes' together."""

    def called(*arguments: Any) -> Any:
        with warnings.catch_warnings():  # of caches that a compiled function leaves out, and of torch's own imports
            warnings.simplefilter("ignore")
            return made()(*arguments)

    @cache
    def made() -> Callable[..., Any]:
        return torch.compile(function, dynamic=False, isolate_recompiles=True)

    return called
