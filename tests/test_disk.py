"""A disk that takes no more, at each of the places that write: one line, and nothing lost that was saved before."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from training import command, outcome, snapshot

import l2o
from l2o.disk import load_tree
from meta_train.loggers import JsonLines

pytestmark = pytest.mark.usefixtures("here")

SETTINGS = ["steps=3", "log_every=1", "checkpoint_every=2", "evaluate_every=2"]


@pytest.fixture
def whole() -> dict[str, bytes]:
    """The outcome of the run that nothing happens to."""
    assert command(*SETTINGS, "run=whole") == 0
    return outcome("whole")


@contextlib.contextmanager
def full_after(monkeypatch: pytest.MonkeyPatch, writes: int) -> Iterator[list[int]]:
    """That many files get to the disk, as ``fsync`` tells, and then no more; the list grows by each that wants to."""
    asked: list[int] = []

    def fsync(descriptor: int, own: Callable[[int], None] = os.fsync) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            asked.append(descriptor)
        if len(asked) > writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        own(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        yield asked


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The kernel lets files grow to that many bytes only: it writes what fits, and then refuses."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def check_refusal(said: str) -> None:
    """One line that names the file and the cause, and a folder in which all that is there is whole."""
    assert said.startswith("error: run")
    assert "cannot be written (" in said
    assert "the same command goes on" in said
    assert said.count("\n") == 1
    assert not [name for name in snapshot("run") if name.endswith(".tmp")]
    if Path("run/state.safetensors").exists():
        load_tree("run/state.safetensors")
    for folder in ("run/checkpoint", "run/best"):
        if Path(folder).exists() and any(Path(folder).iterdir()):
            l2o.load(folder)


def test_a_disk_that_is_full_at_any_write_loses_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes]
) -> None:
    with full_after(monkeypatch, 1_000) as asked:
        assert command(*SETTINGS) == 0
    assert len(asked) == 1 + 2 + 2 * (3 + 2 + 2)  # configuration; start; records and state, checkpoint, best
    for writes in range(len(asked)):
        shutil.rmtree("run")
        capsys.readouterr()
        with full_after(monkeypatch, writes):
            assert command(*SETTINGS) == 2
        check_refusal(capsys.readouterr().err)
        assert command(*SETTINGS) == 0
        assert outcome() == whole


@pytest.mark.parametrize("size", [0, 200, 2000])
def test_files_that_the_kernel_cuts_off_are_made_good(
    capsys: pytest.CaptureFixture[str], whole: dict[str, bytes], size: int
) -> None:
    """Nothing fits, the first lines of the records do, the configuration and the records but not the state do."""
    with largest_file(size):
        assert command(*SETTINGS) == 2
    check_refusal(capsys.readouterr().err)
    assert command(*SETTINGS) == 0
    assert outcome() == whole


def test_a_record_that_was_cut_off_is_made_good(capsys: pytest.CaptureFixture[str], whole: dict[str, bytes]) -> None:
    settings = ["steps=80", "log_every=1", "checkpoint_every=20", "evaluate_every=0"]
    assert command(*settings, "run=long") == 0
    files = [path for path in Path("long").rglob("*.*") if path.suffix != ".png"]  # which is drawn when all is done
    size = max(path.stat().st_size for path in files if path.name != "metrics.jsonl") + 1000
    assert size < Path("long/metrics.jsonl").stat().st_size
    with largest_file(size):
        assert command(*settings) == 2
    check_refusal(capsys.readouterr().err)
    assert Path("run/metrics.jsonl").stat().st_size == size  # in the middle of a line
    assert load_tree("run/state.safetensors")[0]["training"]["step"] in (20, 40, 60)
    assert command(*settings) == 0
    assert outcome() == outcome("long")


@pytest.mark.parametrize("name", [".lock", "timing.jsonl", "checkpoint", "best"])
def test_a_place_that_cannot_be_written_is_named(
    capsys: pytest.CaptureFixture[str], whole: dict[str, bytes], name: str
) -> None:
    """What is a folder cannot become a file, nor the other way round, not even for root."""
    blocked = Path("run", name)
    blocked.parent.mkdir()
    blocked.touch() if "." not in name else blocked.mkdir()
    assert command(*SETTINGS) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: run=run cannot" if name == ".lock" else f"error: {blocked} cannot")
    assert said.count("\n") == 1
    blocked.unlink() if "." not in name else blocked.rmdir()
    assert command(*SETTINGS) == 0
    assert outcome() == whole


def test_a_record_that_is_cut_back_has_the_size_that_it_says(tmp_path: Path) -> None:
    """Python's own position stays behind the end of a file that was cut."""
    record = JsonLines(tmp_path / "record", 0)
    record.write({"step": 1})
    size = record.sync()
    record.write({"step": 2})
    record.close()
    again: Any = JsonLines(tmp_path / "record", size)
    assert again.sync() == size
    again.write({"step": 3})
    again.close()
    assert (tmp_path / "record").read_bytes() == b'{"step": 1}\n{"step": 3}\n'
