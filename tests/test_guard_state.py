"""State of guarded runs: they resume to the bit wherever they are, and pass between guarded and unguarded ones."""

import copy

import pytest
import torch.distributed.checkpoint as dcp
from guarding import TOTAL, bowl, descend, events, quiet, slow
from plugin import copies, make, snapshot, through_a_file
from tables import identical
from torch import nn
from torch.distributed.checkpoint import state_dict as portable

from l2o.rules import SGD, Adam, Momentum
from l2o.types import ResumeError


@pytest.mark.parametrize("cut", [5, 20, 33, 90])
@pytest.mark.parametrize("tell", [True, False])
def test_a_guarded_run_resumes_to_the_bit_wherever_it_is(cut, tell):
    """Between two looks, backed off, fallen back."""
    whole, first = (make(bowl(), SGD(lr=3.0), total_steps=TOTAL, guard=True) for _ in range(2))
    expected = descend(whole, range(120), tell)
    losses = descend(first, range(cut), tell)
    saved = through_a_file(first.state_dict())
    second = make(copies(first.param_groups[0]["params"]), SGD(lr=3.0), total_steps=TOTAL, guard=True)
    second.load_state_dict(saved)
    assert losses + descend(second, range(cut, 120), tell) == expected
    assert second.report() == whole.report()


def test_a_state_dict_is_a_snapshot_also_of_what_the_guard_knows():
    optimizer = make(bowl(), SGD(lr=3.0), total_steps=TOTAL, guard=True)
    descend(optimizer, range(15), tell=True)
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    descend(optimizer, range(15, 60), tell=True)
    assert identical(saved, before)


def test_states_pass_between_guarded_and_unguarded_runs_unless_adamw_acts():
    plain, optimizer = slow(bowl()), slow(bowl(), guard=True)
    descend(plain, range(25), tell=True)
    optimizer.load_state_dict(through_a_file(plain.state_dict()))
    descend(optimizer, range(25, 45), tell=True)
    assert events(optimizer) == []
    plain.load_state_dict(through_a_file(optimizer.state_dict()))
    assert plain.report()["stage"] == "unguarded"
    fallen = make(bowl(), SGD(lr=3.0), total_steps=TOTAL, guard=True)
    descend(fallen, range(60), tell=True)
    before = snapshot(plain)
    other = make(bowl(), SGD(lr=3.0), total_steps=TOTAL)
    with pytest.raises(ResumeError, match="guard=True"):
        other.load_state_dict(fallen.state_dict())
    assert identical(snapshot(plain), before)


@pytest.mark.parametrize("flat", [False, True])
def test_a_guarded_run_goes_on_from_a_distributed_checkpoint(flat, tmp_path):
    """Good parameters, memory and the losses since the last look are among what is saved."""
    chosen, runs = portable.StateDictOptions(flatten_optimizer_state_dict=flat), []
    for stop in (0, 25):
        model = nn.Linear(3, 2)
        nn.init.constant_(model.weight, 0.5), nn.init.constant_(model.bias, 0.1)
        optimizer = make(model.parameters(), Adam(lr=0.01), total_steps=TOTAL, guard=True)
        descend(optimizer, range(stop), tell=True)
        if stop:
            saved = portable.get_optimizer_state_dict(model, optimizer, options=chosen)
            quiet(dcp.save, {"optimizer": saved}, checkpoint_id=tmp_path, no_dist=True)
            again = copy.deepcopy(model)
            optimizer = make(again.parameters(), Adam(lr=0.01), total_steps=TOTAL, guard=True)
            state = {"optimizer": portable.get_optimizer_state_dict(again, optimizer, options=chosen)}
            quiet(dcp.load, state, checkpoint_id=tmp_path, no_dist=True)
            portable.set_optimizer_state_dict(again, optimizer, state["optimizer"], options=chosen)
        descend(optimizer, range(stop, 45), tell=True)
        end = snapshot(optimizer)
        kept = [dict(sorted(slots.items())) for slots in end["state"].values()]  # in whatever order they are made
        runs.append([kept, end["param_groups"], *copies(optimizer.param_groups[0]["params"])])
    assert identical(*runs)


def test_what_other_code_keeps_in_the_state_stays_when_the_guard_acts():
    params = bowl()
    optimizer = make(params, SGD(lr=3.0), total_steps=TOTAL, guard=True)
    optimizer.state[params[0]]["note"] = "mine"
    descend(optimizer, range(60), tell=True)
    assert optimizer.report()["stage"] == "adamw"
    assert optimizer.state[params[0]]["note"] == "mine"


def test_a_state_that_is_cleared_begins_the_run_anew_whoever_acted():
    params, rule = bowl(), Momentum(lr=3.0)
    optimizer = make(params, rule, total_steps=TOTAL, guard=True)
    descend(optimizer, range(60), tell=True)
    assert optimizer.report()["stage"] == "adamw"
    optimizer.state.clear()
    optimizer.param_groups[0]["lr"] = 1e-3
    fresh = make(copies(params), rule, total_steps=TOTAL, lr=1e-3, guard=True)
    for each in (optimizer, fresh):
        descend(each, range(3), tell=True)
    assert identical(optimizer.state_dict(), fresh.state_dict())
