"""How fast the engine meta-trains: steps a second, memory, where the time goes, beside a plain loop as the yardstick.

The setup is fixed: an image MLP of 32 units on 8 × 8 digits, batches of 128, truncations of 20 steps, whole outer steps
(draws, inner gradients, rule, meta-gradient, Adam on θ). A step is one of one lane; of PES, two lanes are a task.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from l2o.bench.cost import wait
from l2o.bench.memory import peak_memory_mb
from l2o.checks import check_int, lookup
from l2o.distributed import all_sum, ranks
from l2o.estimators import Backprop, Evolution
from l2o.meta import MetaTraining
from l2o.ops.kinds import infos_of
from l2o.rules import MLP, AdafacMLP
from l2o.tasks import ImageMLP
from l2o.types import Batch, InnerState, MetaGradient, OptState, Run, Theta, UpdateRule
from l2o.unroll import expand_theta, gradients, unroll, updates

RULES: dict[str, MLP | AdafacMLP] = {
    "mlp": MLP(time="steps"),
    # 30 inputs: gradient, parameter, 17 momenta and 11 of time, as many as Celo2's network has.
    "small": MLP(time="steps", hidden=(8, 8), decays=tuple(1.0 - 0.5**k for k in range(1, 18))),
    "adafac": AdafacMLP(),
    "adafac32": AdafacMLP(hidden=(32, 32)),
}
"""The rules that are measured, by name; their networks are 19-32-32-2, 30-8-8-2, 39-4-4-2 and 39-32-32-2."""

FAMILY = ImageMLP(dataset="digits", width=32, batch_size=128)
HORIZON, TRUNCATION = 200, 20


@dataclass(frozen=True)
class Engine:
    """One thing to measure.  setup: ``pes`` or ``tbptt``.  rule: a key of ``RULES``.  lanes: inner runs at once."""

    setup: str
    rule: str = "mlp"
    lanes: int = 16

    def __post_init__(self) -> None:
        lookup("setup", self.setup, {"pes": Evolution, "tbptt": Backprop})
        lookup("rule", self.rule, RULES)
        check_int("lanes", self.lanes)

    def estimator(self) -> MetaGradient:
        """Return that of the setup."""
        settings: dict[str, Any] = {"lanes": self.lanes, "horizon": HORIZON, "truncation": TRUNCATION}
        make: Any = {"pes": Evolution, "tbptt": Backprop}[self.setup]
        made: MetaGradient = make(RULES[self.rule], FAMILY, **settings)
        return made


def measure(engine: Engine, seconds: float, device: str, began: float) -> dict[str, Any]:
    """Measure a record of one setup; to be called first thing in a process of its own, whose memory it reports.

    seconds: of each of five blocks of outer steps; rates are the medians of blocks.
    began: `time.time()` when the process was started; the first outer step is counted from there.
    """
    generator = torch.Generator(device).manual_seed(0)
    rule = RULES[engine.rule]
    optimizer = partial(torch.optim.Adam, lr=1e-3)
    training = MetaTraining(engine.estimator(), rule.init_theta(generator), optimizer, generator)
    training.outer_step()
    wait(device)
    first = time.time() - began
    seconds_a_call(training.outer_step, seconds, device)
    memory = peak_memory_mb()
    yardstick, work = _plain_loop(engine, device)
    blocks = _in_turn({"engine": training.outer_step, "yardstick": yardstick}, seconds, device)
    rates = [TRUNCATION * engine.lanes / s for s in blocks["engine"]]
    plain = [work / s for s in blocks["yardstick"]]
    return {
        "setup": engine.setup,
        "rule": engine.rule,
        "network": [rule.init_theta(generator)["w0"].shape[0], *rule.hidden, 2],
        "lanes": engine.lanes,
        "tasks": engine.lanes // 2 if engine.setup == "pes" else engine.lanes,
        "steps_per_second": statistics.median(rates),
        "steps_per_second_range": [min(rates), max(rates)],
        "yardstick": "functional_call and autograd, one lane at a time",
        "yardstick_steps_per_second": statistics.median(plain),
        "yardstick_range": [min(plain), max(plain)],
        "first_step_seconds": first,
        "peak_rss_mb": memory,
        "share_of_time": _shares(engine, training, device, seconds),
    }


def _in_turn(work: Mapping[str, Callable[[], Any]], seconds: float, device: str) -> dict[str, list[float]]:
    """Of each: seconds of a call in five blocks, taken in turn: a machine whose speed changes slows them all."""
    rounds = [{name: seconds_a_call(call, seconds, device) for name, call in work.items()} for _ in range(5)]
    return {name: [blocks[name] for blocks in rounds] for name in work}


def seconds_a_call(work: Callable[[], Any], seconds: float, device: str) -> float:
    """Return seconds of one call of ``work``, in the mean of a block that takes ``seconds``, after one that is not
    counted."""
    work()
    wait(device)
    calls, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds or not calls:
        work()
        wait(device)
        calls += 1
    return (time.perf_counter() - start) / calls


def _shares(engine: Engine, training: MetaTraining, device: str, seconds: float) -> dict[str, float]:
    """Of the time of an outer step: data, inner gradients and rule of its unroll; of TBPTT that is the forward pass.

    The unroll is timed whole, and so are its three parts alone, in proportion to which it is divided: where a kernel
    does all steps at once they cannot be told apart. ``rest``: noise or derivatives, resets, the outer optimizer.
    """
    generator = torch.Generator(device).manual_seed(0)
    rule, estimator = RULES[engine.rule], engine.estimator()
    theta = rule.init_theta(generator)
    state: InnerState = estimator.init(theta, generator).inner
    problems = estimator.problems  # type: ignore[attr-defined]  # both estimators have it
    differentiable = engine.setup == "tbptt"
    with torch.set_grad_enabled(differentiable):
        lane_theta = {k: t.requires_grad_(differentiable) for k, t in expand_theta(theta, engine.lanes).items()}
        batch: Batch = problems.batch(state.data, "train", generator)
        loss, _, grads, params = gradients(problems, state, batch)
        work = {
            "outer": training.outer_step,
            "unroll": lambda: unroll(rule, lane_theta, problems, state, TRUNCATION, generator),
            "data": lambda: problems.batch(state.data, "train", generator),
            "gradient": lambda: gradients(problems, state, batch),
            "rule": lambda: updates(rule, lane_theta, grads, state._replace(params=params), loss, problems.kinds),
        }
        times = {name: statistics.median(blocks) for name, blocks in _in_turn(work, seconds / 5, device).items()}
    whole_share = min(times.pop("unroll") / times.pop("outer"), 1.0)
    parts = sum(times.values())
    return {**{name: whole_share * t / parts for name, t in times.items()}, "rest": 1.0 - whole_share}


def _plain_loop(engine: Engine, device: str) -> tuple[Callable[[], Any], int]:
    """The same work as an ordinary script has it, and how many steps of a lane that is."""
    generator = torch.Generator(device).manual_seed(0)
    rule = RULES[engine.rule]
    theta = rule.init_theta(generator)
    module = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).to(device)
    if engine.setup == "pes":
        return partial(_plain_pair, rule, theta, module, generator), 2 * TRUNCATION
    return partial(_plain_backprop, rule, theta, module, generator), TRUNCATION


def _plain_pair(rule: UpdateRule, theta: Theta, module: nn.Module, generator: torch.Generator) -> Theta:
    """One antithetic pair of PES over a truncation, a run after the other; sigma 0.01."""
    noise = {k: 0.01 * torch.randn(t.shape, generator=generator, device=t.device) for k, t in theta.items()}
    seed, sums = generator.initial_seed(), []
    for sign in (1.0, -1.0):
        perturbed = {k: t + sign * noise[k] for k, t in theta.items()}
        with torch.no_grad():
            sums.append(_plain_unroll(rule, perturbed, module, torch.Generator(generator.device).manual_seed(seed)))
    return {k: n / 1e-4 * (sums[0] - sums[1]) / 2.0 for k, n in noise.items()}


def _plain_backprop(rule: UpdateRule, theta: Theta, module: nn.Module, generator: torch.Generator) -> tuple[Any, ...]:
    """One lane of TBPTT over a truncation."""
    own = {k: t.clone().requires_grad_() for k, t in theta.items()}
    return torch.autograd.grad(_plain_unroll(rule, own, module, generator), list(own.values()))


def _plain_unroll(rule: UpdateRule, theta: Theta, module: nn.Module, generator: torch.Generator) -> Tensor:
    params = {k: p.detach().clone() for k, p in module.named_parameters()}
    infos = infos_of(params)
    state: OptState = rule.init(theta, params, infos)
    data, total = FAMILY.sample(generator, 1), torch.zeros((), device=generator.device)
    differentiable = torch.is_grad_enabled()
    for step in range(TRUNCATION):
        batch = FAMILY.batch(data, "train", generator)
        with torch.enable_grad():
            params = {k: p if p.requires_grad else p.requires_grad_() for k, p in params.items()}
            loss = cross_entropy(functional_call(module, params, (batch["x"][0],)), batch["y"][0])
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=differentiable)
        now, length = (torch.full((), n, device=generator.device) for n in (step, HORIZON))
        run = Run(now, length)
        moves, state = rule.update(theta, dict(zip(params, grads, strict=True)), state, params, infos, run)
        params = {k: p + moves[k] for k, p in params.items()}
        total = total + (loss if differentiable else loss.detach())
    return total / TRUNCATION


def measure_checkpointing(steps: int, checkpoint: bool, device: str) -> dict[str, Any]:
    """Measure memory and time of one meta-gradient through ``steps`` steps of 8 lanes; in a process of its own."""
    generator = torch.Generator(device).manual_seed(0)
    rule = RULES["mlp"]
    theta = rule.init_theta(generator)
    settings: dict[str, Any] = {"lanes": 8, "truncation": None, "checkpoint": checkpoint}
    short = Backprop(rule, FAMILY, horizon=2, **settings)
    short.estimate(theta, short.init(theta, generator), generator)  # what any run needs
    before = peak_memory_mb()
    estimator = Backprop(rule, FAMILY, horizon=steps, **settings)
    state = estimator.init(theta, generator)
    start = time.perf_counter()
    estimator.estimate(theta, state, generator)
    wait(device)
    return {
        "setup": "checkpointing" if checkpoint else "whole graph",
        "unroll": steps,
        "lanes": 8,
        "seconds": time.perf_counter() - start,
        "peak_rss_mb": peak_memory_mb(),
        "unroll_mb": peak_memory_mb() - before,
    }


def measure_sharing(lanes: int, seconds: float, device: str) -> dict[str, Any]:
    """Measure a record of PES with ``lanes`` lanes shared by all processes: speed, and what an outer step sends."""
    generator = torch.Generator(device).manual_seed(0)
    engine = Engine("pes", "mlp", lanes)
    rule = RULES[engine.rule]
    theta = rule.init_theta(generator)
    training = MetaTraining(engine.estimator(), theta, partial(torch.optim.Adam, lr=1e-3), generator)
    steps = _in_step(training, seconds)
    with Traffic() as traffic:
        training.outer_step()
    median = statistics.median(steps)
    return {
        "setup": "sharing",
        "processes": ranks().size,
        "lanes": lanes,
        "outer_step_seconds": median,
        "steps_per_second": TRUNCATION * lanes / median,
        "messages_per_outer_step": traffic.messages,
        "bytes_per_outer_step": traffic.bytes,
        "message_seconds": traffic.seconds,
        "theta": sum(t.numel() for t in theta.values()),
    }


def _in_step(training: MetaTraining, seconds: float) -> list[float]:
    """Seconds of an outer step in five blocks, of as many calls in each process."""
    training.outer_step()
    start = time.perf_counter()
    training.outer_step()
    calls = all_sum({"calls": torch.tensor(seconds / (time.perf_counter() - start))})["calls"] / ranks().size
    means = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(max(1, int(calls))):
            training.outer_step()
        means.append((time.perf_counter() - start) / max(1, int(calls)))
    return means


class Traffic:
    """While entered, counts what this process sends through ``torch.distributed``, and how long it takes."""

    def __init__(self) -> None:
        self.messages, self.bytes, self.seconds = 0, 0, 0.0

    def __enter__(self) -> Traffic:
        self._kept = dist.all_reduce, dist.all_gather
        dist.all_reduce = self._counted(dist.all_reduce, sent=0)
        dist.all_gather = self._counted(dist.all_gather, sent=1)
        return self

    def __exit__(self, *error: object) -> None:
        dist.all_reduce, dist.all_gather = self._kept

    def _counted(self, call: Any, sent: int) -> Any:
        def counted(*arguments: Any, **more: Any) -> Any:
            start = time.perf_counter()
            result = call(*arguments, **more)
            self.seconds += time.perf_counter() - start
            self.messages += 1
            self.bytes += arguments[sent].numel() * arguments[sent].element_size()
            return result

        return counted
