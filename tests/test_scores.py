"""What is made of curves: hand-made ones get the scores that they should, alone and over the tasks of a suite."""

import itertools
import math

import numpy as np
import pytest
from suites import INF, MADE, NAN, comparison, falling, kept_of

from l2o.evaluation import (
    Comparison,
    Setting,
    Trials,
    by_split,
    profile,
    score,
    score_kept,
    speed_up,
    summaries,
)
from l2o.evaluation.aggregate import estimate, interquartile_mean, median
from l2o.evaluation.scores import best_trial, bootstrap_interval, diverged, final_losses, kept_steps, smooth, target
from l2o.evaluation.tables import optimizers_table
from l2o.evaluation.verdicts import overfits
from l2o.tasks import Quadratic


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


@pytest.mark.parametrize("length", [1, 2, 100, 128, 129, 300, 1000, 20_000])
def test_the_points_that_are_kept_cover_a_run(length):
    steps = kept_steps(length)
    assert (steps[0], steps[-1]) == (1, length)
    assert (np.diff(steps) > 0).all()
    assert len(steps) <= 130
    later = [b / a for a, b in itertools.pairwise(steps) if a >= 10]
    assert max(later, default=1.0) < 1.4


def test_smoothing_looks_back_only():
    np.testing.assert_array_equal(smooth(np.array([4.0, 2.0, 0.0, 0.0]), 2, [1, 2, 3, 4]), [4.0, 3.0, 1.0, 0.0])
    np.testing.assert_array_equal(smooth(np.array([4.0, 2.0, 0.0, 0.0]), 3, [2, 4]), [3.0, 2 / 3])


@pytest.mark.parametrize(
    ("curve", "final", "lost"),
    [
        ([4.0, 3.0, 1.0], 2.0, False),
        ([4.0, 1.0, 7.0], 4.0, False),
        ([4.0, 3.0, 5.1], 4.05, True),
        ([4.0, NAN, 1.0, 1.0], INF, True),
        ([4.0, 1.0, INF], INF, True),
        ([NAN, NAN, NAN], INF, True),
        ([-4.0, -3.0, -7.0], -5.0, False),
        ([-4.0, -3.0, -2.0], -2.5, True),
        ([0.0, 0.1, 0.3], 0.2, False),  # of what begins at zero nothing is above the beginning
        ([0.0, 0.1, INF], INF, True),
    ],
)
def test_final_loss_and_divergence(curve, final, lost):
    kept = kept_of([curve], window=2)
    assert final_losses(kept).item() == pytest.approx(final)
    assert diverged(kept).item() is lost


def test_the_best_trial_has_the_lowest_seed_mean_and_has_lost_no_seed():
    assert best_trial(np.array([[3.0, 0.0, 2.0], [3.0, INF, 2.0]])) == 2


def test_a_score_is_that_of_the_best_trial_and_says_where_it_lies():
    train = np.array([[[9.0, 9.0, 9.0]], [[3.0, 1.0, 2.0]]])
    trials = Trials("three", (0.1, 1.0, 10.0), train, 10 * train[1:], [2], 0.0)
    best = score(trials, smoothing=1)
    assert (best.rate, best.mean, best.valid.tolist(), best.trials, best.at_edge) == (1.0, 1.0, [10.0], 3, False)
    assert score(trials._replace(train=train[..., ::-1].cumsum(2)), smoothing=1).at_edge


@pytest.mark.parametrize(
    ("candidate", "reference", "expected"),
    [
        ([4.0, 2.0, 1.0, 0.5], [4.0, 3.0, 2.0, 2.0], 2.0),
        ([4.0, 3.0, 2.5, 2.0], [4.0, 3.0, 2.0, 2.0], 1.0),
        ([4.0, 3.0, 2.5, 2.1], [4.0, 3.0, 2.0, 2.0], 0.0),
        ([4.0, 2.0, 3.0, 3.0], [4.0, 3.0, 2.0, 2.0], 2.0),  # it was there and left again
        ([4.0, NAN, NAN, NAN], [4.0, 3.0, 2.0, 2.0], 0.0),
        ([4.0, 3.0, 2.0, 2.0], [4.0, NAN, NAN, NAN], NAN),
    ],
)
def test_speed_up(candidate, reference, expected):
    ours, theirs = (score_kept(kept_of([curve])) for curve in (candidate, reference))
    assert speed_up(ours, theirs) == pytest.approx(expected, nan_ok=True)


def test_the_bootstrap_interval():
    values = np.random.default_rng(0).normal(5.0, 1.0, 400)
    low, high = bootstrap_interval(values)
    assert bootstrap_interval(values) == (low, high)
    standard_error = values.std() / math.sqrt(400)
    assert (values.mean() - low, high - values.mean()) == pytest.approx((1.96 * standard_error,) * 2, rel=0.1)
    assert bootstrap_interval(np.full(3, 2.0)) == (2.0, 2.0)
    assert bootstrap_interval(np.array([1.0, INF])) == (1.0, INF)
