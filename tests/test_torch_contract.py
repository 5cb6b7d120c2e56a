"""What torch's generic tests ask of an optimizer, of every rule: its tables of bad inputs and schedulers, and in our
own words what its wheel does not carry (test/test_optim.py of torch 2.13, TestOptimRenewed)."""

from __future__ import annotations

import copy
import sys
import types
import unittest
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plugin import copies, every_rule, make, parameters, set_gradients, snapshot, train, untouched
from tables import identical
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from l2o.optim import LearnedOptimizer
from l2o.rules import SGD, Adam
from l2o.types import ParameterError, UpdateRule

sys.modules.setdefault("expecttest", types.ModuleType("expecttest")).__dict__.setdefault("TestCase", unittest.TestCase)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's own, of an import of its tests
    # Asks for expecttest, of which nothing is used here.
    from torch.testing._internal.common_optimizers import get_error_inputs_for_all_optims, optim_db

ERRORS = get_error_inputs_for_all_optims("cpu", torch.float32)
SCHEDULERS = [made for info in optim_db for made in info.scheduler_inputs if info.name in ("SGD", "Adam", "AdamW")]


@pytest.mark.parametrize("bad", ERRORS, ids=lambda bad: bad.optimizer_error_input.desc)
def test_errors(bad: Any) -> None:
    given = bad.optimizer_error_input
    params = [nn.Parameter(torch.ones(1))] if given.params is None else given.params
    message = "lr=.*expected" if "lr" in given.kwargs else bad.error_regex  # ours says what came
    if issubclass(bad.error_type, Warning):
        with pytest.warns(bad.error_type, match=message):
            make(params, **given.kwargs)
    else:
        with pytest.raises(bad.error_type, match=message):
            make(params, **given.kwargs)


@pytest.mark.parametrize("schedulers", SCHEDULERS)
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_schedulers_set_the_rates_that_they_set_for_torch(schedulers: Any, lr: Any) -> None:
    rates = []
    for kind in (torch.optim.SGD, lambda params, lr: make(params, SGD(), lr=lr, total_steps=50)):
        weight, bias = (nn.Parameter(torch.ones(shape)) for shape in [(3, 2), (3,)])
        optimizer = kind([{"params": [weight]}, {"params": [bias], "lr": 0.01}], lr=copy.deepcopy(lr))
        made = [each(optimizer) for each in schedulers]
        for _ in range(25):
            weight.grad, bias.grad = torch.ones(3, 2), torch.ones(3)
            optimizer.step()
            for each in made:
                each.step(*([1.0] if isinstance(each, torch.optim.lr_scheduler.ReduceLROnPlateau) else []))
            rates.append([float(group["lr"]) for group in optimizer.param_groups])
    torch.testing.assert_close(*torch.tensor(rates).chunk(2))
    assert isinstance(optimizer.param_groups[0]["lr"], type(lr))


def without_gradients(rule: UpdateRule) -> None:
    """A step is none where no parameter has a gradient."""
    params = parameters()
    optimizer = make(params, rule, weight_decay=0.5)
    before = copies(params)
    optimizer.step(lambda: torch.tensor(1.0))
    assert identical([p.data for p in params], [p.data for p in before])
    assert untouched(optimizer)


def zero_gradients(rule: UpdateRule) -> None:
    """A step is none where all gradients have been zero."""
    params = parameters()
    before = copies(params)
    optimizer = make(params, rule)
    for _ in range(3):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step(lambda: torch.tensor(1.0))
    assert identical([p.data for p in params], [p.data for p in before])


def rate_of_a_group(rule: UpdateRule) -> None:
    """A group's own rate counts for it alone."""
    params = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3, 2))]
    optimizer = make([{"params": params[:1]}, {"params": params[1:], "lr": 0.0}], rule)
    train(optimizer, range(3))
    assert not torch.equal(params[0], torch.ones(3, 2))
    assert torch.equal(params[1], torch.ones(3, 2))


def rate_as_a_tensor(rule: UpdateRule) -> None:
    """A tensor as rate takes the steps of its number, stays the tensor that was given, and may be written to."""
    params, rate = parameters(), torch.tensor(0.5)
    optimizer, plain = make(params, rule, lr=rate), make(copies(params), rule, lr=0.5)
    train(optimizer, range(2))
    rate.fill_(0.25)
    train(plain, range(2))
    plain.param_groups[0]["lr"] = 0.25
    assert identical(train(optimizer, range(2, 4)), train(plain, range(2, 4)))
    assert optimizer.param_groups[0]["lr"] is rate
    fresh = make(copies(params), rule, lr=torch.tensor(1.0))
    fresh.load_state_dict(optimizer.state_dict())
    rate.fill_(9.0)
    assert isinstance(fresh.param_groups[0]["lr"], torch.Tensor)
    assert fresh.param_groups[0]["lr"] == 0.25


