"""The truths of the engine: gradients equal finite differences, lanes are independent, nothing waits for the device."""

import dataclasses

import pytest
import torch
from tables import RULES, TOTAL, Recorded, Shapes, every_rule, first_estimate, generator, in_eigenbasis, random_theta
from torch import nn

from l2o.bench.checks import HostReads
from l2o.estimators import Backprop
from l2o.rules import MLP, SGD, Adam
from l2o.tasks import ImageMLP, ModuleTask, Quadratic
from l2o.types import InnerState
from l2o.unroll import expand_theta, init_state, inner_step, reset, running, sample_runs, unroll


def meta_loss(rule, theta, family, steps=3, lanes=TOTAL, batches=None, second_order=True):
    """The summed losses of an unroll from step 0, as a function of one θ shared by the lanes."""
    g = batches or generator(5)
    state = sample_runs(rule, expand_theta(theta, lanes), family, torch.full((lanes,), steps), g)
    lane_theta = {k: t.expand(lanes, *t.shape) for k, t in theta.items()}
    state = init_state(rule, lane_theta, family, state)  # some rules learn the state that they begin with
    _, losses = unroll(rule, lane_theta, family, state, steps, g, second_order)
    return losses.sum()


def assert_equals_finite_differences(rule, family, directions=3, rtol=1e-5, step=1e-7, **settings):
    """The step is small because a rule with ReLUs has many kinks to fall over."""
    theta = {k: t.requires_grad_() for k, t in random_theta(rule).items()}
    grads = torch.autograd.grad(meta_loss(rule, theta, family, **settings), list(theta.values()))
    assert all(grad.isfinite().all() for grad in grads)
    largest = 0.0
    for seed in range(directions):
        g = generator(100 + seed)
        direction = {k: torch.randn(t.shape, generator=g, dtype=t.dtype) for k, t in theta.items()}
        with torch.no_grad():
            above, below = (
                meta_loss(rule, {k: t + sign * step * direction[k] for k, t in theta.items()}, family, **settings)
                for sign in (1, -1)
            )
        want = (above - below) / (2 * step)
        got = sum((a * b).sum() for a, b in zip(grads, direction.values(), strict=True))
        largest = max(largest, want.abs().item())
        torch.testing.assert_close(got, want, rtol=rtol, atol=rtol * largest + 1e-9)
    assert largest > 1e-6  # agreement of zeros would prove nothing


@every_rule
def test_backpropagation_equals_finite_differences(rule):
    """With a dead unit (gradients exactly 0), tied weights, and parameters of 0, 1 and 2 axes.

    Bases are not differentiated: those here are the first gradients', on which θ has no influence. But rounding has,
    where hardly a gradient lies, and steps as small as those of the differences show it.
    """
    if in_eigenbasis(rule):
        rule = dataclasses.replace(rule, period=1000)
        assert_equals_finite_differences(rule, Recorded(Shapes(dead=True)), rtol=2e-3)
        return
    assert_equals_finite_differences(rule, Recorded(Shapes(dead=True)))


@pytest.mark.parametrize("rule", [SGD(), Adam(), MLP(hidden=())], ids=["SGD", "Adam", "MLP"])
@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.BatchNorm1d(6),
        lambda: nn.BatchNorm1d(6, affine=False, track_running_stats=False),
        lambda: nn.LayerNorm(6),
        lambda: nn.GroupNorm(2, 6),
        lambda: nn.RMSNorm(6),
        lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2, affine=True), nn.Flatten()),
    ],
    ids=["batch", "batch-plain", "layer", "group", "rms", "instance"],
)
def test_normalisation_layers_have_right_second_derivatives(norm, rule):
    """Two differentiated steps: the place where vmap(grad) goes wrong on torch 2.13 and grad(vmap) does not.

    The MLP has no hidden layer here: behind a batch norm a bias has gradients of 1e-18 that put ReLUs onto their kinks.
    """
    data = torch.randn(40, 4, dtype=torch.float64), torch.randn(40, 2, dtype=torch.float64)

    def network():
        return nn.Sequential(nn.Linear(4, 6), norm(), nn.Tanh(), nn.Linear(6, 2)).double()

    family = ModuleTask(network, nn.functional.mse_loss, data, batch_size=8)
    assert_equals_finite_differences(rule, Recorded(family))


