"""What `make gpu` measures: the engine by lanes, a step of optimizers by size, a minute of the main job."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.utils._pytree import tree_map

from l2o import fused
from l2o.bench.checks import COMPILERS, Figures, distance
from l2o.bench.cost import plug_in, step_cost
from l2o.bench.engine import FAMILY, HORIZON, RULES, Engine, measure, seconds_a_call
from l2o.bench.memory import peak_memory_mb
from l2o.bench.steps import Shapes, checked_shapes, measure_steps
from l2o.estimators import Backprop
from l2o.evaluation.scores import score
from l2o.evaluation.trials import Setting, run_learned
from l2o.fused import mlp
from l2o.meta import MetaTraining
from l2o.ops import coordinatewise, networks
from l2o.optim import LearnedOptimizer
from l2o.rules import MLP
from l2o.tasks import ImageMLP
from l2o.types import InnerState, OptState, Theta, UpdateRule, Updates
from l2o.unroll import expand_theta, inner_step, sample_runs


class LeftOut(Exception):
    """Why something is not measured, which is no fault."""


_SAME = 1e-6
"""How far apart steps with and without a graph may be."""
Advance = Callable[[], InnerState]
"""One inner step of all lanes: the state after it."""


def engine(setup: str, lanes: int, seconds: float, device: torch.device) -> Figures:
    """Return what `measure` does, and the memory of the device."""
    figures = measure(Engine(setup, "mlp", lanes), seconds, str(device), time.time())
    return {**figures, "peak_mb": peak_mb(device)}


def peak_mb(device: torch.device) -> float:
    """Return the peak of the device since it was last reset, in MB (10^6 bytes); of the process, where that is the
    CPU."""
    return torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else peak_memory_mb()


def inner_steps(variant: str, lanes: int, seconds: float, device: torch.device) -> Figures:
    """Measure inner steps a second on one batch, without derivatives with respect to θ, in one of ``VARIANTS``.

    error: of the parameters after five steps, beside those of ``torch``.
    """
    with torch.no_grad():
        want, _ = _five_steps("torch", lanes, device)
        got, advance = _five_steps(variant, lanes, device)
        error = distance(got.params, want.params)
        assert error < 1e-3, f"{error:.2g} apart from torch's operations after five steps"
        with _kernels(variant):
            rate = lanes / seconds_a_call(advance, seconds, str(device))
    return {"variant": variant, "lanes": lanes, "steps_per_second": rate, "error": error, "peak_mb": peak_mb(device)}


def _five_steps(variant: str, lanes: int, device: torch.device) -> tuple[InnerState, Advance]:
    with _kernels(variant):
        advance = VARIANTS[variant](lanes, device)
        states = [advance() for _ in range(5)]
    return tree_map(torch.clone, states[-1]), advance


def without_kernels(work: Callable[[], Figures]) -> Figures:
    """Do ``work`` in torch's operations alone."""
    with patch.dict(os.environ, L2O_KERNELS="0"):
        return work()


def with_large_blocks(work: Callable[[], Figures]) -> Figures:
    """Do ``work`` with 2^20 entries at once through the networks of rules, 16 times as many as on a CPU."""
    with patch.object(networks, "BLOCK", 1 << 20), patch.object(coordinatewise, "BLOCK", 1 << 20):
        return work()


def _kernels(variant: str) -> Any:
    return patch.dict(os.environ, L2O_KERNELS="1" if variant == "kernel" else "0")


def _step(rule: UpdateRule, lanes: int, device: torch.device) -> tuple[Callable[[InnerState], InnerState], InnerState]:
    generator = torch.Generator(device).manual_seed(0)
    theta = expand_theta(rule.init_theta(generator), lanes)
    state = sample_runs(rule, theta, FAMILY, torch.full((lanes,), HORIZON, device=device), generator)
    batch = FAMILY.batch(state.data, "train", generator)
    return lambda state: inner_step(rule, theta, FAMILY, state, batch)[0], state


def _eager(rule: UpdateRule, lanes: int, device: torch.device) -> Advance:
    step, state = _step(rule, lanes, device)

    def advance() -> InnerState:
        nonlocal state
        state = step(state)
        return state

    return advance


