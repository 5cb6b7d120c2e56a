"""From curves to scores, in NumPy. Losses are ``[steps, seeds, trials]``; the score is that of the best trial."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from l2o.estimators.episodes import NOTHING
from l2o.evaluation.trials import Array, Trials

RESAMPLES = 10_000
"""Bootstrap samples behind an interval."""


@dataclass(frozen=True)
class Score:
    """How an optimizer did with the best of its trials.

    trials: learning rates that were tried; 1 for an untuned optimizer.     best: index of the one scored here.
    rate: its learning rate, None for an untuned optimizer.
    at_edge: the best rate is the first or last of its grid, so that a better one may lie outside.
    final: training loss of each seed ``[seeds]``, ``inf`` where a loss of the run was not finite.
    interval: 95% bootstrap interval over seeds of the mean of ``final``.
    valid: validation loss ``[seeds]`` at the end of the run.     diverged: bool ``[seeds]``.
    curve: smoothed training loss ``[steps, seeds]``.
    """

    label: str
    trials: int
    best: int
    rate: float | None
    at_edge: bool
    final: Array
    interval: tuple[float, float]
    valid: Array
    diverged: Array
    curve: Array

    @property
    def mean(self) -> float:
        """Seed-mean of the final training loss."""
        return float(self.final.mean())


def score(trials: Trials, window: int) -> Score:
    """The best trial of an optimizer.  window: steps that a training loss is the mean of."""
    finals = final_losses(trials.train, window)
    best = best_trial(finals)
    final = finals[:, best]
    return Score(
        label=trials.label,
        trials=len(trials.rates),
        best=best,
        rate=trials.rates[best],
        at_edge=len(trials.rates) > 1 and best in (0, len(trials.rates) - 1),
        final=final,
        interval=bootstrap_interval(final),
        valid=trials.valid[-1, :, best],
        diverged=diverged(trials.train, window)[:, best],
        curve=smooth(trials.train[:, :, best], window),
    )


def smooth(losses: Array, window: int) -> Array:
    """Mean over the last ``window`` steps, along the first axis; over those there are at the beginning."""
    with np.errstate(invalid="ignore", over="ignore"):  # a diverged run stays what it is: inf or NaN
        return np.stack([losses[max(0, t - window) : t].mean(0) for t in range(1, len(losses) + 1)])


def final_losses(losses: Array, window: int) -> Array:
    """Mean over the last ``window`` steps ``[seeds, trials]``; ``inf`` for a run in which a loss was not finite."""
    finite = np.isfinite(losses).all(0)
    return np.where(finite, np.where(finite, losses[-window:], 0.0).mean(0), np.inf)


def diverged(losses: Array, window: int) -> Array:
    """Bool ``[seeds, trials]``: a loss was not finite, or the final one is above the one at initialisation.

    Where that is zero but for rounding, as of adapters on a solved problem, the former alone.
    """
    final = final_losses(losses, window)
    return ~(final <= np.where(np.abs(losses[0]) < NOTHING, np.finfo(np.float64).max, losses[0]))


def best_trial(finals: Array) -> int:
    """Index of the trial with the lowest seed-mean of ``finals [seeds, trials]``; one lost seed loses the trial."""
    return int(finals.mean(0).argmin())


def bootstrap_interval(values: Array, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of ``values [n]``; the same for the same values."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(1)
    # Without interpolation, which would turn two infinite neighbours into NaN.
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return float(low), float(high)


def speed_up(candidate: Score, reference: Score) -> float:
    """Steps of the run over the first step at which the candidate's seed-mean curve is at the reference's final loss.

    0 where it never is (a miss), NaN where the reference itself has no finite final loss.
    """
    if not np.isfinite(reference.mean):
        return float("nan")
    curve = candidate.curve.mean(1)
    reached = curve <= reference.mean
    return len(curve) / (int(reached.argmax()) + 1) if reached.any() else 0.0
