"""Who imports whom: the house's directions, what ``import l2o`` needs, and what the listed classes are."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from conftest import ROOT
from hydra.core.config_store import ConfigStore

import l2o.rules
import l2o.tasks
from l2o.checks import listed
from l2o.types import TaskFamily, UpdateRule
from meta_train.config.groups import enter_classes

SUPPORT = {"errors", "types", "checks", "disk", "download", "family_checks", "random", "distributed"}
ENGINE = SUPPORT | {"ops", "unroll", "estimators", "meta"}
PLUGIN = SUPPORT | {"ops", "rules", "checkpoints", "optim"}
ROOMS = ENGINE | PLUGIN | {"kernels", "fused", "tasks", "interop", "integrations", "extras"}
UNITS = ROOMS | {"evaluation", "inspection", "bench"}

# Unit of l2o -> the other units that its modules may import, deferred imports included. "l2o" is the package's own
# ``__init__``, which imports the rest, so that nobody inside may import it.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "types": {"errors"},
    "checks": {"types"},
    "disk": {"types"},
    "download": {"types", "disk"},
    "extras": {"types"},
    "family_checks": {"types"},
    "random": set(),
    "distributed": {"types"},
    "ops": {"types", "checks"},
    "kernels": {"types", "checks", "disk", "ops", "random"},
    "rules": {"types", "checks", "ops", "kernels"},
    "tasks": SUPPORT | {"ops"},
    "fused": {"types", "ops", "kernels", "rules", "tasks"},
    "unroll": {"types", "family_checks", "ops", "fused"},
    "estimators": SUPPORT | {"ops", "rules", "tasks", "unroll", "fused"},
    "meta": SUPPORT | {"ops", "estimators"},
    "checkpoints": SUPPORT | {"rules"},
    "interop": {"types", "checks", "disk", "checkpoints", "ops", "rules"},
    "optim": {"types", "checks", "distributed", "ops", "rules", "checkpoints", "fused"},
    "integrations": ROOMS,
    "evaluation": ROOMS | {"bench"},
    "inspection": ROOMS | {"evaluation"},
    "bench": ROOMS | {"evaluation"},
    "l2o": UNITS,
    "__main__": {"meta_train"},
    "meta_train": UNITS | {"l2o"},
}

# Package that an extra installs -> the only place that may import it.
HOMES = {
    "accelerate": "meta_train.library_checks",
    "higher": ("l2o.integrations", "meta_train.library_checks"),
    "hydra": "meta_train",
    "lightning": "meta_train.library_checks",
    "msgpack": "l2o.interop.msgpack",
    "omegaconf": "meta_train",
    "peft": "meta_train.library_checks",
    "transformers": "meta_train.library_checks",
    "triton": "l2o.kernels.mlp_triton",
    "wandb": "meta_train",
}
OPTIONAL = {"l2o.kernels.mlp_triton": "triton"}
"""Modules of the library that need an extra, and are imported where they are used."""
COMMANDS = "bench convert documents drawings evaluate gpu guard inspect landscape libraries replay report rules_table"
ENTRY_POINTS = {f"meta_train.{name}" for name in (*COMMANDS.split(), "ablation", "train", "users")}
CORE = {"torch", "numpy", "safetensors"}
ABSENT = [
    "msgpack",
    "hydra",
    "omegaconf",
    "wandb",
    "higher",
    "rich",
    "matplotlib",
    "skimage",
    "sklearn",
    "scipy",
    "pandas",
    "tensorboard",
    "triton",
]
HEAVY = ["torch._dynamo", "torch._inductor", "torch.onnx", "torch.utils.tensorboard", "torch.testing", "sympy"]

FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("l2o", "meta_train")
    for path in sorted((ROOT / package).rglob("*.py"))
}


class Import(NamedTuple):
    """target: absolute dotted name.    at_once: whether it runs when the module is imported."""

    target: str
    at_once: bool


def _targets(node: ast.AST, package: str) -> Iterator[str]:
    """The modules that one statement imports; ``from a import b`` is ``a.b`` where that is a module, else ``a``."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        base = ".".join([*parents, *([node.module] if node.module else [])])
        for alias in node.names:
            yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in FILES else base


def _walk(node: ast.AST, package: str, at_once: bool) -> Iterator[Import]:
    deferred = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
        isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
    )
    for child in ast.iter_child_nodes(node):
        yield from (Import(target, at_once and not deferred) for target in _targets(child, package))
        yield from _walk(child, package, at_once and not deferred)


def _imports(module: str, source: str, is_package: bool) -> set[Import]:
    package = module if is_package else module.rpartition(".")[0]
    return set(_walk(ast.parse(source), package, at_once=True))


def _unit(module: str) -> str:
    """``l2o.rules.adam`` -> ``rules``; both packages' roots, and all of ``meta_train``, are units themselves."""
    parts = module.split(".")
    return parts[1] if parts[0] == "l2o" and len(parts) > 1 else parts[0]


