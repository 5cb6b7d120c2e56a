"""The picture of a report: training loss over steps, one panel a setting."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from l2o.evaluation.compare import LEARNED, Comparison, is_learned
from l2o.evaluation.scores import Score
from l2o.evaluation.trials import Array
from l2o.extras import require

LEARNED_COLOUR = "#D55E00"
LEARNED_COLOURS = (LEARNED_COLOUR, "#882255", "#332288", "#117733")
"""Of several learned optimizers, from Tol's palette; then from the first again."""
# The rest of Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#666666")
_DASHES = ("-", "--", "-.")
_COLUMNS = 3
_FLOOR = 1e-9
"""Losses under it, exact zeros among them, are drawn here: float32 has little to say of them."""
_MANY_SEEDS = 10
"""Beyond these a band of quartiles says more than one of the range, which grows with the number of seeds."""


class _View(NamedTuple):
    """scale: of the axis of losses.  floor: what is lower is drawn there.  ceiling: top of the panel.  off: over it."""

    scale: str
    floor: float
    ceiling: float
    off: float


def curves_png(comparisons: Sequence[Comparison], loss_label: str = "training loss") -> bytes:
    """A PNG of the smoothed training losses: median over seeds, and a band of their range or quartiles.

    Raises `ConfigurationError` where matplotlib is missing.
    """
    require("matplotlib")
    columns = 2 if len(comparisons) == 4 else min(_COLUMNS, len(comparisons))
    rows = math.ceil(len(comparisons) / columns)
    figure = new_figure(max(5.0 * columns, 7.0), 4.0 * rows + 0.5)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, comparison in zip(panels, comparisons, strict=False):
        _draw(panel, comparison, loss_label)
    for panel in panels[len(comparisons) :]:
        panel.remove()
    handles, labels = panels[0].get_legend_handles_labels()
    # The learned optimizers are drawn last, over the others, the first one on top, and named first.
    learned = sum(map(is_learned, comparisons[0].scores))
    handles, labels = (x[: -learned - 1 : -1] + x[:-learned] for x in (handles, labels))
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), max(2, columns)), frameon=False)
    return png(figure)


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches. Raises `ConfigurationError` where matplotlib is missing."""
    require("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Any) -> bytes:
    """The figure as a PNG file."""
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def frame(panel: Any) -> None:
    """A light grid, and no lines at the top and on the right."""
    panel.grid(which="major", color="#e0e0e0", linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)


def _draw(panel: Any, comparison: Comparison, loss_label: str) -> None:
    setting, scores = comparison.setting, comparison.scores
    view = _view([s.curve for s in scores.values()])
    styles = [(c, d) for d in _DASHES for c in COLOURS]
    usual = [s for name, s in scores.items() if not is_learned(name)]
    for (colour, dashes), s in zip(styles, usual, strict=False):
        _line(panel, s, view, color=colour, linestyle=dashes, linewidth=1.3, zorder=2)
    learned = [(name, s) for name, s in scores.items() if is_learned(name)]
    for (name, s), colour in reversed(list(zip(learned, itertools.cycle(LEARNED_COLOURS)))):
        _line(panel, s, view, color=colour, linewidth=2.6 if name == LEARNED else 1.9, zorder=3)
    panel.set(xlabel="inner training step", ylabel=loss_label, yscale=view.scale, xlim=(0, setting.steps))
    panel.set_ylim(top=view.ceiling)
    spread = "quartiles" if setting.seeds > _MANY_SEEDS else "range"
    panel.set_title(f"{setting.name}\n", fontsize=11, fontweight="bold")
    subtitle = f"{setting.steps:,} steps; line and band: median and {spread} of {setting.seeds} seeds"
    panel.text(0.5, 1.03, subtitle, transform=panel.transAxes, ha="center", fontsize=8.5, color="#555555")
    frame(panel)


def _view(curves: Sequence[Array]) -> _View:
    """Logarithmic up to three times the first loss; of losses that pass zero, or begin there, linear.

    Then from the lowest to as far above the first, or, where the first is the lowest, to the highest.
    """
    losses = np.concatenate([curve.ravel() for curve in curves])
    first, finite = np.concatenate([curve[0] for curve in curves]), losses[np.isfinite(losses)]
    top = max(first[np.isfinite(first)], default=1.0)
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
    if low >= 0 and top > 0:
        return _View("log", _FLOOR, 3.0 * top, 30.0 * top)
    ceiling = 2.0 * top - low if top > low else max(high, low + 1.0)
    return _View("linear", low, ceiling, ceiling + 10.0 * (ceiling - low))


def _line(panel: Any, score: Score, view: _View, **style: Any) -> None:
    low, middle, high = _band(score.curve, view)
    steps = np.arange(1, len(middle) + 1)
    tried = "untuned" if score.rate is None else f"best of {score.trials} learning rates"
    panel.plot(steps, middle, label=f"{score.label} ({tried})", **style)
    panel.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0, zorder=style["zorder"] - 1)


def _band(curve: Array, view: _View) -> tuple[Array, Array, Array]:
    """Lower edge, median and upper edge over seeds; a loss that is not finite lies off the top of the panel."""
    shown = np.clip(np.where(np.isfinite(curve), curve, np.inf), view.floor, view.off)
    edge = 0.25 if curve.shape[1] > _MANY_SEEDS else 0.0
    low, middle, high = np.quantile(shown, [edge, 0.5, 1.0 - edge], axis=1)
    return low, middle, high
