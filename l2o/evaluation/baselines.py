"""Hand-designed optimizers: with the grid of learning rates that they are tuned over, or untuned."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from l2o.checks import lookup
from l2o.evaluation.curves import Advance, Curves, run, silent
from l2o.evaluation.entrants import Entrant, MakeOptimizers, Rates, TorchEntrant
from l2o.meta import warmup_cosine
from l2o.rules import SGD, AdaGrad, Adam, Momentum, RMSProp, Scheduled
from l2o.tasks import Repeated
from l2o.types import ConfigurationError, TaskFamily, Theta, UpdateRule


@dataclass(frozen=True)
class Baseline:
    """A rule and the learning rates that it is tried with, all in one vectorised run; an `Entrant`.

    rule: has a field ``lr``, which the grid replaces; its other fields stay as they are in every trial.
    cosine: run it `Scheduled` instead of at a constant learning rate.
    """

    label: str
    rule: Any
    grid: tuple[float, ...]
    cosine: bool = False

    @property
    def rates(self) -> Rates:
        return self.grid

    def run(
        self, family: TaskFamily, steps: int, seeds: int, generator: torch.Generator, advance: Advance = silent
    ) -> Curves:
        # Adjacent lanes share a seed's problem, and the grid runs fastest.
        theta = {k: t.repeat(seeds, *[1] * (t.ndim - 1)) for k, t in self.thetas(generator).items()}
        copies = Repeated(family, len(self.grid))
        return run(self.scheduled_rule(), theta, copies, steps, generator, advance=advance)

    def scheduled_rule(self) -> UpdateRule:
        """The rule that is run; the learning rate is in its θ."""
        return Scheduled(self.rule) if self.cosine else self.rule

    def thetas(self, generator: torch.Generator) -> Theta:
        """θ of every trial, ``[len(grid), ...]`` on the generator's device; draws nothing from it."""
        trials = [replace(self.rule, lr=lr).init_theta(generator) for lr in self.grid]
        return {name: torch.stack([theta[name] for theta in trials]) for name in trials[0]}


def half_decades(first: float, last: float) -> tuple[float, ...]:
    """Learning rates from ``10**first`` to ``10**last``, two a decade."""
    return tuple(10.0 ** (first + i / 2) for i in range(round((last - first) * 2) + 1))


def adamw(lr: float) -> MakeOptimizers:
    """AdamW with torch's decay of weights, at ``lr`` where no trial has another."""
    return lambda params, rate: [torch.optim.AdamW(params, lr=lr if rate is None else rate)]


def muon(params: list[nn.Parameter], rate: float | None = None) -> list[torch.optim.Optimizer]:
    """Orthogonalised momentum for what has two axes, with an RMS of 0.7 × ``rate`` (0.003); Adam for the rest."""
    lr = 0.003 if rate is None else rate
    matrices, rest = ([p for p in params if (p.ndim == 2) is is_matrix] for is_matrix in (True, False))
    # "match_rms_adamw" is an RMS of 0.2 × lr.
    settings: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=3.5 * lr, **settings))
    if rest:
        optimizers.append(torch.optim.Adam(rest, lr=lr))
    return optimizers


def cosine(step: int, total: int) -> float:
    """The factor of `Scheduled`."""
    return warmup_cosine(step, total, total // 20)


def linear(step: int, total: int) -> float:
    """A factor that falls from 1 to 0."""
    return 1.0 - step / total


_ADAM = half_decades(-4.0, 0.5)

BASELINES: dict[str, Entrant] = {
    "sgd": Baseline("SGD", SGD(), half_decades(-4.0, 2.0)),
    "momentum": Baseline("Nesterov momentum", Momentum(nesterov=True), half_decades(-5.0, 0.0)),
    "rmsprop": Baseline("RMSProp", RMSProp(), half_decades(-4.0, 0.0)),
    "adagrad": Baseline("AdaGrad", AdaGrad(), half_decades(-3.5, 0.5)),
    "adam": Baseline("Adam", Adam(), _ADAM),
    "adam_cosine": Baseline("Adam, warm-up + cosine", Adam(), _ADAM, cosine=True),
    "adamw": TorchEntrant("AdamW 0.001", adamw(1e-3)),
    "adamw_cosine_fixed": TorchEntrant("AdamW 0.003, warm-up + cosine", adamw(3e-3), cosine),
    "muon": TorchEntrant("Muon + Adam 0.003, linear decay", muon, linear),
}
"""By name. Those with a grid are tuned: it is wide enough that the best rate lies inside it on the tasks shipped here;
reports say so where it does not. Adam with warm-up and cosine is AdamW without weight decay. The others have one trial,
at the rate that a user would pick untuned."""


def baselines(names: Iterable[str]) -> dict[str, Entrant]:
    """The baselines of these names. Raises `UnknownNameError` with the nearest and all valid names."""
    if isinstance(names, str):
        raise ConfigurationError(f"baselines={names!r}: expected a list, such as [{names}]")
    return {name: lookup("baseline", name, BASELINES) for name in names}
