"""Words and characters: an early language model, counts of neighbours, dates, an early recurrence."""

from __future__ import annotations

import calendar
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meta_train.problems.common import Begun, Draw, Parts, problem
from meta_train.problems.data import characters, words


@problem(800)
def bengio_adaptive_softmax(draw: Draw) -> Begun:
    """Predict a word from the four before it by a tanh layer (Bengio et al. 2003); rare words come in two groups."""
    text = words(2000)
    model = Parts(
        vectors=nn.Embedding(2000, 24),
        hidden=nn.Linear(96, 48),
        out=nn.AdaptiveLogSoftmaxWithLoss(48, 2000, [200, 800], div_value=2.0),
    )

    def loss() -> Tensor:
        x = text[draw.spans(len(text), 64, 5)]
        hidden = model.hidden(model.vectors(x[:, :4]).flatten(1)).tanh()
        return model.out(hidden, x[:, 4]).loss

    return Begun(model, loss)


@cache
def _neighbours(vocabulary: int) -> tuple[Tensor, Tensor]:
    """Pairs of words within four of each other, int64 ``[n, 2]``, and how often, the nearer the more, ``[n]``."""
    text = words(vocabulary)
    counts = torch.zeros(vocabulary * vocabulary)
    for apart in range(1, 5):
        pairs = text[:-apart] * vocabulary + text[apart:]
        counts += torch.bincount(pairs, minlength=vocabulary * vocabulary) / apart
    counts = counts.view(vocabulary, vocabulary) + counts.view(vocabulary, vocabulary).T
    pairs = counts.nonzero()
    return pairs, counts[pairs[:, 0], pairs[:, 1]]


@problem(1000)
def glove_counts(draw: Draw) -> Begun:
    """Fit the logarithms of how often words are neighbours by products of their vectors (GloVe)."""
    pairs, counts = _neighbours(600)
    model = Parts(vectors=nn.Embedding(600, 20), others=nn.Embedding(600, 20), biases=torch.zeros(2, 600))
    for part in (model.vectors, model.others):
        nn.init.uniform_(part.weight, -0.5 / 20, 0.5 / 20)

    def loss() -> Tensor:
        pair, count = draw.batch(256, pairs, counts)
        first, second = pair.unbind(1)
        product = (model.vectors(first) * model.others(second)).sum(1)
        error = product + model.biases[0, first] + model.biases[1, second] - count.log()
        return ((count / 50).clamp(max=1) ** 0.75 * error.square()).mean()

    return Begun(model, loss)


MONTHS = [calendar.month_name[month].lower() for month in range(1, 13)]
LETTERS = " 0123456789abcdefghijklmnopqrstuvwxyz"


@cache
def _dates() -> tuple[Tensor, Tensor]:
    """Dates as people write them, int64 ``[n, 17]``, and as six digits, int64 ``[n, 6]``."""
    draw, written, digits = Draw(0), [], []
    years, months, days = (draw.integers(kinds, 2400).tolist() for kinds in (40, 12, 28))
    for count, (age, month, before) in enumerate(zip(years, months, days, strict=True)):
        year, day = 60 + age, 1 + before
        name, whole = MONTHS[month], 1900 + year
        text = (f"{day} {name} {whole}", f"{name} {day} {year}", f"{day} {name[:3]} {whole}")[count % 3]
        written.append([LETTERS.index(letter) for letter in text.ljust(17)])
        digits.append([int(digit) for digit in f"{year:02}{month + 1:02}{day:02}"])
    return torch.tensor(written), torch.tensor(digits)


@problem(500)
def dates_bahdanau(draw: Draw) -> Begun:
    """Write dates as six digits by two GRUs, one of which looks at all states of the other (Bahdanau et al. 2015)."""
    written, digits = _dates()
    model = Parts(
        letters=nn.Embedding(len(LETTERS), 16),
        read=nn.GRU(16, 24, batch_first=True, bidirectional=True),
        begin=nn.Linear(48, 48),
        digits=nn.Embedding(11, 12),
        write=nn.GRUCell(60, 48),
        key=nn.Linear(48, 32),
        query=nn.Linear(48, 32, bias=False),
        score=nn.Linear(32, 1, bias=False),
        head=nn.Linear(96, 10),
    )

    def loss() -> Tensor:
        x, y = draw.batch(32, written, digits)
        memory, last = model.read(model.letters(x))
        state, keys = model.begin(last.transpose(0, 1).flatten(1)).tanh(), model.key(memory)
        before = model.digits(torch.cat([torch.full((32, 1), 10), y[:, :-1]], 1))
        logits = []
        for step in range(6):
            shares = model.score((keys + model.query(state)[:, None]).tanh()).softmax(1)
            looked = (shares * memory).sum(1)
            state = model.write(torch.cat([before[:, step], looked], 1), state)
            logits.append(model.head(torch.cat([state, looked], 1)))
        return F.cross_entropy(torch.stack(logits, 2), y)

    return Begun(model, loss)


@problem(600)
def identity_rnn_characters(draw: Draw) -> Begun:
    """Predict characters by a recurrence of rectified units that begins by keeping its state (Le et al. 2015)."""
    text, kinds = characters()
    model = Parts(read=nn.Embedding(kinds, 24), rnn=nn.RNN(24, 64, nonlinearity="relu", batch_first=True))
    nn.init.normal_(model.rnn.weight_ih_l0, std=0.1)
    nn.init.eye_(model.rnn.weight_hh_l0)
    for bias in (model.rnn.bias_ih_l0, model.rnn.bias_hh_l0):
        nn.init.zeros_(bias)
    model.head = nn.Linear(64, kinds)

    def loss() -> Tensor:
        x = text[draw.spans(len(text), 8, 31)]
        return F.cross_entropy(model.head(model.rnn(model.read(x[:, :-1]))[0]).flatten(0, 1), x[:, 1:].flatten())

    return Begun(model, loss)
