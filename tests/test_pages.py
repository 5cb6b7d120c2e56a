"""Every page's Python runs in the order of reading, and every command of a document is one for zsh, too."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import ROOT

DOCS = ROOT / "docs"
PAGES = [p for p in sorted(DOCS.rglob("*.md")) if "```python" in p.read_text("utf-8") and "results" not in p.parts]
LENGTHS = re.compile(r"\brange\(\d+\)")


@pytest.mark.filterwarnings("ignore:::(lightning|torch|accelerate|transformers|peft)")
@pytest.mark.parametrize("page", PAGES, ids=[p.relative_to(DOCS).as_posix() for p in PAGES])
def test_the_code_of_a_page_runs(page: Path, here: Path) -> None:
    """In an empty folder, one block after the other; loops take three turns."""
    namespace = {"__name__": "__main__"}
    text = page.read_text("utf-8")
    for fence in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S):
        code = "\n" * text[: fence.start()].count("\n") + "\n" + LENGTHS.sub("range(3)", fence[1])
        exec(compile(code, str(page), "exec"), namespace)
