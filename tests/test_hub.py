"""Checkpoints: what is saved comes back, and what is damaged, foreign or unknown is named."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from plugin import Mixing, source
from tables import every_rule, generator, identical

from l2o.checkpoints import store
from l2o.disk import to_bytes
from l2o.rules import LSTM, MLP, SGD
from l2o.types import CheckpointError, ConfigurationError, UnknownNameError


@dataclass(frozen=True)
class Nested(Mixing):
    """Hyperparameters of every kind that a card can hold."""

    layers: tuple[tuple[int, ...], ...] = ((1, 2), ())
    clip: float = float("inf")
    name: str = "θ"
    scale: float | None = None
    tags: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Unsavable(Mixing):
    tensor: object = None


@pytest.fixture
def saved(tmp_path) -> Path:
    return store.save(tmp_path / "saved", *source(MLP(hidden=(4,))))


def edit(folder: Path, **entries: object) -> None:
    """Change the card; an entry that is ... is removed."""
    card = json.loads((folder / "card.json").read_text()) | entries
    (folder / "card.json").write_text(json.dumps({k: v for k, v in card.items() if v is not ...}))


def replace_theta(folder: Path, data: bytes) -> None:
    """Another θ file, with its own checksum on the card."""
    (folder / "theta.safetensors").write_bytes(data)
    edit(folder, theta={"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)})


@every_rule
def test_what_is_saved_comes_back(rule, tmp_path):
    theta = rule.init_theta(generator(5))
    folder = store.save(tmp_path / "a" / "b", rule, theta)
    assert folder == tmp_path / "a" / "b"
    for place in (folder, str(folder), folder / "theta.safetensors"):
        loaded, again = store.load(place)
        assert loaded == rule
        assert type(loaded) is type(rule)
        assert identical(again, theta)
        assert list(again) == list(theta)  # by which an outer optimizer numbers them


@pytest.mark.parametrize(
    "rule", [Nested(), Nested(layers=((3,),), clip=1.5, scale=0.1, tags=["a", "b"]), Mixing(memory=7)]
)
def test_hyperparameters_of_ones_own_rule_come_back(rule, tmp_path):
    store.save(tmp_path, *source(rule))
    assert store.load(tmp_path, rules=[Nested, Mixing])[0] == rule


def test_theta_is_stored_as_float32_whatever_it_was(tmp_path):
    rule, theta = source(MLP())
    views = {k: torch.stack([t, t], -1).double()[..., 0].requires_grad_() for k, t in theta.items()}
    loaded = store.load(store.save(tmp_path, rule, views))[1]
    assert identical(loaded, theta)
    assert not any(t.requires_grad for t in loaded.values())


def test_the_card_describes_the_checkpoint(tmp_path):
    rule, theta = source(MLP(hidden=(4, 5)))
    store.save(tmp_path, rule, theta, {"seeds": [0, 1], "results": {"loss": float("inf")}, "licence": "Apache-2.0"})
    data = (tmp_path / "theta.safetensors").read_bytes()
    card = store.read_card(tmp_path)
    assert card["format_version"] == 1
    assert card["rule"] == "MLP"
    assert card["hyperparameters"]["hidden"] == [4, 5]
    assert card["theta"] == {"file": "theta.safetensors", "sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    assert card["versions"]["torch"] == torch.__version__
    assert (card["seeds"], card["results"], card["licence"]) == ([0, 1], {"loss": float("inf")}, "Apache-2.0")


def test_a_checkpoint_is_replaced(saved):
    rule, theta = source(LSTM(hidden=(3,)))
    store.save(saved, rule, theta)
    assert store.load(saved)[0] == rule
    assert sorted(os.listdir(saved)) == ["card.json", "theta.safetensors"]


def test_a_save_that_stops_between_its_files_is_noticed(saved, monkeypatch):
    replace = os.replace

    def stop(source: Path, target: Path) -> None:
        if target.name == "card.json":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        store.save(saved, MLP(hidden=(4,)), MLP(hidden=(4,)).init_theta(generator(9)))
    with pytest.raises(CheckpointError, match="sha256"):
        store.load(saved)


def test_hyperparameters_that_the_card_does_not_know_have_their_defaults(saved):
    edit(saved, hyperparameters={"hidden": [4]})
    assert store.load(saved)[0] == MLP(hidden=(4,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w0": torch.ones(2, 2)}, r"'w0' has shape \(2, 2\), expected \("),
        ({"w0": None}, "'w0' is missing"),
        ({"extra": torch.ones(1)}, "'extra' is unexpected"),
        ({"b0": torch.full((4,), float("nan"))}, "'b0' is not made of finite"),
        ({"b0": torch.full((4,), float("inf"))}, "'b0' is not made of finite"),
        ({"b0": torch.ones(4, dtype=torch.int64)}, "'b0' is not made of finite"),
    ],
    ids=["shape", "missing", "unexpected", "nan", "inf", "int"],
)
def test_theta_of_another_rule_is_neither_saved_nor_loaded(saved, tmp_path, change, message):
    rule, theta = source(MLP(hidden=(4,)))
    theta = {k: t for k, t in (theta | change).items() if t is not None}
    with pytest.raises(CheckpointError, match=message):
        store.save(tmp_path / "other", rule, theta)
    assert not (tmp_path / "other").exists()
    replace_theta(saved, to_bytes(theta))
    with pytest.raises(CheckpointError, match="int64" if theta["b0"].dtype == torch.int64 else message):
        store.load(saved)


def test_theta_that_is_finite_in_float64_alone_is_not_saved(tmp_path):
    rule, theta = source(MLP(hidden=(4,)))
    with pytest.raises(CheckpointError, match="'b0' is not made of finite"):
        store.save(tmp_path / "other", rule, theta | {"b0": torch.full((4,), 1e300, dtype=torch.float64)})
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("wrong", [[0.0] * 4, 1.0, "b0"])
def test_theta_is_made_of_tensors(tmp_path, wrong):
    rule, theta = source(MLP(hidden=(4,)))
    message = f"'b0' is of type {type(wrong).__name__}, expected a torch.Tensor"
    for entries, named in (({"b0": wrong}, message), ({3: wrong}, "3 is unexpected")):
        with pytest.raises(CheckpointError, match=named):
            store.save(tmp_path / "new", rule, theta | entries)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written_to_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        store.save(tmp_path / "file" / "below", *source(SGD()))


def test_whether_a_card_can_be_written_is_known_beforehand(saved, monkeypatch):
    before = sorted(os.listdir(saved))
    store.check_writable(saved)
    assert sorted(os.listdir(saved)) == before

    def refuse(**_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(ConfigurationError, match=r"source=.*saved'.*Read-only file system.*copy the folder"):
        store.check_writable(saved)
    with pytest.raises(UnknownNameError):
        store.check_writable("no such checkpoint")


@pytest.mark.parametrize("data", [b"", b"no tensors at all", to_bytes({"w0": torch.ones(3)})[:-2], b"\x80\x05K\x01."])
def test_a_theta_file_that_is_none(saved, data):
    replace_theta(saved, data)
    with pytest.raises(CheckpointError, match=r"theta\.safetensors: not a safetensors file"):
        store.load(saved)


@pytest.mark.parametrize(
    ("damage", "message"),
    [(lambda data: data[:-1], "size is"), (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "sha256 is")],
)
def test_a_theta_file_that_is_not_the_one_saved(saved, damage, message):
    path = saved / "theta.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=f"theta.safetensors: {message}.*the card says"):
        store.load(saved)


def test_a_theta_file_of_another_checkpoint_says_what_may_have_happened(saved, tmp_path):
    other = store.save(tmp_path / "other", *source(LSTM(hidden=(3,))))
    (saved / "theta.safetensors").write_bytes((other / "theta.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="damaged, or was saved without its card or by another rule"):
        store.load(saved)


@pytest.mark.parametrize("file", ["theta.safetensors", "card.json"])
def test_a_file_that_is_missing(saved, file):
    (saved / file).unlink()
    for place in (saved, saved / "theta.safetensors"):
        with pytest.raises(CheckpointError, match=f"{file}: cannot be read") as caught:
            store.load(place)
        assert "not JSON" not in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"1", b"\xff\xfe", b"[" * 100_000])
def test_a_card_that_is_not_json(saved, text):
    (saved / "card.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"card\.json: (not JSON|expected a JSON object)"):
        store.load(saved)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"format_version": 2}, "format_version is 2, this l2o reads 1"),
        ({"format_version": ...}, "format_version is None"),
        ({"rule": ...}, "'rule' of type str, got None"),
        ({"theta": "x"}, "'theta' of type dict"),
        ({"theta": {}}, "the card says None"),
        ({"hyperparameters": []}, "'hyperparameters' of type dict"),
        ({"rule": "Secret"}, r"'Secret' is not known here; known are AdaGrad, .*SGD.*rules=\[Secret\]"),
        ({"rule": "os.system"}, "not known here"),
        ({"hyperparameters": {"hiden": [4]}}, r"no hyperparameter \['hiden'\], only .*'hidden'"),
        ({"hyperparameters": {"time": "never"}}, "does not accept.*'never'"),
        ({"hyperparameters": {"hidden": "wide"}}, "does not accept"),
        ({"hyperparameters": {"hidden": [[4]]}}, "does not accept"),
        ({"rule": "LSTM", "hyperparameters": {}}, r"LSTM.*'b0' has shape \(4,\), expected \(80,\)"),
    ],
)
def test_a_card_that_does_not_fit(saved, entries, message):
    edit(saved, **entries)
    with pytest.raises(CheckpointError, match=message):
        store.load(saved)


@pytest.mark.parametrize(
    ("rule", "card", "message"),
    [
        (SGD(), {"rule": "mine"}, r"card: \['rule'\]"),
        (SGD(), {"data": {1, 2}}, "card: .*set"),
        (Unsavable(torch.ones(1)), {}, "Unsavable.*JSON"),
        (Unsavable({"a": (1,)}), {}, "would be read back"),
    ],
)
def test_what_a_card_cannot_hold_is_refused_before_anything_is_written(tmp_path, rule, card, message):
    with pytest.raises(ConfigurationError, match=message):
        store.save(tmp_path / "new", *source(rule), card)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("rules", [SGD, [SGD()], ["SGD"], [int]])
def test_rules_that_are_none(saved, rules):
    with pytest.raises(ConfigurationError, match="rules="):
        store.load(saved, rules=rules)


def test_annotate_adds_to_the_card_and_leaves_the_rest(tmp_path):
    path = store.save(tmp_path / "a", *source(SGD()), card={"licence": "MIT", "data": "digits"})
    theta = (path / "theta.safetensors").read_bytes()
    before = store.read_card(path)
    store.annotate(path, {"results": {"loss": 0.5}, "licence": "CC0-1.0"})
    assert store.read_card(path) == before | {"results": {"loss": 0.5}, "licence": "CC0-1.0"}
    assert (path / "theta.safetensors").read_bytes() == theta
    assert store.load(path)[0] == SGD()
    with pytest.raises(ConfigurationError, match=r"written by .* itself"):
        store.annotate(path, {"rule": "Adam"})
    with pytest.raises(ConfigurationError, match="expected dicts"):
        store.annotate(path, {"results": torch.ones(1)})
