"""The outer loop: any optimizer is resumed bit for bit; clipping, skipped updates, the average of θ, schedules."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tables import generator, identical
from torch import Tensor

from l2o import LearnedOptimizer, MetaTraining, warmup_cosine, warmup_exponential, warmup_linear
from l2o.disk import load_tree, save_tree
from l2o.estimators import Backprop
from l2o.rules import MLP, Celo
from l2o.rules import Adam as Learned
from l2o.tasks import Quadratic
from l2o.types import ConfigurationError, MetaGradient, ResumeError, Theta


class Noise(MetaGradient):
    """A gradient drawn from the generator: of three tensors, scaled; not finite at the steps of ``broken``."""

    def __init__(self, scale: float = 1.0, broken: tuple[int, ...] = ()) -> None:
        self.rule, self.family = MLP(), Quadratic()
        self.scale, self.broken = scale, broken

    def init(self, theta: Theta, generator: torch.Generator) -> Tensor:
        return torch.zeros(())

    def estimate(self, theta: Theta, state: Tensor, generator: torch.Generator) -> tuple[Theta, Tensor, Any]:
        grads = {k: self.scale * torch.randn(t.shape, generator=generator) for k, t in theta.items()}
        if int(state) in self.broken:
            grads["bias"] = grads["bias"] * math.nan
        return grads, state + 1, {}


class Counting(torch.optim.SGD):
    """An optimizer that keeps a number in its group, as Prodigy does, and slots of other dtypes than θ's."""

    def __init__(self, tensors: list[Tensor], lr: float) -> None:
        super().__init__([{"params": tensors, "count": 0}], lr=lr)

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["count"] += 1
            for tensor in group["params"]:
                slot = self.state[tensor].setdefault("exact", torch.full((), 1 / 3, dtype=torch.float64))
                slot += torch.rand((), generator=generator(group["count"]), dtype=torch.float64)
                tensor -= (group["lr"] / group["count"] * slot).float() * tensor.grad


def _matrices(tensors: list[Tensor]) -> torch.optim.Optimizer:
    """One that takes part of θ only."""
    return torch.optim.Muon([tensor for tensor in tensors if tensor.ndim == 2], lr=0.01)


def _groups(tensors: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"params": tensors[1:]}, {"params": tensors[:1], "lr": 0.1}], lr=0.01)


Make = Callable[[list[Tensor]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    **{
        name: functools.partial(getattr(torch.optim, name), lr=0.01)
        for name in (
            *("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax"),
            *("NAdam", "RAdam", "RMSprop", "Rprop", "SGD"),
        )
    },
    "SGD-momentum": functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9, nesterov=True),
    "Adam-amsgrad": functools.partial(torch.optim.Adam, lr=0.01, amsgrad=True),
    "Adam-fused": functools.partial(torch.optim.Adam, lr=0.01, fused=True),
    "Adam-tensor": lambda tensors: torch.optim.Adam(tensors, lr=torch.tensor(0.01), foreach=False),
    "RMSprop-centered": functools.partial(torch.optim.RMSprop, lr=0.01, momentum=0.9, centered=True),
    "Muon": _matrices,
    "AdamW-groups": _groups,
    "LearnedOptimizer": functools.partial(
        LearnedOptimizer, source=(Learned(), Learned().init_theta(generator())), total_steps=6, weight_decay=0.1
    ),
    "Counting": functools.partial(Counting, lr=0.01),
}


def theta() -> Theta:
    shapes = {"bias": (3,), "weight": (4, 3), "gain": ()}
    return {name: torch.randn(shape, generator=generator(i)) for i, (name, shape) in enumerate(shapes.items())}


def run(make: Make = OPTIMIZERS["Adam"], estimator: MetaGradient | None = None, **settings: Any) -> MetaTraining:
    return MetaTraining(estimator or Noise(), theta(), make, generator(), **settings)


def steps(training: MetaTraining, count: int) -> list[dict[str, float]]:
    return [{name: float(value) for name, value in training.outer_step().items()} for _ in range(count)]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("stop", [0, 1, 3])
