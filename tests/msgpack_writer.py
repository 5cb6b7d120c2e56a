"""MessagePack and flax's arrays, written; for the tests of what reads them."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from l2o.interop.msgpack import Ext

CODES = {"str": (0xD9, 0xDA, 0xDB), "bin": (0xC4, 0xC5, 0xC6), "ext": (0xC7, 0xC8, 0xC9)}


def pack(value: Any) -> bytes:
    """Any value that flax writes, in the shortest form; NumPy arrays as extensions of type 1."""
    if isinstance(value, np.ndarray):
        value = Ext(1, pack([list(value.shape), value.dtype.name, value.tobytes()]))
    if isinstance(value, Ext):
        return _head("ext", len(value.data)) + struct.pack("b", value.code) + value.data
    if isinstance(value, Mapping):
        return _count(0x80, 0xDE, len(value)) + b"".join(pack(k) + pack(v) for k, v in value.items())
    if isinstance(value, list):
        return _count(0x90, 0xDC, len(value)) + b"".join(map(pack, value))
    if isinstance(value, str):
        text = value.encode()
        return (bytes([0xA0 | len(text)]) if len(text) < 32 else _head("str", len(text))) + text
    if isinstance(value, bytes):
        return _head("bin", len(value)) + value
    return bytes([value]) if 0 <= value < 128 else b"\xce" + struct.pack(">I", value)


def _head(kind: str, size: int) -> bytes:
    width = 0 if size < 1 << 8 else 1 if size < 1 << 16 else 2
    return bytes([CODES[kind][width]]) + size.to_bytes(1 << width)


def _count(short: int, long: int, size: int) -> bytes:
    return bytes([short | size]) if size < 16 else bytes([long]) + size.to_bytes(2)
