"""``python -m meta_train.guard``: each case with each optimizer, and a page that says which missed."""

import math
import sys

import pytest

from l2o.evaluation.hazards import CASES, PROBLEMS, Hazard, begin
from meta_train import guard


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_is_the_same_for_every_optimizer(name):
    first, second = (begin(Hazard(name, steps=4), seed=1) for _ in range(2))
    assert [first.loss(step).item() for step in range(3)] == [second.loss(step).item() for step in range(3)]


def test_poison_and_other_labels_come_when_they_are_said_to():
    plain, hurt = (
        begin(Hazard("perceptron", steps=6, poison=p, shuffled=s), 0) for p, s in ((1.0, False), (1e4, True))
    )
    losses = [[begun.loss(step).item() for step in range(6)] for begun in (plain, hurt)]
    assert [a == b for a, b in zip(*losses, strict=True)] == [True, True, False, False, False, False]


def test_records_and_page(monkeypatch):
    monkeypatch.setitem(CASES, "short", Hazard("table", steps=12))
    records = list(guard.cases(["light"], ["short"], seeds=2))
    assert [(r["rule"], r["mode"]) for r in records] == [(guard.ADAMW, ""), *(("light", mode) for mode in guard.MODES)]
    assert all(len(r["finals"]) == 2 for r in records)
    found = list(guard.false_alarms(["light"], "quick", ["quadratic κ=1e3"]))
    assert [r["events"] for r in found] == [[], []]
    records = [{**r, "hardware": "here", "commit": "c", "date": "d"} for r in records + found]
    assert "0 of 2 guarded runs" in guard.page(records, "command")
    records[2]["finals"] = [9.0, 9.0]
    text = guard.page(records, "command")
    assert "1 of 2 guarded runs reach it" in text
    assert "**" in text.split("| short |")[1].split("\n")[0]


@pytest.mark.parametrize(
    ("own", "adamw", "expected"),
    [
        ([1.0, 4.0], [1.0, 1.0], 2.0),
        ([math.nan], [1.0], math.inf),
        ([1.0], [math.nan], 0.0),
        ([math.inf], [math.nan], math.inf),
    ],
)
def test_a_ratio_is_of_geometric_means_and_knows_what_is_not_finite(own, adamw, expected):
    row = {"table": "cases", "case": "c", "rule": "light", "finals": own}
    assert guard.ratio(row, [row, {**row, "rule": guard.ADAMW, "finals": adamw}]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--cases", "tabel"], "unknown case 'tabel', did you mean 'table'"),
        (["--rules", "ligth"], "unknown checkpoint 'ligth', did you mean 'light'"),
        (["--suites", "quick", "quik"], "unknown suite 'quik', did you mean 'quick'"),
        (["--seeds", "0"], "--seeds=0"),
    ],
)
def test_what_is_wrong_is_said_before_half_an_hour_of_work(given, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["guard", "--out", "made", *given])
    monkeypatch.setattr(guard, "measure", lambda _: pytest.fail("work was done"))
    with pytest.raises(SystemExit, match="2"):
        guard.main()
    assert message in capsys.readouterr().err
