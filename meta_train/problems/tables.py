"""Tables: scikit-learn's, raw and standardised, with several losses; clicks and counts that are drawn."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meta_train.problems.common import Begun, Draw, Parts, fit, perceptron, problem
from meta_train.problems.data import diabetes, single, standardised, table


@problem(300)
def logistic_breast_cancer(draw: Draw) -> Begun:
    """Fit a logistic regression with a penalty, all rows at once."""
    features, labels = table("breast_cancer")
    x, y = standardised(features), single(labels)
    model = nn.Linear(30, 1)

    def loss() -> Tensor:
        return F.binary_cross_entropy_with_logits(model(x)[:, 0], y) + 1e-3 * model.weight.square().sum()

    return Begun(model, loss)


@problem(500)
def raw_features_logistic(draw: Draw) -> Begun:
    """Classify wines by features as they come, up to a thousand and more, all rows at once."""
    features, labels = table("wine")
    x, y = single(features), torch.tensor(labels)
    model = perceptron(13, 32, 3)
    return Begun(model, lambda: F.cross_entropy(model(x), y))


@problem(1000)
def raw_targets_diabetes(draw: Draw) -> Begun:
    """Predict targets as they come, in the hundreds."""
    x, targets = diabetes()
    return fit(perceptron(10, 64, 64, 1), draw, 32, x, single(targets)[:, None], F.mse_loss)


@problem(5000)
def long_5000(draw: Draw) -> Begun:
    """Fit a small table by a perceptron in 5,000 steps."""
    x, targets = diabetes()
    y = single((targets - 152) / 77)[:, None]
    return fit(perceptron(10, 32, 32, 1, activation=nn.Tanh), draw, 32, x, y, F.mse_loss)


@problem(600)
def quantiles(draw: Draw) -> Begun:
    """Predict three quantiles of the targets by the pinball loss."""
    x, targets = diabetes()
    shares = torch.tensor([0.1, 0.5, 0.9])

    def pinball(outputs: Tensor, y: Tensor) -> Tensor:
        errors = y - outputs
        return torch.maximum(shares * errors, (shares - 1) * errors).mean()

    return fit(perceptron(10, 48, 3), draw, 32, x, single(targets / 100)[:, None], pinball)


@problem(500)
def ft_transformer(draw: Draw) -> Begun:
    """Predict targets by a transformer over columns, each a token (Gorishniy et al. 2021)."""
    features, targets = diabetes()
    scaled = standardised(targets)
    block = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True, norm_first=True)
    model = Parts(
        scales=draw.normal(10, 32) / 3,
        offsets=draw.normal(11, 32) / 3,
        blocks=nn.TransformerEncoder(block, 2, enable_nested_tensor=False),
        head=nn.Linear(32, 1),
    )

    def loss() -> Tensor:
        x, y = draw.batch(32, features, scaled)
        tokens = torch.cat([torch.zeros(32, 1, 32), x[..., None] * model.scales], 1) + model.offsets
        return F.mse_loss(model.head(model.blocks(tokens)[:, 0])[:, 0], y)

    return Begun(model, loss)


@problem(400)
def cox_ph(draw: Draw) -> Begun:
    """Fit a network to the order of survival by Cox's partial likelihood, all rows at once."""
    x = standardised(table("breast_cancer")[0])
    risk = x[:, 0] * 2 + draw.normal(len(x)) * 0.5
    x = x[torch.argsort(risk, descending=True)]
    model = perceptron(30, 24, 1, activation=nn.SELU)

    def loss() -> Tensor:
        hazards = model(x)[:, 0]
        return (torch.logcumsumexp(hazards.flip(0), 0).flip(0) - hazards).mean()

    return Begun(model, loss)


@problem(1000)
def click_model(draw: Draw) -> Begun:
    """Predict clicks from four categories, rare ones among them, and six numbers."""
    sizes = (1000, 50, 7, 300)
    effects, slopes = [draw.normal(size) for size in sizes], draw.normal(6)
    model = Parts(tables=nn.ModuleList(nn.Embedding(size, 8) for size in sizes), network=perceptron(38, 64, 32, 1))

    def loss() -> Tensor:
        chosen = [(draw.uniform(128) ** 3 * size).long() for size in sizes]
        numbers = draw.normal(128, 6)
        own = [effect[index] for effect, index in zip(effects, chosen, strict=True)]
        logits = sum(own) + numbers @ slopes + own[0] * own[1] - 1
        clicks = (draw.uniform(128) < logits.sigmoid()).float()
        vectors = [embedding(index) for embedding, index in zip(model.tables, chosen, strict=True)]
        logits = model.network(torch.cat([*vectors, numbers], 1))[:, 0]
        return F.binary_cross_entropy_with_logits(logits, clicks)

    return Begun(model, loss)


@problem(500)
def poisson_exp_link(draw: Draw) -> Begun:
    """Predict the logarithms of rates from counts."""
    slopes = draw.normal(20) / 3
    model = perceptron(20, 32, 1)

    def loss() -> Tensor:
        x = draw.normal(64, 20)
        counts = torch.poisson((x @ slopes + 1).exp(), generator=draw.generator)
        return F.poisson_nll_loss(model(x)[:, 0], counts, log_input=True)

    return Begun(model, loss)
