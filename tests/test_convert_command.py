"""The command that converts weights of others: settings, addresses that serve weights or do not, one-line errors."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
from originals import adafac, write
from server import Page, Server
from training import status

import l2o
from l2o.rules import AdafacMLP
from meta_train.convert import main, run, setting


def test_the_command(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(write(here / "theta.state", adafac(39, 4, 4, 2)))
    command = [file, "--to", "new", "--licence", "CC0-1.0", "--set", "step_mult=0.02"]
    run(command)
    said = capsys.readouterr().out
    assert "AdafacMLPLOpt: AdafacMLP(hidden=(4, 4)" in said
    assert "not in the files: step_mult = 0.02" in said
    assert l2o.load("new")[0] == AdafacMLP(step_mult=0.02)
    bad = {"a checkpoint is there already": command, "expected NAME=VALUE": [*command, "--set", "x"]}
    for message, arguments in bad.items():
        assert status(main, *arguments) == 2
        assert message in capsys.readouterr().err


def test_true_and_false_may_be_written_as_in_python() -> None:
    assert [setting(f"mup={text}") for text in ("True", "False", "true", "0")] == [
        ("mup", True), ("mup", False), ("mup", True), ("mup", 0),
    ]  # fmt: skip


@pytest.mark.parametrize("to", ["taken", "taken/new"])
def test_a_folder_that_cannot_be_made_is_one_line(here: Path, capsys, to: str) -> None:
    (here / "taken").touch()
    file = str(write(here / "theta.state", adafac(39, 4, 4, 2)))
    assert status(main, file, "--to", to, "--licence", "MIT") == 2
    said = capsys.readouterr().err
    assert re.fullmatch(rf"error: to='{to}' cannot be written \(.*name another\n", said)


COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.mark.parametrize(
    ("address", "page"),
    [
        (f"hf:owner/name@{COMMIT}", f"/owner/name/resolve/{COMMIT}/theta.state"),
        (f"hf:owner/name@{COMMIT}", f"/owner/name/resolve/{COMMIT}/model.safetensors"),
        (f"hf:owner/name@{COMMIT}/a/b.state", f"/owner/name/resolve/{COMMIT}/a/b.state"),
        ("hf:owner/name@main#sha256={pin}", "/owner/name/resolve/main/theta.state"),
        ("hf:owner/name#unpinned", "/owner/name/resolve/main/theta.state"),
        ("{url}/some/theta.state#sha256={pin}", "/some/theta.state"),
        ("{url}/some/theta.state?key=1#sha256={pin}", "/some/theta.state?key=1"),
    ],
)
def test_weights_at_an_address_are_one_command(
    here: Path, server: Server, capsys, monkeypatch, address: str, page: str
) -> None:
    """Fetched once, and then taken from the cache."""
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    content = write(here / "theta.state", adafac(39, 4, 4, 2)).read_bytes()
    server.pages[page] = Page(content)
    source = address.format(url=server.url, pin=hashlib.sha256(content).hexdigest())
    for to in ("new", "again"):
        run([source, "--to", to])
        assert f"see {source}" in " ".join(capsys.readouterr().out.split())
        server.pages.clear()
    assert l2o.load("again")[0] == AdafacMLP()
    (file,) = l2o.read_card("again")["origin"]["files"]
    assert (file["address"], file["size"]) == (source, len(content))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf:owner/name", "may serve something else tomorrow. Pin it with a full commit"),
        ("hf:owner/name@main", "by the SHA-256 of the file, hf:owner/name@main#sha256"),
        (f"hf:owner/name@{COMMIT[:7]}", "Pin it with a full commit"),
        (f"hf:owner/name@{COMMIT}/../x", "expected hf:owner/name@commit, or with /FILE behind it"),
        ("hf:owner", "expected hf:owner/name"),
        ("{url}/theta.state", "Pin it with #sha256"),
        ("{url}/#unpinned", "expected the address of a file of weights"),
        ("{url}/theta.state#sha256=12", "64 hexadecimal digits, the SHA-256 of the file"),
        ("{url}/other.state#sha256=" + "0" * 64, "expected " + "0" * 64),
        ("{url}/none.state#sha256=" + "0" * 64, "404"),
        (f"hf:owner/name@{COMMIT}", "pytorch_model.bin"),
        ("http://example.org/theta.state#unpinned", "expected an address of https"),
    ],
)
def test_an_address_that_does_not_serve_is_said(
    here: Path, server: Server, capsys, monkeypatch, address: str, message: str
) -> None:
    server.pages["/other.state"] = Page(b"something else")
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    assert status(main, address.format(url=server.url), "--to", "new") == 2
    assert message in capsys.readouterr().err
    assert not (here / "new").exists()


def test_a_licence_has_to_be_stated(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(["theta.state", "--to", "new"])
    assert "--licence" in capsys.readouterr().err
