"""Rules with a network over channels of each element: a step in place, of their own `update` with moments that wait."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from l2o.fused.inputs import Inputs
from l2o.kernels.arrays import plain
from l2o.kernels.deferred import NoKernelError, deferred
from l2o.kernels.moments import HAD_GRADIENT, MOMENTS, write
from l2o.ops.numeric import finite
from l2o.types import OptState, UpdateRule


def step(
    rule: UpdateRule, inputs: Inputs, factors: Mapping[str, tuple[float, float]], limit: float = math.inf
) -> OptState | None:
    """See `l2o.fused.step`. Beside the state, a step has memory for one update and for what the rule makes of it."""
    theta, grads, state, params, infos, run = inputs
    slots = [t for own in state.per_param.values() for name, t in own.items() if name in MOMENTS]
    masks = {name: {HAD_GRADIENT: own[HAD_GRADIENT]} for name, own in state.per_param.items() if HAD_GRADIENT in own}
    written = [*params.values(), *slots, *(t for own in masks.values() for t in own.values())]
    if not (plain([*params.values(), *slots, *grads.values()]) and all(t.is_contiguous() for t in written)):
        return None
    bare = {name: {key: t for key, t in own.items() if key != HAD_GRADIENT} for name, own in state.per_param.items()}
    with deferred() as waiting, torch.no_grad():
        try:
            updates, new = rule.update(theta, grads, OptState(bare, state.shared), params, infos, run)
        except NoKernelError:
            return None
        if waiting.decays is None or not finite(list(grads.values()), list(updates.values()), limit):
            return None  # nothing is written yet, and `update` shows what is wrong
        write(state.per_param, grads, waiting.decays, waiting.clip, params, updates, factors)
    torch.autograd.graph.increment_version(written)
    return OptState({name: {**own, **masks.get(name, {})} for name, own in new.per_param.items()}, new.shared)
