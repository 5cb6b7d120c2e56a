"""Classifiers of pictures: an old network, dense blocks, highways, capsules, one that straightens what it sees."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meta_train.problems.common import Begun, Draw, Parts, fit, problem
from meta_train.problems.data import digits, mnist


@problem(500)
def lenet_squared_error(draw: Draw) -> Begun:
    """Classify MNIST by LeNet with tanh and mean pooling, by squared distances to codes of ±1 (LeCun et al. 1998)."""
    images, labels = mnist()
    wide = [nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2)]
    flat = [nn.Flatten(), nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10)]
    codes = 2 * F.one_hot(labels, 10).float() - 1
    return fit(nn.Sequential(*wide, *flat), draw, 16, (images - 0.13) / 0.31, codes, F.mse_loss)


class Dense(nn.Module):
    """A convolution whose channels are put beside those it was given (Huang et al. 2017)."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.convolution = nn.Conv2d(inputs, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[n, inputs + growth, height, width]`` of ``x [n, inputs, ...]``."""
        return torch.cat([x, self.convolution(self.norm(x).relu())], 1)


@problem(300)
def dense_blocks_erased(draw: Draw) -> Begun:
    """Classify MNIST, a square of each image erased, by a DenseNet of two blocks."""
    images, labels = mnist()
    first = [nn.Conv2d(1, 12, 3, 2, 1, bias=False), *(Dense(12 + 8 * i, 8) for i in range(3))]
    between = [nn.BatchNorm2d(36), nn.ReLU(), nn.Conv2d(36, 18, 1, bias=False), nn.AvgPool2d(2)]
    second = [*(Dense(18 + 8 * i, 8) for i in range(3)), nn.BatchNorm2d(42), nn.ReLU()]
    model = nn.Sequential(*first, *between, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(42, 10))
    axis = torch.arange(28)

    def loss() -> Tensor:
        x, y = draw.batch(16, images, labels)
        corner = draw.integers(20, 2, 16, 1)
        row, column = (axis >= corner) & (axis < corner + 8)
        return F.cross_entropy(model(x * ~(row[:, :, None] & column[:, None])[:, None]), y)

    return Begun(model, loss)


class Highway(nn.Module):
    """A layer, and a gate that begins by letting most of the input through (Srivastava et al. 2015)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.made, self.gate = nn.Linear(width, width), nn.Linear(width, width)
        nn.init.constant_(self.gate.bias, -2.0)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor like ``x [n, width]``."""
        return torch.lerp(x, self.made(x).tanh(), self.gate(x).sigmoid())


@problem(600)
def highway_digits(draw: Draw) -> Begun:
    """Classify digits by ten highway layers, with dropout, in batches of twenty."""
    layers = [nn.Linear(64, 40), nn.Tanh(), *(Highway(40) for _ in range(10)), nn.Dropout(0.2), nn.Linear(40, 10)]
    return fit(nn.Sequential(*layers), draw, 20, *digits())


@problem(400)
def spatial_transformer(draw: Draw) -> Begun:
    """Classify digits that are turned, shrunk and shifted, which a network first puts straight (Jaderberg 2015)."""
    images, labels = mnist()
    straight = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    where = nn.Sequential(
        nn.AvgPool2d(2), nn.Conv2d(1, 8, 5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(200, 24), nn.ReLU()
    )
    place = nn.Linear(24, 6)
    nn.init.zeros_(place.weight)
    with torch.no_grad():
        place.bias.copy_(straight.flatten())
    what = [nn.Conv2d(1, 10, 5, 2), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(360, 40), nn.ReLU()]
    model = Parts(where=nn.Sequential(where, place), what=nn.Sequential(*what, nn.Dropout(0.1), nn.Linear(40, 10)))

    def moved(x: Tensor, matrix: Tensor) -> Tensor:
        return F.grid_sample(x, F.affine_grid(matrix, list(x.shape), align_corners=False), align_corners=False)

    def loss() -> Tensor:
        x, y = draw.batch(16, images, labels)
        angle, size = 1.2 * (draw.uniform(16) - 0.5), 1 + 0.5 * draw.uniform(16)
        cos, sin, (right, down) = size * angle.cos(), size * angle.sin(), 0.4 * (draw.uniform(2, 16) - 0.5)
        matrix = torch.stack([cos, -sin, right, sin, cos, down], 1).view(-1, 2, 3)
        seen = moved(x, matrix)
        return F.cross_entropy(model.what(moved(seen, model.where(seen).view(-1, 2, 3))), y)

    return Begun(model, loss)


def squash(x: Tensor) -> Tensor:
    """Return vectors in the last dimension in their direction, shorter than one."""
    square = x.square().sum(-1, keepdim=True)
    return x * square / ((1 + square) * (square + 1e-8).sqrt())


@problem(400)
def capsules_digits(draw: Draw) -> Begun:
    """Classify digits by how long ten vectors are, which others vote for in three rounds (Sabour et al. 2017)."""
    images, labels = digits()
    stem = nn.Sequential(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3, 2))
    model = Parts(stem=stem, votes=0.1 * draw.normal(16, 10, 8, 8))

    def loss() -> Tensor:
        x, y = draw.batch(32, images.view(-1, 1, 8, 8), labels)
        parts = squash(model.stem(x).view(32, 4, 8, 4).transpose(2, 3).reshape(32, 16, 8))
        votes = torch.einsum("npi,pkio->npko", parts, model.votes)
        agreed, wholes = torch.zeros(32, 16, 10, 1), torch.zeros(32, 1, 10, 8)
        for turn in range(3):
            wholes = squash((agreed.softmax(2) * votes).sum(1, keepdim=True))
            if turn < 2:
                agreed = agreed + (votes * wholes).sum(3, keepdim=True).detach()
        length = (wholes[:, 0].square().sum(2) + 1e-8).sqrt()
        there = F.one_hot(y, 10)
        missed, false = (0.9 - length).relu().square(), (length - 0.1).relu().square()
        return (there * missed + 0.5 * (1 - there) * false).sum(1).mean()

    return Begun(model, loss)