def _graph(rule: UpdateRule, lanes: int, device: torch.device) -> Advance:
    """A step as one CUDA graph, which writes the new state over the old."""
    if device.type != "cuda":
        raise LeftOut("CUDA graphs are of CUDA")
    step, state = _step(rule, lanes, device)
    state = tree_map(torch.clone, state)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is allocated or copied once must not be part of the graph
        for _ in range(3):
            step(state)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tree_map(lambda old, new: old.copy_(new), state, step(state))

    def advance() -> InnerState:
        graph.replay()
        return state

    return advance


class Compiled(MLP):
    """The update of all lanes, compiled in the place of a kernel."""


@cache
def _compiled(rule: MLP, device: str) -> Any:
    return torch.compile(partial(mlp.reference, rule), backend=COMPILERS[device])


def _compiled_update(rule: Compiled, theta: Theta, *arguments: Any) -> tuple[Updates, OptState]:
    found: tuple[Updates, OptState] = _compiled(rule, theta["b0"].device.type)(theta, *arguments[:-1])
    return found


fused.UPDATES[Compiled] = _compiled_update


VARIANTS: dict[str, Callable[[int, torch.device], Advance]] = {
    "torch": partial(_eager, RULES["mlp"]),
    "graph": partial(_graph, RULES["mlp"]),
    "compiled": partial(_eager, Compiled(time="steps")),
    "kernel": partial(_eager, RULES["mlp"]),
}
"""Ways to take the same inner step: torch's operations, those as a CUDA graph, compiled, and by a kernel."""


def step(source: tuple[UpdateRule, Theta], network: str | Shapes, device: torch.device) -> Figures:
    """Measure a step of a rule on one of `NETWORKS`, beside those of torch.  beside: nanoseconds of theirs, a
    parameter."""
    own, *others = measure_steps({"own": source}, network, 0.0, str(device))
    beside = {other["rule"]: other["wall_ns_per_parameter"] for other in others}
    return {**own, "ms": own["wall_ns_per_parameter"] * own["parameters"] / 1e6, "beside": beside}


def graph_step(source: tuple[UpdateRule, Theta], network: str | Shapes, device: torch.device) -> Figures:
    """Measure a step as a CUDA graph beside the same without: milliseconds, and how far parameters are apart after 27.

    Raises AssertionError where that is more than a millionth of the largest.
    """
    if device.type != "cuda":
        raise LeftOut("CUDA graphs are of CUDA")
    made: dict[str, list[nn.Parameter]] = {}
    generator = torch.Generator(device).manual_seed(0)
    shapes = checked_shapes("network", network)
    module = nn.ParameterList(0.02 * torch.randn(*s, generator=generator, device=device) for s in shapes)

    def make(name: str, params: list[nn.Parameter]) -> LearnedOptimizer:
        made[name], optimizer = params, plug_in(*source, params)
        optimizer.cuda_graph = name == "graph"
        return optimizer

    costs = step_cost({name: partial(make, name) for name in ("eager", "graph")}, module, rounds=25)
    error = distance(made["graph"], made["eager"])
    assert error <= _SAME, f"{error:.2g} apart after the same steps, expected at most {_SAME:g}"
    own, entries = costs["graph"], sum(p.numel() for p in module)
    scratch = None if own.scratch_bytes is None else own.scratch_bytes * entries
    return {"ms": 1e3 * own.seconds, "eager_ms": 1e3 * costs["eager"].seconds, "error": error, "scratch_bytes": scratch}


def main_job(seconds: float, device: torch.device) -> Figures:
    """Meta-trains the rule of the README's script; held-out losses are of images and tasks that it never saw."""
    generator = torch.Generator(device).manual_seed(0)
    rule, lanes = MLP(), 16
    estimator = Backprop(
        rule, ImageMLP(dataset="digits", width=32), lanes=lanes, horizon=200, truncation=20, meta_loss="log"
    )
    training = MetaTraining(
        estimator, rule.init_theta(generator), lambda theta: torch.optim.Adam(theta, lr=1e-3), generator
    )
    setting = Setting("digits", ImageMLP(dataset="digits", half="meta_test", width=32), steps=200)

    def held_out() -> float:
        return float(score(run_learned(rule, training.theta, setting, device), setting.smoothing).mean)

    before, inner, began = held_out(), 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        inner += int(training.outer_step()["inner_steps"])
    rate = inner / (time.perf_counter() - began)
    figures = {"outer_steps": training.step, "inner_steps": inner, "steps_per_second": rate, "lanes": lanes}
    return {**figures, "held_out_loss_before": before, "held_out_loss_after": held_out(), "peak_mb": peak_mb(device)}
