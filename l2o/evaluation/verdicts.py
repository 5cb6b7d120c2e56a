"""Comparisons in words and in rows of tables; misses come first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from l2o.evaluation.compare import REFERENCE, USUAL, Comparison, is_judged
from l2o.evaluation.scores import Score, resolved

COLUMNS = ("optimizer", "trials", "best lr", "training loss [95%]", "validation", "diverged", "speed-up")
SUMMARY_NOTE = (
    "Target, speed-up and validation are the first optimizer's beside tuned Adam (validation: its own / Adam's); "
    "missed with a speed-up: it was there and left again. Under each optimizer: seed-means of its final training "
    "losses; lost: seeds that diverged."
)
SHOWN = ("sgd", "momentum", REFERENCE, "adam_cosine", USUAL, "adamw_cosine_fixed", "muon")
"""Baselines that stand in the table and the pictures of all settings."""
OVERFITTED = 1.1
"""A validation loss of so many times the reference's is called overfitting where the training loss is at its target."""


class Overall(NamedTuple):
    """A judged optimizer over all settings.

    reached: settings in which it ends at or under the reference's final training loss.
    speed_up: median over settings, a miss counting 0; None where the reference was not run.
    worst: the highest ratio of its final training loss to that of ``USUAL``, and in which setting; None without.
    overfitted: settings with the target reached in training, and validation far above the reference's.
    diverged: settings in which a seed diverged.
    """

    name: str
    label: str
    settings: int
    reached: int
    speed_up: float | None
    worst: tuple[float, str] | None
    overfitted: tuple[str, ...]
    diverged: tuple[str, ...]


def overall(comparisons: Sequence[Comparison]) -> list[Overall]:
    """Judge each optimizer that is judged over all settings, in their order; empty without settings."""
    names = comparisons[0].judged if comparisons else []
    return [_overall(comparisons, name) for name in names]


def _overall(comparisons: Sequence[Comparison], name: str) -> Overall:
    speed_ups = [s for c in comparisons if (s := c.speed_up(name)) is not None]
    ratios = [(r, c.setting.name) for c in comparisons if (r := c.ratio(name, USUAL)) is not None]
    return Overall(
        name=name,
        label=comparisons[0].scores[name].label,
        settings=len(comparisons),
        reached=sum(c.reached(name) for c in comparisons),
        speed_up=float(np.median(speed_ups)) if speed_ups else None,
        # What is no number, since both diverged, is no better than infinity.
        worst=max(((math.inf if math.isnan(r) else r, at) for r, at in ratios), default=None),
        overfitted=tuple(c.setting.name for c in comparisons if overfits(c, name)),
        diverged=tuple(c.setting.name for c in comparisons if c.scores[name].diverged.any()),
    )


def overfits(comparison: Comparison, name: str) -> bool:
    """Say whether an optimizer reaches the target in training, with a validation loss far above the reference's."""
    if not comparison.reached(name):
        return False
    return valid_ratio(comparison, name) > OVERFITTED


def valid_ratio(comparison: Comparison, name: str) -> float:
    """Return the validation loss over the reference's, losses nearer to 0 than float32's resolution of the first one
    taken as it.

    1, or infinity for a higher one, where the reference's is not positive, or not finite.
    """
    reference = comparison.scores[REFERENCE]
    ours, theirs = (resolved(valid_loss(s), reference) for s in (comparison.scores[name], reference))
    if theirs > 0 and math.isfinite(theirs):
        return ours / theirs
    return 1.0 if ours <= theirs else math.inf


def overall_text(found: Overall) -> str:
    """Return one line for people."""
    said = [f"{found.label}: no reference to compare with."]
    if found.speed_up is not None:
        said = [
            f"{found.label}: at or under best-of-grid Adam's final training loss in {found.reached} of "
            f"{found.settings} settings; median speed-up {number(found.speed_up)} (a miss counts 0)."
        ]
    if found.worst is not None:
        ratio, at = found.worst
        said.append(f"At worst {number(ratio)} times the loss of untuned AdamW at 0.001 ({at}).")
    said += [f"Overfitting: {', '.join(found.overfitted)}."] if found.overfitted else []
    return " ".join([*said, f"Diverged: {', '.join(found.diverged) or 'never'}."])


