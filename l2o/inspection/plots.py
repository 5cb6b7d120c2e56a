"""The picture of an `Inspection`: six panels."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from l2o.evaluation.plots import COLOURS, LEARNED_COLOUR, frame, new_figure, png
from l2o.inspection.experiments import ADAM_LR, FRACTIONS, MEMORY, SPIKES, Inspection
from l2o.inspection.findings import decay_rate

_MOST_BARS = 16
_MOST_DOTS = 2000


def inspection_png(inspection: Inspection, title: str) -> bytes:
    """Draw a PNG of all that was measured. Raises `ConfigurationError` where matplotlib is missing."""
    figure = new_figure(16.0, 9.0)
    figure.suptitle(title, fontsize=14, fontweight="bold")
    draw = (_by_past, _by_age, _rates, _spikes, _rest, _sensitivity)
    for panel, paint in zip(figure.subplots(2, 3).ravel(), draw, strict=True):
        paint(panel, inspection)
        frame(panel)
    return png(figure)


def _headed(panel: Any, title: str, subtitle: str, **labels: Any) -> None:
    panel.set_title(f"{title}\n", fontsize=11, fontweight="bold")
    panel.text(0.5, 1.03, subtitle, transform=panel.transAxes, ha="center", fontsize=8.5, color="#555555")
    panel.set(**labels)


def _by_past(panel: Any, inspection: Inspection) -> None:
    response = inspection.response
    names = ("equal to the present one", "zero", "opposite")
    for name, colour, curve in zip(names, COLOURS, response.by_past, strict=False):
        panel.plot(response.gradients, curve, color=colour, linewidth=1.8, label=name)
    panel.axhline(0.0, color="#999999", linewidth=0.8)
    panel.legend(title=f"its last {MEMORY} gradients", frameon=False, fontsize=9, title_fontsize=9)
    where = f"one entry of {response.tensor}, step {inspection.middle} of {len(inspection.run.losses)}"
    _headed(panel, "Momentum", where, xlabel="gradient / rms of the tensor's", ylabel="update")


def _by_age(panel: Any, inspection: Inspection) -> None:
    from matplotlib import colormaps

    response = inspection.response
    colours = colormaps["viridis"](np.linspace(0.0, 0.85, len(FRACTIONS)))
    for fraction, colour, curve in zip(FRACTIONS, colours, response.by_age, strict=True):
        panel.plot(response.gradients, curve, color=colour, linewidth=1.8, label=f"{fraction:.0%} of the run")
    panel.axhline(0.0, color="#999999", linewidth=0.8)
    panel.legend(title="the clock says", frameon=False, fontsize=9, title_fontsize=9)
    where = "the same entry after a past of zeros; the clock alone is changed"
    _headed(panel, "Age", where, xlabel="gradient / rms of the tensor's", ylabel="update")


def _rates(panel: Any, inspection: Inspection) -> None:
    adam = f"Adam, lr {ADAM_LR:g}"
    pairs = ((inspection.run, LEARNED_COLOUR, "this rule"), (inspection.adam, COLOURS[0], adam))
    for run, colour, name in pairs:
        steps = np.arange(len(run.rates))
        panel.plot(steps, _positive(run.rates), color=colour, linewidth=1.8, label=f"{name}: rms(u)/rms(g)")
        panel.plot(steps, _positive(run.descent), color=colour, linewidth=1.0, ls=":", label=f"{name}: −⟨u,g⟩/⟨g,g⟩")
    panel.set_yscale("log")
    low, high = panel.get_ylim()
    panel.set_ylim(low, high * (high / low) ** 0.3)  # room for the legend
    panel.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", columnspacing=1.0, handlelength=1.5)
    losses = inspection.run.losses
    first, last = (float(loss.mean()) for loss in losses[[0, -1]])
    where = f"{losses.shape[1]} tasks, loss {first:.2g} to {last:.2g}; gaps of the dotted lines: the update goes uphill"
    _headed(panel, "Effective learning rate", where, xlabel="step", ylabel="learning rate")


def _positive(values: Tensor) -> Any:
    """What a logarithmic axis can show."""
    array = values.cpu().numpy()
    return np.where(array > 0.0, array, np.nan)


def _spikes(panel: Any, inspection: Inspection) -> None:
    panel.plot(SPIKES, _positive(inspection.spikes), "o-", color=LEARNED_COLOUR, linewidth=1.8, label="this rule")
    panel.plot(SPIKES, SPIKES, color="#999999", linewidth=1.0, linestyle="--", label="a linear rule")
    panel.legend(frameon=False, fontsize=9)
    labels = {"xlabel": "factor on the whole gradient", "ylabel": "rms of update / ordinary", "xscale": "log"}
    _headed(panel, "One spike (clipping)", f"step {inspection.middle}", yscale="log", **labels)


def _rest(panel: Any, inspection: Inspection) -> None:
    params, update = (x.cpu().numpy() for x in inspection.rest)
    every = max(len(params) // _MOST_DOTS, 1)
    panel.plot(params[::every], update[::every], ".", color=LEARNED_COLOUR, markersize=3, alpha=0.6)
    rate, correlation = decay_rate(inspection)
    ends = np.array([params.min(), params.max()])
    fit = f"{0.0 - rate:.2g} p; correlation of −u with p: {correlation:.2f}"
    panel.plot(ends, -rate * ends, color="#333333", linewidth=1.2, label=fit)
    panel.legend(frameon=False, fontsize=9)
    where = f"after {MEMORY} gradients of zero; the part that changes sign with p"
    _headed(panel, "At rest (decay)", where, xlabel="parameter p", ylabel="update")


def _sensitivity(panel: Any, inspection: Inspection) -> None:
    ranked = sorted(inspection.sensitivity.items(), key=lambda item: -item[1])[:_MOST_BARS]
    names, values = zip(*reversed(ranked), strict=True)
    panel.barh(names, values, color=COLOURS[0])
    panel.set_axisbelow(True)
    panel.tick_params(axis="y", labelsize=8.5)
    label = "relative change of the update over that of the input"
    left_out = len(inspection.sensitivity) - len(ranked)
    where = "slots as they were before the update" + (f"; {left_out} weaker ones left out" if left_out else "")
    _headed(panel, "Sensitivity to each input", where, xlabel=label)
