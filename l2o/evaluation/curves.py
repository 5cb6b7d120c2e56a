"""Many inner runs side by side, without gradients of θ: what they lose at every step, and on held-out data."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from l2o._checks import whole
from l2o.types import InnerState, TaskFamily, Theta, UpdateRule
from l2o.unroll import start, unroll

Train = Callable[[InnerState, int], tuple[InnerState, Tensor]]
"""So many inner steps of every lane: the new state, and the losses before each update ``[steps, lanes]``."""
Advance = Callable[[int], None]
"""Called with how many further steps of every lane are done."""

EVALUATIONS = 20
VALID_BATCHES = 4
"""Batches of the ``valid`` split that are averaged into one validation loss."""

_VALID_SEED = 0x5EED
"""Set apart from the seed of the run, so that validation batches come from a stream of their own."""


class Begun(NamedTuple):
    """Runs of all lanes at their beginning.  train: goes on from ``state``.  family: what all lanes train on."""

    train: Train
    state: InnerState
    family: TaskFamily


class Curves(NamedTuple):
    """Losses of a run, on its device.

    train: ``[steps, lanes]``, before each update.          valid: ``[points, lanes]``, on held-out data.
    valid_steps: how many updates had been applied at each point; the last is the length of the run.
    """

    train: Tensor
    valid: Tensor
    valid_steps: list[int]


def silent(steps: int) -> None:
    """An `Advance` that tells nobody."""


def run(
    rule: UpdateRule,
    theta: Theta,
    family: TaskFamily,
    horizon: int,
    generator: torch.Generator,
    evaluations: int = EVALUATIONS,
    advance: Advance = silent,
) -> Curves:
    """Train every lane for ``horizon`` steps; the validation loss is measured at ``evaluations`` evenly spread points.

    theta: ``[lanes, ...]`` on the generator's device.     horizon: also the ``total_steps`` that the rule is told.

    Training draws from ``generator`` exactly what it would without validation, so that optimizers which are run from
    equal generators meet the same tasks, initialisations and batches. The host waits for the device nowhere in here.
    Raises `ConfigurationError` for a horizon or a number of evaluations that is not a positive whole number.
    """
    points = evaluation_steps(whole("horizon", horizon), whole("evaluations", evaluations))
    return trace(begin(rule, theta, family, horizon, generator), points, generator, advance)


def begin(rule: UpdateRule, theta: Theta, family: TaskFamily, horizon: int, generator: torch.Generator) -> Begun:
    """The runs of a rule, one for each lane of ``theta`` (``[lanes, ...]``)."""
    lanes = len(next(iter(theta.values())))
    with torch.no_grad():
        state = start(rule, theta, family, torch.full((lanes,), horizon, device=generator.device), generator)

    def train(state: InnerState, steps: int) -> tuple[InnerState, Tensor]:
        return unroll(rule, theta, family, state, steps, generator)

    return Begun(train, state, family)


@torch.no_grad()
def trace(begun: Begun, points: list[int], generator: torch.Generator, advance: Advance = silent) -> Curves:
    """Train up to the last of ``points`` (numbers of steps), and measure the validation loss at each of them.

    generator: the one that training draws from; validation batches come from another of the same seed.
    """
    held_out = torch.Generator(generator.device).manual_seed(generator.initial_seed() ^ _VALID_SEED)
    state, losses, valid = begun.state, [], []
    for before, point in zip([0, *points], points, strict=False):
        state, loss = begun.train(state, point - before)
        losses.append(loss)
        valid.append(validation_loss(begun.family, state, held_out))
        advance(point - before)
    return Curves(torch.cat(losses), torch.stack(valid), points)


def evaluation_steps(horizon: int, evaluations: int) -> list[int]:
    """Up to ``evaluations`` evenly spread step counts, the last of them ``horizon``; fewer where the run is shorter."""
    return sorted({-(-horizon * k // evaluations) for k in range(1, evaluations + 1)})


def validation_loss(family: TaskFamily, state: InnerState, generator: torch.Generator) -> Tensor:
    """Mean loss ``[lanes]`` over a few batches of the ``valid`` split at the current parameters."""
    losses = []
    for _ in range(VALID_BATCHES):
        batch = family.batch(state.data, "valid", generator)
        losses.append(vmap(family.loss)(state.params, state.buffers, state.data, batch)[0])
    return torch.stack(losses).mean(0)
