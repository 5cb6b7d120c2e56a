"""Suites and their store: curves are run once, belong to what they were run with, and are scored alike."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import linecache
import math
import sys
from functools import partial
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from l2o.evaluation import (
    BASELINES,
    Baseline,
    Comparison,
    Kept,
    Report,
    RuleEntrant,
    Setting,
    Store,
    Suite,
    TorchEntrant,
    by_split,
    comparisons,
    condense,
    missing,
    profile,
    run,
    run_entrant,
    run_jobs,
    run_suite,
    summaries,
    wall,
)
from l2o.evaluation import suite as suite_module
from l2o.evaluation.aggregate import estimate, interquartile_mean, median
from l2o.evaluation.baselines import cosine, torch_optimizer
from l2o.evaluation.html import as_html
from l2o.evaluation.identity import curve_key
from l2o.evaluation.markdown import as_markdown
from l2o.evaluation.plots import LEARNED_COLOURS, baseline_style, styles
from l2o.evaluation.report import as_json
from l2o.evaluation.scores import kept_steps, target
from l2o.evaluation.tables import diagnoses_table, optimizers_table, splits_table
from l2o.evaluation.verdicts import overall, overfits, table_row
from l2o.evaluation.wall import relative_step
from l2o.rules import SGD, Adam, VeLO
from l2o.tasks import GradientNoise, ImageConv, ImageMLP, Lasso, ModuleTask, Quadratic, Rastrigin
from l2o.types import ConfigurationError, ResumeError, TaskFamily
from meta_train.optimizers import torch_entrant

TASKS = (
    Setting("small", Quadratic(dim=2), steps=12, seeds=2, window=1, split="like"),
    Setting("noisy", Quadratic(dim=3, noise=0.1), steps=12, seeds=2, window=1),
)
SUITE = Suite("tiny", 1, TASKS)
ADAMW = partial(torch_optimizer, torch.optim.AdamW)
X = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
INF = math.inf


def learned(lr: float = 0.03, label: str = "mine") -> RuleEntrant:
    return RuleEntrant(label, SGD(lr=lr), SGD(lr=lr).init_theta(torch.Generator()))


ENTRANTS = {
    "learned": learned(),
    "adam": Baseline("Adam", Adam(), (0.01, 0.1, 1.0)),
    "adamw": TorchEntrant("AdamW 0.1", ADAMW, cosine, (0.1,)),
}


# The store ------------------------------------------------------------------------------------------------------------


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
    np.testing.assert_allclose(kept.accuracy * 4 * family_of(family).batch_size % 1, 0.0, atol=0.2)
    (found,) = comparisons(suite, entrants, Store(tmp_path))
    assert table_row(found, "adam")[4].endswith(f"({100 * kept.accuracy[-1, :, 1].mean():.1f}%)")


def family_of(family):
    return getattr(family, "family", family)


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


# What a curve belongs to ----------------------------------------------------------------------------------------------


def key(suite="tiny", setting=TASKS[1], entrant=ENTRANTS["learned"], rate=None, seed=0):
    return curve_key(suite, setting, entrant, rate, seed)


@dataclasses.dataclass(frozen=True)
class Own(SGD):
    """A user's rule."""


OTHER = {
    "suite": {"suite": "other"},
    "revision": {"setting": dataclasses.replace(TASKS[1], revision=1)},
    "task": {"setting": dataclasses.replace(TASKS[1], family=Quadratic(dim=3, noise=0.2))},
    "steps": {"setting": dataclasses.replace(TASKS[1], steps=13)},
    "window": {"setting": dataclasses.replace(TASKS[1], window=2)},
    "problems": {"setting": dataclasses.replace(TASKS[1], seed=7)},
    "theta": {"entrant": learned(0.1)},
    "rule": {"entrant": dataclasses.replace(learned(), rule=Own(lr=0.03))},
    "optimizer": {"entrant": ENTRANTS["adam"]},
    "schedule": {"entrant": TorchEntrant("AdamW", ADAMW)},
    "rate": {"rate": 0.1},
    "seed": {"seed": 1},
}


@pytest.mark.parametrize("change", OTHER.values(), ids=OTHER.keys())
def test_curves_of_anything_else_never_meet(change):
    assert key(**change) != key()


