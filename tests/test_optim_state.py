"""The plug-in's state: saved, loaded, copied and pickled, a run goes on as if nothing had happened, bit for bit."""

import copy
import pickle
import weakref

import pytest
import torch
from plugin import (
    TOTAL,
    Mixing,
    copies,
    counts,
    every_rule,
    make,
    parameters,
    snapshot,
    source,
    through_a_file,
    train,
    untouched,
)
from tables import identical
from torch import nn

import l2o.checkpoints.store
from l2o.checkpoints.pretrained import aliases
from l2o.optim import LearnedOptimizer, guard
from l2o.rules import MLP, SGD, Adam
from l2o.types import OptState, ResumeError


def pickled(value):
    return pickle.loads(pickle.dumps(value))  # noqa: S301 - the test's own


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "transport", [lambda state: state, through_a_file, copy.deepcopy], ids=["same", "file", "copy"]
)
def test_a_loaded_run_continues_bit_for_bit(rule, dtype, transport):
    params = parameters(dtype)
    optimizer = make(params, rule, weight_decay=0.1)
    train(optimizer, range(3))
    state = transport(optimizer.state_dict())
    before = copy.deepcopy(state)

    fresh = make(copies(params), rule)
    fresh.load_state_dict(state)
    assert identical(fresh.state_dict(), before)
    assert identical(train(fresh, range(3, 6)), train(optimizer, range(3, 6)))
    assert identical(fresh.state_dict(), optimizer.state_dict())
    assert not identical(fresh.state_dict(), before)
    assert identical(state, before)  # the caller's dict is not written to


def test_loading_copies():
    optimizer, fresh = make(parameters(), Mixing()), make(parameters(), Mixing())
    train(optimizer, range(1))
    state = snapshot(optimizer)
    fresh.load_state_dict(state)
    for slots in state["state"].values():
        for tensor in filter(torch.is_tensor, slots.values()):
            tensor.fill_(7.0)
    assert identical(fresh.state_dict(), optimizer.state_dict())


def test_the_state_has_parameters_alone_and_the_first_group_the_run():
    optimizer = make([{"params": parameters()[:3]}, {"params": parameters()[3:]}], Adam())
    assert not optimizer.state_dict()["state"]
    train(optimizer, range(2))
    state, groups = optimizer.state_dict().values()
    assert groups[0]["run"].items() >= {"step": 2, "skipped": 0, "checkpoint": repr(Adam())}.items()
    assert "run" not in groups[1]
    assert "run" not in repr(optimizer)
    assert all(set(slots) == {"m", "v", "count"} for slots in state.values())
    assert set(state) == set(range(7))


def test_the_number_of_steps_goes_on_and_the_length_is_the_new_one():
    optimizer = make(parameters(), MLP(), total_steps=3)
    train(optimizer, range(3))
    longer = make(parameters(), MLP(), total_steps=6)
    longer.load_state_dict(optimizer.state_dict())
    train(longer, range(3, 6))  # without the warning that a run over its length gives
    assert counts(longer)["step"] == 6


@pytest.mark.parametrize("clone", [copy.deepcopy, pickled])
@every_rule
def test_a_copy_of_the_optimizer_continues_on_its_own(rule, clone):
    params = parameters()
    optimizer = make(params, rule)
    train(optimizer, range(2))
    other, others = clone((optimizer, params))
    expected = train(optimizer, range(2, 4))
    assert identical(train(other, range(2, 4)), expected)
    assert identical([p.data for p in others], expected)
    train(other, range(4, 5))
    assert identical([p.data for p in params], expected)


def test_groups_settings_and_hooks_come_through():
    params = parameters(torch.bfloat16)  # whose state torch rounds before it is put in place
    optimizer = make([{"params": params[:3], "kind": "output"}, {"params": params[3:], "lr": 0.5}], Adam())
    train(optimizer, range(1))
    fresh = make([{"params": p} for p in (copies(params[:3]), copies(params[3:]))], Adam())
    seen = []
    fresh.register_load_state_dict_pre_hook(lambda _, state: {**state, "param_groups": state["param_groups"][:]})
    fresh.register_load_state_dict_post_hook(lambda o: seen.append(snapshot(o)))
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.param_groups[0]["kind"] == "output"
    assert [group["lr"] for group in fresh.param_groups] == [1.0, 0.5]
    assert identical(seen[0]["state"], optimizer.state_dict()["state"])
    assert len(fresh._optimizer_load_state_dict_post_hooks) == 1  # the test's own


