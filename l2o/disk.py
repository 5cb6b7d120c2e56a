"""Paths as users type them; files that are whole or absent; nested states in one safetensors file."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from l2o.types import ConfigurationError, L2OError, ResumeError

FORMAT = "l2o.tree"
VERSION = 1
"""Of what `save_tree` writes; to be raised when a file of today could no longer be read."""

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
_WAY_OUT = "continue from an undamaged copy, or start anew"


def user_path(path: str | os.PathLike[str], name: str = "") -> Path:
    """Return what a path that a user has typed means, ``~`` and ``~user`` written out; all of them come through here.

    name: of the setting, for messages.
    Raises `ConfigurationError` for what can be no path: ``~`` of nobody, a name that is too long, a zero byte.
    """
    start = f"{name}=" if name else ""
    text = os.path.expanduser(path)
    if text.startswith("~"):
        raise ConfigurationError(
            f"{start}{os.fspath(path)!r}: there is no such user, or no home folder (HOME is not set); "
            "write the whole path, or ./~ for a name that begins so"
        )
    try:
        os.lstat(text)
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) or error.errno == errno.ENAMETOOLONG:
            reason = getattr(error, "strerror", None) or error
            raise ConfigurationError(f"{start}{text[:40]!r}…: can be no path ({reason}); give a shorter one") from error
    found = Path(text)
    return found.absolute() if str(found).startswith("~") else found  # it was ./~, and may come here again


def cache_folder() -> Path:
    """Return where downloads and kernels are kept: ``$L2O_CACHE_DIR``, else ``l2o`` in ``$XDG_CACHE_HOME`` or
    ``~/.cache``."""
    own, base = os.environ.get("L2O_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    try:
        return user_path(own) if own else user_path(base or "~/.cache") / "l2o"
    except ConfigurationError as error:
        raise ConfigurationError(f"the cache: {error}; name its folder in L2O_CACHE_DIR") from error


def atomic_write(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that a crash at any moment leaves the old one or the new one whole; makes missing folders.

    Raises OSError, with ``path`` as it was and no temporary file left, where the disk does not take it.
    """
    atomic_writes({Path(path): data})


def atomic_writes(files: Mapping[Path, bytes]) -> None:
    """Write several files as `atomic_write` does, in order; where the disk does not take them all, none of them is
    replaced."""
    temporaries: list[Path] = []
    try:
        for path, data in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            # Of a name that is as long as can be there is a part: 60 characters have at most 240 bytes.
            temporaries.append(path.with_name(f".{path.name[:60]}.{secrets.token_hex(4)}.tmp"))
            _write_through(temporaries[-1], data)
        for temporary, path in zip(temporaries, files, strict=True):
            os.replace(temporary, path)
    except BaseException:
        for temporary in temporaries:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
        raise
    for folder in {path.parent for path in files}:
        _sync_folder(folder)


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Delete the temporary files of a process that was killed while it wrote; no other may be writing there now."""
    for path in Path(folder).glob(".*.tmp"):
        if _TEMPORARY.fullmatch(path.name):
            path.unlink()


def _write_through(path: Path, data: bytes) -> None:
    """A new file, on disk."""
    # Not tempfile: its files are readable by their owner alone, and a checkpoint is there to be shared.
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def put_in_place(temporary: Path, path: Path) -> None:
    """Give a file that is whole and on disk its name, in the same folder, instead of the file that has it."""
    os.replace(temporary, path)
    _sync_folder(path.parent)


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Let one process, and one thread, in at a time; the others wait. It ends with the process, however that ends.

    A file system without locks has none: what is written there has to bear two writers.
    """
    if os.name != "posix":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def lock_file(file: IO[str]) -> None:
    """Lock an open file until it is closed, at the latest by the process' end. Raises OSError if another has it."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def try_folder(folder: str | os.PathLike[str]) -> None:
    """Raise OSError unless a file can be made in ``folder``, which stays as it was."""
    with tempfile.TemporaryFile(dir=folder):
        pass


def _sync_folder(folder: Path) -> None:
    """The new name is on disk only once its folder is."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the bytes of a safetensors file; tensors of any shape may be views, share storage, or need gradients."""
    # safetensors refuses storage that is shared or not contiguous, so everything is copied.
    own = {k: t.detach().cpu().clone(memory_format=torch.contiguous_format) for k, t in tensors.items()}
    return safetensors.torch.save(own, None if metadata is None else dict(metadata))


