"""The kernel of whole unrolls agrees with the engine's steps, draws what they draw, and is refused where it must be."""

from __future__ import annotations

import pytest
import torch
from tables import generator, identical

import l2o.fused
from l2o.estimators import Evolution
from l2o.random import LaneGenerator
from l2o.rules import MLP, STAR, AdafacMLP, Adam
from l2o.tasks import DelayedGradients, ImageMLP, Reparametrized, Repeated
from l2o.types import InnerState
from l2o.unroll import expand_theta, sample_runs, unroll

LANES, STEPS = 6, 7
FAMILY = ImageMLP(width=12, batch_size=20)
RULE = MLP(hidden=(8, 6))
RULES = [RULE, AdafacMLP(hidden=(8, 6))]
CASES = {
    "plain": (RULE, FAMILY),
    "steps": (MLP(hidden=(8, 6), time="steps", decays=(0.9,)), FAMILY),
    "deep": (RULE, ImageMLP(width=9, depth=3, activation="tanh", batch_size=5)),
    "linear": (MLP(hidden=()), ImageMLP(depth=0, batch_size=33)),
    "gelu-scaled": (RULE, ImageMLP(width=7, activation="gelu", batch_size=8, init_scale=(0.5, 2.0))),
}
FORWARD = {
    "channels": (AdafacMLP(step_mult=0.1), FAMILY),
    "channels, linear": (AdafacMLP(hidden=(), step_mult=0.1), FAMILY),
    "channels, wide": (AdafacMLP(hidden=(32, 8), mup=True, step_mult=0.1), ImageMLP(width=100, depth=2, batch_size=5)),
    "channels, nominal": (STAR(nominal_lr=0.01, weight_decay=0.01, nominal_controller=True), FAMILY),
}


def problem(rule, family, copies=2) -> tuple[dict[str, torch.Tensor], Repeated, InnerState]:
    """Different θ in every lane; two lanes end within the unroll."""
    g = generator()
    theta = expand_theta(rule.init_theta(g), LANES)
    theta = {name: t + 0.05 * torch.randn(t.shape, generator=g) for name, t in theta.items()}
    problems = Repeated(family, copies)
    return theta, problems, sample_runs(rule, theta, problems, torch.tensor([9, 9, 3, 3, 30, 30]), g)


def batches() -> LaneGenerator:
    return LaneGenerator(seed=5, ids=torch.tensor([4, 5, 9]))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("rule", "family"), (CASES | FORWARD).values(), ids=(CASES | FORWARD).keys())
def test_the_kernel_agrees_with_the_engine(monkeypatch, rule, family):
    theta, problems, state = problem(rule, family)
    with torch.no_grad():
        g = batches()
        assert l2o.fused.unroll(rule, theta, problems, state, STEPS, g) is not None
        after, losses = unroll(rule, theta, problems, state, STEPS, same := batches())
        assert same.get_state().equal(g.get_state())
        monkeypatch.setattr(l2o.fused, "unroll", lambda *_: None)
        want, wanted = unroll(rule, theta, problems, state, STEPS, g := batches())
    assert same.get_state().equal(g.get_state())
    torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(after.params, want.params, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.opt.per_param, want.opt.per_param, rtol=1e-4, atol=1e-5)
    assert after.step.tolist() == want.step.tolist() == [7, 7, 3, 3, 7, 7]
    assert identical(after.first_loss, want.first_loss)


@pytest.mark.parametrize("rule", RULES, ids=type)
def test_nothing_that_came_in_is_written_to(rule):
    theta, problems, state = problem(rule, FAMILY)
    copy = torch.utils._pytree.tree_map(torch.clone, state)
    with torch.no_grad():
        unroll(rule, theta, problems, state, STEPS, batches())
    assert identical(state, copy)


