"""What all commands do alike: a first line at once, Ctrl-C, 80 columns, pictures whatever the environment says."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from test_imports import ENTRY_POINTS
from training import command, snapshot

from meta_train.config.compose import if_interrupted, main_guard, wrapped

COMMANDS = sorted({name.removesuffix(".train") for name in ENTRY_POINTS})
pytestmark = pytest.mark.usefixtures("here")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_first_line_comes_before_torch_is_imported_and_ctrl_c_is_a_line(here: Path, name: str) -> None:
    """Without torch there would be nothing but the first line."""
    (here / "torch.py").write_text("import time\ntime.sleep(60)")
    env = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{ROOT}"}
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # also where tests run in the background of a shell
    made = partial(subprocess.Popen, env=env, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    with made([sys.executable, "-m", name]) as started:
        assert started.stderr is not None
        assert started.stderr.readline() == f"{name}: loading\n"
        started.send_signal(signal.SIGINT)
        assert started.stderr.read() == "\ninterrupted before anything was begun\n"
    assert started.returncode == 130


@pytest.mark.parametrize("kept", [None, "the first 3 are in out"])
def test_ctrl_c_is_a_line_and_status_130(capsys: pytest.CaptureFixture[str], kept: str | None) -> None:
    @main_guard
    def main() -> None:
        if kept:
            if_interrupted(kept)
        raise KeyboardInterrupt

    assert command(base=[], main=main) == 130
    said = kept or "nothing was written; the same command starts anew"
    assert capsys.readouterr().err == f"\ninterrupted: {said}\n"


def test_a_file_that_is_no_yaml_is_a_line_that_names_the_place(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "own" / "task").mkdir(parents=True)
    (here / "own" / "task" / "mine.yaml").write_text("_target_: [\n", "utf-8")
    assert command("--config-dir", str(here / "own"), "task=mine", base=[]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: a configuration is no YAML: ")
    assert "mine.yaml" in err
    assert err.count("\n") == 1


INTERRUPTED = {
    "bench": ("_alone", ["out=made.json"], "nothing was written"),
    "convert": ("convert", ["theta.state", "--to", "new", "--licence", "MIT"], "no checkpoint was written"),
    "inspect": ("inspect", ["SGD", "--task", "quadratic"], "nothing was written"),
    "replay": ("read_trace", ["run.npz"], "nothing was written"),
    "rules_table": ("row", ["--only", "SGD"], "nothing was written"),
    "train": ("make_session", ["run=run"], "nothing was written"),
}


@pytest.mark.parametrize("name", INTERRUPTED)
def test_every_command_can_be_interrupted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    what, arguments, said = INTERRUPTED[name]
    module = importlib.import_module(f"meta_train.{name}")
    monkeypatch.setattr(module, what, interrupted)
    assert command(*arguments, base=[], main=module.main) == 130
    assert said in capsys.readouterr().err
    assert snapshot() == {}


def test_records_that_were_written_are_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from meta_train import bench

    def two_records(*_: object) -> Iterator[dict[str, Any]]:
        for _ in range(2):
            yield {"setup": "pes", "range": (1, 2), "steps_per_second": 12.5, "share": {"rule": 0.25, "rest": 0.75}}
        raise KeyboardInterrupt

    monkeypatch.setitem(bench.SUITES, "engine", two_records)
    assert command("out=made.json", base=[], main=bench.main) == 130
    said = capsys.readouterr()
    assert "interrupted: made.json has the first 2 records" in said.err
    assert max(map(len, said.out.splitlines())) <= 80


def test_pictures_need_no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    env = {**os.environ, "MPLBACKEND": "nonsense", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "meta_train.inspect", "SGD", "--task", "quadratic", "--steps", "20", "--lanes", "1"]
    done = subprocess.run(line, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "meta_train.inspect: loading\n")
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert Path("inspect-SGD.png").read_bytes().startswith(b"\x89PNG")


def test_text_is_wrapped_and_long_words_stay_whole() -> None:
    lines = wrapped(f"{'a ' * 60}{'b' * 90} c", 2).splitlines()
    assert [len(line) for line in lines] == [79, 41, 92, 3]
    assert all(line.startswith("  ") for line in lines[1:])