def test_every_optimizer_is_resumed_bit_for_bit(tmp_path: Any, name: str, stop: int) -> None:
    """From a file, where tuples are lists and numbers JSON."""
    settings = {"clip": 2.0, "average": 0.7, "schedule": functools.partial(warmup_linear, total=9, warmup=2)}
    whole, first, second = (run(OPTIMIZERS[name], **settings) for _ in range(3))
    log = steps(whole, 6)
    steps(first, stop)
    save_tree(tmp_path / "state", first.state_dict())
    steps(second, 4)  # whatever it has by then must not matter
    second.load_state_dict(load_tree(tmp_path / "state")[0])
    assert steps(second, 6 - stop) == log[stop:]
    assert identical(whole.state_dict(), second.state_dict())
    assert not torch.equal(whole.theta["weight"], theta()["weight"])


def test_the_table_has_all_of_torchs_optimizers() -> None:
    own = {cls.__name__ for cls in torch.optim.Optimizer.__subclasses__() if cls.__module__.startswith("torch.optim.")}
    own |= {"AdamW"}  # a subclass of Adam
    assert own - {"LBFGS", "SparseAdam"} <= OPTIMIZERS.keys()


class Closing(torch.optim.SGD):
    """One that insists on a closure by an assertion without words."""

    def step(self, closure: Any = None) -> None:
        if closure is None:
            raise AssertionError