@pytest.mark.parametrize(
    "change",
    [
        {"setting": dataclasses.replace(TASKS[1], name="called otherwise", split="longer", seeds=9)},
        {"entrant": learned(label="called otherwise")},
    ],
)
def test_names_decide_nothing(change):
    assert key(**change) == key()


class Drawn(Quadratic):
    """A family that draws for all problems at once, as one of a user may."""

    keyed = False


def test_problems_that_are_drawn_together_are_known_by_their_number_too():
    few, many = (dataclasses.replace(TASKS[1], family=Drawn(dim=3), seeds=n) for n in (2, 9))
    assert key(setting=few) != key(setting=many)


OWN = """
import torch

RATE = 0.1


class Mine(torch.optim.SGD):
    def __init__(self, params):
        super().__init__(params, lr=RATE)
"""


def test_what_a_users_file_says_is_part_of_a_curve(tmp_path, monkeypatch):
    """Also beside the class: nobody is to see the curves of the file as it was yesterday."""
    monkeypatch.syspath_prepend(tmp_path)
    keys = []
    for rate in ("0.1", "0.2", "0.1"):
        (tmp_path / "own_optimizer.py").write_text(OWN.replace("0.1", rate))
        monkeypatch.delitem(sys.modules, "own_optimizer", raising=False)
        importlib.invalidate_caches()
        linecache.clearcache()
        keys.append(key(entrant=torch_entrant("mine", {"path": "own_optimizer:Mine"})))
    assert keys[0] == keys[2] != keys[1]


def test_a_new_setting_with_a_default_changes_no_curve():
    @dataclasses.dataclass(frozen=True)
    class Before:
        lr: float = 0.1

    @dataclasses.dataclass(frozen=True)
    class After:
        lr: float = 0.1
        nesterov: bool = False

    plain, changed = (key(entrant=each()) for each in (Before, After))
    assert plain == changed == key(entrant=After(lr=0.1, nesterov=False))
    assert key(entrant=After(nesterov=True)) != plain


def test_curves_of_a_problem_that_has_changed_are_refused(tmp_path):
    store = Store(tmp_path)
    run_suite(SUITE, {"adam": ENTRANTS["adam"]}, store)
    stale = store.kept("tiny", TASKS[0], ENTRANTS["adam"])
    store.add("tiny", TASKS[0], learned(), stale._replace(label="mine", rates=(None,), train=2 * stale.train[..., :1]))
    store.add("tiny", TASKS[1], learned(), condense(run_entrant(learned(), TASKS[1]), 1))
    with pytest.raises(
        ConfigurationError, match=r"small: the first losses of mine .* its task has changed; raise the ver"
    ):
        comparisons(SUITE, {"adam": ENTRANTS["adam"], "learned": learned()}, store)


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


# Scores ---------------------------------------------------------------------------------------------------------------


def kept_of(curves: list[list[float]], rates: tuple[float | None, ...] = (None,), label: str = "made up") -> Kept:
    """One seed, a curve a rate."""
    losses = np.array(curves).T[:, None, :]
    steps = list(range(1, len(losses) + 1))
    return Kept(label, rates, steps, losses, losses, losses[-1:], steps[-1:], 0.0)


def comparison(name: str, split: str = "other", **curves: list[float]) -> Comparison:
    setting = Setting(name, Quadratic(), steps=len(curves["adam"]), seeds=1, window=1, split=split)
    return Comparison.of(setting, {key: kept_of([curve], label=key) for key, curve in curves.items()})


def falling(reaches: int, steps: int = 8) -> list[float]:
    """A curve that is at 1 from step ``reaches`` on, never if that is 0."""
    return [1.0 if reaches and step >= reaches else 4.0 - 0.1 * step for step in range(1, steps + 1)]


MADE = [
    comparison("a", "like", learned=falling(2), adam=falling(8), sgd=falling(0)),
    comparison("b", "like", learned=falling(4), adam=falling(8), sgd=falling(2)),
    comparison("c", "longer", learned=falling(0), adam=falling(8), sgd=falling(0)),
    comparison("d", "other", learned=[4.0, *[INF] * 7], adam=falling(8), sgd=falling(8)),
]


