"""Single pictures of scikit-image: cleaned, sharpened, taken apart into patches, or learned by heart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meta_train.problems.common import Begun, Draw, Parts, Sine, fit, perceptron, problem
from meta_train.problems.data import astronaut, camera


def _grey(side: int) -> Tensor:
    return astronaut(side).mean(-1)


def _places(side: int) -> Tensor:
    """Rows and columns in [-1, 1], ``[side * side, 2]``."""
    axis = torch.linspace(-1, 1, side)
    return torch.cartesian_prod(axis, axis)


def _convolution(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.SiLU())


@problem(500)
def unet(draw: Draw) -> Begun:
    """Remove noise from patches of a picture by a U-Net of two levels."""
    picture = _grey(128)
    model = Parts(
        wide=_convolution(1, 8),
        down=_convolution(8, 16),
        low=_convolution(16, 16),
        up=_convolution(24, 8),
        last=nn.Conv2d(8, 1, 1),
    )

    def loss() -> Tensor:
        clean = draw.patches(picture, 8, 16)[:, None]
        wide = model.wide(clean + 0.2 * draw.normal(*clean.shape))
        low = F.interpolate(model.low(model.down(F.max_pool2d(wide, 2))), scale_factor=2)
        return F.mse_loss(model.last(model.up(torch.cat([wide, low], 1))), clean)

    return Begun(model, loss)


@problem(1000)
def siren(draw: Draw) -> Begun:
    """Learn a picture by heart by a network of sines, begun as its paper has it."""
    model = perceptron(2, 48, 48, 48, 1, activation=Sine)
    hidden = [layer for layer in model if isinstance(layer, nn.Linear)][:-1]
    for layer in hidden:
        bound = 1 / 2 if layer is hidden[0] else (6 / 48) ** 0.5 / 30
        nn.init.uniform_(layer.weight, -bound, bound)
    return fit(model, draw, 512, _places(48), _grey(48).flatten()[:, None], F.mse_loss)


@problem(600)
def grid_nerf(draw: Draw) -> Begun:
    """Learn a picture in colour by heart by a grid of features, which begin near zero, and a small network."""
    colours, places = astronaut(64).view(-1, 3), _places(64)
    grid = draw.uniform(1, 8, 24, 24) * 2e-4 - 1e-4
    model = Parts(grid=grid, colour=nn.Sequential(*perceptron(8, 32, 3), nn.Sigmoid()))

    def loss() -> Tensor:
        x, y = draw.batch(512, places, colours)
        features = F.grid_sample(model.grid, x.flip(1)[None, None], align_corners=True)[0, :, 0].T
        return F.mse_loss(model.colour(features), y)

    return Begun(model, loss)


@problem(400)
def deconvolve_picture(draw: Draw) -> Begun:
    """Sharpen a blurred, noisy picture by its own pixels, with a penalty on their total variation."""
    sharp = _grey(64)[None, None]
    axis = torch.arange(-3, 4.0)
    kernel = torch.exp(-(axis[:, None] ** 2 + axis**2) / 4)
    kernel = (kernel / kernel.sum())[None, None]
    blurred = F.conv2d(sharp, kernel, padding=3) + 0.01 * draw.normal(*sharp.shape)
    model = Parts(pixels=blurred[0, 0].clone())

    def loss() -> Tensor:
        x = model.pixels[None, None]
        error = F.mse_loss(F.conv2d(x, kernel, padding=3), blurred)
        variation = (x[..., 1:] - x[..., :-1]).abs().mean() + (x[..., 1:, :] - x[..., :-1, :]).abs().mean()
        return error * 100 + 0.01 * variation

    return Begun(model, loss)


@problem(500)
def dictionary(draw: Draw) -> Begun:
    """Learn a dictionary of patches, and an encoder whose code is sparse."""
    picture = camera()
    model = Parts(atoms=draw.normal(64, 96) / 8, encoder=nn.Linear(64, 96))

    def loss() -> Tensor:
        x = draw.patches(picture, 64, 8).flatten(1)
        x = x - x.mean(1, keepdim=True)
        code = model.encoder(x).relu()
        return F.mse_loss(code @ model.atoms.T, x) * 100 + 0.05 * code.mean()

    return Begun(model, loss)
