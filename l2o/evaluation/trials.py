"""What is run for a comparison: every trial of an optimizer, on the same problems."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from numpy.typing import NDArray

from l2o import checks
from l2o.bench.cost import wait
from l2o.checks import check_int, lookup
from l2o.evaluation.curves import EVALUATIONS, Advance, evaluation_steps, never, silent, trace
from l2o.evaluation.entrants import Entrant, Rates, RuleEntrant
from l2o.types import ConfigurationError, TaskFamily, Theta, UpdateRule

Array = NDArray[Any]

SPLITS = {
    "like": "like those of meta-training",
    "larger": "100 times the size, or more",
    "longer": "10 times the horizon, or more",
    "other": "of another kind",
    "unmarked": "not said to be like those of meta-training, or unlike",
}
"""What problems are to those of meta-training: meta-overfitting shows in `larger`, `longer` and `other`."""


@dataclass(frozen=True)
class Setting:
    """Where optimizers are compared.

    name: heading in reports.     family, steps: the tasks and the length of a run.
    seeds: problems (task, initialisation and batches), the same for every optimizer.     seed: of all of them.
    window: steps that a training loss is the mean of; None for the protocol's 2% of ``steps``, at least 10.
    split: what the problems are to meta-training, a key of ``SPLITS``.
    timeout: seconds of wall-clock time that a run may take, None for no limit; n runs side by side may take n times as
        many. It is looked at at the 20 points of validation; what took longer ends there, and has failed.
    revision: to be raised with what changes curves and is no setting, such as the code behind them; curves of different
        revisions never meet. Of a suite's task it is the suite's version, unless the task keeps an older one.
    """

    name: str
    family: TaskFamily
    steps: int
    seeds: int = 5
    seed: int = 1000
    window: int | None = None
    split: str = "unmarked"
    revision: int = 0
    timeout: float | None = None

    def __post_init__(self) -> None:
        bounds = {"steps": 1, "seeds": 1, "seed": 0, "revision": 0} | ({} if self.window is None else {"window": 1})
        for name, least in bounds.items():
            check_int(name, getattr(self, name), least)
        checks.check_seed("seed", self.seed)
        if self.timeout is not None:
            checks.check_float("timeout", self.timeout, above=0.0)
        lookup("split", self.split, SPLITS)
        if self.window is not None and self.window > self.steps:
            raise ConfigurationError(f"window={self.window}: expected at most steps={self.steps}")

    @property
    def smoothing(self) -> int:
        """Steps that a training loss is the mean of."""
        return self.window or min(max(10, self.steps // 50), self.steps)


class Trials(NamedTuple):
    """All runs of one optimizer in one setting.

    rates: the learning rate of each trial, None for an untuned optimizer, which has one trial and none.
    train: float64 ``[steps, seeds, trials]``.     valid: float64 ``[points, seeds, trials]``, at ``valid_steps``.
    seconds: wall-clock time of all runs together.     accuracy: as ``valid``, see `Curves`; or None.
    timed_out: whether they took too long, see ``timeout`` of `Setting`.
    """

    label: str
    rates: Rates
    train: Array
    valid: Array
    valid_steps: list[int]
    seconds: float
    accuracy: Array | None = None
    timed_out: bool = False


def run_entrant(
    entrant: Entrant, setting: Setting, device: torch.device | str = "cpu", advance: Advance = silent
) -> Trials:
    """Run every trial of an optimizer on every seed.  advance: told how many steps of all runs together are done."""
    started = time.perf_counter()
    generator = torch.Generator(device).manual_seed(setting.seed)
    trials = len(entrant.rates)

    def of_all(steps: int) -> None:
        advance(steps * setting.seeds * trials)

    begun = entrant.begin(setting.family, setting.steps, setting.seeds, generator)
    is_late = _clock(started, setting.timeout and setting.timeout * setting.seeds * trials, device)
    curves = trace(begun, evaluation_steps(setting.steps, EVALUATIONS), generator, of_all, is_late)
    train, valid = (_per_trial(losses, trials) for losses in (curves.train, curves.valid))
    accuracy = None if curves.accuracy is None else _per_trial(curves.accuracy, trials)
    seconds = time.perf_counter() - started
    return Trials(entrant.label, entrant.rates, train, valid, curves.valid_steps, seconds, accuracy, curves.timed_out)


def _clock(started: float, seconds: float | None, device: torch.device | str) -> Callable[[], bool]:
    """Whether ``seconds`` are over, when what was begun on the device is done; without a limit nobody waits for it."""

    def is_late() -> bool:
        wait(device)
        return time.perf_counter() - started > cast(float, seconds)

    return never if seconds is None else is_late


def run_baseline(baseline: Entrant, setting: Setting, device: torch.device | str = "cpu") -> Trials:
    """Run every learning rate of the grid on every seed: one vectorised run of ``seeds * len(grid)`` lanes."""
    return run_entrant(baseline, setting, device)


def run_learned(
    rule: UpdateRule, theta: Theta, setting: Setting, device: torch.device | str = "cpu", label: str = "learned"
) -> Trials:
    """Run the learned rule on every seed, once and untuned.  theta: ``[...]``, without lanes, on any device."""
    return run_entrant(RuleEntrant(label, rule, theta), setting, device)


def _per_trial(losses: torch.Tensor, trials: int) -> Array:
    return losses.double().cpu().numpy().reshape(len(losses), -1, trials)
