"""Hand-designed optimizers: with the grid of learning rates that they are tuned over, or untuned."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from l2o.checks import check_int, lookup
from l2o.evaluation.curves import Begun, begin
from l2o.evaluation.entrants import Entrant, MakeOptimizers, TorchEntrant
from l2o.meta import warmup_cosine
from l2o.rules import SGD, AdaGrad, Adam, Momentum, RMSProp, Scheduled
from l2o.tasks import Repeated
from l2o.types import ConfigurationError, TaskFamily, Theta, UnknownNameError, UpdateRule

EXTRA = ("pytorch_optimizer", "schedulefree", "prodigyopt")
"""Packages of the extra ``baselines``."""


@dataclass(frozen=True)
class Baseline:
    """A rule and the learning rates that it is tried with, all in one vectorised run; an `Entrant`.

    rates: the grid of learning rates.
    rule: has a field ``lr``, which they replace; its other fields stay as they are in every trial.
    cosine: run it `Scheduled` instead of at a constant learning rate.
    """

    label: str
    rule: Any
    rates: tuple[float, ...]
    cosine: bool = False

    def begin(self, family: TaskFamily, steps: int, seeds: int, generator: torch.Generator) -> Begun:
        # Adjacent lanes share a seed's problem, and the grid runs fastest.
        theta = {k: t.repeat(seeds, *[1] * (t.ndim - 1)) for k, t in self.thetas(generator).items()}
        copies = Repeated(family, len(self.rates))
        return begin(self.scheduled_rule(), theta, copies, steps, generator)

    def scheduled_rule(self) -> UpdateRule:
        """Return the rule that is run; the learning rate is in its θ."""
        return Scheduled(self.rule) if self.cosine else self.rule

    def thetas(self, generator: torch.Generator) -> Theta:
        """Return θ of every trial, ``[len(rates), ...]`` on the generator's device; draws nothing from it."""
        trials = [replace(self.rule, lr=lr).init_theta(generator) for lr in self.rates]
        return {name: torch.stack([theta[name] for theta in trials]) for name in trials[0]}


def half_decades(first: float, last: float) -> tuple[float, ...]:
    """Return learning rates from ``10**first`` to ``10**last``, two a decade."""
    return tuple(10.0 ** (first + i / 2) for i in range(round((last - first) * 2) + 1))


def torch_optimizer(
    cls: Callable[..., torch.optim.Optimizer] | str, params: list[nn.Parameter], rate: float | None, /, **settings: Any
) -> list[torch.optim.Optimizer]:
    """Return one optimizer of a class, or of its import path, at ``rate``; None for ``settings``' own or the class's
    default.

    A path ``module:Name`` or ``module.Name`` is imported here, so that what is not installed is missed only where used.
    """
    made = imported(cls) if isinstance(cls, str) else cls
    return [made(params, **settings, **({} if rate is None else {"lr": rate}))]


def imported(path: str) -> Any:
    """Return what lies at an import path. Raises `UnknownNameError`, which names the extra of a baseline that needs
    one."""
    module, _, name = path.replace(":", ".").rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        extra = module.split(".")[0] in EXTRA
        way_out = "pip install 'l2o[baselines]'" if extra else "expected module.Class or module:Class, found from here"
        raise UnknownNameError(f"optimizer {path!r} cannot be imported ({error}); {way_out}") from error


def adamw(lr: float) -> MakeOptimizers:
    """Return AdamW with torch's decay of weights, at ``lr`` where no trial has another."""
    return partial(_at, lr, partial(torch_optimizer, torch.optim.AdamW))


def _at(
    lr: float, make: MakeOptimizers, params: list[nn.Parameter], rate: float | None = None
) -> Sequence[torch.optim.Optimizer]:
    return make(params, lr if rate is None else rate)


def muon_adamw(params: list[nn.Parameter], rate: float | None) -> list[torch.optim.Optimizer]:
    """Return `torch.optim.Muon` as it stands for matrices, its steps scaled to AdamW's size; AdamW for the rest."""
    lr = 1e-3 if rate is None else rate
    matrices, rest = ([p for p in params if (p.ndim == 2) is is_matrix] for is_matrix in (True, False))
    muons = [torch.optim.Muon(matrices, lr=lr, adjust_lr_fn="match_rms_adamw")] if matrices else []
    return [*muons, *([torch.optim.AdamW(rest, lr=lr)] if rest else [])]


def muon(params: list[nn.Parameter], rate: float | None = None) -> list[torch.optim.Optimizer]:
    """Return orthogonalised momentum for what has two axes, with an RMS of 0.7 × ``rate`` (0.003); Adam for the
    rest."""
    lr = 0.003 if rate is None else rate
    matrices, rest = ([p for p in params if (p.ndim == 2) is is_matrix] for is_matrix in (True, False))
    # "match_rms_adamw" is an RMS of 0.2 × lr.
    settings: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=3.5 * lr, **settings))
    if rest:
        optimizers.append(torch.optim.Adam(rest, lr=lr))
    return optimizers


