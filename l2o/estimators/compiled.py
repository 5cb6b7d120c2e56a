"""A rule and a family compiled by ``torch.compile``: what all lanes do in an inner step, in few fused loops.

The update of a rule with a state of many small tensors is some hundred small operations, whose dispatch takes longer
than their arithmetic. Each combination of rule, family and number of lanes is compiled once, at its first step, in 10
to 60 s; torch keeps the result on disk for other runs. Results differ from the engine's own by rounding.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

from l2o import fused
from l2o.fused import Batches
from l2o.ops.kinds import lane_infos
from l2o.rules import Wrapped
from l2o.types import (
    Batch,
    Buffers,
    Grads,
    Infos,
    InnerState,
    Kind,
    OptState,
    Params,
    Run,
    Split,
    TaskData,
    TaskFamily,
    Theta,
    UpdateRule,
    Updates,
)


class CompiledRule(Wrapped):
    """``rule``, whose update of all lanes is compiled where it has no kernel; for unrolls without derivatives.

    kinds: of the family.
    """

    def __init__(self, rule: UpdateRule, kinds: Mapping[str, Kind]) -> None:
        self.rule, self.kinds = rule, kinds
        self._update = _compiled(self._all)

    def update_lanes(
        self, theta: Theta, grads: Grads, state: OptState, params: Params, run: Run, infos: Infos
    ) -> tuple[Updates, OptState]:
        """Return ``update`` of all lanes, by a kernel or compiled."""
        found = fused.update(self.rule, theta, grads, state, params, run, infos)
        if found is not None:
            return found
        return cast("tuple[Updates, OptState]", self._update(theta, grads, state, params, run))

    def unroll_lanes(
        self, theta: Theta, state: InnerState, batches: Batches, steps: int, generator: torch.Generator
    ) -> tuple[InnerState, Tensor] | None:
        """Take ``steps`` steps by the kernel of the rule, if any: losses ``[steps, lanes]``, see `l2o.fused.unroll`."""
        return fused.unroll_on(batches, self.rule, theta, state, steps, generator)

    def _all(self, theta: Theta, grads: Grads, state: OptState, params: Params, run: Run) -> Any:
        infos, needs_loss = lane_infos(params, self.kinds), self.needs_loss

        def one(theta: Theta, grads: Grads, state: OptState, params: Params, now: Sequence[Any]) -> Any:
            step, total, loss = now
            return self.rule.update(theta, grads, state, params, infos, Run(step, total, loss if needs_loss else None))

        # Contiguous, as at the start of a run: with other strides all would be compiled again.
        return tree_map(lambda t: t.contiguous(), vmap(one)(theta, grads, state, params, run[:3]))


class CompiledFamily(TaskFamily):
    """``family``, whose losses and gradients of all lanes are compiled where it has no closed form of them."""

    def __init__(self, family: TaskFamily) -> None:
        self.family = family
        self._losses = _compiled(vmap(family.loss))

    @property
    def kinds(self) -> Mapping[str, Kind]:
        return self.family.kinds

    @property
    def keyed(self) -> bool:
        return self.family.keyed

    def sample(self, generator: torch.Generator, lanes: int) -> TaskData:
        return self.family.sample(generator, lanes)

    def init(self, data: TaskData, generator: torch.Generator) -> tuple[Params, Buffers]:
        return self.family.init(data, generator)

    def batch(self, data: TaskData, split: Split, generator: torch.Generator) -> Batch:
        return self.family.batch(data, split, generator)

    def loss(self, params: Params, buffers: Buffers, data: TaskData, batch: Batch) -> tuple[Tensor, Buffers]:
        return self.family.loss(params, buffers, data, batch)

    def gradient_lanes(
        self, params: Params, buffers: Buffers, data: TaskData, batch: Batch
    ) -> tuple[Tensor, Buffers, Grads]:
        """Return losses ``[lanes]``, new buffers and gradients of all lanes, compiled where there is no closed form."""
        result = fused.gradient(self.family, params, buffers, data, batch)
        if result is not None:
            return result
        with torch.enable_grad():
            leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
            losses, after = self._losses(leaves, buffers, data, batch)
            grads = torch.autograd.grad(losses.sum(), list(leaves.values()), materialize_grads=True)
        after = {name: b.detach() for name, b in after.items()}
        return losses.detach(), after, dict(zip(params, grads, strict=True))

    def batches(self, data: TaskData, like: torch.Generator) -> Any:
        """See `l2o.fused.batches`."""
        return fused.batches(self.family, data, like)

    def transform_gradients(
        self, grads: Grads, buffers: Buffers, data: TaskData, batch: Batch
    ) -> tuple[Grads, Buffers]:
        return self.family.transform_gradients(grads, buffers, data, batch)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` of tensors, compiled at its first call."""

    def call(*arguments: Any) -> Any:
        return function(*arguments)

    # Under a code of its own: torch counts compilations by code, and gives up after eight.
    own = types.FunctionType(call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__)

    @cache
    def made() -> Callable[..., Any]:
        return torch.compile(own, dynamic=False)

    def called(*arguments: Any) -> Any:
        with warnings.catch_warnings():  # of caches that a compiled function leaves out, and of torch's own imports
            warnings.simplefilter("ignore")
            return made()(*arguments)

    return called


fused.UPDATES[CompiledRule] = CompiledRule.update_lanes
fused.UNROLLS[CompiledRule, Batches] = CompiledRule.unroll_lanes
fused.GRADIENTS[CompiledFamily] = CompiledFamily.gradient_lanes
fused.BATCHES[CompiledFamily] = CompiledFamily.batches
