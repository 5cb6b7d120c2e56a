"""Checkpoints and weights at an address: fetched once into the cache, compared with their pin at every use.

``https://host/folder#sha256=…``  the folder has `CARD` and `THETA`, like any checkpoint; the pin is that of its card
``hf:owner/name@commit``          a repository of huggingface.co (or of ``$HF_ENDPOINT``) with these two files

The card holds size and SHA-256 of θ, so that the one number, or the commit, covers everything. Weights of others have
no card: ``https://host/file#sha256=…``, the pin being that of the file, and ``hf:owner/name@commit/file``, or without a
file the first of `WEIGHTS` that is there.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit, urlunsplit

from l2o import disk
from l2o.checkpoints.pretrained import CARD, THETA, Source, read_json
from l2o.download import cache_folder, fetch
from l2o.types import CheckpointError, ConfigurationError, DownloadError

MAX_CARD = 2**20
MAX_THETA = 2**30
"""Bytes. The largest θ of the field, VeLO's, has 9e6."""

WEIGHTS = ("theta.state", "model.safetensors", "pytorch_model.bin")
"""Names that other projects give to the file of their weights."""

_RECORD = ".sha256"
"""Beside a file whose address does not state its checksum: that of the one that came first, for ``sha256sum -c``."""
_HEX = r"[0-9a-f]{64}"
_HUB = re.compile(r"hf:(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?", re.ASCII)
_HUB_FILE = re.compile(r"(hf:[^@]*@\w[\w.-]*)((?:/\w[\w.-]*)*)", re.ASCII)
_UNPINNED = "#unpinned"


class Address(NamedTuple):
    """folder: URL of the checkpoint's folder.     sha256: of its card, where the address states it."""

    folder: str
    sha256: str | None

    def file(self, name: str) -> str:
        parts = urlsplit(self.folder)
        return urlunsplit(parts._replace(path=f"{parts.path}/{name}"))


def is_address(source: Source) -> bool:
    """Say whether ``source`` is an address rather than a name or a path; a `pathlib.Path` never is one."""
    return isinstance(source, str) and source.startswith(("http:", "https:", "hf:"))


def fetch_checkpoint(source: str) -> Path:
    """Return the folder in the cache with the checkpoint at an address, downloaded where it is not there or is damaged.

    Raises `ConfigurationError` (no address, or one without a pin), `DownloadError`, and `CheckpointError` (a card that
    does not say which θ belongs to it).
    """
    address = parse(source)
    folder = _place("checkpoints", address)
    try:
        _fetch_card(address, folder)
        entry = _theta_entry(folder / CARD)
        fetch([address.file(THETA)], folder / THETA, entry["sha256"], entry["size"])
    except DownloadError as error:
        anew = (
            f"; to take what is there now, remove {folder}"
            if source.endswith(_UNPINNED) and _record(folder / CARD).exists()
            else ""
        )
        raise DownloadError(
            f"source={source!r}: {error}\nCheck the address and its pin; without a network, copy the checkpoint's "
            f"folder ({CARD} and {THETA}) from elsewhere and give its path{anew}"
        ) from error
    return folder


def fetch_weights(source: str) -> Path:
    """Return the file in the cache with the weights of another project at an address, downloaded where it is not there.

    Raises `ConfigurationError` (no address, or one without a pin) and `DownloadError`.
    """
    address, names = parse_weights(source)
    failures = []
    for name in names:
        path = _place("weights", address) / name.rpartition("/")[2]
        try:
            _fetch_first(address.file(name), path, address.sha256, MAX_THETA)
            return path
        except DownloadError as error:
            failures.append(str(error))
    raise DownloadError("\n".join([f"source={source!r}:", *failures, "Check the address, its file and its pin"]))


def parse(source: str) -> Address:
    """Return what an address means; raises `ConfigurationError` for one that says nothing, or does not say which
    content."""
    location, sha256, marked = _pin(source, f"its {CARD}")
    folder, fixed = _hub_folder(source, location) if location.startswith("hf:") else (_web_folder(source, location), "")
    if not marked and not fixed:
        raise _unpinned(source, location, f"its {CARD}")
    return Address(folder, sha256)


def parse_weights(source: str) -> tuple[Address, tuple[str, ...]]:
    """Return the folder of a file of weights, and what the file may be called."""
    location, sha256, marked = _pin(source, "the file")
    if not location.startswith("hf:"):
        if not marked:
            raise _unpinned(source, location, "the file")
        parts = urlsplit(location)
        path, _, name = parts.path.rpartition("/")
        if not parts.netloc or not name:
            raise ConfigurationError(f"source={source!r}: expected the address of a file of weights")
        return Address(urlunsplit(parts._replace(path=path)), sha256), (name,)
    match = _HUB_FILE.fullmatch(location if "@" in location else f"{location}@main")
    if not match:
        raise ConfigurationError(f"source={source!r}: expected hf:owner/name@commit, or with /FILE behind it")
    folder, fixed = _hub_folder(source, match[1])
    if not marked and not fixed:
        raise _unpinned(source, location, "the file")
    return Address(folder, sha256), (match[2].lstrip("/"),) if match[2] else WEIGHTS


