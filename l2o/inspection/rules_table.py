"""What is known of every rule, computed: replays of recorded runs, meta-gradients, the plug-in, what converts to it."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import l2o.rules
from l2o.estimators import Backprop, Evolution
from l2o.inspection.recording import dot, double
from l2o.interop.pylo import ORIGINALS
from l2o.interop.references import REFERENCES
from l2o.interop.traces import PARAMS_TOLERANCE, STEP_TOLERANCE, read_trace, replay
from l2o.meta import MetaTraining
from l2o.ops.kinds import infos_of
from l2o.optim import LearnedOptimizer
from l2o.tasks import ImageMLP
from l2o.types import Batch, Buffers, Params, Run, Split, TaskData, TaskFamily, Theta, UpdateRule

GRADIENT_TOLERANCE = 1e-4
"""Of a derivative of the meta-loss, relative. What is right is nearer by two orders, unless the network of a rule has a
kink between the ends of a difference."""
OUTER_STEPS = 2
_DIFFERENCE = 1e-6
"""Length of a step of θ for central differences, and deviation of the noise of PES."""
_OFF = 0.01
"""Noise on an initial θ: with biases of exactly 0, entries whose features are all 0 sit on the kink of a ReLU."""
_OUTER_LR = 1e-3
_SHAPES = ((), (5,), (4, 3), (2, 3, 2, 2), (0, 3))
"""Of the parameters that the plug-in updates."""


class Replays(NamedTuple):
    """Largest errors over all tensors of several recorded runs, as `l2o.interop.traces` has them."""

    params: float
    step: float
    runs: int


class Row(NamedTuple):
    """What is known of a rule with the hyperparameters of its defaults.

    source: what it is and who published it, from the head of its module.     size: numbers in θ.
    replays: None where no run was recorded.
    tbptt: distance of the derivative of the meta-loss by backpropagation from that by differences, relative; the larger
        one of two outer steps. ``inf`` where a meta-gradient was 0 or not finite.
    pes: distance of the derivative along the noise of PES, by its first estimate, from that by backpropagation; ``inf``
        as above, in either of two outer steps.
    converts: names of others whose files become checkpoints of this rule.
    plugin: largest difference of a parameter after steps of `LearnedOptimizer` from the same updates by hand.
    """

    rule: str
    source: str
    size: int
    replays: Replays | None
    tbptt: float
    pes: float
    converts: tuple[str, ...]
    plugin: float

    @property
    def passes(self) -> bool:
        """Whether everything is within its tolerance."""
        replayed = not self.replays or (self.replays.params <= PARAMS_TOLERANCE and self.replays.step <= STEP_TOLERANCE)
        learns = self.tbptt <= GRADIENT_TOLERANCE and self.pes <= GRADIENT_TOLERANCE
        return replayed and learns and self.plugin == 0.0


def row(name: str, recorded: Mapping[str, Replays]) -> Row:
    """Return the row of one rule of `l2o.rules`.  recorded: from `replays`."""
    rule = getattr(l2o.rules, name)()
    size = sum(t.numel() for t in rule.init_theta(torch.Generator()).values())
    return Row(
        name,
        source(type(rule)),
        size,
        recorded.get(name),
        backprop_error(rule),
        evolution_error(rule),
        converts(type(rule)),
        plugin_error(rule),
    )


def source(rule: type[UpdateRule]) -> str:
    """Return the documentation of the module that defines ``rule``, as one paragraph."""
    return " ".join((sys.modules[rule.__module__].__doc__ or "").split())


def converts(rule: type[UpdateRule]) -> tuple[str, ...]:
    """Return names of JAX originals, in `REFERENCES`, then of networks of PyLO."""
    references = [name for name, reference in REFERENCES.items() if reference.rule is rule]
    networks = [f"PyLO {network}" for network, original in ORIGINALS.items() if original in references]
    return (*references, *networks)


def replays(folders: Iterable[Path]) -> dict[str, Replays]:
    """Replay all recorded runs in ``folders``, by rule; of files with one name, the last folder's counts.

    Raises `CheckpointError` for a file that is no recorded run.
    """
    found: dict[str, Replays] = {}
    files = {path.name: path for folder in folders for path in sorted(folder.glob("*.npz"))}
    for path in files.values():
        trace = read_trace(path)
        errors = replay(trace)
        name = type(trace.rule).__name__
        before = found.get(name, Replays(0.0, 0.0, 0))
        params = _worst([before.params, *(error.params for error in errors)])
        step = _worst([before.step, *(error.step for error in errors)])
        found[name] = Replays(params, step, before.runs + 1)
    return found


def _worst(errors: Sequence[float]) -> float:
    return math.nan if any(math.isnan(error) for error in errors) else max(errors)


@dataclass(frozen=True)
class Double(TaskFamily):
    """``family`` in float64."""

    family: TaskFamily

    keyed = True

    def sample(self, generator: torch.Generator, lanes: int) -> TaskData:
        return _double(self.family.sample(generator, lanes))

    def init(self, data: TaskData, generator: torch.Generator) -> tuple[Params, Buffers]:
        params, buffers = self.family.init(data, generator)
        return _double(params), _double(buffers)

    def batch(self, data: TaskData, split: Split, generator: torch.Generator) -> Batch:
        return _double(self.family.batch(data, split, generator))

    def loss(self, params: Params, buffers: Buffers, data: TaskData, batch: Batch) -> tuple[Tensor, Buffers]:
        return self.family.loss(params, buffers, data, batch)


def _double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: double(t) for name, t in tensors.items()}


_PROBLEM = Double(ImageMLP(width=3, pool=2, batch_size=8, criterion="mse"))
"""Not the cross-entropy of a softmax, whose gradients of the logits have the mean 0: RNNMLP sees signs of means."""
_EPISODES = {"horizon": 6, "truncation": 3, "stagger": False, "explosion": 1e6}


def backprop_error(rule: UpdateRule) -> float:
    """Measure ``tbptt`` of `Row`: along the meta-gradient and a random direction of half its length, at once."""
    run = _training(Backprop(rule, _PROBLEM, lanes=2, clip=1e9, **_EPISODES))  # type: ignore[arg-type]
    noise = torch.Generator().manual_seed(1)
    worst = 0.0
    for _ in range(OUTER_STEPS):
        before, inner, random = {k: t.clone() for k, t in run.theta.items()}, run.inner, run.generator.get_state()
        grads = _outer_step(run)
        if not grads:
            return math.inf
        direction = _add(_unit(grads), _unit({k: torch.randn(g.shape, generator=noise) for k, g in grads.items()}), 0.5)
        ends = []
        for side in (_DIFFERENCE, -_DIFFERENCE):
            generator = torch.Generator()
            generator.set_state(random)
            _, _, metrics = run.estimator.estimate(_add(before, direction, side), inner, generator)
            ends.append(metrics["meta_loss"])
        expected = float(ends[0] - ends[1]) / (2.0 * _DIFFERENCE)
        worst = max(worst, abs(float(dot(grads, direction)) - expected) / abs(expected))
    return worst


def evolution_error(rule: UpdateRule) -> float:
    """Measure ``pes`` of `Row`: of one pair, whose estimate is its noise times a difference of the meta-loss along
    it."""
    backprop = _training(Backprop(rule, _PROBLEM, lanes=1, clip=1e9, **_EPISODES))  # type: ignore[arg-type]
    run = _training(Evolution(rule, _PROBLEM, lanes=2, sigma=_DIFFERENCE, **_EPISODES))  # type: ignore[arg-type]
    exact, estimate = _outer_step(backprop), _outer_step(run)  # from the same seed: the same task and batches
    noise = {name: t[0] for name, t in run.inner.noise.items()}
    if not exact or not estimate or not _outer_step(run):
        return math.inf
    along = float(dot(estimate, noise) / dot(noise, noise)) * _DIFFERENCE**2
    expected = float(dot(exact, noise))
    return abs(along - expected) / abs(expected)


def _training(estimator: Backprop | Evolution) -> MetaTraining:
    generator = torch.Generator().manual_seed(0)
    theta = _double(estimator.rule.init_theta(generator))
    theta = {k: t + _OFF * torch.randn(t.shape, generator=generator, dtype=t.dtype) for k, t in theta.items()}
    sgd = partial(torch.optim.SGD, lr=_OUTER_LR * (isinstance(estimator, Backprop)))
    return MetaTraining(estimator, theta, sgd, torch.Generator().manual_seed(0))


def _outer_step(run: MetaTraining) -> Theta:
    """The meta-gradient; nothing if it is 0, or not finite in every tensor, or a run was masked."""
    metrics = run.outer_step()
    if metrics["lanes_masked"] or metrics["update_skipped"] or not metrics["meta_grad_norm"] > 0.0:
        return {}
    return {name: t.grad.clone() for name, t in run.theta.items() if t.grad is not None}


def _unit(tree: Theta) -> Theta:
    norm = dot(tree, tree).sqrt()
    return {name: t / norm for name, t in tree.items()}


def _add(a: Theta, b: Theta, factor: float) -> Theta:
    return {name: t + factor * b[name] for name, t in a.items()}


def plugin_error(rule: UpdateRule, steps: int = 3) -> float:
    """Measure ``plugin`` of `Row`, in float32, over ``steps`` steps on parameters of several shapes."""
    generator = torch.Generator().manual_seed(0)
    theta, params = rule.init_theta(generator), _draw(generator)
    modules = [torch.nn.Parameter(p.clone()) for p in params.values()]
    optimizer = LearnedOptimizer(modules, (rule, theta), total_steps=steps)
    infos = infos_of(params)
    state = rule.init(theta, params, infos)
    for step in range(steps):
        grads, loss = _draw(generator), torch.tensor(1.0 / (1 + step))
        for p, g in zip(modules, grads.values(), strict=True):
            p.grad = g.clone()
        optimizer.step(partial(torch.clone, loss))
        run = Run(torch.tensor(step), torch.tensor(steps), loss if rule.needs_loss else None)
        with torch.no_grad():
            updates, state = rule.update(theta, grads, state, params, infos, run)
        params = _add(params, updates, 1.0)
    differences = [(p - q).abs() for p, q in zip(modules, params.values(), strict=True) if p.numel()]
    return max(float(d.detach().max()) for d in differences)


def _draw(generator: torch.Generator) -> Params:
    return {str(i): torch.randn(shape, generator=generator) for i, shape in enumerate(_SHAPES)}


_COLUMNS = ("rule", "what it is", "size of θ", "replay", "TBPTT", "PES", "converts", "plug-in")


def markdown(rows: Sequence[Row]) -> str:
    """Return the table, a line each."""
    lines = [_COLUMNS, ("---",) * len(_COLUMNS), *map(cells, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cells(row: Row) -> tuple[str, ...]:
    """Return what is printed of a row."""
    linked = re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", row.source)
    replayed = "not recorded"
    if row.replays:
        runs = f"{row.replays.runs} run{'s' * (row.replays.runs > 1)}"
        replayed = f"{row.replays.params:.0e} / {row.replays.step:.0e} ({runs})"
    return (
        f"`{row.rule}`",
        linked.replace("|", "\\|"),
        f"{row.size:,}",
        replayed,
        _verdict(row.tbptt),
        _verdict(row.pes),
        ", ".join(f"`{name}`" for name in row.converts) or "-",
        "equal" if row.plugin == 0.0 else f"no ({row.plugin:.0e})",
    )


def _verdict(error: float) -> str:
    return f"{'yes' if error <= GRADIENT_TOLERANCE else 'no'} ({error:.0e})"
