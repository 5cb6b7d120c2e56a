"""Analytic landscapes: quadratics, ravines, saddles, plateaus and egg crates, of sampled size and conditioning."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from l2o.checks import check_float
from l2o.random import integers, log_uniform, normal, uniform
from l2o.tasks.ranges import check_log_range, check_range, check_whole_range
from l2o.types import Batch, Buffers, Params, Split, TaskData, TaskFamily

Ends = tuple[float, float]
"""(lowest, highest) of what is sampled for each lane."""


def check_ends(check: Any, name: str, value: Any, **bounds: float) -> None:
    """Do ``check`` of `l2o.tasks.ranges`, for a range that cannot be None."""
    check(name, () if value is None else value, **bounds)


def active_entries(generator: torch.Generator, lanes: int, dims: tuple[int, int]) -> Tensor:
    """Return float32 ``[lanes, dims[1]]``: 1 for the first n entries, 0 beyond; n uniform from ``dims[0]`` to
    ``dims[1]``."""
    low, high = dims
    size = low + integers(generator, high - low + 1, lanes, 1)
    return (torch.arange(high, device=size.device) < size).float()


def log_uniform_spectrum(generator: torch.Generator, condition: Tensor, dim: int) -> Tensor:
    """Return float32 ``[lanes, dim]``, log-uniform from 1/condition to 1; the first entry is 1, the second
    1/condition."""
    exponent = uniform(generator, len(condition), dim)
    exponent[:, 0], exponent[:, 1:2] = 0.0, 1.0
    return condition.unsqueeze(1) ** -exponent


def rotations(generator: torch.Generator, active: Tensor) -> Tensor:
    """Return float32 ``[lanes, dim, dim]``: a random rotation or reflection, uniform, of the active entries; 0
    beyond."""
    block = (active.unsqueeze(2) * active.unsqueeze(1)).bool()
    # In float64, since what is left of the rounding of a factorisation may depend on how many there are at once.
    drawn = normal(generator, *block.shape).double()
    q, r = torch.linalg.qr(torch.where(block, drawn, torch.eye(block.shape[1]).to(drawn)))
    # These signs make Q uniform (Mezzadri 2007, "How to generate random matrices from the classical compact groups").
    return torch.where(block, q * r.diagonal(dim1=1, dim2=2).sign().unsqueeze(1), 0.0).float()


@dataclass(frozen=True)
class Landscape(TaskFamily):
    """A function ``f(z)``, the subclass's, of ``z = R (x - c)``: R a random rotation and c ~ N(0, I) the origin of z.

    dims: range of the number n of dimensions, uniform. ``x`` always has ``dims[1]`` entries; those from n on have
        no gradient and no part in the loss.
    conditions: range of the condition number κ, log-uniform, at least 1. The spectrum λ has n entries, log-uniform
        between 1/κ and 1, with both ends among them where n > 1.
    noise: in training batches the origin of z jitters by ``noise · ξ``, ξ ~ N(0, I): for quadratics the noisy model of
        Zhang et al. 2019, arXiv 1907.04164. The loss stays that of a landscape. Validation is noiseless.

    The minimum of every landscape is 0, and the curvature there, or what corresponds to it, is at most of order 1.
    Data: ``rotation [lanes, dim, dim]``, ``origin``, ``active``, ``spectrum [lanes, dim]``, ``condition [lanes]``.
    Parameters: ``x [lanes, dim]``. Batches: ``noise [lanes, dim]``. All float32.
    Raises `ConfigurationError` for ranges that are none.
    """

    dims: tuple[int, int] = (2, 16)
    conditions: Ends = (1.0, 100.0)
    noise: float = 0.0

    keyed = True
    least_dim: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_ends(check_whole_range, "dims", self.dims, least=self.least_dim)
        check_ends(check_range, "conditions", self.conditions, least=1.0, most=math.inf)
        check_float("noise", self.noise, least=0.0)

    @abc.abstractmethod
    def value(self, z: Tensor, data: TaskData) -> Tensor:
        """Return ``f(z)`` of one lane, 0-d.  z: ``[dim]``, 0 where not active, up to noise.  data: in the dtype of
        z."""

    def start(self, data: TaskData, generator: torch.Generator) -> Tensor:
        """Return where runs start, as z, ``[lanes, dim]``."""
        return normal(generator, *data["origin"].shape)

    def sample(self, generator: torch.Generator, lanes: int) -> TaskData:
        active = active_entries(generator, lanes, self.dims)
        low, high = self.conditions
        condition = log_uniform(generator, lanes, low=low, high=high)
        return {
            "active": active,
            "condition": condition,
            "spectrum": active * log_uniform_spectrum(generator, condition, active.shape[1]),
            "rotation": rotations(generator, active),
            "origin": normal(generator, *active.shape),
        }

    def init(self, data: TaskData, generator: torch.Generator) -> tuple[Params, Buffers]:
        z = self.start(data, generator)
        return {"x": data["origin"] + torch.einsum("lij,li->lj", data["rotation"], z)}, {}

    def batch(self, data: TaskData, split: Split, generator: torch.Generator) -> Batch:
        """Draw ``noise [lanes, dim]``: ξ, or zeros for ``valid``."""
        like = data["origin"]
        return {"noise": normal(generator, *like.shape) if split == "train" else torch.zeros_like(like)}

    def loss(self, params: Params, buffers: Buffers, data: TaskData, batch: Batch) -> tuple[Tensor, Buffers]:
        x = params["x"]
        # The tasks are float32; parameters of another dtype (float64 in gradient checks) decide the arithmetic.
        data = {name: t.to(x.dtype) for name, t in data.items()}
        z = data["rotation"] @ (x - data["origin"]) - self.noise * batch["noise"].to(x.dtype)
        return self.value(z, data), buffers


@dataclass(frozen=True)
class ConvexQuadratic(Landscape):
    """``½ Σ λ z²``, with its minimum, 0, at z = 0; ill-conditioned where κ is large. Runs start at z ~ N(0, I).

    Everything else as in `Landscape`.
    """

    def value(self, z: Tensor, data: TaskData) -> Tensor:
        return 0.5 * (data["spectrum"] * z.square()).sum()


@dataclass(frozen=True)
class Rosenbrock(Landscape):
    """A curved ravine: ``Σ (u_{i+1} - u_i²)² + (1 - u_i)² / κ`` for u = z + 1, with its minimum, 0, at z = 0.

    κ times this is the chained function of Rosenbrock (1960, "An automatic method for finding the greatest or least
    value of a function") with κ in place of his 100. Runs start at u uniform on [-2, 2). dims: from 2 on.
    Everything else as in `Landscape`, but that the spectrum is not used.
    """

    conditions: Ends = (10.0, 1000.0)

    least_dim = 2

    def value(self, z: Tensor, data: TaskData) -> Tensor:
        u, after = z[:-1] + 1, z[1:] + 1
        return (data["active"][1:] * ((after - u.square()).square() + (1 - u).square() / data["condition"])).sum()

    def start(self, data: TaskData, generator: torch.Generator) -> Tensor:
        return uniform(generator, *data["origin"].shape, low=-3.0, high=1.0)


@dataclass(frozen=True)
class Saddle(Landscape):
    """``Σ λ ¼ (z² - 1)²`` over the directions in which z = 0 is a maximum, ``Σ λ ½ z²`` over the others.

    Directions are of either kind with equal chances, the one of the largest λ always of the first. The minimum is 0,
    where z is -1 or 1 in directions of the first kind and 0 in the others; the quartic walls bound the function.

    distances: range of the scale of z, log-uniform, at which runs start in directions of the first kind (near the
        saddle, where gradients are small and the curvature is negative); in the others z ~ N(0, 1).

    Data: also ``falling [lanes, dim]``, 1 for the first kind and 0 for the other. Everything else as in `Landscape`.
    """

    distances: Ends = (1e-3, 1e-1)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ends(check_log_range, "distances", self.distances)

    def value(self, z: Tensor, data: TaskData) -> Tensor:
        wells, bowl = 0.25 * (z.square() - 1).square(), 0.5 * z.square()
        return (data["spectrum"] * torch.where(data["falling"] > 0, wells, bowl)).sum()

    def sample(self, generator: torch.Generator, lanes: int) -> TaskData:
        data = super().sample(generator, lanes)
        falling = (uniform(generator, *data["active"].shape) < 0.5).float()
        falling[:, 0] = 1.0
        return data | {"falling": falling * data["active"]}

    def start(self, data: TaskData, generator: torch.Generator) -> Tensor:
        low, high = self.distances
        distance = log_uniform(generator, len(data["origin"]), 1, low=low, high=high)
        return super().start(data, generator) * torch.where(data["falling"] > 0, distance, 1.0)


@dataclass(frozen=True)
class Plateau(Landscape):
    """``q / (1 + q)`` for ``q = ½ Σ λ z²``, with its minimum, 0, at z = 0; far away it is flat and tends to 1.

    The function of Geman and McClure (1985), whose gradient fades as ``1 / |z|³``.
    radii: range of the scale of z, log-uniform, at which runs start. Everything else as in `Landscape`.
    """

    radii: Ends = (1.0, 10.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ends(check_log_range, "radii", self.radii)

    def value(self, z: Tensor, data: TaskData) -> Tensor:
        q = 0.5 * (data["spectrum"] * z.square()).sum()
        # Both are the same; the first keeps its digits near the minimum, the second those of the gradient far away.
        return torch.where(q < 1, q / (1 + q), 1 - 1 / (1 + q))

    def start(self, data: TaskData, generator: torch.Generator) -> Tensor:
        low, high = self.radii
        return super().start(data, generator) * log_uniform(generator, len(data["origin"]), 1, low=low, high=high)


@dataclass(frozen=True)
class Rastrigin(Landscape):
    """An egg crate: ``Σ λ (z² + α (1 - cos 2πz))``, with its minimum, 0, at z = 0 and local ones near whole numbers.

    For λ = 1 and α = 10 it is the function of Rastrigin (1974) as Mühlenbein et al. (1991, "The parallel genetic
    algorithm as function optimizer") extended it. Runs start at z uniform on [-5.12, 5.12), as usual for it.

    amplitudes: range of α, log-uniform; the largest curvature is ``2 + 4π² α``.
    Data: also ``amplitude [lanes]``. Everything else as in `Landscape`.
    """

    conditions: Ends = (1.0, 10.0)
    amplitudes: Ends = (0.1, 10.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ends(check_log_range, "amplitudes", self.amplitudes)

    def value(self, z: Tensor, data: TaskData) -> Tensor:
        # 1 - cos 2πz = 2 sin² πz, which keeps its digits near 0.
        crate = 2 * data["amplitude"] * (math.pi * z).sin().square()
        return (data["spectrum"] * (z.square() + crate)).sum()

    def sample(self, generator: torch.Generator, lanes: int) -> TaskData:
        low, high = self.amplitudes
        return super().sample(generator, lanes) | {"amplitude": log_uniform(generator, lanes, low=low, high=high)}

    def start(self, data: TaskData, generator: torch.Generator) -> Tensor:
        return uniform(generator, *data["origin"].shape, low=-5.12, high=5.12)
