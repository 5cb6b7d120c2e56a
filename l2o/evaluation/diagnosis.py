"""What is wrong with a training run, from its losses alone: since which step, and what to try."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from l2o.evaluation.scores import Score, kept_steps, smooth
from l2o.evaluation.trials import Array
from l2o.types import ConfigurationError

STATES = {
    "timed out": "a longer timeout, or an optimizer with cheaper steps",
    "descending": "to train on",
    "stalled": "a larger learning rate or, late in the run, a decaying one; else a larger model, or better data",
    "diverged": "a smaller learning rate, warm-up, clipping of gradients (max_norm=1), float32 instead of less",
    "unstable": "warm-up, clipping of gradients, a smaller learning rate, larger batches; look at the data of a spike",
    "overfitting": "to stop earlier; weight decay, dropout, augmentation or more data; a smaller model",
}
"""What a run can be, each with what to try; of a time-out no losses tell."""
OVERFITTED = 1.1
"""A validation loss of so many times the lowest one is overfitting, where the training loss went on falling."""
_STALLED = 0.02
"""A training loss that fell by less than this share from the third to the last quarter of the run has stalled."""
_SHORT = 8
"""Of fewer steps nobody can tell whether they have stalled."""
_SOLVED = 1e-6
"""A training loss of this share of the first one need fall no further."""
_SPIKE = 0.1
"""A spike is at least this share of all that was gained, and `_USUAL` times what the noise of batches usually adds."""
_USUAL = 6.0
_SPIKES = 2
"""So many spikes after the first tenth of a run are too many."""


class Diagnosis(NamedTuple):
    """state: a key of ``STATES``.     step: since which step, None while nothing is wrong.     advice: what to try."""

    state: str
    step: int | None
    advice: str

    def __str__(self) -> str:
        return f"{self.state}{'' if self.step is None else f' since step {self.step}'}; try {self.advice}"


class _Run(NamedTuple):
    """steps, train, peak, valid_steps, valid: of one run, as in `Kept`; valid: empty where there is none."""

    steps: Array
    train: Array
    peak: Array
    valid_steps: Array
    valid: Array


def diagnose(losses: Sequence[float] | Array, valid: Sequence[float] | Array | None = None) -> Diagnosis:
    """Say what a run is: descending, stalled, diverged, unstable or overfitting; the gravest, if it is several.

    losses: training losses of every step, or evenly spread ones, up to now; steps are counted from 1 in their units. If
        the run goes on: it may be called again at any time. The step that is named is right to about 1% of them.
    valid: losses on held-out data at evenly spread steps, the last at the end of ``losses``.
    Raises `ConfigurationError` for fewer than two losses, or for what is no row of numbers.
    """
    train, held_out = _row("losses", losses, 2), _row("valid", () if valid is None else valid, 0)
    steps = kept_steps(len(train))
    smoothing = min(max(10, len(train) // 50), max(1, len(train) // 4))
    peak = np.maximum.reduceat(np.where(np.isfinite(train), train, np.inf), [0, *steps[:-1]])
    valid_steps = np.arange(1, len(held_out) + 1) * len(train) // max(1, len(held_out))
    found = _diagnose(_Run(np.array(steps), smooth(train, smoothing, steps), peak, valid_steps, held_out))
    broken = ~np.isfinite(train)
    return found._replace(step=int(broken.argmax()) + 1) if broken.any() else found


def diagnose_score(score: Score) -> list[Diagnosis]:
    """Diagnose each seed of a stored run."""
    steps, valid_steps = np.array(score.steps), np.array(score.valid_steps)
    rows = zip(score.curve.T, score.peak.T, score.valid_curve.T, strict=True)
    runs = [_Run(steps, train, peak, valid_steps, valid) for train, peak, valid in rows]
    timed_out = np.full(len(runs), False) if score.timed_out is None else score.timed_out
    return [_late(run) if late else _diagnose(run) for run, late in zip(runs, timed_out, strict=True)]


def _late(run: _Run) -> Diagnosis:
    """Of a run that was ended: since the last step that it came to."""
    done = np.isfinite(run.peak)
    return Diagnosis("timed out", int(run.steps[done][-1]) if done.any() else 1, STATES["timed out"])


def gravest(found: Sequence[Diagnosis]) -> Diagnosis:
    """Return, of several seeds, the one to look at: time-outs first, then diverged, unstable, overfitting, stalled."""
    order = ("timed out", "diverged", "unstable", "overfitting", "stalled", "descending")
    return min(found, key=lambda d: (order.index(d.state), d.step or 0))


def _row(name: str, values: Any, least: int) -> Array:
    try:
        row = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:  # the last from tensors that require a gradient
        raise ConfigurationError(f"{name}: expected a row of numbers, as loss.item() gives them ({error})") from error
    if row.ndim != 1 or len(row) < least:
        raise ConfigurationError(f"{name} has shape {list(row.shape)}: expected a row of at least {least} numbers")
    return row


def _diagnose(run: _Run) -> Diagnosis:
    checks = {"diverged": _diverged, "unstable": _unstable, "overfitting": _overfitting, "stalled": _stalled}
    for state, check in checks.items():
        step = check(run)
        if step is not None:
            return Diagnosis(state, step, STATES[state])
    return Diagnosis("descending", None, STATES["descending"])


def _diverged(run: _Run) -> int | None:
    """The first loss that is not finite; or the step after which the loss was above the first one for good."""
    broken = ~np.isfinite(run.peak)
    if broken.any():
        return int(run.steps[broken.argmax()])
    above = run.train > run.train[0]
    if not above[-1] or abs(run.train[0]) < np.finfo(np.float32).tiny:
        return None
    below = (~above).nonzero()[0]
    return int(run.steps[min(below[-1] + 1, len(run.steps) - 1)])


def _unstable(run: _Run) -> int | None:
    """The first of several spikes, the first tenth of the run apart; later losses jump far out of their noise."""
    excess = run.peak[1:] - run.train[:-1]
    gained = run.train[0] - run.train.min()
    usual = np.array([np.median(np.abs(excess[max(0, i - 8) : i + 9])) for i in range(len(excess))])
    late = run.steps[1:] > 0.1 * run.steps[-1]
    spikes = late & (excess > _USUAL * usual) & (excess > _SPIKE * gained)
    return int(run.steps[1:][spikes.argmax()]) if spikes.sum() >= _SPIKES else None


def _overfitting(run: _Run) -> int | None:
    """The step of the lowest validation loss, if it rose from there while the training loss fell."""
    if len(run.valid) < 2 or not np.isfinite(run.valid).all():
        return None
    best = int(run.valid.argmin())
    low, last = run.valid[best], run.valid[-1]
    risen = last > low * OVERFITTED if low > 0 else last > low + 0.1 * abs(low)
    at = run.train[min(int(np.searchsorted(run.steps, run.valid_steps[best])), len(run.train) - 1)]
    return int(run.valid_steps[best]) if risen and run.train[-1] <= at else None


def _stalled(run: _Run) -> int | None:
    """The step at which the loss had come to where it stayed, if it hardly fell in the second half of the run."""
    if len(run.steps) < _SHORT:
        return None
    first, middle, end = run.train[0], _mean(run, 0.5, 0.75), _mean(run, 0.75, 1.0)
    scale = abs(end) if run.train.min() > 0 else abs(first - end)
    if (run.train.min() >= 0 and end <= _SOLVED * first) or middle - end > _STALLED * scale:
        return None
    return int(run.steps[(run.train <= end + _STALLED * scale).argmax()])


def _mean(run: _Run, after: float, until: float) -> float:
    """Of the training loss over a part of the run."""
    inside = (run.steps > after * run.steps[-1]) & (run.steps <= until * run.steps[-1])
    return float(run.train[inside].mean()) if inside.any() else float(run.train[-1])
