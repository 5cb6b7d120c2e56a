"""What the style asks of sources and can be counted: lengths, arguments, nesting, and how a docstring begins."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from statistics import median

import pytest
from conftest import ROOT

Function = ast.FunctionDef | ast.AsyncFunctionDef
ROOMS = ("l2o", "meta_train", "examples")
SOURCES = {path.relative_to(ROOT).as_posix(): path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))}
TREES = {name: ast.parse(path.read_text("utf-8")) for name, path in SOURCES.items()}
FUNCTIONS = {(name, x.name, x.lineno): x for name, t in TREES.items() for x in ast.walk(t) if isinstance(x, Function)}

TRITON = "l2o/kernels/mlp_triton.py"
"""Its kernels are handed pointers and sizes one by one, as Triton wants them."""
CLAIMS = re.compile(r"/bench/checks\.py|/library_checks/")
"""Docstrings that say what the functions check."""
NO_VERB = re.compile(
    r"[`\[a-z0-9θ]|(The|A|An|One|All|Each|Every|Those|This|Its|Their|Some|Another|Nothing|Both|What|Which|Who|Whether"
    r"|How|Where|Of|By|In|As|For|From|With|Under|Until|After|While)\b"
)


def arguments(function: Function) -> int:
    """Counts what a caller passes: ``self`` and ``cls`` are not."""
    named = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return sum(each.arg not in ("self", "cls") for each in named)


def public(tree: ast.AST) -> Iterator[Function]:
    """Yields functions of a module and methods of its classes; properties are nouns, and left out."""
    for owner in (x for x in ast.walk(tree) if isinstance(x, ast.Module | ast.ClassDef)):
        for x in owner.body:
            if (
                isinstance(x, Function)
                and x.name[0] != "_"
                and "property" not in "".join(map(ast.unparse, x.decorator_list))
            ):
                yield x


@pytest.mark.parametrize("room", ROOMS)
def test_functions_are_short(room: str) -> None:
    here = (x for (name, *_), x in FUNCTIONS.items() if name.startswith(f"{room}/"))
    lengths = sorted((x.end_lineno or 0) - x.lineno + 1 for x in here)
    assert median(lengths) <= 8
    assert lengths[len(lengths) * 9 // 10] <= 20
    assert lengths[-1] <= 46


def test_files_are_short() -> None:
    lengths = {name: len(path.read_text("utf-8").splitlines()) for name, path in SOURCES.items()}
    assert {name: n for name, n in lengths.items() if n > 300} == {}


def test_functions_take_at_most_eight_arguments() -> None:
    assert {key for key, x in FUNCTIONS.items() if arguments(x) > 8 and key[0] != TRITON} == set()


def test_no_class_lies_in_a_class_or_a_function() -> None:
    owners = (x for tree in TREES.values() for x in ast.walk(tree) if isinstance(x, Function | ast.ClassDef))
    assert [x.name for owner in owners for x in ast.walk(owner) if isinstance(x, ast.ClassDef) and x is not owner] == []


@pytest.mark.parametrize("name", [name for name in SOURCES if not CLAIMS.search(name)])
def test_docstrings_of_public_functions_begin_with_a_verb(name: str) -> None:
    found = {x.name: ast.get_docstring(x) or "Says nothing" for x in public(TREES[name])}
    assert {function: text for function, text in found.items() if NO_VERB.match(text)} == {}