def _pin(source: str, what: str) -> tuple[str, str | None, bool]:
    """An address without its end, the SHA-256 stated there, and whether there is an end.  what: is of that sum."""
    location, mark, fragment = source.partition("#")
    pin = re.fullmatch(f"sha256=({_HEX})", fragment.lower())
    if mark and not pin and mark + fragment != _UNPINNED:
        raise ConfigurationError(
            f"source={source!r}: it ends in {mark + fragment!r}, expected #sha256= and 64 hexadecimal digits, the "
            f"SHA-256 of {what}, or {_UNPINNED}"
        )
    return location, pin[1] if pin else None, bool(mark)


def _unpinned(source: str, location: str, what: str) -> ConfigurationError:
    wanted = "a full commit, @ and 40 hexadecimal digits" if location.startswith("hf:") else "#sha256=…"
    return ConfigurationError(
        f"source={source!r}: it may serve something else tomorrow. Pin it with {wanted}, or by the SHA-256 of {what}, "
        f"{location}#sha256=…; or take what is there now, once and for all: {location}{_UNPINNED}"
    )


def _place(kind: str, address: Address) -> Path:
    """The folder in the cache for what is at an address."""
    key = hashlib.sha256(f"{address.folder}#{address.sha256}".encode()).hexdigest()
    name = re.sub(r"[^\w.%-]", "_", urlsplit(address.folder).path.rpartition("/")[2], flags=re.ASCII)
    return cache_folder() / kind / f"{name[:64]}-{key[:32]}"


def _hub_folder(source: str, location: str) -> tuple[str, bool]:
    """The folder's URL, and whether the revision is a commit, which can never come to mean something else."""
    match = _HUB.fullmatch(location)
    if not match:
        raise ConfigurationError(f"source={source!r}: expected hf:owner/name@revision")
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    revision = match[2] or "main"
    url = f"{endpoint.rstrip('/')}/{match[1]}/resolve/{quote(revision, safe='')}"
    return url, re.fullmatch("[0-9a-f]{40}", revision) is not None


def _web_folder(source: str, location: str) -> str:
    try:
        parts = urlsplit(location)
    except ValueError as error:
        raise ConfigurationError(
            f"source={source!r}: {error}; expected the address of a checkpoint's folder"
        ) from error
    path = parts.path.removesuffix(f"/{CARD}").rstrip("/")
    if not parts.netloc or path.endswith(f"/{THETA}"):
        raise ConfigurationError(f"source={source!r}: expected the address of a checkpoint's folder, or of its {CARD}")
    return urlunsplit(parts._replace(path=path))


def _fetch_card(address: Address, folder: Path) -> None:
    # Before it counts it is looked at: it may be the page of a network that one has to log in to.
    _fetch_first(address.file(CARD), folder / CARD, address.sha256, MAX_CARD, _theta_entry)


def _fetch_first(
    url: str, path: Path, sha256: str | None, max_bytes: int, check: Callable[[Path], object] = lambda path: None
) -> None:
    """Have the file with this SHA-256, or the one that came first where none is stated; ``check`` sees the latter."""
    record = _record(path)
    pin = sha256 or _recorded(record)
    fetch([url], path, pin, max_bytes)
    if not pin:
        check(path)
        disk.atomic_write(record, f"{disk.sha256(path)}  {path.name}\n".encode())


def _record(path: Path) -> Path:
    return path.with_suffix(_RECORD)


def _recorded(record: Path) -> str | None:
    match = re.match(_HEX, record.read_text("utf-8", "replace")) if record.is_file() else None
    return match[0] if match else None


def _theta_entry(card: Path) -> dict[str, Any]:
    """What the card says of θ: its size, within limits, and its checksum."""
    entry = read_json(card).get("theta")
    if not isinstance(entry, dict) or not re.fullmatch(_HEX, str(entry.get("sha256"))):
        raise CheckpointError(f"{card}: expected an entry 'theta' with size and sha256, got {entry!r}")
    if type(entry.get("size")) is not int or not 0 < entry["size"] <= MAX_THETA:
        raise CheckpointError(f"{card}: θ has {entry.get('size')!r} bytes, expected a number up to {MAX_THETA}")
    return entry
