"""From a configuration to a session: everything it names is built here, and nothing is written."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from l2o.evaluation.trials import Setting
from l2o.hub import load
from l2o.meta import MetaTraining
from l2o.types import ConfigurationError, L2OError, MetaGradient, TaskFamily, Theta, UpdateRule
from meta_train._config import build, resolve_device
from meta_train.held_out import HeldOut
from meta_train.run import RunFolder
from meta_train.session import Session

LEAST = {"steps": 1, "log_every": 1, "checkpoint_every": 1, "evaluate_every": 0, "seed": 0}
"""The smallest value of each whole number."""


def make_session(folder: RunFolder) -> Session:
    """Build all that the configuration names, and put it where the folder's state left off.

    Raises the errors of `l2o.types`, for whatever does not exist, does not fit, or makes no sense.
    """
    config = folder.config
    _check_numbers(config)
    device = resolve_device(config["device"])
    rule, family = _make(config["rule"], "rule", UpdateRule), _make(config["task"], "task", TaskFamily)
    estimator: MetaGradient = _partial(config["estimator"], "estimator", "rule", "family")(rule=rule, family=family)
    loggers = [_make(node, f"logger.{name}", object) for name, node in (config["logger"] or {}).items()]
    held_out = HeldOut(rule, _held_out_setting(config, estimator), device)
    generator = torch.Generator(device).manual_seed(config["seed"])
    with _one_line("rule"):
        theta = rule.init_theta(generator)
    if config["init_from"] and folder.state is None:
        theta = _warm_start(config["init_from"], rule)
    optimizer, schedule = _partial(config["outer"], "outer", "params"), _partial(config["schedule"], "schedule", "step")
    return Session(folder, MetaTraining(estimator, theta, optimizer, generator, schedule), held_out, loggers)


def _make(node: dict[str, Any], what: str, base: type) -> Any:
    if "_target_" not in node:
        raise ConfigurationError(
            f"{what} has settings but is not chosen; choose it in its group, or give {what}._target_"
        )
    made = build(OmegaConf.create(node), what)
    if not isinstance(made, base):
        raise ConfigurationError(f"{what}._target_={node['_target_']!r}: expected a {base.__name__}")
    return made


def _partial(node: dict[str, Any], what: str, *later: str) -> Callable[..., Any]:
    """What a node names, with its settings filled in; ``later`` are the arguments that it is still called with."""
    with _one_line(what):
        call = instantiate(OmegaConf.create(node), _convert_="all", _partial_=True)
    try:
        inspect.signature(call.func).bind(**call.keywords, **dict.fromkeys(later))
    except TypeError as error:
        valid = ", ".join(name for name in inspect.signature(call.func).parameters if name not in later)
        raise ConfigurationError(f"{what}: {call.func.__name__} {error}; it takes {valid}") from error

    @functools.wraps(call.func)
    def make(*arguments: Any, **named: Any) -> Any:
        with _one_line(what):
            return call.func(*arguments, **named, **call.keywords)

    return make


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Classes of others say in other ways that a setting is of the wrong type or size."""
    try:
        yield
    except L2OError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{what}: {error}; check the settings given to it") from error


def _held_out_setting(config: dict[str, Any], estimator: MetaGradient) -> Setting:
    """The tasks of ``evaluation``: those of the run, but for the settings that it overrides."""
    own = config["evaluation"]
    family = _make({**config["task"], **own["task"]}, "evaluation.task", TaskFamily)
    steps = own["steps"] or getattr(estimator, "horizon", None)
    if steps is None:
        raise ConfigurationError(f"evaluation.steps: {type(estimator).__name__} has no horizon of its own; give one")
    return Setting("held out", family, steps, own["seeds"], own["seed"])


def _warm_start(source: str, rule: UpdateRule) -> Theta:
    saved, theta = load(source, rules=(type(rule),))
    if saved != rule:
        raise ConfigurationError(f"init_from={source!r} is of {saved}, this run of {rule}: give both the same settings")
    return theta


def _check_numbers(config: dict[str, Any]) -> None:
    for name, least in LEAST.items():
        value = config[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigurationError(f"{name}={value!r}: expected a whole number of at least {least}")
