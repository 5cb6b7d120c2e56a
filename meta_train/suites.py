"""From a configuration to a suite: its tasks, each with what it overrides, and where its curves are kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2o.checks import lookup, unknown
from l2o.disk import resource, user_path
from l2o.evaluation import Setting, Store, Suite
from l2o.types import ConfigurationError, L2OError, TaskFamily
from meta_train.config.build import make

if TYPE_CHECKING:
    from omegaconf import DictConfig


_COMMON = ("steps", "seeds", "seed", "window", "timeout")
"""What a configuration says of all its settings, and each may say otherwise."""


def make_suite(config: DictConfig) -> Suite:
    """Return the tasks of a configuration, under the name and version that its suite has."""
    return Suite(str(config.name), int(config.version), tuple(make_settings(config).values()))


def make_store(config: DictConfig, out: Path) -> Store:
    """Return what was run before: of a suite, the shipped curves, and those of its own folder, to which new ones are
    added."""
    if config.store is None and not config.version:
        return Store(out / "store")
    folder = f"runs/suite-{config.name}" if config.store is None else str(config.store)
    shipped = [path] if config.shipped and (path := shipped_curves(str(config.name))) else []
    return Store(user_path(folder, "store"), shipped)


def shipped_curves(name: str) -> Path | None:
    """Return the folder of the curves of baselines that travel with l2o; None for a suite without."""
    try:
        folder = resource(Path(__file__).resolve().parent, "benchmarks") / "suite" / name
    except L2OError:
        return None
    return folder if folder.is_dir() else None


def make_settings(config: DictConfig) -> dict[str, Setting]:
    """Return the settings of a configuration: the task as it stands, or each of ``settings`` with what it overrides."""
    from omegaconf import OmegaConf

    plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    common = {name: plain[name] for name in _COMMON} | {"revision": plain["version"]}
    named = plain["settings"] or {"": {}}
    if not isinstance(named, dict) or not all(isinstance(own, dict) for own in named.values()):
        raise ConfigurationError(f"settings={named!r}: expected a mapping such as {{wide: {{task: {{width: 128}}}}}}")
    only = {key: lookup("setting", key, named) for key in _listed("only", plain["only"])} or named
    return {key: _setting(plain["task"], plain["half"], {**common, **own}, key) for key, own in only.items()}


def _listed(name: str, value: Any) -> list[str]:
    if not isinstance(value, list):
        raise ConfigurationError(f"{name}={value!r}: expected a list, such as [{value}]")
    return value


def _setting(task: Mapping[str, Any], half: str, own: dict[str, Any], key: str) -> Setting:
    """One setting.  half: of the images, for a task that has halves and does not name one.  own: `Setting`'s fields."""
    valid = ("name", "task", *_COMMON, "split", "revision")
    for name in own:
        if name not in valid:
            raise ConfigurationError(f"settings.{key}: {unknown('key', name, valid)}")
    overrides = own.pop("task", {})
    if not isinstance(overrides, dict):
        raise ConfigurationError(f"settings.{key}.task={overrides!r}: expected settings such as {{width: 128}}")
    task = overrides if "_target_" in overrides else {**task, **overrides}
    family = make(task, f"settings.{key}.task" if key else "task", TaskFamily)
    return Setting(own.pop("name", key or type(family).__name__), _of_half(family, task, half), **own)


def _of_half(family: Any, node: Mapping[str, Any], half: str) -> TaskFamily:
    """``family``, made from ``node``, on that half of its images, also inside augmentations, where none is named."""
    changes: dict[str, Any] = {}
    if isinstance(getattr(family, "family", None), TaskFamily):
        changes["family"] = _of_half(family.family, node.get("family", {}), half)
    if hasattr(family, "half") and "half" not in node:
        changes["half"] = half
    changed: TaskFamily = dataclasses.replace(family, **changes) if changes else family
    return changed
