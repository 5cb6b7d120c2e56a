"""The text of ``report.md``: what was found, then all that was tried, then how it was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from l2o.bench.cost import YARDSTICK, Cost
from l2o.evaluation.compare import REFERENCE, Comparison
from l2o.evaluation.tables import Table, diagnoses_table, optimizers_table, results_table, splits_table, tasks_table
from l2o.evaluation.verdicts import (
    COLUMNS,
    OVERFITTED,
    SUMMARY_NOTE,
    misses_first,
    number,
    overall,
    overall_text,
    summary_table,
    table_row,
    verdict,
)

_PROTOCOL = (
    "- Every optimizer meets the same tasks, initialisations and batches.",
    "- A learned optimizer: one run a seed, from its θ and the number of steps alone; nothing was tuned.",
    "- A tuned baseline: every learning rate of its grid on every seed. Reported is that with the lowest seed-mean of",
    "  the final training loss; a run with a loss that is not finite counts as infinitely bad.",
    "- An untuned baseline: one run a seed, of torch's own optimizer, at the rate that stands in its name.",
    "- Adam, warm-up + cosine: AdamW without weight decay; warm-up over 5% of the run, then half a cosine down to 0.",
    "- Training loss: seed-mean of the final one, with a 95% interval (bootstrap over seeds).",
    "- Validation: seed-mean of the loss on held-out data after the last step; of classifiers, the accuracy there.",
    "- Diverged: seeds for which a loss was not finite, or the final one is above the one at initialisation, or which",
    "  timed out.",
    "- Speed-up: steps of the run over the first step at which the smoothed seed-mean curve is at or under the final",
    "  training loss of tuned Adam, or 2^-23 of the first loss where that is higher; 0 if it never is.",
    f"- Overfitting: that loss is reached, and validation is over {OVERFITTED} times that of tuned Adam.",
)


class Report(NamedTuple):
    """Everything that a report tells.

    source: the learned optimizer as the user named it.     facts: of the run (command, date, hardware, ...), in order.
    costs: from `optimizer_costs`; empty where they were not measured.     loss_label: of the picture's axis, with unit.
    """

    source: str
    comparisons: Sequence[Comparison]
    facts: Mapping[str, str]
    costs: Mapping[str, Cost]
    loss_label: str = "training loss"

    @property
    def title(self) -> str:
        """Of the page: nothing that is judged was tuned, unless it has several trials."""
        tuned = any(c.scores[name].trials > 1 for c in self.comparisons for name in c.judged)
        return f"{self.source}, {'' if tuned else 'untuned, '}beside baselines"

    @property
    def scored_together(self) -> bool:
        """Whether there are several tasks, and a reference that speed-ups are over."""
        return len(self.comparisons) > 1 and REFERENCE in self.comparisons[0].scores


def as_markdown(report: Report) -> str:
    """Return the text of ``report.md``."""
    return "\n".join([*_head(report), *_settings(report), *_costs(report.costs), *protocol(report)]) + "\n"


def _head(report: Report) -> Iterator[str]:
    yield f"# {report.title}\n"
    yield from (f"- {overall_text(found)}" for found in overall(report.comparisons))
    if report.scored_together:
        yield from _suite(report.comparisons)
    yield f"\n{SUMMARY_NOTE}\n"
    headings, *rows = summary_table(report.comparisons)
    yield from _table(headings, rows)
    yield ""
    yield from (f"- **{c.setting.name}**: {verdict(c)}" for c in misses_first(report.comparisons))
    yield "\n![smoothed training loss over steps](curves.png)\n"


def _suite(comparisons: Sequence[Comparison]) -> Iterator[str]:
    """What only several tasks together say."""
    sections = {"All optimizers": optimizers_table, "Kinds of tasks": splits_table, "Tasks": tasks_table}
    for title, make in sections.items():
        yield f"\n## {title}\n"
        yield from _noted(make(comparisons))
    yield "\n![performance profile](profile.png)\n\n## Tasks and final losses"


def results_block(results: Mapping[str, Any]) -> str:
    """Return the table of all optimizers that a document shows of a ``results.json``."""
    return "\n".join(line for line in _noted(results_table(results)._replace(note="")) if line)


def _noted(table: Table) -> Iterator[str]:
    yield from _table(table.rows[0], [_emphasised(row, b) for row, b in zip(table.rows[1:], table.bold, strict=True)])
    yield f"\n{table.note}" if table.note else ""


def _emphasised(row: Sequence[str], bold: bool) -> Sequence[str]:
    return (f"**{row[0]}**", *row[1:]) if bold else row


def _settings(report: Report) -> Iterator[str]:
    for comparison in report.comparisons:
        setting = comparison.setting
        yield f"## {setting.name}\n"
        yield f"`{setting.family}`, {setting.steps} steps, {setting.seeds} seeds. The final training loss is the mean"
        yield f"over the last {setting.smoothing} steps of the loss before the update.\n"
        yield from _table(COLUMNS, [table_row(comparison, name) for name in comparison.scores])
        yield f"\n{verdict(comparison)}\n"
        yield from _noted(diagnoses_table(comparison))


def _costs(costs: Mapping[str, Cost]) -> Iterator[str]:
    if not costs:
        return
    yield "## Cost\n"
    yield "One step of the optimizer alone on a perceptron of a million parameters; the median of several, in turn.\n"
    columns = ("optimizer", "milliseconds a step", f"relative to {YARDSTICK}", "state bytes a parameter")
    unit = costs[YARDSTICK].seconds
    rows = [(n, f"{1e3 * c.seconds:.3g}", f"{c.seconds / unit:.3g}×", f"{c.state_bytes:.3g}") for n, c in costs.items()]
    yield from _table(columns, rows)
    yield ""


def protocol(report: Report) -> Iterator[str]:
    """Return how it was measured, as lines of a list."""
    yield "## How this was measured\n"
    yield from _PROTOCOL
    for setting in (comparison.setting for comparison in report.comparisons):
        limit = "" if setting.timeout is None else f" A run that took over {number(setting.timeout)} s was ended."
        drawn = f"{setting.seeds} problems, all drawn from a generator of seed {setting.seed}.{limit}"
        yield f"- Seeds of {setting.name}: {drawn}"
    yield from (
        f"- {label}: {len(grid)} trials a seed, learning rates {', '.join(map(number, grid))}."
        for label, grid in _grids(report).items()
    )
    yield from (f"- {name}: {text}" for name, text in report.facts.items())


def _grids(report: Report) -> dict[str, tuple[float, ...]]:
    trials = report.comparisons[0].trials.values()
    return {t.label: tuple(rate for rate in t.rates if rate is not None) for t in trials if t.rates != (None,)}


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for cells in (columns, ["---"] * len(columns), *rows):
        yield f"| {' | '.join(cells)} |"