class Rateless(torch.optim.Optimizer):
    """One without a rate for the schedule to change."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__(tensors, {})

    def step(self, closure: Any = None) -> None:
        """Nothing."""


def _reading(tensors: list[Tensor]) -> torch.optim.Optimizer:
    """A learned rule that wants to know the loss."""
    return LearnedOptimizer(tensors, (Celo(), Celo().init_theta(generator())), total_steps=9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (torch.optim.LBFGS, "LBFGS cannot move θ .*closure"),
        (torch.optim.SparseAdam, "SparseAdam cannot move θ .*dense"),
        (Closing, r"Closing cannot move θ \(AssertionError\)"),
        (Rateless, r"Rateless cannot move θ \('lr'\)"),
        (_reading, "LearnedOptimizer cannot move θ .*reads the loss"),
        (lambda tensors: None, "made a NoneType .*expected a function"),
        (lambda tensors: torch.optim.SGD([torch.zeros(2)]), "made a SGD of 1 tensors: .*moves them"),
    ],
)
def test_an_optimizer_that_cannot_do_this_is_refused(make: Make, message: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^optimizer.*{message}.*$"):
        run(make)


def test_a_state_of_another_learned_optimizer_is_refused() -> None:
    other = functools.partial(LearnedOptimizer, source="mlp-digits", total_steps=6)
    training = run(other)
    before = training.state_dict()
    with pytest.raises(ResumeError, match=r"optimizer: .*this optimizer has mlp-digits"):
        training.load_state_dict(run(OPTIMIZERS["LearnedOptimizer"]).state_dict())
    assert identical(training.state_dict(), before)


@pytest.mark.parametrize("other", [{"make": _groups}, {"average": 0.9}, {"make": OPTIMIZERS["SGD-momentum"]}])
def test_a_state_of_other_settings_is_refused(other: dict[str, Any]) -> None:
    training, saved = run(**other), run()
    before = training.state_dict()
    steps(saved, 1)
    with pytest.raises(ResumeError, match="the saved state has"):
        training.load_state_dict(saved.state_dict())
    assert identical(training.state_dict(), before)


@pytest.mark.parametrize(("scale", "clipped"), [(100.0, True), (1e-3, False)])
def test_the_meta_gradient_is_clipped_by_its_norm(scale: float, clipped: bool) -> None:
    make = functools.partial(torch.optim.SGD, lr=1.0)
    free, bound = run(make, Noise(scale)), run(make, Noise(scale), clip=0.5)
    assert free.outer_step() == bound.outer_step()  # the metric is of before
    moves = [torch.cat([(t.theta[k] - v).flatten() for k, v in theta().items()]) for t in (free, bound)]
    factor = 0.5 / moves[0].norm() if clipped else 1.0
    torch.testing.assert_close(moves[1], moves[0] * factor)


@pytest.mark.parametrize("name", ["Adam", "SGD-momentum"])
def test_a_meta_gradient_that_is_not_finite_is_skipped_and_counted(name: str) -> None:
    training = run(OPTIMIZERS[name], Noise(broken=(2,)), clip=1.0)
    log = steps(training, 2)
    before = training.state_dict()
    log += steps(training, 1)
    after = training.state_dict()
    assert identical([after[k] for k in ("theta", "optimizer")], [before[k] for k in ("theta", "optimizer")])
    log += steps(training, 1)
    assert [row["update_skipped"] for row in log] == [0, 0, 1, 0]
    assert all(t.isfinite().all() for t in training.theta.values())
    assert training.step == 4


def test_a_meta_gradient_whose_norm_overflows_is_skipped() -> None:
    training = run(estimator=Noise(1e30))
    assert training.outer_step()["update_skipped"] == 1
    assert identical(training.theta, theta())


def test_the_average_is_that_of_the_thetas_after_each_step() -> None:
    training, decay = run(average=0.8), 0.8
    assert identical(training.theta_average, theta())
    seen = []
    for _ in range(5):
        training.outer_step()
        seen.append(training.theta["weight"].clone())
        weights = torch.tensor([decay**age for age in reversed(range(len(seen)))])
        want = (torch.stack(seen) * (weights / weights.sum()).view(-1, 1, 1)).sum(0)
        torch.testing.assert_close(training.theta_average["weight"], want)
    plain = run()
    steps(plain, 5)
    assert identical(plain.theta, training.theta)  # the average does not act on the run
    assert plain.theta_average is plain.theta


@pytest.mark.parametrize(
    "settings",
    [{"clip": value} for value in (0.0, -1.0, math.inf)] + [{"average": value} for value in (0, 1, 2.0)],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        run(**settings)


@pytest.mark.parametrize("schedule", [warmup_cosine, warmup_linear, warmup_exponential])
def test_schedules_warm_up_and_decay_to_their_floor(schedule: Callable[..., float]) -> None:
    factors = [schedule(step, total=10, warmup=4, floor=0.04) for step in range(15)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[7] == pytest.approx(0.2 if schedule is warmup_exponential else 0.52)
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert factors[10:] == pytest.approx([0.04] * 5)
    assert schedule(0, total=10, floor=0.04) == 1.0
    for wrong in ({"total": 3, "warmup": 3}, {"total": 3, "warmup": -1}, {"total": 3, "floor": -0.1}):
        with pytest.raises(ConfigurationError, match="expected"):
            schedule(0, **wrong)


@pytest.mark.parametrize("make", [torch.optim.Muon, torch.optim.Adam([torch.zeros(1)]), "Adam"])
def test_what_makes_no_optimizer_of_theta_is_refused_in_one_line(make):
    rule = Learned()
    estimator = Backprop(rule, Quadratic(), lanes=2, horizon=4, truncation=2)
    with pytest.raises(ConfigurationError, match="no optimizer of θ can be made"):
        MetaTraining(estimator, rule.init_theta(generator()), make, generator())


def training_by(optimizer):
    rule = Learned()
    estimator = Backprop(rule, Quadratic(), lanes=2, horizon=4, truncation=2)
    return MetaTraining(estimator, rule.init_theta(generator()), optimizer, generator())


@pytest.mark.parametrize(
    ("before", "after"), [("Adam", "SGD"), ("SGD", "Adam"), ("Adagrad", "SGD"), ("Adam", "Adagrad"), ("SGD", "Adagrad")]
)
def test_a_run_does_not_go_on_with_another_outer_optimizer(before, after):
    run, other = (training_by(functools.partial(getattr(torch.optim, name), lr=1e-3)) for name in (before, after))
    run.outer_step()
    with pytest.raises(ResumeError, match="optimizer: the saved state has"):
        other.load_state_dict(run.state_dict())


@dataclasses.dataclass(frozen=True)
class Lost(Quadratic):
    """No loss is a number."""

    def loss(self, params, buffers, data, batch):
        loss, buffers = super().loss(params, buffers, data, batch)
        return loss * math.nan, buffers


def test_a_step_without_a_healthy_lane_is_skipped():
    """Weight decay alone would move θ."""
    rule = Learned()
    estimator = Backprop(rule, Lost(), lanes=2, horizon=4, truncation=2, second_order=False)
    adamw = functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
    run = MetaTraining(estimator, rule.init_theta(generator()), adamw, generator())
    before = {name: t.clone() for name, t in run.theta.items()}
    metrics = run.outer_step()
    assert metrics["update_skipped"] == 1
    assert identical(run.theta, before)
