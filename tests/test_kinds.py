"""What tensors are for is known in meta-training as in the plug-in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tables import generator
from torch import nn

from l2o.rules import Adam, ByKind, Celo2, Steered
from l2o.tasks import CharRNN, CharTransformer, GradientNoise, ModuleTask, Repeated, WordMLP
from l2o.types import TaskFamily
from l2o.unroll import expand_theta, sample_runs, unroll

TOKENS = torch.randint(0, 5, (12, 3), generator=torch.Generator().manual_seed(0))
NETWORK = nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(6, 2))
MODULE = ModuleTask(NETWORK, nn.functional.mse_loss, (TOKENS, torch.zeros(12, 2)), batch_size=4)
FAMILIES: dict[str, tuple[TaskFamily, set[str]]] = {
    "CharRNN": (CharRNN(width=4, length=4, batch_size=2), {"embedding.weight"}),
    "CharTransformer": (CharTransformer(width=4, length=4, batch_size=2), {"token.weight", "position.weight"}),
    "WordMLP": (WordMLP(words=8, width=2, hidden=3, batch_size=2), {"embedding.weight"}),
    "ModuleTask": (MODULE, {"0.weight"}),
    "wrapped": (Repeated(GradientNoise(MODULE), 2), {"0.weight"}),
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("rule", [Celo2(adam=("embedding",)), ByKind({"embedding": Adam()}, Steered())])
def test_embeddings_are_routed_in_training(rule: Any, name: str) -> None:
    family, embeddings = FAMILIES[name]
    theta = expand_theta(rule.init_theta(generator()), 2)
    with torch.no_grad():
        state = sample_runs(rule, theta, family, torch.full((2,), 5), generator(1))
        state, losses = unroll(rule, theta, family, state, 2, generator(2))
    alone = {"first", "second"} if isinstance(rule, Celo2) else {"m", "v", "count"}
    tables = {name for name, p in state.params.items() if p.ndim == 3 and state.opt.per_param[name].keys() == alone}
    assert tables == embeddings
    assert losses.isfinite().all()
