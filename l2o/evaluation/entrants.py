"""What can be judged: a rule of this library, vectorised over lanes, or any torch optimizer; on the same problems."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from l2o.evaluation.curves import Begun, begin
from l2o.tasks import Repeated
from l2o.types import Grads, InnerState, OptState, Params, TaskFamily, Theta, UpdateRule
from l2o.unroll import expand_theta, gradients

Rates = tuple[float | None, ...]
MakeOptimizers = Callable[[list[nn.Parameter], float | None], Sequence[Optimizer]]
"""The optimizers that share the parameters of one run, at a learning rate; None for their own."""
UNTUNED: Rates = (None,)


class Entrant(Protocol):
    """An optimizer, and all that is tried of it.

    label: what reports call it.     rates: the learning rate of each trial; `UNTUNED` where there is one and none.
    """

    @property
    def label(self) -> str: ...

    @property
    def rates(self) -> Rates: ...

    def begin(self, family: TaskFamily, steps: int, seeds: int, generator: torch.Generator) -> Begun:
        """Begin every trial on every seed, in ``seeds * len(rates)`` lanes, of which adjacent ones share a seed."""
        ...


@dataclass(frozen=True)
class RuleEntrant:
    """A rule with its θ, which is without lanes (``[...]``) and on any device: one run a seed, untuned."""

    label: str
    rule: UpdateRule
    theta: Theta

    @property
    def rates(self) -> Rates:
        return UNTUNED

    def begin(self, family: TaskFamily, steps: int, seeds: int, generator: torch.Generator) -> Begun:
        theta = expand_theta({name: t.to(generator.device) for name, t in self.theta.items()}, seeds)
        return begin(self.rule, theta, family, steps, generator)


@dataclass(frozen=True)
class TorchEntrant:
    """Torch optimizers, one set for every lane, on gradients that are those of a rule.

    make: see ``MakeOptimizers``.     schedule: factor of learning rates at a step of so many; None for constant ones.
    clip: largest norm of a gradient, all tensors together; what is longer is shortened to it. None for no limit.
    """

    label: str
    make: MakeOptimizers
    schedule: Callable[[int, int], float] | None = None
    rates: Rates = UNTUNED
    clip: float | None = None

    @torch.no_grad()
    def begin(self, family: TaskFamily, steps: int, seeds: int, generator: torch.Generator) -> Begun:
        copies = Repeated(family, len(self.rates))
        state = _start(copies, torch.full((seeds * len(self.rates),), steps, device=generator.device), generator)
        lanes = [self._lane(state.params, lane, steps) for lane in range(len(state.step))]
        return Begun(partial(_train, lanes, copies, generator), state, copies)

    def _lane(self, stacked: Params, lane: int, steps: int) -> Lane:
        params = {name: nn.Parameter(p[lane].clone()) for name, p in stacked.items()}
        optimizers = self.make(list(params.values()), self.rates[lane % len(self.rates)])
        schedule = self.schedule
        schedulers = [] if schedule is None else [LambdaLR(o, lambda step: schedule(step, steps)) for o in optimizers]
        return Lane(params, optimizers, schedulers, self.clip)


class Lane(NamedTuple):
    """One run: its parameters, and what trains them."""

    params: dict[str, nn.Parameter]
    optimizers: Sequence[Optimizer]
    schedulers: Sequence[LambdaLR]
    clip: float | None

    def step(self, grads: Grads) -> None:
        """Move the parameters.  grads: of this lane.

        An optimizer that fails at what is not finite, or at a factorisation, has lost the run: it goes on as NaN.
        """
        for name, p in self.params.items():
            p.grad = grads[name] if self.clip is None else grads[name].clone()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.params.values(), self.clip)
        try:
            for optimizer in self.optimizers:
                optimizer.step()
        except RuntimeError as error:
            if not isinstance(error, torch.linalg.LinAlgError) and all(g.isfinite().all() for g in grads.values()):
                raise
            for p in self.params.values():
                p.data.fill_(torch.nan)
        for scheduler in self.schedulers:
            scheduler.step()


def switch(optimizers: Iterable[Optimizer], mode: Literal["train", "eval"]) -> None:
    """Have parameters be those to train or to judge, for optimizers that tell them apart, as Schedule-Free ones do."""
    for optimizer in optimizers:
        if hasattr(optimizer, "train") and hasattr(optimizer, "eval"):
            getattr(optimizer, mode)()


def _start(family: TaskFamily, horizon: Tensor, generator: torch.Generator) -> InnerState:
    """The problems of every lane, drawn as `l2o.unroll.start` draws them."""
    data = family.sample(generator, len(horizon))
    params, buffers = family.init(data, generator)
    first_loss = torch.full(horizon.shape, torch.nan, device=horizon.device)
    return InnerState(data, params, buffers, OptState({}, {}), torch.zeros_like(horizon), horizon, first_loss)


def _train(
    lanes: Sequence[Lane], family: TaskFamily, generator: torch.Generator, state: InnerState, steps: int
) -> tuple[InnerState, Tensor]:
    losses = []
    state = state._replace(params=_switched(lanes, "train"))
    for _ in range(steps):
        batch = family.batch(state.data, "train", generator)
        loss, buffers, grads, _ = gradients(family, state, batch)
        grads, buffers = family.transform_gradients(grads, buffers, state.data, batch)
        for i, lane in enumerate(lanes):
            lane.step({name: g[i] for name, g in grads.items()})
        state = state._replace(params=_stacked(lanes), buffers=buffers, step=state.step + 1)
        losses.append(loss)
    return state._replace(params=_switched(lanes, "eval")), torch.stack(losses)


def _switched(lanes: Sequence[Lane], mode: Literal["train", "eval"]) -> Params:
    for lane in lanes:
        switch(lane.optimizers, mode)
    return _stacked(lanes)


def _stacked(lanes: Sequence[Lane]) -> Params:
    """Not views into which the optimizers write: some put another tensor into a parameter."""
    return {name: torch.stack([lane.params[name] for lane in lanes]) for name in lanes[0].params}
