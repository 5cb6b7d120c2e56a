"""A run is continued under its own configuration only, from files that are whole, and by one process at a time."""

from __future__ import annotations

import fcntl
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml  # type: ignore[import-untyped]
from safetensors.torch import save_file
from training import OWN_RULE, command, outcome, snapshot

from l2o.disk import load_tree, save_tree

pytestmark = pytest.mark.usefixtures("here")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["rule=adam"], "rule: saved 'momentum', given 'adam'"),
        (["+rule.lr=0.5"], "rule.lr: saved unset, given 0.5"),
        (["task.dim=4"], "task.dim: saved 3, given 4"),
        (["estimator.lanes=4", "seed=1"], "estimator.lanes: saved 3, given 4\n  seed: saved 0, given 1"),
        (["outer.lr=0.1"], "outer.lr: saved 0.001, given 0.1"),
        (["evaluate_every=1"], "evaluate_every: saved 250, given 1"),
        (["evaluation.seeds=3"], "evaluation.seeds: saved 2, given 3"),
        (["init_from=elsewhere"], "init_from: saved unset, given 'elsewhere'"),
        (["experiment=digits_demo"], "experiment: saved unset, given 'digits_demo'"),
    ],
    ids=str,
)
def test_another_configuration_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert command("steps=2") == 0
    before = snapshot()
    assert command("steps=4", *arguments) == 2
    assert expected in capsys.readouterr().err
    assert snapshot() == before


def test_what_is_not_said_again_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    assert command("steps=4", "rule=adam", "rule.beta1=0.8", "outer=sgd", "outer.lr=0.02", "run=whole") == 0
    assert command("steps=2", "rule=adam", "rule.beta1=0.8", "outer=sgd", "outer.lr=0.02") == 0
    free = ["device=cpu", "log_every=3", "checkpoint_every=1", "logger=[]"]
    assert command("run=run", "steps=4", "outer=sgd", *free, base=[]) == 0
    assert outcome() == outcome("whole")
    config = yaml.safe_load(Path("run/config.yaml").read_text())["config"]
    assert (config["steps"], config["log_every"], config["outer"]["lr"]) == (4, 3, 0.02)


def test_a_saved_configuration_imports_nothing_by_itself(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "own.py").write_text(OWN_RULE)
    monkeypatch.syspath_prepend(here)
    assert command("steps=2", "rule._target_=own.Own", "rule.width=3") == 0
    assert command("steps=3", "rule._target_=own.Own") == 0
    Path("imported").unlink()
    monkeypatch.delitem(sys.modules, "own")
    before = snapshot()
    assert command("steps=4") == 2
    assert "repeat rule._target_=own.Own" in capsys.readouterr().err
    assert snapshot() == before


@pytest.mark.parametrize(
    "planted",
    [{"_target_": "torch.optim.optimizer.warnings.sys.exit"}, {"_target_": "os.getcwd"}, {"lr": "${oc.env:HOME}"}],
)
def test_a_planted_configuration_is_refused(capsys: pytest.CaptureFixture[str], planted: dict[str, str]) -> None:
    assert command("steps=2") == 0
    path = Path("run/config.yaml")
    saved = yaml.safe_load(path.read_text())
    saved["config"]["outer"] |= planted
    path.write_text(yaml.safe_dump(saved))
    assert command("steps=3") == 2
    assert "only where the command line names it" in capsys.readouterr().err


def test_a_rule_whose_source_has_changed_is_told(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(here)
    for text, steps, said in ((OWN_RULE, 2, 0), (OWN_RULE, 3, 0), (OWN_RULE + "# new", 4, 1), (OWN_RULE, 5, 0)):
        (here / "edited.py").write_text(text)
        assert command(f"steps={steps}", "rule._target_=edited.Own") == 0
        assert capsys.readouterr().out.count("warning: the source of the rule has changed since the run began") == said


def test_a_home_folder_holds_all_of_a_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here / "home"))
    for run in ("~/first", "'~/second'"):
        assert command("steps=2", f"run={run}") == 0
    names = {"config.yaml", "state.safetensors", "metrics.jsonl", "timing.jsonl", ".lock"}
    names |= {"start", "checkpoint", "best"}
    for run in ("first", "second"):
        assert {path.name for path in (here / "home" / run).iterdir()} == names
    assert [path.name for path in here.iterdir()] == ["home"]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def _another_theta(path: Path) -> None:
    state, metadata = load_tree(path)
    state["training"]["theta"]["log_lr"] = torch.zeros(2)
    save_tree(path, state, metadata)


def _as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _without_sizes(path: Path) -> None:
    state, metadata = load_tree(path)
    save_tree(path, {name: value for name, value in state.items() if name != "sizes"}, metadata)


DAMAGE: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "truncated state": ("state.safetensors", _truncate, "state.safetensors"),
    "text for a state": ("state.safetensors", lambda path: path.write_text("hello"), "state.safetensors"),
    "pickle for a state": ("state.safetensors", lambda path: torch.save({"a": 1}, path), "state.safetensors"),
    "foreign safetensors": ("state.safetensors", lambda path: save_file({"a": torch.ones(1)}, path), "format"),
    "state of another run": (
        "state.safetensors",
        lambda path: path.write_bytes(Path("other/state.safetensors").read_bytes()),
        "was not saved under the configuration",
    ),
    "another theta": ("state.safetensors", _another_theta, "log_lr"),
    "state without an entry": ("state.safetensors", _without_sizes, "'sizes'"),
    "short metrics": ("metrics.jsonl", _truncate, "metrics.jsonl has"),
    "no metrics": ("metrics.jsonl", Path.unlink, "metrics.jsonl has 0 bytes"),
    "no configuration": ("config.yaml", Path.unlink, "but no config.yaml"),
    "broken configuration": ("config.yaml", lambda path: path.write_text("a: [1"), "is damaged"),
    "folder for a configuration": ("config.yaml", _as_folder, "is damaged"),
    "foreign configuration": ("config.yaml", lambda path: path.write_text("a: 1"), "not the configuration of a run"),
    "tag in the configuration": ("config.yaml", lambda path: path.write_text("!!python/name:os.system"), "is damaged"),
    "version of the past": (
        "config.yaml",
        lambda path: path.write_text(path.read_text().replace("version: 2", "version: 1")),
        "format version 1, this l2o continues runs of version 2",
    ),
    "version of the future": (
        "config.yaml",
        lambda path: path.write_text(path.read_text().replace("version: 2", "version: 9")),
        "format version 9",
    ),
    "edited configuration": (
        "config.yaml",
        lambda path: path.write_text(path.read_text().replace("seed: 0", "seed: 5")),
        "was not saved under the configuration",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_run_is_left_alone(capsys: pytest.CaptureFixture[str], kind: str) -> None:
    name, damage, expected = DAMAGE[kind]
    assert command("steps=2") == 0
    assert command("steps=2", "run=other", "seed=1") == 0
    damage(Path("run", name))
    before = snapshot()
    assert command("steps=3") == 2
    assert expected in capsys.readouterr().err
    assert snapshot() == before


def test_two_processes_cannot_write_to_one_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("steps=2") == 0
    before = snapshot()
    with Path("run/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert command("steps=3") == 2
    assert "another process is writing" in capsys.readouterr().err
    assert snapshot() == before
