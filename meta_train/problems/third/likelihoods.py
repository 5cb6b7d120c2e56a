"""Statistics: factors, drugs, events that set off others, sources, who depends on whom."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from meta_train.problems.common import Begun, Draw, Parts, problem
from meta_train.problems.data import single, standardised, table


@problem(600)
def factor_analysis_wine(draw: Draw) -> Begun:
    """Fit three factors, means and what is left over to the logarithms of wine's measurements, all rows at once."""
    x = single(table("wine")[0]).log1p()
    model = Parts(loadings=0.1 * draw.normal(13, 3), means=torch.zeros(13), log_rest=torch.zeros(13))

    def loss() -> Tensor:
        covariance = model.loadings @ model.loadings.T + torch.diag(model.log_rest.exp() + 1e-4)
        factor = torch.linalg.cholesky_ex(covariance)[0]
        scaled = torch.linalg.solve_triangular(factor, (x - model.means).T, upper=False)
        return 0.5 * scaled.square().sum(0).mean() + factor.diagonal().log().sum() + 6.5 * math.log(2 * math.pi)

    return Begun(model, loss)


@problem(400)
def drug_levels(draw: Draw) -> Begun:
    """Fit how twelve people take up and clear a drug, in milligrams and litres, and how they differ from each other."""
    hours = torch.tensor([0.25, 0.5, 1, 2, 3, 5, 7, 9, 12, 24])

    def level(uptake: Tensor, clearance: Tensor, volume: Tensor) -> Tensor:
        out = clearance / volume
        return 320 * uptake / (volume * (uptake - out + 1e-6)) * ((-out * hours).exp() - (-uptake * hours).exp())

    true = torch.tensor([0.5, 1.0, 3.5]) + torch.tensor([0.5, 0.25, 0.15]) * draw.normal(12, 3)
    seen = level(*true.exp()[..., None].unbind(1)) * (1 + 0.1 * draw.normal(12, 10))
    model = Parts(
        typical=torch.tensor([1.0, 0.0, 2.0]),
        log_spread=torch.full((3,), -1.0),
        own=0.1 * draw.normal(12, 3),
        log_noise=torch.tensor(0.0),
    )

    def loss() -> Tensor:
        own = model.typical + model.log_spread.exp() * model.own
        error = (level(*own.exp()[..., None].unbind(1)) - seen) / model.log_noise.exp()
        prior = model.own.square().sum() / 2 + (model.log_spread + 1).square().sum()
        return error.square().mean() / 2 + model.log_noise + prior / 120

    return Begun(model, loss)


def _events(draw: Draw, until: float, kinds: int = 4) -> tuple[Tensor, Tensor]:
    """Times and kinds of events, each of which sets off others: of its own kind and of the next."""
    roots = torch.poisson(torch.full((kinds,), 0.4 * until), generator=draw.generator).long()
    waiting = [(float(time), kind) for kind in range(kinds) for time in until * draw.uniform(int(roots[kind]))]
    found = []
    while waiting:
        time, kind = waiting.pop()
        found.append((time, kind))
        for other, mean in ((kind, 0.4), ((kind + 1) % kinds, 0.3)):
            for _ in range(int(torch.poisson(torch.tensor(mean), generator=draw.generator))):
                later = time - math.log(1 - float(draw.uniform(1))) / 2
                if later < until:
                    waiting.append((later, other))
    found.sort()
    return torch.tensor([time for time, _ in found]), torch.tensor([kind for _, kind in found])


@problem(100)
def hawkes_events(draw: Draw) -> Begun:
    """Fit which of four kinds of events sets off which, and for how long, by the likelihood of all of them (Hawkes)."""
    until = 60.0
    times, kinds = _events(draw, until)
    own = F.one_hot(kinds, 4).float()
    lags = times[:, None] - times
    model = Parts(log_base=torch.full((4,), -3.0), log_effect=torch.full((4, 4), -3.0), log_decay=torch.tensor(-1.0))

    def loss() -> Tensor:
        effect, decay = model.log_effect.exp(), model.log_decay.exp()
        kept = torch.where(lags > 0, (-decay * lags.clamp(min=0)).exp(), 0.0)
        rate = model.log_base.exp() + decay * kept @ own @ effect
        expected = (
            until * model.log_base.exp().sum() + (own @ effect * (1 - (-decay * (until - times)).exp())[:, None]).sum()
        )
        return (expected - (rate * own).sum(1).log().sum()) / len(times)

    return Begun(model, loss)


@problem(500)
def unmixed_sources(draw: Draw) -> Begun:
    """Find six sources in six mixtures of them, which differ in loudness, by how far from Gaussian they are (ICA)."""
    time = torch.arange(2000.0)
    waves = [(time / 9).sin(), 2 * (time / 31 % 1) - 1, (time / 17).sin().sign(), (time / 40).sin() * (time / 5).cos()]
    noises = draw.normal(2, 2000) ** 3 / 4
    sources = torch.cat([torch.stack(waves), noises])
    mixed = draw.normal(6, 6) @ sources * torch.tensor([[0.1], [0.3], [1], [1], [3], [5]])
    model = Parts(unmix=torch.eye(6))

    def loss() -> Tensor:
        columns = draw.integers(2000, 256)
        found = model.unmix @ mixed[:, columns]
        heavy = F.softplus(-2 * found.abs()) + found.abs()  # the logarithm of cosh, with no overflow
        return heavy.sum(0).mean() - torch.linalg.slogdet(model.unmix)[1]

    return Begun(model, loss)


@problem(200)
def partial_correlations(draw: Draw) -> Begun:
    """Fit the inverse of the covariance of thirty measurements of tumours, few of it other than zero (graph lasso)."""
    x = standardised(table("breast_cancer")[0])
    covariance = x.T @ x / len(x)
    model = Parts(lower=torch.zeros(30, 30), log_diagonal=0.01 * draw.normal(30))

    def loss() -> Tensor:
        factor = model.lower.tril(-1) + torch.diag(model.log_diagonal.exp())
        inverse = factor @ factor.T
        penalty = 0.02 * (inverse.abs().sum() - inverse.diagonal().abs().sum())
        return (covariance * inverse).sum() - 2 * model.log_diagonal.sum() + penalty

    return Begun(model, loss)
