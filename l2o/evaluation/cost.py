"""What a step of an optimizer costs: time beside the usual ones in the same run, and memory for its state."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from l2o.optim import LearnedOptimizer
from l2o.types import Theta, UpdateRule

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

LEARNED_LABEL = "learned"
YARDSTICK = "AdamW (fused)"
USUAL: dict[str, MakeOptimizer] = {
    YARDSTICK: lambda params: torch.optim.AdamW(params, fused=True),
    "Adam": lambda params: torch.optim.Adam(params),
}


class Cost(NamedTuple):
    """seconds: median time of a step.     state_bytes: of optimizer state, a parameter.

    scratch_bytes: most memory that a step takes beside what is there before it, a parameter; None on the CPU.
    """

    seconds: float
    state_bytes: float
    scratch_bytes: float | None = None


def optimizer_costs(rule: UpdateRule, theta: Theta, device: torch.device | str = "cpu") -> dict[str, Cost]:
    """The plug-in, fused AdamW and Adam on a perceptron of a million parameters, by label."""
    module = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512)).to(device)
    makers = {LEARNED_LABEL: lambda params: LearnedOptimizer(params, (rule, theta), total_steps=1000), **USUAL}
    return step_cost(makers, module)


def step_cost(makers: Mapping[str, MakeOptimizer], module: nn.Module, rounds: int = 11) -> dict[str, Cost]:
    """Time optimizers in turn, each on its own copy of ``module`` with the same gradients, drawn once.

    makers: each makes an optimizer of a list of parameters.     rounds: steps that are timed; one before them is not.
    """
    optimizers = {name: make(_with_gradients(module)) for name, make in makers.items()}
    device = next(module.parameters()).device
    times: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(1 + rounds):
        for name, optimizer in optimizers.items():
            times[name].append(_timed(optimizer, device))
    entries = sum(p.numel() for p in module.parameters())
    return {
        name: Cost(median(times[name][1:]), _state_bytes(o) / entries, _scratch_bytes(o, device, entries))
        for name, o in optimizers.items()
    }


def _with_gradients(module: nn.Module) -> list[nn.Parameter]:
    params = list(copy.deepcopy(module).parameters())
    generator = torch.Generator(params[0].device).manual_seed(0)
    for p in params:
        p.grad = torch.empty_like(p).normal_(std=1e-2, generator=generator)
    return params


def _timed(optimizer: torch.optim.Optimizer, device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    optimizer.step()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    leaves = tree_leaves(list(optimizer.state.values()))
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))


def _scratch_bytes(optimizer: torch.optim.Optimizer, device: torch.device, entries: int) -> float | None:
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    optimizer.step()
    return (torch.cuda.max_memory_allocated(device) - before) / entries
