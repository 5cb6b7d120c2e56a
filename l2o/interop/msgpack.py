"""A strict reader of MessagePack (https://github.com/msgpack/msgpack/blob/master/spec.md), the format of flax's files.

Few lines, so that a conversion needs nothing installed, and whatever is wrong with a file is one kind of error: nothing
is allocated that the file does not hold, nesting and number of values are bounded, and every byte belongs to something.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from l2o.types import CheckpointError

MAX_DEPTH = 32
MAX_VALUES = 2**20
"""Of all kinds together; an empty container is one byte in a file, and a hundred in memory. Files of flax have few."""

_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_NUMBERS = {0xCA + i: f">{code}" for i, code in enumerate("fdBHIQbhiq")}
# First byte of what begins with its length: the kind, and in how many bytes the length stands, or is the length itself.
_SHORT = (("text", 0xA0, 0x1F), ("array", 0x90, 0xF), ("map", 0x80, 0xF))
_LONG = {
    first + i: (kind, width)
    for kind, first, widths in (
        ("bytes", 0xC4, (1, 2, 4)),
        ("ext", 0xC7, (1, 2, 4)),
        ("text", 0xD9, (1, 2, 4)),
        ("array", 0xDC, (2, 4)),
        ("map", 0xDE, (2, 4)),
    )
    for i, width in enumerate(widths)
}


class Ext(NamedTuple):
    """A value of a type that the application defines."""

    code: int
    data: bytes


def unpack(data: bytes) -> Any:
    """The one value in ``data``: dicts with string keys, lists, str, bytes, int, float, bool, None and `Ext`.

    Raises `CheckpointError`, with the byte at which it is noticed, where ``data`` is no MessagePack, is truncated or
    goes on after its end, where a key is not a string or comes twice, and beyond `MAX_DEPTH` containers in one another
    or `MAX_VALUES` values.
    """
    reader = _Reader(data)
    value = reader.value()
    if reader.at != len(data):
        raise reader.error(f"{len(data) - reader.at} bytes after the end of the content")
    return value


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0
        self.depth = 0
        self.values = 0

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"byte {self.at} of MessagePack: {what}")

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise self.error(
                f"{count} bytes expected, {len(self.data) - self.at} left; the file is truncated or damaged"
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def value(self) -> Any:
        self.values += 1
        if self.values > MAX_VALUES:
            raise self.error(f"more than {MAX_VALUES} values")
        code = self.take(1)[0]
        if code < 0x80 or code >= 0xE0:
            return code if code < 0x80 else code - 0x100
        if code in _CONSTANTS:
            return _CONSTANTS[code]
        if code in _NUMBERS:
            return struct.unpack(_NUMBERS[code], self.take(struct.calcsize(_NUMBERS[code])))[0]
        kind, length = self.head(code)
        read: dict[str, Callable[[int], Any]] = {
            "bytes": self.take,
            "text": self.text,
            "ext": lambda size: Ext(struct.unpack("b", self.take(1))[0], self.take(size)),
            "array": lambda size: self.container(size, self.array),
            "map": lambda size: self.container(size, self.map),
        }
        return read[kind](length)

    def head(self, code: int) -> tuple[str, int]:
        """The kind of value that ``code`` begins, and its length."""
        for kind, first, bits in _SHORT:
            if code & ~bits == first:
                return kind, code & bits
        if 0xD4 <= code <= 0xD8:
            return "ext", 1 << (code - 0xD4)
        if code not in _LONG:
            raise self.error(f"{code:#04x} begins no value")
        kind, width = _LONG[code]
        return kind, int.from_bytes(self.take(width))

    def text(self, size: int) -> str:
        try:
            return self.take(size).decode()
        except UnicodeDecodeError as error:
            raise self.error(f"a text is not UTF-8 ({error.reason})") from error

    def container(self, size: int, read: Callable[[int], Any]) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.error(f"more than {MAX_DEPTH} containers in one another")
        content = read(size)
        self.depth -= 1
        return content

    def array(self, size: int) -> list[Any]:
        return [self.value() for _ in range(size)]

    def map(self, size: int) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for _ in range(size):
            key = self.value()
            if not isinstance(key, str) or key in content:
                raise self.error(f"the key {key!r:.100} is not a string, or comes twice")
            content[key] = self.value()
        return content
