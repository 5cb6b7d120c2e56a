"""``python -m meta_train.drawings``: the pictures of docs/how-rules-work.md: diagrams, and ``steered`` in two runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from l2o.checkpoints.store import load
from l2o.disk import atomic_write, user_path
from l2o.evaluation.plots import COLOURS, LEARNED_COLOUR, frame, new_figure, png
from l2o.ops.orthogonal import polar
from l2o.types import ParamInfo, Params, Run
from meta_train.config.compose import main_guard

STEPS = 500
_DATA, _STATE, _LEARNED = "#546e7a", "#3f51b5", "#d84315"
_HEIGHT = 52


class Box(NamedTuple):
    """A box of a diagram: its upper left corner and width in pixels, its lines of text, its colour."""

    x: int
    y: int
    width: int
    text: tuple[str, ...]
    colour: str


class Arrow(NamedTuple):
    """From one point through others; the head is at the last."""

    points: tuple[tuple[int, int], ...]


STEP: tuple[Box | Arrow, ...] = (
    Box(0, 0, 150, ("gradients",), _DATA),
    Box(190, 0, 150, ("momentum",), _STATE),
    Box(380, 0, 170, ("direction:", "orthogonalised"), _STATE),
    Box(620, 0, 130, ("update",), _DATA),
    Box(190, 110, 150, ("step t of T",), _DATA),
    Box(380, 110, 170, ("schedule:", "warm-up, decay"), _LEARNED),
    Box(0, 220, 150, ("last step",), _DATA),
    Box(190, 220, 150, ("do they agree?",), _STATE),
    Box(380, 220, 170, ("controller:", "longer or shorter"), _LEARNED),
    Arrow(((150, 26), (186, 26))),
    Arrow(((340, 26), (376, 26))),
    Arrow(((550, 26), (616, 26))),
    Arrow(((340, 136), (376, 136))),
    Arrow(((550, 136), (685, 136), (685, 56))),
    Arrow(((150, 246), (186, 246))),
    Arrow(((75, 52), (75, 190), (265, 190), (265, 216))),
    Arrow(((340, 246), (376, 246))),
    Arrow(((550, 246), (720, 246), (720, 56))),
)
NETWORK: tuple[Box | Arrow, ...] = (
    Box(0, 0, 170, ("gradient of an entry",), _DATA),
    Box(0, 70, 170, ("its momenta",), _STATE),
    Box(0, 140, 170, ("its second moments",), _STATE),
    Box(0, 210, 170, ("time in the run",), _DATA),
    Box(250, 105, 170, ("small network θ,", "one for all entries"), _LEARNED),
    Box(500, 50, 130, ("direction d",), _STATE),
    Box(500, 160, 130, ("size m",), _STATE),
    Box(700, 105, 170, ("update", "c · d · exp(c · m)"), _DATA),
    *(Arrow(((170, y), (210, y), (210, 131), (246, 131))) for y in (26, 96, 166, 236)),
    Arrow(((420, 131), (460, 131), (460, 76), (496, 76))),
    Arrow(((420, 131), (460, 131), (460, 186), (496, 186))),
    Arrow(((630, 76), (665, 76), (665, 131), (696, 131))),
    Arrow(((630, 186), (665, 186), (665, 131), (696, 131))),
)
META: tuple[Box | Arrow, ...] = (
    Box(0, 0, 150, ("θ of the rule",), _LEARNED),
    Box(200, 0, 200, ("inner runs: tasks are", "drawn, the rule trains"), _STATE),
    Box(450, 0, 150, ("losses of", "all steps"), _DATA),
    Box(650, 0, 150, ("meta-loss",), _DATA),
    Box(450, 120, 350, ("meta-gradient: backpropagation through the", "steps, or evolution strategies"), _STATE),
    Box(100, 120, 250, ("outer optimizer:", "Adam on θ"), _STATE),
    Arrow(((150, 26), (196, 26))),
    Arrow(((400, 26), (446, 26))),
    Arrow(((600, 26), (646, 26))),
    Arrow(((725, 52), (725, 116))),
    Arrow(((450, 146), (354, 146))),
    Arrow(((100, 146), (75, 146), (75, 56))),
)
DIAGRAMS: dict[str, Sequence[Box | Arrow]] = {"step": STEP, "network": NETWORK, "meta": META}


def diagram(parts: Sequence[Box | Arrow]) -> str:
    """Return an SVG of boxes and arrows, readable on light and dark pages."""
    width = max(part.x + part.width for part in parts if isinstance(part, Box))
    height = max(part.y for part in parts if isinstance(part, Box)) + _HEIGHT
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-4 -4 {width + 8} {height + 8}" font-family="sans-serif">'
    return "\n".join([head, *(_box(p) if isinstance(p, Box) else _arrow(p) for p in parts), "</svg>"]) + "\n"


def _box(box: Box) -> str:
    middle = box.x + box.width // 2
    first = box.y + _HEIGHT // 2 + 5 - 9 * (len(box.text) - 1)
    lines = [f'<text x="{middle}" y="{first + 18 * i}">{line}</text>' for i, line in enumerate(box.text)]
    rectangle = f'<rect x="{box.x}" y="{box.y}" width="{box.width}" height="{_HEIGHT}" rx="6" fill="{box.colour}"/>'
    return f'{rectangle}\n<g fill="#fff" font-size="15" text-anchor="middle">{"".join(lines)}</g>'


def _arrow(arrow: Arrow) -> str:
    (x0, y0), (x, y) = arrow.points[-2:]
    dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
    sides = [(x - 9 * dx + 5 * dy, y - 9 * dy + 5 * dx), (x - 9 * dx - 5 * dy, y - 9 * dy - 5 * dx)]
    line, head = (" ".join(f"{a},{b}" for a, b in points) for points in (arrow.points, [(x, y), *sides]))
    return (
        f'<polyline points="{line}" fill="none" stroke="#888" stroke-width="2"/><polygon points="{head}" fill="#888"/>'
    )


class Trained(NamedTuple):
    """One run: training losses, and by how much the controller had lengthened the step, ``[steps]`` each."""

    losses: list[float]
    factors: list[float]


def train(noise: float, steps: int = STEPS, seed: int = 0) -> Trained:
    """Train a perceptron on scikit-learn's digits by ``steered``, batches of 64; a share of the labels is drawn
    anew."""
    from sklearn.datasets import load_digits

    torch.manual_seed(seed)
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    y = torch.where(torch.rand(len(y)) < noise, torch.randint(10, y.shape), y)
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    params = {name: p.detach() for name, p in network.named_parameters()}
    infos = {name: ParamInfo(tuple(p.shape), "matrix" if p.ndim > 1 else "vector") for name, p in params.items()}
    rule, theta = load("steered")
    state = rule.init(theta, params, infos)

    def loss_of(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(network, params, (x,)), y)

    losses, factors = [], []
    for step in range(steps):
        rows = torch.randint(len(x), (64,))
        grads, loss = grad_and_value(loss_of)(params, x[rows], y[rows])
        run = Run(torch.tensor(step), torch.tensor(steps), loss)
        with torch.no_grad():
            updates, state = rule.update(theta, grads, state, params, infos, run)
        params = {name: p + updates[name] for name, p in params.items()}
        losses.append(loss.item())
        factors.append(float(state.shared["log_step"].exp()))
    return Trained(losses, factors)


def singular_values(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return those of a random matrix with a steep spectrum, over the largest, and of the direction that is made of it,
    ``[64]``."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(64, 64, generator=generator))[0] for _ in range(2))
    matrix = left @ torch.diag(torch.logspace(0, -3, 64)) @ right
    rule, _ = load("steered")
    return torch.linalg.svdvals(matrix), torch.linalg.svdvals(polar(matrix[None], rule.iterations)[0])  # type: ignore[attr-defined]


def schedule(steps: int = STEPS) -> list[float]:
    """Return the factor on the step over a run, without the controller, over its largest."""
    rule, theta = load("steered")
    still = {"log_step": torch.zeros(())}
    sizes = [float(rule.size(theta, still, Run(torch.tensor(t), torch.tensor(steps), None))) for t in range(steps)]  # type: ignore[attr-defined]
    return [size / max(sizes) for size in sizes]


def measured_png(steps: int = STEPS) -> bytes:
    """Draw four panels: schedule, spectrum, controller, losses."""
    figure = new_figure(11.0, 7.4)
    figure.get_layout_engine().set(h_pad=0.12)
    panels = figure.subplots(2, 2).ravel()
    runs = {"true labels": train(0.0, steps), "half of the labels random": train(0.5, steps)}
    _draw(panels[0], {"": schedule(steps)}, "Schedule", "step", "factor on the step")
    before, after = singular_values()
    spectra = {"momentum": before.tolist(), "direction": after.tolist()}
    _draw(panels[1], spectra, "Direction: singular values", "singular value, largest first", "")
    panels[1].set_yscale("log")
    factors = {name: run.factors for name, run in runs.items()}
    _draw(panels[2], factors, "Controller, two runs on digits", "step", "factor on the step")
    losses = {name: run.losses for name, run in runs.items()}
    _draw(panels[3], losses, "Losses of these runs", "step", "training loss of a batch, nats")
    panels[3].set_yscale("log")
    return png(figure)


def _draw(panel: Any, curves: dict[str, list[float]], title: str, xlabel: str, ylabel: str) -> None:
    for (name, values), colour in zip(curves.items(), (LEARNED_COLOUR, *COLOURS), strict=False):
        panel.plot(values, color=colour, linewidth=1.5, label=name)
    panel.set(xlabel=xlabel, ylabel=ylabel)
    panel.set_title(title, fontsize=11, fontweight="bold")
    if len(curves) > 1:
        panel.legend(frameon=False, fontsize=9)
    frame(panel)


def run(arguments: Sequence[str] | None = None) -> None:
    """Draw and write."""
    made = argparse.ArgumentParser(prog="python -m meta_train.drawings", description=(__doc__ or "").partition(": ")[2])
    made.add_argument("--out", default="docs/drawings", metavar="FOLDER", help="where they go (docs/drawings)")
    out: Path = user_path(made.parse_args(arguments).out, "out")
    for name, parts in DIAGRAMS.items():
        atomic_write(out / f"{name}.svg", diagram(parts).encode())
    atomic_write(out / "steered.png", measured_png())


@main_guard
def main() -> None:
    """Run the command."""
    run()


if __name__ == "__main__":
    main()
