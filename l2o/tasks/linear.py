"""Linear networks on ill-conditioned data: quadratics in a matrix, and products of matrices with their saddles."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from l2o.checks import check_float, check_int
from l2o.random import log_uniform, normal
from l2o.tasks.analytic import Ends, check_ends, log_uniform_spectrum
from l2o.tasks.ranges import check_range
from l2o.types import Batch, Buffers, Params, Split, TaskData, TaskFamily


@dataclass(frozen=True)
class LinearNetwork(TaskFamily):
    """``½ |W_depth … W_1 x - A x - noise|²``, the mean over a batch of ``x ~ N(0, diag(λ))``, in random directions.

    Of depth 1 a quadratic in a matrix, whose condition number is κ; deeper, with saddles beside, the largest of them at
    0 (Saxe et al. 2014, arXiv 1312.6120).

    inputs, outputs: of the network.     width, depth: of the hidden layers, and number of the matrices.
    conditions: range of κ, log-uniform, at least 1; λ is log-uniform from 1/κ to 1, with both ends.
    noise: standard deviation of the targets of training batches; validation has none.
    init_scale: of the initial matrices, in units of ``1/√fan-in``.
    batch_size: examples a batch.

    Data: ``target [lanes, outputs, inputs]``, A, with entries of variance 1/inputs, ``root [lanes, inputs]``, √λ.
    Parameters: ``{layer}.weight [lanes, out, in]``, layers counted from 0. Batches: ``x [lanes, batch, inputs]``,
    ``noise [lanes, batch, outputs]``. All float32. Raises `ConfigurationError` for a number out of its range.
    """

    inputs: int = 16
    outputs: int = 8
    width: int = 16
    depth: int = 1
    conditions: Ends = (1.0, 1e6)
    noise: float = 0.0
    init_scale: float = 1.0
    batch_size: int = 32

    keyed = True

    def __post_init__(self) -> None:
        for name in ("inputs", "outputs", "width", "depth", "batch_size"):
            check_int(name, getattr(self, name))
        check_ends(check_range, "conditions", self.conditions, least=1.0, most=math.inf)
        check_float("noise", self.noise, least=0.0)
        check_float("init_scale", self.init_scale, above=0.0)

    def sample(self, generator: torch.Generator, lanes: int) -> TaskData:
        low, high = self.conditions
        condition = log_uniform(generator, lanes, low=low, high=high)
        return {
            "root": log_uniform_spectrum(generator, condition, self.inputs).sqrt(),
            "target": normal(generator, lanes, self.outputs, self.inputs) * self.inputs**-0.5,
        }

    def init(self, data: TaskData, generator: torch.Generator) -> tuple[Params, Buffers]:
        sizes = [self.inputs, *[self.width] * (self.depth - 1), self.outputs]
        lanes = len(data["root"])
        return {
            f"{layer}.weight": self.init_scale * fan_in**-0.5 * normal(generator, lanes, fan_out, fan_in)
            for layer, (fan_in, fan_out) in enumerate(pairwise(sizes))
        }, {}

    def batch(self, data: TaskData, split: Split, generator: torch.Generator) -> Batch:
        """Draw ``x, noise [lanes, batch, ...]``, x along the axes: those of A and of the network are random."""
        lanes = len(data["root"])
        x = normal(generator, lanes, self.batch_size, self.inputs) * data["root"].unsqueeze(1)
        noise = normal(generator, lanes, self.batch_size, self.outputs)
        return {"x": x, "noise": noise if split == "train" else torch.zeros_like(noise)}

    def loss(self, params: Params, buffers: Buffers, data: TaskData, batch: Batch) -> tuple[Tensor, Buffers]:
        dtype = params["0.weight"].dtype
        x = batch["x"].to(dtype)
        error = -x @ data["target"].to(dtype).T - self.noise * batch["noise"].to(dtype)
        for layer in range(self.depth):
            x = x @ params[f"{layer}.weight"].T
        return 0.5 * (x + error).square().sum(-1).mean(), buffers
