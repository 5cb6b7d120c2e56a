"""What a user hands to the plug-in, checked: the checkpoint, the length of the run, the loss."""

from __future__ import annotations

import numbers
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from l2o.checkpoints import store
from l2o.checks import check_int
from l2o.types import CheckpointError, ConfigurationError, Kind, Theta, UpdateRule

_START = 'start with LearnedOptimizer(params, "default", total_steps=10_000)'


_MOST_STEPS = 2**63 - 1


def length(total_steps: Any) -> int:
    """Return ``total_steps`` as an int; raises `ConfigurationError`."""
    if total_steps is None:
        raise ConfigurationError(
            "total_steps=None: expected how many steps the run will have, because rules plan by the share of it that "
            f"is done (warm-up, smaller steps towards the end); {_START}"
        )
    if check_int("total_steps", total_steps) > _MOST_STEPS:
        raise ConfigurationError(f"total_steps={total_steps}: expected at most {_MOST_STEPS:,}, the largest int64")
    return int(total_steps)


def known_kinds(source: Any) -> frozenset[Kind] | None:
    """Return the kinds of parameters that a checkpoint is for; None for all, and where there is no checkpoint.

    Raises `CheckpointError` where the card names anything else.
    """
    kinds = None if isinstance(source, tuple) else store.read_card(source).get("kinds")
    if kinds is None:
        return None
    valid = get_args(Kind)
    if not isinstance(kinds, list) or not all(kind in valid for kind in kinds):
        raise CheckpointError(
            f"{source!r}: its card has kinds={kinds!r}, expected a list of {', '.join(valid)}; mend card.json, or take "
            "guard=False, which does not read it"
        )
    return frozenset(kinds)


def resolved(source: Any, rules: Sequence[type[UpdateRule]]) -> tuple[str, UpdateRule, Theta]:
    """Return what messages call the checkpoint, its rule and its θ, in copies; raises `ConfigurationError`, or as
    `load`."""
    match source:
        case str() | os.PathLike():
            return store.name_of(source), *store.load(source, rules)
        case (UpdateRule() as rule, Mapping() as theta):
            return repr(rule), rule, {k: t.detach().clone() for k, t in store.check_theta(rule, dict(theta)).items()}
    # The types alone: θ printed would bury the message.
    came = f"({', '.join(type(x).__name__ for x in source)})" if isinstance(source, tuple) else type(source).__name__
    raise ConfigurationError(
        f"source={came}: expected a checkpoint's name (of {', '.join(store.list_pretrained())}), path or address, or a "
        f"pair (rule, theta); {_START}"
    )


def evaluated(closure: Callable[[], Any] | None, loss: Any) -> Any:
    """Return the loss that ``step`` got, by name or from its closure, called with grad mode on; `ConfigurationError`
    else."""
    if closure is None:
        return loss
    if not callable(closure):
        raise ConfigurationError(
            f"step got a {type(closure).__name__} as closure, expected a function that returns the loss: "
            "step(lambda: loss), which every library passes on; without one, step(loss=loss)"
        )
    with torch.enable_grad():
        found = closure()
    if found is not None and loss is not None:
        raise ConfigurationError("step got loss=, and a closure that returns one, too; leave loss= out")
    return loss if found is None else found  # Lightning's own closure, in manual optimisation, returns nothing


def scalar(loss: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the loss as a 0-d tensor; raises `ConfigurationError`."""
    check_scalar(loss)
    if isinstance(loss, Tensor):
        return loss.detach().to(device, dtype, copy=True).reshape(())
    return torch.full((), float(loss), dtype=dtype, device=device)


def check_scalar(loss: Any) -> None:
    """Raise `ConfigurationError` unless the loss is one number."""
    if not is_scalar(loss):
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ConfigurationError(f"loss is {got}: expected a 0-d tensor or a number, also from a closure")


def is_scalar(loss: Any) -> bool:
    """Say whether the loss is one number, in a tensor or not."""
    return isinstance(loss, numbers.Real) or (isinstance(loss, Tensor) and loss.numel() == 1)
