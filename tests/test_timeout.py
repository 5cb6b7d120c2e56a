"""Time-outs: runs that take too long are ended, stored and shown as failures, and run again where more is allowed."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from l2o.evaluation import (
    Baseline,
    Job,
    Report,
    Setting,
    Store,
    Suite,
    TorchEntrant,
    comparisons,
    condense,
    missing,
    run_entrant,
    run_jobs,
    run_suite,
    summaries,
    trials,
)
from l2o.evaluation.baselines import torch_optimizer
from l2o.evaluation.diagnosis import diagnose_score, gravest
from l2o.evaluation.markdown import as_markdown
from l2o.evaluation.report import as_json
from l2o.evaluation.scores import diverged, final_losses
from l2o.evaluation.verdicts import overall, table_row, verdict
from l2o.rules import Adam
from l2o.tasks import Quadratic
from l2o.types import ConfigurationError

SETTING = Setting("slow", Quadratic(dim=2), steps=40, seeds=2, window=1)
GIVEN = TorchEntrant("mine", partial(torch_optimizer, torch.optim.SGD, lr=0.01))
ENTRANTS = {"given mine": GIVEN, "adam": Baseline("Adam", Adam(), (0.01, 0.1))}
POINTS = 20
"""At which the clock is looked at, and which take a second each here, for two seeds: half a second a run."""


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """A clock that is a second later whenever it is looked at."""
    monkeypatch.setattr(trials, "time", SimpleNamespace(perf_counter=partial(next, itertools.count(0.0))))


def allowed(seconds: float | None, setting: Setting = SETTING) -> Setting:
    return dataclasses.replace(setting, timeout=seconds)


@pytest.mark.parametrize(("timeout", "points"), [(1.0, 3), (4.5, 10), (9.0, 19), (9.9, 20)])
def test_a_run_ends_at_the_first_point_after_its_time(timeout, points):
    found = run_entrant(GIVEN, allowed(timeout))
    assert found.timed_out
    assert np.isfinite(found.valid).sum(0).tolist() == [[points], [points]]
    assert np.isfinite(found.train).sum(0).tolist() == [[2 * points], [2 * points]]
    whole = run_entrant(GIVEN, SETTING)
    np.testing.assert_array_equal(found.train[: 2 * points], whole.train[: 2 * points])
    assert (found.train.shape, found.valid.shape, found.valid_steps) == (
        whole.train.shape,
        whole.valid.shape,
        whole.valid_steps,
    )


def test_a_run_that_is_late_at_its_end_has_failed_too():
    kept = condense(run_entrant(GIVEN, allowed(9.9)), 1)
    assert np.isfinite(kept.train).all()
    assert (final_losses(kept) == np.inf).all()
    assert diverged(kept).all()


@pytest.mark.parametrize("timeout", [10.0, None])
def test_what_is_in_time_is_as_without_a_limit(timeout):
    found = run_entrant(GIVEN, allowed(timeout))
    assert not found.timed_out
    np.testing.assert_array_equal(found.train, run_entrant(GIVEN, SETTING).train)


def test_runs_side_by_side_have_the_time_of_all_of_them():
    """Two rates and two seeds: four runs of 5 seconds, of which the 20 points take as much."""
    assert not run_entrant(ENTRANTS["adam"], allowed(5.0)).timed_out
    assert run_entrant(ENTRANTS["adam"], allowed(4.9)).timed_out


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("inf"), "soon"])
def test_what_is_no_time_is_refused(timeout):
    with pytest.raises(ConfigurationError, match="timeout="):
        allowed(timeout)


@pytest.fixture
def late(tmp_path):
    """A suite of one task in which the given optimizer takes too long, in a store."""
    suite = Suite("late", 1, (allowed(7.0),))
    (found,) = run_suite(suite, ENTRANTS, Store(tmp_path))
    return suite, found, Store(tmp_path)


def test_a_time_out_is_a_failure_everywhere(late):
    _, found, _ = late
    score = found.scores["given mine"]
    assert (score.mean, score.diverged.tolist(), score.timed_out.tolist()) == (np.inf, [True, True], [True, True])
    assert found.scores["adam"].timed_out is None
    assert found.trials["given mine"].relative_step is None  # which takes steps, too
    (ours,) = [s for s in summaries([found]) if s.name == "given mine"]
    assert (ours.reached.value, ours.diverged, ours.timed_out, ours.runs) == (0.0, 2, 2, 2)
    assert overall([found])[0].diverged == ("slow",)
    assert table_row(found, "given mine")[5] == "2 of 2 (timed out)"
    assert verdict(found).endswith("It timed out on 2 of 2 seeds.")
    diagnosis = gravest(diagnose_score(score))
    assert (diagnosis.state, diagnosis.step) == ("timed out", 30)
    (run, _) = as_json(Report("mine", [found], {}, {}))["settings"][0]["optimizers"]["given mine"]["runs"]
    assert (run["final"], run["diverged"]) == (None, True)
    text = as_markdown(Report("mine", [found, found], {}, {}))
    assert "| 4 of 4 (4 timed out) |" in text
    assert "A run that took over 7 s was ended." in text


def test_a_time_out_is_run_again_where_more_time_is_allowed(late, tmp_path):
    suite, _, store = late
    assert missing(suite, ENTRANTS, store) == []
    shorter = Suite("late", 1, (allowed(1.0),))
    assert missing(shorter, ENTRANTS, store) == []
    assert [found.scores["given mine"].mean for found in comparisons(shorter, ENTRANTS, store)] == [np.inf]
    for timeout in (8.0, None):
        longer = Suite("late", 1, (allowed(timeout),))
        assert [job.entrant.label for job in missing(longer, ENTRANTS, store)] == ["mine"]
        assert len(list(run_jobs(missing(longer, ENTRANTS, store), store))) == 1
        assert missing(longer, ENTRANTS, Store(tmp_path)) == []
    (found,) = comparisons(longer, ENTRANTS, Store(tmp_path))
    assert found.scores["given mine"].timed_out is None
    assert found.scores["given mine"].mean < np.inf


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_of_two_files_the_run_that_was_allowed_more_counts(tmp_path, names):
    both = tmp_path / "both"
    both.mkdir()
    for name, setting in zip(names, (allowed(1.0), SETTING), strict=True):
        (_,) = run_jobs([Job("late", setting, GIVEN)], Store(tmp_path / name))
        (written,) = (tmp_path / name).iterdir()
        written.rename(both / f"{name}.npz")
    assert Store(both).lacking("late", SETTING, GIVEN) == []
