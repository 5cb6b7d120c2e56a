"""What a run leaves: the best θ by a held-out loss, and the average of θ where it keeps one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training import command, origin, outcome, records

import l2o
from l2o.disk import load_tree
from l2o.rules import SGD
from meta_train.run.best import Best
from meta_train.run.held_out import HeldOut, over_adam

pytestmark = pytest.mark.usefixtures("here")

THETA = {"log_lr": torch.tensor(-1.0)}


def _card(step: int) -> dict[str, Any]:
    return {"compute": {"outer_steps": step, "seconds": 0.5}, "results": {"a": None}}


@pytest.mark.parametrize(
    ("offers", "step"),
    [
        ([{"a": 2.0}, {"a": 1.0}, {"a": 1.5}], 2),
        ([{"a": 2.0}, {"a": 2.0}], 1),  # of equals the first
        ([{"a": None}, {"a": 2.0}, {"a": None}], 2),
        ([{"a": 2.0}, {"a": 1.0, "held_out_diverged": 1}, {"a": 1.5, "held_out_diverged": 0}], 3),
        ([{"a": 2.0, "b": 0.0}, {"a": 1.0, "b": 1.0}], 2),  # by its key only
        ([{"a": None}, {"a": 1.0, "held_out_diverged": 2}], None),
    ],
    ids=str,
)
def test_the_lowest_loss_without_a_diverged_run_is_kept(offers: list[dict[str, Any]], step: int | None) -> None:
    best = Best(Path("best"), SGD(), "a")
    for now, results in enumerate(offers, 1):
        best.offer({"log_lr": torch.tensor(float(now))}, results, _card(now))
    assert Path("best").exists() == bool(best.kept) == (step is not None)
    if step:
        assert best.step == origin("best")["step"] == step
        assert l2o.load("best")[1]["log_lr"] == step


def test_a_loss_that_no_evaluation_has_names_those_there_are() -> None:
    with pytest.raises(l2o.ConfigurationError, match=r"best_by='c': expected one of a, b"):
        Best(Path("best"), SGD(), "c").offer(THETA, {"a": 1.0, "b": 2.0}, _card(1))


# A loss of each of two families beside Adam's, from the best to the worst.
RANKED: dict[str, tuple[list[float], list[float]]] = {
    "positive": ([1.0, 2.0], [0.01, 0.5, 1.0, 7.0]),
    "to zero and below": ([1.0, 2.0], [-1e9, -2.0, -1e-6, 0.0, 1e-9, 0.5, 1.0, 7.0, 1e9]),
    "Adam below zero": ([-3.0, 2.0], [-100.0, -6.0, -5.9, -3.0, -2.0, 0.0, 4.0]),
    "Adam at zero": ([0.0, -2.0], [-5.0, -1.0, -0.5, 0.0, 0.5, 9.0]),
}


@pytest.mark.parametrize("case", RANKED)
def test_a_mixture_ranks_the_lower_loss_first_whatever_its_sign(case: str) -> None:
    adam, ours = RANKED[case]
    for other in (-5.0, 0.0, 3.0):
        for order in (slice(None), slice(None, None, -1)):
            found = [over_adam(list(zip([x, other][order], adam[order], strict=True))) for x in ours]
            numbers = [x for x in found if x is not None]
            assert len(numbers) == len(set(numbers)) == len(ours)
            assert numbers == sorted(numbers)


def test_of_positive_losses_it_is_the_geometric_mean_of_quotients() -> None:
    assert over_adam([(1.0, 2.0), (4.0, 1.0)]) == pytest.approx(2.0**0.5)
    assert over_adam([(1.0, 2.0), (None, 1.0)]) is over_adam([(1.0, None), (1.0, 1.0)]) is None
    assert over_adam([(-3.0, -3.0), (1e-9, 1e-9)]) == 1.0


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "deleted": shutil.rmtree,
    "without its card": lambda folder: (folder / "card.json").unlink(),
    "of another step": lambda folder: l2o.save(folder, SGD(), THETA, _card(2)),
    "of another θ": lambda folder: l2o.save(folder, SGD(), {"log_lr": torch.tensor(5.0)}, _card(1)),
    "half of another": lambda folder: (folder / "theta.safetensors").write_bytes(b"abc"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_kept_is_written_again_where_the_folder_differs(damage: str) -> None:
    best = Best(Path("best"), SGD(), "a")
    best.offer(THETA, {"a": 1.0}, _card(1))
    l2o.checkpoints.store.annotate("best", {"licence": "CC0"})
    best.restore()
    assert l2o.read_card("best")["licence"] == "CC0"  # left alone while it is the one
    DAMAGE[damage](Path("best"))
    best.restore()
    assert origin("best")["step"] == 1
    assert l2o.load("best")[1]["log_lr"] == -1.0


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float]], None]:
    """Evaluations in the course of a run find these losses, one after the other, and the step that they are of."""

    def play(losses: list[float]) -> None:
        left: Iterator[float] = iter(losses)

        def measure(held_out: HeldOut, theta: Any) -> dict[str, Any]:
            loss = next(left)
            return {"held_out_loss": loss, "held_out_valid_loss": -loss, "held_out_diverged": 0, "adam_loss": None}

        monkeypatch.setattr(HeldOut, "measure", measure)

    return play


@pytest.mark.parametrize(("key", "step"), [("held_out_loss", 4), ("held_out_valid_loss", 2)])
def test_a_run_keeps_its_best(
    capsys: pytest.CaptureFixture[str], scripted: Callable[[list[float]], None], key: str, step: int
) -> None:
    scripted([3.0, 1.0, 2.0, 2.5])
    assert command("steps=7", "evaluate_every=2", f"evaluation.best_by={key}") == 0
    assert origin("run/best")["step"] == step
    assert command(f"steps={step}", "evaluate_every=0", "run=short") == 0
    theta = [l2o.load(folder)[1] for folder in ("run/best", "short/checkpoint")]
    assert all(torch.equal(theta[0][name], theta[1][name]) for name in theta[0])
    said = capsys.readouterr().out
    assert "checkpoint: run/checkpoint\nbest: run/best" in said
    assert f"at outer step {step})" in said
    assert said.count("best: ") == 1  # a run without evaluations has none


def test_the_best_of_a_continued_run_is_that_of_one_that_never_stopped(scripted: Callable[[list[float]], None]) -> None:
    """An evaluation at the end of a sitting is not one that the whole run makes, however good its loss is."""
    scripted([2.0, 1.0, 3.0, 4.0])
    assert command("steps=7", "evaluate_every=2", "run=whole") == 0
    scripted([2.0, 1.0, 0.1])
    assert command("steps=5", "evaluate_every=2") == 0
    assert origin("run/best")["step"] == 5
    scripted([3.0, 4.0])
    assert command("steps=7", "evaluate_every=2") == 0
    assert origin("run/best")["step"] == 4
    assert outcome() == outcome("whole")


def test_a_run_without_a_finite_evaluation_says_that_it_has_no_best(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("steps=2", "rule.lr=1e12") == 0
    assert "best: none, since no evaluation had a finite held_out_loss" in capsys.readouterr().out
    assert not Path("run/best").exists()


def test_with_an_average_it_is_the_average_that_is_measured_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def measure(held_out: HeldOut, theta: Any, own: Callable[..., Any] = HeldOut.measure) -> Any:
        measured.append({name: tensor.clone() for name, tensor in theta.items()})
        return own(held_out, theta)

    monkeypatch.setattr(HeldOut, "measure", measure)
    settings = ["outer.lr=0.1", "checkpoint_every=1"]
    assert command(*settings, "steps=4", "meta.average=0.9") == 0
    assert command(*settings, "steps=4", "run=plain") == 0
    state = load_tree("run/state.safetensors")[0]["training"]
    _, saved = l2o.load("run/checkpoint")
    for name, tensor in saved.items():
        assert torch.equal(tensor, state["average"][name])
        assert torch.equal(tensor, measured[0][name])
        assert not torch.equal(tensor, state["theta"][name])
        assert torch.equal(state["theta"][name], measured[1][name])  # the run itself is the same
    losses = [[row["meta_loss"] for row in records(run) if "meta_loss" in row] for run in ("run", "plain")]
    assert losses[0] == losses[1]


def test_settings_of_the_outer_loop_are_on_the_card() -> None:
    assert command("steps=2", "meta.clip=0.5", "meta.average=0.9", "evaluation.best_by=held_out_valid_loss") == 0
    for folder in ("checkpoint", "best"):
        config = json.loads(Path("run", folder, "card.json").read_text())["recipe"]["config"]
        assert config["meta"] == {"clip": 0.5, "average": 0.9}
        assert config["evaluation"]["best_by"] == "held_out_valid_loss"
