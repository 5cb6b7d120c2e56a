"""Checkpoints at an address: pinned or refused, fetched once, used offline, and checked at every use."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path

import pytest
import torch
from plugin import source
from server import Page, Server
from tables import identical

import l2o
from l2o.checkpoints import store
from l2o.download import cache_folder
from l2o.rules import LSTM, MLP
from l2o.types import CheckpointError, ConfigurationError, DownloadError
from meta_train.config.assemble import _warm_start

COMMIT = "0123456789abcdef" * 2 + "01234567"
RULE = MLP(hidden=(4,))


def publish(server: Server, folder: str, rule: l2o.UpdateRule = RULE) -> str:
    """Serve a checkpoint of ``rule`` in ``folder``; returns the SHA-256 of its card."""
    here = store.save(cache_folder().parent / "published", *source(rule))
    for name in ("card.json", "theta.safetensors"):
        server.pages[f"{folder}/{name}"] = Page((here / name).read_bytes())
    return hashlib.sha256(server.pages[f"{folder}/card.json"].body).hexdigest()


@pytest.fixture
def pinned(server: Server) -> str:
    """The address of a checkpoint, with its pin."""
    return f"{server.url}/some/mlp#sha256={publish(server, '/some/mlp')}"


@pytest.fixture
def repository(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A hub with a repository ``owner/name``: a checkpoint at COMMIT, which is ``main``, and in a branch."""
    monkeypatch.setenv("HF_ENDPOINT", f"{server.url}/")
    for revision in (COMMIT, "main", "a%2Fbranch"):
        publish(server, f"/owner/name/resolve/{revision}")
    return server


def cached(name: str) -> Path:
    [path] = (cache_folder() / "checkpoints").rglob(name)
    return path


@pytest.mark.parametrize("form", ["/some/mlp", "/some/mlp/", "/some/mlp/card.json"])
def test_an_address_is_fetched_once_and_used_offline(server: Server, form: str) -> None:
    address = f"{server.url}{form}#sha256={publish(server, '/some/mlp')}"
    rule, theta = store.load(address)
    assert rule == RULE
    assert identical(theta, source(RULE)[1])
    server.pages.clear()
    assert identical(store.load(address)[1], theta)
    assert store.read_card(address)["rule"] == "MLP"
    assert server.asked == [("/some/mlp/card.json", None), ("/some/mlp/theta.safetensors", None)]


def test_an_address_serves_wherever_a_name_does(pinned: str) -> None:
    optimizer = l2o.LearnedOptimizer([torch.nn.Parameter(torch.zeros(2))], pinned, total_steps=10)
    assert optimizer.rule == RULE
    assert identical(_warm_start(pinned, RULE), optimizer.theta)


def test_a_query_stays_with_both_files(server: Server) -> None:
    digest = publish(server, "/mlp")
    server.pages |= {f"{path}?key=1": page for path, page in server.pages.items()}
    store.load(f"{server.url}/mlp?key=1#sha256={digest.upper()}")
    assert [path for path, _ in server.asked] == ["/mlp/card.json?key=1", "/mlp/theta.safetensors?key=1"]


@pytest.mark.parametrize("end", [f"@{COMMIT}", "@main#unpinned", "#unpinned", "@a/branch#unpinned"])
def test_a_repository_is_fetched_once_and_used_offline(repository: Server, end: str) -> None:
    assert store.load(f"hf:owner/name{end}")[0] == RULE
    repository.pages.clear()
    assert store.load(f"hf:owner/name{end}")[0] == RULE


def test_a_branch_may_be_pinned_by_its_card(repository: Server) -> None:
    digest = hashlib.sha256(repository.pages["/owner/name/resolve/main/card.json"].body).hexdigest()
    assert store.load(f"hf:owner/name@main#sha256={digest}")[0] == RULE
    publish(repository, "/owner/name/resolve/main", LSTM(hidden=(3,)))
    cached("card.json").unlink()
    with pytest.raises(DownloadError, match=f"expected {digest}"):
        store.load(f"hf:owner/name@main#sha256={digest}")


def test_what_is_unpinned_stays_as_it_came(repository: Server) -> None:
    for _ in range(2):
        assert store.load("hf:owner/name#unpinned")[0] == RULE
        publish(repository, "/owner/name/resolve/main", LSTM(hidden=(3,)))
    cached("theta.safetensors").unlink()
    with pytest.raises(DownloadError, match=r"to take what is there now, remove .*main-"):
        store.load("hf:owner/name#unpinned")


@pytest.mark.parametrize("body", [b"<html>Log in to this network</html>", b"", b"{}", b'{"theta": {}}'])
def test_what_is_no_card_is_not_kept_as_what_came_first(repository: Server, body: bytes) -> None:
    card = f"/owner/name/resolve/{COMMIT}/card.json"
    good, repository.pages[card] = repository.pages[card], Page(body)
    with pytest.raises(CheckpointError, match=r"card\.json"):
        store.load(f"hf:owner/name@{COMMIT}")
    repository.pages[card] = good
    assert store.load(f"hf:owner/name@{COMMIT}")[0] == RULE


def test_what_is_not_there_leaves_nothing_to_remove(repository: Server) -> None:
    repository.pages.clear()
    with pytest.raises(DownloadError, match="404") as caught:
        store.load("hf:owner/name#unpinned")
    assert "remove" not in str(caught.value)


