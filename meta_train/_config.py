"""What the commands share: where the configs are, how a node becomes an object, the device, and one-line errors."""

from __future__ import annotations

import difflib
import functools
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from l2o._resources import resource
from l2o.types import ConfigurationError, L2OError, UnknownNameError

if TYPE_CHECKING:
    from hydra.errors import HydraException
    from omegaconf import DictConfig

EXTRA = ("hydra", "omegaconf", "rich", "matplotlib", "sklearn", "wandb", "higher")
"""Packages of the extra ``train`` that a command may find missing."""


def config_path() -> str:
    """Absolute path of the folder of configs: inside the package in a wheel, at the top of an editable checkout."""
    return str(resource(Path(__file__).resolve().parent, "configs"))


def open_settings(arguments: Iterable[str], nodes: Sequence[str]) -> list[str]:
    """A command line on which settings under ``nodes``, such as ``task.width=3``, need no ``+``.

    What they may be is known by the class that they are for, not by the YAML.
    """
    opened = re.compile(rf"({'|'.join(nodes)})\.[\w.]+=")
    return [f"++{argument}" if opened.match(argument) else argument for argument in arguments]


def resolve_device(name: str) -> torch.device:
    """The device that ``device=name`` means; ``auto`` is the GPU where there is one."""
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigurationError(f"device={name!r}: expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(
            "device='cuda': this machine has no usable CUDA device; take device=auto or device=cpu"
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def build(node: DictConfig, what: str) -> Any:
    """The object that a config node describes: its ``_target_``, called with the rest of the node.

    what: name of the node, for messages. Lists become tuples, since rules and tasks are frozen dataclasses.
    Raises `UnknownNameError` for a target that cannot be imported, `ConfigurationError` for settings it does not take.
    """
    from hydra.errors import HydraException
    from hydra.utils import instantiate

    try:
        call = instantiate(node, _convert_="all", _partial_=True)
    except HydraException as error:
        raise UnknownNameError(
            f"{what}: {_first_line(error)}; expected an import path that this folder can import"
        ) from error
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in call.keywords.items()}
    try:
        inspect.signature(call.func).bind(**settings)
    except TypeError as error:
        valid = ", ".join(inspect.signature(call.func).parameters)
        raise ConfigurationError(f"{what}: {call.func.__name__} {error}; it takes {valid}") from error
    return call.func(**settings)


def import_classes(paths: Iterable[str], what: str) -> tuple[type, ...]:
    """The classes of the import paths that the user named, such as ``my_module.MyRule``."""
    from hydra.utils import get_class

    classes = []
    for path in paths:
        try:
            classes.append(get_class(path))
        except Exception as error:  # whatever importing a user's module raises, the answer is the same
            raise UnknownNameError(
                f"{what}={path!r}: {_first_line(error)}; expected module.Class, importable here"
            ) from error
    return tuple(classes)


def main_guard(command: Callable[[], None]) -> Callable[[], None]:
    """Wrap a command: errors of the user's input become one line on stderr and exit status 2, others keep their trace.

    The environment variable ``HYDRA_FULL_ERROR=1`` shows the trace of all of them.
    """

    @functools.wraps(command)
    def guarded() -> None:
        full = os.environ.get("HYDRA_FULL_ERROR", "0") == "1"
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then hands its errors on instead of printing them and exiting
        try:
            command()
        except Exception as error:
            message = _message(error)
            if full or message is None:
                raise
            print(f"error: {message}", file=sys.stderr)
            sys.exit(2)

    return guarded


def _message(error: Exception) -> str | None:
    """One line for an error of the user's input; None for any other."""
    if isinstance(error, L2OError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and str(error.name).split(".")[0] in EXTRA:
        return f"{error.name} is not installed; the commands need: pip install l2o[train]"
    if "hydra" not in sys.modules:
        return None
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, HydraException):
        return _composition_message(error)
    return _first_line(error) if isinstance(error, OmegaConfBaseException) else None


def _composition_message(error: HydraException) -> str:
    from hydra.errors import MissingConfigException

    if not isinstance(error, MissingConfigException) or error.missing_cfg_file is None:
        cause = f": {_first_line(error.__cause__)}" if error.__cause__ else ""
        return f"{_first_line(error)}{cause}"
    group, _, name = error.missing_cfg_file.rpartition("/")
    return unknown(group or "config", name, error.options or [])


def unknown(kind: str, name: str, valid: Sequence[str]) -> str:
    """The text for a name that does not exist: the nearest ones and all valid ones."""
    near = difflib.get_close_matches(name, valid)
    hint = f", did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"unknown {kind} {name!r}{hint}; valid: {', '.join(sorted(valid))}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
