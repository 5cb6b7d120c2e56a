"""Inner training: one step, an unroll of many, and the resets between unrolls; vectorised over lanes.

Nothing here waits for the device inside an unroll: no value is read on the host but by rules that keep a
basis, once a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

from l2o import fused
from l2o.family_checks import (
    checked_batch,
    checked_gradients,
    checked_init,
    checked_loss,
    checked_sample,
    name_of,
    vectorised,
)
from l2o.ops.kinds import lane_infos
from l2o.types import (
    Batch,
    Buffers,
    ConfigurationError,
    Grads,
    InnerState,
    Kind,
    OptState,
    Params,
    Run,
    TaskData,
    TaskFamily,
    Theta,
    UpdateRule,
    Updates,
)


def expand_theta(theta: Theta, lanes: int) -> Theta:
    """Make one copy of θ a lane, ``[lanes, ...]``: fresh leaves, so that each lane gets a meta-gradient of its own."""
    return {name: t.detach().expand(lanes, *t.shape).clone() for name, t in theta.items()}


def sample_runs(
    rule: UpdateRule, theta: Theta, family: TaskFamily, horizon: Tensor, generator: torch.Generator
) -> InnerState:
    """Draw a task for every lane and put its training run at step 0.

    theta: ``[lanes, ...]``.  horizon: int64 ``[lanes]``, the length of each run.
    Raises `ConfigurationError` where the family returns something else than `TaskFamily` says.
    """
    data = checked_sample(family, generator, len(horizon))
    params, buffers = checked_init(family, data, generator)
    opt = _init_opt(rule, theta, family, params)
    first_loss = torch.full(horizon.shape, torch.nan, dtype=next(iter(params.values())).dtype, device=horizon.device)
    return InnerState(data, params, buffers, opt, torch.zeros_like(horizon), horizon, first_loss)


def init_state(rule: UpdateRule, theta: Theta, family: TaskFamily, state: InnerState) -> InnerState:
    """Return lanes at step 0, their optimizer state a function of ``theta`` (``[lanes, ...]``)."""
    if not rule.learned_init:
        return state
    at_start = state.step == 0
    fresh = _init_opt(rule, theta, family, state.params)
    opt = tree_map(lambda new, old: torch.where(_along(at_start, new), new, old), fresh, state.opt)
    return state._replace(opt=opt)


def _init_opt(rule: UpdateRule, theta: Theta, family: TaskFamily, params: Params) -> OptState:
    infos = lane_infos(params, family.kinds)

    def init_one(theta: Theta, params: Params) -> Any:
        return rule.init(theta, params, infos)

    return cast(OptState, vmap(init_one)(in_dtype_of(params, theta), params))


def in_dtype_of(params: Params, theta: Theta) -> Theta:
    """Return θ as rules expect it, in the dtype of ``params``; derivatives pass, and come back in θ's own."""
    dtype = next(iter(params.values())).dtype
    return {name: t.to(dtype) for name, t in theta.items()}


def inner_step(
    rule: UpdateRule,
    theta: Theta,
    family: TaskFamily,
    state: InnerState,
    batch: Batch,
    second_order: bool = True,
    in_place: bool = False,
) -> tuple[InnerState, Tensor]:
    """Take one inner training step of every lane: the new state, and the losses ``[lanes]`` before the update.

    Differentiable where grad mode is on; ``second_order=False`` then takes the inner gradients as constants.
    A lane at its horizon is frozen.    in_place: whether a kernel may write the new parameters and the rule's state to
    those of ``state``, which nobody else then reads; buffers are kept apart from them.
    """
    loss, buffers, grads, params = gradients(family, state, batch, second_order)
    grads, buffers = checked_gradients(family, grads, buffers, state.data, batch)
    ahead = state.step < state.total_steps
    if in_place:
        loss, buffers = loss.clone(), _apart(buffers, params)
    if in_place and _step_in_place(rule, theta, grads, state._replace(params=params), loss, family.kinds):
        moved, opt = params, state.opt
    else:
        moves, opt = updates(rule, theta, grads, state._replace(params=params), loss, family.kinds)
        moved = {k: p + torch.where(_along(ahead, p), moves[k], 0.0) for k, p in params.items()}
    first_loss = torch.where(state.step == 0, loss.detach(), state.first_loss)
    return InnerState(state.data, moved, buffers, opt, state.step + ahead, state.total_steps, first_loss), loss


def gradients(
    family: TaskFamily, state: InnerState, batch: Batch, second_order: bool = True
) -> tuple[Tensor, Buffers, Grads, Params]:
    """Return, of all lanes: loss ``[lanes]``, new buffers, gradients, and the parameters as the leaves that these
    belong to."""
    differentiable = torch.is_grad_enabled()
    closed = fused.gradient(family, state.params, state.buffers, state.data, batch)
    if closed is not None:
        loss, buffers, grads = closed
        return loss, buffers, grads if second_order else detach(grads), state.params
    with torch.enable_grad():
        params = {k: p if p.requires_grad else p.detach().requires_grad_() for k, p in state.params.items()}
        loss, buffers = lane_losses(family, params, state.buffers, state.data, batch)
        if not loss.requires_grad:
            raise ConfigurationError(
                f"{name_of(family)}.loss: a loss without derivatives; leave out .detach() and .item()"
            )
        # not vmap(grad): its second derivatives through normalisation layers are wrong (torch 2.13)
        with vectorised(f"{name_of(family)}.loss"):
            derivatives = torch.autograd.grad(
                loss.sum(),
                list(params.values()),
                retain_graph=differentiable,
                create_graph=differentiable and second_order,
                materialize_grads=True,
            )
    grads = dict(zip(params, derivatives, strict=True))
    if differentiable:
        return loss, buffers, grads, params
    return loss.detach(), detach(buffers), grads, state.params


