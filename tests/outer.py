"""What tests of meta-training share: a run of `Backprop` on quadratics, and a rule whose initial state is learned."""

import dataclasses
import functools

import torch
from tables import generator, identical

from l2o.estimators import Backprop
from l2o.meta import MetaTraining
from l2o.rules import MLP
from l2o.rules.elementwise import ElementwiseRule
from l2o.tasks import Quadratic


def training(rule=None, seed=0, lr=1e-2, make=Backprop, **settings):
    rule = rule or MLP(hidden=(4,))
    g = generator(seed)
    settings = {"lanes": 4, "horizon": 12, "truncation": 4} | settings
    estimator = make(rule, settings.pop("family", Quadratic()), **settings)
    return MetaTraining(estimator, rule.init_theta(g), functools.partial(torch.optim.Adam, lr=lr), g)


def assert_resumes(training, before=3, after=3):
    """A run that is saved, and loaded into another one, is the run that never stopped, to the bit."""
    whole, first, second = training(seed=0), training(seed=0), training(seed=9)  # other θ, other generator
    for _ in range(before):
        assert identical(whole.outer_step(), first.outer_step())
    second.load_state_dict(first.state_dict())
    assert second.step == before
    for _ in range(after):
        assert identical(whole.outer_step(), second.outer_step())
    assert identical(whole.state_dict(), second.state_dict())


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
