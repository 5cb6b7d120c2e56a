"""Backpropagation through the unroll: truncated (TBPTT), and full (BPTT) where the truncation is the horizon."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from l2o._checks import real, whole
from l2o.types import ConfigurationError, InnerState, MetaGradient, Metrics, TaskFamily, Theta, UpdateRule
from l2o.unroll import detach, expand_theta, reset, running, start, unroll


@dataclass(frozen=True)
class Backprop(MetaGradient):
    """The gradient of the mean loss over a truncation, averaged over lanes.

    The losses are those before each update, so the last update of a truncation is credited to nobody; the first loss
    of the next truncation, which it decides, is there a constant.

    rule, family: what is meta-trained, and on what.
    lanes: inner problems at once.              horizon: steps of an inner run.
    truncation: steps differentiated through; None for the whole horizon.
    stagger: spread the ages of lanes evenly, so that each estimate sees all phases of a run.
    second_order: differentiate the inner gradients too; else they are taken as constants.
    meta_loss: ``mean`` of the losses, or the mean of their logarithms (``log``), which weighs late progress as much as
        early and is blind to the scale of a task (cf. Lv et al. 2017, arXiv 1703.03633, on scale).
        It is for losses that are positive.
    log_floor: fraction of a lane's first loss that ``log`` adds, so that what is solved already earns little more;
        without it, a rule pays for the last digits of easy lanes with accidents on hard ones.
    clip: largest norm of one lane's meta-gradient; lanes are clipped before they are averaged.
    explosion: a lane whose loss passes this multiple of its first, or is not finite, is masked, counted and reset.
    """

    rule: UpdateRule
    family: TaskFamily
    lanes: int = 8
    horizon: int = 100
    truncation: int | None = 20
    stagger: bool = True
    second_order: bool = True
    meta_loss: Literal["mean", "log"] = "mean"
    log_floor: float = 1e-2
    clip: float = 1.0
    explosion: float = 1e3

    def __post_init__(self) -> None:
        whole("lanes", self.lanes)
        # With one step nothing that depends on θ would enter the objective: each loss is the one before its update.
        whole("horizon", self.horizon, least=2)
        if self.truncation is not None:
            whole("truncation", self.truncation, least=2)
        if self.meta_loss not in ("mean", "log"):
            raise ConfigurationError(f"meta_loss={self.meta_loss!r}: expected 'mean' or 'log'")
        real("log_floor", self.log_floor, above=0.0, below=1.0)
        real("clip", self.clip, above=0.0)
        real("explosion", self.explosion, above=0.0)

    def init(self, theta: Theta, generator: torch.Generator) -> InnerState:
        state = self._fresh(theta, generator, self.lanes)
        if not self.stagger or self.truncation is None:
            return state
        # First runs are cut short to different lengths; from their ends on, whole runs are at different ages.
        phase = torch.arange(self.lanes, device=generator.device) * self.horizon // self.lanes
        return state._replace(total_steps=state.total_steps - phase // self.truncation * self.truncation)

    def estimate(
        self, theta: Theta, state: InnerState, generator: torch.Generator
    ) -> tuple[Theta, InnerState, Metrics]:
        steps = self.horizon if self.truncation is None else min(self.truncation, self.horizon)
        lane_theta = {name: t.requires_grad_() for name, t in expand_theta(theta, self.lanes).items()}
        weights = running(state, steps)
        with torch.enable_grad():
            after, losses = unroll(self.rule, lane_theta, self.family, state, steps, generator, self.second_order)
            objective = _masked_mean(self._scaled(losses, after.first_loss), weights)
            lane_grads = torch.autograd.grad(objective.sum(), list(lane_theta.values()), materialize_grads=True)
        after, losses = detach(after), losses.detach()
        grads, norms = _clip_lanes(dict(zip(theta, lane_grads, strict=True)), self.clip)
        exploded = ~(losses.isfinite() & (losses <= self.explosion * after.first_loss.abs())).all(0)
        healthy = ~exploded & norms.isfinite()
        metrics = {
            "meta_loss": _masked_mean(_masked_mean(losses, weights), healthy),
            "lanes_masked": (~healthy).sum(),
            "lanes_broken": (~after.first_loss.isfinite()).sum(),
            "lane_grad_norm": _masked_mean(norms, healthy),
            "inner_steps": weights.sum(),
        }
        ended = after.step >= after.total_steps
        after = reset(after, ended | ~healthy, lambda n: self._fresh(theta, generator, n))
        return {name: _masked_mean(g, healthy) for name, g in grads.items()}, after, metrics

    def _scaled(self, losses: Tensor, first_loss: Tensor) -> Tensor:
        return (losses + self.log_floor * first_loss).log() if self.meta_loss == "log" else losses

    def _fresh(self, theta: Theta, generator: torch.Generator, lanes: int) -> InnerState:
        horizon = torch.full((lanes,), self.horizon, device=generator.device)
        return start(self.rule, expand_theta(theta, lanes), self.family, horizon, generator)


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the first axis of the entries where ``mask`` (of that axis, or of the same shape) is set; 0 if none is.

    `torch.where` and not a product: a masked NaN must not come back as ``NaN * 0``.
    """
    mask = mask.reshape(mask.shape + (1,) * (values.ndim - mask.ndim))
    return torch.where(mask, values, 0.0).sum(0) / mask.sum(0).clamp(min=1)


def _clip_lanes(grads: Theta, limit: float) -> tuple[Theta, Tensor]:
    """Scale each lane's gradient to a norm of at most ``limit``; also returns the norms before, ``[lanes]``."""
    norms = torch.stack([g.reshape(len(g), -1).square().sum(1) for g in grads.values()]).sum(0).sqrt()
    factor = (limit / norms).clamp(max=1.0)
    return {name: g * factor.view(-1, *[1] * (g.ndim - 1)) for name, g in grads.items()}, norms
