"""Series and tasks: kinds of waves, counts over time, functions from a few points, walks, learning to learn."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meta_train.problems.common import Begun, Draw, Parts, Residual, perceptron, problem


@problem(300)
def waves_resnet1d(draw: Draw) -> Begun:
    """Tell five kinds of noisy waves by residual convolutions with batch norm and a step of four."""
    layers: list[nn.Module] = [nn.Conv1d(1, 24, 7, 2, 3), nn.BatchNorm1d(24), nn.ReLU()]
    for _ in range(2):
        inner = [nn.Conv1d(24, 24, 5, padding=2), nn.BatchNorm1d(24), nn.ReLU(), nn.Conv1d(24, 24, 5, padding=2)]
        layers += [Residual(*inner), nn.BatchNorm1d(24), nn.ReLU(), nn.MaxPool1d(2)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(24, 5))
    time = torch.linspace(0, 1, 96)

    def loss() -> Tensor:
        kind = draw.integers(5, 24)
        rate, start, size = 3 + 5 * draw.uniform(24, 1), draw.uniform(24, 1), 0.5 + draw.uniform(24, 1)
        turns = rate * time + start
        wave = (2 * math.pi * turns).sin()
        chirp = (2 * math.pi * (turns + rate * time**2)).sin()
        kinds = torch.stack([wave, wave.sign(), 2 * (turns % 1) - 1, chirp, wave * (-4 * time).exp()], 1)
        x = size * kinds[torch.arange(24), kind] + 0.3 * draw.normal(24, 96)
        return F.cross_entropy(model(x[:, None]), kind)

    return Begun(model, loss)


@problem(500)
def deepar_counts(draw: Draw) -> Begun:
    """Predict the next of daily counts, by an LSTM that says a negative binomial distribution (Salinas et al. 2020)."""
    days = torch.arange(140)
    level, week = 2 + 1.5 * draw.normal(60, 1), 0.6 * draw.normal(60, 7)
    rates = (level + week[:, days % 7] + 0.4 * (2 * math.pi * days / 50).sin()).clamp(max=5).exp()
    counts = torch.poisson(rates, generator=draw.generator)
    model = Parts(days=nn.Embedding(7, 4), lstm=nn.LSTM(5, 32, batch_first=True), head=nn.Linear(32, 2))

    def loss() -> Tensor:
        rows, span = draw.integers(60, 12, 1), draw.spans(140, 12, 22)
        x = counts[rows, span]
        inputs = torch.cat([x[:, :-1, None].log1p(), model.days(span[:, 1:] % 7)], 2)
        rate, spread = F.softplus(model.head(model.lstm(inputs)[0])).add(1e-4).unbind(2)
        size, y = 1 / spread, x[:, 1:]
        ways = (y + size).lgamma() - size.lgamma() - (y + 1).lgamma()
        return -(ways - size * (spread * rate).log1p() + y * (rate / (size + rate)).log()).mean()

    return Begun(model, loss)


@problem(800)
def neural_process_waves(draw: Draw) -> Begun:
    """Predict waves from three to ten of their points by the mean of codes of points (Garnelo et al. 2018)."""
    model = Parts(code=perceptron(2, 48, 48, 48), predict=perceptron(49, 48, 48, 2))

    def loss() -> Tensor:
        x = 4 * draw.uniform(16, 30, 1) - 2
        size, rate, phase = (draw.uniform(16, 1, 1) for _ in range(3))
        y = (0.5 + size) * ((1 + 2 * rate) * x + 6.28 * phase).sin() + 0.05 * draw.normal(16, 30, 1)
        known = int(draw.integers(11, 1, low=3))
        code = model.code(torch.cat([x, y], 2)[:, :known]).mean(1, keepdim=True)
        mean, raw = model.predict(torch.cat([code.expand(16, 30, 48), x], 2)).split(1, 2)
        scale = 0.05 + 0.95 * F.softplus(raw)
        return (scale.log() + 0.5 * ((y - mean) / scale).square()).mean() + 0.5 * math.log(2 * math.pi)

    return Begun(model, loss)


def _walks(draw: Draw, count: int, length: int, side: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """What is still to be earned on walks on a grid towards or away from its middle, places and steps, ``[count,
    length]`` each; one step in twenty is random."""
    moves = torch.tensor([[0, 1], [0, -1], [1, 0], [-1, 0]])
    place, wish = draw.integers(side, count, 2), draw.integers(2, count) * 2 - 1
    places, steps, rewards = [], [], []
    for _ in range(length):
        offset = wish[:, None] * (2 * place - side + 1)
        first = (offset[:, 0].abs() >= offset[:, 1].abs()).long()
        chosen = offset.gather(1, 1 - first[:, None])[:, 0]
        step = 2 * first + (chosen > 0).long()
        step = torch.where(draw.uniform(count) < 0.05, draw.integers(4, count), step)
        places.append(side * place[:, 0] + place[:, 1])
        steps.append(step)
        place = (place + moves[step]).clamp(0, side - 1)
        rewards.append(-(place - (side - 1) / 2).abs().sum(1))
    to_go = torch.stack(rewards, 1).flip(1).cumsum(1).flip(1)
    return to_go, torch.stack(places, 1), torch.stack(steps, 1)


@problem(500)
def decision_transformer_walks(draw: Draw) -> Begun:
    """Imitate walks given what they are still to earn, by a causal transformer over three kinds of tokens."""
    to_go, places, steps = _walks(draw, 400, 8)
    model = Parts(
        earn=nn.Linear(1, 32),
        place=nn.Embedding(36, 32),
        step=nn.Embedding(4, 32),
        time=0.02 * draw.normal(8, 1, 32),
        layer=nn.TransformerEncoderLayer(32, 2, 96, 0.1, batch_first=True),
        head=nn.Linear(32, 4),
    )
    mask = nn.Transformer.generate_square_subsequent_mask(24)

    def loss() -> Tensor:
        rtg, at, y = draw.batch(16, to_go, places, steps)
        tokens = torch.stack([model.earn(rtg[..., None] / 10), model.place(at), model.step(y)], 2) + model.time
        seen = model.layer(tokens.flatten(1, 2), mask, is_causal=True)
        return F.cross_entropy(model.head(seen[:, 1::3]).flatten(0, 1), y.flatten())

    return Begun(model, loss)


@problem(800)
def maml_waves(draw: Draw) -> Begun:
    """Learn from where, and how fast, one step on ten points of a wave leads to the wave (Finn et al. 2017)."""
    sizes = ((1, 40), (40, 40), (40, 1))
    weights = {f"weight_{i}": draw.normal(a, b) / a**0.5 for i, (a, b) in enumerate(sizes)}
    biases = {f"bias_{i}": 0.5 * draw.normal(1, b) for i, (_, b) in enumerate(sizes)}
    model = Parts(**weights, **biases, log_rate=torch.tensor(-3.0))

    def run(own: list[Tensor], x: Tensor) -> Tensor:
        for i in range(3):
            x = x @ own[i] + own[3 + i]
            x = x.relu() if i < 2 else x
        return x

    def loss() -> Tensor:
        x = 6 * draw.uniform(8, 20, 1) - 3
        y = (0.5 + 2 * draw.uniform(8, 1, 1)) * (x + 3.14 * draw.uniform(8, 1, 1)).sin()
        own = [getattr(model, f"{kind}_{i}").expand(8, -1, -1) for kind in ("weight", "bias") for i in range(3)]
        error = (run(own, x[:, :10]) - y[:, :10]).square().mean(1).sum()
        slopes = torch.autograd.grad(error, own, create_graph=True)
        adapted = [p - model.log_rate.exp() * slope for p, slope in zip(own, slopes, strict=True)]
        return F.mse_loss(run(adapted, x[:, 10:]), y[:, 10:])

    return Begun(model, loss)
