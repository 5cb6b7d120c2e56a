"""A stack of LSTM cells over the entries of tensors: an entry is a row of the batch, the weights are the same for all.

θ: ``w0, b0, w1, b1, ...`` of the cells, ``w_out, b_out`` of the readout. Slots of each tensor: ``h0, c0, h1, c1, ...``,
``[hidden, *shape]``, zero at first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from l2o.ops.features import columns
from l2o.ops.networks import apply_coordinatewise, init_linear, linear, lstm_cell
from l2o.types import Slots, Theta


def init_coordinatewise_lstm(generator: torch.Generator, fan_in: int, hidden: Sequence[int]) -> Theta:
    """Return cells of ``hidden`` units that read ``fan_in`` features, and a readout of one number."""
    theta: Theta = {}
    for i, (inputs, units) in enumerate(pairwise((fan_in, *hidden))):
        theta[f"w{i}"], theta[f"b{i}"] = init_linear(generator, inputs + units, 4 * units)
    theta["w_out"], theta["b_out"] = init_linear(generator, hidden[-1], 1)
    return theta


def coordinatewise_slots(param: Tensor, hidden: Sequence[int]) -> Slots:
    """Return zero states for every entry of ``param``: ``h0, c0, ...``, ``[units, *param.shape]``."""
    return {
        f"{slot}{i}": torch.zeros_like(param).expand(units, *param.shape).clone()
        for i, units in enumerate(hidden)
        for slot in "hc"
    }


def coordinatewise_lstm(
    theta: Theta,
    features: Mapping[str, Tensor],
    state: Mapping[str, Slots],
    encode: Callable[[Tensor], Tensor] = lambda x: x,
) -> dict[str, Slots]:
    """Take one step: the new ``h0, c0, ...`` of each tensor.

    features: by tensor, ``[fan_in, *shape]``; ``encode``, columns to columns, comes between them and the first cell.
    """

    def cells(x: Tensor, *previous: Tensor) -> tuple[Tensor, ...]:
        x = encode(x)
        new: list[Tensor] = []
        for i, (h, c) in enumerate(zip(previous[::2], previous[1::2], strict=True)):
            x, c = lstm_cell(x, h, c, theta[f"w{i}"], theta[f"b{i}"])
            new += [x, c]
        return tuple(new)

    slots = [f"{slot}{i}" for i in range(_depth(theta)) for slot in "hc"]
    inputs = {name: (columns(x), *(columns(state[name][slot]) for slot in slots)) for name, x in features.items()}
    new = apply_coordinatewise(cells, inputs)
    return {
        name: {slot: h.reshape(h.shape[0], *x.shape[1:]) for slot, h in zip(slots, new[name], strict=True)}
        for name, x in features.items()
    }


def readout(theta: Theta, state: Mapping[str, Slots], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Return the last cell's output as one number an entry, by tensor, in the tensor's shape."""

    def network(h: Tensor) -> tuple[Tensor]:
        return (linear(h, theta["w_out"], theta["b_out"]),)

    last = f"h{_depth(theta) - 1}"
    outputs = apply_coordinatewise(network, {name: (columns(state[name][last]),) for name in shapes})
    return {name: outputs[name][0].reshape(shape) for name, shape in shapes.items()}


def _depth(theta: Theta) -> int:
    return sum(name[1:].isdigit() for name in theta if name[0] == "w")
