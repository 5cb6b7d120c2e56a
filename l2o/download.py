"""Downloads into a cache: checked before they are kept, resumed where they broke off, made once.

`torch.hub.download_url_to_file` limits no size, resumes nothing and follows redirects to anywhere, hence our own.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from l2o import disk
from l2o.disk import cache_folder as cache_folder
from l2o.types import DownloadError

_CHUNK = 2**16
_LOCAL = ("localhost", "127.0.0.1", "::1")


def fetch(urls: Sequence[str], path: Path, sha256: str | None, max_bytes: int, timeout: float = 30.0) -> Path:
    """Have the file with this SHA-256 at ``path``, from the first of ``urls`` that serves it; returns ``path``.

    A file that is there and has the checksum is left as it is, without a look at the network; any other is replaced.
    What a broken connection brought stays beside ``path``, and the next call, or the next of ``urls``, goes on from
    there. Processes that want the same file at once download it once.

    urls: https, or http of this machine, and so are the addresses that they may redirect to.
    sha256: lower-case hexadecimal; None takes what is served, every time.
    max_bytes: a longer answer is refused.     timeout: seconds that a connection may be silent.
    Raises `DownloadError`, with what each address said, where none serves the file; ``path`` is then untouched.
    """
    if _holds(path, sha256):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.try_folder(path.parent)
    except OSError as error:
        raise DownloadError(
            f"{path.parent}: cannot be written ({error.strerror}); name another folder in L2O_CACHE_DIR"
        ) from error
    with disk.locked(path.parent):
        if not _holds(path, sha256):  # another process may have put it there in the meantime
            _first_of(urls, path, sha256, max_bytes, timeout)
    return path


def check_url(url: str) -> None:
    """Raise `DownloadError` unless ``url`` is one of https, or of http on this machine, without a user's name in it."""
    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in _LOCAL):
        raise DownloadError(f"{url}: expected an address of https (http only on this machine: {', '.join(_LOCAL)})")
    if parts.username is not None:
        raise DownloadError(f"an address of {parts.hostname} has a user's name in it; expected one without")


def _holds(path: Path, sha256: str | None) -> bool:
    return sha256 is not None and path.is_file() and disk.sha256(path) == sha256


def _first_of(urls: Sequence[str], path: Path, sha256: str | None, max_bytes: int, timeout: float) -> None:
    part = path.with_name(f".{path.name}.{(sha256 or 'unknown')[:16]}.part")
    if sha256 is None:  # of which file it would be the beginning, nobody knows
        part.unlink(missing_ok=True)
    failures = []
    for url in urls:
        try:
            _complete(url, part, sha256, max_bytes, timeout)
            disk.put_in_place(part, path)
            return
        except (OSError, http.client.HTTPException, ValueError) as error:
            failures.append(f"{url}: {error}")
            if isinstance(error, urllib.error.HTTPError):
                error.close()
    raise DownloadError(f"cannot download {path.name}:\n  " + "\n  ".join(failures))


def _complete(url: str, part: Path, sha256: str | None, max_bytes: int, timeout: float) -> None:
    """Make ``part`` whole; one that turns out not to have this checksum is removed, and so is one that is too long."""
    resumed = _size(part) > 0
    if not _holds(part, sha256):
        _stream(url, part, max_bytes, timeout)
    size, found = _size(part), disk.sha256(part)
    if sha256 is None or found == sha256:
        return
    part.unlink()
    if not resumed:
        raise DownloadError(f"{size} bytes with sha256 {found}, expected {sha256}")
    _complete(url, part, sha256, max_bytes, timeout)  # it was the beginning of another file: once more, from the start


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _stream(url: str, part: Path, max_bytes: int, timeout: float) -> None:
    """Append to ``part`` what is missing, or write it anew where the server does not do parts."""
    size = _size(part) if _size(part) < max_bytes else 0
    with _open(url, size, timeout) as answer:
        size = _first_byte(answer, size)
        announced = answer.length  # None: the server does not say
        total = None if announced is None else size + announced
        with open(part, "ab" if size else "wb") as file, _progress(part, size, total) as advance:
            while (total or size) <= max_bytes and (chunk := answer.read(_CHUNK)):
                file.write(chunk)
                advance(len(chunk))
                size += len(chunk)
            file.flush()
            os.fsync(file.fileno())
    if max(size, total or 0) > max_bytes:
        part.unlink()
        raise DownloadError(f"the answer is longer than the {max_bytes} bytes expected at most")
    if total is not None and size < total:
        raise DownloadError(f"the connection broke off after {size} of {total} bytes expected; try again to go on")


def _open(url: str, start: int, timeout: float) -> Any:
    """The answer to a request for ``url`` from byte ``start`` on; of the whole where there is nothing after it."""
    check_url(url)
    headers = {"User-Agent": "l2o", **({"Range": f"bytes={start}-"} if start else {})}
    try:
        return urllib.request.build_opener(_Redirects).open(urllib.request.Request(url, headers=headers), None, timeout)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not start:
            raise
        error.close()
        return _open(url, 0, timeout)


def _first_byte(answer: Any, asked: int) -> int:
    """At which byte of the file the answer begins."""
    if answer.status != http.HTTPStatus.PARTIAL_CONTENT:
        return 0
    came = answer.headers.get("Content-Range", "")
    if not asked or not came.startswith(f"bytes {asked}-"):
        raise DownloadError(f"the answer is of Content-Range {came!r}, expected one from byte {asked} on")
    return asked


class _Redirects(urllib.request.HTTPRedirectHandler):
    """A few redirections, never to where `check_url` would not go, nor from https to http."""

    max_redirections = 5

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        try:
            check_url(newurl)
            if req.type == "https" and urlsplit(newurl).scheme != "https":
                raise DownloadError(f"redirected to {newurl}: expected an address of https")
        except BaseException:
            fp.close()
            raise
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@contextlib.contextmanager
def _progress(part: Path, done: int, total: int | None) -> Iterator[Callable[[int], object]]:
    """A function to call with each number of bytes that came: a bar, on a terminal and where rich is installed."""
    if sys.stderr is None or not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
        yield lambda n: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(part.stem.rpartition(".")[0].lstrip("."), completed=done, total=total)
        yield lambda n: bar.advance(task, n)
