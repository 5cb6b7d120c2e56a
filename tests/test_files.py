"""Atomic writes, nested states in one file, and where data folders lie."""

from __future__ import annotations

import hashlib
import os
import pwd
import stat
from pathlib import Path

import pytest
import torch
from tables import identical

from l2o.disk import FORMAT, VERSION, atomic_write, load_tree, resource, save_tree, sha256, to_bytes, user_path
from l2o.types import ConfigurationError, L2OError, ResumeError

DTYPES = [
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16),
    *(torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64),
]


def test_a_write_replaces_the_whole_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "new" / "file"
    for data in (b"a long first content", b"short", b""):
        atomic_write(path, data)
        assert path.read_bytes() == data
        assert sha256(path) == hashlib.sha256(data).hexdigest()
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("~/a", "/home/me/a"), ("~", "/home/me"), ("./~/a", "/work/~/a"), ("a/~", "a/~"), ("a b=c", "a b=c"), ("", ".")],
)
def test_a_path_that_a_user_has_typed(monkeypatch, typed, meant):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr(os, "getcwd", lambda: "/work")
    assert user_path(typed) == Path(meant)
    assert user_path(user_path(typed)) == Path(meant)


@pytest.mark.parametrize("typed", ["~nobody-of-this-name/a", "~", "x" * 256, "a/" * 3000, "a\0b"])
def test_what_can_be_no_path_is_one_line(monkeypatch, typed):
    def nobody(who):
        raise KeyError(who)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(ConfigurationError, match=r"no such user, or no home folder|can be no path") as caught:
        user_path(typed)
    assert "\n" not in str(caught.value)


def test_a_name_may_be_as_long_as_files_have_it(tmp_path):
    atomic_write(tmp_path / ("ä" * 127), b"abc")
    assert os.listdir(tmp_path) == ["ä" * 127]


def test_files_have_the_permissions_of_any_new_file(tmp_path):
    atomic_write(tmp_path / "atomic", b"")
    (tmp_path / "plain").write_bytes(b"")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("atomic", "plain")]
    assert modes[0] == modes[1]


def test_file_and_folder_are_on_disk_when_a_write_returns(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor)))
    atomic_write(tmp_path / "file", b"abc")
    assert [status.st_size for status in synced if stat.S_ISREG(status.st_mode)] == [3]
    assert [status.st_ino for status in synced if stat.S_ISDIR(status.st_mode)] == [tmp_path.stat().st_ino]


@pytest.mark.parametrize("stage", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, stage):
    path = tmp_path / "file"
    atomic_write(path, b"old")

    def fail(*args: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, stage, fail)
    with pytest.raises(OSError, match="no space left"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def tree() -> dict:
    generator = torch.Generator().manual_seed(3)
    values = {str(dtype): (torch.randn(2, 3, generator=generator) * 9).abs().to(dtype) for dtype in DTYPES}
    return {
        **values,
        "0-d": {str(dtype): torch.ones((), dtype=dtype) for dtype in DTYPES},
        "empty": {str(dtype): torch.ones(0, 2, dtype=dtype) for dtype in DTYPES},
        "scalars": [1, -2.5, 0.1 + 0.2, 1e-320, float("inf"), None, True, "θ", 2**80],
        "nan": torch.tensor([float("nan"), -0.0]),
        "a/b": {"~": torch.ones(1), "": torch.zeros(1)},
        "a": {"b/~": torch.full((1,), 2.0), "b": {"~": torch.full((1,), 3.0)}},
        "a~1b": torch.full((1,), 4.0),
        "c/d": torch.full((1,), 5.0),
        "c~1d": torch.full((1,), 6.0),
        "dict": {"tensor": "dict", "dict": {}, "list": []},
        "view": values["torch.float32"].T,
        "expanded": torch.ones(1).expand(3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "generator": generator.get_state(),
    }


def test_a_tree_comes_back_bit_for_bit(tmp_path):
    saved = tree()
    save_tree(tmp_path / "state", saved, {"step": 3, "keys": ["a", None]})
    loaded, metadata = load_tree(tmp_path / "state")
    assert metadata == {"step": 3, "keys": ["a", None]}
    assert list(loaded) == list(saved)
    assert identical(loaded, saved)
    assert loaded["nan"].signbit().tolist() == saved["nan"].signbit().tolist()
    assert type(loaded["scalars"][6]) is bool


def test_loaded_tensors_are_contiguous_and_independent_of_the_file(tmp_path):
    path = tmp_path / "state"
    save_tree(path, {"view": torch.arange(6.0).view(2, 3).T, "list": [torch.zeros(2)]})
    loaded, _ = load_tree(path)
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert loaded["view"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert loaded["view"].is_contiguous()
    loaded["list"][0].add_(1)


@pytest.mark.parametrize("root", [torch.ones(2), [torch.ones(2), 1], {}, 3])
def test_a_tree_may_be_anything(tmp_path, root):
    save_tree(tmp_path / "state", root)
    assert identical(load_tree(tmp_path / "state")[0], root)


@pytest.mark.parametrize(
    ("node", "named"),
    [
        ({"a": [{"b": {1, 2}}]}, "a/0/b is set"),
        ({"a": {0: 1}}, "a is a dict whose keys"),
        (torch.Generator(), "tree is Generator"),
    ],
)
def test_what_is_neither_tensor_nor_scalar_is_named_before_anything_is_written(tmp_path, node, named):
    with pytest.raises(TypeError, match=named):
        save_tree(tmp_path / "state", node)
    assert not os.listdir(tmp_path)


def changed_byte(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:5],
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        changed_byte,
        lambda data: data.replace(b'"a"', b'"b"').replace(b'\\"a\\"', b'\\"b\\"'),
        lambda data: b"\x80\x05K\x01.",
        lambda data: to_bytes({"a": torch.ones(2)}),
        lambda data: to_bytes({}, {"format": FORMAT, "version": str(VERSION)}),
    ],
    ids=["empty", "start", "half", "cut", "flipped", "renamed", "pickle", "foreign", "headless"],
)
def test_damaged_and_foreign_files(tmp_path, damage):
    path = tmp_path / "state"
    save_tree(path, {"a": torch.ones(2)})
    data = path.read_bytes()
    assert damage(data) != data
    path.write_bytes(damage(data))
    with pytest.raises(ResumeError, match=str(path)):
        load_tree(path)


def test_a_file_of_another_program_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(to_bytes({"a": torch.ones(2)}, {"format": "pt"}))
    with pytest.raises(ResumeError, match=f"not a file to resume from; its format is 'pt', not '{FORMAT}'"):
        load_tree(path)


def test_another_version_of_the_format_is_named(tmp_path):
    path = tmp_path / "state"
    path.write_bytes(to_bytes({}, {"format": FORMAT, "version": "99"}))
    with pytest.raises(ResumeError, match=f"version 99, this l2o reads version {VERSION}"):
        load_tree(path)


@pytest.mark.parametrize("path", ["missing", "."])
def test_no_file(tmp_path, path):
    with pytest.raises(ResumeError, match="cannot be read"):
        load_tree(tmp_path / path)


def test_data_folders_are_found_inside_a_package_and_else_beside_it(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    with pytest.raises(L2OError, match="reinstall"):
        resource(package, "data")
    (tmp_path / "data").mkdir()
    assert resource(package, "data") == tmp_path / "data"
    (package / "data").mkdir()
    assert resource(package, "data") == package / "data"
