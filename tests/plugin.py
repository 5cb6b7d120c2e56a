"""What the tests of the plug-in share: parameters of every shape, their gradients, a rule that does all a rule may."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tables import RULES, generator
from torch import Tensor, nn

from l2o.optim import LearnedOptimizer
from l2o.rules import SGD
from l2o.types import LOCAL, Grads, Infos, OptState, Params, Reduce, Run, Sum, Theta, UpdateRule, Updates

TOTAL = 20
KINDS = ("matrix", "vector", "embedding", "output")


@dataclass(frozen=True)
class Mixing(UpdateRule):
    """Normalised descent times the mean of the last losses: tensors mix, slots are shared, the loss is read.

    The slot ``last`` is the gradient itself, not a copy: a rule only promises not to write to its inputs.
    """

    needs_loss = True
    memory: int = 3

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {"log_lr": torch.tensor(-2.0, dtype=torch.float32)}

    def init(self, theta: Theta, params: Params, infos: Infos) -> OptState:
        kind = {n: p.new_full((), KINDS.index(infos[n].kind)) for n, p in params.items()}
        losses = next(iter(params.values())).new_zeros(self.memory)
        return OptState(
            {n: {"last": torch.zeros_like(p), "kind": kind[n]} for n, p in params.items()}, {"losses": losses}
        )

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
        assert run.loss is not None
        losses = torch.cat([state.shared["losses"][1:], run.loss.unsqueeze(0)])
        slots = {n: {**state.per_param[n], "last": g} for n, g in grads.items()}
        sums = reduce.shards({n: {"squares": Sum(g.square().sum(), tuple(range(g.ndim)))} for n, g in grads.items()})
        norm = (reduce.tensors({n: own["squares"] for n, own in sums.items()}) + 1e-8).sqrt()
        updates = {n: -theta["log_lr"].exp() * losses.mean() * g / norm for n, g in grads.items()}
        return updates, OptState(slots, {"losses": losses})


def source(rule: UpdateRule) -> tuple[UpdateRule, Theta]:
    return rule, rule.init_theta(generator())


def make(params: Any, rule: UpdateRule | None = None, **settings: Any) -> LearnedOptimizer:
    return LearnedOptimizer(params, source(rule or SGD(lr=0.1)), **{"total_steps": TOTAL, **settings})


def untouched(optimizer: LearnedOptimizer) -> bool:
    """Whether its state is that of before the first step."""
    return not optimizer.state and counts(optimizer) == {"step": 0, "skipped": 0}


def counts(optimizer: LearnedOptimizer) -> dict[str, int]:
    """Of steps that were called, and skipped."""
    return {name: optimizer.param_groups[0]["run"][name] for name in ("step", "skipped")}


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    """0-d, 1-d, 2-d, 4-d, channels-last, empty, and a transposed one, whose strides are not those of its shape."""
    g = generator(1)
    tensors = [torch.randn(shape, generator=g).to(dtype) for shape in [(), (3,), (4, 3), (2, 3, 2, 2), (0, 3)]]
    tensors.append(torch.randn(2, 3, 2, 2, generator=g).to(dtype).contiguous(memory_format=torch.channels_last))
    tensors.append(torch.randn(5, 4, generator=g).to(dtype).T)
    return [torch.nn.Parameter(t) for t in tensors]


def with_gaps(t: Tensor) -> Tensor:
    """The same numbers with as many between them."""
    wide = torch.zeros(*t.shape[:-1], 2 * t.shape[-1])
    wide[..., ::2] = t
    return wide[..., ::2]


def set_gradients(params: Sequence[Tensor], step: int) -> None:
    """Gradients that are the same for every caller of this step, small, large and zero ones among them."""
    g = generator(100 + step)
    for p in params:
        grad = torch.randn(p.shape, generator=g) * 10.0 ** torch.randint(-6, 2, p.shape, generator=g)
        p.grad = (grad * (torch.rand(p.shape, generator=g) > 0.1)).to(p.dtype)


def train(optimizer: torch.optim.Optimizer, steps: range) -> list[Tensor]:
    """Steps on `set_gradients`; returns copies of the parameters."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        set_gradients(params, step)
        optimizer.step(lambda step=step: torch.tensor(1.0 / (1 + step)))
    return [p.detach().clone() for p in params]


every_rule = pytest.mark.parametrize("rule", [*RULES.values(), Mixing()], ids=[*RULES, "Mixing"])


def through_a_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def copies(params: Sequence[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def snapshot(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return copy.deepcopy(optimizer.state_dict())