@pytest.mark.parametrize("rule", RULES, ids=type)
def test_a_run_in_two_parts_is_the_same_run(rule):
    theta, problems, state = problem(rule, FAMILY)
    with torch.no_grad():
        whole, losses = unroll(rule, theta, problems, state, STEPS, batches())
        g = batches()
        half, first = unroll(rule, theta, problems, state, 3, g)
        rest, second = unroll(rule, theta, problems, half, STEPS - 3, g)
    assert identical(whole, rest)
    assert losses.equal(torch.cat([first, second]))


REFUSED = {
    "another rule": (Adam(), FAMILY),
    "means over tensors": (STAR(mean_magnitude=True), FAMILY),
    "width multipliers": (MLP(hidden=(8, 6), mup=True), FAMILY),
    "a norm": (RULE, ImageMLP(width=12, norm="layer", batch_size=20)),
    "another criterion": (RULE, ImageMLP(width=12, criterion="mse", batch_size=20)),
    "sampled labels": (RULE, ImageMLP(width=12, label_noise=(0.1, 0.2), batch_size=20)),
    "a reparametrisation": (RULE, Reparametrized(FAMILY)),
    "delayed gradients": (RULE, DelayedGradients(FAMILY)),
}


@pytest.mark.parametrize(("rule", "family"), REFUSED.values(), ids=REFUSED.keys())
def test_what_the_kernel_does_not_know_is_left_to_the_engine(rule, family):
    theta, problems, state = problem(rule, family)
    g = batches()
    before = g.get_state()
    with torch.no_grad():
        assert l2o.fused.unroll(rule, theta, problems, state, STEPS, g) is None
    assert g.get_state().equal(before)


def test_a_derivative_that_the_kernel_has_not_is_left_to_the_engine():
    theta, problems, state = problem(RULES[1], FAMILY)
    theta["b0"].requires_grad_()
    assert l2o.fused.unroll(RULES[1], theta, problems, state, STEPS, batches()) is None


@pytest.mark.parametrize("settings", [{"second_order": False}, {"valid_weight": 0.5}], ids=str)
def test_first_order_and_validation_data_are_the_engines(monkeypatch, settings):
    def refuse(*_):
        raise AssertionError("the kernel has whole derivatives alone, and no validation data")

    monkeypatch.setattr(l2o.fused, "unroll", refuse)
    theta, problems, state = problem(RULE, FAMILY)
    leaves = {name: t.requires_grad_() for name, t in theta.items()}
    _, losses = unroll(RULE, leaves, problems, state, 2, batches(), **settings)
    assert torch.autograd.grad(losses.sum(), list(leaves.values()))[0].abs().max() > 0


@pytest.mark.parametrize("rule", RULES, ids=type)
def test_a_diverged_lane_shows_and_harms_no_other(rule):
    theta, problems, state = problem(rule, FAMILY)
    sick = {name: t.clone() for name, t in theta.items()}
    sick["b2"][0] = float("nan")
    with torch.no_grad():
        well, losses = unroll(rule, theta, problems, state, STEPS, batches())
        ill, lost = unroll(rule, sick, problems, state, STEPS, batches())
    assert lost[1:, 0].isnan().all()
    assert lost[:, 1:].equal(losses[:, 1:])
    for name, p in ill.params.items():
        assert p[1:].equal(well.params[name][1:])


@pytest.mark.parametrize("rule", RULES, ids=type)
def test_pes_is_the_same_with_and_without_kernels(monkeypatch, rule):
    g = generator()
    theta = rule.init_theta(g)
    estimator = Evolution(rule, FAMILY, lanes=4, horizon=8, truncation=4)
    results = []
    for kernels in ("1", "0"):
        monkeypatch.setenv("L2O_KERNELS", kernels)
        same = generator(3)
        state = estimator.init(theta, same)
        for _ in range(2):
            grads, state, metrics = estimator.estimate(theta, state, same)
        results.append((grads, metrics["meta_loss"]))
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-5)
    one, two = (torch.cat([t.flatten() for t in grads.values()]) for grads, _ in results)
    assert torch.cosine_similarity(one, two, dim=0) > 0.99
