"""Sequences and sets: memory, reversal, lines of digits, waves, a hidden Markov model, the largest of a set."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meta_train.problems.common import Begun, Draw, Parts, perceptron, problem
from meta_train.problems.data import digits


@problem(500)
def adding_gru(draw: Draw) -> Begun:
    """Add the two marked of 25 numbers by a GRU."""
    model = Parts(gru=nn.GRU(2, 32, batch_first=True), head=nn.Linear(32, 1))

    def loss() -> Tensor:
        numbers, marks, rows = draw.uniform(32, 25), torch.zeros(32, 25), torch.arange(32)
        marks[rows, draw.integers(12, 32)] = 1
        marks[rows, draw.integers(25, 32, low=12)] = 1
        hidden = model.gru(torch.stack([numbers, marks], 2))[0]
        return F.mse_loss(model.head(hidden[:, -1])[:, 0], (numbers * marks).sum(1))

    return Begun(model, loss)


@problem(600)
def seq2seq_reverse(draw: Draw) -> Begun:
    """Reverse eight letters by a transformer with an encoder and a decoder."""
    letters, length = 12, 8
    model = Parts(
        embedding=nn.Embedding(letters + 1, 32),
        transformer=nn.Transformer(32, 2, 1, 1, 64, 0.0, batch_first=True),
        places=draw.normal(length, 32) * 0.1,
        head=nn.Linear(32, letters),
    )
    mask = nn.Transformer.generate_square_subsequent_mask(length)

    def loss() -> Tensor:
        x = draw.integers(letters, 32, length)
        y = x.flip(1)
        seen = torch.cat([torch.full((32, 1), letters), y[:, :-1]], 1)  # the letter after the last one begins
        source, target = (model.embedding(each) + model.places for each in (x, seen))
        hidden = model.transformer(source, target, tgt_mask=mask, tgt_is_causal=True)
        return F.cross_entropy(model.head(hidden).flatten(0, 1), y.flatten())

    return Begun(model, loss)


@problem(600)
def ctc_lines(draw: Draw) -> Begun:
    """Read lines of three digits, column by column, without being told where each is."""
    images, labels = digits()
    convolutions = [nn.Conv1d(8, 32, 5, padding=2), nn.ReLU(), nn.Conv1d(32, 32, 5, padding=2), nn.ReLU()]
    model = Parts(
        columns=nn.Sequential(*convolutions), gru=nn.GRU(32, 32, batch_first=True), head=nn.Linear(32, 10 + 1)
    )
    lengths, read = torch.full((16,), 24), torch.full((16,), 3)

    def loss() -> Tensor:
        chosen = draw.integers(len(images), 16, 3)
        lines = images[chosen].view(16, 3, 8, 8).permute(0, 2, 1, 3).reshape(16, 8, 24)
        hidden = model.gru(model.columns(lines).transpose(1, 2))[0]
        logits = model.head(hidden).log_softmax(2).transpose(0, 1)
        return F.ctc_loss(logits, labels[chosen] + 1, lengths, read)  # 0 stands for nothing

    return Begun(model, loss)


@problem(500)
def wavenet(draw: Draw) -> Begun:
    """Predict sums of three waves by gated, dilated convolutions."""
    first = nn.Conv1d(1, 24, 1)
    gated = [nn.Conv1d(24, 48, 2, dilation=2**layer) for layer in range(5)]
    last = nn.Conv1d(24, 1, 1)

    def loss() -> Tensor:
        speed, phase = draw.uniform(16, 3, 1) * 0.5 + 0.05, draw.uniform(16, 3, 1) * 6.28
        waves = (speed * torch.arange(64) + phase).sin().sum(1, keepdim=True) / 2
        hidden = first(waves[..., :-1])
        for layer, convolution in enumerate(gated):
            value, gate = convolution(F.pad(hidden, (2**layer, 0))).chunk(2, 1)
            hidden = hidden + value.tanh() * gate.sigmoid()
        return F.mse_loss(last(hidden)[..., 32:], waves[..., 33:])

    return Begun(nn.ModuleList([first, *gated, last]), loss)


@problem(500)
def hmm(draw: Draw) -> Begun:
    """Fit a hidden Markov model of five states by its likelihood."""
    seen = draw.integers(6, 20, 40)
    seen[:, 10:20] %= 2
    model = Parts(transitions=draw.normal(5, 5), emissions=draw.normal(5, 6), start=torch.zeros(5))

    def loss() -> Tensor:
        transitions, emissions = model.transitions.log_softmax(1), model.emissions.log_softmax(1)
        paths = model.start.log_softmax(0) + emissions[:, seen[:, 0]].T
        for step in range(1, seen.shape[1]):
            paths = torch.logsumexp(paths[:, :, None] + transitions, 1) + emissions[:, seen[:, step]].T
        return -torch.logsumexp(paths, 1).mean()

    return Begun(model, loss)


@problem(500)
def deepsets(draw: Draw) -> Begun:
    """Find the largest of ten numbers by a sum over features of each."""
    model = Parts(one=perceptron(1, 64, 64), total=perceptron(64, 64, 1))

    def loss() -> Tensor:
        x = draw.uniform(64, 10, 1)
        return F.mse_loss(model.total(model.one(x).sum(1)), x.amax(1))

    return Begun(model, loss)
