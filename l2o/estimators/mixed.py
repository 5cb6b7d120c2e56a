"""Meta-training on several task families at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l2o.checks import check_float
from l2o.types import ConfigurationError, MetaGradient, Metrics, Mixture, TaskFamily, Theta, UpdateRule


class MixedState(NamedTuple):
    """members: state of each.     squares: running mean of each gradient's squared norm, float64, 0-d: in float32 those
    of gradients above 1e19, or below 1e-23, would be infinite, or zero.

    estimates: that these are of, float32, 0-d.
    """

    members: dict[str, Any]
    squares: dict[str, Tensor]
    estimates: Tensor


@dataclass(frozen=True)
class Mixed(MetaGradient):
    """The weighted mean of the meta-gradients of several families, each of them of norm one in the running mean.

    A family whose losses are large, steep or noisy would drown the others: hence the normalisation, by the root of
    the running mean of the squared norm (as Adam does by the entry; here a whole gradient has one scale, so that its
    direction stays). So a family alone is no mixture of one: its gradients keep their size.

    members: an estimator for each family, by name, all of one rule.     weights: by name; what is not named has 1.
    normalise: else the gradients are averaged as they are.     decay: of the running mean, in which an estimate that is
    not finite in some family, and thus moves nothing, has no part.

    Metrics: the sums over families of ``lanes_masked``, ``lanes_broken`` and ``inner_steps``, the weighted mean of
    ``meta_loss``, and ``meta_loss/<name>``, ``lanes_masked/<name>`` and ``lanes_broken/<name>`` of each.
    """

    members: Mapping[str, MetaGradient]
    weights: Mapping[str, float] | None = None
    normalise: bool = True
    decay: float = 0.95

    @classmethod
    def over(cls, mixture: Mixture, make: Callable[[TaskFamily], MetaGradient], **settings: Any) -> Mixed:
        """Return one estimator, which ``make`` makes, for each family of a mixture."""
        return cls({name: make(family) for name, family in mixture.families.items()}, mixture.weights, **settings)

    def __post_init__(self) -> None:
        if not self.members:
            raise ConfigurationError("members: expected at least one family")
        if any(member.rule != self.rule for member in self.members.values()):
            raise ConfigurationError("members: their rules differ; a mixture meta-trains one rule")
        Mixture({name: member.family for name, member in self.members.items()}, self.weights)
        check_float("decay", self.decay, least=0.0, below=1.0)

    @property
    def rule(self) -> UpdateRule:  # type: ignore[override]
        """The rule that is meta-trained."""
        return next(iter(self.members.values())).rule

    @property
    def family(self) -> Mixture:  # type: ignore[override]
        """The families, by name."""
        return Mixture({name: member.family for name, member in self.members.items()}, self.weights)

    @property
    def lanes(self) -> int:  # type: ignore[override]
        """Inner problems at once, of all families."""
        return sum(member.lanes for member in self.members.values())

    def init(self, theta: Theta, generator: torch.Generator) -> MixedState:
        zero = torch.zeros((), device=generator.device)
        states = {name: member.init(theta, generator) for name, member in self.members.items()}
        return MixedState(states, {name: zero.double() for name in states}, zero)

    def estimate(
        self, theta: Theta, state: MixedState, generator: torch.Generator
    ) -> tuple[Theta, MixedState, Metrics]:
        estimates = state.estimates + 1
        total = {name: torch.zeros_like(t) for name, t in theta.items()}
        states, squares, metrics = {}, {}, {}
        for name, member in self.members.items():
            grads, states[name], metrics[name] = member.estimate(theta, state.members[name], generator)
            square = torch.stack([g.double().square().sum() for g in grads.values()]).sum()
            squares[name] = torch.lerp(square, state.squares[name], self.decay)
            share = self._share(name) * self._scale(squares[name], estimates)
            total = {k: total[k] + (share * g).to(g.dtype) for k, g in grads.items()}
        counts = torch.stack(list(squares.values())).isfinite().all()
        squares = {name: torch.where(counts, square, state.squares[name]) for name, square in squares.items()}
        return total, MixedState(states, squares, state.estimates + counts), self._summary(metrics)

    def _share(self, name: str) -> float:
        weights = self.weights or {}
        return weights.get(name, 1.0) / sum(weights.get(each, 1.0) for each in self.members)

    def _scale(self, square: Tensor, count: Tensor) -> Tensor | float:
        if not self.normalise:
            return 1.0
        mean = square / (1.0 - self.decay**count)
        return torch.where(mean > 0, mean.rsqrt(), 0.0)

    def _summary(self, metrics: dict[str, Metrics]) -> Metrics:
        summed = ("lanes_masked", "lanes_broken", "inner_steps")
        total = {key: torch.stack([m[key] for m in metrics.values()]).sum() for key in summed}
        meta_loss = torch.stack([self._share(name) * m["meta_loss"] for name, m in metrics.items()]).sum()
        each = {f"{key}/{name}": m[key] for name, m in metrics.items() for key in ("meta_loss", *summed[:2])}
        return {"meta_loss": meta_loss, **total, **each}
