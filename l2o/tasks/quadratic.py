"""Random quadratics (Andrychowicz et al. 2016, arXiv 1606.04474, section 3.1), with optional gradient noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from l2o.checks import check_float, check_int
from l2o.random import normal
from l2o.types import Batch, Buffers, Params, Split, TaskData, TaskFamily


@dataclass(frozen=True)
class Quadratic(TaskFamily):
    """``||W x - (y + noise ξ)||²``, summed over the dimensions; W, y and ξ have independent N(0, 1) entries.

    dim: of x and of y.
    noise: scale of ξ, which is fresh in each training batch; validation is noiseless.
    init_scale: standard deviation of the initial x; 0.01 as in the paper's code (whose W and y are uniform on [0, 1),
        against the paper's text, which is followed here).

    Data: ``w [lanes, dim, dim]``, ``y [lanes, dim]``. Parameters: ``x [lanes, dim]``. All float32.
    Raises `ConfigurationError` for a ``dim`` that is not a positive whole number, or a scale under 0.
    """

    dim: int = 10
    noise: float = 0.0
    init_scale: float = 0.01

    keyed = True

    def __post_init__(self) -> None:
        check_int("dim", self.dim)
        check_float("noise", self.noise, least=0.0)
        check_float("init_scale", self.init_scale, least=0.0)

    def sample(self, generator: torch.Generator, lanes: int) -> TaskData:
        return {"w": normal(generator, lanes, self.dim, self.dim), "y": normal(generator, lanes, self.dim)}

    def init(self, data: TaskData, generator: torch.Generator) -> tuple[Params, Buffers]:
        return {"x": self.init_scale * normal(generator, *data["y"].shape)}, {}

    def batch(self, data: TaskData, split: Split, generator: torch.Generator) -> Batch:
        """Draw ``noise [lanes, dim]``: ξ, or zeros for ``valid``."""
        return {"noise": normal(generator, *data["y"].shape) if split == "train" else torch.zeros_like(data["y"])}

    def loss(self, params: Params, buffers: Buffers, data: TaskData, batch: Batch) -> tuple[Tensor, Buffers]:
        x = params["x"]
        target = data["y"] + self.noise * batch["noise"]
        # The tasks are float32; parameters of another dtype (float64 in gradient checks) decide the arithmetic.
        return (data["w"].to(x.dtype) @ x - target.to(x.dtype)).square().sum(), buffers
