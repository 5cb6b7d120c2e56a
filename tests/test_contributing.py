"""The rule, the task and the kernel that CONTRIBUTING shows are ones."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from conftest import ROOT
from tables import generator, one_update

import l2o.fused
from l2o.estimators import Evolution
from l2o.meta import MetaTraining
from l2o.ops.moments import ema
from l2o.ops.numeric import log_of, logit_of, scalar_like
from l2o.random import normal
from l2o.types import LOCAL, OptState, TaskFamily, UpdateRule

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.S)
GIVEN = (dataclass, ema, log_of, logit_of, scalar_like, normal, OptState, TaskFamily, UpdateRule)


def names() -> dict[str, Any]:
    given = {each.__name__: each for each in GIVEN}
    found: dict[str, Any] = {"torch": torch, "l2o": l2o, "LOCAL": LOCAL, "__name__": __name__, **given}
    for block in BLOCKS[:2]:
        exec(block, found)
    return found


def test_the_rule_steps_by_the_sign_of_momentum() -> None:
    rule = names()["Signum"](lr=0.5)
    theta, params = rule.init_theta(generator()), {"x": torch.zeros(3)}
    state = rule.init(theta, params, {})
    updates, _ = one_update(rule, theta, {"x": torch.tensor([2.0, -1.0, 0.0])}, state, params)
    torch.testing.assert_close(updates["x"], torch.tensor([-0.5, 0.5, 0.0]))


def test_the_rule_is_meta_trained_on_the_task() -> None:
    found = names()
    rule, family = found["Signum"](), found["Bowl"](dim=3)
    estimator = Evolution(rule, family, lanes=4, horizon=10, truncation=5)
    training = MetaTraining(
        estimator, rule.init_theta(generator()), lambda theta: torch.optim.Adam(theta, lr=0.01), generator()
    )
    assert all(training.outer_step()["meta_loss"].isfinite() for _ in range(2))


def test_the_kernel_is_entered_as_is_shown(monkeypatch: Any) -> None:
    monkeypatch.setattr(l2o.fused, "UPDATES", dict(l2o.fused.UPDATES))
    found = names() | {"MyRule": names()["Signum"]}
    exec(BLOCKS[2], found)
    assert l2o.fused.has(l2o.fused.UPDATES, found["MyRule"]())
