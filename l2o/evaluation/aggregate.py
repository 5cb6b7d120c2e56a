"""Optimizers over all tasks: speed-ups with misses as 0, the share reached, performance profiles; pure functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from l2o.evaluation.compare import Comparison
from l2o.evaluation.scores import RESAMPLES
from l2o.evaluation.trials import SPLITS, Array
from l2o.evaluation.verdicts import overfits, valid_ratio

Statistic = Callable[[Array], Array]
"""Of the last axis."""


class Estimate(NamedTuple):
    """A statistic over tasks, and its 95% bootstrap interval (tasks resampled, always with the same seed)."""

    value: float
    low: float
    high: float


class Summary(NamedTuple):
    """An optimizer over the tasks of a suite, or of one split.

    trials: the most that were run on a task.     tasks: how many there are.
    speed_ups: over the reference, by task; a miss is 0.     median, iqm: of them.     reached: share that is no miss.
    valid: median ratio of its validation loss to the reference's.     wall: median speed-up in time; None: not timed.
    diverged, runs: how many of the best trials' runs diverged.     overfitted: names of tasks.
    timed_out: how many of those that diverged did so by exceeding their time.
    """

    name: str
    label: str
    trials: int
    tasks: int
    speed_ups: dict[str, float]
    median: Estimate
    iqm: Estimate
    reached: Estimate
    valid: float
    wall: float | None
    diverged: int
    runs: int
    overfitted: tuple[str, ...]
    timed_out: int = 0

    @property
    def hits(self) -> str:
        """On how many tasks the target is reached."""
        return f"{sum(value > 0 for value in self.speed_ups.values())} of {self.tasks}"


def summaries(comparisons: Sequence[Comparison]) -> list[Summary]:
    """Summarise every optimizer over the tasks that have a target, best median first, then best IQM."""
    scored = [c for c in comparisons if c.has_target]
    names = scored[0].scores if scored else ()
    found = [_summary(scored, name) for name in names]
    return sorted(found, key=lambda s: (-s.median.value, -s.iqm.value, s.label))


def by_split(comparisons: Sequence[Comparison]) -> dict[str, list[Summary]]:
    """Return `summaries` of the tasks of each split that has any."""
    splits = {s: [c for c in comparisons if c.setting.split == s] for s in SPLITS}
    return {s: summaries(each) for s, each in splits.items() if each}


def _summary(comparisons: Sequence[Comparison], name: str) -> Summary:
    scores = [c.scores[name] for c in comparisons]
    speed_ups = {c.setting.name: float(c.speed_up(name) or 0.0) for c in comparisons}
    values = np.array(list(speed_ups.values()))
    wall = [w for c in comparisons if (w := c.wall_speed_up(name)) is not None]
    ratios = [valid_ratio(c, name) for c in comparisons]
    return Summary(
        name=name,
        label=scores[0].label,
        trials=max(s.trials for s in scores),
        tasks=len(scores),
        speed_ups=speed_ups,
        median=estimate(values, median),
        iqm=estimate(values, interquartile_mean),
        reached=estimate((values > 0).astype(float), mean),
        valid=float(np.median(ratios)),
        wall=float(np.median(wall)) if len(wall) == len(scores) else None,
        diverged=sum(int(s.diverged.sum()) for s in scores),
        runs=sum(len(s.diverged) for s in scores),
        overfitted=tuple(c.setting.name for c in comparisons if overfits(c, name)),
        timed_out=sum(int(s.timed_out.sum()) for s in scores if s.timed_out is not None),
    )


def median(values: Array) -> Array:
    """Return that of the last axis."""
    return np.asarray(np.median(values, -1))


def mean(values: Array) -> Array:
    """Return that of the last axis."""
    return np.asarray(values.mean(-1))


def interquartile_mean(values: Array) -> Array:
    """Return the mean of what is left of the last axis without the lowest and the highest quarter, each rounded down.

    Agarwal et al. 2021, "Deep reinforcement learning at the edge of the statistical precipice" (arXiv 2108.13264).
    """
    n = values.shape[-1]
    return np.asarray(np.sort(values, -1)[..., n // 4 : n - n // 4].mean(-1))


def estimate(values: Array, statistic: Statistic, level: float = 0.95, seed: int = 0) -> Estimate:
    """Return the statistic of ``values [n]`` with a percentile bootstrap interval; the same for the same values."""
    chosen = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    found = statistic(values[chosen])
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return Estimate(float(statistic(values)), float(low), float(high))


def profile(comparisons: Sequence[Comparison]) -> dict[str, Array]:
    """Return steps to the target over those of the best optimizer there ``[tasks]``, ``inf`` for a miss, by name.

    The share of tasks under τ is the performance profile (Dolan and Moré 2002, "Benchmarking optimization software").
    """
    speed_ups = {s.name: np.array(list(s.speed_ups.values())) for s in summaries(comparisons)}
    if not speed_ups:
        return {}
    best = np.max(list(speed_ups.values()), axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return {name: np.where(own > 0, best / own, np.inf) for name, own in speed_ups.items()}


def share_within(ratios: Array, factor: float) -> float:
    """Return the performance profile of one optimizer at τ = ``factor``."""
    return float((ratios <= factor).mean())
