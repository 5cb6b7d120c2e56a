"""A network over entries that weighs momentum against gradient, where both are over the root of second moments.

It is even in what it sees and multiplies what it gets: a direction turns its sign with its entry, as it has to in an
eigenbasis, whose vectors have no sign, and rests where no gradient lies. At first it changes nothing: its last layer is
zero until something is learned.
"""

from __future__ import annotations

import torch
from torch import Tensor

from l2o.ops.networks import init_mlp, mlp
from l2o.ops.numeric import safe_sqrt
from l2o.types import Theta

_PREFIX = "entry_"
_HIDDEN = 8
_HALF = 0.5
"""Of the outputs: a network's usual noise then moves a direction by some tenths."""


def init_entries(generator: torch.Generator) -> Theta:
    """Return θ of the network, ``entry_w0, entry_b0`` and a last layer of zeros: four inputs, two outputs."""
    theta = init_mlp(generator, (4, _HIDDEN, 2))
    theta["w1"] = torch.zeros_like(theta["w1"])
    return {f"{_PREFIX}{name}": t for name, t in theta.items()}


def weigh(theta: Theta, momentum: Tensor, grad: Tensor, squares: Tensor) -> Tensor:
    """Return ``momentum * exp(o0 / 2) + grad * o1 / 2``, ``[k, rows, columns]``, at the size of ``momentum``.

    momentum, grad: ``[k, rows, columns]``, each of any size, which is seen relative to the whole matrix.
    squares: second moments of the entries, above zero.
    """
    own = {name.removeprefix(_PREFIX): t for name, t in theta.items() if name.startswith(_PREFIX)}
    size = _size(momentum)
    m, g = (x / torch.where(s > 0, s, 1.0) for x, s in ((momentum, size), (grad, _size(grad))))
    product = m * g
    share = (squares / squares.mean((-2, -1), keepdim=True)).log()
    inputs = [m.abs().log1p(), g.abs().log1p(), product / (1.0 + product.abs()), 0.25 * share]
    gain, more = mlp(own, torch.stack(inputs).flatten(1), activation=torch.tanh).view(2, *m.shape)
    return size * (m * torch.exp(_HALF * gain) + g * (_HALF * more))


def _size(x: Tensor) -> Tensor:
    return safe_sqrt(x.square().mean((-2, -1), keepdim=True))
