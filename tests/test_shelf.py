"""Names of checkpoints: which folder is meant, and what is said where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
from plugin import source
from tables import identical

import l2o.rules
from l2o.checkpoints import pretrained, store
from l2o.rules import LSTM, MLP, SGD
from l2o.types import CheckpointError, ConfigurationError, UnknownNameError


@pytest.fixture
def shelf(tmp_path, monkeypatch) -> Path:
    """A folder of pretrained checkpoints with two of them, and a working folder that is empty."""
    folder = tmp_path / "pretrained"
    store.save(folder / "mlp-small", *source(MLP(hidden=(4,))))
    store.save(folder / "lstm-small", *source(LSTM(hidden=(3,))))
    (folder / "aliases.json").write_text('{"default": "mlp-small"}')
    (folder / "README.md").write_text("# Pretrained")
    monkeypatch.setattr(pretrained, "resource", lambda package, name: tmp_path / name)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return folder


def test_names_and_aliases_of_pretrained_checkpoints(shelf):
    assert store.list_pretrained() == ["lstm-small", "mlp-small"]
    assert store.load("lstm-small")[0] == LSTM(hidden=(3,))
    assert store.load("default")[0] == MLP(hidden=(4,))
    assert store.read_card("default") == store.read_card("mlp-small")
    assert identical(store.load("default")[1], store.load(shelf / "mlp-small")[1])


@pytest.mark.parametrize("name", ["x" * 300, "~nobody-of-this-name/x", "a\0b"])
def test_what_can_be_no_path_is_no_name_either(shelf, name):
    with pytest.raises(UnknownNameError, match="source="):
        store.load(name)


def test_what_came_with_l2o_is_not_written_to(shelf):
    before = (shelf / "mlp-small" / "card.json").read_bytes()
    for name in ("default", "mlp-small", shelf / "mlp-small", "../pretrained/mlp-small/theta.safetensors"):
        for write in (store.check_writable, lambda name: store.annotate(name, {"licence": "MIT"})):
            with pytest.raises(ConfigurationError, match=r"installed with l2o.*name the copy"):
                write(name)
    assert (shelf / "mlp-small" / "card.json").read_bytes() == before


def test_a_folder_comes_before_a_name_only_if_it_is_a_checkpoint(shelf):
    Path("default").mkdir()
    assert store.load("default")[0] == MLP(hidden=(4,))
    with pytest.raises(CheckpointError, match="cannot be read"):
        store.load(Path("default"))
    store.save("default", *source(SGD()))
    assert store.load("default")[0] == SGD()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mlp-smal", "'mlp-smal', did you mean 'mlp-small'.*; valid: default, lstm-small, mlp-small"),
        ("quite different", r"valid: default, lstm-small, mlp-small"),
        ("", "valid: "),
        ("../pretrained/none", "'../pretrained/none'.* no folder of that name"),
        (Path("lstm-small"), "'lstm-small'.* no folder of that name"),
    ],
)
def test_unknown_names(shelf, name, message):
    for function in (store.load, store.read_card):
        with pytest.raises(UnknownNameError, match=message):
            function(name)


def test_the_folder_of_a_run_names_the_checkpoint_in_it(tmp_path):
    store.save(tmp_path / "run" / "checkpoint", *source(SGD()))
    with pytest.raises(CheckpointError, match=r"take .*run/checkpoint, which is that of this run"):
        store.load(tmp_path / "run")


@pytest.mark.parametrize("wrong", [None, 3, ("a", "b"), b"default"])
def test_a_source_is_a_string_or_a_path(wrong):
    with pytest.raises(ConfigurationError, match="source="):
        store.load(wrong)


def test_the_shelf_of_this_repository_is_whole():
    """Each checkpoint that is shipped loads, and the alias names one of them."""
    for name in store.list_pretrained():
        rule, theta = store.load(name)
        assert type(rule).__name__ in l2o.rules.__all__
        assert theta
    assert set(pretrained.aliases().values()) <= set(store.list_pretrained())
