"""Groups of parameters by what they are for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import l2o
from l2o.types import ConfigurationError, ParameterError


class Tied(nn.Module):
    """A language model whose output has the weights of its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.norm = nn.Embedding(7, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(self.mix(self.table(x))))


def kinds(model: nn.Module) -> dict[str, str]:
    return {name: group["kind"] for group in l2o.param_groups(model) for name, _ in group["params"]}


def test_what_parameters_are_for() -> None:
    convolutions = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 5), nn.Linear(5, 2))
    expected = {"0.weight": "matrix", "3.weight": "matrix", "4.weight": "output"}
    assert kinds(convolutions) == {name: expected.get(name, "vector") for name, _ in convolutions.named_parameters()}
    assert kinds(Tied()) == {
        "table.weight": "embedding", "mix.weight": "matrix", "mix.bias": "vector", "norm.weight": "vector",
        "norm.bias": "vector",
    }  # fmt: skip
    assert kinds(nn.Linear(3, 2)) == {"weight": "matrix", "bias": "vector"}


def test_decay_is_of_matrices_and_the_output_and_frozen_parameters_are_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)
    groups = l2o.param_groups(model, weight_decay=0.1, verbose=True)
    assert {group["kind"]: group["weight_decay"] for group in groups} == {"matrix": 0.1, "output": 0.1, "vector": 0.0}
    assert capsys.readouterr().out.splitlines() == [
        "matrix     0.weight (4, 3)",
        "output     1.weight (2, 4)",
        "vector     1.bias (2,)",
    ]


def test_every_optimizer_takes_them() -> None:
    model, tokens = Tied(), torch.arange(6)
    for make in (lambda groups: l2o.LearnedOptimizer(groups, "default", total_steps=3), torch.optim.AdamW):
        optimizer = make(l2o.param_groups(model, weight_decay=0.1))
        before = [p.detach().clone() for p in model.parameters()]
        model(tokens).logsumexp(-1).sum().backward()
        optimizer.step()
        assert not any(p.equal(q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("model", "text"),
    [([nn.Linear(2, 2)], "model is a list"), (nn.ReLU(), "ReLU has no parameter with requires_grad; unfreeze one")],
)
def test_bad_input(model: object, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        l2o.param_groups(model)  # type: ignore[arg-type]


def test_lazy_modules_are_refused_as_by_the_plug_in() -> None:
    with pytest.raises(ParameterError, match=r"parameter '0.weight' has no shape yet: run its lazy module once"):
        l2o.param_groups(nn.Sequential(nn.LazyLinear(3)))
