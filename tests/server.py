"""A small HTTP server of good and bad answers, for the tests of downloads."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Page:
    """An answer, good unless it says otherwise.

    breaks_at: byte at which the connection breaks off.   ranges: whether the server does parts.   headers: one's own.
    announced: whether the length is.                     waits: seconds before the first byte.
    """

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    breaks_at: int | None = None
    ranges: bool = True
    announced: bool = True
    waits: float = 0.0


@dataclass
class Server:
    """url: of its root.   pages: what is at which path; may change.   asked: ``(path, Range)`` of each request."""

    url: str
    pages: dict[str, Page] = field(default_factory=dict)
    asked: list[tuple[str, str | None]] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    site: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.site.asked.append((self.path, wanted))
        page = self.site.pages.get(self.path, Page(b"not found", 404))
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and page.ranges else 0
        time.sleep(page.waits)
        if start and start >= len(page.body):
            page, start = Page(b"", 416), 0
        self.send_response(206 if start else page.status)
        own = {"Content-Range": f"bytes {start}-{len(page.body) - 1}/{len(page.body)}"} if start else {}
        own |= {"Content-Length": str(len(page.body) - start)} if page.announced else {}
        for name, value in {**own, **page.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the other side may have had enough
            self.wfile.write(page.body[start : page.breaks_at])

    def log_message(self, *args: object) -> None:
        """Not into the test's output."""


@contextlib.contextmanager
def running() -> Iterator[Server]:
    """A server in a thread of this process, for as long as it is needed."""
    handler = type("Handler", (_Handler,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        handler.site = Server(f"http://127.0.0.1:{http.server_port}")
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield handler.site
        http.shutdown()
        thread.join()
