"""Many inner runs side by side, without gradients of θ: what they lose at every step, and on held-out data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap

from l2o.checks import check_int
from l2o.tasks import TableClassifier
from l2o.tasks.image_task import ImageClassifier
from l2o.types import InnerState, TaskFamily, Theta, UpdateRule
from l2o.unroll import sample_runs, unroll

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
    accuracy: share of held-out labels that are right, likewise; None but for classifiers.
    valid_steps: how many updates had been applied at each point; the last is the length of the run.
    timed_out: whether it took too long and was ended at one of the points, after which all losses are NaN.
    """

    train: Tensor
    valid: Tensor
    valid_steps: list[int]
    accuracy: Tensor | None = None
    timed_out: bool = False


def never() -> bool:
    """Say of runs without a limit whether it is over."""
    return False


def silent(steps: int) -> None:
    """Tell nobody; an `Advance`."""


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
    points = evaluation_steps(check_int("horizon", horizon), check_int("evaluations", evaluations))
    return trace(begin(rule, theta, family, horizon, generator), points, generator, advance)


def begin(rule: UpdateRule, theta: Theta, family: TaskFamily, horizon: int, generator: torch.Generator) -> Begun:
    """Begin the runs of a rule, one for each lane of ``theta`` (``[lanes, ...]``)."""
    lanes = len(next(iter(theta.values())))
    with torch.no_grad():
        state = sample_runs(rule, theta, family, torch.full((lanes,), horizon, device=generator.device), generator)

    def train(state: InnerState, steps: int) -> tuple[InnerState, Tensor]:
        return unroll(rule, theta, family, state, steps, generator)

    return Begun(train, state, family)


@torch.no_grad()
def trace(
    begun: Begun,
    points: list[int],
    generator: torch.Generator,
    advance: Advance = silent,
    is_late: Callable[[], bool] = never,
) -> Curves:
    """Train up to the last of ``points`` (numbers of steps), and measure the validation loss at each of them.

    generator: the one that training draws from; validation batches come from another of the same seed.
    is_late: asked at each point whether the run has to end there.
    """
    held_out = torch.Generator(generator.device).manual_seed(generator.initial_seed() ^ _VALID_SEED)
    state, losses, valid, wrong = begun.state, [], [], []
    families = [begun.family, *([] if (measured := by_error(begun.family)) is None else [measured])]
    for before, point in zip([0, *points], points, strict=False):
        state, loss = begun.train(state, point - before)
        losses.append(loss)
        on_valid, *error = validation_losses(families, state, held_out)
        valid.append(on_valid)
        wrong += error
        advance(point - before)
        if late := is_late():
            break
    train, held_out_losses = _padded(torch.cat(losses), points[-1]), _padded(torch.stack(valid), len(points))
    accuracy = 1.0 - _padded(torch.stack(wrong), len(points)) if wrong else None
    return Curves(train, held_out_losses, points, accuracy, late)


def _padded(rows: Tensor, length: int) -> Tensor:
    """``[n, lanes]`` with NaN behind, ``[length, lanes]``."""
    return F.pad(rows, (0, 0, 0, length - len(rows)), value=torch.nan)


def evaluation_steps(horizon: int, evaluations: int) -> list[int]:
    """Return up to ``evaluations`` evenly spread step counts, the last of them ``horizon``; fewer where the run is
    shorter."""
    return sorted({-(-horizon * k // evaluations) for k in range(1, evaluations + 1)})


def by_error(family: Any) -> TaskFamily | None:
    """Return ``family``, also inside others, with the share of wrong labels for its loss; None unless it classifies."""
    if isinstance(family, ImageClassifier | TableClassifier):
        return replace(family, criterion="error")
    inner = by_error(family.family) if isinstance(getattr(family, "family", None), TaskFamily) else None
    return None if inner is None else cast(TaskFamily, replace(family, family=inner))


def validation_losses(families: Sequence[TaskFamily], state: InnerState, generator: torch.Generator) -> list[Tensor]:
    """Return the mean loss ``[lanes]`` of each family over the same few batches of the ``valid`` split."""
    losses = []
    for _ in range(VALID_BATCHES):
        batch = families[0].batch(state.data, "valid", generator)
        each = (vmap(family.loss)(state.params, state.buffers, state.data, batch)[0] for family in families)
        losses.append(torch.stack(list(each)))
    return list(torch.stack(losses).mean(0))
