"""What the guard of a plug-in sees and does in runs that go wrong, and that it costs a good run nothing."""

import math

import pytest
import torch
from guarding import TOTAL, bowl, descend, events, quiet, slow
from plugin import Mixing, copies, every_rule, make, parameters, source, train
from tables import generator, identical
from torch import nn

from l2o import save
from l2o.optim import LearnedOptimizer, guarded
from l2o.rules import SGD, Adam, Momentum, Steered
from l2o.types import CheckpointError


@every_rule
def test_where_nothing_happens_a_run_is_the_same_to_the_bit(rule):
    guarded_run, plain = slow(parameters(), rule, guard=True), slow(parameters(), rule)
    assert identical(quiet(train, guarded_run, range(25)), quiet(train, plain, range(25)))
    assert guarded_run.report() == {"stage": "rule", "skipped_steps": 0, "events": []}
    for p, q in zip(guarded_run.param_groups[0]["params"], plain.param_groups[0]["params"], strict=True):
        kept = dict(guarded_run.state[p])
        assert identical(kept.pop("good").shape, p.shape)
        assert identical(kept, dict(plain.state[q]))


@pytest.mark.parametrize("name", ["default", "light", "mlp-digits", "mlp-mixture", "lstm-quadratics"])
def test_shipped_rules_are_guarded_and_steps_that_need_no_help_are_theirs(name):
    params = bowl()[1 if name == "lstm-quadratics" else 0 :]  # which has met no matrix
    optimizer = LearnedOptimizer(params, name, total_steps=TOTAL, lr=1e-3)
    plain = LearnedOptimizer(copies(params), name, total_steps=TOTAL, lr=1e-3, guard=False)
    assert descend(optimizer, range(40), tell=True) == descend(plain, range(40), tell=True)
    assert (optimizer.report()["stage"], events(optimizer)) == ("rule", [])
    assert plain.report() == {"stage": "unguarded", "skipped_steps": 0, "events": []}


@pytest.mark.parametrize("dtypes", [(torch.float64,) * 2, (torch.bfloat16,) * 2, (torch.float64, torch.bfloat16)])
def test_parameters_of_any_precision_are_guarded(dtypes):
    params = [nn.Parameter(p.detach().to(dtype)) for p, dtype in zip(bowl(), dtypes, strict=True)]
    before = [p.detach().clone() for p in params]
    optimizer = make(params, SGD(lr=3.0), total_steps=TOTAL, guard=True)
    for _ in range(11):
        for p in params:
            p.grad = 2 * p.detach()
        quiet(optimizer.step)
    assert events(optimizer) == [(10, "leap", "fell back")]
    assert identical([p.detach() for p in params], before)


@pytest.mark.parametrize("kinds", ["vector", ["matrices"], 5])
def test_a_card_with_other_kinds_is_an_error_where_a_guard_would_read_it(kinds, tmp_path):
    rule = Momentum()
    path = save(tmp_path / "rule", rule, rule.init_theta(generator()), {"kinds": kinds})
    with pytest.raises(CheckpointError, match=r"kinds=.*expected a list of .*guard=False"):
        LearnedOptimizer(bowl(), path, total_steps=10)
    LearnedOptimizer(bowl(), path, total_steps=10, guard=False)


def test_a_rule_that_has_met_no_matrices_leaves_them_to_adamw_from_the_start():
    params, others = bowl(), bowl()
    optimizer = LearnedOptimizer(params, "lstm-quadratics", total_steps=1000, lr=1.0)
    rate = 1e-3 / (1.0 - 0.025)  # the last twentieth, over which it decays, is made up for
    torch_optimizer = torch.optim.AdamW(others, lr=rate, weight_decay=0.0)
    sum(p.square().sum() for p in params).backward()
    with pytest.warns(UserWarning, match="kind vector alone.* matrix, vector.*guard=False"):
        optimizer.step()
    descend(optimizer, range(1, 30), tell=True)
    descend(torch_optimizer, range(30), tell=False)
    assert (optimizer.report()["stage"], events(optimizer)) == ("adamw", [(0, "kind", "AdamW")])
    torch.testing.assert_close(params, others, rtol=1e-5, atol=1e-7)
    descend(optimizer, range(30, 61), tell=True, factor=lambda step: 1e3 if step >= 40 else 1.0)
    assert optimizer.report()["stage"] == "adamw"


