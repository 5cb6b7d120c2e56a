"""Docstrings of public functions of tensors state shapes: brackets, 0-d, the word, or what they are like."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from types import ModuleType

import pytest

import l2o

SHAPE = re.compile(r"\[[^\]]*\]|\b\d-d\b|\bshapes?\b|\blike\b", re.IGNORECASE)
KNOWN = ("return", "like")
"""Arguments whose name says it: results have the dtype and device of ``like``, whatever its shape."""
MODULES = sorted(found.name for found in pkgutil.walk_packages(l2o.__path__, "l2o.") if "__main__" not in found.name)


def of_tensors(module: ModuleType) -> Iterator[tuple[str, str]]:
    """What has tensors in its signature, and its docstring, or that of what it overrides.

    Public functions that the module defines, public methods and properties of its public classes.
    """
    for owner in [module, *(x for x in vars(module).values() if inspect.isclass(x) and x.__name__[0] != "_")]:
        for name, x in vars(owner).items():
            f = inspect.unwrap(getattr(x, "fget", getattr(x, "__func__", x)))
            own = name[0] != "_" and inspect.isfunction(f) and f.__module__ == module.__name__
            if own and any("Tensor" in re.findall(r"\w+", str(kind)) for kind in f.__annotations__.values()):
                yield f"{owner.__name__}.{name}", inspect.getdoc(getattr(owner, name)) or ""


def arguments(module: ModuleType) -> Iterator[tuple[str, str]]:
    """Tensors that public functions and methods of a module take, and what they, or their classes, say."""
    for owner in [module, *(x for x in vars(module).values() if inspect.isclass(x) and x.__name__[0] != "_")]:
        for name, x in vars(owner).items():
            if inspect.isfunction(f := inspect.unwrap(getattr(x, "__func__", x))) and f.__module__ == module.__name__:
                says = f"{inspect.getdoc(getattr(owner, name))} {'' if owner is module else owner.__doc__}"
                of_tensor = (key for key, kind in f.__annotations__.items() if str(kind) in ("Tensor", "Tensor | None"))
                yield from ((f"{name}({key})", says) for key in of_tensor if name[0] != "_" and key not in KNOWN)


@pytest.mark.parametrize("module", MODULES)
def test_every_tensor_that_a_public_function_takes_is_named_in_its_docstring(module: str) -> None:
    found = arguments(pytest.importorskip(module))
    assert [name for name, says in found if not re.search(rf"\b{name.partition('(')[2][:-1]}\b", says)] == []


@pytest.mark.parametrize("module", MODULES)
def test_public_functions_of_tensors_state_shapes(module: str) -> None:
    found = of_tensors(pytest.importorskip(module))  # one is Triton's
    assert [name for name, docstring in found if not SHAPE.search(docstring)] == []


def test_the_search_finds_functions_methods_properties_and_what_they_inherit() -> None:
    found = dict(of_tensors(importlib.import_module("l2o.kernels.mlp_rule")))
    assert {"l2o.kernels.mlp_rule.update", "Tensors.split", "Tensors.all"} <= found.keys()
    assert dict(of_tensors(importlib.import_module("l2o.rules.adam")))["Adam.step"].startswith("Return the update")