@cache
def cosine(step: int, total: int) -> float:
    """Return the factor of `Scheduled`."""
    return warmup_cosine(step, total, total // 20)


@cache
def half_cosine(step: int, total: int) -> float:
    """Return a factor that falls from 1 to 0 by half a cosine, without warm-up."""
    return warmup_cosine(step, total, 0)


def linear(step: int, total: int) -> float:
    """Return a factor that falls from 1 to 0."""
    return 1.0 - step / total


SOAP = "pytorch_optimizer.SOAP"
"""Vyas et al. 2024 (arXiv 2409.11321)."""
_FREE = partial(torch_optimizer, "schedulefree.AdamWScheduleFree")
"""Defazio et al. 2024 (arXiv 2405.15682)."""
_ADAM = half_decades(-4.0, 0.5)
_NARROW = half_decades(-4.0, 0.0)
_ADAMW = partial(torch_optimizer, torch.optim.AdamW)

BASELINES: dict[str, Entrant] = {
    "sgd": Baseline("SGD", SGD(), half_decades(-4.0, 2.0)),
    "heavy_ball": Baseline("heavy-ball momentum", Momentum(), half_decades(-5.0, 0.0)),
    "momentum": Baseline("Nesterov momentum", Momentum(nesterov=True), half_decades(-5.0, 0.0)),
    "momentum_cosine": Baseline("Nesterov, warm-up + cosine", Momentum(nesterov=True), half_decades(-5.0, 0.0), True),
    "rmsprop": Baseline("RMSProp", RMSProp(), _NARROW),
    "adagrad": Baseline("AdaGrad", AdaGrad(), half_decades(-3.5, 0.5)),
    "adam": Baseline("Adam", Adam(), _ADAM),
    "adam_cosine": Baseline("Adam, warm-up + cosine", Adam(), _ADAM, cosine=True),
    "adamw_tuned": TorchEntrant("AdamW", _ADAMW, None, _NARROW),
    "adamw_cosine": TorchEntrant("AdamW, warm-up + cosine", _ADAMW, cosine, _NARROW),
    "adamw_clipped": TorchEntrant("AdamW, warm-up + cosine, clipped at 1", _ADAMW, cosine, _NARROW, clip=1.0),
    "nadamw": TorchEntrant(
        "NAdamW, warm-up + cosine",
        partial(torch_optimizer, torch.optim.NAdam, decoupled_weight_decay=True, weight_decay=0.01),
        cosine,
        _NARROW,
    ),
    "adafactor": TorchEntrant(
        "Adafactor, warm-up + cosine", partial(torch_optimizer, torch.optim.Adafactor), cosine, half_decades(-3.5, 0.5)
    ),
    "muon_adamw": TorchEntrant("Muon + AdamW, warm-up + cosine", muon_adamw, cosine, _NARROW),
    "soap": TorchEntrant("SOAP, warm-up + cosine", partial(torch_optimizer, SOAP), cosine, _NARROW),
    "schedule_free_tuned": TorchEntrant("Schedule-Free AdamW", _FREE, None, _NARROW),
    "adamw": TorchEntrant("AdamW 0.001", adamw(1e-3)),
    "adamw_cosine_fixed": TorchEntrant("AdamW 0.003, warm-up + cosine", adamw(3e-3), cosine),
    "muon": TorchEntrant("Muon + Adam 0.003, linear decay", muon, linear),
    "prodigy": TorchEntrant("Prodigy, cosine", partial(torch_optimizer, "prodigyopt.Prodigy"), half_cosine),
    "schedule_free": TorchEntrant("Schedule-Free AdamW, default rate", _FREE),
    "soap_fixed": TorchEntrant("SOAP 0.003, warm-up + cosine", partial(torch_optimizer, SOAP, lr=3e-3), cosine),
}
"""By name. Those with a grid are tuned: it is wide enough that the best rate lies inside it on the tasks shipped here;
reports say so where it does not. Rules run vectorised; tests have them equal to the torch optimizers of their names,
and Adam with warm-up and cosine is AdamW without weight decay. The last ones have one trial, at the rate that a user
would pick untuned."""


def baselines(names: Iterable[str], wider: int = 0) -> dict[str, Entrant]:
    """Return the baselines of these names. Raises `UnknownNameError` with the nearest and all valid names.

    wider: so many half-decades further up goes every grid.
    """
    if isinstance(names, str):
        raise ConfigurationError(f"baselines={names!r}: expected a list, such as [{names}]")
    return {name: _widened(lookup("baseline", name, BASELINES), check_int("wider", wider, 0)) for name in names}


def _widened(entrant: Any, by: int) -> Entrant:
    last = entrant.rates[-1]
    if last is None or not by:
        return entrant
    top = round(2 * math.log10(last)) / 2
    return replace(entrant, rates=(*entrant.rates, *half_decades(top + 0.5, top + by / 2)))
