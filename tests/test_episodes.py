"""What estimators share: horizons, what a step counts, validation data, learned states; checkpointing; mixtures."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from tables import TOTAL, Recorded, Shapes, generator, identical, random_theta
from torch import nn
from torch.utils._pytree import tree_map

from l2o.estimators import Backprop, Evolution, Mixed
from l2o.estimators.episodes import signed_log
from l2o.meta import MetaTraining
from l2o.rules import LSTM, MLP, SGD, Adam
from l2o.rules.elementwise import ElementwiseRule
from l2o.tasks import DelayedGradients, ImageMLP, ModuleTask, Quadratic
from l2o.types import ConfigurationError, MetaGradient, Mixture

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


@pytest.mark.parametrize("make", BOTH)
def test_relative_losses_do_not_see_the_scale_of_a_task(make):
    class Scaled(Quadratic):
        def loss(self, params, buffers, data, batch):
            loss, buffers = super().loss(params, buffers, data, batch)
            return 100.0 * loss, buffers

    rule, grads = Adam(lr=0.1), []
    theta = rule.init_theta(generator())
    for family in (Quadratic(), Scaled()):
        estimator = make(rule, family, lanes=4, horizon=4, truncation=4, meta_loss="relative")
        g = generator()
        grads.append(estimator.estimate(theta, estimator.init(theta, g), g)[0]["log_lr"])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-6)


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
        g = generator()
        grads, _, metrics = estimator.estimate(theta, estimator.init(theta, g), g)
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
        g = generator()
        found, _, metrics = estimator.estimate(theta, estimator.init(theta, g), g)
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


@dataclasses.dataclass(frozen=True)
class Warm(ElementwiseRule):
    """Momentum whose initial velocity is learned."""

    def init_theta(self, generator):
        return {"start": torch.tensor(0.3)}

    def init(self, theta, params, infos):
        state = super().init(theta, params, infos)
        return state._replace(per_param={k: {"m": theta["start"].expand_as(p)} for k, p in params.items()})

    def slots(self, param):
        return {"m": torch.zeros_like(param)}

    def advance(self, theta, grad, slots):
        return {"m": 0.9 * slots["m"] + 0.1 * grad}

    def step(self, theta, grad, slots):
        return -0.01 * slots["m"]


@pytest.mark.parametrize("make", BOTH)
def test_learned_initial_states_get_a_gradient(make):
    rule = Warm()
    theta = {"start": torch.tensor(0.3, dtype=torch.float64)}
    family = Recorded(Shapes(), lanes=(0, 0))
    settings = {"horizon": 4, "truncation": 4, "stagger": False}
    estimator = make(rule, family, lanes=2, **settings)
    g = generator(1)
    grads = estimator.estimate(theta, estimator.init(theta, g), g)[0]
    assert grads["start"].abs() > 1e-6
    if make is Backprop:
        h, around = 1e-5, []
        for sign in (1, -1):
            g = generator(1)
            moved = {"start": theta["start"] + sign * h}
            around.append(estimator.estimate(moved, estimator.init(moved, g), g)[2]["meta_loss"])
        torch.testing.assert_close(grads["start"], (around[0] - around[1]) / (2 * h), rtol=1e-6, atol=1e-9)


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
    theta, results = random_theta(Adam()), []
    for checkpoint in (False, True):
        estimator = Backprop(
            Adam(), family, lanes=4, horizon=9, truncation=None, checkpoint=checkpoint, valid_weight=0.5, clip=1e9
        )
        g = generator(1)
        results.append(estimator.estimate(theta, estimator.init(theta, g), g)[0])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("steps", [2, 10, 100, 401])
def test_checkpointing_holds_the_graph_of_a_root_of_the_steps(steps):
    lengths = Backprop(SGD(), Quadratic(), horizon=steps, truncation=None, checkpoint=True)._stretches()
    assert sum(lengths) == steps
    assert max(lengths) <= math.ceil(steps**0.5)
    assert len(lengths) <= math.ceil(steps**0.5)


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize(
    "settings",
    [
        {"horizon": (5,)},
        {"horizon": (9, 5)},
        {"horizon": (5,), "truncation": None},
        {"meta_loss": "end"},
        {"curriculum": -1},
        {"window": "first"},
        {"valid_weight": 1.5},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(make, settings):
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        make(SGD(), Quadratic(), **settings)


def members(rule, lanes=4, **settings):
    settings = {"lanes": lanes, "horizon": 6, "truncation": 3} | settings
    return {
        "small": Backprop(rule, Quadratic(dim=2), **settings),
        "large": Backprop(rule, Quadratic(dim=9), **settings),
    }


def test_a_mixture_of_one_has_the_direction_of_its_member_and_norm_one():
    rule = MLP(hidden=(4,))
    theta = rule.init_theta(generator())
    alone = members(rule)["small"]
    mixed = Mixed({"small": alone})
    g, same = generator(), generator()
    want = alone.estimate(theta, alone.init(theta, g), g)[0]
    grads, _, metrics = mixed.estimate(theta, mixed.init(theta, same), same)
    norm = sum(t.square().sum() for t in want.values()).sqrt()
    torch.testing.assert_close(grads, {k: t / norm for k, t in want.items()})
    assert metrics["meta_loss"] == metrics["meta_loss/small"]
    plain = Mixed({"small": alone}, normalise=False)
    same = generator()
    assert identical(plain.estimate(theta, plain.init(theta, same), same)[0], want)


def test_a_mixture_is_the_weighted_mean_of_gradients_of_norm_one():
    rule = MLP(hidden=(4,))
    theta, own = rule.init_theta(generator()), members(rule)
    g = generator()
    states = {name: member.init(theta, g) for name, member in own.items()}
    grads = {name: member.estimate(theta, states[name], g)[0] for name, member in own.items()}
    norms = {name: sum(t.square().sum() for t in grad.values()).sqrt() for name, grad in grads.items()}
    want = {k: (3 * grads["small"][k] / norms["small"] + grads["large"][k] / norms["large"]) / 4 for k in theta}
    mixed, g = Mixed(own, {"small": 3.0}), generator()
    found, _, metrics = mixed.estimate(theta, mixed.init(theta, g), g)
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(
        metrics["meta_loss"], 0.75 * metrics["meta_loss/small"] + 0.25 * metrics["meta_loss/large"]
    )


def test_the_norm_of_a_mixture_is_a_running_one():
    """Two estimates of one family: the second is divided by the root of the mean square of both norms."""
    rule = MLP(hidden=(4,))
    theta, alone = rule.init_theta(generator()), members(rule)["small"]
    g, squares = generator(), []
    state = alone.init(theta, g)
    for _ in range(2):
        grads, state, _ = alone.estimate(theta, state, g)
        squares.append(sum(t.square().sum() for t in grads.values()))
    mean = (0.5 * squares[0] + squares[1]) / 1.5
    mixed, g = Mixed({"small": alone}, decay=0.5), generator()
    state = mixed.init(theta, g)
    for _ in range(2):
        found, state, _ = mixed.estimate(theta, state, g)
    torch.testing.assert_close(found, {k: t / mean.sqrt() for k, t in grads.items()})


class Given(MetaGradient):
    """The gradients ``values``, one an estimate."""

    def __init__(self, *values):
        self.rule, self.family, self.values = SGD(), Quadratic(), values

    def init(self, theta, generator):
        return torch.zeros((), dtype=torch.long)

    def estimate(self, theta, state, generator):
        metrics = dict.fromkeys(("meta_loss", "lanes_masked", "lanes_broken", "inner_steps"), torch.zeros(()))
        return {"log_lr": torch.tensor(self.values[int(state)])}, state + 1, metrics


def mixed_gradients(**values):
    mixed, theta = Mixed({name: Given(*each) for name, each in values.items()}), SGD().init_theta(generator())
    state, found = mixed.init(theta, generator()), []
    for _ in next(iter(values.values())):
        grads, state, _ = mixed.estimate(theta, state, generator())
        assert grads["log_lr"].dtype == torch.float32
        found.append(grads["log_lr"].item())
    return found


def test_no_scale_of_gradients_drowns_a_family_of_a_mixture():
    """Their squares are beyond the numbers of float32; of a family that learns nothing yet the square is 0."""
    assert mixed_gradients(large=(3e30,), small=(3e-30,)) == pytest.approx([1.0])
    assert mixed_gradients(still=(0.0,), other=(3.0,)) == pytest.approx([0.5])


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_mixture_forgets_an_estimate_that_is_not_finite(broken):
    first, lost, second = mixed_gradients(one=(2.0, broken, 4.0), other=(1.0, 7.0, 3.0))
    assert math.isnan(lost)
    assert [first, second] == pytest.approx(mixed_gradients(one=(2.0, 4.0), other=(1.0, 3.0)))


def test_a_mixture_meta_trains_reports_and_resumes():
    def training(seed):
        rule, g = MLP(hidden=(4,)), generator(seed)
        families = Mixture({"quadratic": Quadratic(dim=3), "digits": ImageMLP(width=4, batch_size=8)}, {"digits": 2.0})
        mixed = Mixed.over(families, lambda f: Evolution(rule, f, lanes=4, horizon=(3, 9), truncation=3, curriculum=3))
        return MetaTraining(mixed, rule.init_theta(g), lambda p: torch.optim.Adam(p, lr=1e-2), g)

    whole, first, second = training(0), training(0), training(9)
    for _ in range(3):
        metrics = whole.outer_step()
        first.outer_step()
    assert {"meta_loss", "meta_loss/quadratic", "meta_loss/digits", "lanes_masked", "inner_steps"} <= metrics.keys()
    second.load_state_dict(first.state_dict())
    for _ in range(3):
        whole.outer_step()
        second.outer_step()
    assert identical(whole.state_dict(), second.state_dict())


def test_a_mixture_is_of_one_rule_and_its_weights_of_its_families():
    one, other = members(SGD())["small"], members(Adam())["large"]
    with pytest.raises(ConfigurationError, match="one rule"):
        Mixed({"a": one, "b": other})
    for weights in ({"c": 1.0}, {"a": 0.0}):
        with pytest.raises(ConfigurationError, match="weights"):
            Mixed({"a": one}, weights)
    with pytest.raises(ConfigurationError, match="at least one"):
        Mixed({})


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
