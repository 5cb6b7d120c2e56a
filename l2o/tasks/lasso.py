"""Sparse regression with an L1 penalty (LASSO, Tibshirani 1996), its solution known by construction."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from l2o.checks import check_float, check_int
from l2o.random import log_uniform, normal, uniform
from l2o.tasks.analytic import Ends, active_entries, check_ends, log_uniform_spectrum
from l2o.tasks.ranges import check_log_range, check_range, check_whole_range
from l2o.types import Batch, Buffers, Params, Split, TaskData, TaskFamily


@dataclass(frozen=True)
class Lasso(TaskFamily):
    """``½ ||A x - b||² + p ||x||₁`` less its minimum, which is taken at a sparse x*; so the minimum is 0.

    A benchmark of learned optimizers (Chen et al. 2021, arXiv 2103.12828). There A and x* are drawn and the minimum is
    searched; here b, and the lengths of some columns of A, are such that x* solves the problem (construction of
    Nesterov 2013, "Gradient methods for minimizing composite functions", section 6): ``Aᵀ(b - A x*) = p s`` with
    ``s_j = sign(x*_j)`` where x* is not 0 and ``|s_j| ≤ 1`` elsewhere. With it the loss is a sum of terms that are not
    negative, ``½ ||A (x - x*)||² + p Σ (|x_j| - s_j x_j)``, and no digits are lost near the minimum.

    rows: of A, whose entries are normal, with columns of length about 1 or less.
    dims: range of the number n of columns, uniform. ``x`` always has ``dims[1]`` entries; those from n on have no
        gradient and no part in the loss.
    conditions: range of the condition number κ, log-uniform; rows of A have lengths between 1/κ and 1 of the normal.
    densities: range of the fraction of entries of x* that are not 0, uniform.     penalties: range of p, log-uniform.
    noise: standard deviation of what is added to b, afresh in each training batch. Validation is noiseless.

    Runs start at x ~ N(0, I), as the entries of x* that are not 0 are distributed.
    Data: ``a [lanes, rows, dim]``, ``solution`` (x*), ``subgradient`` (s) and ``penalty`` (p, or 0 from n on), each
    ``[lanes, dim]``. Parameters: ``x [lanes, dim]``. Batches: ``noise [lanes, rows]``. All float32.
    Raises `ConfigurationError` for ranges that are none and numbers out of their range.
    """

    rows: int = 16
    dims: tuple[int, int] = (4, 32)
    conditions: Ends = (1.0, 10.0)
    densities: Ends = (0.1, 0.5)
    penalties: Ends = (1e-2, 1.0)
    noise: float = 0.0

    keyed = True

    def __post_init__(self) -> None:
        check_int("rows", self.rows)
        check_ends(check_whole_range, "dims", self.dims)
        check_ends(check_range, "conditions", self.conditions, least=1.0, most=math.inf)
        check_ends(check_range, "densities", self.densities, most=1.0)
        check_ends(check_log_range, "penalties", self.penalties)
        check_float("noise", self.noise, least=0.0)

    def sample(self, generator: torch.Generator, lanes: int) -> TaskData:
        active = active_entries(generator, lanes, self.dims)
        a = normal(generator, lanes, self.rows, active.shape[1]) * active.unsqueeze(1) / math.sqrt(self.rows)
        # Of b - A x* only the direction is free: correlations with it, relative to the weakest one in the support.
        correlation = torch.einsum("lrd,lr->ld", a, normal(generator, lanes, self.rows))
        correlation = correlation / self._weakest(generator, active, correlation)
        support, size = correlation.abs() >= 1, normal(generator, *active.shape).abs()
        condition = log_uniform(generator, lanes, low=self.conditions[0], high=self.conditions[1])
        lengths = log_uniform_spectrum(generator, condition, self.rows).unsqueeze(2)
        penalty = log_uniform(generator, lanes, 1, low=self.penalties[0], high=self.penalties[1])
        return {
            "a": lengths * a / correlation.abs().clamp(min=1).unsqueeze(1),
            "solution": torch.where(support, correlation.sign() * size, 0.0),
            "subgradient": correlation.clamp(-1, 1),
            "penalty": penalty * active,
        }

    def _weakest(self, generator: torch.Generator, active: Tensor, correlation: Tensor) -> Tensor:
        """``[lanes, 1]``: the k-th largest size of a correlation, k the number of entries of x* that are not 0."""
        low, high = self.densities
        share = uniform(generator, len(active), 1, low=low, high=high)
        count = (share * active.sum(1, keepdim=True)).round().long().clamp(min=1)
        return correlation.abs().sort(dim=1, descending=True).values.gather(1, count - 1)

    def init(self, data: TaskData, generator: torch.Generator) -> tuple[Params, Buffers]:
        return {"x": normal(generator, *data["solution"].shape)}, {}

    def batch(self, data: TaskData, split: Split, generator: torch.Generator) -> Batch:
        """Draw ``noise [lanes, rows]``: N(0, 1), or zeros for ``valid``."""
        like = data["a"][:, :, 0]
        return {"noise": normal(generator, *like.shape) if split == "train" else torch.zeros_like(like)}

    def loss(self, params: Params, buffers: Buffers, data: TaskData, batch: Batch) -> tuple[Tensor, Buffers]:
        x = params["x"]
        # The tasks are float32; parameters of another dtype (float64 in gradient checks) decide the arithmetic.
        data = {name: t.to(x.dtype) for name, t in data.items()}
        residual = data["a"] @ (x - data["solution"]) - self.noise * batch["noise"].to(x.dtype)
        penalty = (data["penalty"] * (x.abs() - data["subgradient"] * x)).sum()
        return 0.5 * residual.square().sum() + penalty, buffers
