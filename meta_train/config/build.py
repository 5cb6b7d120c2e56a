"""From nodes of a configuration to objects: what is named is imported, what it takes is checked, errors say where."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from l2o.checks import unknown
from l2o.disk import sha256
from l2o.family_checks import checked_batch, checked_init, checked_sample
from l2o.types import ConfigurationError, L2OError, Split, TaskFamily, UnknownNameError
from l2o.unroll import lane_losses
from meta_train.config.compose import one_line


def make(node: Mapping[str, Any], what: str, *bases: type) -> Any:
    """Return the object of one of the classes that a node describes: its ``_target_``, called with the rest of the
    node.

    what: name of the node, for messages. Nodes inside it are made first. Lists become tuples, since rules and tasks are
    frozen dataclasses.
    Raises `UnknownNameError` for a target that cannot be imported, `ConfigurationError` for settings it does not take.
    """
    if "_target_" not in node:
        raise ConfigurationError(
            f"{what} has settings but is not chosen; choose it in its group, or give {what}._target_"
        )
    made = partial(node, what)()
    if not isinstance(made, bases):
        expected = " or a ".join(base.__name__ for base in bases)
        raise ConfigurationError(f"{what}._target_={node['_target_']!r}: expected a {expected}")
    return made


def partial(node: Mapping[str, Any], what: str, *later: str) -> Callable[..., Any]:
    """Return what a node names, with its settings filled in; ``later`` are the arguments that it is still called
    with."""
    from hydra.errors import HydraException
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    try:
        call = instantiate(OmegaConf.create({"_target_": node["_target_"]}), _partial_=True)
    except HydraException as error:
        raise UnknownNameError(_not_importable(node["_target_"], f"{what}._target_", error)) from error
    settings = {key: _setting(value, f"{what}.{key}") for key, value in node.items() if key != "_target_"}
    signature = inspect.signature(call.func)
    try:
        signature.bind(**settings, **dict.fromkeys(later))
    except TypeError as error:
        valid = ", ".join(name for name in signature.parameters if name not in later)
        raise ConfigurationError(f"{what}: {call.func.__name__} {error}; it takes {valid}") from error

    @functools.wraps(call.func)
    def called(*arguments: Any, **named: Any) -> Any:
        with refused(f"{what}: {call.func.__name__}"):
            return call.func(*arguments, **named, **settings)

    return called


def _setting(value: Any, what: str) -> Any:
    """The value of a setting, with the nodes in it made: the family of an augmentation, those of a mixture."""
    if isinstance(value, list):
        return tuple(_setting(each, what) for each in value)
    if not isinstance(value, Mapping):
        return value
    if "_target_" in value:
        return make(value, what, object)
    return {key: _setting(each, f"{what}.{key}") for key, each in value.items()}


@contextlib.contextmanager
def refused(what: str) -> Iterator[None]:
    """Turn what classes raise for a wrong setting into a `ConfigurationError` that says whose setting it was."""
    try:
        yield
    except ConfigurationError as error:
        raise ConfigurationError(f"{what}: {error}") from error
    except L2OError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{what}: {one_line(error)}; check the settings given to it") from error


def import_classes(paths: Iterable[str], what: str, base: type) -> tuple[type, ...]:
    """Return the subclasses of ``base`` at the import paths that the user named, such as ``my_module.MyRule``."""
    classes = []
    for path in paths:
        module, _, name = str(path).rpartition(".")
        try:
            classes.append(getattr(importlib.import_module(module), name))
        except Exception as error:  # whatever importing a user's module raises, the answer is the same
            raise UnknownNameError(_not_importable(path, what, error)) from error
        if not (isinstance(classes[-1], type) and issubclass(classes[-1], base)):
            raise ConfigurationError(f"{what}: {path!r} is no subclass of {base.__name__}; derive it")
    return tuple(classes)


def _not_importable(path: Any, what: str, error: Exception) -> str:
    """The message for an import path: where its module says what it has, the nearest of that and all of it."""
    module, _, name = str(path).rpartition(".")
    try:
        found = importlib.import_module(module)
        valid = () if hasattr(found, name) else tuple(found.__all__)
    except Exception:  # whatever importing a user's module raises, it has no list then
        valid = ()
    if valid:
        return f"{what}: {unknown(f'name in {module}', name, valid)}"
    return f"{what}: cannot import {path!r} ({one_line(error)}); expected module.Class, found from this folder"


def source_digest(*made: object) -> str:
    """Return the hex digest of the source files of the classes of these objects, and of their bases."""
    digests = set()
    for cls in (cls for each in made for cls in type(each).__mro__ if cls.__module__ != "l2o.types"):
        with contextlib.suppress(OSError, TypeError):  # built-in ones, and those typed into an interpreter, have none
            digests.add(sha256(inspect.getfile(cls)))
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


def probe(family: TaskFamily, splits: Iterable[Split], device: torch.device) -> None:
    """Take the loss of a batch of each split, so that missing data, and what a family gets wrong, is noticed before
    anything is run or written."""
    generator = torch.Generator(device).manual_seed(0)
    data = checked_sample(family, generator, 1)
    params, buffers = checked_init(family, data, generator)
    for split in splits:
        batch = checked_batch(family, data, split, generator)
        with torch.no_grad():
            lane_losses(family, params, buffers, data, batch)
