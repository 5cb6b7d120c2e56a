"""Choices on the command line that need no file: ``rule=NAME`` and ``task=NAME`` for classes as they stand."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from hydra.core.config_store import ConfigStore

import l2o.rules
import l2o.tasks


def enter_classes(folder: Path) -> None:
    """Enter every rule of ``l2o.rules.__all__`` by the name of its module, and every family of ``l2o.tasks.__all__``
    that needs no setting in snake case, unless a file in the ``folder`` of configs gives it another name."""
    store = ConfigStore.instance()
    named = {path.read_text("utf-8").strip() for path in (folder / "task").glob("*.yaml")}
    for group, name, target in _choices():
        if f"_target_: {target}" not in named:
            store.store(group=group, name=name, node={"_target_": target})


def _choices() -> Iterator[tuple[str, str, str]]:
    for name in l2o.rules.__all__:
        yield "rule", getattr(l2o.rules, name).__module__.rpartition(".")[2], f"l2o.rules.{name}"
    for name in l2o.tasks.__all__:
        cls = getattr(l2o.tasks, name)
        if isinstance(cls, type) and not any(_is_required(field) for field in dataclasses.fields(cls)):
            yield "task", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower(), f"l2o.tasks.{name}"


def _is_required(field: dataclasses.Field[object]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