def first_step_with_rate_zero(rule: UpdateRule) -> None:
    """A warm-up that begins at 0 is a step like any other, with its gradients; and so is one without any."""
    params = parameters()
    optimizer, plain = make(params, rule, lr=0.0), make(copies(params), rule, lr=0.0)
    start = [p.detach().clone() for p in params]
    for each in (optimizer, plain):
        train(each, range(1))
    assert identical([p.data for p in params], start)
    assert optimizer.param_groups[0]["run"]["step"] == 1
    if not rule.needs_loss:
        fresh = make(copies(params), rule, lr=0.0)
        for p in fresh.param_groups[0]["params"]:
            p.grad = torch.zeros_like(p)
        fresh.step()
        assert fresh.param_groups[0]["run"]["step"] == 0
        fresh.param_groups[0]["lr"] = 1.0
        again = make(copies(params), rule)
        assert identical(train(fresh, range(2)), train(again, range(2)))


def hooks_of_a_step(rule: UpdateRule) -> None:
    """Hooks before and after a step, of the optimizer and of all, are called in torch's order."""
    params, order = parameters(), []
    optimizer = make(params, rule)
    handles = [
        register_optimizer_step_pre_hook(lambda *_: order.append("all before")),
        register_optimizer_step_post_hook(lambda *_: order.append("all after")),
        optimizer.register_step_pre_hook(lambda *_: order.append("before")),
        optimizer.register_step_post_hook(lambda *_: order.append("after")),
    ]
    train(optimizer, range(1))
    for handle in handles:
        handle.remove()
    train(optimizer, range(1, 2))
    assert order == ["all before", "before", "after", "all after"]


def hooks_of_the_state(rule: UpdateRule) -> None:
    """Hooks before and after ``state_dict`` see it, and may change what it returns."""
    optimizer = make(parameters(), rule)
    train(optimizer, range(1))
    seen: list[Any] = []
    optimizer.register_state_dict_pre_hook(lambda each: seen.append(each))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "note": 1})
    state = optimizer.state_dict()
    assert (seen, state.pop("note")) == ([optimizer], 1)
    make(parameters(), rule).load_state_dict(state)


def attributes_of_a_copy(rule: UpdateRule) -> None:
    """A deep copy has all public attributes, and shares no state."""
    optimizer = make(parameters(), rule)
    train(optimizer, range(1))
    other = copy.deepcopy(optimizer)
    public = {name for name in dir(optimizer) if not name.startswith("_")}
    assert public == {name for name in dir(other) if not name.startswith("_")}
    before = snapshot(other)
    train(optimizer, range(1, 3))
    assert identical(snapshot(other), before)


def names_come_and_go(rule: UpdateRule) -> None:
    """State of parameters with names loads into ones without, and the reverse."""
    for saved_named in (True, False):
        saved, fresh = (
            make([(f"p{i}", p) for i, p in enumerate(parameters())] if named else parameters(), rule)
            for named in (saved_named, not saved_named)
        )
        train(saved, range(2))
        fresh.load_state_dict(saved.state_dict())
        state = fresh.state_dict()
        assert identical(state["state"], saved.state_dict()["state"])
        assert "param_names" in state["param_groups"][0]  # as torch has it, for either


def closures_that_move_parameters(rule: UpdateRule) -> None:
    """A closure may write to parameters and gradients; the step is from what it leaves."""
    params = parameters()
    optimizer, plain = make(params, rule), make(copies(params), rule)

    def closure() -> torch.Tensor:
        with torch.no_grad():
            for p in params:
                p.mul_(0.5)
        set_gradients(params, 0)
        return torch.tensor(1.0)

    optimizer.step(closure)
    for p in plain.param_groups[0]["params"]:
        p.data.mul_(0.5)
    set_gradients(plain.param_groups[0]["params"], 0)
    plain.step(lambda: torch.tensor(1.0))
    assert identical([p.data for p in params], [p.data for p in plain.param_groups[0]["params"]])


CONTRACT: list[Callable[[UpdateRule], None]] = [
    without_gradients,
    zero_gradients,
    rate_of_a_group,
    rate_as_a_tensor,
    first_step_with_rate_zero,
    hooks_of_a_step,
    hooks_of_the_state,
    attributes_of_a_copy,
    names_come_and_go,
    closures_that_move_parameters,
]


@every_rule
@pytest.mark.parametrize("holds", CONTRACT, ids=lambda each: each.__name__)
def test_the_contract_of_an_optimizer(holds: Callable[[UpdateRule], None], rule: UpdateRule) -> None:
    holds(rule)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.int64])
def test_numbers_that_rules_do_not_know(dtype: torch.dtype) -> None:
    with pytest.raises(ParameterError, match=r"parameter 0 is .*expected dense and floating point"):
        LearnedOptimizer([torch.ones(2, dtype=dtype)], "default", total_steps=2)


def test_profilers_show_a_step_by_its_name() -> None:
    params = parameters()
    optimizer = make(params, Adam())
    set_gradients(params, 0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    assert any("LearnedOptimizer.step" in event.key for event in profile.key_averages())
