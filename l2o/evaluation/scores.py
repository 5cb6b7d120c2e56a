"""From curves to scores, in NumPy. Losses are ``[points, seeds, trials]``; the score is that of the best trial."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from l2o.estimators.episodes import NOTHING
from l2o.evaluation.entrants import Rates
from l2o.evaluation.trials import Array, Trials

RESAMPLES = 10_000
"""Bootstrap samples behind an interval."""
RESOLUTION = 2.0**-23
"""Losses of so little of the first one are rounding: who is lower there, or sooner, says nothing."""
_EVEN, _EARLY = 96, 32
"""Points of a curve that are kept: evenly spread ones, and ones that lie the closer the earlier, for early targets."""


class Kept(NamedTuple):
    """What is kept of all runs of one optimizer in one setting, short enough to be stored.

    steps: so many updates were begun at each point, from 1 to the length of the run.
    train: training loss ``[points, seeds, trials]``, each the mean over the window that ends there.
    peak: the highest single loss since the last point, ``inf`` where one was not finite; of the same shape.
    valid: ``[points, seeds, trials]``, after ``valid_steps`` updates.     label, rates, seconds: see `Trials`.
    relative_step: time of a training step over that with torch's Adam, see `relative_step`; None where not measured.
    accuracy: as ``valid``, the share of labels that are right; None where there are none, or nobody counted.
    timed_out: bool ``[seeds, trials]``, what took longer than its limit and was ended; None where nothing did.
    """

    label: str
    rates: Rates
    steps: list[int]
    train: Array
    peak: Array
    valid: Array
    valid_steps: list[int]
    seconds: float
    relative_step: float | None = None
    accuracy: Array | None = None
    timed_out: Array | None = None


def kept_steps(length: int) -> list[int]:
    """Return the points of a curve: every step of a short run, and no fewer than a hundred of a long one."""
    if length <= _EVEN + _EARLY:
        return list(range(1, length + 1))
    even = {-(-length * k // _EVEN) for k in range(1, _EVEN + 1)}
    early = {round(length ** (k / _EARLY)) for k in range(_EARLY)}
    return sorted({1} | even | early)


def condense(trials: Trials, smoothing: int) -> Kept:
    """Return what is kept of ``trials``.  smoothing: steps that a training loss is the mean of."""
    steps = kept_steps(len(trials.train))
    raw = np.where(np.isfinite(trials.train), trials.train, np.inf)
    peak = np.maximum.reduceat(raw, [0, *steps[:-1]], axis=0)
    train = smooth(trials.train, smoothing, steps)
    timed_out = np.full(trials.train.shape[1:], True) if trials.timed_out else None
    rest = (trials.valid, trials.valid_steps, trials.seconds, None, trials.accuracy, timed_out)
    return Kept(trials.label, trials.rates, steps, train, peak, *rest)


@dataclass(frozen=True)
class Score:
    """How an optimizer did with the best of its trials.

    trials: learning rates that were tried; 1 for an untuned optimizer.     best: index of the one scored here.
    rate: its learning rate, None for an untuned optimizer.
    at_edge: the best rate is the first or last of its grid, so that a better one may lie outside.
    final: training loss of each seed ``[seeds]``, ``inf`` where a loss of the run was not finite.
    interval: 95% bootstrap interval over seeds of the mean of ``final``.
    valid: validation loss ``[seeds]`` at the end of the run.     diverged: bool ``[seeds]``.
    steps, curve: smoothed training loss ``[points, seeds]`` and where the points lie, as in `Kept`.
    valid_curve: validation loss ``[points, seeds]`` after ``valid_steps`` updates.
    peak: as in `Kept`, ``[points, seeds]``.     accuracy: ``[seeds]`` at the end, or None.
    timed_out: bool ``[seeds]``, also counted as diverged; None where nothing did.
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
    steps: list[int]
    curve: Array
    peak: Array
    valid_steps: list[int]
    valid_curve: Array
    accuracy: Array | None = None
    timed_out: Array | None = None

    @property
    def mean(self) -> float:
        """Seed-mean of the final training loss."""
        return float(self.final.mean())


