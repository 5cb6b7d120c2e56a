"""Which tensors are embeddings, said or guessed, and what `Steered` makes of it."""

from itertools import pairwise, product

import pytest
import torch
from tables import generator
from torch import nn

import l2o
from l2o.ops.groups import tables_of
from l2o.ops.kinds import infos_of, kinds_of
from l2o.rules import Steered


class Words(nn.Module):
    """A model of words; its output is the table where ``tied``, and has no bias."""

    def __init__(self, tied: bool, positions: bool = False) -> None:
        super().__init__()
        self.places = nn.Embedding(8, 16) if positions else None
        self.words = nn.Embedding(50, 16)
        self.block = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 16))
        self.head = nn.Linear(16, 50, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, tokens):
        return self.head(self.block(self.words(tokens)))


def perceptron(*sizes, bias=True):
    return nn.Sequential(*(nn.Linear(a, b, bias) for a, b in pairwise(sizes)))


@pytest.mark.parametrize(
    ("model", "guessed"),
    [
        (Words(tied=True), {"words.weight"}),
        (Words(tied=False), {"words.weight"}),
        (Words(tied=True, positions=True), {"words.weight"}),
        (perceptron(4, 32, 10), set()),
        (perceptron(4, 32, 10, bias=False), set()),
        (perceptron(64, 32, 10), set()),
        (nn.Sequential(nn.Conv2d(1, 9, 3), nn.Flatten(), nn.Linear(9, 20, bias=False)), set()),
        (nn.Sequential(nn.Linear(4, 32, bias=False), nn.BatchNorm1d(32), nn.Linear(32, 2)), set()),
        (nn.LSTM(4, 8), set()),
        (nn.LayerNorm(4), set()),
        (nn.Linear(2, 300, bias=False), set()),  # as points of a map are
    ],
)
def test_guesses_where_nobody_says_what_tensors_are_for(model, guessed):
    params = dict(model.named_parameters())
    assert tables_of(infos_of(params)) == guessed


def test_what_is_said_is_not_guessed():
    params = dict(Words(tied=True).named_parameters())
    assert tables_of(infos_of(params, kinds_of(Words(tied=True)))) == {"words.weight"}
    assert tables_of(infos_of(params, {"words.weight": "output"})) == set()
    assert tables_of(infos_of(params, {"words.weight": "embedding", "block.0.weight": "embedding"})) == {"words.weight"}
    assert tables_of({}) == set()


def test_parameters_alone_are_trained_as_groups_are_with_the_kernel_and_without(monkeypatch):
    """A small tied table, which its gain would hold back, in a run that is long enough for a kernel."""
    rule, ends = Steered(lr=0.01, by_gain=2.0, tables=True, warmup=1e-8), []
    tokens = torch.arange(40).view(4, 10)
    for groups, kernels in product((nn.Module.parameters, l2o.param_groups), "01"):
        monkeypatch.setenv("L2O_KERNELS", kernels)
        torch.manual_seed(0)
        model = Words(tied=True)
        nn.init.normal_(model.words.weight, std=0.02)
        optimizer = l2o.LearnedOptimizer(groups(model), (rule, rule.init_theta(generator())), total_steps=10**8)
        for _ in range(6):
            nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append({name: p.detach() for name, p in model.named_parameters()})
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-3, atol=1e-5)
