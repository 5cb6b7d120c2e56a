"""The time of a step: of what a user would run, and with its share of what is done every tenth step."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from suites import ENTRANTS, TASKS, learned, theta_of
from torch import nn

from l2o.bench.cost import plug_in, usual
from l2o.evaluation import (
    RuleEntrant,
    Setting,
    TorchEntrant,
    step_cost,
    wall,
)
from l2o.evaluation.baselines import torch_optimizer
from l2o.evaluation.wall import relative_step
from l2o.optim import LearnedOptimizer
from l2o.rules import SGD, VeLO
from l2o.tasks import ModuleTask

X = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))


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


@pytest.mark.parametrize(
    ("seconds", "expected"), [([2.0] * 10 + [12.0] + [2.0] * 9 + [12.0], 3.0), ([1.0, 2.0, 9.0], 4.0)]
)
def test_what_every_tenth_step_takes_has_its_share_in_the_usual_time(seconds, expected):
    assert usual(seconds) == pytest.approx(expected)


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