class Tied(nn.Module):
    """Decodes by the matrix that it encodes by."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)
        self.decoder.weight = self.encoder.weight
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * torch.tanh(self.encoder(x)) @ self.decoder.weight


def test_tied_weights_of_a_module_are_one_parameter():
    data = (torch.randn(30, 4, dtype=torch.float64),) * 2
    family = ModuleTask(lambda: Tied().double(), nn.functional.mse_loss, data, batch_size=5)
    params, _ = family.init(family.sample(generator(), 2), generator())
    assert sorted(params) == ["encoder.weight", "scale"]
    assert_equals_finite_differences(RULES["MLP"], Recorded(family))


def test_first_order_ignores_second_derivatives_only():
    family, theta = Recorded(Shapes()), {"log_lr": torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)}
    one_step = [
        torch.autograd.grad(meta_loss(SGD(), theta, family, 2, second_order=s), theta["log_lr"]) for s in (0, 1)
    ]
    many = [torch.autograd.grad(meta_loss(SGD(), theta, family, 4, second_order=s), theta["log_lr"]) for s in (0, 1)]
    assert one_step[0][0].equal(one_step[1][0])  # through one update there are none
    assert (many[0][0] - many[1][0]).abs() > 1e-4 * many[1][0].abs()


@every_rule
@pytest.mark.parametrize("family", [Shapes(), Quadratic(dim=4)], ids=["shapes", "quadratic"])
def test_vectorised_lanes_equal_lanes_one_by_one(rule, family):
    theta = random_theta(rule)
    if isinstance(family, Quadratic):
        theta = {k: t.float() for k, t in theta.items()}

    def run(lanes):
        recorded, g = Recorded(family, lanes), generator(3)
        horizon = torch.tensor([6, 2, 6])[list(lanes)]  # one of them reaches its end on the way
        state = sample_runs(rule, expand_theta(theta, len(lanes)), recorded, horizon, g)
        with torch.no_grad():
            return unroll(rule, expand_theta(theta, len(lanes)), recorded, state, 5, g)

    together, losses = run((0, 1, 2))
    tolerance = {"rtol": 1e-9, "atol": 1e-10} if losses.dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    for lane in range(TOTAL):
        alone, own = run((lane,))
        torch.testing.assert_close(losses[:, lane], own[:, 0], **tolerance)
        for name, p in alone.params.items():
            torch.testing.assert_close(together.params[name][lane], p[0], **tolerance)


def test_a_lane_at_its_horizon_stands_still():
    rule, g = Adam(), generator()
    theta = expand_theta(rule.init_theta(g), 2)
    state = sample_runs(rule, theta, Quadratic(), torch.tensor([2, 4]), g)
    assert running(state, 3).tolist() == [[True, True], [True, True], [False, True]]
    with torch.no_grad():
        at_end, _ = unroll(rule, theta, Quadratic(), state, 2, g)
        later, _ = unroll(rule, theta, Quadratic(), at_end, 2, g)
    assert later.step.tolist() == [2, 4]
    assert later.params["x"][0].equal(at_end.params["x"][0])
    assert not later.params["x"][1].equal(at_end.params["x"][1])


@every_rule
def test_nothing_is_read_on_the_host_inside_an_unroll(rule):
    families = [
        Quadratic(noise=0.1),
        ImageMLP(width=4, batch_size=8),
        ModuleTask(
            lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 1)),
            nn.functional.mse_loss,
            (torch.randn(20, 3), torch.randn(20, 1)),
            batch_size=5,
        ),
    ]
    for family in families:
        g = generator()
        theta = expand_theta(rule.init_theta(g), 2)
        state = sample_runs(rule, theta, family, torch.tensor([3, 9]), g)
        for t in theta.values():
            t.requires_grad_()
        with HostReads() as reads:
            _, losses = unroll(rule, theta, family, init_state(rule, theta, family, state), 4, g)
            torch.autograd.grad(losses.sum(), list(theta.values()), materialize_grads=True)
        assert reads.count == (4 if in_eigenbasis(rule) else 0)  # once a step: whether a basis follows
    with HostReads() as reads:  # the counter does count
        losses.sum().item()
        bool((losses > 0).all())
        losses[losses > 0]
    assert reads.count == 3


def test_reset_replaces_the_lanes_it_is_told_to():
    rule, g = Adam(), generator()
    theta = rule.init_theta(g)

    def fresh(index):
        n = len(index)
        return sample_runs(rule, expand_theta(theta, n), Quadratic(), torch.full((n,), 5), g)

    with torch.no_grad():
        state, _ = unroll(rule, expand_theta(theta, 3), Quadratic(), fresh(torch.arange(3)), 2, g)
    after = reset(state, torch.tensor([False, True, False]), fresh)
    assert isinstance(after, InnerState)
    assert after.step.tolist() == [2, 0, 2]
    assert after.first_loss.isnan().tolist() == [False, True, False]
    assert after.opt.per_param["x"]["count"].tolist() == [2, 0, 2]
    for name in ("w", "y"):
        assert [after.data[name][i].equal(state.data[name][i]) for i in range(3)] == [True, False, True]
    assert reset(state, torch.zeros(3, dtype=torch.bool), fresh) is state


def test_losses_are_those_before_each_update():
    family, g = Quadratic(), generator()
    theta = expand_theta(SGD().init_theta(g), 2)
    state = sample_runs(SGD(), theta, family, torch.tensor([3, 3]), g)
    batch = family.batch(state.data, "train", g)
    with torch.no_grad():
        after, loss = inner_step(SGD(), theta, family, state, batch)
    residual = torch.einsum("lij,lj->li", state.data["w"], state.params["x"]) - state.data["y"]
    torch.testing.assert_close(loss, residual.square().sum(1))
    torch.testing.assert_close(after.first_loss, loss)
    want = state.params["x"] - 0.01 * 2 * torch.einsum("lij,li->lj", state.data["w"], residual)
    torch.testing.assert_close(after.params["x"], want)


def test_bptt_is_the_mean_loss_differentiated():
    """The estimator's own gradient, not only the unroll's: equal to the gradient of the mean of the losses."""
    rule, family = MLP(hidden=(4,)), Recorded(Shapes())
    theta = {k: t.requires_grad_() for k, t in random_theta(rule).items()}
    estimator = Backprop(rule, family, lanes=TOTAL, horizon=3, truncation=None, clip=1e9)
    estimator.init(theta, same := generator(5))
    loss = meta_loss(rule, theta, family, steps=3, batches=estimator.streams(same).batches) / 9
    want = torch.autograd.grad(loss, list(theta.values()))
    got, _, metrics = first_estimate(estimator, theta, 5)
    torch.testing.assert_close(dict(got), dict(zip(theta, want, strict=True)))
    torch.testing.assert_close(metrics["meta_loss"], loss.detach())
