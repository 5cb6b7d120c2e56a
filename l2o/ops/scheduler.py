"""The recurrent scheduler of VeLO, Celo and Celo-Adam: what an LSTM over tensors sees, and what is read off its state.

θ beside that of `l2o.ops.recurrent`: ``w_in, b_in`` and ``w_mix, b_mix``, ``[inputs, hidden]`` and ``[hidden]``, which
read the inputs; heads ``w_<name>, b_<name>`` that read the state.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from l2o.ops.features import FRACTIONS, fraction_embedding
from l2o.ops.losses import LOSS_FEATURES, average_losses, init_loss_averages
from l2o.ops.networks import init_linear, linear
from l2o.ops.recurrent import init_tensor_lstm, lstm_slots, tensor_lstm
from l2o.types import LOCAL, Reduce, Run, Slots, Theta

RUN_FEATURES = len(FRACTIONS) + LOSS_FEATURES
"""What a scheduler sees of the run: how far it is, and how its loss goes."""


def init_scheduler(generator: torch.Generator, inputs: int, hidden: int, heads: Mapping[str, int]) -> Theta:
    """Draw an LSTM's and its heads'.  heads: numbers of outputs, by name."""
    theta = init_tensor_lstm(generator, hidden, hidden)
    sizes = {"in": (inputs, hidden), "mix": (inputs, hidden), **{name: (hidden, n) for name, n in heads.items()}}
    for name, (fan_in, fan_out) in sizes.items():
        theta[f"w_{name}"], theta[f"b_{name}"] = init_linear(generator, fan_in, fan_out)
    return theta


def schedule(theta: Theta, x: Tensor, slots: Mapping[str, Slots], reduce: Reduce = LOCAL) -> dict[str, Slots]:
    """Take one step of the LSTM over ``slots``; ``x [inputs, tensors]`` in their order. Returns the new ``h, c`` of
    each.

    What the tensors tell each other is the largest activation among them (Metz et al. 2022, arXiv 2211.09760, app. B).
    """
    said = torch.relu(linear(x, theta["w_mix"], theta["b_mix"])).unbind(-1)
    loudest = reduce.largest(dict(zip(slots, said, strict=True))).unsqueeze(-1)
    return tensor_lstm(theta, linear(x, theta["w_in"], theta["b_in"]) + loudest, slots)[1]


def head(theta: Theta, name: str, h: Tensor) -> Tensor:
    """Return ``[outputs, tensors]``, linear in the states ``h [hidden, tensors]``."""
    return linear(h, theta[f"w_{name}"], theta[f"b_{name}"])


def init_run_schedule(theta: Theta, like: Tensor) -> Slots:
    """Return Celo's shared slots: ``h, c [hidden]``, and those of the loss, of the dtype and device of ``like``."""
    return lstm_slots(theta) | init_loss_averages(like)


def run_schedule(theta: Theta, slots: Slots, run: Run) -> Slots:
    """Take one step of a scheduler that sees the run alone.

    The original has a state for each tensor. They are all the same, because their inputs are; one is kept here.
    """
    averages, seen = average_losses(slots, run, run.total_steps)
    x = torch.cat([fraction_embedding(run, seen), seen])
    return averages | schedule(theta, x.unsqueeze(-1), {"run": slots})["run"]


def learned_rate(theta: Theta, h: Tensor) -> Tensor:
    """Return ``0.1 exp(w_lr h + b_lr)``, 0-d, of one state ``h [hidden]``: Celo's step size."""
    return 0.1 * head(theta, "lr", h.unsqueeze(-1)).exp().reshape(())


def mixtures(theta: Theta, control: Tensor) -> Theta:
    """Return ``mean_k(control[k] A[k])``, an MLP for each column of ``control [inits, tensors]``, ``[tensors, ...]``.

    ``A`` are ``w0, b0, ...`` of θ, ``[inits, ...]``.
    """
    names = [name for name in theta if name[1:].isdecimal()]
    return {name: torch.tensordot(control / len(control), theta[name], dims=([0], [0])) for name in names}
