"""What an evaluation leaves behind: ``results.json``, ``report.md``, ``curves.png``, and a table on the terminal."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from l2o.bench.cost import YARDSTICK, Cost
from l2o.disk import atomic_write, try_folder
from l2o.evaluation.compare import Comparison, is_learned
from l2o.evaluation.plots import curves_png
from l2o.evaluation.scores import diverged, final_losses
from l2o.evaluation.trials import Trials
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
from l2o.extras import require
from l2o.types import ConfigurationError

FORMAT_VERSION = 1
_PLAIN_WIDTH = 110
"""Characters a line where the output is no terminal."""
_PROTOCOL = (
    "- Every optimizer meets the same tasks, initialisations and batches.",
    "- A learned optimizer: one run a seed, from its θ and the number of steps alone; nothing was tuned.",
    "- A tuned baseline: every learning rate of its grid on every seed. Reported is that with the lowest seed-mean of",
    "  the final training loss; a run with a loss that is not finite counts as infinitely bad.",
    "- An untuned baseline: one run a seed, of torch's own optimizer, at the rate that stands in its name.",
    "- Adam, warm-up + cosine: AdamW without weight decay; warm-up over 5% of the run, then half a cosine down to 0.",
    "- Training loss: seed-mean of the final one, with a 95% interval (bootstrap over seeds).",
    "- Validation: seed-mean of the loss on held-out data after the last step.",
    "- Diverged: seeds for which a loss was not finite, or the final one is above the one at initialisation.",
    "- Speed-up: steps of the run over the first step at which the smoothed seed-mean curve is at or under the final",
    "  training loss of tuned Adam; 0 if it never is.",
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


def prepare_folder(path: Path) -> None:
    """Make the folder of a report and try to write there. Raises `ConfigurationError` if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        try_folder(path)
    except OSError as error:
        raise ConfigurationError(
            f"out={str(path)!r}: {error.strerror}; name a folder that can be written to"
        ) from error


def write(report: Report, folder: Path) -> None:
    """Write the three files of a report, each atomically, the numbers first: the rest can be made from them again.

    Raises `ConfigurationError` where matplotlib is missing.
    """
    write_text(report, folder)
    atomic_write(folder / "curves.png", curves_png(report.comparisons, report.loss_label))


def write_text(report: Report, folder: Path) -> None:
    """Write ``results.json`` and ``report.md``, which is quickly done."""
    atomic_write(folder / "results.json", json.dumps(as_json(report), indent=1, allow_nan=False).encode())
    atomic_write(folder / "report.md", as_markdown(report).encode())


def print_tables(report: Report) -> None:
    """A table a setting on the terminal, and the verdict under it; then all settings; needs rich as `require` says."""
    console = new_console()
    for comparison in report.comparisons:
        setting = comparison.setting
        title = f"{setting.name}: {setting.steps} steps, {setting.seeds} seeds"
        bold = [is_learned(name) for name in comparison.scores]
        _print_table(console, title, [COLUMNS, *(table_row(comparison, name) for name in comparison.scores)], bold)
        console.print(verdict(comparison), markup=False, end="\n\n")
    if len(report.comparisons) > 1:
        _print_table(console, "All settings, misses first", _shown(summary_table(report.comparisons), console.width))
        console.print(SUMMARY_NOTE, end="\n\n")
        for found in overall(report.comparisons):
            console.print(overall_text(found), markup=False, end="\n\n")


def new_console() -> Any:
    """Where tables are printed. Raises `ConfigurationError` where rich is missing."""
    require("rich")
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_PLAIN_WIDTH)


