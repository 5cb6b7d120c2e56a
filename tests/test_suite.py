"""Suites and their store: curves are run once, in any number of processes, and scored alike whenever."""

import dataclasses
import itertools
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from suites import ENTRANTS, INF, SUITE, TASKS, learned, numbers

from l2o.evaluation import (
    Baseline,
    Kept,
    Setting,
    Store,
    Suite,
    TorchEntrant,
    comparisons,
    condense,
    missing,
    run,
    run_entrant,
    run_jobs,
    run_suite,
)
from l2o.evaluation import suite as suite_module
from l2o.evaluation.baselines import torch_optimizer
from l2o.evaluation.verdicts import table_row
from l2o.rules import SGD, Adam
from l2o.tasks import GradientNoise, ImageConv, ImageMLP
from l2o.types import ConfigurationError, ResumeError, TaskFamily


def test_what_is_stored_is_what_was_run_but_for_rounding(tmp_path):
    store = Store(tmp_path)
    setting, adam = TASKS[1], ENTRANTS["adam"]
    kept = condense(run_entrant(adam, setting), setting.smoothing)
    store.add("tiny", setting, adam, kept._replace(relative_step=1.5))
    for again in (store, Store(tmp_path)):
        found = again.kept("tiny", setting, adam)
        assert (found.label, found.rates, found.steps, found.relative_step) == ("Adam", adam.rates, kept.steps, 1.5)
        np.testing.assert_allclose(found.train, kept.train, rtol=2**-11)
        np.testing.assert_allclose(found.valid, kept.valid, rtol=2**-11)
        np.testing.assert_allclose(found.peak, kept.peak, rtol=2**-6)


@pytest.mark.parametrize("value", [0.0, -3.0, INF, -INF, math.nan, 1e-40, 3.4e38])
def test_losses_of_any_kind_can_be_stored(tmp_path, value):
    setting = dataclasses.replace(TASKS[0], steps=2, seeds=1)
    losses = np.array([1.0, value]).reshape(2, 1, 1)
    kept = Kept("mine", (None,), [1, 2], losses, losses, losses[1:], [2], 0.0)
    Store(tmp_path).add("tiny", setting, learned(), kept)
    found = Store(tmp_path).kept("tiny", setting, learned())
    np.testing.assert_allclose(found.train.ravel(), losses.ravel(), rtol=2**-11, atol=1e-41)


def test_nothing_that_is_stored_is_run_again(tmp_path, monkeypatch):
    store = Store(tmp_path)
    run_suite(SUITE, ENTRANTS, store)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(suite_module, "run_entrant", lambda *_: pytest.fail("work was done"))
    assert missing(SUITE, ENTRANTS, store) == []
    run_suite(SUITE, ENTRANTS, Store(tmp_path))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_of_a_longer_grid_only_the_new_rates_are_run(tmp_path):
    store = Store(tmp_path)
    run_suite(SUITE, ENTRANTS, store)
    wider = dataclasses.replace(ENTRANTS["adam"], rates=(0.001, 0.01, 0.1, 1.0, 10.0))
    jobs = missing(SUITE, {**ENTRANTS, "adam": wider}, store)
    assert [(job.setting.name, job.entrant.rates) for job in jobs] == [
        ("small", (0.001, 10.0)),
        ("noisy", (0.001, 10.0)),
    ]
    (_, noisy) = run_suite(SUITE, {**ENTRANTS, "adam": wider}, store)
    at_once = condense(run_entrant(wider, TASKS[1]), 1)
    np.testing.assert_allclose(noisy.trials["adam"].train, at_once.train, rtol=1e-3)


@pytest.mark.parametrize("stop", range(1, 6))
def test_a_suite_that_was_killed_and_resumed_gives_the_same_table(tmp_path, stop):
    whole = run_suite(SUITE, ENTRANTS, Store(tmp_path / "whole"))
    begun = Store(tmp_path / "parts")
    for _ in itertools.islice(run_jobs(missing(SUITE, ENTRANTS, begun), begun), stop):
        pass
    assert len(comparisons(SUITE, ENTRANTS, begun)) == stop // len(ENTRANTS)
    (tmp_path / "parts" / ".half.npz.0123abcd.tmp").write_bytes(b"half a file, as a kill leaves it")
    resumed = run_suite(SUITE, ENTRANTS, Store(tmp_path / "parts"))
    assert numbers(resumed) == numbers(whole)


def test_processes_share_the_runs_and_give_the_same_curves(tmp_path):
    told = []
    two, one = Store(tmp_path / "two"), Store(tmp_path / "one")
    jobs = missing(SUITE, ENTRANTS, two)
    done = list(run_jobs(jobs, two, processes=2, advance=told.append))
    assert sorted(str(d.job) for d in done) == sorted(map(str, jobs))
    assert sum(told) <= sum(job.steps for job in jobs)
    assert numbers(comparisons(SUITE, ENTRANTS, two)) == numbers(run_suite(SUITE, ENTRANTS, one))


def test_what_cannot_be_handed_to_another_process_is_refused(tmp_path):
    local = TorchEntrant("mine", lambda params, rate: [torch.optim.SGD(params, lr=0.1)])
    store = Store(tmp_path)
    with pytest.raises(ConfigurationError, match=r"small: mine cannot be handed to another process.*jobs=1"):
        list(run_jobs(missing(SUITE, {"given mine": local}, store), store, processes=2))


