"""Whose state a saved one is: of another rule, an older version, other code, parameters in another order."""

import copy
import dataclasses
import math

import pytest
import torch
from plugin import TOTAL, copies, every_rule, make, parameters, snapshot, source, through_a_file, train, untouched
from tables import identical
from torch import nn

from l2o.optim import LearnedOptimizer
from l2o.optim.resume import origin
from l2o.rules import LSTM, MLP, SGD, Adam, Steered
from l2o.types import ResumeError


def older(state):
    """As an l2o saved it that neither counted skipped steps nor said what a state is of."""
    state = copy.deepcopy(state)
    run = state["param_groups"][0].pop("run")
    for slots in state["state"].values():
        slots.pop("had_gradient", None)
    state["state"] |= {"clock": {"step": run["step"]}} | ({"shared": run["shared"]} if "shared" in run else {})
    return state


def old(state):
    """As l2o saved it before distributed checkpoints: what is of no single parameter stood in the state."""
    known = older(state)
    run = state["param_groups"][0]["run"]
    slots = {key: dict(kept) for key, kept in state["state"].items()}
    known["state"].update(slots)
    known["state"]["clock"] = {"step": run["step"], "skipped": run["skipped"]}
    return known | {"state": known["state"] | {"origin": {k: run[k] for k in ("checkpoint", "fingerprint")}}}


def without(name):
    def change(state):
        state["param_groups"][0].pop(name)

    return change


def with_lr(value):
    return lambda state: state["param_groups"][0].update(lr=value)


@pytest.mark.parametrize(
    ("other", "change", "message"),
    [
        (lambda: torch.optim.Adam(parameters()), None, "another optimizer"),
        (lambda: make(parameters(), LSTM()), None, "of a run with LSTM.*has MLP.*another rule"),
        (lambda: make(parameters(), LSTM()), older, "'h0'.*'m'"),
        (lambda: make(parameters(), MLP(decays=(0.5, 0.9))), None, "another rule"),
        (lambda: make(parameters(), MLP(decays=(0.5, 0.9))), older, r"\(2,\).*\(6,\)"),
        (lambda: make(parameters(), MLP(step_mult=0.5)), None, "step_mult=0.5"),
        (lambda: LearnedOptimizer(parameters(), "mlp-digits", total_steps=TOTAL), None, "run with mlp-digits"),
        (lambda: make([nn.Parameter(p.detach()[..., None]) for p in parameters()], MLP()), None, "parameter 0"),
        (lambda: make(parameters(), MLP()), without("params"), r"param_groups'\]\[0\] has no 'params'"),
        (lambda: make(parameters(), MLP()), lambda s: s["state"].update({0: None}), "NoneType for parameter 0"),
        (lambda: make(parameters(), MLP()), without("lr"), r"param_groups'\]\[0\]: .*no 'lr'"),
        (lambda: make(parameters(), MLP()), without("weight_decay"), "no 'weight_decay'"),
        *((lambda: make(parameters(), MLP()), with_lr(v), "lr=") for v in (None, math.nan, -1.0, "1", torch.ones(2))),
        (lambda: make(parameters(), MLP()), lambda state: {"w": torch.ones(2)}, "'param_groups'"),
    ],
)
def test_state_of_another_optimizer_changes_nothing(other, change, message):
    foreign = other()
    train(foreign, range(1))
    state = snapshot(foreign)
    state = (change(state) or state) if change else state
    optimizer = make(parameters(), MLP())
    train(optimizer, range(1))
    before = snapshot(optimizer)
    with pytest.raises(ResumeError, match=message):
        optimizer.load_state_dict(state)
    assert identical(snapshot(optimizer), before)
    assert not optimizer._optimizer_load_state_dict_post_hooks


@every_rule
@pytest.mark.parametrize("before", [old, older])
def test_state_of_an_older_version_continues_bit_for_bit(rule, before):
    params = parameters()
    optimizer = make(params, rule)
    for step in range(3):  # without zeros, so that no entry waits for its first gradient
        for p in params:
            p.grad = torch.full_like(p, 1.0 + step)
        optimizer.step(loss=1.0)
    fresh = make(copies(params), rule)
    state = before(optimizer.state_dict())
    kept = copy.deepcopy(state)
    fresh.load_state_dict(state)
    assert identical(state, kept)
    assert identical(train(fresh, range(3, 6)), train(optimizer, range(3, 6)))
    runs = [each.param_groups[0]["run"] for each in (fresh, optimizer)]
    assert identical(*([run[name] for name in sorted(run)] for run in runs))


