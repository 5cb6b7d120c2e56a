"""The documentation site builds without warnings and without a network, and has what it is to have."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT

import l2o
from meta_train.drawings import DIAGRAMS, diagram, measured_png, schedule, singular_values

pytestmark = pytest.mark.xdist_group("site")
sys.path.insert(0, str(ROOT / "docs" / "site"))
from docstrings import PACKAGES, markdown, place  # noqa: E402 - beside the site's hook
from pages import notebook, on_page_markdown  # noqa: E402

LIBRARIES = {"torch", "trainer", "lightning", "accelerate", "sharded", "peft"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `make docs` builds it."""
    out = tmp_path_factory.mktemp("site")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    """Links may lead outside; scripts, styles, fonts and pictures may not."""
    loaded = re.compile(r"<(?:script|img|iframe|link|source)\b[^>]*?(?:src|href)=\"?(?:https?:)?//[^>]*>")
    for page in site.rglob("*.html"):
        found = [tag for tag in loaded.findall(page.read_text("utf-8")) if 'rel="canonical"' not in tag]
        assert not found, page
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import )['\"]?(?:https?:)?//", style.read_text("utf-8")), style


def test_every_public_name_has_its_place_in_the_reference(site: Path) -> None:
    for package in PACKAGES:
        page = (site / "reference" / package / "index.html").read_text("utf-8")
        anchors = {place(package, name) for name in importlib.import_module(package).__all__} - set(PACKAGES)
        assert {anchor for anchor in anchors if f'id="{anchor}"' not in page} == set()


def test_every_public_subpackage_with_a_list_has_a_page() -> None:
    folders = [path.parent.name for path in (ROOT / "l2o").glob("*/__init__.py")]
    listed = {f"l2o.{name}" for name in folders if hasattr(importlib.import_module(f"l2o.{name}"), "__all__")}
    assert listed - {"l2o.optim"} == set(PACKAGES) - {"l2o"}
    assert set(importlib.import_module("l2o.optim").__all__) <= set(l2o.__all__)


def test_pages_of_libraries_cards_and_notebooks_are_there_and_found(site: Path) -> None:
    pages = {path.parent.relative_to(site).as_posix() for path in site.rglob("index.html")}
    assert {f"libraries/{name}" for name in LIBRARIES} <= pages
    assert {f"pretrained/{name}" for name in l2o.list_pretrained()} <= pages
    assert {"examples/use", "examples/meta_train", "changelog", "contributing", "results/standard/report"} <= pages
    found = json.loads((site / "search" / "search_index.json").read_text("utf-8"))
    assert any("LearnedOptimizer" in doc["text"] for doc in found["docs"])


def test_tables_stand_as_tables(site: Path) -> None:
    """Also those behind a comment, which Markdown could take for a paragraph."""
    page = (site / "choosing" / "index.html").read_text("utf-8")
    assert page.count("<table>") == 5
    assert "<p>| " not in page


def test_fonts_are_the_readers_and_pages_outside_the_navigation_are_warnings() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
    assert settings["theme"]["font"] is False
    assert settings["validation"]["omitted_files"] == "warn"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Take `load`'s.", "Take [`load`][l2o.load]'s."),
        ("Take `load`.", "Take [`load`][l2o.load]."),
        ("Take ``load``, `none`.", "Take ``load``, `none`."),
        (
            "First.\n\nlr: a factor.\n    More.\nsteps, seed: numbers.",
            "First.\n\n- **lr**: a factor.\n    More.\n- **steps, seed**: numbers.",
        ),
        ("lr: one.    momentum: two.", "\n- **lr**: one.\n- **momentum**: two."),
        ("lr: one.\nRaises so.", "\n- **lr**: one.\n\nRaises so."),
        ("As in::\n\n    x = 1\n\nlr: one.", "As in:\n\n```python\nx = 1\n```\n\n\n- **lr**: one."),
    ],
)
def test_docstrings_become_markdown(text: str, expected: str) -> None:
    assert re.sub(r"\n{3,}", "\n\n", markdown(text, {"load": "l2o.load"})) == re.sub(r"\n{3,}", "\n\n", expected)


def test_links_to_files_of_the_repository_lead_to_pages_or_are_named() -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="pretrained/index.md"))
    text = "[a](steered/README.md) [b](../docs/rules.md#x) [c](../l2o/types.py) [d](https://x.y) found[0](lr=1)"
    made = "[a](steered.md) [b](../rules.md#x) c (`l2o/types.py`) [d](https://x.y) found[0](lr=1)"
    assert on_page_markdown(text, page) == made


def test_a_notebook_becomes_a_page_without_outputs() -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# A\n", "b"]},
        {"cell_type": "code", "source": ["x"], "outputs": ["y"]},
    ]
    assert notebook(json.dumps({"cells": cells})) == "# A\nb\n\n```python\nx\n```\n"


@pytest.mark.parametrize("name", DIAGRAMS)
def test_a_diagram_is_what_its_command_draws(name: str) -> None:
    assert (ROOT / "docs" / "drawings" / f"{name}.svg").read_text("utf-8") == diagram(DIAGRAMS[name])


def test_the_measured_picture_shows_what_the_page_says() -> None:
    """Warm-up over 3%, a decay to the end; singular values raised towards one; a picture of both and of two runs."""
    factors = schedule(100)
    assert max(range(100), key=factors.__getitem__) in (2, 3)
    assert factors[-1] < 0.05
    before, after = singular_values()
    assert before[30] < 0.05
    assert (after[:30] > 0.5).all()
    assert measured_png(steps=20).startswith(b"\x89PNG")
