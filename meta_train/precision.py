"""``python -m meta_train.precision``: what state in bfloat16 does to curves, memory and time; tables and records.

Needs scikit-learn, for digits, and matplotlib. Some minutes on one core.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from statistics import geometric_mean
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from l2o.bench.cost import step_cost
from l2o.disk import atomic_write
from l2o.evaluation.hazards import Begun, Hazard, begin, begin_family, train
from l2o.evaluation.plots import COLOURS, frame, new_figure, png
from l2o.extras import require
from l2o.optim import LearnedOptimizer, precision
from l2o.rules import Adam
from meta_train.config.compose import composed, main_guard, writing
from meta_train.run.card import commit, hardware
from meta_train.suites import make_settings

Record = dict[str, Any]
SOURCES = ("default", "light", "Adam")
STATES: dict[str, torch.dtype | None] = {
    "float32": None,
    "bfloat16": torch.bfloat16,
    "bfloat16, rounded to the nearest": torch.bfloat16,
}
"""The last is what the plug-in does not do, and why."""
PERCEPTRON, TRANSFORMER = "perceptron on digits", "transformer on characters"
POINTS = (0.1, 0.3, 1.0)
"""Shares of a run at which a table has the loss."""
_WINDOWS = 50
"""Of a curve that is kept: means of losses."""
_DASHES, _WIDTHS = ("-", "--", ":"), (3.0, 1.8, 1.5)
"""Of curves that lie upon each other."""
_FLOOR = 1e-9
"""Of losses, of which float32 has little to say where they are lower."""
_NETWORK = 4 * [(1120, 1120), (1120,)]
"""The shapes on which memory and time are measured."""


def source(name: str) -> Any:
    """Return a checkpoint's name, or Adam at its usual rate."""
    rule = Adam()
    return (rule, rule.init_theta(torch.Generator())) if name == "Adam" else name


def curves(steps: int, seeds: int) -> Iterator[Record]:
    """Run every problem, optimizer and precision of state, each with a record of the mean losses of all its seeds."""
    made = problems(steps)
    for problem, name, state in product(made, SOURCES, STATES):
        begun, length = made[problem]
        found = [_curve(begun(seed), length, name, state) for seed in range(seeds)]
        yield {"table": "curves", "problem": problem, "optimizer": name, "state": state, "losses": found}


