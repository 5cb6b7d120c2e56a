"""A short inner run, recorded: how far the rule moves at every step, and all that it was shown at some of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from l2o.checks import check_int
from l2o.ops.kinds import lane_infos
from l2o.types import ConfigurationError, Grads, Infos, InnerState, OptState, Params, Run, TaskFamily, Theta, UpdateRule
from l2o.unroll import expand_theta, gradients, sample_runs, updates


class StepInputs(NamedTuple):
    """What a rule is shown at one update of one run, float64, without lanes; ``state`` is that before the update."""

    state: OptState
    grads: Grads
    params: Params
    run: Run
    infos: Infos


class Recording(NamedTuple):
    """A run of several lanes.

    losses: ``[steps, lanes]``, before each update.
    rates: ``[steps]``, root mean square of the updates over that of the gradients, all lanes together.
    descent: ``[steps]``, ``-<u, g> / <g, g>``: the learning rate that gradient descent would need to go as far down the
        gradient; negative where the update goes up.
    inputs: of the first lane, by step.
    """

    losses: Tensor
    rates: Tensor
    descent: Tensor
    inputs: dict[int, StepInputs]


def record(
    rule: UpdateRule,
    theta: Theta,
    family: TaskFamily,
    steps: int,
    generator: torch.Generator,
    lanes: int = 4,
    keep: Collection[int] = (),
) -> Recording:
    """Train ``lanes`` tasks for ``steps`` steps, which is also the ``total_steps`` that the rule is told.

    theta: ``[...]``, without lanes, on the generator's device.     keep: steps whose inputs are kept.
    Raises `ConfigurationError` where a loss is not finite: there is no telling what a rule does in a run that diverged.
    """
    horizon = torch.full((check_int("lanes", lanes),), check_int("steps", steps), device=generator.device)
    many = expand_theta(theta, lanes)
    inputs, rows = {}, []
    with torch.no_grad():
        state = sample_runs(rule, many, family, horizon, generator)
        for step in range(steps):
            batch = family.batch(state.data, "train", generator)
            loss, buffers, grads, _ = gradients(family, state, batch)
            grads, buffers = family.transform_gradients(grads, buffers, state.data, batch)
            if step in keep:
                inputs[step] = _inputs(state, grads, loss, lane_infos(state.params, family.kinds))
            moves, opt = updates(rule, many, grads, state, loss, family.kinds)
            rows.append(torch.stack([loss, dot(moves, moves, 1), dot(moves, grads, 1), dot(grads, grads, 1)]))
            params = {name: p + moves[name] for name, p in state.params.items()}
            state = state._replace(params=params, buffers=buffers, opt=opt, step=state.step + 1)
    return _recording(torch.stack(rows), inputs)


def _recording(rows: Tensor, inputs: dict[int, StepInputs]) -> Recording:
    """rows: ``[steps, 4, lanes]``: losses, and products of updates and gradients."""
    losses = rows[:, 0]
    broken = (~rows.isfinite().all(1).all(1)).nonzero().flatten()
    if len(broken):
        raise ConfigurationError(
            f"the run diverged at step {int(broken[0])} of {len(rows)}; record fewer steps, or another task or rule"
        )
    moved, along, slope = rows[:, 1:].double().sum(-1).unbind(1)
    slope = slope.clamp(min=torch.finfo(torch.float64).tiny)
    return Recording(losses, (moved / slope).sqrt(), -along / slope, inputs)


def _inputs(state: InnerState, grads: Grads, loss: Tensor, infos: Infos) -> StepInputs:
    """Of the first lane."""
    whole_run = StepInputs(state.opt, grads, state.params, Run(state.step, state.total_steps, loss), infos)
    return cast(StepInputs, tree_map_only(Tensor, lambda x: double(x[0].clone()), whole_run))


def double(x: Tensor) -> Tensor:
    """Return ``x``, of any shape, in float64, unless it counts something."""
    return x.double() if x.is_floating_point() else x


def dot(a: dict[str, Tensor], b: dict[str, Tensor], batch_axes: int = 0) -> Tensor:
    """Return the inner product over all entries of all tensors, ``[*shape[:batch_axes]]``, the shape of their first
    axes."""
    return torch.stack([entries(a[name] * b[name], batch_axes).sum(-1) for name in a]).sum(0)


def entries(x: Tensor, batch_axes: int = 0) -> Tensor:
    """Reshape ``x`` to ``[*shape[:batch_axes], entries]``, also what has no further axes, or no entries."""
    shape = x.shape
    return x.reshape(*shape[:batch_axes], math.prod(shape[batch_axes:]))


Change = Callable[[StepInputs, int], StepInputs]
"""The inputs of a step, and the number of updates before the last: what the rule is shown instead."""


def rerun(rule: UpdateRule, theta: Theta, history: Sequence[StepInputs], change: Change) -> dict[str, Tensor]:
    """Return the last update of consecutive steps with ``change`` made to what the rule is shown; parameters, and the
    shapes of updates, are as recorded.

    Only the first step's ``state`` counts; from there on the rule's own is carried along.
    theta: float64.     Pure, so that it may be vectorised over what ``change`` does.
    """
    state, last = history[0].state, len(history) - 1
    moves: dict[str, Tensor] = {}
    for i, inputs in enumerate(history):
        shown = change(inputs._replace(state=state), last - i)
        run = shown.run if rule.needs_loss else shown.run._replace(loss=None)
        moves, state = rule.update(theta, shown.grads, shown.state, shown.params, shown.infos, run)
    return moves
