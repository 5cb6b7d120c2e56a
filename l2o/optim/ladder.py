"""The stages that a guarded run goes through: the rule, its steps a tenth, AdamW; and when it goes up or down."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from l2o.optim import watch

_PROBATION = 0.02
"""Share of the run for which steps are small,"""
_LEAST_PROBATION = 2 * watch.EVERY
"""and at least so many steps."""
_SOON = 0.1
"""Share of the run after which an alarm is a new one; until then it is the same trouble once more."""
_LATE = 0.1
"""Share of the run after which a rule without trouble until then has proven itself: it gets one more chance,"""
_AGAIN = 0.1
"""so much of the run after AdamW took over."""
_AT_ONCE = 2 * watch.EVERY
"""Steps within which a leap or a rise says that the rule is not for the problem: AdamW need not wait for a second."""
_SAME = 0.8
"""A loss at good parameters that is this share of the one that gave the alarm: not the optimizer was in trouble."""
_KEPT = 100
"""Events, of which the oldest are forgotten."""

Guard = dict[str, Any]
"""stage: ``rule``, ``small`` or ``adamw``.    since: the step of the last change.    good: that of the good parameters.
entries: of parameters with gradients, and of all trained ones, at the last look.    alarm: the loss that gave the last
one, -inf for none.    again: the step of AdamW's handing over, -1 for never.    foreign: only where AdamW acts from
the start, which never hands over.    losses: since the last look.
skipped: steps until then.    memory: `watch.Memory`.    events: dicts of ``step, kind, done``."""

_WARNINGS = {
    "backed off": "parameters are the last good ones again, steps are a tenth for a while",
    "fell back": "parameters are the last good ones again, AdamW at 1e-3 goes on",
    "anew": "parameters are the last good ones again, AdamW begins anew",
}
"""What is said of what was done, where parameters were put back. In the report alone: ``returned`` (the rule at its own
steps), ``handed over`` (AdamW to the rule), ``another problem`` (where the loss is as high at the last good parameters;
the run goes on), ``AdamW`` (acts from the start) and ``skipped`` (steps whose gradients were not finite, or
far above all before)."""


class Event(NamedTuple):
    """step: number of steps before it.    kind: of trouble.    done: what was done about it."""

    step: int
    kind: str
    done: str

    @property
    def restored(self) -> bool:
        """Whether good parameters were put in place."""
        return self.done in _WARNINGS

    def __str__(self) -> str:
        signs = {
            "leap": "parameters moved by more than half their norm within ten steps",
            "rise": "the loss has risen",
            "skips": "half the gradients were not finite, or far above all before",
        }
        return (
            f"step {self.step + 1}: {signs[self.kind]}; {_WARNINGS[self.done]}. optimizer.report() has all such events"
        )


def begin() -> Guard:
    """Return what is known before the first step."""
    stage = {"stage": "rule", "since": 0, "good": 0, "entries": [0, 0], "alarm": -math.inf, "again": -1}
    return {**stage, "losses": [], "skipped": 0, "memory": {}, "events": []}


def foreign() -> Guard:
    """Return what is known before the first step of a rule that is not for such parameters: AdamW acts."""
    return _noted({**begin(), "stage": "adamw", "foreign": True}, Event(0, "kind", "AdamW"))


def skips(guard: Guard, step: int, skipped: int) -> Guard:
    """Return it with the number of skipped steps, in the report if there are new ones."""
    if skipped == guard["skipped"]:
        return guard
    return _noted({**guard, "skipped": skipped}, Event(step, "gradient", "skipped"))


def calm(guard: Guard, step: int, total: int) -> tuple[Guard, Event | None]:
    """Return what is so after a look that found nothing."""
    if guard["stage"] == "small" and step - guard["since"] >= max(_PROBATION * total, _LEAST_PROBATION):
        stage, event = "rule", Event(step, "calm", "returned")
    elif guard["stage"] == "adamw" and step >= guard["again"] > 0:
        stage, event = "small", Event(step, "calm", "handed over")
    else:
        return guard, None
    return _noted({**guard, "stage": stage, "since": step, "alarm": -math.inf}, event), event


def alarmed(guard: Guard, kind: str, seen: watch.Seen, step: int, total: int) -> tuple[Guard, Event]:
    """Return what is so after a look that found trouble."""
    stage, since = guard["stage"], guard["since"]
    if kind == "rise" and step - since <= 2 * watch.EVERY and seen.loss >= _SAME * guard["alarm"] > -math.inf:
        new = {"stage": "rule" if stage == "small" else stage, "memory": watch.rebased(guard["memory"], seen.loss)}
        event = Event(step, kind, "another problem")
        return _noted({**guard, **new, "since": step, "alarm": -math.inf}, event), event
    unfit = step <= _AT_ONCE and kind in ("leap", "rise")
    soon = since > 0 and step - since <= max(_SOON * total, 2 * _LEAST_PROBATION)
    stage, done = {
        "rule": ("adamw", "fell back") if soon or unfit else ("small", "backed off"),
        "small": ("adamw", "fell back"),
        "adamw": ("small", "backed off") if soon and "foreign" not in guard else ("adamw", "anew"),
    }[stage]
    event = Event(step, kind, done)
    new = {"stage": stage, "since": step, "alarm": seen.loss if kind == "rise" else -math.inf}
    new["again"] = guard["again"] if done != "fell back" else -1 if unfit else _again(guard, step, total)
    return _noted({**guard, **new}, event), event


def _again(guard: Guard, step: int, total: int) -> int:
    """The step at which AdamW is to hand over."""
    done = [(event["step"], event["done"]) for event in guard["events"] if event["kind"] != "gradient"]
    proven = all(at >= _LATE * total and what != "fell back" for at, what in done)
    return step + math.ceil(_AGAIN * total) if proven else -1


def _noted(guard: Guard, event: Event) -> Guard:
    return {**guard, "events": [*guard["events"], event._asdict()][-_KEPT:]}
