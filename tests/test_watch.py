"""What the guard sees: leaps, rises, and losses and gradients that are not finite."""

from __future__ import annotations

import math

import pytest

from l2o.optim import watch
from l2o.rules import Adam, ByKind, Scheduled, Steered

SEEN = watch.Seen((), gradient=1.0, size=10.0, moved=9.0, base=1.0, steps=10, entries=9)
TOLD = SEEN._replace(losses=(0.9,) * 10)


def test_a_leap_is_one_beside_the_usual_step_of_the_rule():
    memory = watch.begun(SEEN)
    near = [watch.alarms(memory, SEEN._replace(stride=stride))["leap"] for stride in (1e-9, 1e-3, 1.0)]
    assert near[0] == near[1] >= 1.0 > near[2]
    assert ByKind({"vector": Adam()}, Scheduled(Steered(lr=0.02))).stride == 0.02


def test_what_is_down_the_slope_is_no_leap():
    memory = watch.begun(SEEN._replace(size=1.0, moved=0.0)) | {"looks": 2.0}
    assert watch.trouble(watch.alarms(memory, SEEN)) == "leap"
    assert watch.trouble(watch.alarms(memory, SEEN._replace(slope=-0.1))) is None


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
