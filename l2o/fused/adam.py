"""`l2o.rules.Adam`: a step in place, by torch's own fused AdamW, which reads and writes every array once."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from l2o.fused.inputs import Inputs
from l2o.kernels.arrays import laid_out_as, plain
from l2o.kernels.build import setting
from l2o.ops.moments import decay
from l2o.ops.numeric import finite
from l2o.rules import Adam
from l2o.types import OptState


def step(
    rule: Adam, inputs: Inputs, factors: Mapping[str, tuple[float, float]], limit: float = math.inf
) -> OptState | None:
    """See `l2o.fused.step`."""
    theta, grads, state, params = inputs[:4]
    if rule.eps_root or setting() == "0" or not all(_fits(p, state.per_param[n]) for n, p in params.items()):
        return None
    if not plain(t for n, p in params.items() for t in (p, grads[n], *state.per_param[n].values())):
        return None
    if not finite(list(grads.values()), [], limit):
        return None
    lr, eps = (float(theta[name].exp()) for name in ("log_lr", "log_eps"))
    betas = [float(decay(theta[name].double())) for name in ("logit_beta1", "logit_beta2")]
    if not all(map(math.isfinite, (lr, eps, *betas))):
        return None  # and `update` shows what is wrong
    groups: dict[tuple[float, float], list[str]] = defaultdict(list)
    for name in params:
        groups[factors[name]].append(name)
    for (factor, keep), names in groups.items():
        own = [state.per_param[name] for name in names]
        counts = [slots["count"] for slots in own]
        rate = factor * lr
        torch._foreach_add_(counts, 1.0)
        torch._fused_adamw_(
            [params[name] for name in names],
            [laid_out_as(grads[name], params[name]) for name in names],
            [slots["m"] for slots in own],
            [slots["v"] for slots in own],
            [],
            counts,
            lr=rate,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=(1.0 - keep) / rate if rate else 0.0,  # torch keeps 1 - lr weight_decay
            eps=eps,
            amsgrad=False,
            maximize=False,
        )
    return state


def _fits(param: Tensor, slots: Mapping[str, Tensor]) -> bool:
    """Whether torch's kernel, which goes by memory, would see each entry at one place in all arrays, and no other."""
    layout = param.shape, param.stride()
    return (
        slots.keys() == {"m", "v", "count"}
        and all((slots[n].shape, slots[n].stride()) == layout for n in ("m", "v"))
        and _without_gaps(param)
    )


def _without_gaps(t: Tensor) -> bool:
    if t.is_contiguous():
        return True
    return t.permute(sorted(range(t.ndim), key=t.stride, reverse=True)).is_contiguous()