def test_speed_ups_of_known_curves_are_aggregated():
    found = {s.name: s for s in summaries(MADE)}
    assert found["learned"].speed_ups == {"a": 4.0, "b": 2.0, "c": 0.0, "d": 0.0}
    assert (found["learned"].median.value, found["learned"].iqm.value) == (1.0, 1.0)
    assert (found["learned"].reached.value, found["sgd"].reached.value, found["adam"].reached.value) == (0.5, 0.5, 1.0)
    assert (found["learned"].diverged, found["learned"].runs) == (1, 4)
    assert [s.name for s in summaries(MADE)] == ["adam", "learned", "sgd"]


def test_splits_are_summed_up_apart():
    found = {split: {s.name: s.median.value for s in each} for split, each in by_split(MADE).items()}
    assert list(found) == ["like", "longer", "other"]
    assert [found[split]["learned"] for split in found] == [3.0, 0.0, 0.0]


def test_a_profile_counts_tasks_within_a_factor_of_the_best():
    found = profile(MADE)
    assert found["learned"].tolist() == [1.0, 2.0, INF, INF]
    assert found["adam"].tolist() == [4.0, 4.0, 1.0, 1.0]
    assert found["sgd"].tolist() == [INF, 1.0, INF, 1.0]


def test_the_statistics():
    values = np.array([0.0, 9.0, 1.0, 2.0, 3.0, 100.0, 4.0, 5.0])
    assert interquartile_mean(values) == (2 + 3 + 4 + 5) / 4
    found = estimate(values, median)
    assert found == estimate(values, median)
    assert found.low < found.value == 3.5 < found.high
    assert estimate(np.full(5, 2.0), interquartile_mean) == (2.0, 2.0, 2.0)
    spread = estimate(np.random.default_rng(0).normal(0, 1, 400), lambda x: x.mean(-1))
    assert spread.high - spread.low == pytest.approx(2 * 1.96 / 20, rel=0.1)


def test_an_envelope_over_rates_cannot_be_had():
    """The small rate is sooner at the target, the large one ends lowest: a score is all of one, or of the other."""
    early, late = [4.0, 2.0, 2.0, 2.0, 2.0, 2.0], [4.0, 3.9, 3.8, 3.7, 2.5, 1.0]
    kept = kept_of([early, late], (0.1, 1.0))
    setting = Setting("planted", Quadratic(), steps=6, seeds=1, window=1)
    reference = kept_of([[4.0, 4.0, 4.0, 4.0, 3.0, 2.0]], (0.1,))
    found = Comparison.of(setting, {"learned": kept, "adam": reference})
    assert np.minimum(early, late)[1] <= reference.train[-1, 0, 0]
    assert (found.scores["learned"].rate, found.speed_up("learned")) == (1.0, 1.0)
    np.testing.assert_array_equal(found.scores["learned"].curve[:, 0], late)


def test_a_target_below_rounding_is_what_float32_resolves():
    adam, mine = [4.0, 1e-8, 1e-12], [4.0, 1e-7, 1e-7]
    made = comparison("solved", learned=mine, adam=adam)
    assert target(made.scores["adam"]) == 4.0 * 2.0**-23
    assert made.speed_up("learned") == 1.5
    assert made.reached("learned")
    assert not overfits(made, "learned")  # a validation loss of 1e-7 over one of 1e-12


def test_losses_may_be_negative():
    adam, mine = [4.0, 0.0, -3.0, -5.0], [4.0, -2.0, -5.0, -6.0]
    made = comparison("likelihood", learned=mine, adam=adam, sgd=[4.0, 1.0, -1.0, -4.0])
    assert target(made.scores["adam"]) == -5.0
    assert [made.speed_up(name) for name in made.scores] == [4 / 3, 1.0, 0.0]
    assert [made.reached(name) for name in made.scores] == [True, True, False]
    worse = made.trials["learned"]._replace(valid=np.full((1, 1, 1), -1.0))
    assert not overfits(made, "learned")
    assert overfits(Comparison.of(made.setting, {**made.trials, "learned": worse}), "learned")


def test_tasks_without_a_target_are_named():
    lost = comparison("e", learned=falling(2), adam=[4.0, *[INF] * 7], sgd=falling(2))
    table = optimizers_table([*MADE, lost])
    assert table.note.endswith("Without a finite loss of Adam's, and left out: e.")
    assert table.rows == optimizers_table(MADE).rows
    assert "left out" not in optimizers_table(MADE).note