IMPORTS = {name: _imports(name, path.read_text("utf-8"), path.stem == "__init__") for name, path in FILES.items()}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch.nn as nn", {("torch.nn", True)}),
        ("from l2o import types", {("l2o.types", True)}),
        ("from l2o import load", {("l2o", True)}),
        ("from . import sgd", {("l2o.rules.sgd", True)}),
        ("from .sgd import SGD", {("l2o.rules.sgd", True)}),
        ("from ..types import Theta", {("l2o.types", True)}),
        ("def f():\n    import sklearn", {("sklearn", False)}),
        ("if TYPE_CHECKING:\n    import hydra", {("hydra", False)}),
        ("try:\n    import rich\nexcept ImportError: ...", {("rich", True)}),
    ],
)
def test_the_reader_sees_every_form_of_import(source: str, expected: set[tuple[str, bool]]) -> None:
    assert _imports("l2o.rules.adam", source, is_package=False) == expected


@pytest.mark.parametrize("module", FILES)
def test_imports_follow_the_house(module: str) -> None:
    unit = _unit(module)
    assert unit in MAY_IMPORT, f"give l2o.{unit} its place in MAY_IMPORT"
    ours = {_unit(target) for target, _ in IMPORTS[module] if target.split(".")[0] in ("l2o", "meta_train")}
    assert ours - {unit} <= MAY_IMPORT[unit]


@pytest.mark.parametrize("module", FILES)
def test_extras_are_imported_at_home_only(module: str) -> None:
    imported = {target.split(".")[0] for target, _ in IMPORTS[module]}
    assert not {name for name in imported & HOMES.keys() if not module.startswith(HOMES[name])}


@pytest.mark.parametrize(
    "module", [name for name in FILES if _unit(name) not in ("meta_train", "integrations", "__main__")]
)
def test_the_library_imports_core_packages_only(module: str) -> None:
    at_once = {target.split(".")[0] for target, at_once in IMPORTS[module] if at_once}
    assert at_once <= CORE | {"l2o", OPTIONAL.get(module)} | sys.stdlib_module_names
    assert not OPTIONAL.keys() & {target for target, at_once in IMPORTS[module] if at_once}


def test_scripts_never_import_scripts() -> None:
    users = {name: {target for target, _ in found} & ENTRY_POINTS for name, found in IMPORTS.items()}
    assert not {name for name, used in users.items() if used - {name} and name != "meta_train.__main__"}


def test_there_are_no_import_cycles() -> None:
    graph = {name: {target for target, _ in found if target in FILES} for name, found in IMPORTS.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules of a cycle


def test_import_needs_the_core_packages_only_and_loads_nothing_heavy() -> None:
    script = f"""
import sys
sys.modules.update(dict.fromkeys({ABSENT}))  # None there makes an import fail
import numpy, safetensors.torch, torch
before = set(sys.modules)
import l2o
print(*sorted((set(sys.modules) - before) & set({HEAVY})))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_every_rule_and_family_is_a_choice_on_the_command_line() -> None:
    enter_classes(ROOT / "configs")
    texts = [path.read_text("utf-8") for path in (ROOT / "configs" / "task").glob("*.yaml")]
    entered = {group: ConfigStore.instance().list(group) for group in ("rule", "task")}
    targets = {ConfigStore.instance().load(f"{g}/{n}").node["_target_"] for g, names in entered.items() for n in names}
    targets |= {line for text in texts for line in re.findall(r"^_target_: (\S+)", text, re.M)}
    assert {f"l2o.rules.{name}" for name in l2o.rules.__all__} <= targets
    assert {f"l2o.tasks.{cls.__name__}" for cls in _listed(l2o.tasks) if cls.__name__ not in NO_CHOICE} <= targets


NO_CHOICE = {"ModuleTask", "Repeated", "Reparametrized", "GradientNoise", "DelayedGradients", "Bfloat16Gradients"}
"""Families of something that a command line cannot say."""


def _listed(package: object) -> list[type]:
    members = [getattr(package, name) for name in package.__all__]  # type: ignore[attr-defined]
    return [member for member in members if isinstance(member, type)]


def test_one_line_lists_a_class() -> None:
    names = {"mine": l2o.rules.SGD, "SHORT": l2o.rules.MLP, "UpdateRule": UpdateRule, "Scheduled": l2o.rules.Scheduled}
    assert listed(names | {"other": 3}, UpdateRule, apart=[l2o.rules.Scheduled]) == ["SHORT", "mine"]


def test_the_lists_are_complete() -> None:
    assert {"SGD", "Momentum", "RMSProp", "AdaGrad", "Adam", "LSTM", "MLP"} <= set(l2o.rules.__all__)
    assert {"Quadratic", "ImageMLP", "ModuleTask"} <= set(l2o.tasks.__all__)


@pytest.mark.parametrize(
    ("cls", "base"),
    [(cls, UpdateRule) for cls in _listed(l2o.rules)] + [(cls, TaskFamily) for cls in _listed(l2o.tasks)],
)
def test_listed_classes_are_frozen_dataclasses_with_a_docstring(cls: type, base: type) -> None:
    assert issubclass(cls, base)
    assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    # A dataclass without a docstring is given its signature for one.
    assert cls.__doc__
    assert not cls.__doc__.startswith(f"{cls.__name__}(")