def problems(steps: int) -> dict[str, tuple[Callable[[int], Begun], int]]:
    """Return a run of each problem, from its seed, and its steps: the perceptron, whose losses come near 0, has a
    third."""
    setting = make_settings(composed("evaluate", ["evaluate/suite=quick"]))["transformer"]
    return {
        PERCEPTRON: (partial(begin, Hazard("perceptron", steps=steps // 3)), steps // 3),
        TRANSFORMER: (partial(begin_family, setting.family), steps),
    }


def _curve(begun: Begun, steps: int, name: str, state: str) -> list[float]:
    with rounding(state):
        optimizer = LearnedOptimizer(
            begun.params, source(name), total_steps=steps, guard=False, state_dtype=STATES[state]
        )
        losses = train(begun, steps, optimizer, tell=False)
    return torch.tensor(losses).unflatten(0, (_WINDOWS, -1)).mean(1).tolist()


@contextlib.contextmanager
def rounding(state: str) -> Iterator[None]:
    """Use the rounding of one of ``STATES``."""

    def to_nearest(x: Tensor, noise: Tensor) -> Tensor:
        return x.to(torch.bfloat16)

    nearest = patch.object(precision, "_rounded", to_nearest) if "nearest" in state else contextlib.nullcontext()
    with nearest:
        yield


def costs() -> Iterator[Record]:
    """Measure bytes of state a parameter, and time of a step, on a perceptron of 5 million parameters."""
    module = nn.ParameterList(0.02 * torch.randn(shape) for shape in _NETWORK)
    states = list(STATES)[:2]
    makers = {
        (name, state): partial(
            LearnedOptimizer, source=source(name), total_steps=10**6, guard=False, state_dtype=STATES[state]
        )
        for name, state in product(SOURCES, states)
    }
    entries = sum(p.numel() for p in module)
    found = step_cost({f"{name}, {state}": make for (name, state), make in makers.items()}, module)
    for name, state in makers:
        cost = found[f"{name}, {state}"]
        nanoseconds = 1e9 * (cost.cpu_seconds or cost.seconds) / entries
        about = {"state_bytes_per_parameter": cost.state_bytes, "scratch_bytes_per_parameter": cost.scratch_bytes}
        yield {"table": "costs", "optimizer": name, "state": state, "ns_per_parameter": nanoseconds, **about}


def page(records: list[Record], command: str) -> str:
    """Return tables in Markdown."""
    about, found = records[0], [r for r in records if r["table"] == "curves"]
    of = {(r["problem"], r["optimizer"], r["state"]): r["losses"] for r in found}
    seeds = len(found[0]["losses"])
    shares = ", ".join(f"{share:.0%}" for share in POINTS)
    parts = [
        "# State in bfloat16",
        f"`{command}`, {about['date']}, commit {about['commit']}; {about['hardware']}, one thread.",
        f"Training loss at {shares} of the run (means over windows of a {_WINDOWS}th of it, geometric means over "
        f"{seeds} seeds), and the last over that with state in float32, of each seed. Unguarded; everything but the "
        "state between steps is float32. The plug-in rounds at random. To the nearest is what it does not do, and as "
        "good here: it is where gradients fall by much that moments of decay 0.999 would not follow.",
        _curve_table(of),
        "![losses](curves.png)",
        "## Memory and time",
        "Four matrices of 1120² and their vectors; medians, time of the thread. With a guard there are copies of "
        "parameters, too, in their own precision: 4 bytes in float32. Scratch is what a step takes at its peak beyond "
        "what it finds: with state in bfloat16, copies of it in float32. What is held between steps is halved, so that "
        "activations have the room; the peak within a step is not lower.",
        _cost_table([r for r in records if r["table"] == "costs"]),
    ]
    return "\n\n".join(parts) + "\n"


def _curve_table(of: Mapping[tuple[str, str, str], list[list[float]]]) -> str:
    lines = ["| problem | optimizer | state | loss | over float32 |", "|---|---|---|---|---|"]
    for (problem, name, state), losses in of.items():
        at = [geometric_mean(max(own[round(share * _WINDOWS) - 1], _FLOOR) for own in losses) for share in POINTS]
        pairs = zip(losses, of[problem, name, "float32"], strict=True)
        ratios = (
            "" if state == "float32" else ", ".join(f"{own[-1] / max(wide[-1], _FLOOR):.4g}" for own, wide in pairs)
        )
        lines.append(f"| {problem} | {name} | {state} | {', '.join(f'{x:.3g}' for x in at)} | {ratios} |")
    return "\n".join(lines)


def _cost_table(found: list[Record]) -> str:
    names = ("state_bytes_per_parameter", "scratch_bytes_per_parameter", "ns_per_parameter")
    lines = ["| optimizer | state | bytes of state | bytes of scratch | ns |", "|---|---|---|---|---|"]
    for r in found:
        lines.append(
            "| " + " | ".join([r["optimizer"], r["state"], *(f"{r[name] or 0.0:.3g}" for name in names)]) + " |"
        )
    return "\n".join(lines)


def picture(found: list[Record]) -> bytes:
    """Draw a PNG: a panel for each problem and optimizer, a line for each precision, means over seeds."""
    panels = list(dict.fromkeys((r["problem"], r["optimizer"]) for r in found))
    at = torch.linspace(1 / _WINDOWS, 1, _WINDOWS)
    figure = new_figure(3.6 * len(SOURCES), 5.6)
    for axes, (problem, name) in zip(
        figure.subplots(len(panels) // len(SOURCES), len(SOURCES)).ravel(), panels, strict=True
    ):
        for i, state in enumerate(STATES):
            (own,) = [r for r in found if (r["problem"], r["optimizer"], r["state"]) == (problem, name, state)]
            curve = torch.tensor(own["losses"]).log().mean(0).exp()
            axes.plot(at, curve, color=COLOURS[i], label=state, linestyle=_DASHES[i], linewidth=_WIDTHS[i])
        axes.set(yscale="log", xlabel="share of the run", ylabel="training loss")
        axes.set_title(f"{problem}, {name}", fontsize=9)
        frame(axes)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(STATES), frameon=False)
    return png(figure)


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    said = (__doc__ or "").partition(": ")[2]
    made = argparse.ArgumentParser(prog="python -m meta_train.precision", description=said)
    made.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for README.md, results.json, a PNG")
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--steps", type=int, default=900, help=f"of a run, a multiple of {3 * _WINDOWS}")
    return made


@main_guard
def main() -> None:
    """Run the command."""
    require("sklearn", "hydra", "matplotlib")
    torch.set_num_threads(1)
    given = parser().parse_args()
    about = {"hardware": hardware(torch.device("cpu")), "commit": commit(), "date": datetime.date.today().isoformat()}
    records: list[Record] = []
    for record in (*costs(), *curves(given.steps, given.seeds)):
        records.append({**about, **record})
    found = [r for r in records if r["table"] == "curves"]
    command = " ".join(["python -m meta_train.precision", *sys.argv[1:]])
    with writing(f"--out {given.out}"):
        atomic_write(given.out / "results.json", (json.dumps(records, indent=1) + "\n").encode())
        atomic_write(given.out / "README.md", page(records, command).encode())
        atomic_write(given.out / "curves.png", picture(found))


if __name__ == "__main__":
    main()
