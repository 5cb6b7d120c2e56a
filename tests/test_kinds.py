"""What tensors are for is known in meta-training as in the plug-in."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from tables import first_estimate, generator
from torch import nn

import l2o
from l2o.estimators import Evolution
from l2o.estimators.curvature import check_curvature
from l2o.ops.kinds import kinds_of
from l2o.rules import LSTM, MLP, SGD, Adam, ByKind, Celo2, Steered
from l2o.tasks import CharRNN, CharTransformer, GradientNoise, ModuleTask, Repeated, WordMLP
from l2o.types import TaskFamily
from l2o.unroll import expand_theta, init_state, sample_runs, unroll

TOKENS = torch.randint(0, 5, (12, 3), generator=torch.Generator().manual_seed(0))
NETWORK = nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(6, 2))
MODULE = ModuleTask(NETWORK, nn.functional.mse_loss, (TOKENS, torch.zeros(12, 2)), batch_size=4)


class Tied(nn.Module):
    """Its output, the first of its parts, has the weights of its table."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.mix, self.table = nn.Linear(2, 5, bias=False), nn.Linear(2, 2), nn.Embedding(5, 2)
        self.out.weight = self.table.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.mix(self.table(x)).mean(-2))


FAMILIES: dict[str, tuple[TaskFamily, set[str]]] = {
    "CharRNN": (CharRNN(width=4, length=4, batch_size=2), {"embedding.weight"}),
    "CharTransformer": (CharTransformer(width=4, length=4, batch_size=2), {"token.weight", "position.weight"}),
    "WordMLP": (WordMLP(words=8, width=2, hidden=3, batch_size=2), {"embedding.weight"}),
    "ModuleTask": (MODULE, {"0.weight"}),
    "tied": (ModuleTask(Tied(), nn.functional.mse_loss, (TOKENS, torch.zeros(12, 5))), {"out.weight"}),
    "wrapped": (Repeated(GradientNoise(MODULE), 2), {"0.weight"}),
}
ROUTING = [Celo2(adam=("embedding",)), ByKind({"embedding": Adam()}, Steered())]
DEEP = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(1, 2))


@pytest.mark.parametrize("model", [NETWORK, Tied(), DEEP], ids=["embedding", "tied", "output"])
def test_modules_are_in_training_what_they_are_in_use(model: nn.Module) -> None:
    tokens = TOKENS.float() if model is DEEP else TOKENS
    task = ModuleTask(model, nn.functional.mse_loss, (tokens, torch.zeros(12, 5 if isinstance(model, Tied) else 2)))
    groups = l2o.param_groups(model)
    assert task.kinds == {name: group["kind"] for group in groups for name, _ in group["params"]}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("rule", ROUTING)
def test_embeddings_are_routed_in_training(rule: Any, name: str) -> None:
    family, embeddings = FAMILIES[name]
    theta = expand_theta(rule.init_theta(generator()), 2)
    with torch.no_grad():
        state = sample_runs(rule, theta, family, torch.full((2,), 5), generator(1))
        state = init_state(rule, theta, family, state)
        state, losses = unroll(rule, theta, family, state, 2, generator(2))
    alone = {"first", "second"} if isinstance(rule, Celo2) else {"m", "v", "count"}
    tables = {name for name, p in state.params.items() if p.ndim == 3 and state.opt.per_param[name].keys() == alone}
    assert tables == embeddings
    assert losses.isfinite().all()


def test_to_look_at_a_model_changes_nothing_of_it() -> None:
    layers = [nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)) for _ in range(2)]
    model = nn.Sequential(*layers, nn.Linear(3, 2))
    before = {name: b.clone() for name, b in model.named_buffers()}
    kinds = kinds_of(model)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert (kinds["0.parametrizations.weight.original"], kinds["2.weight"]) == ("matrix", "output")


def test_the_width_of_a_table_is_no_fan_in() -> None:
    """Of a rule that says so by its step alone, which a hidden matrix' fan-in divides."""
    theta, moved = MLP().init_theta(generator()), []
    for mup in (False, True):
        rule = MLP(mup=mup)
        with torch.no_grad():
            state = sample_runs(rule, expand_theta(theta, 2), MODULE, torch.full((2,), 5), generator(1))
            after, _ = unroll(rule, expand_theta(theta, 2), MODULE, state, 1, generator(2))
        moved.append({name: p - state.params[name] for name, p in after.params.items()})
    torch.testing.assert_close(moved[1]["0.weight"], moved[0]["0.weight"])
    torch.testing.assert_close(moved[1]["2.weight"], moved[0]["2.weight"] / 6)


def test_a_rule_by_kinds_rests_where_all_its_parts_do():
    assert ByKind({"embedding": Adam()}, SGD()).rests
    assert not ByKind({"embedding": LSTM()}, Adam()).rests
    assert not ByKind({"embedding": Adam()}, LSTM()).rests


@pytest.mark.parametrize("rule", [Celo2(adam=("embedding",)), ByKind({"embedding": Adam()}, SGD())])
def test_a_trial_of_second_derivatives_knows_them(rule: Any) -> None:
    theta = rule.init_theta(generator())
    state = sample_runs(rule, expand_theta(theta, 2), MODULE, torch.full((2,), 5), generator(1))
    check_curvature(rule, theta, MODULE, state)


def test_they_are_routed_where_rules_are_compiled() -> None:
    rule = ByKind({"embedding": Adam()}, SGD())
    theta, make = rule.init_theta(generator()), partial(Evolution, rule, MODULE, lanes=2, horizon=4, truncation=4)
    found = (first_estimate(make(compile=compiled), theta)[0] for compiled in (False, True))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
