"""What a stored curve belongs to: a digest of everything that decides it, and of nothing else."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from l2o.evaluation.baselines import EXTRA
from l2o.evaluation.entrants import Entrant
from l2o.evaluation.trials import Setting

_OURS = ("l2o", "torch", "numpy", "builtins", "functools", *EXTRA)
"""Packages whose changes a suite's version, or their own, says; of other code the source is part of the identity."""
_BESIDE = ("label", "rates", "name", "split", "seeds", "timeout")
"""Fields that say nothing of a single curve: names, and what its rate, its seed and, of a time-out, its facts say."""


def digest(*parts: Any) -> str:
    """Return the hex digest of JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def curve_key(suite: str, setting: Setting, entrant: Entrant, rate: float | None, seed: int) -> str:
    """Return the name of one curve.  suite: its name.     seed: which of the setting's problems, from 0."""
    # What a family draws that is not keyed depends on how many problems it draws at once.
    problem = seed if setting.family.keyed else [seed, setting.seeds]
    return digest(suite, fields(setting), setting.smoothing, fields(entrant), rate, problem)


def identity(made: Any) -> Any:
    """Return classes and fields that are not at their defaults, as JSON: a new field with a default changes no
    identity.

    Tensors are named by their bytes; functions and classes by their import path, and those that neither l2o nor a
    library brings by their source too.
    """
    if dataclasses.is_dataclass(made) and not isinstance(made, type):
        return {"class": _code(type(made)), **fields(made)}
    if isinstance(made, functools.partial):
        return {"call": identity(made.func), "of": identity(made.args), "with": identity(made.keywords)}
    if isinstance(made, Tensor | np.ndarray):
        array = made.detach().cpu().numpy() if isinstance(made, Tensor) else made
        return f"{array.dtype}{list(array.shape)} {hashlib.sha256(array.tobytes()).hexdigest()}"
    if isinstance(made, Mapping):
        return {str(key): identity(value) for key, value in made.items()}
    if isinstance(made, tuple | list):
        return [identity(value) for value in made]
    if isinstance(made, bool | int | float | str | None):
        return made
    return _code(made) if callable(made) and hasattr(made, "__qualname__") else f"{_code(type(made))} {made!r}"


def fields(made: Any) -> dict[str, Any]:
    """Return those of a dataclass that are not at their defaults, by name, but for what says nothing of a single
    curve."""
    said = ((f, getattr(made, f.name)) for f in dataclasses.fields(made) if f.name not in _BESIDE)
    return {f.name: identity(value) for f, value in said if not _same(value, f.default)}


def _same(value: Any, default: Any) -> bool:
    return (
        type(value) is type(default) and isinstance(value, bool | int | float | str | tuple | None) and value == default
    )


def _code(made: Any) -> str:
    """The name of a function or class without its module, which may move; with the source of a user's own."""
    if made.__module__.split(".")[0] in _OURS:
        return str(made.__qualname__)
    for part in (inspect.getmodule(made), made):  # the whole file, for what it calls there; else, as of notebooks, it
        try:
            return f"{made.__qualname__} {hashlib.sha256(inspect.getsource(part).encode()).hexdigest()}"  # type: ignore[arg-type]
        except (OSError, TypeError):
            continue
    return f"{made.__module__}.{made.__qualname__}"  # typed into an interpreter
