"""The plug-in with the kernel of Steered steps: the same run, resumed and skipped as without."""

import dataclasses

import pytest
import torch
from plugin import snapshot, source
from steered_rules import every_direction
from tables import generator, identical
from torch import nn

import l2o.fused
from l2o.optim import LearnedOptimizer, apply
from l2o.rules import Steered


@dataclasses.dataclass(frozen=True)
class Noted(Steered):
    notes: list = dataclasses.field(default_factory=list)


def trained(steps, rule, **settings):
    """The optimizer of a small model, after some steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = LearnedOptimizer(model.parameters(), source(rule), total_steps=20, **settings)
    for step in range(steps):
        for i, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=generator(10 * step + i))
        optimizer.step(**({"loss": 1.0 / (step + 1)} if optimizer.rule.needs_loss else {}))
    return optimizer


def values(optimizer):
    return [p.detach().clone() for p in optimizer.param_groups[0]["params"]]


@pytest.fixture
def worth(monkeypatch):
    """Kernels in runs of any length; the steps that took one."""
    taken, step = [], l2o.fused.step
    monkeypatch.setattr(apply, "WORTH_A_KERNEL", 0)
    monkeypatch.setattr(l2o.fused, "step", lambda *args: taken.append(1) or step(*args))
    return taken


@every_direction
def test_the_plug_in_takes_the_kernel_where_a_run_is_worth_it(rule, request):
    plain = trained(5, rule, lr=0.5, weight_decay=0.2)
    taken = request.getfixturevalue("worth")
    fused = trained(5, rule, lr=0.5, weight_decay=0.2)
    assert len(taken) == 5
    torch.testing.assert_close(values(fused), values(plain), rtol=1e-4, atol=2e-5)


def test_a_state_dict_stays_what_it_was_and_resumes(worth):
    optimizer = trained(3, Steered())
    saved, kept, start = optimizer.state_dict(), snapshot(optimizer), values(optimizer)
    ends = []
    for _ in range(2):
        with torch.no_grad():
            torch._foreach_copy_(optimizer.param_groups[0]["params"], start)
        optimizer.load_state_dict(saved)
        optimizer.step()
        optimizer.step()
        assert identical(saved, kept)
        ends.append(values(optimizer))
    assert identical(*ends)
    assert len(worth) == 7


def test_the_default_device_does_not_matter(worth):
    optimizer = trained(2, Steered())
    torch.set_default_device("meta")
    try:
        optimizer.step()
    finally:
        torch.set_default_device(None)
    assert len(worth) == 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e20])
def test_a_gradient_that_is_not_finite_is_skipped_in_place_too(bad, worth):
    optimizer = trained(3, Steered())
    state, start = snapshot(optimizer)["state"], values(optimizer)
    optimizer.param_groups[0]["params"][1].grad[0] = bad
    with pytest.warns(UserWarning, match="step 4 was skipped: the gradient of parameter 1 is not finite") as said:
        optimizer.step()
    assert said[0].filename == __file__
    assert optimizer.skipped_steps == 1
    assert identical(values(optimizer), start)
    now = snapshot(optimizer)["state"]
    assert identical(now, state)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e25])
def test_a_loss_that_is_not_finite_is_skipped_in_place_too(bad, worth):
    """What the network reads of it comes a step later: nothing of this step would show it."""
    optimizer = trained(3, Steered(direction="diagonal", controller="mlp", reads_loss=True))
    state, start = snapshot(optimizer)["state"], values(optimizer)
    shared = {name: t.clone() for name, t in optimizer.param_groups[0]["run"]["shared"].items()}
    with pytest.warns(UserWarning, match="step 4 was skipped"):
        optimizer.step(loss=bad)
    assert optimizer.skipped_steps == 1
    assert identical((values(optimizer), snapshot(optimizer)["state"]), (start, state))
    assert identical(dict(optimizer.param_groups[0]["run"]["shared"]), shared)
    optimizer.step(loss=0.2)
    assert optimizer.skipped_steps == 1


@every_direction
def test_a_parameter_that_is_not_finite_spoils_no_other(rule, worth):
    optimizer = trained(3, rule)
    broken, *others = optimizer.param_groups[0]["params"]
    broken.data[0, 0] = float("nan")
    before = [p.clone() for p in others]
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert all(p.isfinite().all() and not torch.equal(p, old) for p, old in zip(others, before, strict=True))
    assert all(t.isfinite() for t in optimizer.param_groups[0]["run"].get("shared", {}).values())


def test_a_rule_of_ones_own_that_cannot_be_hashed_steps_by_torch(worth):
    optimizer = trained(2, Noted())
    assert optimizer.skipped_steps == 0
    assert len(worth) == 2


@pytest.mark.filterwarnings("ignore:step 4 was skipped")
def test_a_state_that_is_not_finite_skips_the_step_with_nothing_written(worth):
    """It would reach all tensors through the controller."""
    optimizer = trained(3, Steered())
    optimizer.state[optimizer.param_groups[0]["params"][0]]["d"].data[0, 0] = float("nan")
    start = values(optimizer)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert identical(values(optimizer), start)
