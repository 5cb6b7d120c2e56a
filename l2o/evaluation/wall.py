"""Steps are not seconds: what a training step takes with an optimizer, beside one with torch's Adam in the same run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import torch
from torch import nn
from torch.optim import Optimizer

from l2o.bench.cost import plug_in, wait
from l2o.evaluation.entrants import Entrant, RuleEntrant, TorchEntrant
from l2o.evaluation.trials import Setting
from l2o.types import Params
from l2o.unroll import lane_losses

_ROUNDS = 15
"""Steps of each that are timed, in turn."""


def relative_step(entrant: Entrant, setting: Setting, device: torch.device | str = "cpu") -> float | None:
    """Time of a step, gradient and optimizer, of one run with the optimizer's plug-in over that with torch's Adam.

    None for a `Baseline`, which is run as a rule only to be vectorised: nobody would use it so.
    """
    generator = torch.Generator(device).manual_seed(setting.seed)
    family = setting.family
    data = family.sample(generator, 1)
    params, buffers = family.init(data, generator)
    batch = family.batch(data, "train", generator)
    ours, adam = _parameters(params), _parameters(params)
    optimizers = _optimizers(entrant, list(ours.values()))
    if optimizers is None:
        return None
    runs = [(ours, optimizers), (adam, [torch.optim.Adam(list(adam.values()))])]
    times: list[list[float]] = [[], []]
    for _ in range(_ROUNDS + 1):
        for (leaves, steppers), seconds in zip(runs, times, strict=True):
            began = time.perf_counter()
            loss = lane_losses(family, {k: p.unsqueeze(0) for k, p in leaves.items()}, buffers, data, batch)[0].sum()
            for p, grad in zip(leaves.values(), torch.autograd.grad(loss, list(leaves.values())), strict=True):
                p.grad = grad
            for each in steppers:
                each.step(lambda loss=loss: loss.detach())  # type: ignore[misc]
            wait(device)
            seconds.append(time.perf_counter() - began)
    return round(median(times[0][1:]) / median(times[1][1:]), 3)  # the first ones compile and allocate


def _parameters(params: Params) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(p[0].clone()) for name, p in params.items()}


def _optimizers(entrant: Entrant, params: list[nn.Parameter]) -> Sequence[Optimizer] | None:
    """Those that a user would run."""
    if isinstance(entrant, RuleEntrant):
        return [plug_in(entrant.rule, entrant.theta, params)]
    return entrant.make(params, entrant.rates[0]) if isinstance(entrant, TorchEntrant) else None
