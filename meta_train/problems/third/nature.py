"""Physics by networks: a plate, an integral, forces; and circuits of qubits, control by feedback."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meta_train.problems.common import Begun, Draw, Parts, perceptron, problem


@problem(600)
def poisson_plate(draw: Draw) -> Begun:
    """Find how a plate bends under a load by a network that is zero at its edge, from the equation at random places."""
    model = perceptron(2, 32, 32, 1, activation=nn.Tanh)

    def loss() -> Tensor:
        place = draw.uniform(100, 2).requires_grad_()
        x, y = place.unbind(1)
        bent = x * (1 - x) * y * (1 - y) * model(place)[:, 0] * 10
        slope = torch.autograd.grad(bent.sum(), place, create_graph=True)[0]
        curves = [torch.autograd.grad(slope[:, i].sum(), place, create_graph=True)[0][:, i] for i in range(2)]
        load = 10 * (math.pi * x).sin() * (2 * math.pi * y).sin() + 5 * x
        return (curves[0] + curves[1] + load).square().mean()

    return Begun(model, loss)


@problem(800)
def deeponet_integral(draw: Draw) -> Begun:
    """Integrate random functions, seen at 32 places, by products of two networks (Lu et al. 2021)."""
    place = torch.linspace(0, 1, 32)
    waves = torch.stack([(math.pi * (k + 1) * place + k).cos() for k in range(5)])
    functions = draw.normal(300, 5) @ waves
    integrals = (functions.cumsum(1) - functions / 2 - functions[:, :1] / 2) / 31
    model = Parts(
        branch=perceptron(32, 48, 32, activation=nn.GELU),
        trunk=perceptron(1, 48, 48, 32, activation=nn.GELU),
        bias=torch.zeros(()),
    )

    def loss() -> Tensor:
        x, y = draw.batch(32, functions, integrals)
        made = model.branch(x) @ model.trunk(place[:, None]).T + model.bias
        return 100 * F.mse_loss(made, y)

    return Begun(model, loss)


@problem(400)
def force_matching(draw: Draw) -> Begun:
    """Learn energies and forces of five atoms, which Morse's potential gives, from distances (as SchNet does)."""
    bases = torch.linspace(0.5, 4, 16)
    model = Parts(
        pair=perceptron(16, 32, 16, activation=nn.Softplus), atom=perceptron(16, 32, 1, activation=nn.Softplus)
    )
    away = 1e3 * torch.eye(5)  # no atom is its own neighbour

    def distances(place: Tensor) -> Tensor:
        return ((place[:, :, None] - place[:, None]).square().sum(3) + torch.eye(5)).sqrt() + away

    def forces(energy: Tensor, place: Tensor) -> Tensor:
        return -torch.autograd.grad(energy.sum(), place, create_graph=True)[0]

    def loss() -> Tensor:
        grid = torch.tensor([[0.0, 0, 0], [1.3, 0, 0], [0, 1.3, 0], [0, 0, 1.3], [1.3, 1.3, 0]])
        place = (grid + 0.15 * draw.normal(8, 5, 3)).requires_grad_()
        distance = distances(place)
        true = ((1 - (1.2 - distance).exp()) ** 2 - 1).sum((1, 2)) / 2
        near = (-4 * (distance[..., None] - bases).square()).exp()
        code = (model.pair(near) * (distance < 100)[..., None]).sum(2)
        energy = model.atom(code).sum((1, 2))
        wanted = forces(true, place).detach()
        return F.mse_loss(forces(energy, place), wanted) + 0.1 * F.mse_loss(energy, true.detach())

    return Begun(model, loss)


@problem(200)
def qubits_ising(draw: Draw) -> Begun:
    """Find the ground state of a chain of six spins by turns of qubits and phases between neighbours (VQE)."""
    count, size = 6, 64
    bits = torch.stack([(torch.arange(size) >> (count - 1 - i)) & 1 for i in range(count)])
    spins = 1.0 - 2 * bits
    pairs = (spins * spins.roll(-1, 0)).sum(0)
    phases = 1.0 - 2 * ((bits * bits.roll(-1, 0)).sum(0) % 2)
    energy = torch.diag(-pairs)
    for i in range(count):
        energy[torch.arange(size), torch.arange(size) ^ (1 << i)] -= 0.8
    lowest = torch.linalg.eigvalsh(energy)[0]
    model = Parts(angles=0.1 * draw.normal(7, count))

    def loss() -> Tensor:
        state = torch.zeros(size).index_fill(0, torch.tensor(0), 1.0)
        for layer in model.angles:
            for i, angle in enumerate(layer):
                zero, one = state.view(2**i, 2, -1).unbind(1)
                cos, sin = (angle / 2).cos(), (angle / 2).sin()
                state = torch.stack([cos * zero - sin * one, sin * zero + cos * one], 1).flatten()
            state = state * phases
        return state @ energy @ state - lowest

    return Begun(model, loss)


@problem(150)
def feedback_gains(draw: Draw) -> Begun:
    """Hold a chain of three masses still, against noise, by what two motors do of all places and speeds."""
    links = torch.tensor([[-2.0, 1, 0], [1, -2, 1], [0, 1, -2]])
    step = 0.15
    change = torch.eye(6)
    change[:3, 3:] += step * torch.eye(3)
    change[3:, :3] += step * links
    motors = torch.zeros(2, 6)
    motors[0, 3], motors[1, 5] = step, step
    model = Parts(gains=torch.zeros(6, 2))

    def loss() -> Tensor:
        state, cost = 2 * draw.normal(16, 6), torch.zeros(())
        for _ in range(40):
            force = 3 * (state @ model.gains / 3).tanh()
            state = state @ change.T + force @ motors + 0.02 * draw.normal(16, 6)
            cost = cost + state.square().sum(1).mean() + 0.05 * force.square().sum(1).mean()
        return cost / 40

    return Begun(model, loss)
