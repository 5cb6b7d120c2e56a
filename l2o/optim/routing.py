"""Parameter groups by what the parameters of a model are for."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from l2o.checks import check_float
from l2o.ops.kinds import kinds_of
from l2o.optim.members import check_shape
from l2o.types import ConfigurationError, Kind

_DECAYED: tuple[Kind, ...] = ("matrix", "output")
"""Biases, gains and embeddings are left out of weight decay, as in GPT-2's and most recipes since."""


def param_groups(model: nn.Module, weight_decay: float = 0.0, verbose: bool = False) -> list[dict[str, Any]]:
    """Return groups of the trainable parameters of ``model`` for any optimizer of torch, named, each with its
    ``kind``::

        optimizer = l2o.LearnedOptimizer(l2o.param_groups(model, weight_decay=0.1), "default", total_steps=10_000)

    Kinds are ``embedding``, ``output``, ``vector`` and ``matrix``, see `l2o.ops.kinds.kinds_of`.

    weight_decay: of matrices and the output, measured as the optimizer does; all else has 0.
    verbose: print which parameter is what.
    Raises `ConfigurationError` for what is no module, or has nothing to train; `ParameterError` for lazy modules.
    """
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"model is a {type(model).__name__}: expected a torch.nn.Module")
    check_float("weight_decay", weight_decay, least=0.0)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, p in trained.items():
        check_shape(f"parameter {name!r}", p)
    kinds, groups = kinds_of(model), dict[Kind, list[tuple[str, Tensor]]]()
    for name, p in trained.items():
        groups.setdefault(kinds[name], []).append((name, p))
    if not groups:
        raise ConfigurationError(f"model {type(model).__name__} has no parameter with requires_grad; unfreeze one")
    if verbose:
        print("\n".join(f"{kind:<10} {name} {tuple(p.shape)}" for kind, own in groups.items() for name, p in own))
    return [
        {"params": own, "kind": kind, "weight_decay": weight_decay if kind in _DECAYED else 0.0}
        for kind, own in groups.items()
    ]
