"""Downloads: what breaks off goes on, what is wrong is never kept, and nothing is asked for twice."""

from __future__ import annotations

import hashlib
import io
import sys
import threading
import urllib.request
from pathlib import Path

import pytest
from server import Page, Server

from l2o.download import _Redirects, cache_folder, fetch
from l2o.types import ConfigurationError, DownloadError

BODY = bytes(range(256)) * 1000
SHA256 = hashlib.sha256(BODY).hexdigest()
PART = f".file.{SHA256[:16]}.part"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the file is to come; the part of it is beside it."""
    (tmp_path / "kept").mkdir()
    return tmp_path / "kept" / "file"


def get(server: Server, path: Path, *pages: str, timeout: float = 30.0) -> Path:
    return fetch([server.url + page for page in pages or ("/a",)], path, SHA256, len(BODY), timeout)


def files(path: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in path.parent.iterdir()}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"L2O_CACHE_DIR": "/own", "XDG_CACHE_HOME": "/xdg"}, "/own"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/l2o"),
        ({"XDG_CACHE_HOME": ""}, "/home/someone/.cache/l2o"),
        ({"L2O_CACHE_DIR": "~/own"}, "/home/someone/own"),
    ],
)
def test_where_downloads_are_kept(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str) -> None:
    for name, value in {"L2O_CACHE_DIR": "", "XDG_CACHE_HOME": "", "HOME": "/home/someone", **variables}.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)


def test_without_a_home_folder_the_cache_wants_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("L2O_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as where nobody is known
    with pytest.raises(ConfigurationError, match="name its folder in L2O_CACHE_DIR"):
        cache_folder()


def test_a_file_is_fetched_once(server: Server, path: Path) -> None:
    server.pages["/a"] = Page(BODY)
    assert get(server, path) == path
    assert get(server, path) == path
    assert server.asked == [("/a", None)]
    assert files(path) == {"file": BODY}


def test_a_damaged_file_is_replaced(server: Server, path: Path) -> None:
    server.pages["/a"] = Page(BODY)
    path.write_bytes(BODY[:-1] + b"x")
    get(server, path)
    assert files(path) == {"file": BODY}


@pytest.mark.parametrize("second", ["/a", "/b"], ids=["the same server", "another mirror"])
def test_what_broke_off_goes_on(server: Server, path: Path, second: str) -> None:
    server.pages["/a"] = Page(BODY, breaks_at=1000)
    with pytest.raises(DownloadError, match=f"/a: the connection broke off after 1000 of {len(BODY)} bytes"):
        get(server, path)
    assert files(path) == {PART: BODY[:1000]}
    server.pages[second] = Page(BODY)
    get(server, path, second)
    assert server.asked[-1] == (second, "bytes=1000-")
    assert files(path) == {"file": BODY}


def test_the_next_mirror_goes_on_where_one_broke_off(server: Server, path: Path) -> None:
    server.pages |= {"/a": Page(BODY, breaks_at=1000), "/b": Page(BODY)}
    get(server, path, "/a", "/b")
    assert server.asked == [("/a", None), ("/b", "bytes=1000-")]
    assert files(path) == {"file": BODY}


@pytest.mark.parametrize(
    ("part", "page", "requests"),
    [
        (BODY[:1000], Page(BODY, ranges=False), 1),
        (b"x" * 1000, Page(BODY), 2),
        (b"x" * (len(BODY) - 1), Page(BODY), 2),
        (BODY, Page(), 0),
        (b"x" * len(BODY), Page(BODY), 1),
        (BODY + b"x", Page(BODY), 1),
    ],
    ids=["server without parts", "of another file", "of another file, long", "whole", "whole but wrong", "too long"],
)
def test_whatever_part_there_is_the_file_comes_out_right(
    server: Server, path: Path, part: bytes, page: Page, requests: int
) -> None:
    path.with_name(PART).write_bytes(part)
    server.pages["/a"] = page
    get(server, path)
    assert files(path) == {"file": BODY}
    assert len(server.asked) == requests


def test_a_part_that_is_longer_than_the_file_on_the_server_is_given_up(server: Server, path: Path) -> None:
    path.with_name(PART).write_bytes(b"x" * 200)
    server.pages["/a"] = Page(b"short")
    with pytest.raises(DownloadError, match="5 bytes with sha256"):
        get(server, path)
    assert server.asked == [("/a", "bytes=200-"), ("/a", None), ("/a", None)]
    assert files(path) == {}


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (Page(BODY[:-1] + b"x"), f"{len(BODY)} bytes with sha256 .*, expected {SHA256}"),
        (Page(BODY[:-1]), f"{len(BODY) - 1} bytes with sha256"),
        (Page(b""), "0 bytes with sha256"),
        (Page(BODY + b"x"), f"longer than the {len(BODY)} bytes"),
        (Page(BODY + bytes(10**6), announced=False), f"longer than the {len(BODY)} bytes"),
        (Page(BODY, 404), "HTTP Error 404"),
        (Page(BODY, 503), "HTTP Error 503"),
        (Page(BODY, 206, {"Content-Range": f"bytes 5-{len(BODY)}/*"}), "Content-Range 'bytes 5-"),
        (Page(BODY, headers={"Location": "/a"}, status=302), "infinite loop"),
        (Page(BODY, headers={"Location": "file:///etc/hostname"}, status=302), "not allowed"),
        (Page(BODY, headers={"Location": "ftp://127.0.0.1/a"}, status=302), "expected an address of https"),
        (Page(BODY, headers={"Location": "http://example.org/a"}, status=301), "http://example.org/a: expected an"),
        (Page(BODY, headers={"Location": "https://me:secret@example.org/a"}, status=302), "user's name"),
    ],
)
def test_a_bad_answer_is_named_and_not_kept(server: Server, path: Path, page: Page, message: str) -> None:
    server.pages["/a"] = page
    path.write_bytes(b"what was there")
    with pytest.raises(DownloadError, match=f"cannot download file:\n  {server.url}/a: .*{message}"):
        get(server, path)
    assert files(path) == {"file": b"what was there"}


def test_a_silent_server_is_given_up(server: Server, path: Path) -> None:
    server.pages["/a"] = Page(BODY, waits=0.5)
    with pytest.raises(DownloadError, match="timed out"):
        get(server, path, timeout=0.05)


def test_redirections_are_followed_a_few_times(server: Server, path: Path) -> None:
    server.pages |= {f"/{i}": Page(b"", 302, {"Location": f"/{i + 1}"}) for i in range(6)}
    server.pages["/6"] = Page(BODY)
    get(server, path, "/1")
    assert files(path) == {"file": BODY}
    path.unlink()
    with pytest.raises(DownloadError, match="infinite loop"):
        get(server, path, "/0")


def test_https_does_not_lead_to_http() -> None:
    with pytest.raises(DownloadError, match="redirected to http://localhost/b: expected an address of https"):
        _Redirects().redirect_request(
            urllib.request.Request("https://example.org/a"), io.BytesIO(), 302, "", {}, "http://localhost/b"
        )


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://localhost/a", "http://example.org/a", "data:,a", "a"])
def test_what_is_not_https_is_not_asked(path: Path, url: str) -> None:
    with pytest.raises(DownloadError, match="expected an address of https"):
        fetch([url], path, SHA256, len(BODY))


def test_without_a_checksum_whatever_comes_is_taken_and_no_part_goes_on(server: Server, path: Path) -> None:
    for body in (b"one", b"another"):
        server.pages["/a"] = Page(body, breaks_at=2)
        with pytest.raises(DownloadError, match="broke off"):
            fetch([f"{server.url}/a"], path, None, 100)
        server.pages["/a"] = Page(body)
        assert fetch([f"{server.url}/a"], path, None, 100).read_bytes() == body
    assert {wanted for _, wanted in server.asked} == {None}


def test_those_who_want_the_same_file_at_once_fetch_it_once(server: Server, path: Path) -> None:
    server.pages["/a"] = Page(BODY, waits=0.05)
    threads = [threading.Thread(target=get, args=(server, path)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.asked == [("/a", None)]
    assert files(path) == {"file": BODY}


def test_a_cache_that_cannot_be_written(server: Server, path: Path) -> None:
    path.write_bytes(b"")
    with pytest.raises(DownloadError, match=r"cannot be written .*L2O_CACHE_DIR"):
        get(server, path / "file")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("rich", [True, False])
def test_a_bar_on_a_terminal_where_rich_is(
    server: Server, path: Path, monkeypatch: pytest.MonkeyPatch, rich: bool
) -> None:
    server.pages["/a"] = Page(BODY)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    if not rich:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    get(server, path)
    assert ("256.0" in terminal.getvalue()) == rich
