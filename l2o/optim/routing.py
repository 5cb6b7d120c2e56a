"""Parameter groups by what the parameters of a model are for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from l2o.checks import check_float
from l2o.types import ConfigurationError, Kind

_TABLES = (nn.Embedding, nn.EmbeddingBag)
_DECAYED: tuple[Kind, ...] = ("matrix", "output")
"""Biases, gains and embeddings are left out of weight decay, as in GPT-2's and most recipes since."""


def param_groups(model: nn.Module, weight_decay: float = 0.0, verbose: bool = False) -> list[dict[str, Any]]:
    """Groups of the trainable parameters of ``model`` for any optimizer of torch, named, each with its ``kind``::

        optimizer = l2o.LearnedOptimizer(l2o.param_groups(model, weight_decay=0.1), "default", total_steps=10_000)

    ``embedding``: the tables of `torch.nn.Embedding`, also where an output shares them. ``output``: the weight of the
    last `torch.nn.Linear` of the model, where it is not the only one. ``vector``: what has fewer than two axes of more
    than one entry. ``matrix``: all else.

    weight_decay: of matrices and the output, measured as the optimizer does; all else has 0.
    verbose: print which parameter is what.
    Raises `ConfigurationError` for what is no module, or has nothing to train.
    """
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"model is a {type(model).__name__}: expected a torch.nn.Module")
    check_float("weight_decay", weight_decay, least=0.0)
    groups: dict[Kind, list[tuple[str, Tensor]]] = {}
    for name, p, kind in _kinds(model):
        groups.setdefault(kind, []).append((name, p))
    if not groups:
        raise ConfigurationError(f"model {type(model).__name__} has no parameter that requires a gradient")
    if verbose:
        print("\n".join(f"{kind:<10} {name} {tuple(p.shape)}" for kind, own in groups.items() for name, p in own))
    return [
        {"params": own, "kind": kind, "weight_decay": weight_decay if kind in _DECAYED else 0.0}
        for kind, own in groups.items()
    ]


def _kinds(model: nn.Module) -> Iterator[tuple[str, Tensor, Kind]]:
    tables = {id(part.weight) for part in model.modules() if isinstance(part, _TABLES)}
    linear = [part.weight for part in model.modules() if isinstance(part, nn.Linear)]
    last = id(linear[-1]) if len(linear) > 1 else None
    for name, p in model.named_parameters():
        if p.requires_grad:
            is_vector = sum(length > 1 for length in p.shape) < 2
            known: Kind = "embedding" if id(p) in tables else "output" if id(p) == last else "matrix"
            yield name, p, "vector" if is_vector and known == "matrix" else known
