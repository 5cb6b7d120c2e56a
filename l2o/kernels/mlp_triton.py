"""`l2o.rules.MLP` on GPUs: two Triton kernels for each tensor of all lanes, without a derivative.

In Triton's interpreter (``TRITON_INTERPRET=1`` when this module is imported) they run on the CPU, which is how they are
tested. The formulas restated here are those of l2o/rules/mlp.py and, in it, of `momenta` and `mlp` in l2o/ops.
"""

# No `from __future__ import annotations`: Triton reads the annotations of its kernels. Nor may a kernel's argument be
# called `params`, `specialization` or `options`: Triton's launcher has variables of these names, which hide it.

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from l2o.ops.features import second_moment_scale
from l2o.ops.numeric import constant

if TYPE_CHECKING:
    from l2o.kernels.mlp_rule import Constants, Tensors

_LEAST = 16
"""Rows and columns of the smallest product of matrices."""
_MOST = 32
"""Most channels and hidden units; with 64, compiling takes a minute."""
_BLOCK = 128
"""Entries of a program."""


@triton.jit
def _look(  # type: ignore[no-untyped-def]  # noqa: PLR0913
    grads,
    values,
    m_old,
    m_new,
    decays,
    sums,
    n,
    DECAYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """First pass over a block of one lane: momenta, and channels' sums of squares, ``[lanes, blocks, channels]``."""
    block, lane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    entry = block * BLOCK + tl.arange(0, BLOCK)
    inside = entry < n
    g = tl.load(grads + lane * n + entry, inside, other=0.0)
    p = tl.load(values + lane * n + entry, inside, other=0.0)
    sums += (lane * tl.num_programs(0) + block) * (2 + DECAYS)
    tl.store(sums, tl.sum(g * g))
    tl.store(sums + 1, tl.sum(p * p))
    for i in tl.static_range(DECAYS):
        d = tl.load(decays + i)
        at = (lane * DECAYS + i) * n + entry
        old = tl.load(m_old + at, inside, other=0.0)
        m = tl.where(d < 0.5, g + d * (old - g), old - (1.0 - d) * (old - g))  # as torch.lerp
        tl.store(m_new + at, m, inside)
        tl.store(sums + 2 + i, tl.sum(m * m))


@triton.jit
def _apply(  # type: ignore[no-untyped-def]  # noqa: PLR0913
    grads,
    values,
    m,
    scales,
    first,
    first_bias,
    middle,
    middle_bias,
    last,
    last_bias,
    updates,
    n,
    step_mult,
    exp_mult,
    DECAYS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    MIDDLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Second pass over a block of one lane: the network on its channels."""
    block, lane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    entry = block * BLOCK + tl.arange(0, BLOCK)
    inside = entry < n
    c, unit = tl.arange(0, CHANNELS), tl.arange(0, WIDTH)
    own = (c >= 2) & (c < 2 + DECAYS)
    x = tl.load(m + (lane * DECAYS + c[None, :] - 2) * n + entry[:, None], inside[:, None] & own[None, :], other=0.0)
    g = tl.load(grads + lane * n + entry, inside, other=0.0)
    p = tl.load(values + lane * n + entry, inside, other=0.0)
    x = tl.where(c[None, :] == 0, g[:, None], tl.where(c[None, :] == 1, p[:, None], x))
    x *= tl.load(scales + lane * CHANNELS + c)[None, :]
    # ieee: PES takes differences of runs that are nearly the same, for which the 10 bits of TF32 are few.
    weight = tl.load(first + (lane * CHANNELS + c[:, None]) * WIDTH + unit[None, :])
    h = tl.dot(x, weight, input_precision="ieee") + tl.load(first_bias + lane * WIDTH + unit)[None, :]
    for i in tl.static_range(MIDDLE):
        h = tl.where(h < 0.0, 0.0, h)  # which keeps NaN
        layer = lane * MIDDLE + i
        weight = tl.load(middle + (layer * WIDTH + unit[:, None]) * WIDTH + unit[None, :])
        h = tl.dot(h, weight, input_precision="ieee") + tl.load(middle_bias + layer * WIDTH + unit)[None, :]
    h = tl.where(h < 0.0, 0.0, h)
    last += lane * 2 * WIDTH
    direction = tl.sum(h * tl.load(last + unit)[None, :], 1) + tl.load(last_bias + lane * 2)
    magnitude = tl.sum(h * tl.load(last + WIDTH + unit)[None, :], 1) + tl.load(last_bias + lane * 2 + 1)
    tl.store(updates + lane * n + entry, -step_mult * direction * tl.exp(exp_mult * magnitude), inside)


class _Network(NamedTuple):
    """The layers of all lanes, padded with zeros to powers of two; what all entries share is in the first bias.

    first: ``[lanes, channels, width]``.   middle: ``[lanes, layers - 2, width, width]``.   last: ``[lanes, 2, width]``.
    """

    first: Tensor
    first_bias: Tensor
    middle: Tensor
    middle_bias: Tensor
    last: Tensor
    last_bias: Tensor


def fits(tensors: "Tensors") -> bool:
    """Say whether the network has hidden layers, small ones, and the entries few enough momenta."""
    widths = [2 + tensors.momenta[0].shape[1], *(b.shape[-1] for b in tensors.theta[1:-2:2])]
    return len(widths) > 1 and max(widths) <= _MOST


def forward(constants: "Constants", tensors: "Tensors", time: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return updates and momenta of all lanes, ``[lanes, ...]``, one a parameter; see `l2o.kernels.mlp_gpu`."""
    own = 2 + len(constants.decays)
    channels = _padded(own)
    network = _network(tensors.theta, own, channels, time)
    decays = constant(constants.decays, time)
    updates, momenta = [], []
    for g, p, old in zip(*([t.contiguous() for t in group] for group in tensors[1:]), strict=True):
        update, m, n = torch.empty_like(g), torch.empty_like(old), g.numel() // len(g)
        block = min(_BLOCK, _padded(n))
        grid = (triton.cdiv(n, block), len(g))  # CUDA takes 65,535 programs on any axis but the first
        if n:
            sums = g.new_empty(*reversed(grid), own)
            with torch.cuda.device_of(g):  # Triton launches on the current device, whose tensors these need not be
                _look[grid](g, p, old, m, decays, sums, n, DECAYS=len(decays), BLOCK=block)
            scales = pad(second_moment_scale(sums.sum(1), n, constants.eps), (0, channels - own))
            with torch.cuda.device_of(g):
                _apply[grid](
                    *(g, p, m, scales, *network, update, n, constants.step_mult, constants.exp_mult),
                    DECAYS=len(decays),
                    CHANNELS=channels,
                    WIDTH=network.first.shape[-1],
                    MIDDLE=network.middle.shape[1],
                    BLOCK=block,
                )
        updates.append(update)
        momenta.append(m)
    return updates, momenta


def _network(theta: Sequence[Tensor], own: int, channels: int, time: Tensor) -> _Network:
    weights, biases = theta[::2], theta[1::2]
    width = _padded(max(b.shape[-1] for b in biases[:-1]))
    shared = biases[0] + (time.unsqueeze(1) @ weights[0][:, own:]).squeeze(1)
    square = [pad(w, (0, width - w.shape[2], 0, width - w.shape[1])) for w in weights[1:-1]]
    none = time.new_empty(len(time), 0)
    return _Network(
        pad(weights[0][:, :own], (0, width - weights[0].shape[2], 0, channels - own)).contiguous(),
        pad(shared, (0, width - shared.shape[1])),
        torch.stack(square, 1) if square else none,
        torch.stack([pad(b, (0, width - b.shape[1])) for b in biases[1:-1]], 1) if square else none,
        pad(weights[-1].mT, (0, width - weights[-1].shape[1])).contiguous(),
        biases[-1].contiguous(),
    )


def _padded(n: int) -> int:
    return max(_LEAST, triton.next_power_of_2(n))
