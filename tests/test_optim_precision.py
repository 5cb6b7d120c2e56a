"""Parameters and state of low precision: what is rounded, and that a run goes on from bfloat16 as from any other."""

import copy
import math

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
    set_gradients,
    through_a_file,
    train,
)
from tables import generator, identical
from torch import nn

import l2o
from l2o.optim import LearnedOptimizer, apply
from l2o.optim.precision import stored
from l2o.rules import MLP, SGD, Adam, Steered
from l2o.types import ConfigurationError, OptState, ParamInfo

BF16 = torch.bfloat16
OF_TENSORS = {"h", "c", "from_mlp"}
"""Slots of networks over tensors, by their names in all rules."""


def narrow(state, names=("v",), step=0):
    return stored(OptState(state, {}), dict.fromkeys(state, frozenset(names)), step).per_param


@every_rule
def test_slots_of_the_parameters_shape_are_bfloat16_and_all_others_stay(rule):
    shapes = [(), (16,), (64,), (5, 3), (1, 7)]  # also as long as hidden states are
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator())) for shape in shapes]
    optimizer = make(params, rule, state_dtype=BF16)
    train(optimizer, range(2))
    for p in params:
        exact = rule.exact_slots(ParamInfo(tuple(p.shape), "matrix")) | {"had_gradient"}
        for name, slot in optimizer.state[p].items():
            if name not in exact:
                own = p.ndim > 0 and slot.shape[-p.ndim :] == p.shape and name not in OF_TENSORS
                assert slot.dtype == (BF16 if own else torch.float32), name
    assert all(t.dtype == torch.float32 for t in optimizer.param_groups[0]["run"].get("shared", {}).values())


@every_rule
@pytest.mark.parametrize("transport", [through_a_file, copy.deepcopy], ids=["file", "copy"])
def test_a_loaded_run_continues_bit_for_bit(rule, transport):
    params = parameters()
    optimizer = make(params, rule, state_dtype=BF16)
    train(optimizer, range(3))
    state = transport(optimizer.state_dict())
    fresh = make(copies(params), rule, state_dtype=BF16)
    fresh.load_state_dict(state)
    assert identical(fresh.state_dict(), state)
    other, others = copy.deepcopy((optimizer, params))
    expected = train(optimizer, range(3, 6))
    assert identical(train(fresh, range(3, 6)), expected)
    assert identical(train(other, range(3, 6)), expected)
    assert identical([p.data for p in others], expected)
    assert identical(fresh.state_dict(), optimizer.state_dict())


@every_rule
def test_steps_are_those_of_float32_but_for_the_rounding(rule):
    """Of a rule without such slots to the bit."""
    ends = [train(make(parameters(), rule, state_dtype=dtype), range(4)) for dtype in (None, BF16)]
    optimizer = make(parameters(), rule, state_dtype=BF16)
    train(optimizer, range(1))
    same = not any(slot.dtype == BF16 for slots in optimizer.state.values() for slot in slots.values())
    assert identical(*ends) == (same or rule == Mixing())  # which does not read its slot
    for start, wide, rounded in zip(parameters(), *ends, strict=True):
        moved = (wide - start.detach()).abs().amax() if wide.numel() else 0.0
        torch.testing.assert_close(rounded, wide, rtol=0.0, atol=0.1 * float(moved) + 1e-7)


def test_state_may_change_its_precision_in_mid_run():
    saved = make(parameters(), Adam())
    train(saved, range(2))
    dtypes = []
    for dtype in (BF16, None):
        fresh = make(parameters(), Adam(), state_dtype=dtype)
        fresh.load_state_dict(saved.state_dict())
        assert identical(fresh.state_dict()["state"], saved.state_dict()["state"])
        train(fresh, range(2, 3))
        dtypes.append(fresh.state[fresh.param_groups[0]["params"][1]]["v"].dtype)
        saved = fresh
    assert dtypes == [BF16, torch.float32]


def test_rounding_is_right_in_the_mean_and_leaves_what_fits():
    low, high = torch.tensor([1.0, 1.0 + 2.0**-7])
    share = 0.3
    rounded = narrow({"0": {"v": torch.full((100_000,), float(torch.lerp(low, high, share)))}})["0"]["v"]
    assert set(rounded.tolist()) == {float(low), float(high)}
    assert abs(float((rounded == high).float().mean()) - share) < 0.01
    fits = torch.tensor([0.0, -0.0, 1.5, -3e38, 1e-40, torch.inf, -torch.inf, torch.nan]).to(BF16)
    for step in range(50):
        kept = narrow({"0": {"v": fits.float()}}, step=step)["0"]["v"]
        assert identical(kept, fits)
        assert torch.equal(kept.signbit(), fits.signbit())


