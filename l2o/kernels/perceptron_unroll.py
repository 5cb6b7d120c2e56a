"""Whole unrolls of perceptrons that `l2o.rules.MLP` trains, by one kernel: gradients and updates lane by lane."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from l2o.kernels import mlp_rule, perceptron
from l2o.kernels.arrays import Pointers, derivative_of, pointers
from l2o.kernels.build import available, run
from l2o.kernels.unroll import Batches, Unroll, after
from l2o.types import Grads, InnerState, OptState, Params, Run, Theta, Updates


class _UnrollDerivative(ctypes.Structure):
    """``UnrollDerivative`` of perceptron_unroll_derivative.cpp. Keeps the arrays it points to, but not the tensors."""

    _fields_ = (("d_losses", ctypes.c_void_p), *((name, Pointers) for name in ("d_params", "d_m", "d_theta")))


class _Settings(NamedTuple):
    """What an unroll has besides tensors."""

    constants: mlp_rule.Constants
    activation: str
    copies: int


class _Arrays(NamedTuple):
    """What a kernel reads and leaves, all contiguous; theta as `mlp_rule.dense` has it.

    params, momenta: ``[kept + 1, lanes, ...]`` of each tensor, at first in ``[0]``, in the end in ``[-1]``.
    grads: ``[kept, lanes, ...]``.    scales: ``[kept, lanes, tensors, channels]``.    kept: steps; where each takes the
    place of the one before, all of these have the one place ``[0]``.
    time: ``[steps, lanes, k]``.    x, y, rows: see `Batches`.    left: int64 ``[lanes]``.
    """

    theta: Sequence[Tensor]
    params: Sequence[Tensor]
    momenta: Sequence[Tensor]
    grads: Sequence[Tensor]
    scales: Tensor
    time: Tensor
    x: Tensor
    y: Tensor
    rows: Tensor
    left: Tensor


def fits(constants: mlp_rule.Constants, theta: Theta, state: InnerState, batches: Batches, time: Tensor) -> bool:
    """Say whether `unroll` takes these, and its kernel can be had; the rows of ``batches`` need not be drawn yet.

    time: ``[steps, lanes, times]``.
    """
    if {*batches.names} != state.params.keys():
        return False
    inputs = _inputs(batches.names, theta, state)
    params = [t.contiguous() for t in inputs.params]
    if not mlp_rule.fits(constants, inputs, time[0]) or batches.problem(params, params) is None:
        return False
    return available("perceptron_unroll", *(["perceptron_unroll_derivative"] if inputs.differentiable else []))


def _inputs(names: Sequence[str], theta: Theta, state: InnerState) -> mlp_rule.Tensors:
    params, momenta = [state.params[n] for n in names], [state.opt.per_param[n]["m"] for n in names]
    return mlp_rule.Tensors(mlp_rule.ordered(theta), params, params, momenta)


Update = Callable[[Theta, Grads, OptState, Params, Run], tuple[Updates, OptState]]


def unroll(
    constants: mlp_rule.Constants,
    theta: Theta,
    state: InnerState,
    batches: Batches,
    time: Tensor,
    update: Update,
) -> tuple[InnerState, Tensor]:
    """Return the state after the batches' steps and the losses before each, ``[steps, lanes]``, of what `fits`.

    theta: ``[lanes, ...]``.     time: ``[steps, lanes, k]``, the last inputs of each entry, taken as constants.
    update: of all lanes, in torch's operations, by which what has been differentiated once can be again.
    Differentiable where grad mode is on, by theta, parameters and momenta; all steps' are then kept.
    The same bits whatever the number of threads.
    """
    names = batches.names
    inputs = _inputs(names, theta, state)
    params, momenta, differentiable = inputs.params, inputs.momenta, inputs.differentiable
    arrays = _arrays(inputs, batches, time, state.total_steps - state.step, differentiable)
    settings = _Settings(constants, batches.activation, batches.copies)
    losses = _forward(settings, arrays)
    results = [losses, *(t[-1] for t in (*arrays.params, *arrays.momenta))]
    if differentiable:

        def again(*tensors: Tensor) -> list[Tensor]:
            # There are no gradients among them; parameters and momenta move up by a place.
            split = mlp_rule.Tensors.split((*tensors, *tensors[-len(names) :]), len(names))
            theta, params, opt, _ = split.by_name(names)
            return _step_by_step(update, theta, state._replace(params=params, opt=opt), batches)

        results = _Derivative.apply(settings, arrays, results, again, *inputs.theta, *params, *momenta)
    losses, moved = results[0], dict(zip(names, results[1:], strict=False))
    slots = dict(zip(names, results[1 + len(names) :], strict=True))
    opt = OptState({name: {"m": slots[name]} for name in state.params}, {})
    return after(state, moved, opt, losses), losses


def _step_by_step(update: Update, theta: Theta, state: InnerState, batches: Batches) -> list[Tensor]:
    """What the kernel does, in torch's operations: losses, then parameters and momenta in the end, by layers."""
    names = batches.names
    assert batches.rows is not None
    params, opt, step, losses = state.params, state.opt, state.step, []
    for rows in batches.rows.repeat_interleave(batches.copies, 1):
        layers = [(params[weight], params[bias]) for weight, bias in batches.layers]
        result = perceptron.closed_form(batches.activation, layers, batches.x[rows], batches.y[rows])
        assert result is not None  # whatever the kernel takes has one
        losses.append(result[0])
        grads = dict(zip(names, [g for layer in result[1] for g in layer], strict=True))
        moves, opt = update(theta, grads, opt, params, Run(step, state.total_steps))
        ahead = step < state.total_steps
        params = {k: p + torch.where(ahead.view(-1, *[1] * (p.ndim - 1)), moves[k], 0.0) for k, p in params.items()}
        step = step + ahead
    return [torch.stack(losses), *(params[n] for n in names), *(opt.per_param[n]["m"] for n in names)]


