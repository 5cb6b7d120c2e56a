"""The plug-in's steps: they are the rule's update, and those of torch.optim where the rule is one of torch's."""

from __future__ import annotations

import math

import plugin
import pytest
import torch
from plugin import TOTAL, Mixing, counts, make, parameters, set_gradients, source, train, untouched
from tables import every_rule, identical, one_update
from torch import nn

from l2o.bench.checks import HostReads
from l2o.kernels import mlp_rule
from l2o.ops.kinds import infos_of
from l2o.optim import LearnedOptimizer, learned
from l2o.rules import MLP, SGD, AdaGrad, Adam, Momentum, RMSProp


@torch.no_grad()
def by_hand(rule, theta, params, steps: range) -> list[torch.Tensor]:
    """What the rule's own ``update`` makes of the parameters, of entries that have had a gradient."""
    names = {str(i): p for i, p in enumerate(params)}
    values = {n: p.detach().clone() for n, p in names.items()}
    state = rule.init(theta, values, infos_of(values))
    had = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in names.items()}
    for step in steps:
        set_gradients(params, step)
        had = {n: had[n] | (p.grad != 0) for n, p in names.items()}
        loss = torch.tensor(1.0 / (1 + step)).to(params[0].dtype) if rule.needs_loss else None
        grads = {n: p.grad for n, p in names.items()}
        updates, state = one_update(rule, theta, grads, state, values, step, TOTAL, loss)
        values = {n: values[n] + torch.where(had[n], updates[n], 0.0) for n in values}
    return list(values.values())


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_is_the_rules_update(rule, dtype):
    params = parameters(dtype)
    theta = {k: t.to(dtype) for k, t in source(rule)[1].items()}
    expected = by_hand(rule, theta, params, range(5))
    before = [p.detach().clone() for p in params]
    assert identical(train(make(params, rule), range(5)), expected)
    assert not identical(before, expected)


