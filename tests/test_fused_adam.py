"""Adam's step in place, by torch's kernel, is the rule's update, and torch's AdamW."""

import pytest
import torch
from plugin import copies, make, parameters, set_gradients, source, train, with_gaps
from tables import generator, identical

import l2o.fused
from l2o.ops.kinds import infos_of
from l2o.optim import LearnedOptimizer, apply
from l2o.rules import Adam
from l2o.types import Run

LONG = 10**8
"""Steps of a run that is worth a kernel."""
FACTORS = {"plain": (1.0, 1.0), "rate and decay": (0.3, 0.98), "no step": (0.0, 1.0)}


def started(params):
    rule = Adam(lr=0.1)
    theta = rule.init_theta(generator())
    return rule, theta, rule.init(theta, params, infos_of(params))


def step(rule, theta, grads, state, params, factors=(1.0, 1.0), entry=l2o.fused.step):
    run = Run(torch.tensor(0), torch.tensor(10))
    return entry(
        rule, l2o.fused.Inputs(theta, grads, state, params, infos_of(params), run), dict.fromkeys(params, factors)
    )


@pytest.mark.parametrize("factors", FACTORS.values(), ids=FACTORS)
def test_it_steps_as_update_does(factors):
    """Over every shape and layout in memory: transposed and with channels last, too."""
    params = {str(i): p.detach() for i, p in enumerate(parameters())}
    expected = {name: p.clone() for name, p in params.items()}
    (rule, theta, state), (_, _, other) = started(params), started(expected)
    for i in range(5):
        holders = list(params.values())
        set_gradients(holders, i)
        grads = {name: p.grad.contiguous() for name, p in params.items()}
        state = step(rule, theta, grads, state, params, factors)
        run = Run(torch.tensor(i), torch.tensor(10))
        updates, other = rule.update(theta, grads, other, expected, infos_of(expected), run)
        expected = {name: factors[1] * p + factors[0] * updates[name] for name, p in expected.items()}
    torch.testing.assert_close(params, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state.per_param, other.per_param, rtol=1e-5, atol=1e-8)


def test_a_long_run_is_torchs_adamw_to_the_bit():
    params = parameters()[:5]  # in the others, torch 2.13 takes entries of gradients with other strides for each other
    others = copies(params)
    optimizer = make(params, Adam(lr=0.01), total_steps=LONG)
    group = {"lr": torch.exp(optimizer.theta["log_lr"]).item(), "eps": torch.exp(optimizer.theta["log_eps"]).item()}
    betas = [1.0 - torch.sigmoid(-optimizer.theta[f"logit_beta{i}"].double()).item() for i in (1, 2)]
    torchs = torch.optim.AdamW(others, **group, betas=betas, weight_decay=0.0, fused=True)
    assert identical(train(optimizer, range(4)), train(torchs, range(4)))


REFUSED = {
    "double": (Adam(), lambda t: t.double(), {}),
    "gaps": (Adam(), with_gaps, {}),
    "eps_root": (Adam(eps_root=1e-8), lambda t: t, {}),
    "kernels off": (Adam(), lambda t: t, {"L2O_KERNELS": "0"}),
}


@pytest.mark.parametrize(("rule", "change", "environment"), REFUSED.values(), ids=REFUSED)
def test_what_it_does_not_fit_is_left_to_update(rule, change, environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    params = {"p": change(torch.ones(4, 6))}
    theta = rule.init_theta(generator())
    state, before = rule.init(theta, params, infos_of(params)), params["p"].clone()
    assert step(rule, theta, {"p": torch.ones_like(params["p"])}, state, params) is None
    assert identical((state.per_param["p"]["m"], params["p"]), (torch.zeros_like(before), before))


def test_a_state_that_is_not_finite_is_shown_by_update():
    """A kernel does not look at it: the plug-in does, where others may have written to it."""
    params = parameters()
    optimizer = make(params, Adam(), total_steps=LONG)
    train(optimizer, range(1))
    state = optimizer.state_dict()
    state["state"][1]["m"][0] = torch.nan
    optimizer.load_state_dict(state)
    before = [p.detach().clone() for p in params]
    with pytest.warns(UserWarning, match=r"the update of parameter 1 is not finite"):
        train(optimizer, range(1, 2))
    assert identical([p.detach() for p in params], before)


def test_a_run_resumes_to_the_bit_and_snapshots_stay(monkeypatch):
    monkeypatch.setattr(apply, "WORTH_A_KERNEL", 0)
    params = parameters()
    optimizer = LearnedOptimizer(params, source(Adam()), total_steps=20, weight_decay=0.1)
    train(optimizer, range(2))
    saved = optimizer.state_dict()
    fresh = LearnedOptimizer(copies(params), source(Adam()), total_steps=20)
    expected = train(optimizer, range(2, 5))
    fresh.load_state_dict(saved)
    assert identical(train(fresh, range(2, 5)), expected)
