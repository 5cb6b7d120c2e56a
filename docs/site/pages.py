"""What the site has beside `docs/`: files of the repository, model cards, notebooks and the reference.

mkdocs calls the functions whose names begin with ``on_``.
"""

from __future__ import annotations

import importlib
import json
import os
import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from docstrings import PACKAGES, place  # noqa: E402 - beside this file

_LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)#\s]+)((?:#[^)\s]*)?)\)")

COPIED = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "pretrained/README.md": "pretrained/index.md",
}
"""Pages of files that are elsewhere in the repository."""


def copied() -> dict[str, str]:
    """The page of each file of the repository that is one."""
    cards = sorted((ROOT / "pretrained").glob("*/README.md"))
    return COPIED | {f"pretrained/{path.parent.name}/README.md": f"pretrained/{path.parent.name}.md" for path in cards}


def notebooks() -> dict[str, str]:
    """The page of each notebook."""
    return {f"examples/{path.name}": f"examples/{path.stem}.md" for path in sorted((ROOT / "examples").glob("*.ipynb"))}


def on_config(config: Any) -> Any:
    """Enter pages into the navigation."""
    sections = {name: pages for entry in config.nav for name, pages in entry.items()}
    sections["Pretrained"] += [page for page in copied().values() if page.startswith("pretrained/")]
    sections["Reference"] += [{package: f"reference/{package}.md"} for package in PACKAGES]
    sections["Start"][-1:-1] = [{f"Notebook: {Path(page).stem}": page} for page in notebooks().values()]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Enter what is made here."""
    for source, page in copied().items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for source, page in notebooks().items():
        files.append(File.generated(config, page, content=notebook((ROOT / source).read_text("utf-8"))))
    for package in PACKAGES:
        made = reference(importlib.import_module(package))
        files.append(File.generated(config, f"reference/{package}.md", content=made))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to files of the repository lead to their pages; those that are none are named."""
    sources = {made: source for source, made in (copied() | notebooks()).items()}
    source = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return _LINK.sub(lambda link: _led(link, posixpath.dirname(source), page.file.src_uri), markdown)


def _led(link: re.Match[str], folder: str, page: str) -> str:
    text, target, anchor = link.groups()
    path = posixpath.normpath(posixpath.join(folder, target))
    if "://" in target or not (ROOT / path).exists():
        return link[0]
    found = (copied() | notebooks()).get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
    if found is None:
        return text if text.strip("`") == path else f"{text} (`{path}`)"
    return f"[{text}]({os.path.relpath(found, posixpath.dirname(page) or '.')}{anchor})"


def reference(package: ModuleType) -> str:
    """The page of a package: what it says of itself, and a heading for each public name, constants and errors last."""
    constants = {name for name in package.__all__ if not callable(getattr(package, name))}
    last = [name for name in package.__all__ if name.endswith("Error") or name in constants]
    return "\n".join(_reference(package.__name__, [*(n for n in package.__all__ if n not in last), *last]))


def _reference(package: str, names: list[str]) -> Iterator[str]:
    yield f"# {package}\n\n::: {package}"
    yield "    options: {members: false, show_root_heading: false, show_root_toc_entry: false}\n"
    for name in names:
        full = place(package, name)
        if full in PACKAGES:
            yield f"## {full}\n\nA package: [its page]({full}.md).\n"
        else:
            yield f"::: {full}\n    options: {{heading: {package}.{name}}}\n"


def notebook(text: str) -> str:
    """A notebook as Markdown: its texts and code, without outputs."""
    cells = json.loads(text)["cells"]
    return "\n\n".join(map(_cell, cells)) + "\n"


def _cell(cell: dict[str, Any]) -> str:
    text = "".join(cell["source"])
    return text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```"