def test_a_packed_store_says_the_same_in_a_file_an_optimizer(tmp_path):
    store = Store(tmp_path / "runs")
    before = numbers(run_suite(SUITE, ENTRANTS, store))
    store.add(
        "tiny", TASKS[0], learned(0.1), condense(run_entrant(learned(0.1), TASKS[0]), 1)
    )  # which is not asked for
    paths = store.pack(tmp_path / "packed", "tiny", TASKS, ENTRANTS)
    assert [path.name for path in paths] == ["learned.npz", "adam.npz", "adamw.npz"]
    again = store.pack(tmp_path / "again", "tiny", TASKS, ENTRANTS)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths]
    base = Store(tmp_path / "none", [tmp_path / "packed"])
    assert len(base) == 2 * 2 * (1 + 3 + 1)
    assert numbers(comparisons(SUITE, ENTRANTS, base)) == before


def test_records_are_plain_rows(tmp_path):
    store = Store(tmp_path)
    run_suite(SUITE, ENTRANTS, store)
    rows = [row for row in store.records() if (row["task"], row["optimizer"]) == ("noisy", "Adam")]
    assert sorted((row["rate"], row["seed"]) for row in rows) == [(r, s) for r in (0.01, 0.1, 1.0) for s in (0, 1)]
    assert all(row["final"] == row["train"][-1] and row["suite"] == "tiny" for row in rows)
    assert not any("accuracy" in row for row in rows)


@pytest.mark.parametrize(
    "family",
    [ImageMLP(width=8, batch_size=32), ImageConv(norm="batch", batch_size=32), GradientNoise(ImageMLP(width=8))],
    ids=["perceptron", "batch norm", "augmented"],
)
def test_of_classifiers_accuracy_is_kept(tmp_path, family):
    setting = Setting("classes", family, steps=30, seeds=2, window=1)
    suite, entrants = Suite("classes", 1, (setting,)), {"adam": Baseline("Adam", Adam(), (1e-5, 1e-2))}
    run_suite(suite, entrants, Store(tmp_path))
    kept = Store(tmp_path).kept("classes", setting, entrants["adam"])
    assert kept.accuracy.shape == kept.valid.shape == (20, 2, 2)
    assert (kept.accuracy[-1, :, 0] < 0.4).all()
    assert (kept.accuracy[-1, :, 1] > kept.accuracy[-1, :, 0] + 0.2).all()
    np.testing.assert_allclose(kept.accuracy * 4 * getattr(family, "family", family).batch_size % 1, 0.0, atol=0.2)
    (found,) = comparisons(suite, entrants, Store(tmp_path))
    assert table_row(found, "adam")[4].endswith(f"({100 * kept.accuracy[-1, :, 1].mean():.1f}%)")


def test_accuracy_does_not_touch_the_curves():
    """The batches of classifiers are those of any other family: its loss is the same with and without."""
    family = ImageMLP(width=8, batch_size=32)
    curves = [
        run(SGD(), {"log_lr": torch.full((2,), -2.0)}, f, 9, torch.Generator().manual_seed(0))
        for f in (family, Hidden(family))
    ]
    assert curves[1].accuracy is None
    torch.testing.assert_close(curves[0].train, curves[1].train)  # which a kernel may round otherwise
    torch.testing.assert_close(curves[0].valid, curves[1].valid)


class Hidden(TaskFamily):
    """A family of which nobody can tell that it classifies."""

    def __init__(self, inside):
        self.inside = inside

    def sample(self, generator, lanes):
        return self.inside.sample(generator, lanes)

    def init(self, data, generator):
        return self.inside.init(data, generator)

    def batch(self, data, split, generator):
        return self.inside.batch(data, split, generator)

    def loss(self, params, buffers, data, batch):
        return self.inside.loss(params, buffers, data, batch)


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04 cut short"])
def test_a_damaged_file_is_named_with_the_way_out(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ResumeError, match=r"a\.npz is damaged .*delete it"):
        Store(tmp_path)


def test_a_file_of_another_format_is_named(tmp_path):
    header = np.frombuffer(json.dumps({"format": 99}).encode(), np.uint8)
    np.savez_compressed(tmp_path / "a.npz", header=header)
    with pytest.raises(ResumeError, match="has format 99, this l2o reads 1"):
        Store(tmp_path)


class Broken(torch.optim.SGD):
    """Has a bug."""

    def step(self):
        raise ValueError("a bug")


def test_an_optimizer_that_raises_is_named_with_its_task_and_the_rest_is_kept(tmp_path):
    entrants = {"adam": ENTRANTS["adam"], "given mine": TorchEntrant("mine", partial(torch_optimizer, Broken))}
    store = Store(tmp_path)
    with pytest.raises(ValueError, match="a bug") as raised:
        run_suite(SUITE, entrants, store)
    assert raised.value.__notes__ == [
        "in small: mine; what was done before is kept, and the same command goes on from there"
    ]
    assert [str(job) for job in missing(SUITE, entrants, Store(tmp_path))] == [
        "small: mine",
        "noisy: Adam",
        "noisy: mine",
    ]


def test_tasks_have_names_of_their_own():
    with pytest.raises(ConfigurationError, match="expected a name of its own"):
        Suite("twice", 1, (TASKS[0], TASKS[0]))
