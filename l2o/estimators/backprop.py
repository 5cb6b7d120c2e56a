"""Backpropagation through the unroll: truncated (TBPTT), and full (BPTT) where the truncation is the horizon."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from l2o.checks import check_float
from l2o.estimators.curvature import check_curvature
from l2o.estimators.episodes import Episodes, along, lane_metrics, lane_sums, reduce_rows
from l2o.random import LaneGenerator
from l2o.types import InnerState, Metrics, Theta
from l2o.unroll import detach, expand_theta, init_state, reset, unroll


class BackpropState(NamedTuple):
    """inner: the runs in flight.     estimates: so far, int64, 0-d."""

    inner: InnerState
    estimates: Tensor


@dataclass(frozen=True)
class Backprop(Episodes):
    """The gradient of the mean loss over a truncation, averaged over lanes. What `Episodes` has, and:

    second_order: differentiate the inner gradients too; else they are taken as constants.
    checkpoint: keep every ⌈√steps⌉-th state of the unroll and compute what lies between a second time, so that memory
        grows with √steps (Chen et al. 2016, arXiv 1604.06174), for a third more work.
    clip: largest norm of one lane's meta-gradient; lanes are clipped before they are averaged.

    The first loss after a truncation, which its last update decides, is a constant in the next one: the bias of
    truncation. Lanes that exploded, or whose gradient is not finite, are masked, counted and reset.

    With ``second_order``, `init` raises `ConfigurationError` for a loss that torch cannot differentiate twice, or does
    so wrongly as finite differences show (see `l2o.estimators.curvature`).
    """

    second_order: bool = True
    checkpoint: bool = False
    clip: float = 1.0

    # With one step nothing that depends on θ would enter the objective: each loss is the one before its update.
    shortest = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_float("clip", self.clip, above=0.0)

    def init(self, theta: Theta, generator: torch.Generator) -> BackpropState:
        inner = self.reset_all(theta, generator)
        if self.second_order:
            check_curvature(self.rule, theta, self.family, inner)
        return BackpropState(inner, torch.zeros((), dtype=torch.long, device=generator.device))

    def estimate(
        self, theta: Theta, state: BackpropState, generator: torch.Generator
    ) -> tuple[Theta, BackpropState, Metrics]:
        streams = self.streams(generator)
        lane_theta = {name: t.requires_grad_() for name, t in expand_theta(theta, self.own_lanes).items()}
        grads, after, losses = self._differentiate(lane_theta, state.inner, streams.batches)
        grads, norms = _clip_lanes(grads, self.clip)
        healthy = ~self.exploded(losses, after.first_loss).any(0) & norms.isfinite()
        sums = lane_sums(losses, state.inner, healthy, after.first_loss)
        sums["lane_grad_norm"] = along(healthy, norms, 0.0).sum()
        grads, sums = reduce_rows(grads, healthy, sums)
        sums["lane_grad_norm"] = sums["lane_grad_norm"] / sums["healthy"].clamp(min=1)
        ended = after.step >= after.total_steps
        inner = reset(
            after, ended | ~healthy, lambda index: self.new_runs(theta, index, streams.resets, state.estimates)
        )
        return grads, BackpropState(inner, state.estimates + 1), lane_metrics(sums)

    def _differentiate(
        self, theta: Theta, before: InnerState, generator: LaneGenerator
    ) -> tuple[Theta, InnerState, Tensor]:
        """Gradients of the lanes' objectives, the state after the unroll, and its losses, nothing with a graph."""
        lengths = self._stretches()
        states, random = [before], [generator.get_state()]
        with torch.no_grad():
            for i, steps in enumerate(lengths[:-1]):
                states.append(detach(self._stretch(theta, states[i], steps, generator, first=i == 0)[0]))
                random.append(generator.get_state())
        grads: list[Tensor] = [torch.zeros_like(t) for t in theta.values()]
        after, pull = before, None
        losses: list[Tensor] = []
        for i in reversed(range(len(lengths))):
            generator.set_state(random[i])
            start = _leaves_of_a_graph(states[i]) if i else before
            with torch.enable_grad():
                end, lost = self._stretch(theta, start, lengths[i], generator, first=i == 0)
                objective = self.objective(lost, states[i], end.first_loss).sum()
                inputs = [*theta.values(), *(_moving(start) if i else [])]
                found = _pull_back(objective, _moving(end), pull, inputs)
            grads = [g + new for g, new in zip(grads, found, strict=False)]
            pull = found[len(grads) :]
            after, losses = (after if losses else detach(end)), [lost.detach(), *losses]
        return dict(zip(theta, grads, strict=True)), after, torch.cat(losses)

    def _stretches(self) -> list[int]:
        """Steps between the states that are kept."""
        each = math.isqrt(self.steps - 1) + 1 if self.checkpoint else self.steps
        return [min(each, self.steps - done) for done in range(0, self.steps, each)]

    def _stretch(
        self, theta: Theta, state: InnerState, steps: int, generator: LaneGenerator, first: bool
    ) -> tuple[InnerState, Tensor]:
        if first:
            state = init_state(self.rule, theta, self.family, state)
        return unroll(self.rule, theta, self.family, state, steps, generator, self.second_order, self.valid_weight)


def _moving(state: InnerState) -> list[Tensor]:
    """What one step hands on to the next that derivatives may pass."""
    leaves = tree_leaves((state.params, state.buffers, state.opt))
    return [leaf for leaf in leaves if leaf.is_floating_point()]


def _leaves_of_a_graph(state: InnerState) -> InnerState:
    def leaf(t: Tensor) -> Tensor:
        return t.detach().requires_grad_() if t.is_floating_point() else t

    return state._replace(
        params=tree_map(leaf, state.params), buffers=tree_map(leaf, state.buffers), opt=tree_map(leaf, state.opt)
    )


def _pull_back(objective: Tensor, ends: list[Tensor], pull: list[Tensor] | None, inputs: list[Tensor]) -> list[Tensor]:
    """The derivative of ``objective + Σ pull · ends``; without ``pull`` of the objective alone."""
    outputs = [(objective, torch.ones_like(objective)), *zip(ends, pull or [], strict=False)]
    known = [(output, weight) for output, weight in outputs if output.requires_grad]
    grads = torch.autograd.grad(
        [output for output, _ in known], inputs, [weight for _, weight in known], materialize_grads=True
    )
    return list(grads)


def _clip_lanes(grads: Theta, limit: float) -> tuple[Theta, Tensor]:
    """Scale each lane's gradient to a norm of at most ``limit``; also returns the norms before, ``[lanes]``."""
    norms = torch.stack([g.reshape(len(g), -1).square().sum(1) for g in grads.values()]).sum(0).sqrt()
    factor = (limit / norms).clamp(max=1.0)
    return {name: g * factor.view(-1, *[1] * (g.ndim - 1)) for name, g in grads.items()}, norms
