"""Whole unrolls of perceptrons that `l2o.rules.MLP` trains, by one kernel: gradients and updates lane by lane."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from l2o.kernels import mlp_rule, perceptron
from l2o.kernels.arrays import Pointers, plain, pointers
from l2o.kernels.build import library, run
from l2o.types import InnerState, OptState, PerceptronBatches, Theta


class _Unroll(ctypes.Structure):
    """``Unroll`` of perceptron_unroll.cpp. Keeps the arrays it points to, but not the tensors."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("steps", "copies", "n")),
        *((name, ctypes.c_void_p) for name in ("x", "y", "rows", "left")),
        ("params", Pointers),
        ("losses", ctypes.c_void_p),
    )


def unroll(
    constants: mlp_rule.Constants, theta: Theta, state: InnerState, batches: PerceptronBatches, time: Tensor
) -> tuple[InnerState, Tensor] | None:
    """The state after the batches' steps and the losses before each, ``[steps, lanes]``, as constants; None where the
    kernel does not fit or cannot be had.

    theta: ``[lanes, ...]``.     time: ``[steps, lanes, k]``, the last inputs of each entry.
    The same bits whatever the number of threads. A thread takes whole lanes, so there have to be as many.
    """
    names = [name for layer in batches.layers for name in layer]
    steps, lanes, _ = time.shape
    if lanes < torch.get_num_threads() or set(names) != state.params.keys() or library() is None:
        return None
    # Clones, in which the kernel works.
    params, momenta = (
        [t.detach().clone(memory_format=torch.contiguous_format) for t in tensors]
        for tensors in ([state.params[n] for n in names], [state.opt.per_param[n]["m"] for n in names])
    )
    grads, updates = ([torch.empty_like(p) for p in params] for _ in range(2))
    inputs = mlp_rule.Tensors(mlp_rule.ordered(theta), grads, params, momenta)
    problem = perceptron.describe(batches.activation, params, grads, (batches.rows.shape[-1], batches.x.shape[-1]))
    if not (problem and mlp_rule.fits(constants, inputs, time[0]) and _fits(batches, steps, lanes)):
        return None
    inputs = mlp_rule.dense(inputs)
    time, x, y, rows = (t.contiguous() for t in (time, batches.x, batches.y, batches.rows))
    results = mlp_rule.Results(updates, momenta, time.new_empty(lanes, len(params), 2 + len(constants.decays)))
    losses, left = time.new_empty(steps, lanes), (state.total_steps - state.step).contiguous()
    arrays = {"x": x.data_ptr(), "y": y.data_ptr(), "rows": rows.data_ptr(), "left": left.data_ptr()}
    work = _Unroll(
        steps=steps, copies=batches.copies, n=len(x), params=pointers(params), losses=losses.data_ptr(), **arrays
    )
    if run("l2o_perceptron_unroll", work, mlp_rule.describe(constants, inputs, time[0], results), problem) != 0:
        return None  # a label that is no class: torch's own error says more
    return _after(state, names, params, momenta, losses), losses


def _fits(batches: PerceptronBatches, steps: int, lanes: int) -> bool:
    """Whether the table and its rows are what the kernel reads."""
    whole = all(t.dtype == torch.int64 and t.is_cpu for t in (batches.y, batches.rows))
    shapes = batches.rows.shape[:2] == (steps, lanes // batches.copies) and lanes % batches.copies == 0
    return whole and shapes and plain([batches.x]) and batches.y.shape == batches.x.shape[:1] and batches.x.ndim == 2


def _after(
    state: InnerState, names: list[str], params: list[Tensor], momenta: list[Tensor], losses: Tensor
) -> InnerState:
    by_name, slots = dict(zip(names, params, strict=True)), dict(zip(names, momenta, strict=True))
    return state._replace(
        params={name: by_name[name] for name in state.params},
        opt=OptState({name: {"m": slots[name]} for name in state.params}, {}),
        step=torch.minimum(state.step + len(losses), state.total_steps),
        first_loss=torch.where(state.step == 0, losses[0], state.first_loss),
    )
