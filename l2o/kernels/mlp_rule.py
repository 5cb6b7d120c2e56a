"""`l2o.rules.MLP` in one kernel a step, for all lanes and all tensors, and its derivative."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l2o.kernels.arrays import (
    Floats,
    Int64s,
    Pointers,
    dense_lanes,
    derivative_of,
    floats,
    plain,
    pointers,
    whole_numbers,
)
from l2o.kernels.build import available, run
from l2o.types import Grads, OptState, Params, Theta, Updates


class Constants(NamedTuple):
    """What the update has besides tensors; ``eps`` is that of `l2o.ops.features.second_moment_scale`."""

    decays: tuple[float, ...]
    step_mult: float
    exp_mult: float
    eps: float


class _Step(ctypes.Structure):
    """``Step`` of mlp_rule.cpp. Keeps the arrays it points to, but not the tensors."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("lanes", "tensors", "layers", "decays", "times", "threads")),
        *((name, Int64s) for name in ("entries", "widths", "strides")),
        ("decay", Floats),
        ("time", ctypes.c_void_p),
        *((name, ctypes.c_float) for name in ("step_mult", "exp_mult", "eps")),
        *((name, Pointers) for name in ("theta", "grads", "params", "m_old", "m_new", "updates")),
        ("scales", ctypes.c_void_p),
    )


class _Derivative(ctypes.Structure):
    """``Derivative`` of mlp_rule.cpp. Keeps the arrays it points to, but not the tensors."""

    _fields_ = tuple((name, Pointers) for name in ("d_updates", "d_m_new", "d_theta", "d_grads", "d_params", "d_m_old"))


def update(
    constants: Constants,
    theta: Theta,
    grads: Grads,
    state: OptState,
    params: Params,
    time: Tensor,
    reference: Callable[[Theta, Grads, OptState, Params], tuple[Updates, OptState]],
) -> tuple[Updates, OptState] | None:
    """Return all lanes' update, every tensor ``[lanes, ...]``; None where the kernel does not fit or cannot be had.

    theta: as `l2o.rules.MLP` has it.    time: ``[lanes, k]``, the last inputs of each entry, taken as constants.
    reference: the same in torch's operations. Differentiable, by a kernel the first time, then by ``reference``.
    The same bits whatever the number of threads.
    """
    tensors = Tensors.of(theta, grads, state, params)
    if not (fits(constants, tensors, time) and available("mlp_rule")):
        return None
    if tensors.differentiable:
        names = list(params)

        def again(*tensors: Tensor) -> list[Tensor]:
            updates, state = reference(*Tensors.split(tensors, len(names)).by_name(names))
            return [*(updates[name] for name in names), *(state.per_param[name]["m"] for name in names)]

        return named(params, _Update.apply(constants, time, len(params), again, *tensors.all))
    updates, momenta, _ = _forward(constants, dense(tensors), time.contiguous())
    return named(params, [*updates, *momenta])


def named(params: Params, results: Sequence[Tensor]) -> tuple[Updates, OptState]:
    """Return what a rule does.  results: updates, then momenta ``[..., decays, *shape]``, in the params' order."""
    slots = {name: {"m": m} for name, m in zip(params, results[len(params) :], strict=True)}
    return dict(zip(params, results, strict=False)), OptState(slots, {})


