"""Functions and factors: a Gaussian process, radial bases, products of matrices, transport, weights that are made."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meta_train.problems.common import Begun, Draw, Parts, perceptron, problem
from meta_train.problems.data import digits


@problem(300)
def gp_hyperparameters(draw: Draw) -> Begun:
    """Fit the four hyperparameters of a Gaussian process by its likelihood, from far away."""
    x = draw.uniform(60, 1) * 6
    y = torch.sin(3 * x[:, 0]) + 0.2 * draw.normal(60)
    starts = {"length": 1.0, "log_size": 0.0, "log_noise": 0.0, "mean": 2.0}
    model = Parts(**{name: torch.tensor(start) for name, start in starts.items()})

    def loss() -> Tensor:
        distances = torch.cdist(x, x) ** 2 / F.softplus(model.length) ** 2
        noise = (model.log_noise.exp() + 1e-4) * torch.eye(60)
        factor = torch.linalg.cholesky(model.log_size.exp() * torch.exp(-0.5 * distances) + noise)
        rest = y - model.mean
        misfit = 0.5 * rest @ torch.cholesky_solve(rest[:, None], factor)[:, 0]
        return (misfit + factor.diagonal().log().sum()) / 60

    return Begun(model, loss)


@problem(500)
def rbf_network(draw: Draw) -> Begun:
    """Fit a function of the plane by 30 radial bases, their centres and widths, all points at once."""
    x = draw.uniform(200, 2) * 2 - 1
    y = torch.sin(4 * x[:, 0]) * torch.cos(5 * x[:, 1])
    model = Parts(centres=draw.uniform(30, 2) * 2 - 1, weights=torch.zeros(30), log_widths=torch.zeros(30))

    def loss() -> Tensor:
        bases = torch.exp(-(torch.cdist(x, model.centres) ** 2) * model.log_widths.exp())
        return F.mse_loss(bases @ model.weights, y)

    return Begun(model, loss)


@problem(500)
def deep_linear(draw: Draw) -> Begun:
    """Fit a random matrix by a product of six."""
    matrix = draw.normal(16, 16) / 4
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(6)))

    def loss() -> Tensor:
        x = draw.normal(64, 16)
        return F.mse_loss(model(x), x @ matrix)

    return Begun(model, loss)


@problem(500)
def bayes_by_backprop(draw: Draw) -> Begun:
    """Fit a small network whose weights are Gaussian (Blundell et al. 2015), all points at once."""
    x = torch.linspace(-1, 1, 200)[:, None]
    y = torch.sin(4 * x) + 0.1 * draw.normal(200, 1)
    starts = {"inner": draw.normal(1, 32), "outer": draw.normal(32, 1) / 6, "bias": draw.normal(32)}
    parts: dict[str, Tensor] = {}
    for name, mean in starts.items():
        parts |= {name: mean, f"{name}_width": torch.full_like(mean, -4.0)}
    model = Parts(**parts)

    def gaussian(name: str) -> tuple[Tensor, Tensor]:
        return getattr(model, name), F.softplus(getattr(model, f"{name}_width"))

    def sampled(name: str) -> Tensor:
        mean, deviation = gaussian(name)
        return mean + deviation * draw.normal(*mean.shape)

    def loss() -> Tensor:
        hidden = (x @ sampled("inner") + sampled("bias")).tanh()
        error = F.mse_loss(hidden @ sampled("outer"), y) / 2 / 0.01
        both = [gaussian(name) for name in starts]
        return error + sum((-width.log() + 0.5 * (width**2 + mean**2)).sum() for mean, width in both) / 200

    return Begun(model, loss)


@problem(600)
def hypernetwork(draw: Draw) -> Begun:
    """Fit waves by small networks whose weights another makes from a context."""
    width = 16
    model = perceptron(2, 32, 3 * width + 1)

    def loss() -> Tensor:
        context, x = draw.uniform(32, 2) * 2 - 1, draw.uniform(32, 20) * 2 - 1
        y = torch.sin(3 * context[:, :1] * x + 2 * context[:, 1:])
        inner, bias, outer, offset = model(context).split([width, width, width, 1], 1)
        hidden = (x[..., None] * inner[:, None] + bias[:, None]).tanh()
        return F.mse_loss((hidden * outer[:, None]).sum(2) + offset, y)

    return Begun(model, loss)


@problem(500)
def nmf(draw: Draw) -> Begun:
    """Factor digits into ten parts and their shares, none of them negative, all at once."""
    images, _ = digits()
    model = Parts(shares=draw.normal(len(images), 10) * 0.1 - 2, parts=draw.normal(10, 64) * 0.1 - 2)
    return Begun(model, lambda: F.mse_loss(F.softplus(model.shares) @ F.softplus(model.parts), images))


@problem(500)
def sinkhorn_align(draw: Draw) -> Begun:
    """Move a cloud of points onto a turned and shifted copy by entropic transport, all of them at once."""
    cloud = draw.normal(80, 3)
    turned = cloud @ torch.linalg.qr(draw.normal(3, 3))[0].T + 0.5
    model = Parts(matrix=torch.eye(3), shift=torch.zeros(3))

    def loss() -> Tensor:
        costs = torch.cdist(cloud @ model.matrix.T + model.shift, turned) ** 2
        row = torch.zeros(80)
        for _ in range(8):
            column = -0.3 * torch.logsumexp((row[:, None] - costs) / 0.3, 0)
            row = -0.3 * torch.logsumexp((column - costs) / 0.3, 1)
        plan = ((row[:, None] + column - costs) / 0.3).exp()
        return (plan * costs).sum() / 80

    return Begun(model, loss)
