"""Estimators and the outer loop: truncation, masking, clipping, resume, and that meta-training works."""

import functools
import math

import pytest
import torch
from outer import assert_resumes, training
from tables import every_rule, generator, identical

from l2o import estimators
from l2o.estimators import Backprop, Evolution
from l2o.meta import MetaTraining
from l2o.rules import LSTM, MLP, SGD, Adam
from l2o.tasks import Quadratic
from l2o.types import ConfigurationError, ResumeError


@every_rule
@pytest.mark.parametrize("make", [Backprop, Evolution])
def test_every_rule_gets_a_gradient_through_two_outer_steps(make, rule):
    run = training(rule, lr=1e-6, make=make)
    for _ in range(2):
        metrics = run.outer_step()
        assert metrics["lanes_masked"] == 0
        for name, t in run.theta.items():
            assert t.grad.isfinite().all(), name
        assert metrics["meta_grad_norm"] > 0


@pytest.mark.parametrize("rule", [Adam(), MLP(hidden=(4,)), LSTM(hidden=(3,))], ids=["Adam", "MLP", "LSTM"])
@pytest.mark.parametrize("stop", [1, 5])
def test_resuming_equals_never_having_stopped(rule, stop):
    assert_resumes(functools.partial(training, rule), stop, 9 - stop)


def test_the_same_seed_gives_the_same_run_and_another_another():
    runs = [training(seed=s) for s in (0, 0, 1)]
    losses = [[run.outer_step()["meta_loss"].item() for _ in range(3)] for run in runs]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("other", [{"rule": Adam()}, {"lanes": 5}, {"family": Quadratic(dim=3)}])
def test_a_state_of_another_run_is_refused_and_nothing_changes(other):
    run, foreign = training(), training(**other)
    before = run.theta["w0"].clone(), run.generator.get_state()
    with pytest.raises(ResumeError, match="saved state has"):
        run.load_state_dict(foreign.state_dict())
    assert run.theta["w0"].equal(before[0])
    assert run.generator.get_state().equal(before[1])


def test_meta_training_learns_a_learning_rate():
    """Adam on ten-dimensional quadratics, from a rate that is far too small."""
    run = training(Adam(lr=1e-3), lr=0.1, lanes=16, horizon=20, truncation=20, stagger=False)
    losses = [run.outer_step()["meta_loss"].item() for _ in range(40)]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert run.theta["log_lr"] > -5.0


def test_the_schedule_scales_the_outer_rate_and_a_resume_keeps_the_rate():
    rule, g = SGD(), generator()
    estimator = Backprop(rule, Quadratic(), lanes=2, horizon=4, truncation=2)
    run = MetaTraining(
        estimator, rule.init_theta(g), functools.partial(torch.optim.SGD, lr=0.5), g, lambda t: 1 / (t + 1)
    )
    rates = []
    for _ in range(3):
        run.outer_step()
        rates.append(run.optimizer.param_groups[0]["lr"])
    assert rates == [0.5, 0.25, 0.5 / 3]


@pytest.mark.parametrize(
    "settings",
    [{"lanes": value} for value in (0, 1.5, True, "3")]
    + [{"horizon": value} for value in (-1, 1, 2.5)]
    + [{"truncation": value} for value in (0, 1)]
    + [{"clip": value} for value in (0.0, -1.0, math.nan)]
    + [{"explosion": 0.0}, {"meta_loss": "sum"}, {"log_floor": 0.0}],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        Backprop(SGD(), Quadratic(), **settings)


def test_states_are_snapshots_and_runs_share_nothing():
    one = training()
    one.outer_step()
    saved = one.state_dict()
    kept = torch.utils._pytree.tree_map(lambda x: x.clone() if torch.is_tensor(x) else x, saved)
    two, three = training(seed=5), training(seed=6)
    two.load_state_dict(saved)
    one.outer_step()
    two.outer_step()
    assert identical(saved, kept)
    three.load_state_dict(saved)
    three.outer_step()
    assert identical(one.state_dict(), two.state_dict())
    assert identical(two.state_dict(), three.state_dict())


@pytest.mark.parametrize("broken", [{}, {"x": 1}, {"generator": torch.zeros(3, dtype=torch.uint8)}])
def test_a_broken_state_is_refused_and_nothing_changes(broken):
    run = training()
    before = run.state_dict()
    with pytest.raises(ResumeError, match="saved state"):
        run.load_state_dict({**before, **broken} if "generator" in broken else broken)
    assert identical(run.state_dict(), before)


def test_the_public_estimators_are_listed():
    assert estimators.__all__ == ["Backprop", "Evolution", "Mixed"]


class Global(Quadratic):
    """Draws its tasks from torch's global generator."""

    def sample(self, generator, lanes):
        data = super().sample(generator, lanes)
        return data | {"y": torch.randn(data["y"].shape)}


def test_a_task_that_draws_from_a_global_generator_is_told_once():
    run = training(SGD(lr=0.01), family=Global())
    torch.rand(3)  # of one's own, between the steps
    with pytest.warns(UserWarning, match="neither repeats nor resumes"):
        run.outer_step()
    run.outer_step()