def test_pairs_are_unguarded_unless_asked_for():
    assert not make(parameters()).guard
    assert make(parameters(), guard=True).guard


@pytest.mark.parametrize("tell", [True, False])
def test_steps_far_too_large_end_in_adamw_from_the_parameters_of_the_start(tell):
    params = bowl()
    before = [p.detach().clone() for p in params]
    optimizer = make(params, SGD(lr=3.0), total_steps=TOTAL, guard=True)
    descend(optimizer, range(10), tell)
    optimizer.zero_grad()
    loss = sum(p.square().sum() for p in params)
    loss.backward()
    with pytest.warns(UserWarning, match=r"step 11: .*optimizer\.report") as caught:
        optimizer.step(**({"loss": loss} if tell else {}))
    assert [each.filename for each in caught] == [__file__]
    assert identical([p.detach() for p in params], before)
    assert optimizer.report()["stage"] == "adamw"
    descend(optimizer, range(11, 120), tell)
    assert optimizer.report()["stage"] == "adamw"
    assert [done for _, _, done in events(optimizer)] == ["fell back"]  # at once: so early it is no bad luck
    assert optimizer.state[params[0]].keys() == {"good", "m", "v", "count"}


def test_the_fallback_is_torchs_adamw_but_for_its_rate():
    """That makes up for lost steps, and decays at the end."""
    params = bowl()
    optimizer = make(params, SGD(lr=3.0), total_steps=1000, guard=True)
    for step in range(61):
        if optimizer.report()["stage"] != "adamw":
            descend(optimizer, [step], tell=False)
    other = copies(params)
    rate = guarded.rate(optimizer.param_groups[0]["run"], 5.0, 1000)
    assert 1.0 < rate < 1.1
    torch_optimizer = torch.optim.AdamW(other, lr=1e-3 * rate, weight_decay=0.0)
    descend(optimizer, range(30), tell=False)
    for _ in range(30):
        torch_optimizer.zero_grad()
        sum(p.square().sum() for p in other).backward()
        torch_optimizer.step()
    torch.testing.assert_close(params, other, rtol=1e-5, atol=1e-7)


def test_steps_are_small_for_a_while_and_then_the_rule_returns():
    """One spell of gradients of the wrong sign."""
    optimizer = slow(bowl(), SGD(lr=0.02), lr=1.0, total_steps=1000, guard=True)
    descend(optimizer, range(40), tell=True)
    descend(optimizer, range(40, 51), tell=True, factor=lambda step: 1000.0)
    descend(optimizer, range(51, 120), tell=True)
    assert optimizer.report()["stage"] == "rule"
    assert "fell back" not in [done for _, _, done in events(optimizer)]


def test_a_deep_network_begins_small_again_where_its_rule_returns():
    model = nn.Sequential(*(layer for _ in range(20) for layer in (nn.Linear(8, 8), nn.Tanh())))
    optimizer = LearnedOptimizer(model.parameters(), source(Steered(deep=6)), total_steps=5000, guard=True)
    for step in range(185):
        optimizer.zero_grad()
        x, y = torch.randn(2, 4, 8, generator=generator(step))
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        quiet(optimizer.step, loss=loss.detach() * (1e6 if 70 <= step < 80 else 1.0))
    assert [done for _, _, done in events(optimizer)] == ["backed off", "returned"]
    assert optimizer.param_groups[0]["run"]["shared"]["missing"] < math.log(0.2)


