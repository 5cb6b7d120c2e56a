"""What is compiled does what the engine does."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from tables import first_estimate, generator, identical
from torch.func import vmap

import l2o.unroll
from l2o.estimators import Evolution
from l2o.estimators.compiled import CompiledFamily, CompiledRule
from l2o.ops.kinds import lane_infos
from l2o.rules import MLP, AdafacMLP, Adam, Celo2
from l2o.tasks import ImageMLP, WordMLP
from l2o.types import OptState, ParamInfo, Run, UpdateRule
from l2o.unroll import expand_theta

IMAGES = ImageMLP(width=3, batch_size=2)
LANES, SHAPES = 2, {"w": (3, 4), "b": (3,)}


@pytest.mark.parametrize("rule", [AdafacMLP(hidden=(4,)), MLP(hidden=(4,), mup=True)], ids=["AdafacMLP", "MLP"])
def test_rules_with_networks_can_be_compiled(rule: UpdateRule) -> None:
    """Their ops have no rule for the compiler, which is to see torch's operations instead."""
    g = generator()
    params, grads = ({n: torch.randn(LANES, *s, generator=g) for n, s in SHAPES.items()} for _ in range(2))
    theta, infos = expand_theta(rule.init_theta(g), LANES), lane_infos(params)
    run = Run(torch.zeros(LANES, dtype=torch.long), torch.full((LANES,), 10), torch.ones(LANES))

    def update(theta: Any, grads: Any, params: Any, now: Any) -> Any:
        return rule.update(theta, grads, rule.init(theta, params, infos), params, infos, Run(*now))

    with torch.no_grad():
        state = OptState(*vmap(lambda theta, p: tuple(rule.init(theta, p, infos)))(theta, params))
        got = CompiledRule(rule, {}).update_lanes(theta, grads, state, params, run, infos)
        torch.testing.assert_close(got, vmap(update)(theta, grads, params, run[:2]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("valid_weight", [0.0, 0.5], ids=["whole unrolls", "updates and gradients"])
def test_what_has_kernels_keeps_them(valid_weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without validation losses no single step is taken, with them nothing is compiled."""
    monkeypatch.setenv("L2O_KERNELS", "1")
    monkeypatch.setattr(torch if valid_weight else l2o.unroll, "compile" if valid_weight else "inner_step", None)
    rule = MLP(hidden=(4,))
    make = partial(Evolution, rule, IMAGES, lanes=4, horizon=4, truncation=4, valid_weight=valid_weight)
    theta = rule.init_theta(generator())
    assert identical(*(first_estimate(make(compile=compiled), theta)[0] for compiled in (False, True)))


def test_what_is_compiled_says_what_it_is() -> None:
    rule, family = CompiledRule(Celo2(), {}), CompiledFamily(WordMLP())
    whole = [rule.needs_whole(ParamInfo(shape, "matrix")) for shape in ((3,), (3, 4))]
    assert (rule.rests, rule.needs_loss, whole) == (False, False, [False, True])
    assert CompiledRule(Adam(), {}).rests is Adam().rests is True
    assert family.kinds == WordMLP().kinds != {}
