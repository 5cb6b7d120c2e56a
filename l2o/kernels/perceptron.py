"""Losses and gradients of perceptrons with cross-entropy, one a lane, by one kernel."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from l2o.kernels.arrays import Int64s, Pointers, derivative_of, plain, pointers, whole_numbers
from l2o.kernels.build import available, run

ACTIVATIONS = ("relu", "tanh", "gelu")


class Perceptron(ctypes.Structure):
    """``Perceptron`` of perceptron.cpp. Keeps the arrays it points to, but not the tensors."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("lanes", "batch", "layers", "activation", "threads")),
        ("widths", Int64s),
        *((name, ctypes.c_void_p) for name in ("x", "y")),
        *((name, Pointers) for name in ("params", "grads")),
        ("losses", ctypes.c_void_p),
    )


class _Cotangents(ctypes.Structure):
    """``Cotangents`` of perceptron_derivative.cpp. Keeps the arrays it points to, but not the tensors."""

    _fields_ = (("losses", ctypes.c_void_p), ("grads", Pointers))


def gradient(
    activation: str, layers: Sequence[tuple[Tensor, Tensor]], x: Tensor, y: Tensor
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]] | None:
    """Return the mean losses ``[lanes]`` and gradients by layer; None where the kernel does not fit.

    activation: of the hidden layers, one of ``ACTIVATIONS``.    x: ``[lanes, batch, in]``, a constant.
    layers: weights ``[lanes, out, in]`` and biases ``[lanes, out]``.    y: int64 classes ``[lanes, batch]``.
    Differentiable where grad mode is on, by a kernel the first time. The same bits whatever the number of threads.
    """
    params, x, y = [t.contiguous() for layer in layers for t in layer], x.contiguous(), y.contiguous()
    grads = [torch.empty_like(t) for t in params]
    problem = describe(activation, params, grads, x.shape[1:])
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *params))
    if problem is None or not _fits(x, y, len(params[0])) or (differentiable and x.requires_grad):
        return None
    if not available("perceptron", *(["perceptron_derivative"] if differentiable else [])):
        return None
    losses = x.new_empty(len(x))
    problem.x, problem.y, problem.losses = x.data_ptr(), y.data_ptr(), losses.data_ptr()
    if run("perceptron", "l2o_perceptron_gradient", problem) != 0:
        return None  # a label that is no class: torch's own error says more
    if differentiable:
        losses, *grads = _Derivative.apply(activation, x, y, (losses, *grads), *params)
    return losses, list(zip(grads[::2], grads[1::2], strict=True))


class _Derivative(torch.autograd.Function):
    """Gives ``results``, losses and gradients of all parameters, their derivative."""

    @staticmethod
    def forward(
        ctx: Any, activation: str, x: Tensor, y: Tensor, results: tuple[Tensor, ...], *params: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.activation = activation
        ctx.save_for_backward(x, y, *params)
        return results

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        x, y, *params = ctx.saved_tensors
        if torch.is_grad_enabled():
            reference = partial(_reference, ctx.activation, x, y)
            return (None, None, None, None, *derivative_of(reference, params, cotangents))
        d_losses, *d_grads = [t.contiguous() for t in cotangents]
        d_params = [torch.empty_like(t) for t in params]
        problem = describe(ctx.activation, params, d_params, x.shape[1:])
        assert problem is not None  # it has been for the gradient
        problem.x, problem.y = x.data_ptr(), y.data_ptr()
        wanted = _Cotangents(losses=d_losses.data_ptr(), grads=pointers(d_grads))
        run("perceptron_derivative", "l2o_perceptron_derivative", problem, wanted)
        return (None, None, None, None, *d_params)


def _reference(activation: str, x: Tensor, y: Tensor, *params: Tensor) -> list[Tensor]:
    """Losses and gradients, as the kernel has them."""
    result = closed_form(activation, list(zip(params[::2], params[1::2], strict=True)), x, y)
    assert result is not None  # whatever the kernel takes has one
    losses, grads = result
    return [losses, *(g for layer in grads for g in layer)]


def closed_form(
    activation: str, layers: Sequence[tuple[Tensor, Tensor]], x: Tensor, y: Tensor
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]] | None:
    """Return losses ``[lanes]`` and gradients as `gradient`, of ``x [lanes, batch, in]`` and labels ``y``, in
    torch's operations over all lanes at once: on any device, differentiable any number of times.

    Far fewer of them than ``vmap`` and autograd take, above all where they are recorded for a second derivative.
    """
    if activation not in SLOPES or not plain([x, *(t for layer in layers for t in layer)], anywhere=True):
        return None
    inputs, slopes = [x], []
    for i, (weight, bias) in enumerate(layers):
        z = torch.baddbmm(bias.unsqueeze(1), inputs[-1], weight.mT)
        if i + 1 < len(layers):
            h, slope = SLOPES[activation](z)
            inputs.append(h)
            slopes.append(slope)
    logarithms = z.log_softmax(-1)
    losses = -logarithms.gather(-1, y.unsqueeze(-1)).mean((1, 2))
    d = (
        logarithms.exp().scatter_add(-1, y.unsqueeze(-1), logarithms.new_full((), -1.0).expand(*y.shape, 1))
        / y.shape[1]
    )
    grads = []
    for weight, _ in reversed(layers):
        grads.append((d.mT @ inputs.pop(), d.sum(1)))
        if slopes:
            d = (d @ weight) * slopes.pop()
    return losses, grads[::-1]


def _relu(z: Tensor) -> tuple[Tensor, Tensor]:
    return z.relu(), (z > 0).to(z.dtype)


def _tanh(z: Tensor) -> tuple[Tensor, Tensor]:
    h = z.tanh()
    return h, 1.0 - h.square()


def _gelu(z: Tensor) -> tuple[Tensor, Tensor]:
    below = torch.special.ndtr(z)
    return z * below, below + z * (z.square() * -0.5).exp() * (2.0 * math.pi) ** -0.5


SLOPES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {"relu": _relu, "tanh": _tanh, "gelu": _gelu}
"""Activations with their derivatives."""


def describe(
    activation: str, params: Sequence[Tensor], grads: Sequence[Tensor], shape: Sequence[int]
) -> Perceptron | None:
    """Describe the problem for the kernel, but for its images, labels and losses; None where it does not fit.

    params, grads: weights and biases by layer, contiguous.     shape: of a batch, ``[batch, in]``.
    """
    batch, fan_in = shape
    lanes, widths = len(params[0]), [fan_in, *(bias.shape[-1] for bias in params[1::2])]
    shapes = [s for i, o in pairwise(widths) for s in ((lanes, o, i), (lanes, o))]
    fits = plain(params) and [t.shape for t in params] == shapes and lanes > 0 < min(batch, *widths)
    if activation not in ACTIVATIONS or not fits:
        return None
    return Perceptron(
        lanes=lanes,
        batch=batch,
        layers=len(params) // 2,
        activation=ACTIVATIONS.index(activation),
        threads=torch.get_num_threads(),
        widths=whole_numbers(widths),
        params=pointers(params),
        grads=pointers(grads),
    )


def _fits(x: Tensor, y: Tensor, lanes: int) -> bool:
    """Whether images and labels are such that the kernel stays inside its arrays."""
    return (
        plain([x])
        and y.dtype == torch.int64
        and y.is_cpu
        and x.ndim == 3
        and y.shape == x.shape[:2] == (lanes, x.shape[1])
    )
