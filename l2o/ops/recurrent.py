"""An LSTM over the tensors of a model: one row of its batch is one tensor, the weights are the same for all.

θ: ``lstm_w [in + hidden, 4 hidden]``, ``lstm_b [4 hidden]``, and the state it starts with, ``lstm_h, lstm_c [hidden]``.
Slots of each tensor: ``h, c [hidden]``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from l2o.ops.networks import init_linear, lstm_cell
from l2o.types import Slots, Theta


def init_tensor_lstm(generator: torch.Generator, fan_in: int, hidden: int) -> Theta:
    """Initialise as Haiku does; the first state is zero, and learned."""
    weight, bias = init_linear(generator, fan_in + hidden, 4 * hidden)
    zeros = torch.zeros(hidden, dtype=torch.float32, device=generator.device)
    return {"lstm_w": weight, "lstm_b": bias, "lstm_h": zeros, "lstm_c": zeros.clone()}


def lstm_slots(theta: Theta) -> Slots:
    """Return the state of a tensor before its first update, as a function of θ."""
    return {"h": theta["lstm_h"].clone(), "c": theta["lstm_c"].clone()}


def tensor_lstm(theta: Theta, x: Tensor, slots: Mapping[str, Slots]) -> tuple[Tensor, dict[str, Slots]]:
    """Take one step: its output ``[hidden, tensors]``, and ``h, c`` of each tensor.

    x: ``[in, tensors]``, in the order of ``slots``, by tensor, of which ``h`` and ``c`` are read.
    """
    h, c = (torch.stack([s[slot] for s in slots.values()], -1) for slot in "hc")
    h, c = lstm_cell(x, h, c, theta["lstm_w"], theta["lstm_b"])
    rows = zip(slots, h.unbind(-1), c.unbind(-1), strict=True)
    return h, {name: {"h": own_h, "c": own_c} for name, own_h, own_c in rows}
