"""The README as a package index shows it, which has none of the repository's files beside it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_PICTURE = re.compile(r"!\[([^\]]*)\]\((?!https?:)([^)]+)\)\n*")
_LINK = re.compile(r"\[([^\]]*)\]\((?!https?:|#)([^)]+)\)")


class ReadmeHook(MetadataHookInterface):
    """Gives the package's metadata its long description."""

    def update(self, metadata: dict[str, Any]) -> None:
        text = (Path(self.root) / "README.md").read_text("utf-8")
        source = metadata.get("urls", {}).get("Source")
        metadata["readme"] = {"content-type": "text/markdown", "text": description(text, source)}


def description(text: str, source: str | None) -> str:
    """The README with absolute links; where no address of the repository is known, with names of files instead."""
    if source:
        text = _PICTURE.sub(rf"![\1]({source}/raw/main/\2)\n\n", text)
        return _LINK.sub(rf"[\1]({source}/blob/main/\2)", text)
    return _LINK.sub(r"\1 (`\2`)", _PICTURE.sub("", text))
