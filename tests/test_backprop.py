"""`Backprop`: truncation, staggering, sick lanes, clipping, steps that count and orders of derivatives."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import pytest
import torch
from outer import Warm, training
from tables import TOTAL, Recorded, Shapes, every_rule, first_estimate, generator, identical, random_theta
from torch import nn

from l2o.estimators import Backprop
from l2o.rules import LSTM, MLP, SGD, Adam
from l2o.tasks import DelayedGradients, ModuleTask, Quadratic
from l2o.types import Batch, Split, TaskData
from l2o.unroll import expand_theta, running, sample_runs, unroll


@every_rule
def test_tbptt_at_full_length_is_bptt(rule):
    theta, family = random_theta(rule), Recorded(Shapes())
    make = partial(Backprop, rule, family, lanes=TOTAL, horizon=5, stagger=False)
    assert identical(*(first_estimate(make(truncation=steps), theta, 1) for steps in (5, None)))


def test_staggered_lanes_end_at_different_times_and_go_on_with_whole_runs():
    run = training(lanes=3)
    assert run.inner.inner.total_steps.tolist() == [12, 8, 4]
    assert run.outer_step()["inner_steps"] == 12
    assert run.inner.inner.step.tolist() == [4, 4, 0]  # the third was reset
    assert run.inner.inner.total_steps.tolist() == [12, 8, 12]


def test_a_horizon_that_is_no_multiple_of_the_truncation_ends_exactly():
    run = training(lanes=2, horizon=6, truncation=4, stagger=False)
    assert run.outer_step()["inner_steps"] == 8
    assert running(run.inner.inner, 4).sum() == 4
    assert run.outer_step()["inner_steps"] == 4
    assert run.inner.inner.step.tolist() == [0, 0]


@dataclasses.dataclass(frozen=True)
class Sick(Quadratic):
    """The loss of lane 0 is multiplied by ``factor`` once its parameters have moved."""

    factor: float = 1.0

    def batch(self, data: TaskData, split: Split, generator: torch.Generator) -> Batch:
        return super().batch(data, split, generator) | {"lane": torch.arange(len(data["y"]))}

    def loss(self, params, buffers, data, batch):
        loss, buffers = super().loss(params, buffers, data, batch)
        sick = (batch["lane"] == 0) & (params["x"].detach().abs().max() > 0)
        return loss * torch.where(sick, self.factor, 1.0), buffers


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1e6])
def test_a_sick_lane_is_masked_counted_and_reset(factor):
    """The gradient is what it would be if the lane were not there."""
    rule, family = SGD(lr=0.02), Sick(init_scale=0.0, factor=factor)
    theta = rule.init_theta(generator())
    results = []
    for lanes in ((0, 1, 2), (1, 2)):
        estimator = Backprop(rule, Recorded(family, lanes), lanes=len(lanes), horizon=8, truncation=4, stagger=False)
        results.append(first_estimate(estimator, theta, 4))
    (grads, state, metrics), (want, _, healthy) = results
    assert metrics["lanes_masked"] == 1
    assert healthy["lanes_masked"] == 0
    assert state.inner.step.tolist() == [0, 4, 4]
    torch.testing.assert_close(grads, want)
    torch.testing.assert_close(metrics["meta_loss"], healthy["meta_loss"])


def test_all_lanes_sick_gives_no_gradient_and_says_so():
    run = training(SGD(lr=1e6), lr=0.1, explosion=10.0)
    before = run.theta["log_lr"].clone()
    metrics = run.outer_step()
    assert metrics["lanes_masked"] == 4
    assert metrics["meta_grad_norm"] == 0
    assert metrics["update_skipped"] == 1
    assert run.theta["log_lr"].equal(before)


def test_lanes_are_clipped_before_they_are_averaged():
    theta = SGD(lr=0.02).init_theta(generator())
    norms = {}
    for clip in (1e9, 1e-3):
        estimator = Backprop(SGD(), Quadratic(), lanes=5, horizon=8, truncation=4, clip=clip)
        grads, _, metrics = first_estimate(estimator, theta)
        norms[clip] = grads["log_lr"].abs().item(), metrics["lane_grad_norm"].item()
    assert norms[1e9][1] == norms[1e-3][1] > 1e-3
    assert norms[1e-3][0] <= 1e-3 * 1.0001 < norms[1e9][0]


def estimator_of(family, **settings):
    return Backprop(SGD(), family, lanes=TOTAL, clip=1e9, stagger=False, **settings)


def objective_by_hand(theta, family, horizon, second_order=True):
    """The mean loss of the steps before ``horizon``, from the unroll alone, differentiated."""
    rule, g = SGD(), generator(3)
    estimator = estimator_of(family)
    estimator.init(theta, g)
    lanes = expand_theta(theta, TOTAL)
    leaf = theta["log_lr"].clone().requires_grad_()
    state = sample_runs(rule, lanes, family, torch.full((TOTAL,), horizon), g)
    batches = estimator.streams(g).batches
    _, losses = unroll(rule, {"log_lr": leaf.expand(TOTAL)}, family, state, horizon, batches, second_order)
    return torch.autograd.grad(losses.mean(), leaf)[0]


def estimated(theta, family, steps, **settings):
    estimator = estimator_of(family, **settings)
    g = generator(3)
    state = estimator.init(theta, g)
    shorter = state.inner._replace(total_steps=torch.full((TOTAL,), steps))
    return estimator.estimate(theta, state._replace(inner=shorter), g)[0]["log_lr"]


def test_steps_after_the_horizon_do_not_count():
    """Each step of a run counts the same: two standing ones do not make the other three of a truncation count more."""
    theta, family = {"log_lr": torch.tensor(-1.0, dtype=torch.float64)}, Recorded(Shapes())
    want = objective_by_hand(theta, family, 3) * 3 / 5
    got = estimated(theta, family, 3, horizon=5, truncation=5)
    torch.testing.assert_close(got, want)
    assert (objective_by_hand(theta, family, 5) - want).abs() > 1e-3 * want.abs()


@pytest.mark.parametrize("second_order", [False, True])
def test_second_order_is_passed_on(second_order):
    theta, family = {"log_lr": torch.tensor(-1.0, dtype=torch.float64)}, Recorded(Shapes())
    got = estimated(theta, family, 4, horizon=4, truncation=4, second_order=second_order)
    torch.testing.assert_close(got, objective_by_hand(theta, family, 4, second_order))
    assert not got.isclose(objective_by_hand(theta, family, 4, not second_order), rtol=1e-4)


@dataclasses.dataclass(frozen=True)
class Scripted(Quadratic):
    """Losses follow a script ``[step][lane]``."""

    script: tuple[tuple[float, ...], ...] = ()

    def init(self, data, generator):
        return {"count": torch.zeros(len(data["y"]))}, {}

    def batch(self, data, split, generator):
        return {"lane": torch.arange(len(data["y"]))}

    def loss(self, params, buffers, data, batch):
        place = params["count"].detach().round().long() * len(self.script[0]) + batch["lane"]
        value = torch.tensor(self.script).flatten().index_select(0, place.reshape(1)).squeeze(0)
        # SGD at rate 1 counts the steps: the gradient of this term is -1 and its value 0.
        return value - (params["count"] - params["count"].detach()), buffers


SCRIPTS = [
    (((1.0, 1.0), (1.9, 1.0), (1.0, 1.0)), 0),  # never above twice its first
    (((1.0, 1.0), (2.1, 1.0), (1.0, 1.0)), 1),  # once, in the middle
    (((1.0, 1.0), (1.5, 1.0), (2.6, 1.0)), 1),  # twice the first, though not twice the one before
    (((1.0, 1.0), (0.5, 1.0), (1.9, 1.0)), 0),  # twice the one before, though not twice the first
]


@pytest.mark.parametrize(("script", "masked"), SCRIPTS)
def test_exploding_is_measured_against_the_first_loss(script, masked):
    estimator = Backprop(SGD(), Scripted(script=script), lanes=2, horizon=3, truncation=3, explosion=2.0, stagger=False)
    assert first_estimate(estimator, {"log_lr": torch.tensor(0.0)})[2]["lanes_masked"] == masked


class Kinked(SGD):
    """``-|θ g|`` with a derivative that is NaN where the gradient is 0."""

    def step(self, theta, grad, slots):
        return -(theta["log_lr"] * grad).square().sqrt()


@dataclasses.dataclass(frozen=True)
class Flat(Quadratic):
    """Lane 0 has a loss without a slope."""

    def batch(self, data, split, generator):
        return {"lane": torch.arange(len(data["y"]))}

    def loss(self, params, buffers, data, batch):
        return 5.0 + torch.where(batch["lane"] == 0, 0.0, params["x"].sum()), buffers


def test_a_gradient_that_is_not_finite_masks_its_lane_at_a_finite_loss():
    estimator = Backprop(Kinked(), Flat(), lanes=2, horizon=3, truncation=3, stagger=False)
    grads, _, metrics = first_estimate(estimator, {"log_lr": torch.tensor(0.1)})
    assert metrics["lanes_masked"] == 1
    assert metrics["meta_loss"].isfinite()
    assert grads["log_lr"].isfinite()
    assert grads["log_lr"] != 0


@pytest.mark.parametrize("rule", [Adam(), MLP(hidden=(4,)), LSTM(hidden=(3,)), Warm()], ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("steps", [2, 5, 9])
def test_checkpointing_changes_nothing_but_memory(rule, steps):
    theta, family = random_theta(rule), Recorded(Shapes())
    results = []
    for checkpoint in (False, True):
        estimator = Backprop(rule, family, lanes=TOTAL, horizon=9, truncation=steps, checkpoint=checkpoint)
        g = generator(1)
        state = estimator.init(theta, g)
        for _ in range(2):
            grads, state, metrics = estimator.estimate(theta, state, g)
        results.append((grads, state, metrics))
    torch.testing.assert_close(results[0], results[1], equal_nan=True)


def statistics():
    """A network whose batch norm carries statistics along, which validation sees."""
    data = torch.randn(40, 4, dtype=torch.float64), torch.randn(40, 2, dtype=torch.float64)
    network = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)).double()
    return ModuleTask(network, nn.functional.mse_loss, data, data, batch_size=8)


@pytest.mark.parametrize("family", [statistics(), DelayedGradients(Shapes(), delay=2)], ids=["statistics", "delayed"])
def test_checkpointing_passes_buffers_on(family):
    make = partial(Backprop, Adam(), family, lanes=4, horizon=9, truncation=None, valid_weight=0.5, clip=1e9)
    theta = random_theta(Adam())
    torch.testing.assert_close(*(first_estimate(make(checkpoint=each), theta, 1)[0] for each in (False, True)))


@pytest.mark.parametrize("steps", [2, 10, 100, 401])
def test_checkpointing_holds_the_graph_of_a_root_of_the_steps(steps):
    lengths = Backprop(SGD(), Quadratic(), horizon=steps, truncation=None, checkpoint=True)._stretches()
    assert sum(lengths) == steps
    assert max(lengths) <= math.ceil(steps**0.5)
    assert len(lengths) <= math.ceil(steps**0.5)