def test_a_hyperparameter_at_its_default_does_not_make_another_origin():
    Newer = dataclasses.make_dataclass("SGD", [("damping", float, 0.0)], bases=(SGD,), frozen=True)
    theta = source(SGD())[1]
    assert origin("a", SGD(), theta) == origin("a", Newer(), theta) != origin("a", Newer(damping=1.0), theta)
    assert origin("a", SGD(), theta) != origin("a", SGD(), {"log_lr": theta["log_lr"] + 1e-6})


@every_rule
def test_what_other_code_keeps_in_the_state_stays_and_does_not_matter(rule):
    params = parameters()
    optimizer, plain = make(params, rule), make(copies(params), rule)
    optimizer.state[params[0]]["note"] = "before the first step"
    train(optimizer, range(1))
    optimizer.state["count"], optimizer.state[params[1]]["copy"] = 1, torch.ones(2, dtype=torch.int32)
    optimizer.state[params[1]]["nested"] = {"scale": torch.ones(2), "ids": [1, 2]}
    fresh = make(copies(params), rule)
    state = through_a_file(optimizer.state_dict())
    fresh.load_state_dict(state)
    state["state"][1]["nested"]["scale"].zero_()
    train(plain, range(1))
    assert identical(train(fresh, range(1, 3)), train(plain, range(1, 3)))
    kept = [fresh.param_groups[0]["params"][i] for i in (0, 1)]
    assert fresh.state["count"] == 1
    assert fresh.state[kept[0]]["note"] == "before the first step"
    assert fresh.state[kept[1]]["copy"].tolist() == [1, 1]
    assert identical(fresh.state[kept[1]]["nested"], optimizer.state[params[1]]["nested"])


def named(*groups):
    """Equal shapes, so that names alone tell them apart."""
    return make([{"params": [(n, nn.Parameter(torch.zeros(3))) for n in names]} for names in groups], Adam())


def by_name(optimizer):
    pairs = [pair for g in optimizer.param_groups for pair in zip(g["param_names"], g["params"], strict=True)]
    return {name: optimizer.state[p]["m"].tolist() for name, p in pairs}


@pytest.mark.parametrize("groups", [("abcd",), ("dcba",), ("bacd",), ("ab", "cd"), ("cd", "ab"), ("dc", "ba")])
def test_named_parameters_find_their_state_in_any_order(groups):
    saved = named("ab", "cd") if len(groups) == 2 else named("abcd")
    for i, group in enumerate(saved.param_groups):
        group["lr"] = 0.5 + i
    train(saved, range(1))
    fresh = named(*groups)
    fresh.load_state_dict(saved.state_dict())
    assert by_name(fresh) == by_name(saved)
    assert {n: g["lr"] for g in fresh.param_groups for n in g["param_names"]} == {
        n: g["lr"] for g in saved.param_groups for n in g["param_names"]
    }
    assert [g["param_names"] for g in fresh.param_groups] == [list(names) for names in groups]


@pytest.mark.parametrize("groups", [("abc", "d"), ("ac", "bd"), ("ab", "xc")])
def test_names_at_another_place_are_refused(groups):
    saved, fresh = named("ab", "cd"), named(*groups)
    train(saved, range(1))
    with pytest.raises(ValueError, match=r"at another place|loaded state dict"):
        fresh.load_state_dict(saved.state_dict())
    assert untouched(fresh)


def test_other_names_at_the_same_places_do_not_matter():
    """A wrapped module puts a prefix before all of them, a new head has a name of its own."""
    for names in (["module.a", "module.b"], ["a", "x"]):
        saved, fresh = named("ab"), named(names)
        train(saved, range(1))
        fresh.load_state_dict(saved.state_dict())
        assert [*by_name(fresh).values()] == [*by_name(saved).values()]


@pytest.mark.parametrize("change", [lambda run: run.pop("shared"), lambda run: run["shared"].pop("fast")])
def test_a_state_without_what_all_parameters_share_is_refused(change):
    """As tools save it that know of nothing but the state of parameters."""
    optimizer, other = (make(parameters(), Steered()) for _ in range(2))
    train(optimizer, range(2))
    saved = snapshot(optimizer)
    change(saved["param_groups"][0]["run"])
    with pytest.raises(ResumeError, match="the shared slots"):
        other.load_state_dict(saved)
