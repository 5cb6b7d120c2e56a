"""What the guard of a plug-in takes for a sign of trouble, by what a look shows."""

import math

import pytest
import torch
from guarding import bowl, events, quiet, slow
from torch import nn

from l2o.optim import watch
from l2o.rules import Adam, ByKind, Scheduled, Steered

SEEN = watch.Seen((), gradient=1.0, size=10.0, moved=9.0, base=1.0, steps=10, entries=9)
TOLD = SEEN._replace(losses=(0.9,) * 10)


def test_a_leap_is_one_beside_the_usual_step_of_the_rule():
    memory = watch.begun(SEEN)
    near = [watch.alarms(memory, SEEN._replace(stride=stride))["leap"] for stride in (1e-9, 1e-3, 1.0)]
    assert near[0] == near[1] >= 1.0 > near[2]
    assert ByKind({"vector": Adam()}, Scheduled(Steered(lr=0.02))).stride == 0.02
    assert Steered(lr=0.02, own=2.0).stride == pytest.approx(0.02 * math.exp(1.0))  # matrices may go so far


def test_what_is_down_the_slope_is_no_leap():
    memory = watch.begun(SEEN._replace(size=1.0, moved=0.0)) | {"looks": 2.0}
    assert watch.trouble(watch.alarms(memory, SEEN)) == "leap"
    assert watch.trouble(watch.alarms(memory, SEEN._replace(slope=-0.1))) is None


def test_a_leap_to_smaller_gradients_counts_half_at_least_once_it_is_known_what_is_usual():
    """As of points of a map, which go far to where they belong; early on saturation looks the same."""
    found = [
        watch.alarms({"looks": looks, "level": level, "largest": 1.0}, SEEN)["leap"]
        for looks, level in ((2.0, 100.0), (3.0, 0.5), (3.0, 1.6), (3.0, 100.0))
    ]
    assert found == pytest.approx([found[0], found[0], found[0] / 1.6, found[0] / 2.0])


@pytest.mark.parametrize("tell", [True, False])
def test_a_jump_into_saturation_is_a_leap_that_is_put_back(tell):
    """Gradients vanish there, and nobody says what the loss is."""
    params = bowl()
    optimizer = slow(params, Adam(), guard=True)
    for step in range(60):
        if step == 45:
            before = [p.detach().clone() for p in params]
            for p in params:
                p.data.mul_(40.0)
        optimizer.zero_grad()
        loss = sum(p.tanh().square().sum() for p in params)
        loss.backward()
        quiet(optimizer.step, **({"loss": loss} if tell else {}))
    assert [done for step, _, done in events(optimizer) if step == 50] == ["backed off"]
    assert all((p - old).abs().max() < 0.1 for p, old in zip(params, before, strict=True))


def test_gradients_that_are_no_numbers_hide_no_sign():
    seen = TOLD._replace(gradient=math.nan, slope=math.nan, size=1.0, moved=0.0, skips=10)
    signs = watch.alarms({**watch.begun(TOLD), "looks": 5.0}, seen)
    assert watch.trouble({**signs, "leap": math.nan}) == watch.trouble(signs) == "skips"


def test_parameters_whose_gradient_is_a_spike_are_not_worth_going_back_to():
    """Whoever went back there would skip every step from there on."""
    memory = {"looks": 5.0, "level": 1.0, "largest": 1.0}
    still = SEEN._replace(size=1.0, moved=0.0)
    found = [watch.good(watch.alarms(memory, seen), memory, seen) for seen in (still, still._replace(gradient=101.0))]
    assert found == [True, False]


def test_a_map_that_grows_a_hundredfold_is_no_trouble():
    """Points begin near zero, and pulls towards places far away never get small: batches of other places each."""
    points = nn.Parameter(torch.full((8, 2), 1e-3))
    optimizer = slow([points], Adam(lr=1.0), lr=1.0, guard=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        optimizer.zero_grad()
        (points - 20.0 * torch.randn(8, 2, generator=generator) - 100.0).abs().sum().backward()
        optimizer.step()
    assert events(optimizer) == []


def test_one_lucky_look_at_noisy_losses_is_not_what_others_are_held_to():
    memory = watch.begun(TOLD._replace(losses=(2.0,) * 10, size=1.0, moved=0.0))
    for loss in (2.0, 1.0, 1.0, 0.2):  # the last by chance
        memory = watch.learned(memory, TOLD._replace(losses=(loss,) * 10))
    still = TOLD._replace(size=1.0, moved=0.0)
    assert watch.trouble(watch.alarms(memory, still._replace(losses=(1.0,) * 10))) is None
    memory = watch.learned(memory, still._replace(losses=(1.0,) * 10))
    assert watch.trouble(watch.alarms(memory, still._replace(losses=(2.0,) * 10))) == "rise"


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("looks", [{0: 1}, {0: 1, 1: 10}, {4: 1}, {4: 4}], ids=["first", "two", "once", "often"])
def test_losses_and_gradients_that_are_not_finite_do_not_blind_the_guard(looks, poison):
    """looks: how many losses of which look are not finite, and the gradient there."""
    still, memory = TOLD._replace(size=1.0, moved=0.0), None
    for k in range(9):
        level, bad = 1.0 - 0.05 * k, looks.get(k, 0)
        losses = [poison] * bad + [level - 0.02, level + 0.02] * 5
        seen = still._replace(losses=tuple(losses[: 10 if k else 1]), gradient=poison if bad else 1.0)
        if memory is not None:
            assert watch.trouble(watch.alarms(memory, seen)) is None
        memory = watch.begun(seen) if memory is None else watch.learned(memory, seen)
    assert all(map(math.isfinite, memory.values()))
    assert 0.01 < memory["noise"] < 0.03
    assert watch.trouble(watch.alarms(memory, still._replace(losses=(2.0,) * 10))) == "rise"
