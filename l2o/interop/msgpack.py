"""MessagePack, the format of flax's files, by the package msgpack; what a file may make of itself is bounded."""

from __future__ import annotations

from typing import Any, NamedTuple

from l2o.types import CheckpointError

MAX_VALUES = 2**20
"""Of all containers together; an empty one is a byte in a file, and a hundred in memory. Files of flax have few."""


class Ext(NamedTuple):
    """A value of a type that the application defines."""

    code: int
    data: bytes


class _Count:
    """Makes the containers of a file, and counts what is in them."""

    def __init__(self) -> None:
        self.left = MAX_VALUES

    def values(self, found: list[Any]) -> list[Any]:
        self.left -= len(found)
        if self.left < 0:
            raise CheckpointError(f"more than {MAX_VALUES} values")
        return found

    def pairs(self, found: list[tuple[Any, Any]]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for key, value in self.values(found):
            if not isinstance(key, str) or key in content:
                raise CheckpointError(f"the key {key!r:.100} is not a string, or comes twice")
            content[key] = value
        return content


def unpack(data: bytes) -> Any:
    """Return the one value in ``data``: dicts with string keys, lists, str, bytes, int, float, bool, None and `Ext`.

    Raises `CheckpointError` where there is no msgpack, and for anything else than one whole value of at most
    `MAX_VALUES` entries.
    """
    try:
        import msgpack
    except ModuleNotFoundError as error:
        raise CheckpointError("the package msgpack is not installed: pip install 'l2o[convert]'") from error
    count = _Count()
    limits = dict.fromkeys(("max_array_len", "max_map_len"), MAX_VALUES)
    try:
        return msgpack.unpackb(data, ext_hook=Ext, list_hook=count.values, object_pairs_hook=count.pairs, **limits)
    except CheckpointError:
        raise
    except Exception as error:  # of many kinds
        raise CheckpointError(f"no MessagePack ({error or type(error).__name__}); truncated or damaged") from error
