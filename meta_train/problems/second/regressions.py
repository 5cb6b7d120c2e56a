"""Regressions and likelihoods: survival, raw units, additive and spline networks, trees, ranks, volatility."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meta_train.problems.common import Begun, Draw, Parts, fit, perceptron, problem
from meta_train.problems.data import diabetes, digits, single, standardised, table


@problem(500)
def weibull_aft(draw: Draw) -> Begun:
    """Fit a linear Weibull model of times in days, some of which were cut off, all rows at once."""
    x, days = diabetes()
    until = 80 + 300 * draw.uniform(len(x))
    time = torch.minimum(single(days), until)
    over = single(days) <= until
    model = Parts(slopes=nn.Linear(10, 1), log_shape=torch.tensor(0.0))
    nn.init.zeros_(model.slopes.weight)

    def loss() -> Tensor:
        scaled = model.log_shape.exp() * (time.log() - model.slopes(x)[:, 0])
        return (scaled.exp() - over * (scaled + model.log_shape - time.log())).mean()

    return Begun(model, loss)


@problem(1000)
def linnerud_raw_huber(draw: Draw) -> Begun:
    """Predict weight, waist and pulse from counts of exercises by a linear layer, all in their units, with Huber."""
    exercises, body = (single(array) for array in table("linnerud"))
    model = nn.Linear(3, 3)
    return Begun(model, lambda: F.huber_loss(model(exercises), body, delta=5.0))


@problem(600)
def neural_additive(draw: Draw) -> Begun:
    """Classify tumours by a sum of functions of one measurement each, small networks side by side."""
    features, labels = table("breast_cancer")
    x, y = standardised(features), single(labels)
    model = Parts(
        inner=draw.normal(30, 24) * 0.5,
        inner_bias=draw.normal(30, 24),
        middle=draw.normal(30, 24, 12) / 5,
        outer=draw.normal(30, 12) / 4,
        bias=torch.zeros(()),
    )

    def loss() -> Tensor:
        rows, wanted = draw.batch(48, x, y)
        hidden = (rows[..., None] * model.inner + model.inner_bias).relu()
        hidden = F.dropout(torch.einsum("bfi,fio->bfo", hidden, model.middle).relu(), 0.1)
        terms = (hidden * model.outer).sum(2)
        logits = terms.sum(1) + model.bias
        return F.binary_cross_entropy_with_logits(logits, wanted) + 1e-3 * terms.square().mean()

    return Begun(model, loss)


@problem(600)
def soft_trees(draw: Draw) -> Begun:
    """Classify digits by twelve trees of depth four, at whose forks a sigmoid says how much goes which way."""
    images, labels = digits()
    trees, depth = 12, 4
    model = Parts(
        forks=nn.Linear(64, trees * (2**depth - 1)),
        leaves=torch.zeros(trees, 2**depth, 10),
        log_sharpness=torch.zeros(trees, 1),
    )

    def loss() -> Tensor:
        x, y = draw.batch(64, images, labels)
        right = (model.forks(x).view(64, trees, -1) * model.log_sharpness.exp()).sigmoid()
        reach = torch.ones(64, trees, 1)
        for level in range(depth):
            here = right[..., 2**level - 1 : 2 ** (level + 1) - 1]
            reach = torch.stack([reach * (1 - here), reach * here], 3).flatten(2)
        chances = torch.einsum("btl,tlk->bk", reach, model.leaves.softmax(2)) / trees
        return F.nll_loss(chances.log(), y)

    return Begun(model, loss)


@problem(500)
def spline_network(draw: Draw) -> Begun:
    """Fit a function of two numbers by sums of piecewise linear functions, in two layers (after KAN), all at once."""
    x = draw.uniform(300, 2) * 2 - 1
    y = torch.exp(torch.sin(3 * x[:, :1]) + x[:, 1:] ** 2)
    knots = torch.linspace(-2, 2, 16)
    model = Parts(
        first=draw.normal(2, 5, 16) * 0.1,
        first_base=nn.Linear(2, 5),
        second=draw.normal(5, 1, 16) * 0.1,
        second_base=nn.Linear(5, 1),
    )

    def layer(x: Tensor, splines: Tensor, base: nn.Module) -> Tensor:
        hats = (1 - (x[..., None] - knots).abs() / (knots[1] - knots[0])).relu()
        made: Tensor = base(F.silu(x)) + torch.einsum("bik,iok->bo", hats, splines)
        return made

    def loss() -> Tensor:
        return F.mse_loss(layer(layer(x, model.first, model.first_base), model.second, model.second_base), y)

    return Begun(model, loss)


@problem(600)
def ordinal_digits(draw: Draw) -> Begun:
    """Rank digits by their size: one score, and nine thresholds that are sums of what is positive."""
    images, labels = digits()
    model = Parts(score=perceptron(64, 48, 48, 1, activation=nn.Tanh), first=torch.tensor(-2.0), gaps=torch.zeros(8))

    def loss() -> Tensor:
        x, y = draw.batch(32, images, labels)
        thresholds = torch.cat([model.first[None], model.first + F.softplus(model.gaps).cumsum(0)])
        under = (thresholds - 4 * model.score(x)).sigmoid()
        edges = torch.cat([torch.zeros(32, 1), under, torch.ones(32, 1)], 1)
        return F.nll_loss((edges.diff(dim=1) + 1e-6).log(), y)

    return Begun(model, loss)


@problem(600)
def factorisation_machine(draw: Draw) -> Begun:
    """Predict the course of diabetes from tenths of measurements by products of their vectors (Rendle 2010)."""
    features, targets = diabetes()
    ranks = (features.argsort(0).argsort(0) * 10).div(len(features), rounding_mode="floor")
    index, scaled = ranks + 10 * torch.arange(10), standardised(targets)
    model = Parts(vectors=nn.Embedding(100, 6), slopes=nn.Embedding(100, 1), bias=torch.zeros(()))
    nn.init.normal_(model.vectors.weight, std=0.05)
    nn.init.zeros_(model.slopes.weight)

    def loss() -> Tensor:
        x, y = draw.batch(32, index, scaled)
        v = model.vectors(x)
        pairs = (v.sum(1).square() - v.square().sum(1)).sum(1) / 2
        return F.mse_loss(model.bias + model.slopes(x).sum((1, 2)) + pairs, y)

    return Begun(model, loss)


@problem(300)
def garch_returns(draw: Draw) -> Begun:
    """Fit how the size of returns in percent follows itself, and how heavy their tails are: four numbers."""
    returns, variance = torch.zeros(80, 48), torch.full((48,), 0.05)
    noise = draw.normal(80, 48) / (draw.normal(80, 48, 6).square().mean(2)).sqrt()
    for step in range(80):
        returns[step] = variance.sqrt() * noise[step]
        variance = 0.002 + 0.15 * returns[step] ** 2 + 0.8 * variance
    starts = {"log_floor": 2.0, "shock": -2.0, "keep": 1.0, "log_freedom": 2.0}
    model = Parts(**{name: torch.tensor(start) for name, start in starts.items()})

    def loss() -> Tensor:
        floor, shock, keep = model.log_floor.exp(), model.shock.sigmoid(), model.keep.sigmoid() * 0.98
        sizes = [returns.square().mean().expand(48)]
        for step in range(79):
            sizes.append(floor + shock * returns[step] ** 2 + keep * sizes[-1])
        scale = torch.stack(sizes).sqrt()
        tails = torch.distributions.StudentT(2 + model.log_freedom.exp(), 0.0, scale, validate_args=False)
        return -tails.log_prob(returns).mean()

    return Begun(model, loss)


@problem(1000)
def bottleneck_pairs(draw: Draw) -> Begun:
    """Press eleven measurements through five numbers, as one finds anomalies by, two rows at a time."""
    features, targets = diabetes()
    both = torch.cat([features, standardised(targets)[:, None]], 1)
    return fit(perceptron(11, 24, 5, 24, 11, activation=nn.ELU), draw, 2, both, both, F.mse_loss)
