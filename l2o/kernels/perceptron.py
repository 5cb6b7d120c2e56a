"""Losses and gradients of perceptrons with cross-entropy, one a lane, by one kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from l2o.kernels.arrays import Int64s, Pointers, plain, pointers, whole_numbers
from l2o.kernels.build import library, run

ACTIVATIONS = ("relu", "tanh", "gelu")


class _Perceptron(ctypes.Structure):
    """``Perceptron`` of perceptron.cpp. Keeps the arrays it points to, but not the tensors."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("lanes", "batch", "layers", "activation", "threads")),
        ("widths", Int64s),
        *((name, ctypes.c_void_p) for name in ("x", "y")),
        *((name, Pointers) for name in ("params", "grads")),
        ("losses", ctypes.c_void_p),
    )


def gradient(
    activation: str, layers: Sequence[tuple[Tensor, Tensor]], x: Tensor, y: Tensor
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]] | None:
    """Mean losses ``[lanes]`` and gradients by layer, as constants; None where the kernel does not fit.

    activation: of the hidden layers, one of ``ACTIVATIONS``.    x: ``[lanes, batch, in]``.
    layers: weights ``[lanes, out, in]`` and biases ``[lanes, out]``.    y: int64 classes ``[lanes, batch]``.
    """
    params = [t.detach().contiguous() for layer in layers for t in layer]
    x, y = x.contiguous(), y.contiguous()
    widths = [x.shape[-1], *(bias.shape[-1] for bias in params[1::2])]
    if activation not in ACTIVATIONS or not _fits(params, widths, x, y) or library() is None:
        return None
    grads = [torch.empty_like(t) for t in params]
    losses = x.new_empty(len(x))
    problem = _Perceptron(
        lanes=len(x),
        batch=x.shape[1],
        layers=len(layers),
        activation=ACTIVATIONS.index(activation),
        threads=torch.get_num_threads(),
        widths=whole_numbers(widths),
        x=x.data_ptr(),
        y=y.data_ptr(),
        params=pointers(params),
        grads=pointers(grads),
        losses=losses.data_ptr(),
    )
    if run("l2o_perceptron_gradient", problem) != 0:  # a label that is no class: torch's own error says more
        return None
    return losses, list(zip(grads[::2], grads[1::2], strict=True))


def _fits(params: Sequence[Tensor], widths: Sequence[int], x: Tensor, y: Tensor) -> bool:
    """Whether dtypes, devices and all shapes are such that the kernel stays inside its arrays."""
    if not plain([x, *params]) or y.dtype != torch.int64 or not y.is_cpu or x.numel() == 0:
        return False
    shapes = [s for i, o in pairwise(widths) for s in ((len(x), o, i), (len(x), o))]
    return [t.shape for t in params] == shapes and y.shape == x.shape[:2] and x.ndim == 3
