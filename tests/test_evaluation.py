"""Runs that are to be compared: they meet the same problems, a grid is its single runs, and steps are timed alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from suites import ENTRANTS, GRIDS, NOISY, TASKS, learned, theta_of
from torch import nn

from l2o.bench.checks import HostReads
from l2o.bench.cost import Rarity, plug_in, usual
from l2o.evaluation import (
    RuleEntrant,
    Setting,
    TorchEntrant,
    run,
    run_baseline,
    run_entrant,
    run_learned,
    step_cost,
    wall,
)
from l2o.evaluation.baselines import Scheduled, adamw, cosine, torch_optimizer
from l2o.evaluation.curves import evaluation_steps
from l2o.evaluation.wall import relative_step
from l2o.optim import LearnedOptimizer
from l2o.rules import MLP, SGD, Steered, VeLO
from l2o.tasks import GradientNoise, ImageMLP, ModuleTask, Quadratic, Repeated
from l2o.types import ConfigurationError

TORCH: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "heavy_ball": partial(torch.optim.SGD, momentum=0.9),
    "momentum_cosine": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "momentum": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "adam": torch.optim.Adam,
    "adam_cosine": partial(torch.optim.AdamW, weight_decay=0.0),
}


@pytest.mark.parametrize(
    ("horizon", "points"), [(100, list(range(5, 101, 5))), (7, list(range(1, 8))), (1, [1]), (30, None)]
)
def test_validation_points_are_spread_over_the_run(horizon, points):
    found = evaluation_steps(horizon, 20)
    assert points is None or found == points
    assert found[-1] == horizon
    assert len(found) == min(20, horizon)
    assert max(np.diff([0, *found])) - min(np.diff([0, *found])) <= 1


def test_validation_does_not_touch_the_training_stream():
    theta = {"log_lr": torch.full((2,), -4.0)}
    runs = [run(SGD(), theta, NOISY.family, 9, torch.Generator().manual_seed(0), n) for n in (1, 9)]
    assert torch.equal(runs[0].train, runs[1].train)


@dataclasses.dataclass(frozen=True)
class Batches(Quadratic):
    """Its loss is the batch alone, noisy also in validation."""

    def batch(self, data, split, generator):
        return super().batch(data, "train", generator)

    def loss(self, params, buffers, data, batch):
        return batch["noise"].sum() + 0.0 * params["x"].sum(), buffers


def test_validation_batches_are_those_of_the_seed_and_of_no_other_stream():
    theta = {"log_lr": torch.full((2,), -4.0)}
    one, same, other = (run(SGD(), theta, Batches(), 5, torch.Generator().manual_seed(s), 5) for s in (1000, 1000, 7))
    assert torch.equal(one.valid, same.valid)
    assert not torch.isin(one.valid, other.valid).any()
    assert not torch.isin(one.valid, one.train).any()


def test_validation_losses_are_those_after_as_many_updates():
    theta = {"log_lr": torch.full((2,), -4.0)}
    curves = run(SGD(), theta, Quadratic(dim=3), 9, torch.Generator().manual_seed(0), 9)
    torch.testing.assert_close(curves.valid[:-1], curves.train[1:])  # training is noiseless here too
    assert curves.valid_steps == list(range(1, 10))
    assert (curves.valid[-1] < curves.valid[-2]).all()


def test_a_run_does_not_wait_for_the_device():
    baseline = GRIDS["adam_cosine"]
    theta = baseline.thetas(torch.Generator())
    with HostReads() as reads:
        family = Repeated(ImageMLP(width=4), len(baseline.rates))
        curves = run(baseline.scheduled_rule(), theta, family, 4, torch.Generator().manual_seed(0), 2)
        assert reads.count == 0
        curves.train[0, 0].item()
    assert reads.count == 1


@pytest.mark.parametrize(
    ("horizon", "evaluations", "names"), [(0, 1, "horizon=0"), (1, 0, "evaluations=0"), (1.5, 1, "horizon=1.5")]
)
def test_a_run_needs_positive_numbers(horizon, evaluations, names):
    with pytest.raises(ConfigurationError, match=names):
        run(SGD(), {"log_lr": torch.zeros(1)}, NOISY.family, horizon, torch.Generator(), evaluations)


@pytest.mark.parametrize(
    "family", [Quadratic(noise=0.1), ImageMLP(width=8, batch_size=16)], ids=["quadratic", "digits"]
)
@pytest.mark.parametrize("name", ["sgd", "adam", "adam_cosine"])
def test_a_learned_rule_meets_the_problems_of_the_baselines(family, name):
    setting = Setting("same", family, steps=12, seeds=3)
    baseline = GRIDS[name]
    grid = run_baseline(baseline, setting)
    rule = dataclasses.replace(baseline.rule, lr=baseline.rates[3])
    once = run_learned(rule, theta_of(rule), setting)
    assert once.train.shape == (12, 3, 1)
    for trial in range(len(baseline.rates)):
        np.testing.assert_array_equal(grid.train[0, :, trial], once.train[0, :, 0])
    if not baseline.cosine:
        np.testing.assert_allclose(grid.train[..., 3], once.train[..., 0], rtol=1e-4)
        np.testing.assert_allclose(grid.valid[..., 3], once.valid[..., 0], rtol=1e-4)


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5, bias=False), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1))


X = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
FAMILIES = {
    "quadratic": Quadratic(dim=3, noise=0.1),
    "digits": ImageMLP(width=8, batch_size=16),
    "buffers": ModuleTask(normed, nn.functional.mse_loss, (X, X[:, :1]), (X, X[:, :1]), batch_size=8),
    "changed gradients": GradientNoise(Quadratic(dim=3)),
}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
@pytest.mark.parametrize("name", GRIDS)
def test_a_rule_and_the_torch_optimizer_of_that_name_get_the_same_curves(name, family):
    setting = Setting("same", family, steps=12, seeds=2)
    grid = (1e-3, 1e-2)
    make = TORCH[name]
    entrant = TorchEntrant(name, lambda p, lr: [make(p, lr=lr)], cosine if GRIDS[name].cosine else None, grid)
    ours, torchs = (run_entrant(e, setting) for e in (dataclasses.replace(GRIDS[name], rates=grid), entrant))
    np.testing.assert_array_equal(ours.train[0], torchs.train[0])
    np.testing.assert_allclose(ours.train, torchs.train, rtol=5e-4)
    np.testing.assert_allclose(ours.valid, torchs.valid, rtol=5e-4)
    assert (torchs.rates, torchs.valid_steps) == (ours.rates, ours.valid_steps)


def test_what_is_done_of_all_runs_is_told():
    for entrant in (
        dataclasses.replace(GRIDS["adam"], rates=(0.1, 1.0)),
        TorchEntrant("both", adamw(0.1), None, (0.1, 1.0)),
    ):
        told: list[int] = []
        run_entrant(entrant, NOISY, advance=told.append)
        assert (len(told), sum(told)) == (20, 21 * 3 * 2)


@pytest.mark.parametrize("rule", [SGD(), MLP(), VeLO()], ids=lambda rule: type(rule).__name__)
def test_a_scheduled_rule_gets_what_its_rule_needs(rule):
    scheduled = Scheduled(rule)
    assert (scheduled.needs_loss, scheduled.learned_init) == (rule.needs_loss, rule.learned_init)
    setting = Setting("same", Quadratic(dim=3), steps=3, seeds=2)
    found = run_learned(scheduled, theta_of(scheduled), setting).train
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[0], run_learned(rule, theta_of(rule), setting).train[0])


@pytest.mark.parametrize(
    ("bad", "names"),
    [
        ({"steps": 0}, "steps=0"),
        ({"seeds": 1.5}, "seeds=1.5"),
        ({"steps": "9"}, "steps='9'"),
        ({"window": 0.5}, "window=0.5"),
        ({"seed": -1}, "seed=-1"),
        ({"window": 22}, "window=22"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(bad, names):
    with pytest.raises(ConfigurationError, match=names):
        dataclasses.replace(NOISY, **bad)


class Clocked(torch.optim.SGD):
    """Moves a clock: by a second a step, and by ``more`` every tenth."""

    now = 0.0

    def __init__(self, params, more):
        super().__init__(params, lr=0.1)
        self.more, self.steps = more, 0

    def step(self):
        self.steps += 1
        Clocked.now += 1.0 + (0.0 if self.steps % 10 else self.more)


def test_what_is_done_every_tenth_step_counts_as_a_tenth(monkeypatch):
    clock = dict.fromkeys(["thread_time", "perf_counter"], lambda: Clocked.now)
    monkeypatch.setattr(wall, "time", SimpleNamespace(**clock))
    monkeypatch.setattr(wall, "_adam", lambda params: [Clocked(params, 0.0)])
    assert relative_step(TorchEntrant("", partial(torch_optimizer, Clocked, more=90.0)), TASKS[0]) == 10.0


class Closureless(torch.optim.Optimizer):
    """As many write their own."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            p -= 0.1 * p.grad


