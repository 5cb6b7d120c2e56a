"""Rules made of rules: one with a schedule over its updates, and one for each kind of tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar, get_args

import torch

from l2o.checks import unknown
from l2o.ops.schedules import warmup_cosine
from l2o.types import (
    LOCAL,
    ConfigurationError,
    Grads,
    Infos,
    Kind,
    OptState,
    ParamInfo,
    Params,
    Reduce,
    Run,
    Theta,
    UpdateRule,
    Updates,
)

T = TypeVar("T")


class Wrapped(UpdateRule):
    """A rule that is ``rule`` but for what a subclass overrides; θ and state are the rule's."""

    rule: UpdateRule

    @property
    def needs_loss(self) -> bool:
        return self.rule.needs_loss

    @property
    def learned_init(self) -> bool:
        return self.rule.learned_init

    @property
    def rests(self) -> bool:
        return self.rule.rests

    @property
    def stride(self) -> float:
        return self.rule.stride

    def is_usual(self, called: int) -> bool:
        return self.rule.is_usual(called)

    def needs_whole(self, info: ParamInfo) -> bool:
        return self.rule.needs_whole(info)

    def exact_slots(self, info: ParamInfo) -> frozenset[str]:
        return self.rule.exact_slots(info)

    def init_theta(self, generator: torch.Generator) -> Theta:
        return self.rule.init_theta(generator)

    def init(self, theta: Theta, params: Params, infos: Infos) -> OptState:
        return self.rule.init(theta, params, infos)

    def update(
        self,
        theta: Theta,
        grads: Grads,
        state: OptState,
        params: Params,
        infos: Infos,
        run: Run,
        reduce: Reduce = LOCAL,
    ) -> tuple[Updates, OptState]:
        return self.rule.update(theta, grads, state, params, infos, run, reduce)


@dataclass(frozen=True)
class Scheduled(Wrapped):
    """``rule`` with its updates warmed up over a share of the run, then following half a cosine to 0; θ is the rule's.

    warmup: the share, rounded down to steps.
    """

    rule: UpdateRule
    warmup: float = 0.05

    def update(
        self,
        theta: Theta,
        grads: Grads,
        state: OptState,
        params: Params,
        infos: Infos,
        run: Run,
        reduce: Reduce = LOCAL,
    ) -> tuple[Updates, OptState]:
        updates, state = self.rule.update(theta, grads, state, params, infos, run, reduce)
        factor = warmup_cosine(run.step, run.total_steps, warmup=(run.total_steps * self.warmup).floor())
        return {name: u * factor.to(u.dtype) for name, u in updates.items()}, state


@dataclass(frozen=True)
class ByKind(UpdateRule):
    """A rule of its own for each kind of tensor, as Celo2 and Muon give vectors and embeddings to Adam.

    rules: by kind, of ``matrix, vector, embedding, output``.    other: for all further kinds.
    θ and shared slots: those of each rule as ``<kind>.<name>``, of ``other`` as ``other.<name>``.
    Where processes hold different tensors (`Reduce`), each has to hold one for each rule that sums over them: a rule
    without tensors is not called.
    Raises `ConfigurationError` for what is no kind.
    """

    rules: Mapping[Kind, UpdateRule]
    other: UpdateRule

    def __post_init__(self) -> None:
        for kind in self.rules:
            if kind not in get_args(Kind):
                raise ConfigurationError(unknown("kind of tensors", kind, get_args(Kind)))

    @property
    def _parts(self) -> dict[str, UpdateRule]:
        return {**{str(kind): rule for kind, rule in self.rules.items()}, "other": self.other}

    def _part(self, info: ParamInfo) -> str:
        return info.kind if info.kind in self.rules else "other"

    @property
    def needs_loss(self) -> bool:
        return any(rule.needs_loss for rule in self._parts.values())

    @property
    def learned_init(self) -> bool:
        return any(rule.learned_init for rule in self._parts.values())

    @property
    def rests(self) -> bool:
        return all(rule.rests for rule in self._parts.values())

    @property
    def stride(self) -> float:
        return max(rule.stride for rule in self._parts.values())

    def is_usual(self, called: int) -> bool:
        return all(rule.is_usual(called) for rule in self._parts.values())

    def needs_whole(self, info: ParamInfo) -> bool:
        return self._parts[self._part(info)].needs_whole(info)

    def exact_slots(self, info: ParamInfo) -> frozenset[str]:
        return self._parts[self._part(info)].exact_slots(info)

    def init_theta(self, generator: torch.Generator) -> Theta:
        thetas = {part: rule.init_theta(generator) for part, rule in self._parts.items()}
        return {f"{part}.{name}": t for part, theta in thetas.items() for name, t in theta.items()}

    def init(self, theta: Theta, params: Params, infos: Infos) -> OptState:
        found = OptState({}, {})
        for part, rule in self._parts.items():
            own = self._own(part, params, infos)
            # The shared slots of a rule without tensors are those that it would start with, had it one.
            state = rule.init(_of(theta, part), own or dict(list(params.items())[:1]), infos)
            found.per_param.update({name: state.per_param[name] for name in own})
            found.shared.update({f"{part}.{slot}": t for slot, t in state.shared.items()})
        return OptState({name: found.per_param[name] for name in params}, found.shared)

    def _own(self, part: str, tensors: Mapping[str, T], infos: Infos) -> dict[str, T]:
        """What of ``tensors``, by parameter, is for the rule ``part``."""
        return {name: t for name, t in tensors.items() if self._part(infos[name]) == part}

    def update(
        self,
        theta: Theta,
        grads: Grads,
        state: OptState,
        params: Params,
        infos: Infos,
        run: Run,
        reduce: Reduce = LOCAL,
    ) -> tuple[Updates, OptState]:
        updates: Updates = {}
        new = OptState({}, dict(state.shared))
        for part, rule in self._parts.items():
            own = self._own(part, grads, infos)
            if own:
                before = OptState(self._own(part, state.per_param, infos), _of(state.shared, part))
                seen = run if rule.needs_loss else run._replace(loss=None)
                mine = self._own(part, params, infos)
                moves, after = rule.update(_of(theta, part), own, before, mine, infos, seen, reduce.part(part))
                updates.update(moves)
                new.per_param.update(after.per_param)
                new.shared.update({f"{part}.{slot}": t for slot, t in after.shared.items()})
        return {k: updates[k] for k in grads}, OptState({k: new.per_param[k] for k in grads}, new.shared)


def _of(tensors: Mapping[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    """What of ``<part>.<name>`` belongs to a part."""
    return {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}
