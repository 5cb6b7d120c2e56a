"""Mixtures of families: the weighted mean of gradients of norm one, whatever their scale, and what they refuse."""

import math

import pytest
import torch
from outer import assert_resumes
from tables import first_estimate, generator, identical

from l2o.estimators import Backprop, Evolution, Mixed
from l2o.meta import MetaTraining
from l2o.rules import MLP, SGD, Adam
from l2o.tasks import ImageMLP, Quadratic
from l2o.types import ConfigurationError, MetaGradient, Mixture


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
    want = first_estimate(alone, theta)[0]
    grads, _, metrics = first_estimate(mixed, theta)
    norm = sum(t.square().sum() for t in want.values()).sqrt()
    torch.testing.assert_close(grads, {k: t / norm for k, t in want.items()})
    assert metrics["meta_loss"] == metrics["meta_loss/small"]
    assert identical(first_estimate(Mixed({"small": alone}, normalise=False), theta)[0], want)


def test_a_mixture_is_the_weighted_mean_of_gradients_of_norm_one():
    rule = MLP(hidden=(4,))
    theta, own = rule.init_theta(generator()), members(rule)
    g = generator()
    states = {name: member.init(theta, g) for name, member in own.items()}
    grads = {name: member.estimate(theta, states[name], g)[0] for name, member in own.items()}
    norms = {name: sum(t.square().sum() for t in grad.values()).sqrt() for name, grad in grads.items()}
    want = {k: (3 * grads["small"][k] / norms["small"] + grads["large"][k] / norms["large"]) / 4 for k in theta}
    found, _, metrics = first_estimate(Mixed(own, {"small": 3.0}), theta)
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

    metrics = training(0).outer_step()
    assert {"meta_loss", "meta_loss/quadratic", "meta_loss/digits", "lanes_masked", "inner_steps"} <= metrics.keys()
    assert_resumes(training)


def test_a_mixture_is_of_one_rule_and_its_weights_of_its_families():
    one, other = members(SGD())["small"], members(Adam())["large"]
    with pytest.raises(ConfigurationError, match="one rule"):
        Mixed({"a": one, "b": other})
    for weights in ({"c": 1.0}, {"a": 0.0}):
        with pytest.raises(ConfigurationError, match="weights"):
            Mixed({"a": one}, weights)
    with pytest.raises(ConfigurationError, match="at least one"):
        Mixed({})
