"""What the tests of evaluation share: a tiny suite and its entrants, and comparisons of curves that are made up."""

from __future__ import annotations

import json
import math
from functools import partial

import numpy as np
import torch

from l2o.evaluation import (
    BASELINES,
    Baseline,
    Comparison,
    Kept,
    Report,
    RuleEntrant,
    Setting,
    Suite,
    TorchEntrant,
    Trials,
    condense,
)
from l2o.evaluation.baselines import cosine, torch_optimizer
from l2o.evaluation.report import as_json
from l2o.rules import SGD, Adam
from l2o.tasks import Quadratic
from l2o.types import Theta, UpdateRule

TASKS = (
    Setting("small", Quadratic(dim=2), steps=12, seeds=2, window=1, split="like"),
    Setting("noisy", Quadratic(dim=3, noise=0.1), steps=12, seeds=2, window=1),
)
SUITE = Suite("tiny", 1, TASKS)
NOISY = Setting("noisy", Quadratic(dim=3, noise=0.1), steps=21, seeds=3, window=1)
GRIDS = {name: entrant for name, entrant in BASELINES.items() if isinstance(entrant, Baseline)}
ADAMW = partial(torch_optimizer, torch.optim.AdamW)
INF, NAN = math.inf, math.nan


def theta_of(rule: UpdateRule) -> Theta:
    return rule.init_theta(torch.Generator())


def learned(lr: float = 0.03, label: str = "mine") -> RuleEntrant:
    return RuleEntrant(label, SGD(lr=lr), theta_of(SGD(lr=lr)))


ENTRANTS = {
    "learned": learned(),
    "adam": Baseline("Adam", Adam(), (0.01, 0.1, 1.0)),
    "adamw": TorchEntrant("AdamW 0.1", ADAMW, cosine, (0.1,)),
}


def kept_of(
    curves: list[list[float]], rates: tuple[float | None, ...] = (None,), label: str = "made up", window: int = 1
) -> Kept:
    """One seed, a curve a rate."""
    losses = np.array(curves).T[:, None, :]
    return condense(Trials(label, rates, losses, losses[-1:], [len(losses)], 0.0), window)


def comparison(name: str, split: str = "other", **curves: list[float]) -> Comparison:
    setting = Setting(name, Quadratic(), steps=len(curves["adam"]), seeds=1, window=1, split=split)
    return Comparison.of(setting, {key: kept_of([curve], label=key) for key, curve in curves.items()})


def falling(reaches: int, steps: int = 8) -> list[float]:
    """A curve that is at 1 from step ``reaches`` on, never if that is 0."""
    return [1.0 if reaches and step >= reaches else 4.0 - 0.1 * step for step in range(1, steps + 1)]


MADE = [
    comparison("a", "like", learned=falling(2), adam=falling(8), sgd=falling(0)),
    comparison("b", "like", learned=falling(4), adam=falling(8), sgd=falling(2)),
    comparison("c", "longer", learned=falling(0), adam=falling(8), sgd=falling(0)),
    comparison("d", "other", learned=[4.0, *[INF] * 7], adam=falling(8), sgd=falling(8)),
]


def numbers(found: list[Comparison]) -> str:
    """Everything that a report says of it but times, as text."""
    timeless = [
        c._replace(trials={n: k._replace(seconds=0.0, relative_step=None) for n, k in c.trials.items()}) for c in found
    ]
    report = as_json(Report("mine", timeless, {}, {}))
    return json.dumps(report, allow_nan=False)
