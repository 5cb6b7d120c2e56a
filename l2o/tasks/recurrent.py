"""torch's recurrent layers, one step after the other: `torch.func.vmap` has no batching rule for the fused ones.

Equations and order of the gates: https://pytorch.org/docs/stable/generated/torch.nn.LSTM.html, likewise GRU and RNN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from l2o.types import ConfigurationError

State = tuple[Tensor, ...]
"""Each ``[batch, hidden]``; the first one is the output."""
Cell = Callable[[Tensor, Tensor, State], State]
"""(input's part of the gates, hidden state's part of the gates, state) -> next state."""


def _lstm(from_input: Tensor, from_hidden: Tensor, state: State) -> State:
    take, forget, candidate, output = (from_input + from_hidden).chunk(4, -1)
    c = forget.sigmoid() * state[1] + take.sigmoid() * candidate.tanh()
    return output.sigmoid() * c.tanh(), c


def _gru(from_input: Tensor, from_hidden: Tensor, state: State) -> State:
    reset_x, update_x, new_x = from_input.chunk(3, -1)
    reset_h, update_h, new_h = from_hidden.chunk(3, -1)
    new = torch.tanh(new_x + (reset_x + reset_h).sigmoid() * new_h)
    return (new + (update_x + update_h).sigmoid() * (state[0] - new),)


def _elman(activation: Callable[[Tensor], Tensor], from_input: Tensor, from_hidden: Tensor, state: State) -> State:
    return (activation(from_input + from_hidden),)


CELLS: dict[str, Cell] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": partial(_elman, torch.tanh),
    "rnn_relu": partial(_elman, torch.relu),
}
"""By the name of the function in torch."""


def run_cell(
    cell: Cell,
    input: Tensor,
    hx: Tensor | State,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor | State:
    """Take one step with the signature of ``torch.lstm_cell`` and the like.

    input: ``[batch, features]``.     w_ih, w_hh: ``[gates, ...]``.     b_ih, b_hh: ``[gates]``.
    """
    state = hx if isinstance(hx, tuple) else (hx,)
    after = cell(F.linear(input, w_ih, b_ih), F.linear(state[0], w_hh, b_hh), state)
    return after if isinstance(hx, tuple) else after[0]


def run_layers(cell: Cell, dropout: Callable[[Tensor, float], Tensor], *args: Any) -> tuple[Tensor, ...]:
    """Run the whole stack, ``[steps, batch, features]`` in: as ``torch.lstm`` and the like after the first two
    arguments.

    dropout: what is done between layers.
    Raises `ConfigurationError` for projections (``proj_size``).
    """
    x, hx, weights, biased, layers, p, training, bidirectional, batch_first = args
    states = hx if isinstance(hx, tuple | list) else (hx,)
    runs = _split_weights(weights, 4 if biased else 2, layers * (2 if bidirectional else 1))
    x = x.transpose(0, 1) if batch_first else x
    finals: list[State] = []
    for layer in range(layers):
        x = dropout(x, p) if layer and training and p else x
        outputs = []
        for backward in (False, True) if bidirectional else (False,):
            output, final = _scan(cell, x, tuple(s[len(finals)] for s in states), runs[len(finals)], backward)
            outputs.append(output)
            finals.append(final)
        x = torch.cat(outputs, -1)
    x = x.transpose(0, 1) if batch_first else x
    return x, *(torch.stack(each) for each in zip(*finals, strict=True))


def _split_weights(weights: Sequence[Tensor], each: int, runs: int) -> list[Sequence[Tensor]]:
    if len(weights) != each * runs:
        raise ConfigurationError("proj_size of nn.LSTM is not supported; put an nn.Linear behind an nn.LSTM without it")
    return [weights[k * each : (k + 1) * each] for k in range(runs)]


def _scan(cell: Cell, x: Tensor, state: State, weights: Sequence[Tensor], backward: bool) -> tuple[Tensor, State]:
    """One layer in one direction over ``x [time, batch, features]``: outputs, in the order of ``x``, and last state."""
    w_ih, w_hh = weights[:2]
    b_ih, b_hh = weights[2:] if len(weights) > 2 else (None, None)
    steps = F.linear(x, w_ih, b_ih).unbind(0)
    outputs = []
    for from_input in reversed(steps) if backward else steps:
        state = cell(from_input, F.linear(state[0], w_hh, b_hh), state)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backward else outputs), state
