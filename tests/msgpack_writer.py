"""MessagePack and flax's arrays, written; for the tests of what reads them."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np

from l2o.interop.msgpack import Ext


def pack(value: Any) -> bytes:
    """Any value that flax writes; NumPy arrays as extensions of type 1."""
    data: bytes = msgpack.packb(_plain(value))
    return data


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        value = Ext(1, pack([list(value.shape), value.dtype.name, value.tobytes()]))
    if isinstance(value, Ext):
        return msgpack.ExtType(value.code, value.data)
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list) else value