def test_named_parameters_keep_their_names():
    model = nn.Linear(2, 2)
    optimizer = make(model.named_parameters(), MLP())
    train(optimizer, range(1))
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    fresh = make(nn.Linear(2, 2).named_parameters(), MLP())
    fresh.load_state_dict(optimizer.state_dict())
    assert identical(fresh.state_dict(), optimizer.state_dict())


def test_state_of_frozen_parameters_may_be_missing():
    params = parameters()
    optimizer = make(params, MLP())
    params[0].requires_grad_(False)
    for p in params[1:]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    fresh = make(copies(params), MLP())
    fresh.load_state_dict(optimizer.state_dict())
    assert set(fresh.state_dict()["state"]) == set(range(1, 7))
    train(fresh, range(1))


def test_a_module_may_move_or_widen_after_its_optimizer_was_made():
    model = nn.Linear(2, 2)
    optimizer = make(model.parameters(), MLP())
    train(optimizer, range(1))
    model.double()
    train(optimizer, range(1, 2))
    assert {optimizer.state[p]["m"].dtype for p in model.parameters()} == {torch.float64}


@pytest.mark.parametrize("groups", [[[0]], [[0, 1, 2]], [[0], [1]]], ids=["fewer", "more", "other groups"])
def test_another_number_of_parameters_is_torchs_error(groups):
    optimizer = make(parameters()[:2], Adam())
    train(optimizer, range(1))
    fresh = make([{"params": [parameters()[i] for i in group]} for group in groups], Adam())
    with pytest.raises(ValueError, match="loaded state dict"):
        fresh.load_state_dict(optimizer.state_dict())
    assert untouched(fresh)


def with_run(**run):
    return lambda group: group.update(run=run)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda group: group.pop("run"),
        lambda group: group.update(run=None),
        with_run(step="1"),
        with_run(step=-1),
        with_run(step=1, skipped=None),
    ],
)
def test_fresh_state_of_another_optimizer_is_refused_too(spoil):
    optimizer = make(parameters(), SGD())
    for foreign in (torch.optim.Adam(parameters()), torch.optim.SGD(parameters(), lr=0.1)):
        with pytest.raises(ResumeError, match="another optimizer"):
            optimizer.load_state_dict(foreign.state_dict())
    state = snapshot(optimizer)
    spoil(state["param_groups"][0])
    with pytest.raises(ResumeError, match="another optimizer"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 1.0
    assert untouched(optimizer)


def test_state_saved_before_the_first_step_loads():
    optimizer, fresh = make(parameters(), SGD()), make(parameters(), SGD())
    fresh.load_state_dict(optimizer.state_dict())
    assert identical(train(fresh, range(2)), train(optimizer, range(2)))


def test_it_is_made_from_a_path_and_shows_what_it_is(tmp_path):
    rule, theta = source(MLP(hidden=(4,)))
    l2o.checkpoints.store.save(tmp_path / "mine", rule, theta)
    params = parameters()
    expected = train(LearnedOptimizer(parameters(), (rule, theta), total_steps=TOTAL), range(2))
    optimizer = LearnedOptimizer(params, tmp_path / "mine", total_steps=TOTAL, lr=1, weight_decay=0.5)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    assert identical(train(optimizer, range(2)), expected)
    text = repr(optimizer)
    assert str(tmp_path / "mine") in text
    assert "MLP(hidden=(4,)" in text
    assert "step 2 of 20" in text
    assert "lr: 1.0" in text


@pytest.mark.parametrize("source", l2o.list_pretrained())
def test_a_pretrained_one_is_shown_by_its_name(source):
    assert f"\n{source}, " in repr(LearnedOptimizer(parameters(), source, total_steps=TOTAL))


def test_an_alias_is_shown_by_the_name_that_it_stands_for():
    name = aliases()["default"]
    optimizer = LearnedOptimizer(parameters(), "default", total_steps=TOTAL)
    assert f"\n{name}, " in repr(optimizer)
    assert optimizer.param_groups[0]["run"]["checkpoint"] == name


def test_a_rule_of_ones_own_is_loaded_when_its_class_is_given(tmp_path):
    l2o.checkpoints.store.save(tmp_path, *source(Mixing(memory=5)))
    optimizer = LearnedOptimizer(parameters(), tmp_path, total_steps=TOTAL, rules=[Mixing])
    assert optimizer.rule == Mixing(memory=5)


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
