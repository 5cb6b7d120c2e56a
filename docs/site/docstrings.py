"""Docstrings as Markdown: what `name: text` lists are here becomes a list, what is named in backticks a link."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from typing import Any

import griffe

PACKAGES = ("l2o", "l2o.rules", "l2o.tasks", "l2o.estimators", "l2o.evaluation", "l2o.inspection")
"""The pages of the reference. `l2o.optim` has nothing that `l2o` has not."""

_ITEM = re.compile(r"(?:``)?([A-Za-zθ_]\w*(?:, \w+)*)(?:``)?: +(.*)")
_SEVERAL = re.compile(r" {4,}(?=[A-Za-zθ_]\w*(?:, \w+)*: )")
_CODE = re.compile(r"::\n\n((?: {4,}.*\n?|\n(?= {4,}))+)")
_NAMED = re.compile(r"(?<![`\w\[])`([A-Za-z_][\w.]*)`(?!`)")


def place(package: str, name: str) -> str:
    """The full name of a public name of a package, where a submodule of the same name does not come first."""
    full = f"{package}.{name}"
    module = sys.modules.get(full)
    public = getattr(importlib.import_module(package), name)
    return full if module is None or module is public else f"{full}.{name}"


def documented() -> dict[str, str]:
    """The full name of everything that the reference has a heading for, by its full name and its own."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        for name in importlib.import_module(package).__all__:
            full = place(package, name)
            if full not in PACKAGES:
                found.setdefault(name, full)
                found[f"{package}.{name}"] = full
    return found


def markdown(text: str, links: dict[str, str]) -> str:
    """The docstring as Markdown."""
    text = _CODE.sub(lambda code: f":\n\n```python\n{_dedented(code[1])}\n```\n\n", text)
    fences = re.split(r"(```.*?```)", text, flags=re.S)
    return "".join(part if part.startswith("```python") else _prose(part, links) for part in fences)


def _dedented(code: str) -> str:
    return "\n".join(line[4:] for line in code.rstrip().splitlines())


def _prose(text: str, links: dict[str, str]) -> str:
    listed = "\n\n".join("\n".join(_listed(paragraph)) for paragraph in text.split("\n\n"))
    return _NAMED.sub(lambda name: f"[`{name[1]}`][{links[name[1]]}]" if name[1] in links else name[0], listed)


def _listed(paragraph: str) -> Iterator[str]:
    """Its lines; an entry ends where a sentence has ended and a line begins with a capital."""
    inside, ended = False, True
    for line in (part for whole in paragraph.split("\n") for part in _SEVERAL.split(whole)):
        item = _ITEM.fullmatch(line)
        if item and (ended or inside):
            yield from ([] if inside else [""])
            inside = True
            yield f"- **{item[1]}**: {item[2]}"
        elif inside and ended and re.match(r"[A-Z`]", line):
            inside = False
            yield from ("", line)
        else:
            yield f"    {line.strip()}" if inside else line
        ended = not line or line.rstrip().endswith((".", ":", ")"))


class Prose(griffe.Extension):
    """Rewrites every docstring as it is loaded."""

    def __init__(self) -> None:
        self.links = documented()

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one."""
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value, self.links)
