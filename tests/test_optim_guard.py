"""What must not happen in a step: half of it, numbers that are not finite, entries that move without a gradient."""

from __future__ import annotations

import dataclasses
import math
import warnings
import weakref
from collections.abc import Mapping

import plugin
import pytest
import torch
from plugin import Mixing, copies, every_rule, make, parameters, snapshot, source, through_a_file, train, untouched
from tables import identical, in_eigenbasis
from torch import nn

from l2o.optim import LearnedOptimizer, guard, learned
from l2o.rules import MLP, SGD, Adam
from l2o.types import ConfigurationError, OptState, ParameterError


@pytest.fixture(params=["readable", "device"])
def device(request, monkeypatch):
    """As on a CPU, and as where reading a number would wait for the device."""
    if request.param == "device":
        monkeypatch.setattr(learned, "readable", lambda device: False)
    return request.param


def silent(call, *arguments, **named):
    """Without the warning that a step was skipped."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*skipped")
        return call(*arguments, **named)


def spoiled(optimizer, value, index=2):
    """A step with one entry of one gradient replaced."""
    params = optimizer.param_groups[0]["params"]
    plugin.set_gradients(params, 50)
    params[index].grad.view(-1)[0] = value
    silent(optimizer.step, loss=1.0)


@every_rule
@pytest.mark.parametrize("bad", [math.nan, -math.inf, 1e20])
def test_a_gradient_that_is_not_finite_skips_the_step_as_if_it_had_not_been_called(rule, bad, device):
    """At the first step and in the middle. Where only the device knows of skipped steps, bases follow the calls."""
    rule = dataclasses.replace(rule, period=1) if in_eigenbasis(rule) and device == "device" else rule
    optimizer, plain = (make(parameters(), rule, weight_decay=0.1) for _ in range(2))
    spoiled(optimizer, bad)
    train(optimizer, range(2))
    spoiled(optimizer, bad)
    spoiled(optimizer, bad, index=0)
    assert identical(train(optimizer, range(2, 4)), train(plain, range(4)))
    assert optimizer.skipped_steps == 3
    states = [snapshot(each)["state"] for each in (optimizer, plain)]
    assert [plugin.counts(each)["step"] for each in (optimizer, plain)] == [7, 4]
    for key, slots in states[1].items():
        assert identical([states[0][key][name] for name in slots], list(slots.values()))


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_where_reading_would_wait_the_steps_are_the_same(rule, dtype, monkeypatch):
    optimizer, plain = (make(parameters(dtype), rule, weight_decay=0.1) for _ in range(2))
    expected = train(plain, range(4))
    monkeypatch.setattr(learned, "readable", lambda device: False)
    assert identical(train(optimizer, range(4)), expected)


@pytest.mark.parametrize("loss", [math.nan, math.inf, torch.tensor(math.nan)])
def test_a_loss_that_is_not_finite_skips_the_step_of_a_rule_that_reads_it(loss, device):
    for rule, skipped in ((Mixing(), 1), (SGD(), 0)):
        optimizer = make(parameters(), rule)
        plugin.set_gradients(optimizer.param_groups[0]["params"], 0)
        silent(optimizer.step, loss=loss)
        assert optimizer.skipped_steps == skipped


class Dividing(SGD):
    """Whose update of a gradient of 1 is infinite."""

    def step(self, theta, grad, slots):
        return 1.0 / (grad - 1.0)


def test_an_update_that_is_not_finite_skips_the_step(device):
    p = nn.Parameter(torch.zeros(2))
    optimizer = make([p], Dividing())
    for grad, skipped in (([1.0, 3.0], 1), ([2.0, 3.0], 1)):
        p.grad = torch.tensor(grad)
        silent(optimizer.step)
        assert optimizer.skipped_steps == skipped
    assert p.tolist() == [1.0, 0.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_how_large_a_gradient_may_be_is_a_matter_of_the_arithmetic(dtype):
    optimizer = make(parameters(dtype), Adam())
    spoiled(optimizer, 1e20)
    assert optimizer.skipped_steps == (0 if dtype == torch.float64 else 1)


def test_skipped_steps_are_warned_of_once_with_the_culprit_and_counted_over_a_resume():
    named = [(f"p{i}", p) for i, p in enumerate(parameters())]
    optimizer = make(named, Adam())
    train(optimizer, range(1))
    plugin.set_gradients([p for _, p in named], 1)
    named[2][1].grad[0] = math.nan
    message = r"step 2 was skipped: the gradient of parameter 2 \('p2'\).*skipped_steps"
    with pytest.warns(UserWarning, match=message) as caught:
        optimizer.step()
    optimizer.step()  # warnings are errors
    assert [each.filename for each in caught] == [__file__]
    fresh = make([(n, nn.Parameter(p.detach().clone())) for n, p in named], Adam())
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    assert fresh.skipped_steps == 2


def test_a_device_is_asked_now_and_then_whether_steps_were_skipped(monkeypatch):
    monkeypatch.setattr(learned, "readable", lambda device: False)
    monkeypatch.setattr(learned, "_LOOK", 3)
    p = nn.Parameter(torch.ones(2))
    optimizer = make([p])
    p.grad = torch.tensor([math.nan, 1.0])
    for _ in range(3):
        optimizer.step()
    with pytest.warns(UserWarning, match="3 of 3 steps were skipped.*skipped_steps") as caught:
        optimizer.step()
    for _ in range(4):
        optimizer.step()
    assert [each.filename for each in caught] == [__file__]
    fresh = make([nn.Parameter(torch.ones(2))])
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    assert plugin.counts(fresh) == {"step": 8, "skipped": 8}


@every_rule
def test_entries_that_never_had_a_gradient_stay(rule):
    """Padding rows and pruned weights, also over a resume; they move from their first gradient on."""
    params = [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(3))]
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    optimizer = make(params, rule)
    for step in range(4):
        plugin.set_gradients(params, step)
        params[0].grad = (params[0].grad + 0.1) * mask
        optimizer.step(loss=1.0)
        if step == 1:
            fresh = make(params, rule)
            fresh.load_state_dict(through_a_file(optimizer.state_dict()))
            optimizer = fresh
    assert torch.equal(params[0] == 1.0, mask == 0.0)
    params[0].grad = torch.ones(4, 3)
    optimizer.step(loss=1.0)
    assert not (params[0] == 1.0).any()


class Odd(SGD):
    """Whose update has another shape."""

    def step(self, theta, grad, slots):
        return super().step(theta, grad, slots).sum()


def without(name):
    return lambda optimizer: optimizer.param_groups[0].pop(name)


def setting(name, value):
    return lambda optimizer: optimizer.param_groups[0].update({name: value})


def expanded(optimizer):
    optimizer.param_groups[0]["params"][-1].data = torch.ones(1, 2).expand(4, 2)
    optimizer.param_groups[0]["params"][-1].grad = torch.ones(4, 2)


def inference(optimizer):
    with torch.inference_mode():
        tensor = torch.ones(4, 2)
    tensor.grad = torch.ones(4, 2)
    optimizer.param_groups[0]["params"][-1] = tensor


SPOILED = {
    "no lr": (without("lr"), ConfigurationError, "no 'lr'"),
    "no weight_decay": (without("weight_decay"), ConfigurationError, "no 'weight_decay'"),
    **{
        f"{name}={value}": (setting(name, value), ConfigurationError, f"{name}=.*expected")
        for name in ("lr", "weight_decay")
        for value in (None, math.nan, math.inf, -1.0, "0.1", torch.ones(2))
    },
    "kind": (setting("kind", "tensor"), ConfigurationError, "kind="),
    "expanded": (expanded, ParameterError, "parameter 1 is expanded.*clone"),
    "inference": (inference, ParameterError, "parameter 1 was made in inference mode"),
}


@pytest.mark.parametrize(("spoil", "error", "message"), SPOILED.values(), ids=SPOILED)
def test_what_is_wrong_at_a_step_is_said_before_anything_is_written(spoil, error, message):
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(4, 2))]
    optimizer = make(params, Adam())
    for p in params:
        p.grad = torch.ones_like(p)
    spoil(optimizer)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert torch.equal(params[0], torch.ones(2))
    assert untouched(optimizer)


def test_an_update_of_another_shape_is_the_rules_fault():
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = make([p], Odd())
    with pytest.raises(ConfigurationError, match=r"Odd.*update of parameter 0 is \(\), expected \(2,\)"):
        optimizer.step()
    assert untouched(optimizer)


def test_a_rate_may_be_a_tensor_of_one_number():
    p = nn.Parameter(torch.ones(2))
    optimizer = make([p], SGD(lr=0.1), lr=torch.tensor(0.5))
    for rate in (0.5, torch.tensor(0.5)):
        optimizer.param_groups[0]["lr"] = rate
        p.grad = torch.ones(2)
        optimizer.step()
    assert p.tolist() == pytest.approx([0.9, 0.9])


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


@every_rule
@pytest.mark.parametrize("inside", [autocast, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_the_same_wherever_it_is_called(rule, inside, dtype):
    """And what it leaves can be used outside."""
    params = parameters(dtype)
    optimizer, plain = make(params, rule), make(copies(params), rule)
    with inside():
        train(optimizer, range(2))
    train(plain, range(2))
    assert identical(snapshot(optimizer), snapshot(plain))
    assert identical(train(optimizer, range(2, 4)), train(plain, range(2, 4)))
    kept = [t for slots in optimizer.state.values() if isinstance(slots, Mapping) for t in slots.values()]
    assert not any(t.is_inference() for t in kept if torch.is_tensor(t))


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_default_dtype_does_not_matter(rule, dtype):
    params = parameters(dtype)
    plain = make(copies(params), rule)
    theta = source(rule)[1]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        optimizer = LearnedOptimizer(params, (rule, theta), total_steps=plugin.TOTAL)
        for step in range(3):
            for p, grad in zip(params, gradients(params, step), strict=True):
                p.grad = grad
            optimizer.step(loss=0.5)
        assert identical(source(rule)[1], theta)  # float32 too
    finally:
        torch.set_default_dtype(before)
    others = plain.param_groups[0]["params"]
    for step in range(3):
        for p, grad in zip(others, gradients(others, step), strict=True):
            p.grad = grad
        plain.step(loss=0.5)
    assert identical(snapshot(optimizer), snapshot(plain))
    assert identical([p.data for p in params], [p.data for p in others])


def gradients(params, step):
    """Without a draw in the default dtype."""
    return [torch.full_like(p, 0.1 + step) for p in params]


def test_a_state_that_was_cleared_starts_anew():
    params = parameters()
    optimizer = make(params, MLP())
    train(optimizer, range(2))
    optimizer.state.clear()
    fresh = make(copies(params), MLP())
    assert identical(train(optimizer, range(2)), train(fresh, range(2)))
    assert plugin.counts(optimizer) == plugin.counts(fresh)


def test_moved_parameters_of_a_group_are_seen():
    """Some code puts other tensors into a group."""
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    optimizer = make([first], MLP())
    train(optimizer, range(1))
    optimizer.param_groups[0]["params"][0] = second
    train(optimizer, range(1, 2))
    assert optimizer.state[second]["m"].shape == (6, 3)


def test_a_masked_state_takes_the_place_of_the_new_one(monkeypatch):
    """Tensor by tensor: never are there two of both."""
    old, new = (OptState({"p": {"m": torch.full((3,), x), "v": torch.full((3,), 2 * x)}}, {}) for x in (1.0, 5.0))
    made = [weakref.ref(t) for t in new.per_param["p"].values()]
    where, left = torch.where, []

    def counting(*arguments):
        left.append(sum(t() is not None for t in made))
        return where(*arguments)

    monkeypatch.setattr(torch, "where", counting)
    _, got = guard.masked(torch.tensor(False), {}, new, old)
    assert left == [2, 1]
    assert identical(list(got.per_param["p"].values()), list(old.per_param["p"].values()))
