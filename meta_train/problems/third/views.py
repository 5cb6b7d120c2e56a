"""Pictures without labels: turned, distorted, grey, moving, pixel by pixel; and few of a kind."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meta_train.problems.common import Begun, Draw, Parts, problem
from meta_train.problems.data import digits, mnist
from meta_train.problems.second.data import coloured, faces


@problem(300)
def rotation_pretext(draw: Draw) -> Begun:
    """Tell by how many quarters faces were turned, by convolutions with group norm."""
    images = faces()[0][:100]
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, 2, bias=False), nn.GroupNorm(4, outputs), nn.SiLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 4))

    def loss() -> Tensor:
        (x,) = draw.batch(8, images)
        turned = torch.cat([x.rot90(k, (2, 3)) for k in range(4)])
        return F.cross_entropy(model(turned), torch.arange(4).repeat_interleave(8))

    return Begun(model, loss)


@problem(500)
def barlow_twins(draw: Draw) -> Begun:
    """Make two distortions of a digit alike, and features independent, by their correlations (Zbontar et al. 2021)."""
    images, _ = digits()
    trunk = [nn.Linear(64, 96), nn.BatchNorm1d(96), nn.ReLU(), nn.Linear(96, 64), nn.BatchNorm1d(64), nn.ReLU()]
    model = nn.Sequential(*trunk, nn.Linear(64, 32))

    def loss() -> Tensor:
        (x,) = draw.batch(128, images)
        codes = []
        for _ in range(2):
            view = (x + 0.15 * draw.normal(128, 64)) * (draw.uniform(128, 64) > 0.15)
            code = model(view)
            codes.append((code - code.mean(0)) / (code.std(0) + 1e-5))
        correlations = codes[0].T @ codes[1] / 128
        squares = (correlations - torch.eye(32)).square()
        return squares.diagonal().sum() + 0.02 * (squares.sum() - squares.diagonal().sum())

    return Begun(model, loss)


@problem(300)
def prototypes_episodes(draw: Draw) -> Begun:
    """Tell five kinds of digits by three of each, whose means are the nearer the likelier (Snell et al. 2017)."""
    images, labels = mnist()
    kinds = [images[labels == k] for k in range(10)]
    layers: list[nn.Module] = []
    for inputs in (1, 16, 16):
        layers += [nn.Conv2d(inputs, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(nn.AvgPool2d(2), *layers, nn.Flatten())

    def loss() -> Tensor:
        chosen = torch.randperm(10, generator=draw.generator)[:5].tolist()
        codes = model(torch.cat([draw.batch(8, kinds[k])[0] for k in chosen])).view(5, 8, -1)
        means, asked = codes[:, :3].mean(1), codes[:, 3:].flatten(0, 1)
        distances = (asked[:, None] - means).square().sum(2)
        return F.cross_entropy(-distances, torch.arange(5).repeat_interleave(5))

    return Begun(model, loss)


@problem(400)
def colourise_tissue(draw: Draw) -> Begun:
    """Predict the colours of stained tissue from its greys by convolutions, without normalisation."""
    picture = coloured("immunohistochemistry", 128)
    layers: list[nn.Module] = []
    for inputs, dilation in ((1, 1), (24, 2), (24, 4)):
        layers += [nn.Conv2d(inputs, 24, 3, padding=dilation, dilation=dilation), nn.LeakyReLU(0.2)]
    model = nn.Sequential(*layers, nn.Conv2d(24, 3, 1))

    def loss() -> Tensor:
        x = draw.patches(picture, 6, 20).permute(0, 3, 1, 2)
        return F.smooth_l1_loss(model(x.mean(1, keepdim=True)), x, beta=0.1)

    return Begun(model, loss)


@problem(300)
def next_frame_convlstm(draw: Draw) -> Begun:
    """Predict the next picture of a square that bounces off the walls, by a convolutional LSTM (Shi et al. 2015)."""
    model = Parts(gates=nn.Conv2d(17, 64, 3, padding=1), frame=nn.Conv2d(16, 1, 1))
    axis = torch.arange(12)

    def loss() -> Tensor:
        begin, speed = draw.integers(18, 8, 2), draw.integers(2, 8, 2) * 2 - 1
        place = (begin[:, None] + speed[:, None] * torch.arange(9)[:, None]) % 18
        place = torch.minimum(place, 18 - place)  # unfolded, there is no wall
        across = (axis >= place[..., None]) & (axis < place[..., None] + 3)
        frames = (across[:, :, 0, :, None] & across[:, :, 1, None]).float()
        hidden, cell, total = torch.zeros(8, 16, 12, 12), torch.zeros(8, 16, 12, 12), torch.zeros(())
        for step in range(8):
            into, keep, out, new = model.gates(torch.cat([frames[:, step, None], hidden], 1)).chunk(4, 1)
            cell = (keep + 1).sigmoid() * cell + into.sigmoid() * new.tanh()
            hidden = out.sigmoid() * cell.tanh()
            if step > 0:  # one picture does not say which way it moves
                total = total + F.binary_cross_entropy_with_logits(model.frame(hidden)[:, 0], frames[:, step + 1])
        return total / 7

    return Begun(model, loss)


class Later(nn.Conv2d):
    """A convolution that sees pixels above and to the left, and its own where it may."""

    mask: Tensor

    def __init__(self, inputs: int, outputs: int, side: int, itself: bool) -> None:
        super().__init__(inputs, outputs, side, padding=side // 2)
        mask = torch.arange(side * side).view(side, side) < side * side // 2 + int(itself)
        self.register_buffer("mask", mask.float())

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[n, outputs, height, width]`` of ``x [n, inputs, ...]``."""
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=self.padding)


@problem(400)
def pixelcnn_digits(draw: Draw) -> Begun:
    """Predict each of four shades of the pixels of digits from those before it, by masked convolutions."""
    shades = (digits()[0] * 3.99).long().view(-1, 8, 8)
    layers = [Later(4, 32, 5, False), nn.ReLU(), Later(32, 32, 3, True), nn.ReLU(), Later(32, 32, 3, True), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv2d(32, 4, 1))

    def loss() -> Tensor:
        (x,) = draw.batch(16, shades)
        return F.cross_entropy(model(F.one_hot(x, 4).permute(0, 3, 1, 2).float()), x)

    return Begun(model, loss)


@problem(500)
def implicit_layer_digits(draw: Draw) -> Begun:
    """Classify digits by where a layer that is applied to itself comes to rest, with the gradient of the last step."""
    images, labels = digits()
    model = Parts(
        read=nn.Linear(64, 48), again=nn.Linear(48, 48, bias=False), norm=nn.LayerNorm(48), head=nn.Linear(48, 10)
    )

    def loss() -> Tensor:
        x, y = draw.batch(48, images, labels)
        seen, rest = model.read(x), torch.zeros(48, 48)
        with torch.no_grad():
            for _ in range(8):
                rest = model.norm((model.again(rest) + seen).relu())
        return F.cross_entropy(model.head(model.norm((model.again(rest) + seen).relu())), y)

    return Begun(model, loss)
