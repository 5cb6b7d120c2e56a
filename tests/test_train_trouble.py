"""The training command where lanes explode, families are lost, or losses are no numbers: each is said once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training import SMALL, command, records

from l2o.estimators import Backprop

pytestmark = pytest.mark.usefixtures("here")


def test_steps_that_lose_all_lanes_are_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("steps=4", "rule.lr=1e12", "log_every=1") == 0
    said = capsys.readouterr().out
    assert said.count("all of its 3 lanes exploded at outer step 1") == 1
    assert "task=Quadratic(dim=3" in said
    steps = [row for row in records() if "lanes_masked" in row]
    assert all(row["meta_loss"] is None and row["lanes_masked"] == 3 for row in steps)
    assert records()[-1]["held_out_loss"] is None
    assert records()[-1]["held_out_diverged"] == 2


MIXTURE = [
    *(word for word in SMALL if not word.startswith("task")),
    "task=mixture",
    "+task.families.kept={_target_: l2o.tasks.Quadratic, dim: 1}",
    "+task.families.lost={_target_: l2o.tasks.Quadratic, dim: 90}",  # too steep for the rule's rate
]


def test_a_family_of_a_mixture_that_loses_all_its_lanes_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """It has no mean loss then, nor has the mixture."""
    assert command("steps=2", "log_every=1", "evaluate_every=0", "estimator.explosion=1.5", base=MIXTURE) == 0
    said = capsys.readouterr().out
    assert "task.lost=Quadratic(dim=90" in said
    assert said.count("all of its 3 lanes exploded") == 1
    row = records()[0]
    assert (row["lanes_masked/lost"], row["lanes_masked/kept"]) == (3, 0)
    assert row["meta_loss/lost"] is row["meta_loss"] is None
    assert row["meta_loss/kept"] > 0


def test_the_families_of_a_mixture_are_evaluated_with_settings_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("steps=1", "evaluation.task={list: {dim: 2}}", base=MIXTURE) == 2
    assert "expected settings by family, of ['kept', 'lost']" in capsys.readouterr().err
    assert command("steps=1", "run=plain", base=MIXTURE) == 0
    assert command("steps=1", "evaluation.task={lost: {dim: 2}}", base=MIXTURE) == 0
    plain, other = records("plain")[-1], records()[-1]
    assert plain["adam_loss/kept"] == other["adam_loss/kept"]
    assert plain["adam_loss/lost"] > 5 * other["adam_loss/lost"]


def test_the_perceptrons_of_a_mixture_are_made_by_lists_of_settings() -> None:
    """And continued on the authority of the saved configuration."""
    made = ["+task.families._target_=l2o.tasks.image.image_mlps", "+task.families.widths=[2,3]"]
    base = ["task=mixture", *made, "+task.families.batch_size=4", *(word for word in SMALL if "task" not in word)]
    assert command("steps=1", base=base) == 0
    assert command("steps=2", base=["run=run"]) == 0
    names = {f"held_out_loss/mlp_{width}x1_relu_none_cross_entropy" for width in (2, 3)}
    assert names < records()[-1].keys()


BROKEN_TASK = """
from dataclasses import dataclass

import torch
from l2o.tasks import Quadratic


@dataclass(frozen=True)
class Broken(Quadratic):
    lanes: int = 0

    def sample(self, generator, lanes):
        task = super().sample(generator, lanes)
        broken = torch.arange(lanes).view(-1, *[1] * (task["y"].ndim - 1)) < self.lanes
        return {**task, "y": torch.where(broken, float("nan"), task["y"])}
"""


@pytest.mark.parametrize("log_every", [1, 4])
def test_a_task_whose_loss_is_nan_from_the_start_ends_the_run(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], log_every: int
) -> None:
    (here / "broken.py").write_text(BROKEN_TASK)
    monkeypatch.syspath_prepend(here)
    for _ in range(2):
        assert command("steps=5", "task._target_=broken.Broken", "task.lanes=3", f"log_every={log_every}") == 2
        said = capsys.readouterr().err
        assert said.startswith("error: task=Broken(dim=3, ")
        assert "lanes=3): its loss at inner step 0" in said
        assert "not finite in 3 of 3 lanes at outer step 1" in said
        assert said.count("\n") == 1


def test_a_task_whose_loss_is_nan_in_some_lanes_is_said_once(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "broken.py").write_text(BROKEN_TASK)
    monkeypatch.syspath_prepend(here)
    assert command("steps=5", "task._target_=broken.Broken", "task.lanes=1") == 0
    said = capsys.readouterr().out
    assert said.count("not finite in 1 of 3 lanes at outer step 1; such lanes are masked") == 1
    assert records()[0]["lanes_broken"] == records()[0]["lanes_masked"] == 1


def test_updates_that_are_skipped_are_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def poisoned(estimator: Backprop, *arguments: Any, own: Callable[..., Any] = Backprop.estimate) -> Any:
        grads, state, metrics = own(estimator, *arguments)
        return {name: tensor * float("nan") for name, tensor in grads.items()}, state, metrics

    monkeypatch.setattr(Backprop, "estimate", poisoned)
    assert command("steps=4", "evaluate_every=0") == 0
    assert capsys.readouterr().out.count("the meta-gradient was not finite, and θ stayed as it was") == 1
    assert [(row["update_skipped"], row["meta_grad_norm"]) for row in records()] == [(1, None)] * 4
