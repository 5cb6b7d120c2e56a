"""Modules and data that the tests of `ModuleTask` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tables import generator
from torch import Tensor, nn
from torch.utils.data import Dataset

from l2o.tasks import ModuleTask
from l2o.types import TaskFamily

X, Y = torch.arange(40.0).reshape(20, 2), torch.arange(20)


class Rows(Dataset[Any]):
    """Map-style; the target is a Python number, the input random by ``noise``."""

    def __init__(self, noise: float = 0.0, draw: Callable[[], float] | None = None) -> None:
        self.noise, self.draw = noise, draw

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if i >= len(X):
            raise IndexError(i)
        return X[i] + self.noise * (self.draw() if self.draw else torch.randn(2)), int(Y[i])


class Named(Rows):
    def __getitem__(self, i: int) -> Any:
        return {"x": X[i], "y": int(Y[i])}


def to_pair(items: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    return torch.stack([item["x"] for item in items]), torch.tensor([item["y"] for item in items])


def task(train: Any = (X, Y), **options: Any) -> ModuleTask:
    given = {"module": nn.Linear(2, 20), "criterion": nn.CrossEntropyLoss(), "batch_size": 5} | options
    return ModuleTask(train=train, **given)


def one_batch(family: TaskFamily, split: Any = "train", seed: int = 0, lanes: int = 3) -> dict[str, Tensor]:
    g = generator(seed)
    return family.batch(family.sample(g, lanes), split, g)


class Forward(nn.Module):
    """A layer, and a forward of one's own: ``function(layer, x)``."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Any], layer: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.function = layer or nn.Linear(2, 20), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.layer, x)
