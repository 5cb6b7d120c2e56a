"""Files of meta-parameters of other projects: flax's MessagePack, safetensors, PyTorch's own; nothing is unpickled."""

from __future__ import annotations

import hashlib
import io
import math
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from l2o.disk import user_path
from l2o.interop.msgpack import Ext, unpack
from l2o.types import CheckpointError

MAX_BYTES = 2**30
"""Of a file; the largest θ of the field, VeLO's, has 9e6."""

_DTYPES = {
    name: getattr(torch, name)
    for name in ("float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8")
}
_WRAPPERS = ("params", "torch_params", "state_dict")
"""Keys under which training programs keep θ beside other things: google/learned_optimization's, PyLO's, PyTorch's."""
_EXPECTED = "expected a theta.state of flax, or a state dict of PyLO as safetensors or torch.save write it"


class Foreign(NamedTuple):
    """The content of a file.

    tensors: by path, its components joined by ``/``, in the shapes and dtypes of the file.
    facts: what JSON can hold of the rest, and ``file, format, size, sha256``.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def read_foreign(path: str | Path) -> Foreign:
    """Read a file, of a format that its first bytes tell; raises `CheckpointError`.

    Arrays of flax are little-endian and row-major, as it writes them whatever the machine.
    """
    path = user_path(path)
    data = _read(path)
    name, read = _format(data)
    try:
        tree, facts = _unwrap(read(data))
        tensors = dict(_leaves(tree, ()))
        if not tensors:
            raise CheckpointError("there are no tensors in it")
    except Exception as error:  # of three libraries, each with its own
        raise CheckpointError(f"{path}: cannot be read as {name}: {error}; {_EXPECTED}") from error
    size, sha256 = len(data), hashlib.sha256(data).hexdigest()
    return Foreign(tensors, {"file": path.name, "format": name, "size": size, "sha256": sha256, **facts})


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            data = b"" if size > MAX_BYTES else file.read(MAX_BYTES + 1)  # a pipe has no size before it has been read
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); {_EXPECTED}") from error
    if max(size, len(data)) > MAX_BYTES:
        raise CheckpointError(f"{path}: more than {MAX_BYTES} bytes; {_EXPECTED}")
    return data


def _format(data: bytes) -> tuple[str, Any]:
    """The name of a format, and what reads it."""
    # The length of its header, in eight bytes, and the header; first, since a length may look like PyTorch's beginning.
    if data[4:9] == b"\0\0\0\0{":
        return "safetensors", safetensors.torch.load
    if data.startswith((b"PK\x03\x04", b"\x80\x02")):  # a zip, or what torch wrote before 1.6
        return "PyTorch", _read_torch
    return "flax MessagePack", unpack


def _read_torch(data: bytes) -> Any:
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # several lines, which advise to run what is in the file
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it asks for {named[1]!r}" if named else "it is damaged, or asks for more than tensors"
        raise CheckpointError(f"{what}, and nothing is unpickled here: save the state_dict() alone") from error


def _unwrap(tree: Any) -> tuple[Any, dict[str, Any]]:
    """θ, and the plain values that a program put beside it."""
    if not isinstance(tree, Mapping):
        return tree, {}
    inner = [key for key in _WRAPPERS if isinstance(tree.get(key), Mapping)]
    if len(inner) != 1:
        return tree, {}
    beside = {key: value for key, value in tree.items() if isinstance(value, str | int | float)}
    return tree[inner[0]], {"beside": beside} if beside else {}


def _leaves(node: Any, where: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(value, (*where, str(key)))
        return
    name = "/".join(where)
    if isinstance(node, Ext):
        node = _array(name, node)
    if not isinstance(node, Tensor):
        raise CheckpointError(f"{repr(name) if name else 'its content'} is {node!r:.100}, expected a tensor")
    if node.layout != torch.strided or not node.is_cpu or node.nbytes > MAX_BYTES:
        # A view may have more entries than its storage.
        raise CheckpointError(f"{name!r} is {_kind(node)}, expected a plain one of at most {MAX_BYTES} bytes")
    yield name, node


def _kind(tensor: Tensor) -> str:
    return f"a tensor {tuple(tensor.shape)} of {tensor.dtype}, {tensor.layout} on {tensor.device}"


def _array(name: str, leaf: Ext) -> Tensor:
    """An array of flax: type 1, or 3 for a scalar, with ``[shape, dtype, bytes]`` in MessagePack."""
    content = unpack(leaf.data)
    match content if leaf.code in (1, 3) else None:
        case [[*shape], str(dtype), bytes(data)] if dtype in _DTYPES and all(type(n) is int and n >= 0 for n in shape):
            kind = _DTYPES[dtype]
            if len(data) == math.prod(shape) * kind.itemsize:
                return torch.frombuffer(bytearray(data), dtype=kind).reshape(shape) if data else torch.empty(shape)
    raise CheckpointError(
        f"{name!r} is {str(content)[:100]} of type {leaf.code}, expected shape, one of {', '.join(_DTYPES)} and "
        "as many bytes as they need"
    )