def save_tree(path: str | os.PathLike[str], tree: Any, metadata: Any = None) -> None:
    """Write a nested structure to one safetensors file, atomically.

    tree: dicts with string keys and lists (a tuple comes back as a list) of tensors of any dtype and of JSON scalars.
        The tensor at ``tree["a"]["b"][0]`` has the name ``a/b/0`` in the file; in a key, ``/`` is written ``~1`` and
        ``~`` ``~0``, as in a JSON pointer.
    metadata: whatever JSON can hold, handed back by `load_tree` beside the tree.
    Raises TypeError, before anything is written, naming what is neither tensor nor scalar.
    """
    tensors: dict[str, Tensor] = {}
    structure = json.dumps({"tree": _pack(tree, (), tensors), "metadata": metadata})
    header = {"format": FORMAT, "version": str(VERSION), "structure": structure, "sha256": _digest(structure, tensors)}
    atomic_write(path, to_bytes(tensors, header))


def load_tree(path: str | os.PathLike[str]) -> tuple[Any, Any]:
    """Return ``(tree, metadata)`` as `save_tree` was given them, bit for bit; the tensors are the caller's own, on the
    CPU.

    Raises `ResumeError` where the file is missing, damaged, of another program or of another version of the format.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            _check_header(path, header)
            # Cloned: what safetensors hands out may be a view of the file, which the next save replaces.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
        if header["sha256"] != _digest(header["structure"], tensors):
            raise ResumeError(f"{path}: its content does not have the checksum it was written with; {_WAY_OUT}")
        content = json.loads(header["structure"])
        return _unpack(content["tree"], tensors), content["metadata"]
    except ResumeError:
        raise
    except (OSError, safetensors.SafetensorError, LookupError, ValueError, RecursionError) as error:
        raise ResumeError(f"{path}: cannot be read ({error}); {_WAY_OUT}") from error


def _check_header(path: str | os.PathLike[str], header: Mapping[str, str]) -> None:
    if header.get("format") != FORMAT:
        raise ResumeError(f"{path}: not a file to resume from; its format is {header.get('format')!r}, not {FORMAT!r}")
    if header.get("version") != str(VERSION):
        raise ResumeError(
            f"{path}: format version {header.get('version')}, this l2o reads version {VERSION}; "
            "continue with the version of l2o that wrote it"
        )


def _pack(node: Any, where: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    """JSON with a ``{"tensor": name}`` for each tensor and a ``{"dict": ...}`` for each dict; fills ``tensors``."""
    if isinstance(node, Tensor):
        name = "/".join(key.replace("~", "~0").replace("/", "~1") for key in where)
        tensors[name] = node
        return {"tensor": name}
    if isinstance(node, Mapping) and all(isinstance(key, str) for key in node):
        return {"dict": {key: _pack(value, (*where, key), tensors) for key, value in node.items()}}
    if isinstance(node, list | tuple):
        return [_pack(value, (*where, str(i)), tensors) for i, value in enumerate(node)]
    if node is None or isinstance(node, bool | int | float | str):
        return node
    what = "a dict whose keys are not all strings" if isinstance(node, Mapping) else type(node).__name__
    raise TypeError(f"{'/'.join(where) or 'tree'} is {what}: expected a tensor, JSON scalar, list or dict of strings")


def _unpack(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(node, list):
        return [_unpack(value, tensors) for value in node]
    if isinstance(node, dict):
        if "tensor" in node:
            return tensors[node["tensor"]]
        return {key: _unpack(value, tensors) for key, value in node["dict"].items()}
    return node


def _digest(structure: str, tensors: Mapping[str, Tensor]) -> str:
    """safetensors notices a truncated file, but not a changed one."""
    digest = hashlib.sha256(structure.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def resource(package: Path, name: str) -> Path:
    """Return the folder ``name`` that travels with a package, such as ``resource(Path(l2o.__file__).parent,
    "pretrained")``.

    package: the package's folder. A wheel holds the data folder inside it, a checkout beside it.
    Raises `L2OError` where it is in neither place.
    """
    # Inside first: beside an installed package are other people's packages.
    for folder in (package / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise L2OError(
        f"no folder {name!r} in or beside {package}: this installation of {package.name} is incomplete; reinstall it"
    )
