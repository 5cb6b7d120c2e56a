"""The tables of a report, as rows of text that Markdown, HTML and the terminal show alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from l2o.evaluation.aggregate import Estimate, Summary, by_split, summaries
from l2o.evaluation.compare import REFERENCE, Comparison, is_judged
from l2o.evaluation.diagnosis import diagnose_score, gravest
from l2o.evaluation.scores import Kept, diverged, final_losses
from l2o.evaluation.trials import SPLITS
from l2o.evaluation.verdicts import misses_first, number, overfits, speed_text, valid_loss


class Table(NamedTuple):
    """note: what the columns mean.     rows: the headings, then the others.     bold: which of the others stand out."""

    note: str
    rows: list[tuple[str, ...]]
    bold: list[bool]


def optimizers_table(comparisons: Sequence[Comparison]) -> Table:
    """Return every optimizer over all tasks, the best first; without rows where there is no reference."""
    table = summaries_table(summaries(comparisons))
    out = ", ".join(c.setting.name for c in comparisons if not c.has_target)
    return table._replace(note=f"{table.note} Without a finite loss of Adam's, and left out: {out}.") if out else table


def results_table(results: Mapping[str, Any]) -> Table:
    """Return the same from a ``results.json``, whose nulls are numbers that are not finite."""
    return summaries_table([_summary_of(found) for found in results["optimizers"]])


def _summary_of(found: Mapping[str, Any]) -> Summary:
    estimates = {name: Estimate(*found[name]) for name in ("median", "iqm", "reached")}
    valid = math.inf if found["valid"] is None else found["valid"]
    return Summary(**{**found, **estimates, "valid": valid})


def summaries_table(found: Sequence[Summary]) -> Table:
    """Return a row an optimizer."""
    headings = (
        *("optimizer", "trials", "target reached", "speed-up, median", "speed-up, IQM"),
        *("validation / Adam's", "speed-up in time", "diverged runs", "overfits on"),
    )
    note = (
        "Target: the final training loss of Adam at the best rate of its grid, task by task. Reached: at some step; a "
        "verdict says where an optimizer ends. Speed-up: steps of the run over those to the target; a miss is 0. [95% "
        "bootstrap intervals over tasks]. IQM: mean without the lowest and the highest quarter. In time: step speed-up "
        "over the time of a training step relative to torch's Adam, on these small problems on one thread; – where it "
        "was not timed. Tuned ones have as many trials a task and seed as stated."
    )
    return Table(note, [headings, *map(_optimizer_row, found)], [is_judged(s.name) for s in found])


def _optimizer_row(found: Summary) -> tuple[str, ...]:
    return (
        found.label,
        "untuned" if found.trials == 1 else str(found.trials),
        found.hits,
        _estimate(found.median),
        _estimate(found.iqm),
        number(found.valid),
        "–" if found.wall is None else f"{found.wall:.3g}",
        f"{found.diverged} of {found.runs}{f' ({found.timed_out} timed out)' if found.timed_out else ''}",
        str(len(found.overfitted)),
    )


def _estimate(found: Estimate) -> str:
    return f"{found.value:.3g} [{found.low:.2g}, {found.high:.2g}]"


def splits_table(comparisons: Sequence[Comparison]) -> Table:
    """Return the judged optimizers on tasks like those of meta-training, and on others: meta-overfitting shows here."""
    splits = by_split(comparisons)
    names = comparisons[0].judged
    headings = ("tasks", "number", *(comparisons[0].scores[name].label for name in names))
    rows = [headings]
    for split, found in splits.items():
        by_name = {s.name: s for s in found}
        if by_name:
            cells = (_split_cell(by_name[name]) for name in names)
            rows.append((SPLITS[split], str(found[0].tasks), *cells))
    note = "Targets reached; median speed-up; validation loss over tuned Adam's, median."
    return Table(note, rows, [False] * (len(rows) - 1))


def _split_cell(found: Summary) -> str:
    return f"{found.hits}; {found.median.value:.3g}×; {number(found.valid)}"


def tasks_table(comparisons: Sequence[Comparison]) -> Table:
    """Return a row a task, misses of the first judged optimizer first."""
    names = comparisons[0].judged
    labels = [comparisons[0].scores[name].label for name in names]
    headings = ("task", "kind", "steps", *(f"{label}: speed-up" for label in labels))
    headings += (*(f"{label}: validation" for label in labels), "Adam: loss", "Adam: validation", "best of all")
    rows = [headings, *(_task_row(c, names) for c in misses_first(comparisons))]
    note = "Speed-up over tuned Adam (0: missed); validation losses; last, who has the lowest final training loss."
    return Table(note, rows, [False] * (len(rows) - 1))


def _task_row(comparison: Comparison, names: Sequence[str]) -> tuple[str, ...]:
    scores, adam = comparison.scores, comparison.scores.get(REFERENCE)
    best = min(scores.values(), key=lambda s: s.mean)
    return (
        comparison.setting.name,
        comparison.setting.split,
        f"{comparison.setting.steps:,}",
        *(_speed(comparison, name) for name in names),
        *(number(valid_loss(scores[name]), 2) for name in names),
        "none" if adam is None else number(adam.mean, 2),
        "none" if adam is None else number(valid_loss(adam), 2),
        f"{best.label} ({number(best.mean, 2)})",
    )


def _speed(comparison: Comparison, name: str) -> str:
    return f"{speed_text(comparison.speed_up(name))}{' overfits' if overfits(comparison, name) else ''}"


def diagnoses_table(comparison: Comparison) -> Table:
    """Return what the runs of one setting are, the gravest seed of each optimizer's best trial."""
    rows: list[tuple[str, ...]] = [("optimizer", "its runs", "since step", "what to try")]
    for score in comparison.scores.values():
        each = diagnose_score(score)
        worst = gravest(each)
        share = sum(d.state == worst.state for d in each)
        since = "" if worst.step is None else f"{worst.step:,}"
        rows.append((score.label, f"{worst.state} ({share} of {len(each)} seeds)", since, worst.advice))
    return Table("", rows, [is_judged(name) for name in comparison.scores])


def trials_table(comparison: Comparison) -> Table:
    """Return every learning rate that was tried."""
    rows: list[tuple[str, ...]] = [("optimizer", "learning rate", "loss of each seed", "validation", "diverged")]
    for kept in comparison.trials.values():
        rows += [_trial_row(kept, i) for i in range(len(kept.rates))]
    return Table("", rows, [False] * (len(rows) - 1))


def _trial_row(kept: Kept, trial: int) -> tuple[str, ...]:
    rate, finals = kept.rates[trial], final_losses(kept)[:, trial]
    return (
        kept.label,
        "untuned" if rate is None else number(rate),
        ", ".join(number(float(x), 2) for x in finals),
        number(float(np.mean(kept.valid[-1, :, trial])), 2),
        f"{int(diverged(kept)[:, trial].sum())} of {len(finals)}",
    )
