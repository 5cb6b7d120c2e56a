"""A learned optimizer beside its baselines in one setting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from l2o.evaluation.baselines import Baseline
from l2o.evaluation.scores import Score, score, speed_up
from l2o.evaluation.trials import Setting, Trials, run_baseline, run_learned
from l2o.types import Theta, UpdateRule

LEARNED = "learned"
"""Name of the learned optimizer among the trials and scores of a comparison."""
REFERENCE = "adam"
"""Name of the baseline that speed-ups and verdicts refer to."""


class Comparison(NamedTuple):
    """What was run in a setting and how it is judged, by name: ``LEARNED`` first, then the baselines in their order."""

    setting: Setting
    trials: dict[str, Trials]
    scores: dict[str, Score]

    def speed_up(self, name: str) -> float | None:
        """Of an optimizer over the reference; None where the reference was not run."""
        return speed_up(self.scores[name], self.scores[REFERENCE]) if REFERENCE in self.scores else None


def compare(
    setting: Setting,
    rule: UpdateRule,
    theta: Theta,
    baselines: Mapping[str, Baseline],
    device: torch.device | str = "cpu",
    report: Callable[[Trials], None] = lambda trials: None,
) -> Comparison:
    """Run a learned rule once a seed, and every baseline over its grid, on the same problems.

    theta: ``[...]``, without lanes.     report: called with the trials of each optimizer as soon as they are done.
    """
    trials = {LEARNED: run_learned(rule, theta, setting, device, label=f"learned {type(rule).__name__}")}
    report(trials[LEARNED])
    for name, baseline in baselines.items():
        trials[name] = run_baseline(baseline, setting, device)
        report(trials[name])
    return Comparison(setting, trials, {name: score(t, setting.smoothing) for name, t in trials.items()})
