"""Whether the inner gradients of a family can be differentiated again, found out before a run by one small trial."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from l2o.family_checks import checked_batch, name_of
from l2o.random import LaneGenerator
from l2o.types import Batch, ConfigurationError, InnerState, Params, TaskFamily, Theta, UpdateRule
from l2o.unroll import expand_theta, gradients, lane_losses, updates

_STEPS = (1e-4, 1e-5, 1e-6)
"""Of central differences in float64; one that steps over a kink of the loss differs from the next."""
_SAME, _WRONG = 1e-6, 1e-4
"""Relative: how near two differences are that can be trusted, and how far off a derivative is that is wrong."""
_AWAY = 0.1
"""Distance from the initial parameters, relative to their size: some start on kinks, such as ReLUs of zero."""
_WAY_OUT = "estimate with second_order=False, or by evolution (l2o.estimators.Evolution)"


class Trial(NamedTuple):
    """One lane; its gradient is tested along ``direction`` and read off along ``probe``.

    state, batch: ``[1, ...]``.     direction, probe: like ``state.params``.
    """

    family: TaskFamily
    state: InnerState
    batch: Batch
    direction: Params
    probe: Params

    def values(self, t: Tensor) -> Tensor:
        """Return ``[2]``: ``probe · gradient`` at ``params + t direction``, and the loss at ``params`` by the buffers
        there.

        The engine differentiates both: the first by way of the inner gradient, the second by way of the buffers.
        """
        params = self.state.params
        moved = {name: p + t * self.direction[name] for name, p in params.items()}
        _, after, grads, _ = gradients(self.family, self.state._replace(params=moved), self.batch)
        loss, _ = lane_losses(self.family, params, after, self.state.data, self.batch)
        dots = [(self.probe[name] * g).sum() for name, g in grads.items()]
        return torch.stack([torch.stack(dots).sum(), loss.sum()])

    def at(self, *points: float) -> list[Tensor]:
        """Return scalars, each 0-d, to differentiate `values` by."""
        like = next(iter(self.state.params.values()))
        return [like.new_tensor(t).requires_grad_() for t in points]

    def derivatives(self) -> Tensor:
        """Return those of `values` at 0, ``[2]``, by differentiating twice."""
        (t,) = self.at(0.0)
        return torch.stack([_derivative(value, t) for value in self.values(t)])

    def differences(self) -> Tensor:
        """Return the same by central differences, ``[steps, 2]``."""
        pairs = zip(self.at(*_STEPS), self.at(*(-h for h in _STEPS)), _STEPS, strict=True)
        return torch.stack([(self.values(above) - self.values(below)).detach() / (2 * h) for above, below, h in pairs])


def check_curvature(rule: UpdateRule, theta: Theta, family: TaskFamily, state: InnerState) -> None:
    """Raises `ConfigurationError` where torch has no second derivative for an operation of the loss, or a wrong one.

    Wrong are those that central differences in float64 contradict: of a few operations of torch, and of losses that
    hide a dependence from it, by ``detach`` or in buffers. A loss that does not run in float64 is not examined so.

    rule, theta: what moves the parameters, ``[...]``.     state: of all lanes, at their start.
    """
    trial = _trial(rule, theta, family, state)
    with torch.enable_grad():
        try:
            trial.derivatives()
        except RuntimeError as error:
            text = " ".join(str(error).split())
            if isinstance(error, ConfigurationError) or not ("derivative" in text or "differentiate twice" in text):
                raise
            raise ConfigurationError(
                f"{name_of(family)}.loss cannot be differentiated twice ({text}); {_WAY_OUT}"
            ) from error
        try:
            wrong = _contradicted(_doubled(trial))
        except (RuntimeError, TypeError, ValueError):
            return
    if wrong:
        raise ConfigurationError(
            f"{name_of(family)}.loss has wrong second derivatives: finite differences contradict them, as where "
            ".detach(), torch.no_grad() (spectral norm), a buffer, or a padding_idx whose row the rule moves, hides a "
            f"dependence from torch; {_WAY_OUT}"
        )


def _trial(rule: UpdateRule, theta: Theta, family: TaskFamily, state: InnerState) -> Trial:
    one = tree_map(lambda x: x[:1].detach(), state)
    device = state.step.device
    batch = {name: t[:1] for name, t in checked_batch(family, state.data, "train", LaneGenerator(device)).items()}
    noise = torch.Generator(device).manual_seed(0)

    def random() -> Params:
        return {name: _size(p) * torch.randn(p.shape, generator=noise, device=device).to(p) for name, p in named}

    named = one.params.items()
    steps = random()
    away = one._replace(params={name: p + _AWAY * steps[name] for name, p in named})
    with torch.no_grad():
        loss, _, grads, _ = gradients(family, away, batch)
        moves, _ = updates(rule, expand_theta(theta, 1), grads, away, loss, family.kinds)
    # What gets no gradient may be cut off on purpose, as the row of a padding_idx is; let the rule not move it, then.
    rests = {name: (grads[name] == 0) & (moves[name] == 0) for name in grads}
    direction = {name: torch.where(rests[name], 0.0, step) for name, step in random().items()}
    return Trial(family, away, batch, direction, random())


def _size(p: Tensor) -> Tensor:
    rms = p.square().mean().sqrt()
    return torch.where(rms > 0, rms, 0.1)


def _derivative(value: Tensor, t: Tensor) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(t)
    return torch.autograd.grad(value, t, retain_graph=True, materialize_grads=True)[0]


def _doubled(trial: Trial) -> Any:
    return tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, trial)


def _contradicted(trial: Trial) -> bool:
    ours, theirs = trial.derivatives(), trial.differences()
    scale = trial.values(*trial.at(0.0)).detach().abs()
    steady = _near(theirs[1:], theirs[:-1], scale, _SAME)
    return bool((steady & ~_near(theirs[1:], ours, scale, _WRONG)).any())


def _near(a: Tensor, b: Tensor, scale: Tensor, tolerance: float) -> Tensor:
    return (a - b).abs() <= tolerance * (a.abs() + b.abs() + 1e-3 * scale)
