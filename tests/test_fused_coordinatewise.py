"""The step in place of rules with a network an element is the rule's update, or nothing is written."""

import pytest
import torch
from plugin import make, parameters, train, with_gaps
from tables import generator, identical
from torch.utils._pytree import tree_leaves, tree_map

import l2o.fused
from l2o.fused import Inputs
from l2o.ops.kinds import param_infos
from l2o.optim import apply
from l2o.rules import STAR, VeLO
from l2o.rules import AdafacMLP as Small
from l2o.rules.celo import Celo
from l2o.rules.celo2 import Celo2
from l2o.types import Run

SHAPES = {
    "scalar": (),
    "vector": (37,),
    "matrix": (13, 450),  # rows that are longer than a block
    "narrow": (500, 3),
    "tall": (700, 20),
    "conv": (6, 5, 3, 3),
    "empty": (0, 3),
}
SMALL = {"lstm_hidden": 8, "inits": 2}
RULES = {
    "AdafacMLP": Small(step_mult=0.1),
    "AdafacMLP 32, mup": Small(hidden=(32, 32), step_mult=0.1, mup=True),
    "STAR": STAR(step_mult=0.1, nominal_lr=0.1, weight_decay=0.1, normalise=True),
    "STAR, means": STAR(hidden=(8,), step_mult=0.1, mean_magnitude=True, nominal_lr=0.1),
    "Celo": Celo(**SMALL),
    "VeLO": VeLO(**SMALL),
    "Celo2": Celo2(orthogonalize=False, weight_decay=0.1),
    "Celo2, tanh": Celo2(activation="tanh", exp_mult=0.1, param_scale=True),
    "Celo2, Adam": Celo2(adam=("vector", "embedding")),
}
TAKEN = {
    "in place": lambda patch: None,
    "update": lambda patch: patch.setattr(l2o.fused, "STEPS", {}),
    "torch": lambda patch: patch.setenv("L2O_KERNELS", "0"),
}
"""How the plug-in's steps are taken."""
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def started(rule, shapes=SHAPES):
    """θ with every number of a network at work, infos, parameters and state."""
    theta, infos = rule.init_theta(generator()), param_infos(shapes)
    params = {name: torch.randn(shape, generator=generator(1)) for name, shape in shapes.items()}
    return theta, infos, params, rule.init(theta, params, infos)


def gradients(params, i):
    return {name: torch.randn(p.shape, generator=generator(10 + i)) for name, p in params.items()}


def run_at(i):
    return Run(torch.tensor(i), torch.tensor(10), torch.tensor(1.0 / (1 + i)))


@every_rule
def test_it_steps_as_update_does(rule):
    theta, infos, params, state = started(rule)
    _, _, expected, other = started(rule)
    factors = {name: (0.5 + 0.1 * i, 1.0 - 0.01 * i) for i, name in enumerate(params)}
    for i in range(3):
        grads = gradients(params, i)
        updates, other = rule.update(theta, grads, other, expected, infos, run_at(i))
        state = l2o.fused.step(rule, Inputs(theta, grads, state, params, infos, run_at(i)), factors)
        expected = {name: keep * expected[name] + lr * updates[name] for name, (lr, keep) in factors.items()}
    torch.testing.assert_close(params, expected, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close((state.per_param, state.shared), (other.per_param, other.shared), rtol=1e-5, atol=1e-7)


def nothing(t):
    return t


REFUSED = {
    "double": (Small(), torch.Tensor.double, nothing, {}),
    "gaps": (Small(), with_gaps, nothing, {}),
    "kernels off": (Small(), nothing, nothing, {"L2O_KERNELS": "0"}),
    "corrected": (Celo2(bias_correction=True), nothing, nothing, {}),
    "no number": (Celo2(), nothing, lambda t: t * torch.nan, {}),
    "too large": (Small(exp_mult=1.0), nothing, lambda t: t * 1e20, {}),
}


@pytest.mark.parametrize(("rule", "change", "damage", "environment"), REFUSED.values(), ids=REFUSED)
def test_what_it_does_not_fit_is_left_to_update(rule, change, damage, environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    theta, infos, params, state = started(rule, {"p": (4, 6)})
    params = tree_map(change, params)
    theta = {name: damage(t) if name[0] in "wb" else t for name, t in theta.items()}
    before = tree_map(torch.clone, (state.per_param, params))
    inputs = Inputs(theta, gradients(params, 0), state, params, infos, run_at(0))
    assert l2o.fused.step(rule, inputs, {"p": (1.0, 0.9)}) is None
    assert identical((state.per_param, params), before)


@every_rule
def test_the_plug_in_takes_it(rule, monkeypatch):
    """A run is the same without it, and without any kernel; what a snapshot holds stays, and moments where they are."""
    monkeypatch.setattr(apply, "WORTH_A_KERNEL", 0)
    found = {}
    for name, change in TAKEN.items():
        with monkeypatch.context() as only:
            change(only)
            params = [p for p in parameters() if p.is_contiguous()]
            optimizer = make(params, rule, weight_decay=0.1)
            train(optimizer, range(2))
            saved = optimizer.state_dict()
            kept = tree_map(torch.clone, tree_leaves(saved["state"]))
            found[name] = train(optimizer, range(2, 3))
            assert identical(tree_leaves(saved["state"]), kept)
            old = [own["m"].data_ptr() for own in optimizer.state.values() if "m" in own and own["m"].numel()]
            found[name] = train(optimizer, range(3, 4))
            new = [own["m"].data_ptr() for own in optimizer.state.values() if "m" in own and own["m"].numel()]
            assert (old == new) is (name == "in place")
    for name in ("update", "torch"):
        torch.testing.assert_close(found["in place"], found[name], rtol=1e-4, atol=1e-5)
