"""An `Inspection` in words: whether the rule has momentum, a schedule, clipping, decay, and by which number."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from l2o.inspection.experiments import ADAM_LR, FRACTIONS, MEMORY, SPIKES, Inspection

_NOTICED = 0.1
"""Shares and slopes nearer than this to those of a rule without the property count as that."""
_CLOCK_NOTICED = 0.01
_CORRELATED = 0.3
_DECAYED = 0.01
"""Share of the parameters that decay makes up over a run, from where on it counts."""
_TINY = torch.finfo(torch.float64).tiny


class Finding(NamedTuple):
    """topic: what was asked.     answer: a word.     number: what the answer rests on.     sentence: what it means."""

    topic: str
    answer: str
    number: float
    sentence: str


def findings(inspection: Inspection) -> list[Finding]:
    """Return one of each topic, always in the same order."""
    return [
        _momentum(inspection),
        _schedule(inspection),
        _step_size(inspection),
        _clipping(inspection),
        _decay(inspection),
        _inputs(inspection),
    ]


def _momentum(inspection: Inspection) -> Finding:
    """Parts of the update that are odd in the gradient: one that the past turns around with it, one that it does not.

    Of heavy-ball momentum µ and of Adam they are to each other as ``µ + ... + µ^MEMORY`` to 1.
    """
    equal, opposite = (_odd(curve) for curve in inspection.response.by_past[[0, -1]])
    present, past = (equal + opposite) / 2.0, (equal - opposite) / 2.0
    share = float(past.norm() / (past.norm() + present.norm()).clamp(min=_TINY))
    along = float(past @ inspection.response.gradients) <= 0.0
    answer = "no" if share < _NOTICED else "yes" if along else "reversed"
    sentence = f"the last {MEMORY} gradients of an entry decide {share:.0%} of its update, the present one the rest"
    return Finding("momentum", answer, share, sentence + ("; past gradients drive it uphill" * (answer == "reversed")))


def _odd(curve: Tensor) -> Tensor:
    return (curve - curve.flip(-1)) / 2.0


def _schedule(inspection: Inspection) -> Finding:
    change, sizes = inspection.clock_change, inspection.schedule
    if change < _CLOCK_NOTICED:
        return Finding("schedule", "no", change, "the clock, all else being equal, does not change the update")
    first = sizes[0].clamp(min=_TINY)
    told = ", ".join(f"{float(size / first):.2g}" for size in sizes)
    ages = ", ".join(f"{fraction:.0%}" for fraction in FRACTIONS)
    sentence = f"the clock alone changes the update by up to {change:.0%}; sizes at {ages} of the run: {told}"
    return Finding("schedule", "yes", change, sentence)


def tenths(rates: Tensor) -> tuple[float, float]:
    """Return medians over the first and the last tenth of a run, of ``rates [steps]``."""
    tenth = max(len(rates) // 10, 1)
    return float(rates[:tenth].median()), float(rates[-tenth:].median())


def _step_size(inspection: Inspection) -> Finding:
    first, last = tenths(inspection.run.rates)
    adam_first, adam_last = tenths(inspection.adam.rates)
    ratio = last / max(first, _TINY)
    answer = "rises" if ratio > 2.0 else "falls" if ratio < 0.5 else "steady"
    sentence = (
        f"rms of update over rms of gradient goes from {first:.2g} to {last:.2g} over the run; "
        f"Adam's at lr {ADAM_LR:g} from {adam_first:.2g} to {adam_last:.2g}"
    )
    return Finding("step size", answer, ratio, sentence)


def _clipping(inspection: Inspection) -> Finding:
    """Slope of the curve of spikes, in logarithms, over its last decade: 1 for a linear rule, 0 for a bounded one."""
    end = inspection.spikes[[-3, -1]].clamp(min=_TINY)
    slope = float((end[1] / end[0]).log10() / math.log10(SPIKES[-1] / SPIKES[-3]))
    answer = "yes" if slope < _NOTICED else "no" if slope > 1.0 - _NOTICED else "partly"
    sentence = f"a gradient {SPIKES[-1]:,.0f} times as large makes an update {float(end[1]):.3g} times as large"
    return Finding("clipping", answer, slope, sentence)


def decay_rate(inspection: Inspection) -> tuple[float, float]:
    """Return, by least squares, that of the update at rest, ``-rate * p``, and the correlation of ``-update`` with
    ``p`` about 0."""
    params, update = inspection.rest
    product, size = 0.0 - float(params @ update), float(params.norm())
    return product / max(size**2, _TINY), product / max(size * float(update.norm()), _TINY)


def _decay(inspection: Inspection) -> Finding:
    rate, correlation = decay_rate(inspection)
    noticed = abs(correlation) > _CORRELATED and abs(rate) * len(inspection.run.losses) > _DECAYED
    answer = "no" if not noticed else "yes" if rate > 0 else "reversed"
    verb = "grow" if rate < 0 else "shrink"
    sentence = f"without gradients parameters {verb} by {abs(rate):.2g} of themselves a step"
    return Finding("decay", answer, rate, f"{sentence} (correlation of -u with p: {correlation:.2f})")


def _inputs(inspection: Inspection) -> Finding:
    ranked = sorted(inspection.sensitivity.items(), key=lambda item: -item[1])
    strongest = ", ".join(f"{name} {value:.2g}" for name, value in ranked[:4] if value > 0.0)
    unseen = [name for name, value in ranked if value == 0.0]
    sentence = f"the update depends most on {strongest or 'nothing'}"
    return Finding("inputs", ranked[0][0], ranked[0][1], sentence + (f"; not on {', '.join(unseen)}" if unseen else ""))
