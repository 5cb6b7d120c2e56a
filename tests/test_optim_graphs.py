"""Steps at fixed addresses, as a CUDA graph takes them, here without one: the same to the bit as without, whatever
happens on the way."""

import contextlib
import copy

import pytest
import torch
from tables import RULES, generator, identical
from torch import nn

from l2o.bench.checks import no_waiting
from l2o.errors import ConfigurationError
from l2o.optim import LearnedOptimizer, graphs, learned
from l2o.rules import ByKind, Steered

STEPS = 14
SHAPES = [(6, 4), (4,), (6, 4), (), (3, 2, 2, 2), (4,)]
CHOSEN = {
    "turned": Steered(direction="eigenbasis", period=4, turned=8),
    "network": Steered(direction="eigenbasis", period=4, controller="lstm", network=True, reads_loss=True),
    **{name: RULES[name] for name in ("Adam", "MLP", "VeLO")},
    "Steered-normalized": Steered(direction="normalized"),
    "by kind": ByKind({"matrix": Steered(direction="eigenbasis", period=5)}, other=Steered(direction="adam")),
}


@pytest.fixture(autouse=True)
def captures(monkeypatch):
    """How often a step was captured; on the CPU, by a function that is what it replays."""
    found = []

    def capture(function):
        found.append(function)
        return function

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "check", lambda *_: None)
    monkeypatch.setattr(learned, "readable", lambda device: False)
    return found


def made(rule, cuda_graph, dtype=torch.float32, **settings):
    params = [
        nn.Parameter((0.1 * torch.randn(shape, generator=generator(i))).to(dtype)) for i, shape in enumerate(SHAPES)
    ]
    optimizer = LearnedOptimizer(params, (rule, rule.init_theta(generator(9))), total_steps=40, **settings)
    optimizer.cuda_graph = cuda_graph
    return optimizer, params


def step(optimizer, params, i, without=(), bad=False):
    for j, p in enumerate(params):
        drawn = torch.randn(p.shape, generator=generator(1000 * i + j)).to(p.dtype)
        p.grad = None if j in without else drawn + p.detach()
    if bad:
        params[0].grad[0] = float("nan")
    optimizer.step(loss=torch.full((), 1.0 / (1 + i)))


def kept(optimizer, params):
    return (
        [p.detach() for p in params],
        [optimizer.state[p] for p in params],
        optimizer.param_groups[0]["run"].get("shared"),
    )


def nothing(optimizer, i):
    return {}


def both(rule, happen=nothing, dtype=torch.float32, steps=STEPS, **settings):
    """Parameters and state with and without graphs.  happen: at the beginning of a step; gives settings of it."""
    results = []
    for cuda_graph in (True, False):
        optimizer, params = made(rule, cuda_graph, dtype, **settings)
        for i in range(steps):
            step(optimizer, params, i, **happen(optimizer, i))
        results.append((kept(optimizer, params), optimizer.skipped_steps))
    return results


@pytest.mark.parametrize("rule", CHOSEN.values(), ids=CHOSEN.keys())
def test_steps_are_those_without_a_graph(rule, captures):
    (got, skipped), (want, expected) = both(rule, lambda _, i: {"bad": i in (2, 7, 8)})
    assert identical(got, want)
    assert skipped == expected == 3
    assert len(captures) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parameters_of_any_dtype(dtype, captures):
    (got, _), (want, _) = both(CHOSEN["turned"], dtype=dtype)
    assert identical(got, want)
    assert len(captures) == 1


def test_rates_change_without_another_capture(captures):
    def happen(optimizer, i):
        optimizer.param_groups[0]["lr"] = 0.9 ** (i + 1)
        return {}

    (got, _), (want, _) = both(CHOSEN["turned"], happen, weight_decay=0.3)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert len(captures) == 1


def test_parameters_without_gradients_are_left_out(captures):
    (got, _), (want, _) = both(CHOSEN["turned"], lambda _, i: {"without": (1,) if 6 <= i < 12 else ()}, steps=20)
    assert identical(got, want)
    assert len(captures) == 3  # with all, without one, with all again


def test_a_group_may_be_added(captures):
    def happen(optimizer, i):
        if i == 6:
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(6, 4))], "weight_decay": 1.0})
        for p in optimizer.param_groups[-1]["params"] if i >= 6 else []:
            p.grad = torch.full_like(p, 0.1 * i)
        return {}

    (got, _), (want, _) = both(CHOSEN["turned"], happen)
    assert identical(got, want)
    assert len(captures) == 2


def test_a_snapshot_stays_and_can_be_loaded(captures):
    rule = CHOSEN["turned"]
    optimizer, params = made(rule, True)
    for i in range(7):
        step(optimizer, params, i)
    saved, values = optimizer.state_dict(), copy.deepcopy(params)
    expected = copy.deepcopy(saved)
    for i in range(7, STEPS):
        step(optimizer, params, i)
    assert identical(saved["state"], expected["state"])
    want = copy.deepcopy(kept(optimizer, params))
    with torch.no_grad():
        for p, value in zip(params, values, strict=True):
            p.copy_(value)
    optimizer.load_state_dict(saved)
    for i in range(7, STEPS):
        step(optimizer, params, i)
    assert identical(kept(optimizer, params)[:2], want[:2])
    assert len(captures) == 3  # what was saved is not written to, and what was loaded lies elsewhere


def test_state_stays_where_it_is_and_nobody_waits(captures):
    optimizer, params = made(CHOSEN["turned"], True)
    places = []
    for i in range(STEPS):
        with no_waiting(params[0].device) if i > 4 else contextlib.nullcontext():
            step(optimizer, params, i)
        places.append([t.data_ptr() for p in params for t in optimizer.state[p].values()])
    assert places[5] == places[-1] != places[2]


def test_where_there_is_no_gpu_an_error_says_so(monkeypatch):
    monkeypatch.undo()
    optimizer, params = made(Steered(), True)
    with pytest.raises(ConfigurationError, match=r"expected parameters on cuda.*got parameters on cpu"):
        step(optimizer, params, 0)
