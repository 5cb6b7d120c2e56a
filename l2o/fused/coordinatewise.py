"""Rules with a network over channels of each element: a step in place, of their own `update` with moments that wait."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from l2o.fused.inputs import Inputs
from l2o.kernels.arrays import plain
from l2o.kernels.coordinatewise import layers_of
from l2o.kernels.coordinatewise_unroll import Learner, prepared
from l2o.kernels.deferred import NoKernelError, deferred
from l2o.kernels.moments import HAD_GRADIENT, MOMENTS, write
from l2o.kernels.unroll import Batches
from l2o.ops.coordinatewise import Nominal
from l2o.ops.numeric import finite
from l2o.rules import AdafacMLP
from l2o.types import InnerState, OptState, Run, Theta, UpdateRule


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


def unroll(
    rule: AdafacMLP, theta: Theta, state: InnerState, batches: Batches, steps: int, generator: torch.Generator
) -> tuple[InnerState, Tensor] | None:
    """Take ``steps`` inner steps of all lanes: losses ``[steps, lanes]``, see `l2o.fused.unroll`; no derivatives."""
    head, moved = rule.recipe().head, [*state.params.values(), *theta.values()]
    if {*batches.names} != state.params.keys() or (isinstance(head, Nominal) and head.needs_means):
        return None
    if not plain(moved) or (torch.is_grad_enabled() and any(t.requires_grad for t in moved)):
        return None
    found = prepared(_learner(rule, theta, state, batches.names, steps), state, batches)
    return None if found is None else found.run(batches.drawn(steps, len(state.step), generator))


def _learner(rule: AdafacMLP, theta: Theta, state: InnerState, names: Sequence[str], steps: int) -> Learner:
    """The rule as the kernel has it, over ``steps``; tensors in the order of ``names``."""
    decays, first = rule.decays(theta), theta | {"b0": theta["b0"].unsqueeze(1)}
    joined = torch.cat([*decays[:2], decays.factored.clamp(0.0, 1.0)], -1)
    now, total = (t.view(-1, 1, 1) for t in (state.step, state.total_steps))
    # As in the engine, a clock stands still at the horizon. A step at a time: rounding must not depend on their number.
    weights = [layers_of(rule.weights(first, Run(torch.minimum(now + t, total), total))) for t in range(steps)]
    gains = rule.gains({name: state.opt.per_param[name] for name in names}, theta["b0"]).expand(len(now), -1)
    return Learner(rule.recipe(), weights[0], torch.cat([own[1] for own in weights], 1), joined, gains)