def test_only_what_was_not_tuned_is_called_so():
    assert Report("mine", MADE, {}, {}).title == "mine, untuned, beside baselines"
    tuned = Comparison.of(
        TASKS[0], {"given mine": kept_of([falling(2), falling(4)], (0.1, 1.0)), "adam": kept_of([falling(8)])}
    )
    assert Report("mine", [tuned], {}, {}).title == "mine, beside baselines"
    for text in (as_markdown(Report("mine", [tuned], {}, {})), as_html(Report("mine", [tuned], {}, {}))):
        assert "mine, beside baselines" in text
        assert "untuned, beside" not in text


def test_optimizers_of_a_notebook_may_have_any_name():
    own = [comparison("a", mine=falling(2), adam=falling(8)), comparison("b", mine=falling(0), adam=falling(8))]
    assert [found.name for found in overall(own)] == ["mine"]
    text = as_markdown(Report("mine", own, {}, {}))
    assert "Target reached: mine ends" in text
    assert "Target missed: mine ends" in text


def test_validation_stands_beside_training():
    over = comparison("over", learned=falling(2), adam=falling(8))
    trials = {**over.trials, "learned": over.trials["learned"]._replace(valid=np.full((1, 1, 1), 3.0))}
    (summary,) = [s for s in summaries([Comparison.of(over.setting, trials)]) if s.name == "learned"]
    assert (summary.valid, summary.overfitted, summary.reached.value) == (3.0, ("over",), 1.0)


def test_time_is_another_matter_than_steps():
    made = comparison("timed", learned=falling(2), adam=falling(8), sgd=falling(4))
    trials = {**made.trials, "learned": made.trials["learned"]._replace(relative_step=8.0)}
    found = {s.name: s.wall for s in summaries([Comparison.of(made.setting, trials)])}
    assert found == {"learned": 0.5, "adam": 1.0, "sgd": None}


class Clocked(torch.optim.SGD):
    """Moves a clock: by a second a step, and by ``more`` every tenth."""

    now = 0.0

    def __init__(self, params, more):
        super().__init__(params, lr=0.1)
        self.more, self.steps = more, 0

    def step(self):
        self.steps += 1
        Clocked.now += 1.0 + (0.0 if self.steps % 10 else self.more)


def test_what_is_done_every_tenth_step_counts_as_a_tenth(monkeypatch):
    clock = dict.fromkeys(["thread_time", "perf_counter"], lambda: Clocked.now)
    monkeypatch.setattr(wall, "time", SimpleNamespace(**clock))
    monkeypatch.setattr(wall, "_adam", lambda params: [Clocked(params, 0.0)])
    assert relative_step(TorchEntrant("", partial(torch_optimizer, Clocked, more=90.0)), TASKS[0]) == 10.0