def test_steps_are_timed_for_what_a_user_would_run():
    family = ModuleTask(lambda: torch.nn.Linear(3, 1), torch.nn.functional.mse_loss, (X, X[:, :1]), (X, X[:, :1]), 8)
    setting = Setting("", family, 5)
    needs_loss = RuleEntrant("velo", VeLO(), VeLO().init_theta(torch.Generator()))
    own = TorchEntrant("", partial(torch_optimizer, Closureless))
    assert all(relative_step(e, setting) > 0 for e in (learned(), ENTRANTS["adamw"], needs_loss, own))
    assert relative_step(ENTRANTS["adam"], setting) is None


def test_what_every_tenth_step_takes_has_its_share_in_the_usual_time():
    assert usual([2.0] * 10 + [12.0] + [2.0] * 9 + [12.0]) == pytest.approx(3.0)
    assert usual([1.0, 2.0, 9.0]) == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("fields", "begun", "rare", "expected"),
    [
        ({"period": 1}, 1, 1000, 12.0),
        ({"period": 20}, 1, 50, 2.5),
        ({"period": 10, "early": 20}, 16, 118, 3.18),
        ({"period": 20, "pace": 20}, 40, 129, 3.29),
        ({"period": 1000, "early": 5}, 1, 5, 2.05),
    ],
)
def test_rare_steps_have_their_share_in_the_time_of_a_step(fields, begun, rare, expected):
    rule = Steered(direction="eigenbasis", **fields)
    rarity = Rarity([plug_in(rule, theta_of(rule), [torch.nn.Parameter(torch.ones(2, 2))])])
    called = next(step for step in range(1000) if not rarity.is_early(step))
    assert called == begun
    assert sum(map(rarity.of, range(1000))) == rare
    seconds = {False: [], True: []}
    while not rarity.is_timed(called, seconds):
        seconds[rarity.of(called)].append(12.0 if rarity.of(called) else 2.0)
        called += 1
    assert rarity.typical(seconds, usual) == pytest.approx(expected)


def test_the_cost_of_a_step():
    makers = {
        "plug-in": lambda params: LearnedOptimizer(params, (SGD(), theta_of(SGD())), total_steps=10),
        "Adam": torch.optim.Adam,
        "two": lambda params: [torch.optim.Adam(params[:1]), torch.optim.SGD(params[1:])],
        "reads the loss": lambda params: plug_in(VeLO(), theta_of(VeLO()), params),
    }
    module = nn.Linear(30, 30)
    before = module.weight.detach().clone()
    costs = step_cost(makers, module, rounds=3)
    assert (costs["plug-in"].state_bytes, costs["Adam"].state_bytes) == (0.0, pytest.approx(8.0, abs=0.1))
    assert costs["two"].state_bytes == pytest.approx(8.0 * 900 / 930, abs=0.1)
    assert all(cost.seconds > 0 for cost in costs.values())
    assert torch.equal(module.weight, before)
