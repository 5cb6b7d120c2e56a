"""Downloads that are checked before they are kept."""

from __future__ import annotations

import hashlib
import http.client
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from l2o._files import atomic_write
from l2o.types import DataError


def fetch(urls: Sequence[str], path: Path, sha256: str, max_bytes: int, timeout: float = 30.0) -> Path:
    """Put the file that has this SHA-256 at ``path``, from the first of ``urls`` that serves it; returns ``path``.

    max_bytes: a longer answer is refused.     timeout: seconds that a connection may be silent.
    Raises `DataError`, with what each mirror said, where none serves the file; ``path`` is then untouched.
    """
    failures = []
    for url in urls:
        try:
            atomic_write(path, _download(url, sha256, max_bytes, timeout))
            return path
        except (OSError, http.client.HTTPException, ValueError) as error:
            failures.append(f"{url}: {error}")
    raise DataError(f"cannot download {path.name}:\n  " + "\n  ".join(failures))


def _download(url: str, sha256: str, max_bytes: int, timeout: float) -> bytes:
    with urllib.request.urlopen(url, timeout=timeout) as response:
        content: bytes = response.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise DataError(f"the answer is longer than the {max_bytes} bytes expected at most")
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise DataError(f"{len(content)} bytes with sha256 {found}, expected {sha256}")
    return content