def lane_losses(
    family: TaskFamily, params: Params, buffers: Buffers, data: TaskData, batch: Batch
) -> tuple[Tensor, Buffers]:
    """Return losses ``[lanes]``, in the dtype of ``params``, and new buffers.

    Raises `ConfigurationError` for a loss that `TaskFamily` does not allow, such as one that writes to its inputs.
    """
    name = name_of(family)
    inputs = [t for tensors in (params, buffers, data, batch) for t in tensors.values() if not t.is_inference()]
    before = [t._version for t in inputs]
    with vectorised(f"{name}.loss"):
        loss, after = vmap(partial(checked_loss, family))(params, buffers, data, batch)
    if before != [t._version for t in inputs]:
        raise ConfigurationError(f"{name}.loss writes to its inputs in place; let it write to clones of them")
    return loss, after


def updates(
    rule: UpdateRule, theta: Theta, grads: Grads, state: InnerState, loss: Tensor, kinds: Mapping[str, Kind]
) -> tuple[Updates, OptState]:
    """Return those of all lanes, ``[lanes, ...]``: by the rule's kernel where it has one, else by its ``update``.

    loss: ``[lanes]``.    kinds: those of the family.
    """
    run, theta = Run(state.step, state.total_steps, loss), in_dtype_of(state.params, theta)
    infos, needs_loss = lane_infos(state.params, kinds), rule.needs_loss
    found = fused.update(rule, theta, grads, state.opt, state.params, run, infos)
    if found is not None:
        return found

    def update(theta: Theta, g: Grads, opt: OptState, p: Params, now: Sequence[Any]) -> Any:
        step, total, loss = now
        return rule.update(theta, g, opt, p, infos, Run(step, total, loss if needs_loss else None))

    return cast("tuple[Updates, OptState]", vmap(update)(theta, grads, state.opt, state.params, run[:3]))


def _step_in_place(
    rule: UpdateRule, theta: Theta, grads: Grads, state: InnerState, loss: Tensor, kinds: Mapping[str, Kind]
) -> bool:
    """Whether a kernel took a step of the lanes that are before their horizon; as `updates`."""
    run, infos = Run(state.step, state.total_steps, loss), lane_infos(state.params, kinds)
    inputs = fused.Inputs(theta, grads, state.opt, state.params, infos, run)
    return fused.step_lanes(rule, inputs, state.step < state.total_steps)


def _apart(buffers: Buffers, params: Params) -> Buffers:
    """``buffers``, with copies of those that a family has in the memory of its parameters: the last iterate, say."""
    written = {p.untyped_storage().data_ptr() for p in params.values()}
    return {k: b.clone() if b.untyped_storage().data_ptr() in written else b for k, b in buffers.items()}


def _along(mask: Tensor, like: Tensor) -> Tensor:
    """``mask [lanes]`` with as many axes as ``like``."""
    return mask.view(-1, *[1] * (like.ndim - 1))


def unroll(
    rule: UpdateRule,
    theta: Theta,
    family: TaskFamily,
    state: InnerState,
    steps: int,
    generator: torch.Generator,
    second_order: bool = True,
    valid_weight: float = 0.0,
) -> tuple[InnerState, Tensor]:
    """Take ``steps`` inner steps of every lane on fresh training batches: the new state and losses ``[steps, lanes]``.

    valid_weight: of the loss on a fresh validation batch in each step's loss, beside the training loss.
    """
    theta = in_dtype_of(state.params, theta)  # once, not at every step
    if not valid_weight and (second_order or not torch.is_grad_enabled()):
        result = fused.unroll(rule, theta, family, state, steps, generator)
        if result is not None:
            return result
    in_place = not torch.is_grad_enabled() and fused.has(fused.LANE_STEPS, rule)
    if in_place:
        state = state._replace(params=fused.copied(state.params), opt=fused.copied(state.opt))
    losses = []
    for _ in range(steps):
        batch = checked_batch(family, state.data, "train", generator)
        valid = _validation_loss(family, state, generator) if valid_weight else None
        state, loss = inner_step(rule, theta, family, state, batch, second_order, in_place)
        losses.append(loss if valid is None else torch.lerp(loss, valid, valid_weight))
    return state, torch.stack(losses)


def _validation_loss(family: TaskFamily, state: InnerState, generator: torch.Generator) -> Tensor:
    batch = checked_batch(family, state.data, "valid", generator)
    return lane_losses(family, state.params, state.buffers, state.data, batch)[0]


def running(state: InnerState, steps: int) -> Tensor:
    """Return a bool ``[steps, lanes]``: which of the next ``steps`` steps of each lane lie before its horizon."""
    ahead = torch.arange(steps, device=state.step.device).unsqueeze(1)
    return state.step + ahead < state.total_steps


def detach(tree: Any) -> Any:
    """Return the same nested structure, cut from the graph and contiguous, so that a saved copy is the same bit for
    bit."""
    return tree_map(lambda x: x.detach().contiguous(), tree)


def reset(state: InnerState, lanes: Tensor, new_runs: Callable[[Tensor], InnerState]) -> InnerState:
    """Replace the lanes in the mask ``lanes``, bool ``[lanes]``, by ``new_runs(index)``; waits for the device once."""
    index = lanes.nonzero().squeeze(1)
    if len(index) == 0:
        return state
    return cast(InnerState, tree_map(lambda old, new: old.index_copy(0, index, new), state, new_runs(index)))
