"""Lanes that share their problem: for grids of learning rates and for antithetic pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from l2o.checks import check_int
from l2o.family_checks import checked_batch, checked_init, checked_sample
from l2o.types import (
    Batch,
    Buffers,
    ConfigurationError,
    Grads,
    Kind,
    Params,
    Split,
    TaskData,
    TaskFamily,
)


@dataclass(frozen=True)
class Repeated(TaskFamily):
    """``family`` with each task, initialisation and batch in ``copies`` adjacent lanes.

    Lanes 0 to ``copies - 1`` are one problem, the next ``copies`` another, and so on; the number of lanes must be a
    multiple of ``copies``, or `ConfigurationError` is raised.
    """

    family: TaskFamily
    copies: int

    def __post_init__(self) -> None:
        check_int("copies", self.copies)

    @property
    def keyed(self) -> bool:
        return self.family.keyed

    @property
    def kinds(self) -> Mapping[str, Kind]:
        return self.family.kinds

    def sample(self, generator: torch.Generator, lanes: int) -> TaskData:
        if lanes % self.copies:
            raise ConfigurationError(f"lanes={lanes}: expected a multiple of copies={self.copies}")
        return self._repeat(checked_sample(self.family, generator, lanes // self.copies))

    def init(self, data: TaskData, generator: torch.Generator) -> tuple[Params, Buffers]:
        params, buffers = checked_init(self.family, self.once(data), generator)
        return self._repeat(params), self._repeat(buffers)

    def batch(self, data: TaskData, split: Split, generator: torch.Generator) -> Batch:
        return self._repeat(checked_batch(self.family, self.once(data), split, generator))

    def loss(self, params: Params, buffers: Buffers, data: TaskData, batch: Batch) -> tuple[Tensor, Buffers]:
        return self.family.loss(params, buffers, data, batch)

    def transform_gradients(
        self, grads: Grads, buffers: Buffers, data: TaskData, batch: Batch
    ) -> tuple[Grads, Buffers]:
        return self.family.transform_gradients(grads, buffers, data, batch)

    def _repeat(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: t.repeat_interleave(self.copies, dim=0) for name, t in tensors.items()}

    def once(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the first lane of each problem, ``[lanes / copies, ...]`` of ``[lanes, ...]``."""
        return {name: t[:: self.copies] for name, t in tensors.items()}