def _arrays(inputs: mlp_rule.Tensors, batches: Batches, time: Tensor, left: Tensor, keep: bool) -> _Arrays:
    """What the kernel begins with, parameters and momenta copied to where they move."""
    assert batches.rows is not None
    kept = len(time) if keep else 0

    def begun(t: Tensor) -> Tensor:
        array = t.new_empty(kept + 1, *t.shape)
        array[0] = t.detach()
        return array

    return _Arrays(
        mlp_rule.dense(inputs).theta,
        [begun(t) for t in inputs.params],
        [begun(t) for t in inputs.momenta],
        [t.new_empty(max(kept, 1), *t.shape) for t in inputs.params],
        time.new_empty(max(kept, 1), time.shape[1], len(inputs.params), 2 + inputs.momenta[0].shape[1]),
        *(t.contiguous() for t in (time, batches.x, batches.y, batches.rows, left)),
    )


def _describe(
    settings: _Settings, arrays: _Arrays, updates: list[Tensor]
) -> tuple[Unroll, mlp_rule._Step, perceptron.Perceptron]:
    """The unroll for the kernel, but for its losses."""
    params, momenta, grads = ([t[0] for t in group] for group in (arrays.params, arrays.momenta, arrays.grads))
    problem = perceptron.describe(settings.activation, params, grads, (arrays.rows.shape[-1], arrays.x.shape[-1]))
    assert problem is not None  # it fits
    inputs = mlp_rule.Tensors(arrays.theta, grads, params, momenta)
    step = mlp_rule.describe(
        settings.constants, inputs, arrays.time[0], mlp_rule.Results(updates, momenta, arrays.scales)
    )
    work = Unroll(
        steps=len(arrays.time),
        copies=settings.copies,
        n=len(arrays.x),
        kept=len(arrays.params[0]) > 1,
        params=pointers(params),
        **{name: getattr(arrays, name).data_ptr() for name in ("x", "y", "rows", "left")},
    )
    return work, step, problem


def _forward(settings: _Settings, arrays: _Arrays) -> Tensor:
    """The losses."""
    updates = [torch.empty_like(t[0]) for t in arrays.grads]
    described = _describe(settings, arrays, updates)
    losses = arrays.time.new_empty(arrays.time.shape[:2])
    described[0].losses = losses.data_ptr()
    run("perceptron_unroll", "l2o_perceptron_unroll", *described)
    return losses


class _Derivative(torch.autograd.Function):
    """Gives ``results``, losses, parameters and momenta in the end, their derivative by theta and those at first."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: _Settings,
        arrays: _Arrays,
        results: list[Tensor],
        reference: Callable[..., list[Tensor]],
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.settings, ctx.reference, ctx.count = settings, reference, len(inputs)
        saved, ctx.structure = tree_flatten(arrays)
        ctx.save_for_backward(*inputs, *saved)
        # Clones: whoever keeps the end should not have to keep all steps.
        return results[0], *(t.clone() for t in results[1:])

    @staticmethod
    def backward(ctx: Any, d_losses: Tensor, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        inputs, saved = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        if torch.is_grad_enabled():
            grads = derivative_of(ctx.reference, inputs, (d_losses, *cotangents))
            return (None, None, None, None, *grads)
        arrays = tree_unflatten(list(saved), ctx.structure)
        # Clones, in which the kernel works.
        d = [t.clone(memory_format=torch.contiguous_format) for t in cotangents]
        d_params, d_momenta = d[: len(arrays.params)], d[len(arrays.params) :]
        d_theta = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in arrays.theta]
        described = _describe(ctx.settings, arrays, updates=d_params)  # which are not written to
        d_losses = d_losses.contiguous()
        work = _UnrollDerivative(d_losses.data_ptr(), *map(pointers, (d_params, d_momenta, d_theta)))
        run("perceptron_unroll_derivative", "l2o_perceptron_unroll_derivative", *described, work)
        return (None, None, None, None, *d_theta, *d)