def test_a_moment_falls_where_rounding_to_the_nearest_would_hold_it():
    """With decay 0.999, after the gradients have become ten times smaller."""
    beta, level = 0.999, 0.01
    nearest = random = torch.ones(1000)
    for step in range(3000):
        nearest = (beta * nearest + (1 - beta) * level).to(BF16).float()
        random = narrow({"0": {"v": beta * random + (1 - beta) * level}}, step=step)["0"]["v"].float()
    exact = level + (1 - level) * beta**3000
    assert torch.equal(nearest, torch.ones(1000))
    torch.testing.assert_close(random.mean(), torch.tensor(exact), rtol=0.05, atol=0.0)


def test_the_draw_depends_on_the_step_and_not_on_what_else_is_here():
    """Where shards have other lengths, or processes other tensors, copies of a tensor stay equal."""
    own, other = torch.rand(100, generator=generator()), torch.rand(700, generator=generator(1))
    first, second = narrow({"0": {"v": own}}), narrow({"1": {"v": other}, "0": {"v": own}})
    assert identical(first["0"], second["0"])
    assert not identical(first["0"], narrow({"0": {"v": own}}, step=1)["0"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int8, "bfloat16", True])
def test_another_precision_is_refused(dtype):
    with pytest.raises(ConfigurationError, match=r"state_dtype=.*expected torch\.bfloat16, or None"):
        LearnedOptimizer(parameters(), "default", total_steps=TOTAL, state_dtype=dtype)


@pytest.mark.parametrize("rule", [Steered(), Steered(direction="normalized"), Mixing(), SGD()], ids=repr)
def test_a_guard_to_which_nothing_happens_changes_no_bit(rule):
    ends = [train(make(parameters(), rule, state_dtype=BF16, guard=guard), range(4)) for guard in (False, True)]
    assert identical(*ends)


@pytest.mark.filterwarnings("ignore:.*parameters are the last good ones")
def test_adamw_of_a_guard_keeps_its_state_so_too():
    weight = torch.nn.Parameter(torch.ones(8))
    optimizer = make([weight], Adam(lr=0.1), state_dtype=BF16, guard=True, lr=1e4, total_steps=1000)
    for _ in range(60):
        weight.grad = weight.detach().clone()
        optimizer.step()
    assert optimizer.report()["stage"] == "adamw"
    assert {optimizer.state[weight][name].dtype for name in ("m", "v")} == {BF16}


@pytest.mark.parametrize("source", ["default", "light"])
def test_the_kernel_steps_in_place_on_it(source, monkeypatch):
    """As torch's operations do: it gets copies in float32, which are rounded when it is done.

    Bases of the first steps have few gradients in them, so that rounding turns them.
    """
    rule, theta = l2o.load(source)
    ends = []
    for worth in (0, apply.WORTH_A_KERNEL):
        monkeypatch.setattr(apply, "WORTH_A_KERNEL", worth)
        optimizer = LearnedOptimizer(parameters(), (rule, theta), total_steps=TOTAL, state_dtype=BF16)
        ends.append(train(optimizer, range(2)))
        assert BF16 in {t.dtype for t in optimizer.state[optimizer.param_groups[0]["params"][2]].values()}
    for kernel, torchs in zip(*ends, strict=True):
        torch.testing.assert_close(kernel, torchs, rtol=1e-2, atol=1e-3)


@every_rule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_are_rounded_on_writing_alone(rule, dtype):
    params = parameters(dtype)
    wide = [nn.Parameter(p.detach().float()) for p in params]
    optimizer, reference = make(params, rule), make(wide, rule)
    for step in range(3):
        for p, w in zip(params, wide, strict=True):
            w.data.copy_(p)
        set_gradients(params, step)
        for p, w in zip(params, wide, strict=True):
            w.grad = p.grad.float()
        optimizer.step(loss=1.0)
        reference.step(loss=1.0)
        assert identical([p.data for p in params], [w.detach().to(dtype) for w in wide])
    slots = [t for p in params for t in optimizer.state[p].values()]
    assert {t.dtype for t in slots} <= {torch.float32, torch.bool}


def test_one_float64_parameter_makes_all_arithmetic_float64():
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.float64))]
    optimizer = make(params[:1], MLP())
    train(optimizer, range(1))
    assert optimizer.state[params[0]]["m"].dtype == torch.float32
    optimizer.add_param_group({"params": params[1:]})
    train(optimizer, range(1, 3))
    assert [optimizer.state[p]["m"].dtype for p in params] == [torch.float64, torch.float64]
    assert [p.dtype for p in params] == [torch.float32, torch.float64]


def test_grad_scaler_skips_steps_with_infinite_gradients():
    p = nn.Parameter(torch.ones(1))
    optimizer = make([p], SGD(lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor in (1.0, math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale(p.sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    assert p.item() == pytest.approx(0.8)
    assert counts(optimizer)["step"] == 2
