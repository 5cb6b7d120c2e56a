"""What the problems are made of: their registry, random draws, and pieces of models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Made = TypeVar("Made")
Criterion = Callable[[Tensor, Tensor], Tensor]


class Begun(NamedTuple):
    """model: fresh, whose parameters that require gradients are to be trained.

    loss: 0-d, of the next batch; draws from the run's generator, and for dropout from torch's.
    """

    model: nn.Module
    loss: Callable[[], Tensor]


class Draw:
    """The random numbers of a run, but for initial weights and dropout of `torch.nn`, which are torch's own."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Draw float32 of ``shape`` from the standard normal distribution."""
        return torch.randn(shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        """Draw float32 of ``shape`` in [0, 1)."""
        return torch.rand(shape, generator=self.generator)

    def integers(self, high: int, *shape: int, low: int = 0) -> Tensor:
        """Draw int64 of ``shape`` from ``low`` up to, but without, ``high``."""
        return torch.randint(low, high, shape, generator=self.generator)

    def batch(self, size: int, *tensors: Tensor) -> list[Tensor]:
        """Draw ``size`` rows with replacement, the same ones of each of ``tensors [n, ...]``."""
        rows = self.integers(len(tensors[0]), size)
        return [each[rows] for each in tensors]

    def spans(self, length: int, count: int, width: int) -> Tensor:
        """Draw where to read ``count`` stretches of a text of this length: int64 ``[count, width]``."""
        return self.integers(length - width, count)[:, None] + torch.arange(width)

    def patches(self, picture: Tensor, count: int, side: int) -> Tensor:
        """Draw squares of a square ``picture [n, n]``: ``[count, side, side]``."""
        corners = self.integers(len(picture) - side, count, 2).tolist()
        return torch.stack([picture[top : top + side, left : left + side] for top, left in corners])


@dataclass(frozen=True)
class Problem:
    """steps: of a run.     make: begins one; initial weights come from torch's own generator."""

    steps: int
    make: Callable[[Draw], Begun]

    def begin(self, seed: int) -> Begun:
        """Begin a run, all of whose draws hang on ``seed``, torch's own generator included; one run at a time."""
        torch.manual_seed(seed)
        return self.make(Draw(seed))


PROBLEMS: dict[str, Problem] = {}
"""By the names of the functions that make them."""


def problem(steps: int) -> Callable[[Callable[[Draw], Begun]], Callable[[Draw], Begun]]:
    """Enter the function into ``PROBLEMS``, with runs of so many steps."""

    def enter(make: Callable[[Draw], Begun]) -> Callable[[Draw], Begun]:
        PROBLEMS[make.__name__] = Problem(steps, make)
        return make

    return enter


class Parts(nn.Module):
    """Modules and parameters by name; tensors become parameters. The loss of a problem says how they go together."""

    def __init__(self, **parts: nn.Module | Tensor) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


class Residual(nn.Sequential):
    """What the modules give is added to what they were given."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` and what the modules make of it, added up; like ``x``."""
        return x + super().forward(x)


class Sine(nn.Module):
    """The sine of thirty times its input (Sitzmann et al. 2020, arXiv 2006.09661)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor like ``x``."""
        return (30 * x).sin()


def perceptron(*sizes: int, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Return linear layers with activations between them.  sizes: of the input, hidden layers and the output."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), activation()]
    return nn.Sequential(*layers[:-1])


def fit(
    model: nn.Module, draw: Draw, batch: int, inputs: Tensor, targets: Tensor, criterion: Criterion = F.cross_entropy
) -> Begun:
    """Begin a run on batches of ``inputs [n, ...]`` and ``targets [n, ...]``.  criterion: of outputs and targets."""

    def loss() -> Tensor:
        x, y = draw.batch(batch, inputs, targets)
        return criterion(model(x), y)

    return Begun(model, loss)


def fixed(seed: int, make: Callable[[], Made]) -> Made:
    """Return what ``make`` makes with torch's generator at ``seed``, the same in every run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()
