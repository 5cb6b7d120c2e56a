"""The pictures of a report: losses over steps, one panel a setting, and performance profiles."""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from l2o.evaluation.aggregate import share_within
from l2o.evaluation.baselines import BASELINES
from l2o.evaluation.compare import Comparison
from l2o.evaluation.scores import Score
from l2o.evaluation.trials import Array
from l2o.evaluation.verdicts import SHOWN
from l2o.extras import require

LEARNED_COLOUR = "#D55E00"
LEARNED_COLOURS = (LEARNED_COLOUR, "#882255", "#332288", "#117733", "#AA4499", "#661100")
"""Of several judged optimizers, from Tol's palette; then from the first again."""
# The rest of Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#777777")
_DASHES = ("-", "--", "-.", ":")
_PLACES = [*SHOWN, *(name for name in BASELINES if name not in SHOWN)]
_FEW = 8
"""Up to so many baselines are all drawn; of more, those of ``SHOWN``."""
_COLUMNS = 3
_ROWS, _COARSE = 4, 80
"""Pictures of more rows have so many dots an inch: the page of the report has each panel at any size."""
_FLOOR = 1e-9
"""Losses under it, exact zeros among them, are drawn here: float32 has little to say of them."""
_MANY_SEEDS = 10
"""Beyond these a band of quartiles says more than one of the range, which grows with the number of seeds."""
_INK = "#123457"
"""Of text and axes while an SVG is drawn; it becomes ``currentColor``, which a page sets for light and dark."""


class _View(NamedTuple):
    """scale: of the axis of losses.  floor: what is lower is drawn there.  ceiling: top of the panel.  off: over it."""

    scale: str
    floor: float
    ceiling: float
    off: float


Style = dict[str, Any]
"""Of a line: colour, dashes, width."""


def styles(comparison: Comparison) -> dict[str, Style]:
    """Say how each optimizer that is drawn is drawn, the last on top; a baseline looks the same in every picture."""
    ours = comparison.judged
    usual = [name for name in comparison.scores if name not in ours]
    drawn = [name for name in usual if len(usual) <= _FEW or name in SHOWN]
    found = {name: baseline_style(name) for name in drawn}
    for i, name in reversed(list(enumerate(ours))):
        width = 1.9 if i else 2.6
        found[name] = {"color": LEARNED_COLOURS[i % len(LEARNED_COLOURS)], "linewidth": width, "zorder": 3}
    return found


def baseline_style(name: str) -> Style:
    """Choose by its place among all baselines; of any other, by its name."""
    place = _PLACES.index(name) if name in _PLACES else int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
    dashes = _DASHES[place // len(COLOURS) % len(_DASHES)]
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": dashes, "linewidth": 1.3, "zorder": 2}


def curves_png(comparisons: Sequence[Comparison], loss_label: str = "training loss") -> bytes:
    """Draw a PNG of the smoothed training losses: mean over seeds, as scores have it, and their range or quartiles.

    Raises `ConfigurationError` where matplotlib is missing.
    """
    require("matplotlib")
    columns = 2 if len(comparisons) == 4 else min(_COLUMNS, len(comparisons))
    rows = math.ceil(len(comparisons) / columns)
    figure = new_figure(max(5.0 * columns, 7.0), 4.0 * rows + 0.5)
    if rows > _ROWS:
        figure.set_dpi(_COARSE)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, comparison in zip(panels, comparisons, strict=False):
        draw_training(panel, comparison, loss_label)
    for panel in panels[len(comparisons) :]:
        panel.remove()
    _legend(figure, panels[0], max(2, columns), len(comparisons[0].judged))
    return png(figure)


def _legend(figure: Any, panel: Any, columns: int, judged: int) -> None:
    """The judged optimizers, which are drawn last, are named first."""
    handles, labels = panel.get_legend_handles_labels()
    handles, labels = (x[: -judged - 1 : -1] + x[:-judged] for x in (handles, labels))
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), columns), frameon=False)


def setting_svg(comparison: Comparison, loss_label: str = "training loss") -> str:
    """Draw an SVG of the training and the validation losses in one setting, without a legend."""
    with _ink():
        figure = new_figure(9.0, 3.4)
        left, right = figure.subplots(1, 2)
        draw_training(left, comparison, loss_label)
        draw_validation(right, comparison)
        return svg(figure)


