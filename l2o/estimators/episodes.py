"""What all estimators share: inner runs in flight, one a lane, cut into truncations; and what their losses count."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from l2o import random
from l2o.checks import check_float, check_int, unknown
from l2o.distributed import all_sum, ranks
from l2o.random import LaneGenerator
from l2o.types import ConfigurationError, InnerState, MetaGradient, Metrics, TaskFamily, Theta, UpdateRule
from l2o.unroll import expand_theta, running, sample_runs

Horizon = int | tuple[int, int]

META_LOSSES = ("mean", "log", "relative", "end")
WINDOWS = ("mean", "linear", "last")
NOTHING = 1e-6
"""A first loss under it is zero but for rounding: no multiple of it says what is much."""


class Streams(NamedTuple):
    """The random numbers of one truncation, apart from one another: what one of them gives shifts none of the others.

    batches: of the unroll, by family.     resets: seed of the runs that begin after it.     noise: of perturbations.
    """

    batches: LaneGenerator
    resets: int
    noise: LaneGenerator


@dataclass(frozen=True)
class Episodes(MetaGradient):
    """Inner runs in flight, and the meta-loss over a truncation of them; the base of the estimators.

    rule, family: what is meta-trained, and on what.
    lanes: inner problems at once, over all processes.
    horizon: steps of an inner run; ``(low, high)`` draws each run's, log-uniformly.
    truncation: steps of one estimate; None for whole runs, which then have one length, drawn anew for each estimate.
    curriculum: estimates over which the longest run grows, log-linearly, from ``low`` to ``high``; 0: at once.
    stagger: spread the ages of lanes evenly, so that each estimate sees all phases of a run.
    meta_loss: ``mean`` of the losses; of their logarithms (``log``), which weighs late progress as much as early and is
        blind to the scale of a task (cf. Lv et al. 2017, arXiv 1703.03633, on scale); or of the losses divided by the
        run's first (``relative``), which is blind to the scale alone. Either rises with every loss, of whatever sign,
        see `signed_log` and `scale`; what it weighs most, though, lies near zero, so that ``mean`` suits losses that
        pass it as likelihoods do. ``end`` is of whole runs alone: of the mean over the last twentieth of the run the
        logarithm, and ``middle`` times that of the tenth after its first third, so that two ways to one end differ.
    window: what a step counts within its run: all the same (``mean``), in proportion to its number (``linear``), or the
        last one alone (``last``). The weights of a run have the mean 1.
    valid_weight: of a loss on validation data (the batch of a fresh draw) in each step's loss; the training loss has
        the rest. With 0 no validation data are drawn.
    log_floor: fraction of a lane's first loss that ``log`` adds, so that what is solved already earns little more;
        without it, a rule pays for the last digits of easy lanes with accidents on hard ones.
    explosion: a lane whose loss passes this multiple of its first, or is not finite, is counted and reset; see `limit`.

    A step's loss is the one before its update, so that the last update of a run is credited to nobody. A run that ends
    within a truncation is frozen for the rest of it, which counts nothing; every step of a run counts the same
    however truncations cut it.
    """

    rule: UpdateRule
    family: TaskFamily
    lanes: int = 8
    horizon: Horizon = 100
    truncation: int | None = 20
    curriculum: int = 0
    stagger: bool = True
    meta_loss: Literal["mean", "log", "relative", "end"] = "mean"
    window: Literal["mean", "linear", "last"] = "mean"
    valid_weight: float = 0.0
    middle: float = 0.25
    log_floor: float = 1e-2
    explosion: float = 1e3

    per_task = 1
    """Adjacent lanes that share their problem: two, an antithetic pair, where θ is perturbed."""
    shortest = 1
    """Fewest steps of a truncation."""
    judges_whole_runs = False
    """Whether whole runs may be of several lengths, and judged by their ends."""

    def __post_init__(self) -> None:
        check_int("lanes", self.lanes)
        self._check_lengths()
        if self.meta_loss == "end" and (self.truncation is not None or not self.judges_whole_runs):
            raise ConfigurationError("meta_loss='end': expected truncation=None, whole runs, by evolution")
        for name, value, valid in (("meta_loss", self.meta_loss, META_LOSSES), ("window", self.window, WINDOWS)):
            if value not in valid:
                raise ConfigurationError(unknown(name, value, valid))
        check_float("valid_weight", self.valid_weight, least=0.0)
        if self.valid_weight > 1.0:
            raise ConfigurationError(f"valid_weight={self.valid_weight}: expected at most 1")
        check_float("middle", self.middle, least=0.0)
        check_float("log_floor", self.log_floor, above=0.0, below=1.0)
        check_float("explosion", self.explosion, above=0.0)

    def _check_lengths(self) -> None:
        if isinstance(self.horizon, tuple | list):
            if len(self.horizon) != 2 or (self.truncation is None and not self.judges_whole_runs):
                raise ConfigurationError(
                    f"horizon={self.horizon!r}: expected a number, or (low, high) where there is a truncation"
                )
            check_int("horizon[1]", self.horizon[1], least=check_int("horizon[0]", self.horizon[0], self.shortest))
        else:
            check_int("horizon", self.horizon, self.shortest)
        if self.truncation is not None:
            check_int("truncation", self.truncation, self.shortest)
        check_int("curriculum", self.curriculum, least=0)

    @property
    def longest(self) -> int:
        """Steps of the longest run."""
        return self.horizon if isinstance(self.horizon, int) else self.horizon[1]

    @property
    def steps(self) -> int:
        """Steps of one estimate, or of the longest where they are whole runs of a range of lengths."""
        return self.longest if self.truncation is None else min(self.truncation, self.longest)

    @property
    def own_lanes(self) -> int:
        """Lanes of this process."""
        return (
            ranks().share(self.lanes // self.per_task, "lanes" if self.per_task == 1 else "lanes / 2") * self.per_task
        )

    def ids(self, index: Tensor) -> Tensor:
        """Number the problems in the whole run, int64 ``[problems]``, from ``index [lanes]`` of this process'
        lanes, of which adjacent ones share a problem."""
        return (index[:: self.per_task] + ranks().rank * self.own_lanes) // self.per_task

    def streams(self, generator: torch.Generator) -> Streams:
        """Advance ``generator`` by as much in every process; waits for the device once."""
        device = generator.device
        batches, resets, noise = random.draw_seeds(generator, 3).tolist()
        ids = self.ids(torch.arange(self.own_lanes, device=device))
        return Streams(self._stream(device, batches, ids), resets, LaneGenerator(device, noise, ids))

    def _stream(self, device: torch.device, seed: int, ids: Tensor) -> LaneGenerator:
        # A family that is not keyed would draw the same in every process.
        return LaneGenerator(device, seed if self.family.keyed else (seed + ranks().rank) % 2**63, ids)

    def reset_all(self, theta: Theta, generator: torch.Generator) -> InnerState:
        """Return all lanes at the start of a run, their ages to be spread."""
        seed = self.streams(generator).resets
        index = torch.arange(self.own_lanes, device=generator.device)
        state = self.new_runs(theta, index, seed, torch.zeros((), device=generator.device))
        if not self.stagger or self.truncation is None:
            return state
        # First runs are cut short to different lengths; from their ends on, whole runs are at different ages.
        ids = self.ids(index).repeat_interleave(self.per_task)
        phase = ids * state.total_steps // (self.lanes // self.per_task)
        return state._replace(total_steps=state.total_steps - phase // self.truncation * self.truncation)

    def new_runs(self, theta: Theta, index: Tensor, seed: int, count: Tensor) -> InnerState:
        """Return new runs for the lanes ``index``, int64, of this process.  count: of the estimates so far, 0-d."""
        generator = self._stream(index.device, seed, self.ids(index))
        if self.truncation is None:  # one length, the same in every process, of an id that no lane has
            one = LaneGenerator(index.device, seed, torch.full((1,), -1, device=index.device))
            horizon = self._draw_horizon(one, 1, count).repeat(len(index))
        else:
            horizon = self._draw_horizon(generator, len(index) // self.per_task, count).repeat_interleave(self.per_task)
        return sample_runs(self.rule, expand_theta(theta, len(index)), self.problems, horizon, generator)

    @property
    def problems(self) -> TaskFamily:
        """The family as the lanes have it."""
        return self.family

    def _draw_horizon(self, generator: LaneGenerator, count: int, estimates: Tensor) -> Tensor:
        if isinstance(self.horizon, int):
            return torch.full((count,), self.horizon, device=generator.device)
        low, high = self.horizon
        grown = (estimates / max(self.curriculum, 1)).clamp(max=1.0) if self.curriculum else 1.0
        top = math.log(low) + math.log((high + 1) / low) * grown
        uniform = random.uniform(generator, count)
        return (math.log(low) + uniform * (top - math.log(low))).exp().long().clamp(low, high)

    def objective(self, losses: Tensor, before: InnerState, first_loss: Tensor) -> Tensor:
        """Return what the steps from ``before`` on count, ``[lanes]``.  losses: ``[steps, lanes]``.  first_loss:
        ``[lanes]``.

        The sum over a run's truncations, divided by their number, is the meta-loss of the run.
        """
        if self.meta_loss == "end":
            return _ends(losses, self.log_floor * scale(first_loss), self.middle)
        if self.meta_loss == "log":
            losses = signed_log(losses, self.log_floor * scale(first_loss))
        elif self.meta_loss == "relative":
            losses = losses / scale(first_loss)
        # where, and not a product alone: a masked NaN must not come back as NaN * 0
        weights = self._weights(before, len(losses)).to(losses.dtype)
        steps = before.total_steps if self.truncation is None else self.steps
        return torch.where(weights > 0, losses * weights, 0.0).sum(0) / steps

    def _weights(self, before: InnerState, steps: int) -> Tensor:
        """What each step counts, ``[steps, lanes]``; 0 past the end of a run."""
        number = before.step + 1 + torch.arange(steps, device=before.step.device).unsqueeze(1)
        total = before.total_steps
        if self.window == "last":
            return torch.where(number == total, total, 0)
        return torch.where(number <= total, 2.0 * number / (total + 1) if self.window == "linear" else 1.0, 0.0)

    def exploded(self, losses: Tensor, first_loss: Tensor) -> Tensor:
        """Return a bool ``[steps, lanes]``: losses not finite, or above the `limit` by ``first_loss [lanes]``."""
        return ~(losses.isfinite() & (losses <= self.limit(losses, first_loss)))

    def limit(self, losses: Tensor, first_loss: Tensor) -> Tensor:
        """Return ``explosion`` times the size of ``first_loss``, or of the lowest below zero where that is more,
        ``[lanes]``.

        A run that passes zero may have begun next to it by chance. All lanes of a problem have one limit.
        """
        depth = torch.where(losses.isfinite(), -losses, 0.0).amax(0)
        depth = depth.view(-1, self.per_task).amax(1).repeat_interleave(self.per_task)
        return self.explosion * torch.maximum(scale(first_loss), depth)


def last_steps(steps: int) -> int:
    """Return how many steps make up the end of a run."""
    return min(max(5, steps // 20), steps)


def _ends(losses: Tensor, floor: Tensor, weight: float) -> Tensor:
    """Of whole runs ``[steps, lanes]``: the logarithm of the mean loss at the end, and ``weight`` times that in the
    middle."""
    steps = len(losses)
    middle = losses[steps // 3 : steps // 3 + max(5, steps // 10)]
    end = losses[-last_steps(steps) :]
    return signed_log(end.mean(0), floor) + weight * signed_log(middle.mean(0), floor)


def scale(first_loss: Tensor) -> Tensor:
    """Return what the losses of a run are measured by, ``[lanes]``: the size of ``first_loss``, 1 where that is
    `NOTHING`."""
    size = first_loss.abs()
    return torch.where(size < NOTHING, 1.0, size)


def signed_log(losses: Tensor, floor: Tensor) -> Tensor:
    """Return ``log(losses + floor)``, of any shape, mirrored below zero: the slope is ``1 / (abs(loss) + floor)``."""
    below = losses < 0
    size = (torch.where(below, -losses, losses) + floor).log()
    return torch.where(below, 2.0 * floor.log() - size, size)


def reduce_rows(rows: Theta, mask: Tensor, sums: dict[str, Tensor]) -> tuple[Theta, dict[str, Tensor]]:
    """Return means of ``rows [n, ...]`` over the set entries of ``mask [n]``, 0 if none is, and sums, over all
    processes."""
    own = {f"rows/{name}": along(mask, values, 0.0).sum(0) for name, values in rows.items()}
    total = all_sum({**own, "rows": mask.sum(), **sums})
    count = total["rows"].clamp(min=1)
    return {name: total[f"rows/{name}"] / count for name in rows}, {name: total[name] for name in sums}


def lane_sums(losses: Tensor, before: InnerState, healthy: Tensor, first_loss: Tensor) -> dict[str, Tensor]:
    """Return sums over lanes, 0-d, behind the metrics that every estimator has, see `lane_metrics`.

    losses: ``[steps, lanes]``, from ``before`` on.     healthy: bool ``[lanes]``.     first_loss: ``[lanes]``.
    """
    counted = running(before, len(losses))
    lane_losses = torch.where(counted, losses, 0.0).sum(0) / counted.sum(0).clamp(min=1)
    return {
        "meta_loss": along(healthy, lane_losses, 0.0).sum(),
        "healthy": healthy.sum(),
        "lanes_masked": (~healthy).sum(),
        "lanes_broken": (~first_loss.isfinite()).sum(),
        "inner_steps": counted.sum(),
    }


def lane_metrics(sums: dict[str, Tensor]) -> Metrics:
    """Return, each 0-d: the mean loss of healthy lanes (NaN where there are none), how many are not or had no finite
    loss to begin with, and inner steps taken."""
    metrics = {name: value for name, value in sums.items() if name != "healthy"}
    return {**metrics, "meta_loss": sums["meta_loss"] / sums["healthy"]}


def along(mask: Tensor, values: Tensor, other: float) -> Tensor:
    """Return ``values [n, ...]`` where ``mask [n]`` is set, else ``other``.

    `torch.where` and not a product: a masked NaN must not come back as ``NaN * 0``.
    """
    return torch.where(mask.view(-1, *[1] * (values.ndim - 1)), values, other)
