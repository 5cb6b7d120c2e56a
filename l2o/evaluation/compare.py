"""Learned optimizers beside their baselines in one setting."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch

from l2o.evaluation.entrants import Entrant
from l2o.evaluation.scores import Kept, Score, condense, score_kept, speed_up, target
from l2o.evaluation.trials import Setting, Trials, run_entrant

LEARNED = "learned"
"""Name of a learned optimizer that is judged; the names of further ones begin with it."""
GIVEN = "given"
"""Likewise of another optimizer that the user gives to be judged."""
REFERENCE = "adam"
"""Name of the baseline that speed-ups and verdicts refer to."""
USUAL = "adamw"
"""Name of the untuned baseline that no optimizer should be much worse than."""


class Comparison(NamedTuple):
    """What was run in a setting and how it is judged, by name: the judged ones first, then the baselines."""

    setting: Setting
    trials: dict[str, Kept]
    scores: dict[str, Score]

    @classmethod
    def of(cls, setting: Setting, trials: dict[str, Kept]) -> Comparison:
        """Return trials with their scores."""
        return cls(setting, trials, {name: score_kept(kept) for name, kept in trials.items()})

    @property
    def judged(self) -> list[str]:
        """Names of those that verdicts are about, the first of which is the headline's; without any, the first name."""
        return [name for name in self.scores if is_judged(name)] or list(self.scores)[:1]

    @property
    def seconds(self) -> float:
        """Wall-clock time of all runs."""
        return sum(trials.seconds for trials in self.trials.values())

    @property
    def has_target(self) -> bool:
        """Whether the reference was run, and has a finite final loss."""
        return REFERENCE in self.scores and math.isfinite(self.scores[REFERENCE].mean)

    def speed_up(self, name: str) -> float | None:
        """Return that of an optimizer over the reference; None where there is no target."""
        return speed_up(self.scores[name], self.scores[REFERENCE]) if self.has_target else None

    def wall_speed_up(self, name: str) -> float | None:
        """Return the speed-up in time rather than steps, over the reference as torch runs it; None where nobody timed,
        or had a target."""
        relative = 1.0 if name == REFERENCE else self.trials[name].relative_step
        steps = self.speed_up(name)
        return None if relative is None or steps is None else steps / relative

    def ratio(self, name: str, other: str) -> float | None:
        """Return the final training loss over that of another optimizer, ``inf`` or NaN where one of them has no finite
        loss.

        None where the other was not run.
        """
        if other not in self.scores:
            return None
        ours, theirs = self.scores[name].mean, self.scores[other].mean
        return ours / theirs if theirs > 0 else 1.0 if ours <= theirs else float("inf")

    def reached(self, name: str) -> bool:
        """Say whether it ends at or under the `target` of the reference; False where there is none."""
        return self.has_target and self.scores[name].mean <= target(self.scores[REFERENCE])


def is_judged(name: str) -> bool:
    """Say whether this is the name of an optimizer that is judged in a comparison, and not of a baseline."""
    return name.split()[0] in (LEARNED, GIVEN)


def compare(
    setting: Setting,
    entrants: Mapping[str, Entrant],
    device: torch.device | str = "cpu",
    report: Callable[[Trials], None] = lambda trials: None,
    advance: Callable[[str, int], None] = lambda label, steps: None,
) -> Comparison:
    """Run every trial of every optimizer on the same problems.

    entrants: by name, the judged ones first.     report: called with the trials of each as soon as they are done.
    advance: called with the label of the one that is running and how many further steps of its runs are done.
    """
    trials = {}
    for name, entrant in entrants.items():
        done = run_entrant(entrant, setting, device, partial(advance, entrant.label))
        trials[name] = condense(done, setting.smoothing)
        report(done)
    return Comparison.of(setting, trials)
