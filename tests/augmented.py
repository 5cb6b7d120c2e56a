"""Runs of augmented families, and what an optimizer sees of their first step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from analytic import AUGMENTED
from networks import LANES
from tables import double, generator
from torch import Tensor
from torch.func import vmap

from l2o.rules import SGD
from l2o.tasks import (
    ImageMLP,
)
from l2o.types import Grads, InnerState, TaskFamily
from l2o.unroll import expand_theta, sample_runs, unroll

PLAIN = ImageMLP(width=4, batch_size=8)
every_augmentation = pytest.mark.parametrize("family", AUGMENTED.values(), ids=AUGMENTED.keys())


def begin(family: TaskFamily, lanes: int = LANES, horizon: int = 9, seed: int = 3, lr: float = 0.1) -> Any:
    """Rule, θ, state at step 0 and generator."""
    rule, g = SGD(lr=lr), generator(seed)
    theta = expand_theta(rule.init_theta(g), lanes)
    return rule, theta, sample_runs(rule, theta, family, torch.full((lanes,), horizon), g), g


def run(family: TaskFamily, steps: int = 5, **settings: Any) -> tuple[InnerState, Tensor]:
    rule, theta, state, g = begin(family, **settings)
    with torch.no_grad():
        return unroll(rule, theta, family, state, steps, g)


def seen(family: TaskFamily, seed: int = 0, split: str = "train", lanes: int = LANES) -> tuple[Grads, Grads, Any]:
    """True gradients of the first step in float64, those that the optimizer sees, and the data."""
    g = generator(seed)
    data = family.sample(g, lanes)
    params, buffers = family.init(data, g)
    params = {k: t.requires_grad_() for k, t in double(params).items()}
    batch = family.batch(data, split, g)  # type: ignore[arg-type]
    loss, buffers = vmap(family.loss)(params, buffers, data, batch)
    grads = dict(zip(params, torch.autograd.grad(loss.sum(), list(params.values())), strict=True))
    return grads, family.transform_gradients(grads, buffers, data, batch)[0], data
