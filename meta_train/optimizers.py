"""The optimizers that a command line gives to be judged: learned ones by name, any torch optimizer by import path."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from l2o.checkpoints.store import load
from l2o.checks import check_float, lookup
from l2o.evaluation import Baseline, Entrant, RuleEntrant, TorchEntrant
from l2o.evaluation.baselines import cosine, half_cosine, imported, linear, torch_optimizer
from l2o.evaluation.compare import GIVEN, LEARNED
from l2o.evaluation.entrants import UNTUNED, switch
from l2o.types import ConfigurationError, L2OError, Theta, UnknownNameError, UpdateRule
from meta_train.config.build import import_classes
from meta_train.config.compose import one_line

SCHEDULES = {"constant": None, "warmup_cosine": cosine, "cosine": half_cosine, "linear": linear}
"""By the name that ``schedule`` has in the mapping of an optimizer."""


def judged(config: Any) -> dict[str, Entrant]:
    """Return the optimizers of ``optimizers``, or else of ``source``, by their names in a comparison.

    Each is a pretrained name, a checkpoint's path or address; the import path of a torch optimizer, such as
    ``torch.optim.AdamW`` or ``my_module:MyOptimizer``; or a mapping with ``path`` (of an optimizer), and of ``label``,
    ``lr`` or a grid ``rates``, ``schedule`` and ``clip`` what is to be said; other keys go to the optimizer.
    """
    name = "source" if config.get("optimizers") is None else "optimizers"
    given = _plain(config[name])
    labels = [str(each.get("label", each.get("path"))) if isinstance(each, Mapping) else str(each) for each in given]
    if not given or len(set(labels)) < len(labels):
        raise ConfigurationError(f"{name}={labels}: expected a name, or several different ones, as [default,light]")
    classes = import_classes(config.rules, "rules", UpdateRule)
    found: dict[str, Entrant] = {}
    for label, each in zip(labels, given, strict=True):
        if isinstance(each, Mapping) or (name == "optimizers" and _is_import_path(label)):
            found[f"{GIVEN} {label}"] = torch_entrant(label, each if isinstance(each, Mapping) else {"path": label})
        else:
            key = LEARNED if LEARNED not in found else f"{LEARNED} {label}"
            found[key] = RuleEntrant(label, *_loaded(label, classes, name))
    return found


def _loaded(label: str, classes: Sequence[type[UpdateRule]], name: str) -> tuple[UpdateRule, Theta]:
    try:
        return load(label, rules=classes)
    except UnknownNameError as error:
        if name == "source":
            raise
        raise UnknownNameError(f"{error}; an optimizer of torch's kind goes by module:Class") from error


def _plain(value: Any) -> list[Any]:
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    return plain if isinstance(plain, list) else [plain]


def _is_import_path(text: str) -> bool:
    """Rather than a checkpoint: ``module:Name``, or a dotted name whose first part can be imported."""
    if "/" in text or Path(text).exists():
        return False
    package = text.replace(":", ".").partition(".")[0]
    return ":" in text or ("." in text and package.isidentifier() and importlib.util.find_spec(package) is not None)


def torch_entrant(label: str, said: Mapping[str, Any]) -> TorchEntrant:
    """Return the torch optimizer that a mapping describes, see `judged`; untuned unless it has ``rates``."""
    settings = dict(said)
    path, schedule = settings.pop("path", None), settings.pop("schedule", "constant")
    if not isinstance(path, str):
        raise ConfigurationError(f"optimizers: {dict(said)!r}: expected path, as in {{path: torch.optim.AdamW}}")
    settings.pop("label", None)
    rates, clip = settings.pop("rates", None), settings.pop("clip", None)
    if clip is not None:
        check_float("clip", clip, above=0.0)
    grid = UNTUNED if rates is None else tuple(check_float("rates", rate, above=0.0) for rate in _plain(rates))
    if not grid:
        raise ConfigurationError(f"{label}: rates=[]: expected learning rates, or leave rates out for a single run")
    make = partial(torch_optimizer, imported(path), **settings)  # the class, whose source its curves belong to
    return TorchEntrant(label, make, lookup("schedule", str(schedule), SCHEDULES), grid, clip)


def check(entrants: Iterable[Entrant]) -> None:
    """Take one step with each torch optimizer, on a matrix and a vector: what is wrong is said before any work."""
    for entrant in {entrant.label: entrant for entrant in entrants}.values():
        if isinstance(entrant, TorchEntrant):
            params = [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))]
            try:
                made = entrant.make(params, entrant.rates[0])
                switch(made, "train")
                for optimizer in made:
                    for p in params:
                        p.grad = torch.ones_like(p)
                    optimizer.step()
            except L2OError:
                raise
            except Exception as error:  # whatever an optimizer raises for its settings, or without a closure
                raise ConfigurationError(
                    f"{entrant.label}: {one_line(error)}; check its settings, and that it steps without a closure"
                ) from error


def describe(entrant: Entrant) -> str:
    """Return what an optimizer is, in a line of a report."""
    if isinstance(entrant, RuleEntrant):
        return f"{entrant.rule!r}, size of θ: {sum(t.numel() for t in entrant.theta.values()):,}"
    return repr(entrant.rule) if isinstance(entrant, Baseline) else repr(getattr(entrant, "make", entrant))
