"""`l2o.rules.MLP`: updates of all lanes by a kernel, and whole unrolls of perceptrons."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.func import vmap

from l2o.kernels import mlp_gpu, mlp_rule, perceptron_unroll
from l2o.kernels.arrays import plain
from l2o.kernels.unroll import Batches
from l2o.ops.features import EPS
from l2o.ops.kinds import lane_infos
from l2o.rules import MLP
from l2o.types import Grads, Infos, InnerState, OptState, Params, Run, Theta, Updates


def update(
    rule: MLP, theta: Theta, grads: Grads, state: OptState, params: Params, run: Run, _: Infos
) -> tuple[Updates, OptState] | None:
    """See `l2o.fused.update`."""
    if rule.mup or not plain(theta.values(), anywhere=True):
        return None
    time = rule.time_embedding(Run(run.step.unsqueeze(-1), run.total_steps.unsqueeze(-1)), theta["b0"])
    kernel = mlp_gpu if theta["b0"].is_cuda else mlp_rule

    def again(theta: Theta, grads: Grads, state: OptState, params: Params) -> tuple[Updates, OptState]:
        return reference(rule, theta, grads, state, params, run)

    return kernel.update(_constants(rule), theta, grads, state, params, time, again)


def unroll(
    rule: MLP, theta: Theta, state: InnerState, batches: Batches, steps: int, generator: torch.Generator
) -> tuple[InnerState, Tensor] | None:
    """Take ``steps`` inner steps of all lanes: losses ``[steps, lanes]``, see `l2o.fused.unroll`."""
    if rule.mup or not plain(theta.values()):
        return None
    ahead = torch.arange(steps, device=state.step.device).view(-1, 1, 1)
    # As in the engine, a clock stands still at the horizon.
    step = torch.minimum(state.step.unsqueeze(-1) + ahead, state.total_steps.unsqueeze(-1))
    time = rule.time_embedding(Run(step, state.total_steps.unsqueeze(-1)), theta["b0"])

    def again(theta: Theta, grads: Grads, opt: OptState, params: Params, run: Run) -> tuple[Updates, OptState]:
        return reference(rule, theta, grads, opt, params, run)

    constants = _constants(rule)
    if not perceptron_unroll.fits(constants, theta, state, batches, time):
        return None
    drawn = batches.drawn(steps, len(state.step), generator)
    return perceptron_unroll.unroll(constants, theta, state, drawn, time, again)


def reference(
    rule: MLP, theta: Theta, grads: Grads, state: OptState, params: Params, run: Run
) -> tuple[Updates, OptState]:
    """Return ``update`` of all lanes by the rule itself."""
    infos = lane_infos(params)

    def one(theta: Theta, g: Grads, opt: OptState, p: Params, step: Tensor, total: Tensor) -> Any:
        return rule.update(theta, g, opt, p, infos, Run(step, total))

    return cast("tuple[Updates, OptState]", vmap(one)(theta, grads, state, params, *run[:2]))


def _constants(rule: MLP) -> mlp_rule.Constants:
    return mlp_rule.Constants(rule.decays, rule.step_mult, rule.exp_mult, EPS)
