"""What estimators share: horizons, what a step counts, validation data, learned states; checkpointing; mixtures."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from outer import Warm
from tables import Recorded, Shapes, first_estimate, generator, identical
from torch.utils._pytree import tree_map

from l2o.estimators import Backprop, Evolution
from l2o.estimators.episodes import signed_log
from l2o.rules import SGD, Adam
from l2o.tasks import Quadratic
from l2o.types import ConfigurationError

BOTH = [Backprop, Evolution]


@pytest.mark.parametrize("make", BOTH)
def test_horizons_are_log_uniform_and_grow_with_the_curriculum(make):
    rule, g = SGD(lr=1e-4), generator()
    settings = {"lanes": 4000, "truncation": 10, "stagger": False}
    estimator = make(rule, Quadratic(dim=1), horizon=(10, 1000), curriculum=2, **settings)
    theta = rule.init_theta(g)
    state = estimator.init(theta, g)
    assert set(state.inner.total_steps.tolist()) == {10}
    _, state, _ = estimator.estimate(theta, state, g)  # all end here, and begin anew before the curriculum has grown
    assert set(state.inner.total_steps.tolist()) == {10}
    _, state, _ = estimator.estimate(theta, state, g)
    half = state.inner.total_steps
    assert half.min() == 10
    assert 90 <= half.max() <= 101
    plain = dataclasses.replace(estimator, curriculum=0)
    whole = plain.init(theta, g).inner.total_steps.double()
    assert whole.max() > 900
    assert whole.max() <= 1000
    assert whole.median().item() == pytest.approx(100, rel=0.2)
    short = dataclasses.replace(plain, horizon=(2, 4)).init(theta, g).inner.total_steps
    # As of a logarithm that is uniform from that of 2 to that of 5, rounded down.
    for steps in (2, 3, 4):
        assert (short == steps).double().mean() == pytest.approx(
            math.log((steps + 1) / steps) / math.log(5 / 2), abs=0.04
        )


def test_every_window_has_weights_of_mean_one_over_a_run():
    for window in ("mean", "linear", "last"):
        estimator = Backprop(SGD(), Quadratic(), lanes=2, horizon=7, truncation=3, window=window, stagger=False)
        theta, g = SGD().init_theta(generator()), generator()
        state, total = estimator.init(theta, g).inner, 0.0
        for _ in range(3):
            ones = torch.ones(3, 2)
            total = total + estimator.objective(ones, state, torch.ones(2))
            state = state._replace(step=(state.step + 3).clamp(max=7))
        torch.testing.assert_close(total, torch.full((2,), 7 / 3))


def test_last_is_the_last_loss_and_linear_weighs_late_ones():
    losses = torch.tensor([[5.0], [3.0], [2.0], [1.0]])
    theta = SGD().init_theta(generator())
    found = {}
    for window in ("mean", "linear", "last"):
        estimator = Backprop(SGD(), Quadratic(), lanes=1, horizon=4, truncation=None, window=window)
        state = estimator.init(theta, generator()).inner
        found[window] = estimator.objective(losses, state, losses[0]).item()
    assert found["mean"] == pytest.approx(11 / 4)
    assert found["linear"] == pytest.approx((5 + 6 + 6 + 4) / 10)
    assert found["last"] == pytest.approx(1.0)


def test_log_counts_the_logarithm_over_a_floor_in_units_of_the_first_loss():
    losses = torch.tensor([[4.0], [1.0], [0.0], [1e-9]])
    estimator = Backprop(SGD(), Quadratic(), lanes=1, horizon=4, truncation=None, meta_loss="log", log_floor=0.25)
    state = estimator.init(SGD().init_theta(generator()), generator()).inner
    want = (math.log(5.0) + math.log(2.0)) / 4  # of what is solved: log 1
    assert estimator.objective(losses, state, losses[0]).item() == pytest.approx(want)


class Scaled(Quadratic):
    def loss(self, params, buffers, data, batch):
        loss, buffers = super().loss(params, buffers, data, batch)
        return 100.0 * loss, buffers


@pytest.mark.parametrize("meta_loss", ["log", "relative"])
@pytest.mark.parametrize("make", BOTH)
def test_these_meta_losses_do_not_see_the_scale_of_a_task(make, meta_loss):
    rule = Adam(lr=0.1)  # blind to the scale of gradients, but for its epsilon
    settings = {"lanes": 4, "horizon": 4, "truncation": 4, "meta_loss": meta_loss}
    theta, families = rule.init_theta(generator()), (Quadratic(), Scaled())
    grads = [first_estimate(make(rule, family, **settings), theta)[0] for family in families]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-6)
    assert grads[0]["log_lr"].abs() > 1e-2


@dataclasses.dataclass(frozen=True)
class Shifted(Quadratic):
    """The same problem and gradients: losses that begin below zero, pass it, or begin next to it or there."""

    shift: float = 0.0

    def loss(self, params, buffers, data, batch):
        loss, buffers = super().loss(params, buffers, data, batch)
        return loss + self.shift * data["start"], buffers

    def sample(self, generator, lanes):
        data = super().sample(generator, lanes)
        return data | {"start": (data["y"]).square().sum(-1)}  # the first loss of what begins at zero


SHIFTS = [-9.0, -0.9, -1.0 + 1e-4, -1.0, -1.1]


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("meta_loss", ["log", "relative"])
@pytest.mark.parametrize("make", BOTH)
def test_no_meta_loss_rewards_a_rise_of_losses_of_whatever_sign(make, meta_loss, shift):
    rule, found = SGD(lr=1e-3), {}
    theta = rule.init_theta(generator())
    for kind in ("mean", meta_loss):
        family = Shifted(init_scale=0.0, shift=shift)
        estimator = make(rule, family, lanes=8, horizon=8, truncation=4, meta_loss=kind)
        grads, _, metrics = first_estimate(estimator, theta)
        assert metrics["lanes_masked"] == metrics["lanes_broken"] == 0
        found[kind] = grads["log_lr"]
    assert found[meta_loss] * found["mean"] > 0


def test_a_logarithm_of_any_loss_rises_as_steeply_above_zero_as_below():
    losses = torch.tensor([-5.0, -1e-3, -0.0, 0.0, 1e-3, 5.0], requires_grad=True)
    found = signed_log(losses, torch.tensor(0.5))
    (slope,) = torch.autograd.grad(found.sum(), losses)
    torch.testing.assert_close(slope, 1.0 / (losses.detach().abs() + 0.5))
    assert found[3:].equal((losses[3:] + 0.5).log())
    torch.testing.assert_close(found[:3].flip(0) + found[3:], torch.full((3,), 2 * math.log(0.5)))


@pytest.mark.parametrize("make", BOTH)
def test_copies_of_a_problem_explode_at_one_limit(make):
    """The first loss says little of losses that pass zero, the lowest more; one that is not finite, nothing."""
    estimator = make(SGD(), Quadratic(), lanes=4, explosion=2.0)
    losses = torch.tensor([[0.1, 0.1, 0.0, -0.0], [-5.0, 0.3, math.inf, 1.9], [9.0, 11.0, -math.inf, 2.1]])
    limit = estimator.limit(losses, losses[0])
    assert limit.tolist() == pytest.approx([10.0, 10.0 if make is Evolution else 0.2, 2.0, 2.0])
    lost = estimator.exploded(losses, losses[0])
    assert lost[2].tolist() == [False, True, True, True]
    assert lost[1].tolist() == [False, make is Backprop, True, False]


class Flat(Quadratic):
    """Validation has the loss 7, whatever the parameters."""

    def batch(self, data, split, generator):
        return super().batch(data, split, generator) | {"flat": torch.full((len(data["y"]),), split == "valid")}

    def loss(self, params, buffers, data, batch):
        loss, buffers = super().loss(params, buffers, data, batch)
        return torch.where(batch["flat"], 7.0, loss), buffers


@pytest.mark.parametrize("make", BOTH)
def test_the_weight_of_validation_data(make):
    """The meta-loss and its gradient are those of the blend."""
    rule = SGD(lr=1e-3)
    theta = rule.init_theta(generator())
    losses, grads = {}, {}
    for weight in (0.0, 0.25, 1.0):
        settings = {"clip": 1e9} if make is Backprop else {}
        estimator = make(rule, Flat(), lanes=4, horizon=4, truncation=4, valid_weight=weight, **settings)
        found, _, metrics = first_estimate(estimator, theta)
        losses[weight], grads[weight] = metrics["meta_loss"].item(), found["log_lr"].item()
    assert losses[0.25] == pytest.approx(0.75 * losses[0.0] + 0.25 * 7.0, rel=1e-5)
    assert losses[1.0] == pytest.approx(7.0)
    assert grads[0.25] == pytest.approx(0.75 * grads[0.0], rel=1e-3)
    assert grads[1.0] == pytest.approx(0.0, abs=1e-5)
    assert abs(grads[0.0]) > 1e-4


@pytest.mark.parametrize("make", BOTH)
def test_what_comes_after_a_run_is_not_in_the_metrics(make):
    estimator = make(SGD(lr=1e-3), Quadratic(), lanes=4, horizon=5, truncation=5, stagger=False)
    theta, found = SGD(lr=1e-3).init_theta(generator()), []
    for total, truncation in ((3, 5), (5, 3)):
        cut, g = dataclasses.replace(estimator, truncation=truncation), generator()
        state = cut.init(theta, g)
        state = state._replace(inner=state.inner._replace(total_steps=torch.full((4,), total)))
        found.append(cut.estimate(theta, state, g)[2])
    assert found[0]["inner_steps"] == found[1]["inner_steps"] == 12
    torch.testing.assert_close(found[0]["meta_loss"], found[1]["meta_loss"])


@pytest.mark.parametrize("make", BOTH)
def test_learned_initial_states_get_a_gradient(make):
    rule = Warm()
    theta = {"start": torch.tensor(0.3, dtype=torch.float64)}
    family = Recorded(Shapes(), lanes=(0, 0))
    settings = {"horizon": 4, "truncation": 4, "stagger": False}
    estimator = make(rule, family, lanes=2, **settings)
    grads = first_estimate(estimator, theta, 1)[0]
    assert grads["start"].abs() > 1e-6
    if make is Backprop:
        h, around = 1e-5, []
        for sign in (1, -1):
            g = generator(1)
            moved = {"start": theta["start"] + sign * h}
            around.append(estimator.estimate(moved, estimator.init(moved, g), g)[2]["meta_loss"])
        torch.testing.assert_close(grads["start"], (around[0] - around[1]) / (2 * h), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize(
    "settings",
    [
        {"horizon": (5,)},
        {"horizon": (9, 5)},
        {"horizon": (5,), "truncation": None},
        {"meta_loss": "end"},
        {"middle": -1.0},
        {"curriculum": -1},
        {"window": "first"},
        {"valid_weight": 1.5},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(make, settings):
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        make(SGD(), Quadratic(), **settings)


@pytest.mark.parametrize("make", BOTH)
def test_an_estimate_takes_as_many_random_numbers_whatever_happens_in_it(make):
    """Or processes that share a run would drift apart where runs end in one of them only."""
    states = []
    for explosion in (1e-6, 1e6):
        rule, g = SGD(), generator()
        theta = rule.init_theta(g)
        estimator = make(rule, Quadratic(), lanes=4, horizon=8, truncation=4, explosion=explosion)
        state = estimator.init(theta, g)
        after = estimator.estimate(theta, state, g)[1]
        states.append((g.get_state(), after.inner.step.tolist()))
    assert states[0][0].equal(states[1][0])
    assert states[0][1] != states[1][1]
    assert identical(*(tree_map(torch.clone, s[0]) for s in states))
