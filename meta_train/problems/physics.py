"""Equations of physics, through solvers and by their residuals; control, and values of a decision process."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meta_train.problems.common import Begun, Draw, Parts, perceptron, problem


def _residual(model: nn.Module, places: Tensor) -> Tensor:
    """Of Burgers' equation at ``places [n, 2]``, time and space, with a viscosity of 0.05: its mean square."""
    places.requires_grad_()
    u = model(places)
    slopes = torch.autograd.grad(u.sum(), places, create_graph=True)[0]
    curvature = torch.autograd.grad(slopes[:, 1].sum(), places, create_graph=True)[0][:, 1]
    return (slopes[:, 0] + u[:, 0] * slopes[:, 1] - 0.05 * curvature).square().mean()


@problem(1000)
def pinn_burgers(draw: Draw) -> Begun:
    """Solve Burgers' equation by a network (Raissi et al. 2019), all places at once."""
    model = perceptron(2, 20, 20, 20, 1, activation=nn.Tanh)
    places = draw.uniform(400, 2) * torch.tensor([1.0, 2.0]) - torch.tensor([0.0, 1.0])
    first, time = draw.uniform(60, 1) * 2 - 1, draw.uniform(60, 1)
    start = torch.cat([0 * first, first], 1)
    edges = [torch.cat([time, torch.full_like(time, side)], 1) for side in (1.0, -1.0)]

    def loss() -> Tensor:
        inside = _residual(model, places.clone())
        begun = F.mse_loss(model(start), -torch.sin(math.pi * first))
        upper, lower = (model(edge).square().mean() for edge in edges)
        return inside + begun + upper + lower

    return Begun(model, loss)


def runge_kutta(slope: nn.Module, state: Tensor, step: float) -> Tensor:
    """Return ``state [n, 2]`` a step later by the classical method of fourth order, like it."""
    first = slope(state)
    second = slope(state + step / 2 * first)
    third = slope(state + step / 2 * second)
    fourth = slope(state + step * third)
    later: Tensor = state + step / 6 * (first + 2 * second + 2 * third + fourth)
    return later


@problem(400)
def neural_ode(draw: Draw) -> Begun:
    """Learn the equation of a damped spiral through ten steps of a solver."""
    time, step = torch.linspace(0, 6, 100), 6 / 99
    path = torch.stack([time.cos(), time.sin()], 1) * torch.exp(-0.2 * time)[:, None] * 2
    model = perceptron(2, 32, 2, activation=nn.Tanh)

    def loss() -> Tensor:
        begin = draw.integers(85, 24)
        state, total = path[begin], torch.zeros(())
        for later in range(1, 11):
            state = runge_kutta(model, state, step)
            total = total + (state - path[begin + later]).abs().mean()
        return total / 10

    return Begun(model, loss)


def hares_and_foxes(rates: Tensor, step: float = 0.05, steps: int = 120) -> Tensor:
    """Return a path ``[steps, 2]`` of Lotka's and Volterra's equations by the midpoint method.  rates: ``[4]``."""

    def slope(state: Tensor) -> Tensor:
        hares, foxes = state
        return torch.stack([rates[0] * hares - rates[1] * hares * foxes, rates[2] * hares * foxes - rates[3] * foxes])

    state, path = torch.ones(2), []
    for _ in range(steps):
        state = state + step * slope(state + step / 2 * slope(state))
        path.append(state)
    return torch.stack(path)


@problem(300)
def lotka_volterra(draw: Draw) -> Begun:
    """Find the four rates of hares and foxes from a path; the same for every seed."""
    seen = hares_and_foxes(torch.tensor([1.5, 1.0, 1.0, 3.0]))
    model = Parts(rates=torch.tensor([1.0, 0.8, 0.8, 2.0]))
    return Begun(model, lambda: F.mse_loss(hares_and_foxes(F.softplus(model.rates + 0.5)), seen))


@problem(800)
def behaviour_cloning(draw: Draw) -> Begun:
    """Imitate a linear controller of a pole on a cart, whose force is limited."""
    model = perceptron(4, 64, 64, 1, activation=nn.Tanh)
    gains, scales = torch.tensor([-1.0, -1.8, -25.0, -4.0]), torch.tensor([1.0, 1.0, 0.2, 0.5])

    def loss() -> Tensor:
        state = draw.normal(64, 4) * scales
        return F.mse_loss(model(state)[:, 0], (state @ gains).clamp(-10, 10))

    return Begun(model, loss)


@problem(800)
def q_learning(draw: Draw) -> Begun:
    """Fit noisy values of the actions in a decision process of 20 states."""
    chances = draw.uniform(20, 3, 20) ** 8
    chances /= chances.sum(2, keepdim=True)
    rewards, features, values = draw.normal(20, 3), draw.normal(20, 8), torch.zeros(20, 3)
    for _ in range(300):
        values = rewards + 0.9 * chances @ values.amax(1)
    model = perceptron(8, 48, 3)

    def loss() -> Tensor:
        state, action = draw.integers(20, 32), draw.integers(3, 32)
        target = values[state, action] + draw.normal(32) * 0.5
        return F.smooth_l1_loss(model(features[state]).gather(1, action[:, None])[:, 0], target)

    return Begun(model, loss)


@problem(600)
def policy_gradient_bandit(draw: Draw) -> Begun:
    """Earn the most by choosing one of five arms, whose rewards a context says, in expectation."""
    slopes = draw.normal(8, 5)
    model = perceptron(8, 32, 5, activation=nn.Tanh)

    def loss() -> Tensor:
        context = draw.normal(64, 8)
        chances, rewards = model(context).softmax(1), (context @ slopes).softmax(1)
        return -(chances * rewards).sum(1).mean()

    return Begun(model, loss)
