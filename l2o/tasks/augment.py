"""Augmentations: any family with its parameters rescaled, or with gradients that are noisy, rounded or late.

They nest, and apply to gradients from the inside out. `Repeated` goes outermost: its lanes share what these draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from l2o.checks import check_int, lookup
from l2o.random import hashed_normal, keys, log_uniform, stream
from l2o.tasks.ranges import check_log_range
from l2o.types import Batch, Buffers, ConfigurationError, Grads, Kind, Params, Split, TaskData, TaskFamily

Gradient = Callable[[Params, Buffers, TaskData, Batch], tuple[Tensor, Buffers, Grads] | None]

_INNER = "inner."
"""Begins the names of the family's own tensors, so that augmentations nest and a family sees no foreign ones."""


def _beside(own: dict[str, Tensor], inner: dict[str, Tensor]) -> dict[str, Tensor]:
    return own | {_INNER + name: t for name, t in inner.items()}


def _own(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in tensors.items() if not name.startswith(_INNER)}


def _inner(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(_INNER): t for name, t in tensors.items() if name.startswith(_INNER)}


def _along(factor: Tensor, like: Tensor) -> Tensor:
    """``factor [lanes]`` with as many axes as ``like``."""
    return factor.view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class Augmented(TaskFamily):
    """``family`` as it is, with tensors beside its own for subclasses to use.

    Raises `ConfigurationError` for a ``family`` that is none.
    """

    family: TaskFamily

    def __post_init__(self) -> None:
        if not isinstance(self.family, TaskFamily):
            raise ConfigurationError(f"family={self.family!r}: expected a TaskFamily")

    @property
    def keyed(self) -> bool:
        return self.family.keyed

    @property
    def kinds(self) -> Mapping[str, Kind]:
        return self.family.kinds

    def own_data(self, generator: torch.Generator, lanes: int) -> TaskData:
        """Return what the subclass samples for each lane."""
        return {}

    def own_buffers(self, params: Params, generator: torch.Generator) -> Buffers:
        """Return what the subclass carries along.  params: the family's, ``[lanes, ...]``."""
        return {}

    def own_batch(self, data: TaskData, split: Split, generator: torch.Generator) -> Batch:
        """Draw what the subclass draws for each batch."""
        return {}

    def sample(self, generator: torch.Generator, lanes: int) -> TaskData:
        return _beside(self.own_data(generator, lanes), self.family.sample(generator, lanes))

    def init(self, data: TaskData, generator: torch.Generator) -> tuple[Params, Buffers]:
        params, buffers = self.family.init(_inner(data), generator)
        return params, _beside(self.own_buffers(params, generator), buffers)

    def batch(self, data: TaskData, split: Split, generator: torch.Generator) -> Batch:
        own = self.own_batch(data, split, generator)
        return _beside(own, self.family.batch(_inner(data), split, generator))

    def loss(self, params: Params, buffers: Buffers, data: TaskData, batch: Batch) -> tuple[Tensor, Buffers]:
        loss, inner = self.family.loss(params, _inner(buffers), _inner(data), _inner(batch))
        return loss, _beside(_own(buffers), inner)

    def gradient_through(
        self, gradient: Gradient, params: Params, buffers: Buffers, data: TaskData, batch: Batch
    ) -> tuple[Tensor, Buffers, Grads] | None:
        """Return losses ``[lanes]``, new buffers and gradients of all lanes, by a function that gives those of the
        family, or None."""
        result = gradient(params, _inner(buffers), _inner(data), _inner(batch))
        return result and (result[0], _beside(_own(buffers), result[1]), result[2])

    def transform_gradients(
        self, grads: Grads, buffers: Buffers, data: TaskData, batch: Batch
    ) -> tuple[Grads, Buffers]:
        grads, inner = self.family.transform_gradients(grads, _inner(buffers), _inner(data), _inner(batch))
        return grads, _beside(_own(buffers), inner)


@dataclass(frozen=True)
class Reparametrized(Augmented):
    """``family`` with parameters ``w = θ / s``: the optimizer sees w, whose gradient is s times that of θ.

    Random scaling of Lv et al. 2017, arXiv 1703.03633, there by ``parameter``; and the task augmentation of Celo
    (Moudgil et al. 2025, arXiv 2501.12670).

    low, high: range of the factors s, log-uniform.
    per: what has a factor of its own: each ``task``, each ``tensor`` of a task, or each ``parameter``, entry by entry.

    Buffers: also ``scale.<tensor>``, s, with as many axes as the tensor has.
    Raises `UnknownNameError` for an unknown ``per``, `ConfigurationError` for a range that is none.
    """

    low: float = 1e-3
    high: float = 1e3
    per: Literal["task", "tensor", "parameter"] = "task"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_log_range("[low, high]", (self.low, self.high))
        lookup("per", self.per, dict.fromkeys(("task", "tensor", "parameter")))

    def own_buffers(self, params: Params, generator: torch.Generator) -> Buffers:
        if self.per == "task":
            shared = self._draw(generator, len(next(iter(params.values()))))
            return {f"scale.{name}": _along(shared, p) for name, p in params.items()}
        # One number a tensor has as many axes as the tensor, each of length 1.
        shapes = {k: p.shape if self.per == "parameter" else (len(p), *[1] * (p.ndim - 1)) for k, p in params.items()}
        return {f"scale.{k}": self._draw(generator, *shape) for k, shape in shapes.items()}

    def _draw(self, generator: torch.Generator, *shape: int) -> Tensor:
        return log_uniform(generator, *shape, low=self.low, high=self.high)

    def init(self, data: TaskData, generator: torch.Generator) -> tuple[Params, Buffers]:
        params, buffers = super().init(data, generator)
        return _divided(params, buffers), buffers

    def loss(self, params: Params, buffers: Buffers, data: TaskData, batch: Batch) -> tuple[Tensor, Buffers]:
        return super().loss(_multiplied(params, buffers), buffers, data, batch)

    def gradient_through(
        self, gradient: Gradient, params: Params, buffers: Buffers, data: TaskData, batch: Batch
    ) -> tuple[Tensor, Buffers, Grads] | None:
        result = super().gradient_through(gradient, _multiplied(params, buffers), buffers, data, batch)
        return result and (result[0], result[1], _multiplied(result[2], buffers))

    def transform_gradients(
        self, grads: Grads, buffers: Buffers, data: TaskData, batch: Batch
    ) -> tuple[Grads, Buffers]:
        # What is inside works on gradients of θ.
        inner, after = super().transform_gradients(_divided(grads, buffers), buffers, data, batch)
        return _multiplied(inner, buffers), after