def test_a_problem_that_has_become_another_one_is_not_held_against_the_rule():
    optimizer = slow(bowl(), SGD(lr=0.01), lr=1.0, guard=True)
    descend(optimizer, range(50), tell=True)
    params = optimizer.param_groups[0]["params"]
    for _ in range(50):
        optimizer.zero_grad()
        loss = 100.0 + sum(p.square().sum() for p in params)
        loss.backward()
        quiet(optimizer.step, loss=loss)
    assert [done for _, _, done in events(optimizer)] == ["backed off", "another problem"]
    assert optimizer.report()["stage"] == "rule"


def test_one_gradient_that_is_a_thousand_times_larger_is_skipped():
    optimizer = slow(bowl(), Adam(), guard=True)
    descend(optimizer, range(45), tell=False)
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    descend(optimizer, [45], tell=False, factor=lambda step: 1000.0)
    assert identical([p.detach() for p in optimizer.param_groups[0]["params"]], before)
    descend(optimizer, range(46, 60), tell=False)
    assert events(optimizer) == [(50, "gradient", "skipped")]
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("tell", [True, False])
def test_parameters_that_join_late_are_no_leap_and_their_gradients_no_spike(tell):
    """As in gradual unfreezing: a small head first, then a body with a hundred times its norm."""
    head, body = nn.Parameter(torch.ones(4, 3)), nn.Parameter(100.0 * torch.ones(20, 3))
    optimizer = slow([head, body], Adam(), lr=1.0, guard=True)
    for step in range(150):
        optimizer.zero_grad()
        loss = head.square().sum() + (1000.0 * body.square().sum() if step > 62 else 0.0)
        loss.backward()
        quiet(optimizer.step, **({"loss": loss.detach() * (step < 62)} if tell else {}))
    assert (optimizer.skipped_steps, events(optimizer)) == (0, [])


def test_parameters_that_are_trained_in_turn_are_all_put_back():
    """The second has no gradient at any look."""
    params = bowl()
    before = [p.detach().clone() for p in params]
    optimizer = make(params, SGD(lr=3.0), total_steps=TOTAL, guard=True)
    for step in range(11):
        optimizer.zero_grad()
        params[step % 2].square().sum().backward()
        quiet(optimizer.step, loss=sum(p.detach().square().sum() for p in params))
    assert events(optimizer) == [(10, "rise", "fell back")]
    assert identical([p.detach() for p in params], before)


def test_only_parameters_that_are_trained_here_are_put_back():
    """Not what has been frozen since, nor what another optimizer trains by now."""
    params = [nn.Parameter(torch.ones(4, 3)) for _ in range(3)]
    optimizer = slow([{"params": [p]} for p in params], SGD(lr=0.01), lr=1.0, guard=True)

    def train_on(steps, loss):
        for _ in range(steps):
            for p in params:
                p.grad = torch.ones_like(p) if p.requires_grad else None
            quiet(optimizer.step, loss=loss)

    train_on(15, 1.0)
    params[1].requires_grad_(False).fill_(7.0)
    params[2].requires_grad_(False).fill_(7.0)
    del optimizer.param_groups[2]
    train_on(15, 100.0)
    assert events(optimizer) == [(20, "rise", "fell back")]
    assert [p.eq(7.0).all().item() for p in params] == [False, True, True]


def test_gradients_that_begin_late_are_no_spikes():
    optimizer = slow(bowl(), Adam(), guard=True)
    descend(optimizer, range(55), tell=False, factor=lambda step: float(step > 45))
    assert (optimizer.skipped_steps, events(optimizer)) == (0, [])


def test_a_rule_that_reads_the_loss_and_shares_slots_is_guarded_too():
    optimizer = make(bowl(), Mixing(), total_steps=TOTAL, lr=1000.0, guard=True)
    descend(optimizer, range(60), tell=True)
    assert optimizer.report()["stage"] == "adamw"
    assert optimizer.param_groups[0]["run"]["shared"] == {}
    assert source(Mixing())[0] == optimizer.rule