def ordered(theta: Theta) -> list[Tensor]:
    """Return ``w0, b0, w1, ...``, ``[..., in, out]`` and ``[..., out]``."""
    return [t for i in range(len(theta) // 2) for t in (theta[f"w{i}"], theta[f"b{i}"])]


class Tensors(NamedTuple):
    """theta: ``w0, b0, w1, ...``; the others one for each parameter."""

    theta: Sequence[Tensor]
    grads: Sequence[Tensor]
    params: Sequence[Tensor]
    momenta: Sequence[Tensor]

    @classmethod
    def of(cls, theta: Theta, grads: Grads, state: OptState, params: Params) -> Tensors:
        """Put tensors in the order of ``params``."""
        return cls(
            ordered(theta),
            [grads[name] for name in params],
            list(params.values()),
            [state.per_param[name]["m"] for name in params],
        )

    def by_name(self, names: Sequence[str]) -> tuple[Theta, Grads, OptState, Params]:
        """Return what `of` takes, but for the order.  names: of the parameters."""
        theta = {f"{'wb'[i % 2]}{i // 2}": t for i, t in enumerate(self.theta)}
        grads, params, momenta = (dict(zip(names, group, strict=True)) for group in self[1:])
        return theta, grads, OptState({name: {"m": m} for name, m in momenta.items()}, {}), params

    @property
    def all(self) -> list[Tensor]:
        """One after the other, ``[lanes, ...]``."""
        return [t for group in self for t in group]

    @property
    def differentiable(self) -> bool:
        """Whether autograd has to know of what is computed from them."""
        return torch.is_grad_enabled() and any(t.requires_grad for t in self.all)

    @classmethod
    def split(cls, tensors: Sequence[Tensor], count: int) -> Tensors:
        """Name what `all` put in a row, ``[lanes, ...]``, of ``count`` parameters."""
        return cls(tensors[: -3 * count], *(tensors[len(tensors) - i * count :][:count] for i in (3, 2, 1)))


def fits(constants: Constants, tensors: Tensors, time: Tensor, anywhere: bool = False) -> bool:
    """Say whether dtypes, devices and shapes, of ``time`` too, are such that the kernel stays inside its arrays.

    anywhere: on any one device, not on the CPU alone.
    """
    lanes, times = time.shape
    if not (lanes and tensors.params and plain([time, *tensors.all], anywhere)):
        return False
    if any(t.device != time.device for t in tensors.all):
        return False
    widths = [2 + len(constants.decays) + times, *(b.shape[-1] for b in tensors.theta[1::2])]
    layers = [shape for fan_in, fan_out in pairwise(widths) for shape in ((lanes, fan_in, fan_out), (lanes, fan_out))]
    moments = [(lanes, len(constants.decays), *p.shape[1:]) for p in tensors.params]
    return (
        [t.shape for t in tensors.theta] == layers
        and widths[-1] == 2
        and all(len(p) == lanes and p.shape == g.shape for p, g in zip(tensors.params, tensors.grads, strict=True))
        and [m.shape for m in tensors.momenta] == moments
    )


class Results(NamedTuple):
    """updates, momenta: one for each parameter.    scales: ``[lanes, parameters, channels]``."""

    updates: Sequence[Tensor]
    momenta: Sequence[Tensor]
    scales: Tensor


def describe(constants: Constants, inputs: Tensors, time: Tensor, results: Results) -> _Step:
    """Describe one step for the kernel.  inputs, time ``[lanes, times]`` and results contiguous, see `dense`."""
    own = 2 + len(constants.decays)
    return _Step(
        lanes=len(time),
        tensors=len(inputs.params),
        layers=len(inputs.theta) // 2,
        decays=len(constants.decays),
        times=time.shape[1],
        threads=torch.get_num_threads(),
        entries=whole_numbers([p.numel() // len(time) for p in inputs.params]),
        widths=whole_numbers([own, *(b.shape[-1] for b in inputs.theta[1::2])]),
        strides=whole_numbers([t.stride(0) for t in inputs.theta]),
        decay=floats(constants.decays),
        time=time.data_ptr(),
        step_mult=constants.step_mult,
        exp_mult=constants.exp_mult,
        eps=constants.eps,
        theta=pointers(inputs.theta),
        grads=pointers(inputs.grads),
        params=pointers(inputs.params),
        m_old=pointers(inputs.momenta),
        m_new=pointers(results.momenta),
        updates=pointers(results.updates),
        scales=results.scales.data_ptr(),
    )


def dense(tensors: Tensors) -> Tensors:
    """Return each lane of each tensor contiguous; lanes of theta may share their memory."""
    return Tensors([dense_lanes(t) for t in tensors.theta], *([t.contiguous() for t in g] for g in tensors[1:]))


def _forward(constants: Constants, inputs: Tensors, time: Tensor) -> Results:
    """``inputs`` and ``time`` contiguous, see `dense`."""
    updates = [torch.empty_like(p) for p in inputs.params]
    momenta = [torch.empty_like(m) for m in inputs.momenta]
    scales = time.new_empty(len(time), len(updates), 2 + len(constants.decays))
    results = Results(updates, momenta, scales)
    run("mlp_rule", "l2o_mlp_update", describe(constants, inputs, time, results))
    return results


class _Update(torch.autograd.Function):
    """`_forward` with its derivative; the tensors of ``Tensors`` one after the other, updates then momenta out."""

    @staticmethod
    def forward(
        ctx: Any,
        constants: Constants,
        time: Tensor,
        count: int,
        reference: Callable[..., list[Tensor]],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        time = time.contiguous()
        results = _forward(constants, dense(Tensors.split(tensors, count)), time)
        ctx.constants, ctx.count, ctx.reference = constants, count, reference
        ctx.save_for_backward(time, results.scales, *results.momenta, *tensors)
        return (*results.updates, *results.momenta)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        time, scales, *saved = ctx.saved_tensors
        momenta, tensors = saved[: ctx.count], saved[ctx.count :]
        if torch.is_grad_enabled():
            return (None, None, None, None, *derivative_of(ctx.reference, tensors, gradients))
        # The old momenta are not needed, the new ones are.
        inputs = dense(Tensors.split(tensors, ctx.count)._replace(momenta=momenta))
        d_updates, d_momenta = ([g.contiguous() for g in gs] for gs in (gradients[: ctx.count], gradients[ctx.count :]))
        # Of theta densely, also where lanes share it: each lane has a gradient of its own.
        d = Tensors(*([torch.empty_like(t, memory_format=torch.contiguous_format) for t in g] for g in inputs))
        arrays = (d_updates, d_momenta, d.theta, d.grads, d.params, d.momenta)
        step = describe(ctx.constants, inputs, time, Results(d_updates, inputs.momenta, scales))
        run("mlp_rule", "l2o_mlp_derivative", step, _Derivative(*map(pointers, arrays)))
        return (None, None, None, None, *(t for group in d for t in group))
