"""Estimators and the outer loop: truncation, masking, clipping, resume, and that meta-training works."""

import dataclasses
import functools
import math

import pytest
import torch
from tables import TOTAL, Recorded, Shapes, every_rule, generator, identical, random_theta

from l2o import estimators
from l2o.estimators import Backprop
from l2o.meta import MetaTraining, warmup_cosine
from l2o.rules import LSTM, MLP, SGD, Adam
from l2o.tasks import Quadratic
from l2o.types import Batch, ConfigurationError, ResumeError, Split, TaskData
from l2o.unroll import expand_theta, running, sample_runs, unroll


def training(rule=None, seed=0, lr=1e-2, **settings):
    rule = rule or MLP(hidden=(4,))
    g = generator(seed)
    settings = {"lanes": 4, "horizon": 12, "truncation": 4} | settings
    estimator = Backprop(rule, settings.pop("family", Quadratic()), **settings)
    return MetaTraining(estimator, rule.init_theta(g), functools.partial(torch.optim.Adam, lr=lr), g)


@every_rule
def test_tbptt_at_full_length_is_bptt(rule):
    theta, family = random_theta(rule), Recorded(Shapes())
    results = []
    for truncation in (5, None):
        estimator = Backprop(rule, family, lanes=TOTAL, horizon=5, truncation=truncation, stagger=False)
        g = generator(1)
        results.append(estimator.estimate(theta, estimator.init(theta, g), g))
    assert identical(*results)


@every_rule
def test_every_rule_gets_a_gradient_through_two_outer_steps(rule):
    run = training(rule)
    for _ in range(2):
        metrics = run.outer_step()
        assert metrics["lanes_masked"] == 0
        for name, t in run.theta.items():
            assert t.grad.isfinite().all(), name
        assert metrics["meta_grad_norm"] > 0


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
        g = generator(4)
        results.append(estimator.estimate(theta, estimator.init(theta, g), g))
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
        g = generator()
        grads, _, metrics = estimator.estimate(theta, estimator.init(theta, g), g)
        norms[clip] = grads["log_lr"].abs().item(), metrics["lane_grad_norm"].item()
    assert norms[1e9][1] == norms[1e-3][1] > 1e-3
    assert norms[1e-3][0] <= 1e-3 * 1.0001 < norms[1e9][0]


def test_log_meta_loss_does_not_see_the_scale_of_a_task():
    class Scaled(Quadratic):
        def loss(self, params, buffers, data, batch):
            loss, buffers = super().loss(params, buffers, data, batch)
            return 100.0 * loss, buffers

    grads = []
    rule = Adam(lr=0.1)  # blind to the scale of gradients, but for its epsilon
    theta = rule.init_theta(generator())
    for family in (Quadratic(), Scaled()):
        estimator = Backprop(rule, family, lanes=3, horizon=4, truncation=4, meta_loss="log", clip=1e9)
        g = generator()
        grads.append(estimator.estimate(theta, estimator.init(theta, g), g)[0])
    for name in theta:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-3, atol=1e-6)
    assert grads[0]["log_lr"].abs() > 1e-2


@pytest.mark.parametrize("rule", [Adam(), MLP(hidden=(4,)), LSTM(hidden=(3,))], ids=["Adam", "MLP", "LSTM"])
@pytest.mark.parametrize("stop", [1, 5])
def test_resuming_equals_never_having_stopped(rule, stop):
    whole, first = training(rule), training(rule)
    logs = [[float(v) for v in whole.outer_step().values()] for _ in range(9)]
    for _ in range(stop):
        first.outer_step()
    saved = torch.utils._pytree.tree_map(lambda x: x.clone() if torch.is_tensor(x) else x, first.state_dict())
    second = training(rule, seed=99)  # other θ, other generator: all of it must come from the state
    second.load_state_dict(saved)
    assert second.step == stop
    assert [[float(v) for v in second.outer_step().values()] for _ in range(9 - stop)] == logs[stop:]
    assert identical(whole.state_dict(), second.state_dict())


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


def test_warmup_cosine():
    factors = [warmup_cosine(step, total=10, warmup=4, floor=0.1) for step in range(15)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert factors[7] == pytest.approx(0.55)
    assert factors[10:] == pytest.approx([0.1] * 5)
    assert factors[4:] == sorted(factors[4:], reverse=True)


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


@pytest.mark.parametrize(
    "settings", [{"total": 3, "warmup": 3}, {"total": 3, "warmup": -1}, {"total": 3, "floor": -0.1}]
)
def test_schedules_that_make_no_sense_are_refused(settings):
    with pytest.raises(ConfigurationError, match="expected"):
        warmup_cosine(0, **settings)


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
    theta, g = {"log_lr": torch.tensor(0.0)}, generator()
    assert estimator.estimate(theta, estimator.init(theta, g), g)[2]["lanes_masked"] == masked


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
    theta, g = {"log_lr": torch.tensor(0.1)}, generator()
    grads, _, metrics = estimator.estimate(theta, estimator.init(theta, g), g)
    assert metrics["lanes_masked"] == 1
    assert metrics["meta_loss"].isfinite()
    assert grads["log_lr"].isfinite()
    assert grads["log_lr"] != 0


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