@pytest.mark.parametrize(("dtype", "calls"), [(torch.float32, 5), (torch.bfloat16, 5), (torch.float64, 0)])
def test_the_kernel_takes_the_same_steps_but_for_rounding(monkeypatch, dtype, calls):
    """Where the run is long enough; arithmetic in float64 stays with torch."""
    rule, called = MLP(step_mult=0.1), []
    run = mlp_rule.run
    monkeypatch.setattr(mlp_rule, "run", lambda *arguments: called.append(1) or run(*arguments))
    monkeypatch.setenv("L2O_KERNELS", "1")
    worth = 10**7 // (sum(p.numel() for p in parameters()) + 10**4)  # a step counts as so many entries
    trained = [
        train(make(parameters(dtype), rule, total_steps=steps, lr=0.5, weight_decay=0.1), range(5))
        for steps in (worth, worth + 1)
    ]
    assert len(called) == calls
    for by_torch, by_kernel in zip(*trained, strict=True):
        torch.testing.assert_close(by_kernel, by_torch, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_a_rule_that_mixes_tensors_sees_all_groups_at_once():
    params = parameters()
    expected = by_hand(Mixing(), source(Mixing())[1], params, range(5))
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    assert identical(train(make(groups, Mixing()), range(5)), expected)


def test_shared_slots_stay_when_a_parameter_joins():
    params = parameters()
    optimizer = make(params[:2], Mixing())
    train(optimizer, range(2))
    optimizer.add_param_group({"params": params[2:]})
    train(optimizer, range(2, 3))
    assert optimizer.param_groups[0]["run"]["shared"]["losses"].tolist() == pytest.approx([1.0, 1 / 2, 1 / 3])


def test_theta_is_the_one_at_construction():
    p = nn.Parameter(torch.ones(1))
    rule, theta = source(SGD(lr=0.1))
    optimizer = LearnedOptimizer([p], (rule, theta), total_steps=TOTAL)
    theta["log_lr"].fill_(5.0)
    p.grad = torch.ones(1)
    optimizer.step()
    assert p.item() == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("rule", "torch_class", "settings"),
    [
        (SGD(lr=0.1), torch.optim.SGD, {"lr": 0.1}),
        (Momentum(lr=0.05), torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
        (Momentum(lr=0.05, nesterov=True), torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
        (RMSProp(lr=0.01), torch.optim.RMSprop, {"lr": 0.01}),
        (AdaGrad(lr=0.1), torch.optim.Adagrad, {"lr": 0.1}),
        (Adam(lr=0.01), torch.optim.Adam, {"lr": 0.01}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_optim_agrees(rule, torch_class, settings, dtype):
    losses = []
    for factory in (lambda p: make(p, rule), lambda p: torch_class(p, **settings)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)).to(dtype)
        x = torch.randn(16, 4).to(dtype)
        optimizer = factory(model.parameters())
        losses.append([])
        for _ in range(TOTAL):
            optimizer.zero_grad()
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # θ is float32, so its learning rate is to 1e-7 the same
    assert losses[0][-1] < 0.8 * losses[0][0]


def test_weight_decay_shrinks_by_exp_of_lambda_over_the_run():
    params = [nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(3)]
    groups = [{"params": params[:1]}, {"params": params[1:2], "weight_decay": 3.0}, {"params": params[2:], "lr": 0.5}]
    optimizer = make(groups, weight_decay=0.7)
    for _ in range(TOTAL):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert [p[0].item() for p in params] == pytest.approx([math.exp(-0.7), math.exp(-3.0), math.exp(-0.35)], rel=1e-12)


def test_weight_decay_is_decoupled():
    p = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    p.grad = torch.tensor([3.0], dtype=torch.float64)
    make([p], SGD(lr=0.1), lr=0.5, weight_decay=4.0).step()
    assert p.item() == pytest.approx(2.0 * math.exp(-4.0 * 0.5 / TOTAL) - 0.5 * 0.1 * 3.0, rel=1e-7)


@pytest.mark.parametrize(
    ("scheduler", "factors"),
    [
        (lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.5**step), [1.0, 0.5, 0.25]),
        (lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=2), [1.0, 0.5, 0.0]),
        (lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1.0, total_steps=3, cycle_momentum=False), None),
    ],
)
def test_schedulers_scale_the_step(scheduler, factors):
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = make([p], SGD(lr=0.1))
    schedule = scheduler(optimizer)
    for step in range(3):
        before, rate = p.item(), optimizer.param_groups[0]["lr"]
        assert factors is None or rate == pytest.approx(factors[step])
        p.grad = torch.ones_like(p)
        optimizer.step()
        schedule.step()
        assert before - p.item() == pytest.approx(0.1 * rate, rel=1e-6)


def test_parameters_without_gradient_wait_for_their_first_one():
    frozen, unused, used, late = (nn.Parameter(torch.ones(2)) for _ in range(4))
    frozen.requires_grad_(False)
    optimizer = make([frozen, unused, used], Adam(lr=0.1))
    used.grad = torch.ones(2)
    optimizer.step()
    optimizer.step()
    assert torch.equal(frozen, torch.ones(2))
    assert torch.equal(unused, torch.ones(2))
    assert set(optimizer.state) == {used}
    frozen.requires_grad_(True)
    optimizer.add_param_group({"params": [late]})
    for p in (frozen, late):
        p.grad = torch.ones(2)
    optimizer.step()
    # Adam's first step is lr, whatever the gradient: each parameter has its own count.
    assert frozen.tolist() == late.tolist() == pytest.approx([0.9, 0.9], rel=1e-5)
    assert [optimizer.state[p]["count"].item() for p in (frozen, used, late)] == [1, 3, 1]


def test_a_step_without_any_gradient_is_none():
    p = nn.Parameter(torch.ones(2))
    optimizer = make([p])
    optimizer.step()
    assert untouched(optimizer)
    assert torch.equal(p, torch.ones(2))


def test_a_parameter_that_a_group_has_twice_is_stepped_once():
    p = nn.Parameter(torch.ones(1))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = make([p, p], SGD(lr=0.1))
    p.grad = torch.ones(1)
    optimizer.step()
    assert p.item() == pytest.approx(0.9)


def test_a_closure_is_called_once_with_gradients_on_and_its_loss_is_returned():
    p = nn.Parameter(torch.tensor([2.0]))
    optimizer = make([p], SGD(lr=0.1))
    seen = []

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        seen.append(loss)
        return loss

    with torch.no_grad():
        assert optimizer.step(closure) is seen[0]
    assert len(seen) == 1
    assert p.item() == pytest.approx(2.0 - 0.1 * 4.0)
    assert optimizer.step() is None


def test_a_rule_that_reads_the_loss_takes_it_from_a_closure_or_by_name():
    results = []
    for arguments in ({"closure": lambda: torch.tensor(0.5)}, {"closure": lambda: 0.5}, {"loss": 0.5}):
        p = nn.Parameter(torch.ones(3))
        p.grad = torch.arange(3.0)
        optimizer = make([p], Mixing())
        optimizer.step(**arguments)
        assert optimizer.param_groups[0]["run"]["shared"]["losses"].tolist() == [0.0, 0.0, 0.5]
        results.append(p.detach())
    assert identical(results[:1] * 2, results[1:])


def test_gradients_are_left_alone_and_slots_are_not_views_of_them():
    p = nn.Parameter(torch.ones(3))
    p.grad = grad = torch.arange(3.0)
    optimizer = make([p], Mixing(), weight_decay=1.0)
    optimizer.step(loss=1.0)
    assert p.grad is grad
    assert grad.tolist() == [0.0, 1.0, 2.0]
    optimizer.zero_grad(set_to_none=False)
    assert optimizer.state[p]["last"].tolist() == [0.0, 1.0, 2.0]
    optimizer.zero_grad()
    assert p.grad is None


def test_kinds_are_those_of_the_group_or_of_the_axes():
    params = [nn.Parameter(torch.ones(shape)) for shape in [(2, 2), (2,), (2, 2)]]
    optimizer = make([{"params": params[:2]}, {"params": params[2:], "kind": "embedding"}], Mixing())
    train(optimizer, range(1))
    assert [int(optimizer.state[p]["kind"]) for p in params] == [0, 1, 2]


def test_a_run_that_goes_on_is_warned_once():
    p = nn.Parameter(torch.ones(2))
    optimizer = make([p], total_steps=2)
    train(optimizer, range(2))
    with pytest.warns(UserWarning, match="total_steps=2") as caught:
        train(optimizer, range(2, 5))
    assert [w.filename for w in caught] == [plugin.__file__]  # where step is called
    assert counts(optimizer)["step"] == 5


@every_rule
def test_a_step_does_not_wait_for_the_device(rule, monkeypatch):
    monkeypatch.setattr(learned, "readable", lambda device: False)
    params = parameters()
    optimizer = make(params, rule, weight_decay=0.1)
    set_gradients(params, 0)
    loss = torch.tensor(1.0)
    with HostReads() as reads:
        optimizer.step(loss=loss)
        assert reads.count == 0
        params[0].item()
    assert reads.count == 1
