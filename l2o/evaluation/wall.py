"""Steps are not seconds: what a training step takes with an optimizer, beside one with torch's Adam in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean
from typing import cast

import torch
from torch import nn
from torch.optim import Optimizer

from l2o.bench.cost import Rarity, Seconds, plug_in, wait
from l2o.evaluation.entrants import Entrant, RuleEntrant, TorchEntrant, switch
from l2o.evaluation.trials import Setting
from l2o.optim import LearnedOptimizer
from l2o.unroll import lane_losses

_ROUNDS = 20
"""Steps of each that are timed, in turn, at least: of what is done every tenth step, as SOAP's bases, its share."""


def relative_step(entrant: Entrant, setting: Setting, device: torch.device | str = "cpu") -> float | None:
    """Time of a step, gradient and optimizer, of one run with the optimizer's plug-in over that with torch's Adam.

    A step is one of a run of 1,000 (`l2o.bench.cost.Rarity`). Where one thread of the CPU does the work it is the time
    that it ran for, which other programs hardly lengthen.
    None for a `Baseline`, which is run as a rule only to be vectorised: nobody would use it so.
    """
    if not isinstance(entrant, RuleEntrant | TorchEntrant):
        return None
    ours, adam = _Run(setting, device, partial(_optimizers, entrant)), _Run(setting, device, _adam)
    while ours.rarity.is_early(ours.called):  # the first ones compile and allocate
        ours.step()
        adam.step()
    seconds: Seconds = {False: [], True: []}
    others: list[float] = []
    while len(others) < _ROUNDS or not ours.rarity.is_timed(ours.called, seconds):
        seconds[ours.rarity.of(ours.called)].append(ours.step())
        others.append(adam.step())
    return round(ours.rarity.typical(seconds, fmean) / fmean(others), 3)


def _optimizers(entrant: RuleEntrant | TorchEntrant, params: list[nn.Parameter]) -> Sequence[Optimizer]:
    """Those that a user would run."""
    if isinstance(entrant, RuleEntrant):
        return [plug_in(entrant.rule, entrant.theta, params)]
    made = entrant.make(params, entrant.rates[0])
    switch(made, "train")
    return made


def _adam(params: list[nn.Parameter]) -> Sequence[Optimizer]:
    return [torch.optim.Adam(params)]


class _Run:
    """One problem of a setting and its optimizers, whose steps can be timed; every step sees the same batch."""

    def __init__(
        self,
        setting: Setting,
        device: torch.device | str,
        make: Callable[[list[nn.Parameter]], Sequence[Optimizer]],
    ) -> None:
        alone = torch.device(device).type == "cpu" and torch.get_num_threads() == 1
        self._clock = time.thread_time if alone else time.perf_counter
        self._device, self._family = device, setting.family
        generator = torch.Generator(device).manual_seed(setting.seed)
        self._data = setting.family.sample(generator, 1)
        params, self._buffers = setting.family.init(self._data, generator)
        self._batch = setting.family.batch(self._data, "train", generator)
        self._params = {name: nn.Parameter(p[0].clone()) for name, p in params.items()}
        self._optimizers = make(list(self._params.values()))
        self.rarity, self.called = Rarity(self._optimizers), 0

    def step(self) -> float:
        """Take one step; return the seconds that it took."""
        began = self._clock()
        lanes = {name: p.unsqueeze(0) for name, p in self._params.items()}
        loss = lane_losses(self._family, lanes, self._buffers, self._data, self._batch)[0].sum()
        params = list(self._params.values())
        for p, grad in zip(params, torch.autograd.grad(loss, params, materialize_grads=True), strict=True):
            p.grad = grad
        for each in self._optimizers:
            if isinstance(each, LearnedOptimizer):
                each.step(cast(Callable[[], float], loss.detach))  # a tensor, so that nobody waits for the device
            else:
                each.step()
        wait(self._device)
        self.called += 1
        return self._clock() - began