@pytest.mark.parametrize("name", ["a\0b", "a" * 5000, "a b", "é"])
def test_an_address_may_be_no_name_of_a_folder(server: Server, name: str) -> None:
    with pytest.raises(DownloadError, match=r"cannot download card\.json"):
        store.load(f"{server.url}/{name}#unpinned")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("https://[example.org/mlp#unpinned", "Invalid IPv6 URL; expected the address of a checkpoint's folder"),
        ("https://example.org/mlp", r"serve something else tomorrow.*mlp#sha256=.*mlp#unpinned"),
        ("hf:owner/name", "Pin it with a full commit, @ and 40 hexadecimal digits"),
        ("hf:owner/name@main", "hf:owner/name@main#unpinned"),
        ("hf:owner/name@" + COMMIT[:39], "Pin it with a full commit"),
        ("https://example.org/mlp#", "ends in '#', expected #sha256="),
        ("https://example.org/mlp#sha256=" + "0" * 63, "64 hexadecimal digits"),
        ("https://example.org/mlp#sha1=" + "0" * 40, "#sha256="),
        ("hf:owner/name#Unpinned", "#unpinned"),
        ("hf:owner#unpinned", "expected hf:owner/name@revision"),
        ("hf://owner/name#unpinned", "expected hf:owner/name@revision"),
        ("hf:owner/..#unpinned", "expected hf:owner/name@revision"),
        ("hf:owner/name@#unpinned", "expected hf:owner/name@revision"),
        ("https:example#unpinned", "expected the address of a checkpoint's folder"),
        ("https://example.org/mlp/theta.safetensors#unpinned", r"folder, or of its card\.json"),
    ],
)
def test_addresses_that_are_unpinned_or_none(server: Server, address: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        store.load(address)
    assert not cache_folder().exists()


def test_only_this_machine_is_asked_over_http(server: Server) -> None:
    with pytest.raises(DownloadError, match="expected an address of https"):
        store.load("http://example.org/mlp#unpinned")


ALTER = {
    "altered": lambda body: body[:-1] + bytes([body[-1] ^ 1]),
    "truncated": lambda body: body[:-1],
    "oversized": lambda body: body + b" ",
}


@pytest.mark.parametrize("name", ["card.json", "theta.safetensors"])
@pytest.mark.parametrize("how", ALTER)
def test_what_is_not_what_the_pin_says_is_refused(server: Server, pinned: str, name: str, how: str) -> None:
    page = server.pages[f"/some/mlp/{name}"]
    server.pages[f"/some/mlp/{name}"] = Page(ALTER[how](page.body))
    with pytest.raises(DownloadError, match=rf"(?s)source='{server.url}.*{name}: .*expected.*Check the address"):
        store.load(pinned)
    server.pages[f"/some/mlp/{name}"] = page
    assert store.load(pinned)[0] == RULE


def test_theta_that_broke_off_goes_on(server: Server, pinned: str) -> None:
    page = server.pages["/some/mlp/theta.safetensors"]
    server.pages["/some/mlp/theta.safetensors"] = Page(page.body, breaks_at=100)
    with pytest.raises(DownloadError, match="broke off after 100"):
        store.load(pinned)
    server.pages["/some/mlp/theta.safetensors"] = page
    assert store.load(pinned)[0] == RULE
    assert server.asked[-1] == ("/some/mlp/theta.safetensors", "bytes=100-")


@pytest.mark.parametrize(
    "entry",
    [
        None,
        {},
        {"sha256": "0" * 63, "size": 1},
        *({"sha256": "0" * 64, "size": n} for n in (0, 2**30 + 1, True, "1", None)),
    ],
)
def test_a_card_that_does_not_say_which_theta(server: Server, entry: object) -> None:
    server.pages["/mlp/card.json"] = Page(json.dumps({"theta": entry}).encode())
    with pytest.raises(CheckpointError, match=r"card\.json: (expected an entry 'theta'|θ has .* bytes)"):
        store.load(f"{server.url}/mlp#unpinned")
    assert len(server.asked) == 1


def test_a_card_that_is_too_long(server: Server) -> None:
    server.pages["/mlp/card.json"] = Page(b" " * (2**20 + 1))
    with pytest.raises(DownloadError, match="longer than the 1048576 bytes"):
        store.load(f"{server.url}/mlp#unpinned")


@pytest.mark.parametrize("name", ["card.json", "theta.safetensors"])
@pytest.mark.parametrize("end", ["#sha256=", "#unpinned"])
def test_a_cache_that_was_damaged_is_mended_or_named(server: Server, name: str, end: str) -> None:
    digest = publish(server, "/mlp")
    address = f"{server.url}/mlp{end}{digest if end.endswith('=') else ''}"
    store.load(address)
    good = cached(name).read_bytes()
    cached(name).write_bytes(good.replace(b"MLP", b"SGD") if name == "card.json" else good[:-1] + b"\0")
    pages = dict(server.pages)
    server.pages.clear()
    with pytest.raises(DownloadError, match=f"cannot download {name}.*\n.*404[^$]*give its path"):
        store.load(address)
    server.pages |= pages
    assert store.load(address)[0] == RULE
    assert cached(name).read_bytes() == good


def test_two_at_once_fetch_each_file_once(server: Server, pinned: str) -> None:
    rules = []
    threads = [threading.Thread(target=lambda: rules.append(store.load(pinned)[0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rules == [RULE] * 4
    assert len(server.asked) == 2


def test_the_card_of_a_download_is_not_written(pinned: str) -> None:
    for write in (store.check_writable, lambda address: store.annotate(address, {"licence": "MIT"})):
        with pytest.raises(ConfigurationError, match=r"its card stays as it was published; copy the folder .*mlp-"):
            write(pinned)
