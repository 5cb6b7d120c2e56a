"""``l2o COMMAND``: every command by its name."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
from conftest import ROOT

import l2o
from meta_train import cli


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "l2o", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_without_a_command_they_are_listed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["l2o"])
    cli.main()
    said = capsys.readouterr().out
    assert all(f"l2o {name}" in said for name in cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_is_one(name: str) -> None:
    assert callable(importlib.import_module(f"meta_train.{name}").main)


def test_a_wrong_name_is_one_line_and_the_nearest_is_said() -> None:
    done = run("evalaute")
    assert done.returncode == 2
    assert "error: unknown command 'evalaute', did you mean 'evaluate'?" in done.stderr


def test_the_list_has_every_name() -> None:
    done = run("list")
    assert done.returncode == 0, done.stderr
    assert all(f"  {name}: " in done.stdout for name in [*l2o.list_pretrained(), *l2o.rules.__all__])


def test_arguments_and_status_are_those_of_the_command() -> None:
    done = run("replay", "nowhere.npz")
    assert (done.returncode, "nowhere.npz" in done.stderr) == (2, True)