def score(trials: Trials, smoothing: int) -> Score:
    """Return the best trial of an optimizer.  smoothing: steps that a training loss is the mean of."""
    return score_kept(condense(trials, smoothing))


def score_kept(kept: Kept) -> Score:
    """Return the best trial of an optimizer, one and the same over the whole run: never an envelope over learning
    rates."""
    finals = final_losses(kept)
    best = best_trial(finals)
    final = finals[:, best]
    return Score(
        label=kept.label,
        trials=len(kept.rates),
        best=best,
        rate=kept.rates[best],
        at_edge=len(kept.rates) > 1 and best in (0, len(kept.rates) - 1),
        final=final,
        interval=bootstrap_interval(final),
        valid=kept.valid[-1, :, best],
        diverged=diverged(kept)[:, best],
        steps=kept.steps,
        curve=kept.train[:, :, best],
        peak=kept.peak[:, :, best],
        valid_steps=kept.valid_steps,
        valid_curve=kept.valid[:, :, best],
        accuracy=None if kept.accuracy is None else kept.accuracy[-1, :, best],
        timed_out=None if kept.timed_out is None or not kept.timed_out[:, best].any() else kept.timed_out[:, best],
    )


def smooth(losses: Array, smoothing: int, steps: Sequence[int]) -> Array:
    """Return means over the last ``smoothing`` steps, on the first axis, at ``steps``; at first, over those there are.

    steps: counted from 1, so that 3 is the mean of what ends with the third.
    """
    with np.errstate(invalid="ignore", over="ignore"):  # a diverged run stays what it is: inf or NaN
        return np.stack([losses[max(0, t - smoothing) : t].mean(0) for t in steps])


def final_losses(kept: Kept) -> Array:
    """Return the training loss at the end ``[seeds, trials]``; ``inf`` for a run in which a loss was not finite, or
    timed out."""
    whole = np.isfinite(kept.peak).all(0)
    return np.where(whole if kept.timed_out is None else whole & ~kept.timed_out, kept.train[-1], np.inf)


def diverged(kept: Kept) -> Array:
    """Return a bool ``[seeds, trials]``: a loss was not finite, the final one is above that at initialisation, or a
    time-out.

    Where that is zero but for rounding, as of adapters on a solved problem, the former alone.
    """
    first = kept.train[0]
    return ~(final_losses(kept) <= np.where(np.abs(first) < NOTHING, np.finfo(np.float64).max, first))


def best_trial(finals: Array) -> int:
    """Return the index of the trial with the lowest seed-mean of ``finals [seeds, trials]``; one lost seed loses the
    trial."""
    return int(finals.mean(0).argmin())


def bootstrap_interval(values: Array, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean of ``values [n]``; the same for the same values."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(1)
    # Without interpolation, which would turn two infinite neighbours into NaN.
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return float(low), float(high)


def target(reference: Score) -> float:
    """Return the loss to be reached: the reference's final one, or where that is nearer to 0, what float32 resolves."""
    return resolved(reference.mean, reference)


def resolved(loss: float, reference: Score) -> float:
    """Return a loss, or where that is nearer to 0 what float32 resolves of the reference's first one."""
    least = RESOLUTION * abs(float(reference.curve[0].mean()))
    return least if abs(loss) < least else loss


def log_final(score: Score) -> float:
    """Return the mean over seeds of ``log(final / first + 1e-3)``: under a thousandth of the first, a loss says nothing
    more. A run that is lost counts as a loss of 1e9."""
    return float(np.log(np.minimum(score.final, 1e9) / score.curve[0] + 1e-3).mean())


def speed_up(candidate: Score, reference: Score) -> float:
    """Return steps of the run over the first point at which the candidate's seed-mean curve is at the reference's
    `target`.

    0 where it never is (a miss), NaN where the reference itself has no finite final loss.
    """
    if not np.isfinite(reference.mean):
        return float("nan")
    reached = candidate.curve.mean(1) <= target(reference)
    return candidate.steps[-1] / candidate.steps[int(reached.argmax())] if reached.any() else 0.0
