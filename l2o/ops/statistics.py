"""What per-parameter networks see of a tensor's gradients: the groups of channels of small_fc, VeLO, Celo and Celo2.

Metz et al. 2022 (VeLO, arXiv 2211.09760, app. B) and google/learned_optimization (adafac_mlp_lopt.py, hyper_v2.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from l2o.ops.factored import diagonal, init_factored, square_sums
from l2o.ops.moments import init_momenta, momenta
from l2o.ops.numeric import constant
from l2o.types import ParamInfo, Slots


class Statistics(NamedTuple):
    """Of one tensor of shape ``*shape``; D decays of momenta and as many of factored moments.

    grad, param: ``[*shape]``.        m: ``[D, *shape]``, momenta.
    v, inv_rms: ``[1, *shape]``, second moment and its inverse root.
    row, col: ``[D, *shape]``, factored second moments, spread over the tensor.
    grad_factor, m_factor: ``[D, *shape]``, the inverse roots that gradient and momenta are multiplied with.
    """

    grad: Tensor
    param: Tensor
    m: Tensor
    v: Tensor
    inv_rms: Tensor
    row: Tensor
    col: Tensor
    grad_factor: Tensor
    m_factor: Tensor


_EPS = 1e-8
"""Of the inverse roots of rows and columns, and of the logarithm."""

_GROUPS: dict[str, Callable[[Statistics], Tensor]] = {
    "grad": lambda x: x.grad.unsqueeze(0),
    "clipped_grad": lambda x: x.grad.clamp(-0.1, 0.1).unsqueeze(0),
    "param": lambda x: x.param.unsqueeze(0),
    "m": lambda x: x.m,
    "v": lambda x: x.v,
    "m_over_rms": lambda x: x.m * x.inv_rms,
    "inv_rms": lambda x: x.inv_rms,
    "factored_grad": lambda x: x.grad * x.grad_factor,
    "grad_over_rms": lambda x: x.grad * x.inv_rms,
    "row": lambda x: x.row,
    "col": lambda x: x.col,
    "inv_root_row": lambda x: torch.rsqrt(x.row + _EPS),
    "inv_root_col": lambda x: torch.rsqrt(x.col + _EPS),
    "factored_m": lambda x: x.m * x.m_factor,
    "log_param": lambda x: torch.log(x.param.abs() + _EPS).unsqueeze(0),
}
GROUPS = tuple(_GROUPS)

VELO_GROUPS = GROUPS[:14]
"""In the order of ``w0__0`` to ``w0__13`` of VeLO, Celo and Celo2: 30 channels with three decays."""
SMALL_FC_GROUPS = tuple(name for name in VELO_GROUPS if name not in ("clipped_grad", "grad_over_rms"))
"""In the order of the inputs of small_fc (AdafacMLPLOpt): 28 channels with three decays."""
UNFACTORED_GROUPS = VELO_GROUPS[:9]
"""What Celo2 shows of tensors without rows and columns: 15 channels."""


def channels(x: Statistics, groups: Sequence[str]) -> Tensor:
    """Return ``[channels, *shape]``, the groups one after the other, not normalised."""
    return torch.cat([_GROUPS[name](x) for name in groups])


def init_statistics(param: Tensor, info: ParamInfo, decays: int) -> Slots:
    """Return zeros for ``param``: ``m [decays, *shape]``, ``v [1, *shape]``, and the slots of `l2o.ops.factored`."""
    factors = init_factored(param, info, decays)
    return {"m": init_momenta(param, decays), "v": init_momenta(param, 1), **factors}


class Decays(NamedTuple):
    """Of `advanced`.  momentum, factored: ``[D]``.  rms: ``[1]``."""

    momentum: Tensor
    rms: Tensor
    factored: Tensor

    @classmethod
    def fixed(cls, momentum: Sequence[float], rms: float, factored: Sequence[float], like: Tensor) -> Decays:
        """Return decays that are not learned, ``[decays]``, in dtype and device of ``like``."""
        return cls(constant(momentum, like), constant([rms], like), constant(factored, like))


def advanced(slots: Slots, grad: Tensor, decays: Decays, axes: tuple[int, int] | None, clip: float) -> Slots:
    """Average ``grad``, clipped to ± ``clip``, into ``m``, ``v``, and into ``diag`` or the sums for ``row``, ``col``.

    slots: ``[decays, *shape]``; ``diag`` is there or not.
    axes: of rows and columns (`l2o.ops.factored.factored_axes`), None without.
    """
    grad = grad.clamp(-clip, clip) if clip < math.inf else grad
    new = {
        "m": momenta(slots["m"], grad, decays.momentum),
        "v": momenta(slots["v"], grad.square(), decays.rms),
        **square_sums(grad, axes),
    }
    return new | {"diag": diagonal(slots["diag"], grad, decays.factored)} if "diag" in slots else new


CLIP = 1000.0
"""What VeLO, Celo and Celo2 clip gradients to, an entry at a time, before anything else."""


def clip_gradient(grad: Tensor) -> Tensor:
    """Clip ``grad`` to ± `CLIP`, in any shape."""
    return grad.clamp(-CLIP, CLIP)
