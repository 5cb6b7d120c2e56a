"""Training runs that ruin an unguarded learned optimizer: rates far too large, poisoned batches, foreign problems."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim import Optimizer

from l2o.checks import lookup
from l2o.tasks.data import image_split
from l2o.types import TaskFamily


class Problem(NamedTuple):
    """model: fresh.   inputs, targets: ``[n, ...]`` each.   loss: of outputs and targets, 0-d.   batch: its size."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    batch: int = 64


@dataclass(frozen=True)
class Hazard:
    """problem: by name.     steps: of a run.     lr: factor, of the learned rule alone.

    poison: what the inputs of one batch are multiplied with, a third through the run.     shuffled: whether labels are,
        half-way.
    """

    problem: str
    steps: int = 1000
    lr: float = 1.0
    poison: float = 1.0
    shuffled: bool = False


class Transformer(nn.Module):
    """A vision transformer of one block for 8×8 images ``[n, 64]``: 16 patches of 4 pixels, width 32, 4 heads."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(4, 32), nn.Parameter(0.02 * torch.randn(16, 32))
        self.block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[n, 10]`` of ``images [n, 64]``."""
        patches = images.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        logits: Tensor = self.head(self.block(self.embed(patches) + self.place).mean(1))
        return logits


class Recurrent(nn.Module):
    """A GRU over the eight rows of an image ``[n, 64]``."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(8, 32, batch_first=True), nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[n, 10]`` of ``images [n, 64]``."""
        logits: Tensor = self.head(self.gru(images.view(-1, 8, 8))[0][:, -1])
        return logits


def _digits(model: Callable[[], nn.Module]) -> Problem:
    images, labels = image_split("digits", "meta_test", "train", "cpu")
    return Problem(model(), images.reshape(len(images), -1), labels, cross_entropy)


def _perceptron(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _convolutions() -> nn.Module:
    shape = nn.Unflatten(1, (1, 8, 8))
    first, second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
    return nn.Sequential(
        shape, first, nn.BatchNorm2d(8), nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)
    )


def _table() -> Problem:
    """Diabetes (scikit-learn), all of it standardised."""
    from sklearn.datasets import load_diabetes

    x, y = (torch.tensor(each, dtype=torch.float32) for each in load_diabetes(return_X_y=True))
    x, y = (x - x.mean(0)) / x.std(0), ((y - y.mean()) / y.std())[:, None]
    return Problem(_perceptron(10, 64, 64, 1), x, y, mse_loss)


def _picture() -> Problem:
    """A picture of waves, from coordinates."""
    axis = torch.linspace(-1.0, 1.0, 32)
    x = torch.cartesian_prod(axis, axis)
    y = (torch.sin(9 * x[:, :1]) * torch.cos(7 * x[:, 1:])) * torch.exp(-x.square().sum(1, keepdim=True))
    return Problem(_perceptron(2, 64, 64, 64, 1), x, y, mse_loss)


def _autoencoder() -> Problem:
    problem = _digits(
        lambda: nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 8), nn.Tanh(), nn.Linear(8, 64))
    )
    return problem._replace(targets=problem.inputs, loss=mse_loss)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "perceptron": lambda: _digits(lambda: _perceptron(64, 64, 10)),
    "vision transformer": lambda: _digits(Transformer),
    "GRU": lambda: _digits(Recurrent),
    "convolutions": lambda: _digits(_convolutions),
    "table": _table,
    "picture": _picture,
    "autoencoder": _autoencoder,
}
CASES: dict[str, Hazard] = {
    "lr 100 times too large": Hazard("perceptron", lr=100.0),
    "batch with NaN": Hazard("perceptron", poison=math.nan),
    "batch times 10,000": Hazard("perceptron", poison=1e4),
    "labels shuffled half-way": Hazard("perceptron", shuffled=True),
    "table": Hazard("table", steps=2000),
    "vision transformer": Hazard("vision transformer", steps=600),
    "GRU": Hazard("GRU", steps=600),
    "convolutions": Hazard("convolutions"),
    "picture": Hazard("picture"),
    "autoencoder": Hazard("autoencoder"),
}
"""By what happens, or by a problem that is unlike those of meta-training."""


class Begun(NamedTuple):
    """params: of a fresh run.     loss: at a step, 0-d, on a batch of that step; to be called once for each in turn."""

    params: list[nn.Parameter]
    loss: Callable[[int], Tensor]


def begin(hazard: Hazard, seed: int) -> Begun:
    """Begin a run of ``hazard``, all of whose draws hang on ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        problem = lookup("problem", hazard.problem, PROBLEMS)()
    generator = torch.Generator().manual_seed(seed)
    other = problem.targets[torch.randperm(len(problem.targets), generator=generator)]

    def loss(step: int) -> Tensor:
        targets = other if hazard.shuffled and step >= hazard.steps // 2 else problem.targets
        rows = torch.randint(len(targets), (problem.batch,), generator=generator)
        factor = hazard.poison if step == hazard.steps // 3 else 1.0
        return problem.loss(problem.model(factor * problem.inputs[rows]), targets[rows])

    return Begun(list(problem.model.parameters()), loss)


def begin_family(family: TaskFamily, seed: int) -> Begun:
    """Begin a run on one task of ``family``, as plain torch trains it."""
    generator = torch.Generator().manual_seed(seed)
    data = family.sample(generator, 1)
    stacked, buffers = family.init(data, generator)
    params = {name: nn.Parameter(p[0].clone()) for name, p in stacked.items()}
    kept = {name: b[0] for name, b in buffers.items()}

    def loss(step: int) -> Tensor:
        batch = family.batch(data, "train", generator)
        value, new = family.loss(dict(params), kept, _first(data), _first(batch))
        kept.update({name: b.detach() for name, b in new.items()})
        return value

    return Begun(list(params.values()), loss)


def _first(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the only lane."""
    return {name: t[0] for name, t in tensors.items()}


def train(begun: Begun, steps: int, optimizer: Optimizer, tell: bool) -> list[float]:
    """Return the loss of every step.  tell: whether a plug-in gets it."""
    losses, step_with = [], cast("Callable[..., Any]", optimizer.step)
    for step in range(steps):
        optimizer.zero_grad()
        loss = begun.loss(step)
        loss.backward()
        step_with(loss=loss) if tell else step_with()
        losses.append(loss.item())
    return losses
