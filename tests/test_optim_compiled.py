"""A step under `torch.compile`: one graph, few breaks, compiled once, and the steps of one that is not compiled."""

import math

import pytest
import torch
from plugin import TOTAL, Mixing, copies, make, parameters, set_gradients, source
from tables import RULES
from torch._dynamo.utils import counters

from l2o.optim import LearnedOptimizer
from l2o.rules import Adam

pytestmark = pytest.mark.filterwarnings("ignore:.*Profiler record function", "ignore:.*step . was skipped")
BREAKS = 3
"""Before and after the graph, and torch's hooks around a step; torch's own AdamW has 2, to 4 in other versions."""
STEPS = 8
SOURCES = {"default": "default", "light": "light", "Adam": source(Adam())}


def compiled_steps(optimizer, schedule=None, spoil=None, loss=None):
    """Steps by Dynamo without a code generator; returns breaks of graphs and graphs after each."""
    torch._dynamo.reset()
    counters.clear()
    step = torch.compile(lambda: optimizer.step(loss=loss), backend="eager")
    seen = []
    for i in range(STEPS):
        run_step(optimizer, i, step, schedule, spoil)
        seen.append((sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]))
    return seen


def run_step(optimizer, i, step, schedule=None, spoil=None):
    params = optimizer.param_groups[0]["params"]
    set_gradients(params, i)
    if i == spoil:
        params[1].grad[0] = math.nan
    step()
    if schedule is not None:
        optimizer.param_groups[0]["lr"] = schedule(i)


@pytest.mark.parametrize("guard", [False, True], ids=["unguarded", "guarded"])
@pytest.mark.parametrize("name", SOURCES)
def test_a_step_is_one_graph_that_is_compiled_once(name, guard):
    """Whatever the number of the step, the rate, the norms that a guard has seen, and of what was skipped."""
    # But for the tensor with channels last: beside one of its shape, its state loses that order in the first step.
    params = [p for p in parameters() if p.ndim < 4 or p.is_contiguous()]
    optimizer = LearnedOptimizer(params, SOURCES[name], total_steps=1000, guard=guard, weight_decay=0.1)
    seen = compiled_steps(optimizer, schedule=lambda i: 1.0 / (i + 2), spoil=3)
    assert seen == [(seen[0][0], 1)] * STEPS
    assert seen[0][0] <= BREAKS
    assert optimizer.skipped_steps == 1


EQUAL = {"Steered": torch.bfloat16, "Steered-normalized": torch.float32, "MLP": torch.float32, "Mixing": torch.float32}


@pytest.mark.parametrize(("name", "dtype"), EQUAL.items())
def test_compiled_steps_are_those_of_an_optimizer_that_is_not(name, dtype):
    """Masks of entries without gradients, losses, slots that are inputs, decay and skipped steps among them."""
    rule = Mixing() if name == "Mixing" else RULES[name]
    optimizer, plain = (make(parameters(dtype), rule, weight_decay=0.3) for _ in range(2))
    compiled_steps(optimizer, spoil=2, loss=0.5)
    for i in range(STEPS):
        run_step(plain, i, lambda: plain.step(loss=0.5), spoil=2)
    ends = [each.param_groups[0]["params"] for each in (optimizer, plain)]
    torch.testing.assert_close(*([p.data for p in params] for params in ends), rtol=1e-3, atol=1e-5)
    assert optimizer.skipped_steps == plain.skipped_steps == 1


def test_a_run_may_go_on_without_a_compiler():
    optimizer = make(parameters(), Adam(), state_dtype=torch.bfloat16)
    compiled_steps(optimizer)
    fresh = make(copies(optimizer.param_groups[0]["params"]), Adam(), state_dtype=torch.bfloat16)
    fresh.load_state_dict(optimizer.state_dict())
    for each in (optimizer, fresh):
        run_step(each, STEPS, each.step)
    for p, q in zip(*(each.param_groups[0]["params"] for each in (optimizer, fresh)), strict=True):
        assert torch.equal(p, q)


def test_nothing_happens_where_nothing_has_a_gradient():
    params = parameters()
    optimizer = make(params, Adam(), total_steps=TOTAL)
    torch._dynamo.reset()
    assert torch.compile(lambda: optimizer.step(lambda: 2.0), backend="eager")() == 2.0
    assert not optimizer.state
