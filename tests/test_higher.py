"""Agreement with `higher`, on the same module, batches and initial parameters."""

import higher
import pytest
import torch
from plugin import Mixing, source
from tables import generator, random_theta
from torch import nn

import l2o
import l2o.integrations.higher
from l2o.rules import LSTM, MLP, SGD, Adam, Momentum, Steered
from l2o.tasks import ModuleTask
from l2o.types import ConfigurationError
from l2o.unroll import expand_theta, inner_step, sample_runs

STEPS = 4


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 2)).double()


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = generator(7)
    return [tuple(torch.randn(6, n, generator=g, dtype=torch.float64) for n in (3, 2)) for _ in range(STEPS)]


def engine(rule, theta):
    """The losses of l2o's unroll, and the module whose parameters it starts from."""
    data = batches()
    family = ModuleTask(network, nn.functional.mse_loss, data[0], batch_size=6)
    module = network()
    state = sample_runs(rule, expand_theta(theta, 1), family, torch.tensor([STEPS]), generator())
    state = state._replace(params={k: p.detach()[None].clone() for k, p in module.named_parameters()})
    lane_theta = {k: t[None] for k, t in theta.items()}
    losses = []
    for x, y in data:
        state, loss = inner_step(rule, lane_theta, family, state, {"input.0": x[None], "target": y[None]})
        losses.append(loss[0])
    return losses, module


def unrolled_by_higher(module, optimizer, override):
    with higher.innerloop_ctx(module, optimizer, override=override) as (fmodel, diffopt):
        losses = []
        for x, y in batches():
            losses.append(nn.functional.mse_loss(fmodel(x), y))
            diffopt.step(losses[-1])
    return losses


@pytest.mark.parametrize(
    ("rule", "make"),
    [
        (SGD(), lambda p, t: (torch.optim.SGD(p, lr=0.1), {"lr": [t["log_lr"].exp()]})),
        (
            Momentum(),
            lambda p, t: (
                torch.optim.SGD(p, lr=0.1, momentum=0.9),
                {"lr": [t["log_lr"].exp()], "momentum": [torch.sigmoid(t["logit_momentum"])]},
            ),
        ),
        (
            Adam(eps=1e-12),  # higher takes betas as numbers only, and has eps where torch had it before 1.3
            lambda p, t: (
                torch.optim.Adam(p, betas=[torch.sigmoid(t[f"logit_beta{i}"]).item() for i in (1, 2)], eps=1e-12),
                {"lr": [t["log_lr"].exp()]},
            ),
        ),
    ],
    ids=["SGD", "Momentum", "Adam"],
)
def test_bptt_equals_higher_with_torchs_own_optimizer(rule, make):
    """Meta-gradients of the hyperparameters, second-order terms included."""
    theta = {k: t.double().requires_grad_() for k, t in rule.init_theta(generator()).items()}
    losses, module = engine(rule, theta)
    optimizer, override = make(module.parameters(), theta)
    theirs = unrolled_by_higher(module, optimizer, override)
    shared = [t for name, t in theta.items() if name.removeprefix("log_").removeprefix("logit_") in override]
    got, want = (torch.autograd.grad(sum(x), shared) for x in (losses, theirs))
    torch.testing.assert_close(losses, theirs, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
    assert all(g.abs() > 1e-8 for g in want)


@pytest.mark.parametrize("rule", [MLP(hidden=(8,)), LSTM(hidden=(4,))], ids=["MLP", "LSTM"])
def test_learned_rules_unroll_in_higher_as_in_the_engine(rule):
    theta = {k: t.requires_grad_() for k, t in random_theta(rule).items()}
    losses, module = engine(rule, theta)
    got = torch.autograd.grad(sum(losses), list(theta.values()))
    optimizer = l2o.LearnedOptimizer(module.parameters(), (rule, theta), total_steps=STEPS)
    theirs = unrolled_by_higher(module, optimizer, {"theta": [theta]})
    want = torch.autograd.grad(sum(theirs), list(theta.values()))
    torch.testing.assert_close(losses, theirs, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-10)


def test_lr_and_weight_decay_mean_what_they_mean_in_the_plugin():
    rule, module = MLP(hidden=(4,)), network()
    theta = random_theta(rule)
    settings = {"total_steps": STEPS, "lr": 0.5, "weight_decay": 0.3}
    optimizer = l2o.LearnedOptimizer(module.parameters(), (rule, theta), **settings)
    theirs = unrolled_by_higher(module, optimizer, None)
    losses = []
    for x, y in batches():
        optimizer.zero_grad()
        losses.append(nn.functional.mse_loss(module(x), y))
        losses[-1].backward()
        optimizer.step()
    torch.testing.assert_close(theirs, losses, rtol=1e-9, atol=1e-12)


def test_frozen_and_unused_parameters_stay():
    module = network()
    module[0].bias.requires_grad_(False)
    module.register_parameter("unused", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    rule = MLP(hidden=(4,))
    optimizer = l2o.LearnedOptimizer(module.parameters(), (rule, random_theta(rule)), total_steps=STEPS)
    with higher.innerloop_ctx(module, optimizer) as (fmodel, diffopt):
        for x, y in batches():
            diffopt.step(nn.functional.mse_loss(fmodel(x), y))
        after = dict(fmodel.named_parameters())
        for name, p in module.named_parameters():
            assert after[name].equal(p) == (name in ("0.bias", "unused")), name


@pytest.mark.parametrize("direction", ["eigenbasis", "orthogonal", "normalized"])
def test_rules_whose_tensors_share_state_unroll_too(direction):
    rule = Steered(direction=direction)
    theta = random_theta(rule, noise=0.01)
    losses, module = engine(rule, theta)
    optimizer = l2o.LearnedOptimizer(module.parameters(), (rule, theta), total_steps=STEPS)
    theirs = unrolled_by_higher(module, optimizer, None)
    torch.testing.assert_close(*(torch.stack(each).detach() for each in (losses, theirs)), rtol=1e-9, atol=1e-12)


def test_rules_that_read_the_loss_are_refused():
    module = network()
    optimizer = l2o.LearnedOptimizer(module.parameters(), source(Mixing()), total_steps=9)
    with pytest.raises(ConfigurationError, match="loss"), higher.innerloop_ctx(module, optimizer):
        pass


def test_entries_that_never_had_a_gradient_stay_as_in_the_plugin():
    rule, module = LSTM(hidden=(4,)), nn.Linear(3, 2).double()
    optimizer = l2o.LearnedOptimizer(module.parameters(), (rule, random_theta(rule)), total_steps=STEPS)
    with higher.innerloop_ctx(module, optimizer) as (fmodel, diffopt):
        for x, y in batches():
            diffopt.step(nn.functional.mse_loss(fmodel(x * torch.tensor([0.0, 1.0, 1.0])), y))
        after = dict(fmodel.named_parameters())["weight"]
    assert (after == module.weight).tolist() == [[True, False, False]] * 2
