"""Tables: rentals by the hour, spreads as well as means, a deep network that normalises itself, purchases, a kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meta_train.problems.common import Begun, Draw, Parts, fit, perceptron, problem
from meta_train.problems.data import diabetes, digits, single, standardised, table


@problem(300)
def rentals_deep_cross(draw: Draw) -> Begun:
    """Predict logarithms of rentals from hour, weekday, weather and four numbers, by crosses of them (DCN)."""
    count = 3000
    hour, day, weather = (draw.integers(kinds, count) for kinds in (24, 7, 4))
    numbers = draw.uniform(count, 4)
    rush = torch.exp(-(((hour - 8) / 2) ** 2)) + torch.exp(-(((hour - 17) / 2) ** 2))
    at_noon = torch.exp(-(((hour - 13) / 4) ** 2))
    rate = 2 + torch.where(day < 5, 2 * rush, 1.5 * at_noon) + (2 - 0.6 * weather) * numbers[:, 0] - numbers[:, 1] ** 2
    rented = torch.poisson((rate + 0.1 * draw.normal(count)).exp(), generator=draw.generator)
    model = Parts(
        hour=nn.Embedding(24, 6),
        day=nn.Embedding(7, 3),
        weather=nn.Embedding(4, 3),
        crosses=nn.ModuleList(nn.Linear(16, 16) for _ in range(2)),
        deep=perceptron(16, 64, 32),
        head=nn.Linear(48, 1),
    )

    def loss() -> Tensor:
        when, which, sky, x, y = draw.batch(64, hour, day, weather, numbers, rented)
        given = torch.cat([model.hour(when), model.day(which), model.weather(sky), x], 1)
        crossed = given
        for layer in model.crosses:
            crossed = given * layer(crossed) + crossed
        made = model.head(torch.cat([crossed, model.deep(given).relu()], 1))[:, 0]
        return F.mse_loss(made, y.log1p())

    return Begun(model, loss)


@problem(250)
def spread_ensemble(draw: Draw) -> Begun:
    """Predict targets in hundreds, and how far off one is, by five small networks at once (Lakshminarayanan 2017)."""
    x, raw = diabetes()
    y = single(raw)[:, None] / 100
    model = Parts(
        inner=draw.normal(5, 10, 32) / 10**0.5,
        inner_bias=torch.zeros(5, 1, 32),
        outer=draw.normal(5, 32, 2) / 32**0.5,
        outer_bias=torch.zeros(5, 1, 2),
    )

    def loss() -> Tensor:
        rows = draw.integers(len(x), 5, 32)
        hidden = F.silu(x[rows] @ model.inner + model.inner_bias)
        mean, raw_spread = (hidden @ model.outer + model.outer_bias).chunk(2, 2)
        variance = F.softplus(raw_spread) + 1e-3
        penalty = 1e-3 * (model.inner.square().sum() + model.outer.square().sum()) / 5
        return 0.5 * (variance.log() + (y[rows] - mean).square() / variance).mean() + penalty

    return Begun(model, loss)


@problem(500)
def selu_tumours(draw: Draw) -> Begun:
    """Classify tumours by eight layers of SELU, which keep their own mean and deviation, with alpha dropout."""
    features, labels = table("breast_cancer")
    layers: list[nn.Module] = []
    for inputs in (30, *[32] * 7):
        layers += [nn.Linear(inputs, 32), nn.SELU(), nn.AlphaDropout(0.03)]
    model = nn.Sequential(*layers, nn.Linear(32, 1), nn.Flatten(0))
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)
    return fit(model, draw, 32, standardised(features), single(labels), F.binary_cross_entropy_with_logits)


@problem(600)
def lightgcn_purchases(draw: Draw) -> Begun:
    """Rank what people bought above what they did not, by vectors smoothed over who bought what (He et al. 2020)."""
    people, things = draw.normal(150, 4), draw.normal(200, 4)
    chance = (3 * (people @ things.T - 2)).sigmoid()
    bought = draw.uniform(150, 200) < chance
    pairs = bought.nonzero()
    edges = torch.zeros(350, 350)
    edges[:150, 150:] = bought.float()
    edges = edges + edges.T
    degree = edges.sum(1).clamp(min=1).rsqrt()
    smooth = degree[:, None] * edges * degree
    model = nn.Embedding(350, 16)
    nn.init.normal_(model.weight, std=0.1)

    def loss() -> Tensor:
        (pair,) = draw.batch(128, pairs)
        person, thing, other = pair[:, 0], 150 + pair[:, 1], 150 + draw.integers(200, 128)
        once = smooth @ model.weight
        vectors = (model.weight + once + smooth @ once) / 3
        better = (vectors[person] * (vectors[thing] - vectors[other])).sum(1)
        penalty = torch.stack([model(each).square().sum(1) for each in (person, thing, other)]).mean()
        return -F.logsigmoid(better).mean() + 1e-4 * penalty

    return Begun(model, loss)


@problem(200)
def kernel_logistic_digits(draw: Draw) -> Begun:
    """Classify 600 digits by weights of a Gaussian kernel, with the penalty of its space, all at once."""
    images, labels = (each[:600] for each in digits())
    kernel = (-torch.cdist(images, images).square() / 8).exp()
    model = Parts(weights=torch.zeros(600, 10), bias=torch.zeros(10))

    def loss() -> Tensor:
        made = kernel @ model.weights
        return F.cross_entropy(made + model.bias, labels) + 1e-5 * (model.weights * made).sum()

    return Begun(model, loss)