def _multiplied(tensors: dict[str, Tensor], buffers: Buffers) -> dict[str, Tensor]:
    return {name: t * buffers[f"scale.{name}"].to(t.dtype) for name, t in tensors.items()}


def _divided(tensors: dict[str, Tensor], buffers: Buffers) -> dict[str, Tensor]:
    return {name: t / buffers[f"scale.{name}"].to(t.dtype) for name, t in tensors.items()}


@dataclass(frozen=True)
class GradientNoise(Augmented):
    """``family`` with N(0, σ²) noise on each entry of the gradients that the optimizer sees, afresh in each batch.

    low, high: range of σ, log-uniform, one for each task.
    relative: whether σ is measured in the root mean square of each tensor's gradient, or else as it stands.

    Data: also ``sigma [lanes]``. Training batches: also ``key``, int64 ``[lanes]``, from which the noise is hashed.
    Raises `ConfigurationError` for a range that is none.
    """

    low: float = 1e-2
    high: float = 1.0
    relative: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_log_range("[low, high]", (self.low, self.high))

    def own_data(self, generator: torch.Generator, lanes: int) -> TaskData:
        return {"sigma": log_uniform(generator, lanes, low=self.low, high=self.high)}

    def own_batch(self, data: TaskData, split: Split, generator: torch.Generator) -> Batch:
        return {"key": keys(generator, len(data["sigma"]))} if split == "train" else {}

    def transform_gradients(
        self, grads: Grads, buffers: Buffers, data: TaskData, batch: Batch
    ) -> tuple[Grads, Buffers]:
        grads, buffers = super().transform_gradients(grads, buffers, data, batch)
        if "key" not in batch:
            return grads, buffers
        noisy = {
            name: g + self._scale(g, data["sigma"]) * hashed_normal(stream(batch["key"], i), *g.shape[1:]).to(g.dtype)
            for i, (name, g) in enumerate(grads.items())
        }
        return noisy, buffers

    def _scale(self, grad: Tensor, sigma: Tensor) -> Tensor:
        """``[lanes, 1, ...]``: σ in the unit of the gradient."""
        sigma = sigma.to(grad.dtype)
        if self.relative:
            rows = grad.reshape(len(grad), -1)
            # Not the root of a mean square, whose derivative at 0 is not finite.
            sigma = sigma * torch.linalg.vector_norm(rows, dim=1) / math.sqrt(rows.shape[1])
        return _along(sigma, grad)


@dataclass(frozen=True)
class Bfloat16Gradients(Augmented):
    """``family`` with gradients that the optimizer sees rounded to bfloat16; their dtype stays.

    Meta-gradients take the rounding for the identity (straight through: Bengio et al. 2013, arXiv 1308.3432).
    """

    def transform_gradients(
        self, grads: Grads, buffers: Buffers, data: TaskData, batch: Batch
    ) -> tuple[Grads, Buffers]:
        grads, buffers = super().transform_gradients(grads, buffers, data, batch)
        return {name: g + (g.bfloat16().to(g.dtype) - g).detach() for name, g in grads.items()}, buffers


@dataclass(frozen=True)
class DelayedGradients(Augmented):
    """``family`` with gradients that reach the optimizer ``delay`` steps late, as of asynchronous workers.

    They are those of the parameters, and of the batch, of ``delay`` steps ago; before that, of the first step.

    Buffers: also ``<age>.<tensor>``, the gradients of the last ``delay`` steps, the newest of age 0; and
    ``empty``, bool ``[lanes]``, until the first gradient has come.
    Raises `ConfigurationError` for a ``delay`` that is not a positive whole number.
    """

    delay: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("delay", self.delay)

    def own_buffers(self, params: Params, generator: torch.Generator) -> Buffers:
        lanes = len(next(iter(params.values())))
        empty = torch.ones(lanes, dtype=torch.bool, device=generator.device)
        waiting = {f"{age}.{name}": torch.zeros_like(p) for age in range(self.delay) for name, p in params.items()}
        return {"empty": empty, **waiting}

    def transform_gradients(
        self, grads: Grads, buffers: Buffers, data: TaskData, batch: Batch
    ) -> tuple[Grads, Buffers]:
        grads, buffers = super().transform_gradients(grads, buffers, data, batch)
        empty = buffers["empty"]
        waiting = [
            {name: torch.where(_along(empty, g), g, buffers[f"{age}.{name}"]) for name, g in grads.items()}
            for age in range(self.delay)
        ]
        *kept, arrived = [grads, *waiting]
        after = {f"{age}.{name}": g for age, each in enumerate(kept) for name, g in each.items()}
        return arrived, buffers | after | {"empty": torch.zeros_like(empty)}
