"""What an evaluation leaves behind: numbers, ``report.md``, ``report.html``, pictures, and tables on the terminal."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from l2o.disk import atomic_write, try_folder
from l2o.evaluation.aggregate import profile, summaries
from l2o.evaluation.compare import Comparison, is_judged
from l2o.evaluation.html import as_html
from l2o.evaluation.markdown import Report, as_markdown
from l2o.evaluation.plots import curves_png, png, profile_picture
from l2o.evaluation.scores import Kept, diverged, final_losses
from l2o.evaluation.tables import optimizers_table, tasks_table
from l2o.evaluation.verdicts import COLUMNS, SUMMARY_NOTE, overall, overall_text, summary_table, table_row, verdict
from l2o.extras import require
from l2o.types import ConfigurationError

FORMAT_VERSION = 1
_CURVES = ("steps", "curve", "peak", "valid_steps", "valid_curve")
"""Fields of a score that stay in the store."""
_MANY = 4
"""Of more settings than these, the terminal shows what they say together."""
_PLAIN_WIDTH = 110
"""Characters a line where the output is no terminal."""


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
    """Write the files of a report, each atomically, the numbers first: the rest can be made from the store again.

    Raises `ConfigurationError` where matplotlib is missing.
    """
    write_text(report, folder)
    atomic_write(folder / "curves.png", curves_png(report.comparisons, report.loss_label))
    if report.scored_together:
        picture = profile_picture(profile(report.comparisons), report.comparisons[0], png)
        atomic_write(folder / "profile.png", picture)
    atomic_write(folder / "report.html", as_html(report).encode())


def write_text(report: Report, folder: Path) -> None:
    """Write ``results.json`` and ``report.md``."""
    atomic_write(folder / "results.json", json.dumps(as_json(report), indent=1, allow_nan=False).encode())
    atomic_write(folder / "report.md", as_markdown(report).encode())


def print_tables(report: Report) -> None:
    """Print a table a setting on the terminal, and the verdict under it, unless there are many; then all settings.

    Raises `ConfigurationError` where rich is missing.
    """
    console = new_console()
    if report.scored_together and len(report.comparisons) > _MANY:
        _print_suite(console, report.comparisons)
    else:
        _print_settings(console, report.comparisons)
    for found in overall(report.comparisons) if len(report.comparisons) > 1 else ():
        console.print(overall_text(found), markup=False, end="\n\n")


def _print_suite(console: Any, comparisons: Sequence[Comparison]) -> None:
    """Of each table the columns that fit; the report has them all."""
    table = optimizers_table(comparisons)
    _print_table(console, "All optimizers", [row[:4] + row[5:8] for row in table.rows], table.bold)
    rows = [row[:-1] for row in tasks_table(comparisons).rows]
    _print_table(console, "Tasks, misses first", _shown(rows, console.width))


def _print_settings(console: Any, comparisons: Sequence[Comparison]) -> None:
    for comparison in comparisons:
        setting = comparison.setting
        title = f"{setting.name}: {setting.steps} steps, {setting.seeds} seeds"
        bold = [is_judged(name) for name in comparison.scores]
        _print_table(console, title, [COLUMNS, *(table_row(comparison, name) for name in comparison.scores)], bold)
        console.print(verdict(comparison), markup=False, end="\n\n")
    if len(comparisons) > 1:
        _print_table(console, "All settings, misses first", _shown(summary_table(comparisons), console.width))
        console.print(SUMMARY_NOTE, end="\n\n")


def new_console() -> Any:
    """Return where tables are printed. Raises `ConfigurationError` where rich is missing."""
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


def as_json(report: Report) -> dict[str, Any]:
    """Return the content of ``results.json``: how each run ended, and all that is said of them; what is not finite is
    null.

    The curves that the runs took are not in it.
    """
    return _finite(
        {
            "format_version": FORMAT_VERSION,
            "source": report.source,
            "facts": dict(report.facts),
            "overall": [found._asdict() for found in overall(report.comparisons)],
            "optimizers": [found._asdict() for found in summaries(report.comparisons)],
            "settings": [_setting_json(comparison) for comparison in report.comparisons],
            "costs": {name: cost._asdict() for name, cost in report.costs.items()},
        }
    )


def summary(report: Report) -> dict[str, Any]:
    """Return what a checkpoint's card says of its results: `as_json` without the single runs."""
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
    kept = {k: v for k, v in vars(score).items() if k not in _CURVES}
    return {
        **kept,
        "mean": score.mean,
        "speed_up": comparison.speed_up(name),
        "seconds": trials.seconds,
        "runs": _runs_json(trials),
    }


def _runs_json(trials: Kept) -> list[dict[str, Any]]:
    final, lost = final_losses(trials), diverged(trials)
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