def profile_picture(profiles: Mapping[str, Array], comparison: Comparison, make: Callable[[Any], Any]) -> Any:
    """Return the share of tasks on which each optimizer is at the target within τ times the best one's steps.

    make: `png` or `svg`.
    """
    with _ink() if make is svg else _plain():
        figure = new_figure(9.0, 4.5 if make is png else 3.4)
        panel = figure.subplots()
        factors = np.geomspace(1.0, 16.0, 161)
        for name, style in styles(comparison).items():
            shares = [share_within(profiles[name], factor) for factor in factors]
            panel.step(factors, shares, where="post", label=comparison.scores[name].label, **style)
        panel.set(xscale="log", xlabel="τ, times the steps of the best optimizer", ylabel="share of tasks")
        panel.set(ylim=(-0.02, 1.02), xlim=(1, 16), xticks=[1, 2, 4, 8, 16], xticklabels=["1", "2", "4", "8", "16"])
        panel.minorticks_off()
        frame(panel)
        if make is png:  # a page has a key of its own
            _legend(figure, panel, 3, len(comparison.judged))
        return make(figure)


@contextmanager
def _plain() -> Iterator[None]:
    yield


@contextmanager
def _ink() -> Iterator[None]:
    require("matplotlib")
    import matplotlib

    of_ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "l2o", **dict.fromkeys(of_ink, _INK)}
    with matplotlib.rc_context(settings):
        yield


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure of so many inches. Raises `ConfigurationError` where matplotlib is missing."""
    require("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Any) -> bytes:
    """Return the figure as a PNG file."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=figure.dpi)  # as it is now, not as it was made
    return out.getvalue()


def svg(figure: Any) -> str:
    """Return the figure as an ``<svg>`` element without a background, for a page of either colour scheme."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue().replace(_INK, "currentColor")
    # A tenth of a point is enough, and half the size.
    return re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d)\d+", r"\1", path[0]), text[text.index("<svg") :])


def frame(panel: Any) -> None:
    """Draw a light grid, and no lines at the top and on the right."""
    panel.grid(which="major", color="#999999", alpha=0.3, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)


def draw_training(panel: Any, comparison: Comparison, loss_label: str) -> None:
    """Draw the smoothed training losses of a setting."""
    setting, scores, drawn = comparison.setting, comparison.scores, styles(comparison)
    view = _view([scores[name].curve for name in drawn])
    for name, style in drawn.items():
        _line(panel, scores[name].steps, scores[name].curve, view, scores[name], style)
    panel.set(xlabel="inner training step", ylabel=loss_label, yscale=view.scale, xlim=(0, setting.steps))
    panel.set_ylim(top=view.ceiling)
    spread = "quartiles" if setting.seeds > _MANY_SEEDS else "range"
    _title(panel, setting.name, f"{setting.steps:,} steps; line and band: mean and {spread} of {setting.seeds} seeds")


def draw_validation(panel: Any, comparison: Comparison) -> None:
    """Draw the losses on held-out data in the course of the runs."""
    scores, drawn = comparison.scores, styles(comparison)
    view = _view([scores[name].valid_curve for name in drawn])
    for name, style in drawn.items():
        _line(panel, scores[name].valid_steps, scores[name].valid_curve, view, scores[name], style)
    panel.set(xlabel="inner training step", ylabel="validation loss", yscale=view.scale)
    panel.set(xlim=(0, comparison.setting.steps))
    panel.set_ylim(top=view.ceiling)
    _title(panel, "validation", "loss on held-out data")


def _title(panel: Any, title: str, subtitle: str) -> None:
    panel.set_title(f"{title}\n", fontsize=11, fontweight="bold")
    panel.text(0.5, 1.03, subtitle, transform=panel.transAxes, ha="center", fontsize=8.5, alpha=0.75)
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


def _line(panel: Any, steps: Sequence[int], curve: Array, view: _View, score: Score, style: Style) -> None:
    low, middle, high = _band(curve, view)
    tried = "untuned" if score.rate is None else f"best of {score.trials} learning rates"
    panel.plot(steps, middle, label=f"{score.label} ({tried})", **style)
    panel.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0, zorder=style["zorder"] - 1)


def _band(curve: Array, view: _View) -> tuple[Array, Array, Array]:
    """Lower edge, mean and upper edge over seeds; a loss that is not finite lies off the top of the panel."""
    losses = np.where(np.isfinite(curve), curve, np.inf)
    edge = 0.25 if curve.shape[1] > _MANY_SEEDS else 0.0
    low, high = np.quantile(np.clip(losses, view.floor, view.off), [edge, 1.0 - edge], axis=1)
    return low, np.clip(losses.mean(1), view.floor, view.off), high
