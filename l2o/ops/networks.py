"""Small networks over many entries at once, weights ``[in, out]``, features first: ``[channels, entries]``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count, pairwise, takewhile

import torch
from torch import Tensor

from l2o.types import Theta

BLOCK = 1 << 16
"""Entries that go through a network at once: enough to fill a machine, few enough that scratch memory stays small."""


def init_linear(generator: torch.Generator, fan_in: int, fan_out: int) -> tuple[Tensor, Tensor]:
    """Return weight ``[fan_in, fan_out]``, truncated normal of deviation ``1/sqrt(fan_in)``, and zero bias (as in
    Haiku)."""
    weight = torch.empty(fan_in, fan_out, dtype=torch.float32, device=generator.device)
    std = 1.0 / math.sqrt(fan_in)
    torch.nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)
    return weight, torch.zeros(fan_out, dtype=torch.float32, device=generator.device)


def init_mlp(generator: torch.Generator, sizes: Sequence[int]) -> Theta:
    """Return weights ``w0, b0, w1, ...`` of an MLP with layers of ``sizes``."""
    theta: Theta = {}
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        theta[f"w{i}"], theta[f"b{i}"] = init_linear(generator, fan_in, fan_out)
    return theta


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Map ``x [in, n] -> [out, n]`` by ``weight [in, out]`` and ``bias [out]``."""
    return torch.addmm(bias.unsqueeze(-1), weight.T, x)


def mlp(
    theta: Theta, x: Tensor, shared: Tensor | None = None, activation: Callable[[Tensor], Tensor] = torch.relu
) -> Tensor:
    """Apply the MLP of the layers ``w0, b0, w1, ...`` in θ, which may hold more.

    x: ``[channels, n]``.  shared: ``[k]``, the last inputs of each entry, the same for all of them (`with_shared`).
    """
    own = theta if shared is None else with_shared(theta, len(x), shared)
    x = linear(x, own["w0"], own["b0"])
    for i in takewhile(lambda i: f"w{i}" in own, count(1)):
        x = linear(activation(x), own[f"w{i}"], own[f"b{i}"])
    return x


def with_shared(weights: Theta, own: int, shared: Tensor) -> Theta:
    """Return ``weights`` for the first ``own`` inputs; the others, the same for all elements, become a part of the
    bias.

    shared: ``[k]``, or ``[tensors, k]`` where they differ from tensor to tensor.
    """
    first, common = weights["w0"].split([own, shared.shape[-1]], -2)
    return weights | {"w0": first, "b0": weights["b0"] + shared @ common}


def lstm_cell(x: Tensor, h: Tensor, c: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Take one step of an LSTM with forget bias 1, gates in the order i, g, f, o (Sonnet v1, Haiku).

    x: ``[in, n]``.  h, c: ``[hidden, n]``.  weight: ``[in + hidden, 4 hidden]``.  Returns the new ``(h, c)``.
    """
    i, g, f, o = linear(torch.cat([x, h]), weight, bias).chunk(4)
    c = torch.sigmoid(f + 1.0) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def apply_coordinatewise(
    network: Callable[..., tuple[Tensor, ...]], inputs: Mapping[str, tuple[Tensor, ...]]
) -> dict[str, tuple[Tensor, ...]]:
    """Apply ``network``, columns ``[*, n]`` to columns, to the entries of several tensors.

    Small tensors share a call, so that the number of kernels does not grow with the number of tensors; large ones
    are cut into blocks, so that scratch memory does not grow with the model.
    """
    outputs: dict[str, tuple[Tensor, ...]] = {}
    for names in _buckets({name: columns[0].shape[-1] for name, columns in inputs.items()}):
        sizes = [inputs[name][0].shape[-1] for name in names]
        joined = [_cat(parts) for parts in zip(*(inputs[name] for name in names), strict=True)]
        blocks = [network(*block) for block in zip(*(x.split(BLOCK, -1) for x in joined), strict=True)]
        results = [_cat(parts).split(sizes, -1) for parts in zip(*blocks, strict=True)]
        outputs.update(zip(names, zip(*results, strict=True), strict=True))
    return outputs


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), -1)


def _buckets(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Consecutive names whose entries fill about one block."""
    bucket: list[str] = []
    filled = 0
    for name, size in sizes.items():
        if bucket and filled + size > BLOCK:
            yield bucket
            bucket, filled = [], 0
        bucket.append(name)
        filled += size
    if bucket:
        yield bucket
