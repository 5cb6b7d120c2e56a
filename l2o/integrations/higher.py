"""Learned optimizers inside `higher` (Grefenstette et al. 2019, arXiv 1910.01727), by importing this module.

An existing script that unrolls with `higher` meta-trains a rule so::

    import l2o.integrations.higher
    optimizer = l2o.LearnedOptimizer(model.parameters(), (rule, theta), total_steps=20)
    with higher.innerloop_ctx(model, optimizer, override={"theta": [theta]}) as (fmodel, diffopt):
        for x, y in batches:
            diffopt.step(loss(fmodel(x), y))
        loss(fmodel(x), y).backward()        # gradients of the tensors of theta
"""

from __future__ import annotations

import math
from typing import Any

import higher
import torch
from torch import Tensor

from l2o.ops.kinds import infos_of
from l2o.optim import LearnedOptimizer
from l2o.optim.guard import rest
from l2o.types import ConfigurationError, Kind, OptState, Run


class DifferentiableLearnedOptimizer(higher.optim.DifferentiableOptimizer):
    """`l2o.LearnedOptimizer` as a differentiable optimizer of `higher`; starts with fresh state at step 0.

    ``override={"theta": [theta]}`` gives the meta-parameters to differentiate (default: the optimizer's own), and
    ``override={"lr": ...}`` works as for every optimizer of `higher`. As in the plug-in, arithmetic is float64 if any
    parameter is, else float32, a group may have its ``kind``, frozen and unused parameters stay as they are, and so do
    entries that never had a gradient.
    Raises `ConfigurationError` for rules that read the loss, which `higher` does not hand to its optimizers.
    """

    def __init__(self, other: LearnedOptimizer, *args: Any, **kwargs: Any) -> None:
        if other.rule.needs_loss:
            raise ConfigurationError(f"{other.rule!r} reads the loss, which higher does not pass on: use l2o.unroll")
        super().__init__(other, *args, **kwargs)
        self._rule, self._total_steps, self._steps = other.rule, other.total_steps, 0
        self._default_theta = other.theta
        self._opt = OptState({}, {})
        self._seen: dict[str, Tensor] = {}

    def _update(self, grouped_grads: list[list[Tensor | None]], **kwargs: Any) -> None:
        places, params, grads = {}, {}, {}
        kinds: dict[str, Kind] = {}
        float64 = any(p.dtype == torch.float64 for group in self.param_groups for p in group["params"])
        dtype = torch.float64 if float64 else torch.float32
        theta = {k: t.to(dtype) for k, t in self.param_groups[0].get("theta", self._default_theta).items()}
        for i, (group, group_grads) in enumerate(zip(self.param_groups, grouped_grads, strict=True)):
            for j, grad in enumerate(group_grads):
                if grad is not None:
                    key = f"{i}.{j}"
                    places[key], params[key], grads[key] = (group, j), group["params"][j].to(dtype), grad.to(dtype)
                    kinds |= {key: group["kind"]} if "kind" in group else {}
        new = {key: p for key, p in params.items() if key not in self._opt.per_param}
        infos = infos_of(params, kinds)
        fresh = self._rule.init(theta, new, infos)
        state = OptState({**self._opt.per_param, **fresh.per_param}, self._opt.shared or fresh.shared)
        device = next((p.device for p in params.values()), None)
        step, total = (torch.full((), n, device=device) for n in (self._steps, self._total_steps))
        run = Run(step, total, called=self._steps)
        updates, self._opt = self._rule.update(theta, grads, state, params, infos, run)
        if not self._rule.rests:
            seen = {key: self._seen.get(key, torch.zeros_like(g, dtype=torch.bool)) for key, g in grads.items()}
            updates, now = rest(updates, grads, seen)
            self._seen |= now
        for key, (group, j) in places.items():
            rate = -group["weight_decay"] * group["lr"] / self._total_steps
            keep = rate.exp() if isinstance(rate, Tensor) else math.exp(rate)
            group["params"][j] = (keep * params[key] + group["lr"] * updates[key]).to(group["params"][j].dtype)
        self._steps += 1


higher.register_optim(LearnedOptimizer, DifferentiableLearnedOptimizer)
