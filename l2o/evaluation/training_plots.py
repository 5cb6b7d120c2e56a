"""Pictures of meta-training: meta-loss, held-out loss, norm of the meta-gradient, lost lanes; of one run or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from l2o.evaluation.plots import COLOURS, LEARNED_COLOURS, frame, new_figure, png
from l2o.evaluation.trials import Array

Rows = Sequence[Mapping[str, Any]]
"""The lines of a run's ``metrics.jsonl``: values by name beside ``step``; None for what was not finite."""
_COLOURS = (*LEARNED_COLOURS, *COLOURS)
_SMOOTH = 40
"""Windows of a curve, whose medians are smooth enough to be compared."""


def training_png(runs: Mapping[str, Rows]) -> bytes:
    """Draw a PNG of four panels.  runs: records by name. Raises `ConfigurationError` where matplotlib is missing."""
    figure = new_figure(10.0, 6.4 + 0.25 * len(runs))
    panels = figure.subplots(2, 2).ravel()
    for (name, rows), colour in zip(runs.items(), _cycled(len(runs)), strict=True):
        _meta_loss(panels[0], rows, colour, name)
        _held_out(panels[1], rows, colour, alone=len(runs) == 1)
        _gradient(panels[2], rows, colour)
        _lost(panels[3], rows, colour)
    titles = ("meta-loss", "loss on held-out tasks", "norm of the meta-gradient", "lost lanes and skipped steps")
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title, fontsize=11, fontweight="bold")
        panel.set_xlabel("outer step")
        frame(panel)
    if len(runs) > 1:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return png(figure)


def column(rows: Rows, name: str) -> tuple[Array, Array]:
    """Return steps and values of what was recorded under a name; NaN for what was not finite."""
    found = [(row["step"], row[name]) for row in rows if name in row]
    steps, values = ([pair[i] for pair in found] for i in (0, 1))
    return np.array(steps, dtype=np.float64), np.array([np.nan if v is None else v for v in values], dtype=np.float64)


def _cycled(count: int) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(count)]


def _windows(steps: Array, values: Array) -> tuple[Array, Array]:
    """Medians of windows of equal length; the last may be shorter."""
    size = max(1, -(-len(values) // _SMOOTH))
    starts = range(0, len(values), size)
    with np.errstate(all="ignore"):
        parts = [values[i : i + size][np.isfinite(values[i : i + size])] for i in starts]
    middle = [float(np.median(part)) if len(part) else np.nan for part in parts]
    return np.array([steps[i : i + size].mean() for i in starts]), np.array(middle)


def _plot(panel: Any, rows: Rows, name: str, colour: str, label: str | None = None) -> None:
    """Every value faintly, and medians of windows over them."""
    steps, values = column(rows, name)
    panel.plot(steps, values, color=colour, alpha=0.2, linewidth=0.8)
    panel.plot(*_windows(steps, values), color=colour, linewidth=2.0, label=label)
    _scale(panel)


def _meta_loss(panel: Any, rows: Rows, colour: str, name: str) -> None:
    _plot(panel, rows, "meta_loss", colour, name)


def _held_out(panel: Any, rows: Rows, colour: str, alone: bool) -> None:
    """That of a mixture is relative to tuned Adam's, which is then 1; of one run also validation and families."""
    keys = {key for row in rows for key in row}
    kinds = {"held_out_loss": ("training", "-")} | ({"held_out_valid_loss": ("validation", "--")} if alone else {})
    for key, (label, dashes) in kinds.items():
        panel.plot(*column(rows, key), color=colour, linestyle=dashes, marker="o", markersize=3, label=label)
    families = sorted(key.partition("/")[2] for key in keys if key.startswith("held_out_loss/"))
    if families:
        panel.axhline(1.0, color="#777777", linewidth=1.0)
    elif "adam_loss" in keys:
        panel.axhline(float(column(rows, "adam_loss")[1][-1]), color="#777777", linewidth=1.0, label="tuned Adam")
    for i, family in enumerate(families if alone else ()):
        steps, ours = column(rows, f"held_out_loss/{family}")
        ratio = ours / column(rows, f"adam_loss/{family}")[1]
        panel.plot(steps, ratio, color=COLOURS[i % len(COLOURS)], linewidth=0.9, label=f"{family} / Adam's")
    if alone and keys & {"held_out_loss"}:
        panel.legend(fontsize=7.5, frameon=False)
    _scale(panel)


def _gradient(panel: Any, rows: Rows, colour: str) -> None:
    _plot(panel, rows, "meta_grad_norm", colour)


def _lost(panel: Any, rows: Rows, colour: str) -> None:
    """Lanes masked in each outer step, and where the whole step was skipped."""
    steps, masked = column(rows, "lanes_masked")
    panel.plot(steps, masked, color=colour, linewidth=0.9)
    at, skipped = column(rows, "update_skipped")
    panel.plot(at[skipped > 0], np.zeros(int((skipped > 0).sum())), "x", color=colour)
    panel.set_ylabel("lanes (× skipped)")
    panel.set_ylim(-0.3, max(1.0, panel.get_ylim()[1]))


def _scale(panel: Any) -> None:
    """Logarithmic where all that is drawn is positive."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=np.float64) for line in panel.lines] or [np.ones(1)])
    values = values[np.isfinite(values)]
    panel.set_yscale("log" if len(values) and values.min() > 0 else "linear")
