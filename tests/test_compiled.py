"""What is compiled does what the engine does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tables import generator
from torch.func import vmap

from l2o.estimators.compiled import CompiledRule
from l2o.ops.kinds import lane_infos
from l2o.rules import MLP, AdafacMLP
from l2o.types import OptState, Run, UpdateRule
from l2o.unroll import expand_theta

LANES, SHAPES = 2, {"w": (3, 4), "b": (3,)}


@pytest.mark.parametrize("rule", [AdafacMLP(hidden=(4,)), MLP(hidden=(4,), mup=True)], ids=["AdafacMLP", "MLP"])
def test_rules_with_networks_can_be_compiled(rule: UpdateRule) -> None:
    """Their ops have no rule for the compiler, which is to see torch's operations instead."""
    g = generator()
    params, grads = ({n: torch.randn(LANES, *s, generator=g) for n, s in SHAPES.items()} for _ in range(2))
    theta, infos = expand_theta(rule.init_theta(g), LANES), lane_infos(params)
    run = Run(torch.zeros(LANES, dtype=torch.long), torch.full((LANES,), 10), torch.ones(LANES))

    def update(theta: Any, grads: Any, params: Any, run: Any) -> Any:
        return rule.update(theta, grads, rule.init(theta, params, infos), params, infos, run._replace(loss=None))

    with torch.no_grad():
        state = OptState(*vmap(lambda theta, p: tuple(rule.init(theta, p, infos)))(theta, params))
        got = CompiledRule(rule, {}).update_lanes(theta, grads, state, params, run)
        torch.testing.assert_close(got, vmap(update)(theta, grads, params, run), rtol=1e-4, atol=1e-6)