class Closureless(torch.optim.Optimizer):
    """As many write their own."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            p -= 0.1 * p.grad


def test_steps_are_timed_for_what_a_user_would_run():
    family = ModuleTask(lambda: torch.nn.Linear(3, 1), torch.nn.functional.mse_loss, (X, X[:, :1]), (X, X[:, :1]), 8)
    setting = Setting("", family, 5)
    needs_loss = RuleEntrant("velo", VeLO(), VeLO().init_theta(torch.Generator()))
    own = TorchEntrant("", partial(torch_optimizer, Closureless))
    assert all(relative_step(e, setting) > 0 for e in (learned(), ENTRANTS["adamw"], needs_loss, own))
    assert relative_step(ENTRANTS["adam"], setting) is None


@pytest.mark.parametrize("length", [1, 2, 100, 128, 129, 300, 1000, 20_000])
def test_the_points_that_are_kept_cover_a_run(length):
    steps = kept_steps(length)
    assert (steps[0], steps[-1]) == (1, length)
    assert (np.diff(steps) > 0).all()
    assert len(steps) <= 130
    later = [b / a for a, b in itertools.pairwise(steps) if a >= 10]
    assert max(later, default=1.0) < 1.4


def test_several_rows_of_one_rule_are_one_rule():
    """A vectorised grid and the same rates run one by one, rule and torch optimizer: the same scores."""
    grid = (0.01, 0.1)
    vectorised = Baseline("Adam", Adam(), grid)
    torchs = TorchEntrant("Adam", partial(torch_optimizer, torch.optim.Adam), None, grid)
    ours, theirs = (condense(run_entrant(e, TASKS[1]), 1) for e in (vectorised, torchs))
    np.testing.assert_allclose(ours.train, theirs.train, rtol=1e-4)


def numbers(found: list[Comparison]) -> str:
    """Everything that a report says of it but times, as text."""
    timeless = [
        c._replace(trials={n: k._replace(seconds=0.0, relative_step=None) for n, k in c.trials.items()}) for c in found
    ]
    report = as_json(Report("mine", timeless, {}, {}))
    return json.dumps(report, allow_nan=False)


def test_scoring_a_store_again_gives_the_same_numbers(tmp_path):
    first = numbers(run_suite(SUITE, ENTRANTS, Store(tmp_path)))
    assert [numbers(comparisons(SUITE, ENTRANTS, Store(tmp_path))) for _ in range(2)] == [first] * 2


# Benchmarks of the field ----------------------------------------------------------------------------------------------

SOLVABLE = {
    "quadratic 10": (Quadratic(dim=10), 0.1),  # random matrices are ill-conditioned
    "lasso 5x10": (Lasso(rows=5, dims=(10, 10)), 1e-2),
    "lasso 25x50": (Lasso(rows=25, dims=(50, 50)), 1e-2),
}
"""With the share of the first loss that is left after 400 steps; the minimum of each is 0 by construction."""


@pytest.mark.parametrize(("family", "left"), SOLVABLE.values(), ids=SOLVABLE.keys())
def test_tuned_adam_solves_what_is_convex(family, left):
    kept = condense(run_entrant(Baseline("Adam", Adam(), (0.01, 0.1, 1.0)), Setting("", family, 400, 8, window=1)), 1)
    best = kept.train[-1].min(1)
    assert (best >= 0).all()
    assert np.median(best / kept.train[0, :, 0]) < left


def test_random_quadratics_begin_at_ten():
    """The expected loss at the origin is the number of dimensions; that of the first step is a little above."""
    generator = torch.Generator().manual_seed(0)
    family = Quadratic(dim=10)
    data = family.sample(generator, 4000)
    params, _ = family.init(data, generator)
    first = torch.func.vmap(family.loss)(params, {}, data, family.batch(data, "train", generator))[0]
    assert first.mean() == pytest.approx(10.0, abs=4 * math.sqrt(20 / 4000))


@pytest.mark.parametrize(("rows", "columns"), [(5, 10), (25, 50)])
def test_lasso_is_solved_as_fast_as_fista_is_known_to(rows, columns):
    """Excess at most ``2 L |x_0 - x*|² / (k + 1)²`` (Beck and Teboulle 2009, theorem 4.4), down to rounding."""
    generator = torch.Generator().manual_seed(0)
    family = Lasso(rows=rows, dims=(columns, columns))
    data = {name: t.double() for name, t in family.sample(generator, 8).items()}
    first = family.init(data, generator)[0]["x"].double()
    a, solution, penalty = data["a"], data["solution"], data["penalty"]
    lipschitz = torch.linalg.matrix_norm(a, 2).square().unsqueeze(1)
    x, y, t = first, first, 1.0
    for k in range(1, 201):
        gradient = torch.einsum("lri,lrj,lj->li", a, a, y - solution) - penalty * data["subgradient"]
        after = torch.nn.functional.relu((z := y - gradient / lipschitz).abs() - penalty / lipschitz) * z.sign()
        t, before = (1 + math.sqrt(1 + 4 * t**2)) / 2, t
        x, y = after, after + (before - 1) / t * (after - x)
        noise = torch.zeros(8, rows, dtype=torch.float64)
        excess = torch.func.vmap(family.loss)({"x": x}, {}, data, {"noise": noise})[0]
        bound = 2 * lipschitz[:, 0] * (first - solution).square().sum(1) / (k + 1) ** 2
        assert (excess >= -1e-12).all()
        assert (excess <= bound + 1e-6).all()


@pytest.mark.parametrize("n", [2, 10])
def test_descent_ends_in_local_minima_of_the_egg_crate(n):
    """Near whole numbers, where ``Σ λ z²`` is what is left: Rastrigin's function is not solved by going down."""
    family = Rastrigin(dims=(n, n), conditions=(1.0, 1.0), amplitudes=(10.0, 10.0))
    setting = Setting("", family, 300, 8, window=1)
    final = condense(run_entrant(Baseline("SGD", SGD(), (1e-3,)), setting), 1).train[-1, :, 0]
    # At a local minimum near the whole numbers k the function is Σ k² (1 - 1/(1 + 2 π² α)) up to third order in k/α.
    whole = final / (1 - 1 / (1 + 2 * math.pi**2 * 10.0))
    np.testing.assert_allclose(whole, whole.round(), atol=0.02 * n)
    assert whole.round().max() >= 1