def verdict(comparison: Comparison) -> str:
    """Say whether the first judged optimizer ends at or under the reference, by what ratio, and validation."""
    name = comparison.judged[0]
    ours = comparison.scores[name]
    lost = int(ours.diverged.sum())
    how = "diverged" if ours.timed_out is None else "timed out"
    failures = f" It {how} on {lost} of {len(ours.diverged)} seeds." if lost else " No seed diverged."
    if REFERENCE not in comparison.scores:
        return f"{REFERENCE} is not among the baselines, so there is nothing to compare with.{failures}"
    adam = comparison.scores[REFERENCE]
    if not comparison.has_target:
        return f"{adam.label} has no finite training loss at any rate, so there is nothing to compare with.{failures}"
    ends = f"{ours.label} ends at a training loss of {number(ours.mean)}"
    tuned = f"best-of-grid {adam.label}'s {number(adam.mean)}"
    reached = comparison.reached(name)
    head = f"Target reached: {ends}, at or under" if reached else f"Target missed: {ends}, above"
    beside = f"({_ratio(comparison.ratio(name, REFERENCE))}).{_beside_usual(comparison, name)}"
    valid = f" Validation loss: {number(valid_loss(ours))} against {number(valid_loss(adam))}"
    valid += ", far above: overfitting." if overfits(comparison, name) else "."
    return f"{head} {tuned} {beside}{valid}{failures}"


def _beside_usual(comparison: Comparison, name: str) -> str:
    if USUAL not in comparison.scores:
        return ""
    usual = number(comparison.scores[USUAL].mean)
    return f" Untuned AdamW at 0.001 ends at {usual} ({_ratio(comparison.ratio(name, USUAL))})."


def table_row(comparison: Comparison, name: str) -> tuple[str, ...]:
    """Return the cells of ``COLUMNS`` for one optimizer."""
    score = comparison.scores[name]
    low, high = score.interval
    return (
        score.label,
        str(score.trials),
        "untuned" if score.rate is None else f"{number(score.rate)}{' (edge of the grid)' * score.at_edge}",
        f"{number(score.mean)} [{number(low, 2)}, {number(high, 2)}]",
        valid_text(score),
        f"{int(score.diverged.sum())} of {len(score.diverged)}{' (timed out)' if score.timed_out is not None else ''}",
        speed_text(comparison.speed_up(name)),
    )


def summary_table(comparisons: Sequence[Comparison]) -> list[tuple[str, ...]]:
    """Return headings, then a row a setting: its name, target, speed-up, validation loss, and final training losses.

    Of many baselines those of ``SHOWN``; the section of each setting has them all.
    """
    names = [name for name in comparisons[0].scores if is_judged(name) or name in SHOWN]
    losses = [_heading(comparisons[0].scores[name], name) for name in names]
    headings = ("task", "target", "speed-up", "validation", *losses, "seconds")
    return [headings, *(_summary_row(c, names) for c in misses_first(comparisons))]


def misses_first(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Sort settings: those that miss the target come first, then overfitting, then the lowest speed-up."""
    return sorted(comparisons, key=_success)


def _success(comparison: Comparison) -> tuple[bool, bool, float]:
    name = comparison.judged[0]
    return comparison.reached(name), not overfits(comparison, name), comparison.speed_up(name) or 0.0


def _heading(score: Score, name: str) -> str:
    return score.label if is_judged(name) else f"{name}, best of {score.trials}" if score.trials > 1 else name


def _summary_row(comparison: Comparison, names: Sequence[str]) -> tuple[str, ...]:
    scores, first = comparison.scores, comparison.judged[0]
    speed_up = comparison.speed_up(first)
    reached = "overfits" if overfits(comparison, first) else "reached" if comparison.reached(first) else "missed"
    return (
        comparison.setting.name,
        "none" if speed_up is None else reached,
        "none" if speed_up is None else f"{speed_up:.3g}×",
        "/".join(number(valid_loss(scores[name]), 2) for name in (first, REFERENCE) if name in scores),
        *(_final(scores[name]) for name in names),
        f"{comparison.seconds:.0f}",
    )


def _final(score: Score) -> str:
    lost = int(score.diverged.sum())
    return f"{number(score.mean)} ({lost} lost)" if lost else number(score.mean)


def valid_text(score: Score) -> str:
    """Return the validation loss and, in brackets, accuracy."""
    share = math.nan if score.accuracy is None else float(score.accuracy.mean())
    right = "" if math.isnan(share) else f" ({100 * share:.1f}%)"
    return f"{number(valid_loss(score))}{right}"


def valid_loss(score: Score) -> float:
    """Return the seed-mean of the validation loss at the end of the run; ``inf`` where that of a seed is not finite."""
    return float(np.where(np.isfinite(score.valid), score.valid, np.inf).mean())


def number(x: float, digits: int = 3) -> str:
    """Return significant digits, or words."""
    return f"{x:.{digits}g}" if math.isfinite(x) else "not finite"


def _ratio(x: float | None) -> str:
    return f"{x:.3g} times it" if x is not None and math.isfinite(x) and x > 0 else "no ratio"


def speed_text(x: float | None) -> str:
    """Return a speed-up; 0 is a miss."""
    if x is None:
        return "no reference"
    return f"{x:.3g}×" if x > 0 else "0 (miss)"