def _print_table(console: Any, title: str, table: Sequence[Sequence[str]], bold: Sequence[bool] = ()) -> None:
    """table: headings, then rows.     bold: which of the rows are."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    shown = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading, *cells in zip(*table, strict=True):
        shown.add_column(heading, min_width=max(map(_widest, (heading, *cells))))
    for row, is_bold in itertools.zip_longest(table[1:], bold):
        shown.add_row(*row, style="bold" if is_bold else None)
    console.print(shown)


def _shown(table: Sequence[Sequence[str]], width: int) -> Sequence[Sequence[str]]:
    """As many columns, from the first, as fit into lines of ``width`` characters; ``report.md`` has them all."""
    needed = itertools.accumulate(2 + max(map(_widest, column)) for column in zip(*table, strict=True))
    fitting = max(1, sum(total < width for total in needed))
    return [row[:fitting] for row in table]


def _widest(cell: str) -> int:
    return max(map(len, cell.split()))


def as_markdown(report: Report) -> str:
    """The text of ``report.md``."""
    return "\n".join([*_head(report), *_settings(report), *_costs(report.costs), *_protocol(report)]) + "\n"


def _head(report: Report) -> Iterator[str]:
    yield f"# `{report.source}`, untuned, beside its baselines\n"
    yield from (f"- {overall_text(found)}" for found in overall(report.comparisons))
    yield f"\n{SUMMARY_NOTE}\n"
    headings, *rows = summary_table(report.comparisons)
    yield from _table(headings, rows)
    yield ""
    yield from (f"- **{c.setting.name}**: {verdict(c)}" for c in misses_first(report.comparisons))
    yield "\n![smoothed training loss over steps](curves.png)\n"


def _settings(report: Report) -> Iterator[str]:
    for comparison in report.comparisons:
        setting = comparison.setting
        yield f"## {setting.name}\n"
        yield f"`{setting.family}`, {setting.steps} steps, {setting.seeds} seeds. The final training loss is the mean"
        yield f"over the last {setting.smoothing} steps of the loss before the update.\n"
        yield from _table(COLUMNS, [table_row(comparison, name) for name in comparison.scores])
        yield f"\n{verdict(comparison)}\n"


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


def _protocol(report: Report) -> Iterator[str]:
    yield "## How this was measured\n"
    yield from _PROTOCOL
    for setting in (comparison.setting for comparison in report.comparisons):
        yield f"- Seeds of {setting.name}: {setting.seeds} problems, all drawn from a generator of seed {setting.seed}."
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


def as_json(report: Report) -> dict[str, Any]:
    """The content of ``results.json``: how each run ended, and all that is said of them; what is not finite is null.

    The curves that the runs took are not in it.
    """
    return _finite(
        {
            "format_version": FORMAT_VERSION,
            "source": report.source,
            "facts": dict(report.facts),
            "overall": [found._asdict() for found in overall(report.comparisons)],
            "settings": [_setting_json(comparison) for comparison in report.comparisons],
            "costs": {name: cost._asdict() for name, cost in report.costs.items()},
        }
    )


def summary(report: Report) -> dict[str, Any]:
    """What a checkpoint's card says of its results: `as_json` without the single runs."""
    short = as_json(report)
    for setting in short["settings"]:
        for optimizer in setting["optimizers"].values():
            optimizer["diverged"] = sum(optimizer["diverged"])
            optimizer["valid"] = (
                None if None in optimizer["valid"] else sum(optimizer["valid"]) / len(optimizer["valid"])
            )
            for name in ("runs", "final", "seconds", "best"):
                del optimizer[name]
    return {name: short[name] for name in ("overall", "settings", "facts", "costs")}


def _setting_json(comparison: Comparison) -> dict[str, Any]:
    setting = comparison.setting
    return {
        **{k: v for k, v in vars(setting).items() if k != "family"},
        "task": str(setting.family),
        "window": setting.smoothing,
        "seconds": comparison.seconds,
        "verdict": verdict(comparison),
        "optimizers": {name: _optimizer_json(comparison, name) for name in comparison.scores},
    }


def _optimizer_json(comparison: Comparison, name: str) -> dict[str, Any]:
    score, trials = comparison.scores[name], comparison.trials[name]
    kept = {k: v for k, v in vars(score).items() if k != "curve"}
    return {
        **kept,
        "mean": score.mean,
        "speed_up": comparison.speed_up(name),
        "seconds": trials.seconds,
        "runs": _runs_json(trials, comparison.setting.smoothing),
    }


def _runs_json(trials: Trials, window: int) -> list[dict[str, Any]]:
    final, lost = final_losses(trials.train, window), diverged(trials.train, window)
    return [
        {
            "trial": i,
            "lr": rate,
            "seed": s,
            "final": final[s, i],
            "valid": trials.valid[-1, s, i],
            "diverged": lost[s, i],
        }
        for i, rate in enumerate(trials.rates)
        for s in range(final.shape[0])
    ]


def _finite(value: Any) -> Any:
    """The same nested structure in plain JSON types; JSON has no word for infinity or NaN."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_finite(v) for v in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