# The page -------------------------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """What a page refers to, and whether its elements are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in ("meta", "br", "line", "path", "use", "rect", "circle"):
            self.open.append(tag)
        self.references += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()


def test_a_page_is_whole_and_asks_for_nothing(tmp_path):
    found = run_suite(SUITE, ENTRANTS, Store(tmp_path))
    page = as_html(Report("mine & <yours>", found, {"Command": "`a < b`"}, {}))
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert all(ref.startswith("#") for ref in reader.references)
    assert not reader.tags & {"script", "link", "img", "iframe"}
    assert "url(http" not in page
    assert page.count("<svg") > 2 * len(TASKS)
    for part in ("prefers-color-scheme: dark", "width=device-width", "currentColor", "mine &amp; &lt;yours&gt;"):
        assert part in page
    for setting in TASKS:
        assert f"<h3>{setting.name}</h3>" in page
    assert "Every setting and trial" in page
    assert "`a &lt; b`" in page


def test_names_of_optimizers_are_text_on_the_page():
    page = as_html(
        Report("mine", [comparison("<b>a", learned=falling(2), adam=falling(8), **{"<i>": falling(4)})], {}, {})
    )
    assert "&lt;i&gt;" in page
    assert "&lt;b&gt;a" in page
    assert "<i>" not in page
    assert "<b>" not in page


def test_each_judged_optimizer_has_its_own_column_of_kinds():
    two = [
        comparison(n, s, learned=falling(a), given=falling(b), adam=falling(8))
        for n, s, a, b in (("a", "like", 2, 0), ("b", "other", 0, 4))
    ]
    headings, *rows = splits_table(two).rows
    assert headings == ("tasks", "number", "learned", "given")
    assert [row[1:] for row in rows] == [
        ("1", "1 of 1; 4×; 1", "0 of 1; 0×; 3.2"),
        ("1", "0 of 1; 0×; 3.2", "1 of 1; 2×; 1"),
    ]


def test_of_several_seeds_the_gravest_is_in_the_table():
    losses = np.array([[4.0, 4.0, 4.0], [3.0, 9.0, 3.0], [2.0, 9.0, 2.0], [1.0, 9.0, 1.0]])[:, :, None]
    kept = Kept("mine", (None,), [1, 2, 3, 4], losses, losses, losses[-1:], [4], 0.0)
    setting = Setting("seeds", Quadratic(), steps=4, seeds=3, window=1)
    (_, row) = diagnoses_table(Comparison.of(setting, {"learned": kept})).rows
    assert row[:3] == ("mine", "diverged (1 of 3 seeds)", "2")


def test_a_baseline_looks_the_same_whoever_is_beside_it():
    alone, among = (
        comparison("a", learned=falling(2), adam=falling(8), muon=falling(4)),
        comparison("b", sgd=falling(8), learned=falling(2), adamw=falling(8), adam=falling(8), muon=falling(4)),
    )
    assert styles(alone)["muon"] == styles(among)["muon"]
    looks = {(style["color"], style["linestyle"]) for style in map(baseline_style, BASELINES)}
    assert len(looks) == len(BASELINES)
    assert not {colour for colour, _ in looks} & set(LEARNED_COLOURS)


def test_the_report_of_a_suite_has_every_optimizer_and_every_kind_of_task():
    text = as_markdown(Report("learned", MADE, {}, {}))
    assert "| **learned** | untuned | 2 of 4 | 1 [0, 4] | 1 [0, 4] | 2.1 |" in text
    assert "| like those of meta-training | 2 | 2 of 2; 3×; 1 |" in text
    assert "![performance profile](profile.png)" in text
    assert "diverged (1 of 1 seeds)" in text
