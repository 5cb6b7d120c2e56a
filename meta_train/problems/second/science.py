"""Physics, cameras and control: an operator, an energy, a bundle of sights, pendulums swung up."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meta_train.problems.common import Begun, Draw, Parts, perceptron, problem


class SpectralLayer(nn.Module):
    """The lowest eight waves of each channel, mixed by complex weights, and the channels at each place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.waves = nn.Parameter(torch.rand(width, width, 8, 2) / width**2)
        self.places = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor like ``x [n, width, length]``."""
        low = torch.fft.rfft(x)[..., :8]
        mixed = torch.einsum("nik,iok->nok", low, torch.view_as_complex(self.waves))
        return F.gelu(torch.fft.irfft(mixed, x.shape[2]) + self.places(x))


@problem(400)
def fourier_operator(draw: Draw) -> Begun:
    """Predict how Burgers' equation ends from how it begins, by a Fourier neural operator; relative errors."""
    length, frequency = 64, 2 * math.pi * torch.arange(33)
    place = torch.linspace(0, 1, length + 1)[:-1]
    begin = draw.normal(200, 4) @ torch.cat([(2 * math.pi * k * place + k).sin()[None] / k for k in (1, 2, 3, 4)])
    end = begin
    for _ in range(200):  # the nonlinear part by steps of 0.001, that of the viscosity 0.02 as it is
        flux = torch.fft.rfft(end - 0.001 * torch.fft.irfft(1j * frequency * torch.fft.rfft(end**2 / 2)))
        end = torch.fft.irfft(flux * (-0.02 * frequency**2 * 0.001).exp())
    layers = [nn.Conv1d(2, 20, 1), SpectralLayer(20), SpectralLayer(20), nn.Conv1d(20, 1, 1)]
    model = nn.Sequential(*layers)

    def loss() -> Tensor:
        x, y = draw.batch(16, begin, end)
        made = model(torch.stack([x, place.expand(16, length)], 1))[:, 0]
        return ((made - y).norm(dim=1) / y.norm(dim=1)).mean()

    return Begun(model, loss)


@problem(500)
def hamiltonian_pendulums(draw: Draw) -> Begun:
    """Learn an energy whose slopes say how two coupled pendulums move (Greydanus et al. 2019)."""
    model = perceptron(4, 64, 64, 1, activation=nn.Tanh)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight)
    [*model.parameters()][-1].requires_grad_(False)  # the last bias has no slope

    def slopes(energy: Tensor, state: Tensor) -> Tensor:
        angles, momenta = torch.autograd.grad(energy.sum(), state, create_graph=True)[0].chunk(2, 1)
        return torch.cat([momenta, -angles], 1)

    def loss() -> Tensor:
        state = (draw.normal(96, 4) * 1.5).requires_grad_()
        angles, momenta = state.chunk(2, 1)
        energy = (momenta**2 / 2 - 3 * angles.cos()).sum(1) + (angles[:, 0] - angles[:, 1]) ** 2 / 2
        wanted = slopes(energy, state).detach() + 0.05 * draw.normal(96, 4)
        return F.mse_loss(slopes(model(state), state), wanted)

    return Begun(model, loss)


def _turned(points: Tensor, axes: Tensor) -> Tensor:
    """Points ``[k, 3]`` turned about each of ``axes [n, 3]``, whose lengths are the angles: ``[n, k, 3]``."""
    angle = (axes.square().sum(1) + 1e-12).sqrt()[:, None, None]
    axis = axes[:, None] / angle
    along = (points * axis).sum(2, keepdim=True) * axis
    return (
        points * angle.cos()
        + torch.linalg.cross(axis, points.expand(len(axes), -1, 3)) * angle.sin()
        + along * (1 - angle.cos())
    )


@problem(500)
def bundle_adjustment(draw: Draw) -> Begun:
    """Find six cameras, their focal length and 80 points from where they were seen, in pixels, with Huber's loss."""
    points, axes = draw.normal(80, 3), draw.normal(6, 3) * 0.5
    shifts = draw.normal(6, 3) * 0.3 + torch.tensor([0.0, 0.0, 8.0])

    def seen(points: Tensor, axes: Tensor, shifts: Tensor, focal: Tensor) -> Tensor:
        x = _turned(points, axes) + shifts[:, None]
        return 320 + focal * x[..., :2] / x[..., 2:].clamp(min=0.5)

    pixels = seen(points, axes, shifts, torch.tensor(600.0)) + draw.normal(6, 80, 2) / 2
    model = Parts(
        points=points + 0.3 * draw.normal(80, 3),
        axes=axes + 0.1 * draw.normal(6, 3),
        shifts=shifts + 0.3 * draw.normal(6, 3),
        log_focal=torch.tensor(6.2),
    )

    def loss() -> Tensor:
        found = seen(model.points, model.axes, model.shifts, model.log_focal.exp())
        return F.huber_loss(found, pixels, delta=2.0)

    return Begun(model, loss)


@problem(300)
def swing_up(draw: Draw) -> Begun:
    """Swing pendulums up by 50 torques for each of 16 beginnings, gradients through the simulation."""
    angles, speeds = 0.5 * draw.normal(16), 0.5 * draw.normal(16)
    model = Parts(torques=0.01 * draw.normal(50, 16))

    def loss() -> Tensor:
        angle, speed, cost = angles, speeds, torch.zeros(16)
        for torque in model.torques:
            speed = speed + 0.06 * (3 * torque - 6 * angle.sin() - 0.1 * speed)
            angle = angle + 0.06 * speed
            cost = cost + 1e-3 * torque.square()
        return (10 * (1 + angle.cos()) + speed.square() + cost).mean()

    return Begun(model, loss)
