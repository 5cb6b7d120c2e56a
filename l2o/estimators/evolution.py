"""Evolution strategies: gradients of a smoothed meta-loss from antithetic pairs of perturbed runs, no backpropagation.

One algorithm; the estimators of the field are settings of it. ``T`` is the horizon, ``W`` the truncation.

=====================  ==========  ==============  ============  =================================================
estimator              truncation  noise_steps     accumulate    source
=====================  ==========  ==============  ============  =================================================
ES, full episodes      None (T)    any             any           Salimans et al. 2017, arXiv 1703.03864
truncated ES           W           "truncation"    False         Metz et al. 2019, arXiv 1810.10180; biased
PES                    W           "truncation"    True          Vicol et al. 2021, arXiv 2112.13835
GPES-K                 W           K               True          Li et al. 2023, arXiv 2304.12180, section 3
NRES, ES-Single        W           "episode"       either        Li et al. 2023; Vicol 2023, arXiv 2304.11153
whole runs by ends     None        any             any           ``horizon=(low, high), meta_loss="end"``
=====================  ==========  ==============  ============  =================================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from l2o import random
from l2o.checks import check_float, check_int, unknown
from l2o.distributed import all_rows
from l2o.estimators.compiled import CompiledFamily, CompiledRule
from l2o.estimators.episodes import Episodes, along, lane_metrics, lane_sums, last_steps, reduce_rows
from l2o.ops.numeric import over_root
from l2o.random import LaneGenerator
from l2o.tasks.repeated import Repeated
from l2o.types import ConfigurationError, InnerState, Metrics, TaskFamily, Theta, UpdateRule
from l2o.unroll import detach, init_state, reset, unroll

FITNESSES = ("difference", "rank", "sign", "standard")


class EvolutionState(NamedTuple):
    """inner: the runs in flight; lanes 2i and 2i + 1 are a pair.     estimates: so far, int64, 0-d.

    noise: what is added to θ in the first run of each pair and taken from it in the second, ``[pairs, ...]``.
    score: the sum, over the perturbations of the run so far, of noise over its variance: the derivative of the
        logarithm of their density with respect to θ, ``[pairs, ...]``.
    """

    inner: InnerState
    noise: Theta
    score: Theta
    estimates: Tensor


@dataclass(frozen=True)
class Evolution(Episodes):
    """The mean over pairs of ``score · (L(θ + noise) - L(θ - noise)) / 2``. What `Episodes` has, and:

    The two runs of a pair share task, initialisation and batches, begin together and are reset together.

    lanes: runs at once, two a pair.
    sigma: standard deviation of the noise.     sigma_of: of single tensors of θ, by name, where it is another.
    sigma_final, sigma_steps: all deviations fall, log-linearly over so many estimates, to ``sigma_final / sigma`` of
        what they were; None: they stay. Perturbations are scored by the deviation that they were drawn with.
    noise_steps: how long a perturbation is held: a ``truncation``, the whole ``episode``, or a number of steps, a
        multiple of the truncation.
    accumulate: score the losses of a truncation by all perturbations of the run, not only by the one in force.
    fitness: what half the difference of a pair's losses is replaced by, in units of sigma: ``sign``, its sign;
        ``rank``, its sign times the rank of its size among all pairs, from 0 to 1 (the centred ranks, Salimans et al.
        2017, section 2.1, of losses that are compared within pairs only); ``standard``, half the difference over the
        root mean square of all pairs'; or nothing (``difference``).
    scaled: give the gradient times the square of a tensor's ``sigma_of / sigma``: θ then moves, under an outer
        optimizer without a scale of its own for each entry, as if each tensor were measured in units of its deviation.
    explosion: at this multiple of its first a loss is cut off, since it is to be counted; a pair one of whose runs gets
        there is reset.
    compile: rule and family, where they have no kernels, by `l2o.estimators.compiled`: slow to begin, then two to four
        times as fast.

    Pairs whose first loss is not finite count nothing.
    """

    lanes: int = 16
    explosion: float = 10.0
    sigma: float = 0.01
    sigma_of: Mapping[str, float] | None = None
    sigma_final: float | None = None
    sigma_steps: int = 0
    noise_steps: int | Literal["truncation", "episode"] = "truncation"
    accumulate: bool = True
    fitness: Literal["difference", "rank", "sign", "standard"] = "difference"
    scaled: bool = False
    compile: bool = False

    per_task = 2
    judges_whole_runs = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lanes % 2:
            raise ConfigurationError(f"lanes={self.lanes}: expected an even number, two runs a pair")
        check_float("sigma", self.sigma, above=0.0)
        for name, value in (self.sigma_of or {}).items():
            check_float(f"sigma_of.{name}", value, above=0.0)
        if self.sigma_final is not None:
            check_float("sigma_final", self.sigma_final, above=0.0)
            check_int("sigma_steps", self.sigma_steps)
        if self.fitness not in FITNESSES:
            raise ConfigurationError(unknown("fitness", self.fitness, FITNESSES))
        self._check_noise_steps()

    def _check_noise_steps(self) -> None:
        if self.noise_steps in ("truncation", "episode"):
            return
        if isinstance(self.noise_steps, str):
            raise ConfigurationError(unknown("noise_steps", self.noise_steps, ("truncation", "episode", "a number")))
        if check_int("noise_steps", self.noise_steps) % self.steps:
            raise ConfigurationError(f"noise_steps={self.noise_steps}: expected a multiple of truncation={self.steps}")

    @property
    def problems(self) -> TaskFamily:
        return Repeated(self.family, 2)

    def init(self, theta: Theta, generator: torch.Generator) -> EvolutionState:
        for name in self.sigma_of or {}:
            if name not in theta:
                raise ConfigurationError(unknown("tensor of θ in sigma_of", name, theta))
        inner = self.reset_all(theta, generator)
        zeros = {k: t.detach().new_zeros(self.own_lanes // 2, *t.shape) for k, t in theta.items()}
        count = torch.zeros((), dtype=torch.long, device=generator.device)
        return EvolutionState(inner, zeros, {k: t.clone() for k, t in zeros.items()}, count)

    @torch.no_grad()
    def estimate(
        self, theta: Theta, state: EvolutionState, generator: torch.Generator
    ) -> tuple[Theta, EvolutionState, Metrics]:
        streams = self.streams(generator)
        noise, score = self._perturb(theta, state, streams.noise)
        lane_theta = {k: torch.stack([t + noise[k], t - noise[k]], 1).flatten(0, 1) for k, t in theta.items()}
        before = init_state(self.rule, lane_theta, self.problems, state.inner)
        after, losses = self._unroll(lane_theta, before, streams.batches)
        exploded = self.exploded(losses, after.first_loss)
        limit = self.limit(losses, after.first_loss)
        counted = self.objective(torch.where(exploded, limit, losses), before, after.first_loss)
        unbroken = after.first_loss.isfinite()
        fitness = self._fitness(torch.where(unbroken, counted, torch.nan))
        sums = lane_sums(losses, before, ~exploded.any(0), after.first_loss)
        rows = {k: s * _like(fitness, s).to(s.dtype) * self._unit(k) for k, s in score.items()}
        grads, sums = reduce_rows(rows, unbroken[::2], sums)
        over = ((after.step >= after.total_steps) | exploded.any(0)).view(-1, 2).any(1).repeat_interleave(2)
        inner = reset(detach(after), over, lambda index: self.new_runs(theta, index, streams.resets, state.estimates))
        return grads, EvolutionState(inner, noise, score, state.estimates + 1), lane_metrics(sums)

    def _unroll(self, theta: Theta, before: InnerState, generator: LaneGenerator) -> tuple[InnerState, Tensor]:
        """One truncation. Of whole runs that are judged by their ends, the end alone has validation losses in it."""
        steps = self.steps if isinstance(self.horizon, int) or self.truncation else int(before.total_steps.max())
        last = last_steps(steps) if self.meta_loss == "end" and self.valid_weight else steps
        (rule, family), state, losses = self._parts, before, []
        for count, weight in ((steps - last, 0.0), (last, self.valid_weight)):
            if count:
                state, part = unroll(rule, theta, family, state, count, generator, valid_weight=weight)
                losses.append(part)
        return state, torch.cat(losses)

    @cached_property
    def _parts(self) -> tuple[UpdateRule, TaskFamily]:
        """What is unrolled."""
        return (
            (CompiledRule(self.rule, self.family.kinds), CompiledFamily(self.problems))
            if self.compile
            else (self.rule, self.problems)
        )

    def _unit(self, name: str) -> float:
        """What the gradient of a tensor is multiplied by."""
        return ((self.sigma_of or {}).get(name, self.sigma) / self.sigma) ** 2 if self.scaled else 1.0

    def _perturb(self, theta: Theta, state: EvolutionState, generator: LaneGenerator) -> tuple[Theta, Theta]:
        """The noise of this truncation and the scores that go with it: new where a perturbation has had its time."""
        step = state.inner.step[::2]
        due = step == 0 if self.noise_steps == "episode" else step % self._noise_steps == 0
        keep = (step > 0) & self.accumulate
        units = random.normal(generator, len(step), sum(t.numel() for t in theta.values()))
        noise, score = {}, {}
        for (name, t), drawn in zip(theta.items(), units.split([t.numel() for t in theta.values()], 1), strict=True):
            sigma = self._sigma(name, state.estimates)
            unit = drawn.reshape(-1, *t.shape).to(t.dtype)
            noise[name] = torch.where(_like(due, unit), unit * sigma, state.noise[name])
            renewed = along(keep, state.score[name], 0.0) + unit / sigma
            score[name] = torch.where(_like(due, unit), renewed, state.score[name])
        return noise, score

    @property
    def _noise_steps(self) -> int:
        return self.noise_steps if isinstance(self.noise_steps, int) else self.steps

    def _sigma(self, name: str, count: Tensor) -> Tensor | float:
        sigma = (self.sigma_of or {}).get(name, self.sigma)
        if self.sigma_final is None:
            return sigma
        progress = (count / self.sigma_steps).clamp(max=1.0)
        return sigma * (progress * math.log(self.sigma_final / self.sigma)).exp()

    def _fitness(self, objective: Tensor) -> Tensor:
        """``[pairs]``, from the objectives ``[lanes]``; NaN, where they are, of pairs that count nothing for others."""
        half = (objective[::2] - objective[1::2]) / 2.0
        if self.fitness == "difference":
            return half
        if self.fitness == "sign":
            return self.sigma * half.sign()
        every = all_rows(half).abs()
        if self.fitness == "standard":
            return self.sigma * over_root(half, every.square().nanmean())
        others = ((~every.isnan()).sum() - 1).clamp(min=1)
        rank = (every.unsqueeze(0) < half.abs().unsqueeze(1)).sum(1) / others
        return self.sigma * half.sign() * rank.to(half.dtype)


def _like(mask: Tensor, values: Tensor) -> Tensor:
    """``mask [n]`` with as many axes as ``values [n, ...]``."""
    return mask.view(-1, *[1] * (values.ndim - 1))
