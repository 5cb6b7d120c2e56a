"""Hand-designed optimizers, each with the grid of learning rates that it is tuned over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from l2o._names import choose
from l2o.ops.schedules import warmup_cosine
from l2o.rules import SGD, AdaGrad, Adam, Momentum, RMSProp
from l2o.types import Clock, ConfigurationError, Grads, Kind, OptState, Params, Stats, Theta, UpdateRule, Updates


@dataclass(frozen=True)
class Scheduled(UpdateRule):
    """``rule`` with its updates warmed up over 5% of the run, then following half a cosine to 0; θ is the rule's."""

    rule: UpdateRule

    @property
    def needs_loss(self) -> bool:  # type: ignore[override]  # not of the class: it is that of the rule
        return self.rule.needs_loss

    @property
    def learned_init(self) -> bool:  # type: ignore[override]
        return self.rule.learned_init

    def init_theta(self, generator: torch.Generator) -> Theta:
        return self.rule.init_theta(generator)

    def init(self, theta: Theta, params: Params, kinds: Mapping[str, Kind]) -> OptState:
        return self.rule.init(theta, params, kinds)

    def accumulate(
        self, theta: Theta, grads: Grads, state: OptState, params: Params, clock: Clock, loss: Tensor | None
    ) -> tuple[OptState, Stats]:
        return self.rule.accumulate(theta, grads, state, params, clock, loss)

    def apply(self, theta: Theta, state: OptState, stats: Stats, grads: Grads, params: Params, clock: Clock) -> Updates:
        updates = self.rule.apply(theta, state, stats, grads, params, clock)
        factor = warmup_cosine(clock.step, clock.total_steps, warmup=clock.total_steps // 20)
        return {name: u * factor.to(u.dtype) for name, u in updates.items()}


@dataclass(frozen=True)
class Baseline:
    """A rule and the learning rates that it is tried with.

    label: what reports call it.
    rule: has a field ``lr``, which the grid replaces; its other fields stay as they are in every trial.
    cosine: run it `Scheduled` instead of at a constant learning rate.
    """

    label: str
    rule: Any
    grid: tuple[float, ...]
    cosine: bool = False

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


_ADAM = half_decades(-4.0, 0.5)

BASELINES: dict[str, Baseline] = {
    "sgd": Baseline("SGD", SGD(), half_decades(-4.0, 2.0)),
    "momentum": Baseline("Nesterov momentum", Momentum(nesterov=True), half_decades(-5.0, 0.0)),
    "rmsprop": Baseline("RMSProp", RMSProp(), half_decades(-4.0, 0.0)),
    "adagrad": Baseline("AdaGrad", AdaGrad(), half_decades(-3.5, 0.5)),
    "adam": Baseline("Adam", Adam(), _ADAM),
    "adam_cosine": Baseline("Adam, warm-up + cosine", Adam(), _ADAM, cosine=True),
}
"""By name. Grids are wide enough that the best rate lies inside them on the tasks shipped here; reports say so where it
does not. Adam with warm-up and cosine is AdamW without weight decay."""


def baselines(names: Iterable[str]) -> dict[str, Baseline]:
    """The baselines of these names. Raises `UnknownNameError` with the nearest and all valid names."""
    if isinstance(names, str):
        raise ConfigurationError(f"baselines={names!r}: expected a list, such as [{names}]")
    return {name: choose("baseline", name, BASELINES) for name in names}
