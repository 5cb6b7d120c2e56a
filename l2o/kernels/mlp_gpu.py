"""`l2o.rules.MLP` on GPUs: whether Triton can take an update of all lanes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from l2o.kernels.build import setting
from l2o.kernels.mlp_rule import Constants, Tensors, fits, named
from l2o.types import Grads, L2OError, OptState, Params, Theta, Updates


def update(
    constants: Constants,
    theta: Theta,
    grads: Grads,
    state: OptState,
    params: Params,
    time: Tensor,
    reference: Any = None,
) -> tuple[Updates, OptState] | None:
    """Update all lanes, tensors, ``time`` too, ``[lanes, ...]``, as `mlp_rule.update`; None also for derivatives.

    None as well with ``L2O_KERNELS=0``, where a step is compiled, and where there is no Triton, which raises `L2OError`
    with ``L2O_KERNELS=1``. On an H200 an inner step of 64 to 4,096 lanes is three to five times as fast as torch's.
    """
    if setting() == "0" or torch.compiler.is_compiling():
        return None
    try:
        from l2o.kernels import mlp_triton
    except ImportError as error:
        if setting() != "1":
            return None
        raise L2OError(f"L2O_KERNELS=1, but Triton cannot be imported ({error}): pip install triton") from error
    tensors = Tensors.of(theta, grads, state, params)
    if tensors.differentiable or not (fits(constants, tensors, time, anywhere=True) and mlp_triton.fits(tensors)):
        return None
    updates, momenta = mlp_triton.forward(constants, tensors, time)
    return named(params, [*updates, *momenta])
