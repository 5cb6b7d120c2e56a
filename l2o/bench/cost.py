"""What a step of an optimizer costs: time beside the usual ones in the same run, and memory for its state."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean, median
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from l2o.bench.memory import scratch_bytes
from l2o.optim import LearnedOptimizer
from l2o.optim.apply import WORTH_A_KERNEL
from l2o.types import Theta, UpdateRule

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer | Sequence[Optimizer]]
"""The optimizer of these parameters, or several that share them."""

YARDSTICK = "AdamW (fused)"
USUAL: dict[str, MakeOptimizer] = {
    YARDSTICK: lambda params: torch.optim.AdamW(params, fused=True),
    "Adam": lambda params: torch.optim.Adam(params),
}


_RUN = 1000
"""Steps of the run in which steps that are not usual, as those in which bases follow, have their share."""
_NEXT = 10
"""Steps in a row of which at most half may be rare before any are timed, unless late ones are as well."""
_PERIOD = 10
"""Steps of which one may take longer than the others without a rule that says so, as those of SOAP do."""
Seconds = dict[bool, list[float]]
"""Of usual steps (False) and of rare ones."""


class Cost(NamedTuple):
    """What a step costs.

    seconds: `Rarity.typical` time of a step.     state_bytes: of optimizer state, a parameter.
    cpu_seconds: such time that the thread ran for in a step, which other programs hardly lengthen; None where the
        work is not done by one thread of the CPU.
    scratch_bytes: memory that a step takes beyond what it finds, at its peak, a parameter; None where nobody counts it.
    """

    seconds: float
    state_bytes: float
    cpu_seconds: float | None
    scratch_bytes: float | None


def optimizer_costs(
    learned: Mapping[str, tuple[UpdateRule, Theta]], device: torch.device | str = "cpu"
) -> dict[str, Cost]:
    """Measure plug-ins, fused AdamW and Adam on a perceptron of a million parameters, by name.

    learned: rules with their θ, by name.
    """
    module = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512)).to(device)
    return step_cost({**{name: partial(plug_in, *each) for name, each in learned.items()}, **USUAL}, module)


def plug_in(rule: UpdateRule, theta: Theta, params: list[nn.Parameter]) -> LearnedOptimizer:
    """Return a plug-in for a run that is long enough for a kernel of the rule, if it has one."""
    entries = sum(p.numel() for p in params)
    return LearnedOptimizer(params, (rule, theta), total_steps=max(10_000, math.ceil(WORTH_A_KERNEL / entries)))


def step_cost(
    makers: Mapping[str, MakeOptimizer], module: nn.Module, rounds: int = 11, seconds: float = 0.0
) -> dict[str, Cost]:
    """Time optimizers in turn, each on its own copy of ``module`` with the same gradients, drawn once.

    makers: by name.     rounds: steps of each that are timed, at least, and one of each kind; those that a run begins
        with are not.
    seconds: how long to go on, at least.
    """
    stepping = {name: Stepping(make, module) for name, make in makers.items()}
    for each in stepping.values():
        each.begin()
    began, done = time.perf_counter(), 0
    while (
        done < rounds or time.perf_counter() - began < seconds or not all(each.is_timed for each in stepping.values())
    ):
        for each in stepping.values():
            each.timed_step()
        done += 1
    return {name: each.cost() for name, each in stepping.items()}


class Rarity:
    """Which steps of a run are rare, as those in which bases follow are, by what the rules of its optimizers say."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._rules = [each.rule for each in optimizers if isinstance(each, LearnedOptimizer)]

    def of(self, called: int) -> bool:
        """Return whether the step is rare that the plug-in calls so."""
        return not all(rule.is_usual(called) for rule in self._rules)

    def is_early(self, called: int) -> bool:
        """Return whether a run is at its beginning, where rare steps are frequent."""
        late, soon = (sum(map(self.of, range(first, first + _NEXT))) for first in (_RUN, called))
        return called == 0 or soon > max(late, _NEXT // 2)

    def is_timed(self, called: int, seconds: Seconds) -> bool:
        """Return whether no kind of step is to come for the first time."""
        return all(seconds[kind] or kind not in map(self.of, range(called, _RUN)) for kind in (False, True))

    def typical(self, seconds: Seconds, mean: Callable[[Sequence[float]], float]) -> float:
        """Return the time of a step of a run of ``_RUN``: rare ones have their share, unless a run only begins with
        them."""
        usual, rare = (mean(seconds[kind]) if seconds[kind] else None for kind in (False, True))
        if usual is None or rare is None:
            return cast("float", rare if usual is None else usual)
        share = fmean(map(self.of, range(_RUN)))
        return (1.0 - share) * usual + share * rare


class Stepping:
    """An optimizer on its own copy of a module, with gradients that stay, and the times of its steps."""

    def __init__(self, make: MakeOptimizer, module: nn.Module) -> None:
        self._params = _with_gradients(module)
        made = make(self._params)
        self._optimizers = [made] if isinstance(made, Optimizer) else made
        self._device = self._params[0].device
        self._rarity, self._called = Rarity(self._optimizers), 0
        self._seconds: Seconds = {False: [], True: []}
        self._cpu_seconds: Seconds = {False: [], True: []}

    def begin(self) -> None:
        """Take the steps that a run begins with."""
        while self._rarity.is_early(self._called):
            self.step()

    @property
    def is_timed(self) -> bool:
        """Whether steps of each kind have been timed."""
        return self._rarity.is_timed(self._called, self._seconds)

    def step(self) -> None:
        """Take one step, to its end."""
        for optimizer in self._optimizers:
            optimizer.step(lambda: 1.0)  # a loss, which some rules read
        wait(self._device)
        self._called += 1

    def timed_step(self) -> None:
        """Take one step whose time counts."""
        rare = self._rarity.of(self._called)
        began, cpu_began = time.perf_counter(), time.thread_time()
        self.step()
        self._cpu_seconds[rare].append(time.thread_time() - cpu_began)
        self._seconds[rare].append(time.perf_counter() - began)

    def cost(self) -> Cost:
        """Return the cost of the steps so far, and of one more, whose memory is watched."""
        entries = sum(p.numel() for p in self._params)
        alone = self._device.type == "cpu" and torch.get_num_threads() == 1
        scratch = scratch_bytes(self.step, self._device)
        return Cost(
            seconds=self._rarity.typical(self._seconds, usual),
            state_bytes=sum(_state_bytes(optimizer) for optimizer in self._optimizers) / entries,
            cpu_seconds=self._rarity.typical(self._cpu_seconds, usual) if alone else None,
            scratch_bytes=None if scratch is None else scratch / entries,
        )


def usual(seconds: Sequence[float]) -> float:
    """Return the mean over ten steps in a row of the median of every tenth: what every tenth step takes has its share.

    seconds: of steps in a row.
    """
    return fmean(median(seconds[first::_PERIOD]) for first in range(min(_PERIOD, len(seconds))))


def _with_gradients(module: nn.Module) -> list[nn.Parameter]:
    params = list(copy.deepcopy(module).parameters())
    generator = torch.Generator(params[0].device).manual_seed(0)
    for p in params:
        p.grad = torch.empty_like(p).normal_(std=1e-2, generator=generator)
    return params


def wait(device: torch.device | str) -> None:
    """Wait until the device has done what it was asked to."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _state_bytes(optimizer: Optimizer) -> int:
    leaves = tree_leaves(list(optimizer.state.values()))
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))
