"""Names that users type: what is said where one does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import TypeVar

from l2o.types import UnknownNameError

T = TypeVar("T")


def unknown(kind: str, name: str, valid: Collection[str]) -> str:
    """The message for a name that does not exist: the nearest ones and all valid ones."""
    near = difflib.get_close_matches(str(name), list(valid))
    hint = f", did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"unknown {kind} {name!r}{hint}; valid: {', '.join(sorted(valid)) or 'none'}"


def choose(kind: str, name: str, table: Mapping[str, T]) -> T:
    """``table[name]``; where there is none, `UnknownNameError` with the nearest names and all valid ones."""
    if name in table:
        return table[name]
    raise UnknownNameError(unknown(kind, name, table))
