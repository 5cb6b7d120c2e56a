"""Judging optimizers: hand-made curves get the scores they should, and all optimizers meet the same problems."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import l2o.meta
from l2o.evaluation import (
    BASELINES,
    Baseline,
    Comparison,
    Report,
    Setting,
    Trials,
    baselines,
    compare,
    run,
    run_baseline,
    run_learned,
    score,
    speed_up,
    step_cost,
    write,
)
from l2o.evaluation.baselines import warmup_cosine
from l2o.evaluation.compare import LEARNED
from l2o.evaluation.curves import evaluation_steps
from l2o.evaluation.report import as_markdown, prepare_folder, table_row, verdict
from l2o.evaluation.scores import best_trial, bootstrap_interval, diverged, final_losses, smooth
from l2o.optim import LearnedOptimizer
from l2o.rules import SGD, Adam
from l2o.tasks import ImageMLP, Quadratic, Repeated
from l2o.types import Clock, ConfigurationError, UnknownNameError

NOISY = Setting("noisy", Quadratic(dim=3, noise=0.1), steps=21, seeds=3, window=1)
INF, NAN = math.inf, math.nan

TORCH: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "adam": torch.optim.Adam,
    "adam_cosine": partial(torch.optim.AdamW, weight_decay=0.0),
}


def theta_of(rule):
    return rule.init_theta(torch.Generator())


def trials_of(curve: list[float], label: str = "made up") -> Trials:
    """One seed, one trial."""
    losses = np.array(curve).reshape(-1, 1, 1)
    return Trials(label, (None,), losses, losses[-1:], [len(curve)], 0.0)


# Scores ---------------------------------------------------------------------------------------------------------------


def test_smoothing_looks_back_only():
    np.testing.assert_array_equal(smooth(np.array([4.0, 2.0, 0.0, 0.0]), 2), [4.0, 3.0, 1.0, 0.0])


@pytest.mark.parametrize(
    ("curve", "final", "lost"),
    [
        ([4.0, 3.0, 1.0], 2.0, False),
        ([4.0, 1.0, 7.0], 4.0, False),
        ([4.0, 3.0, 5.1], 4.05, True),
        ([4.0, NAN, 1.0, 1.0], INF, True),
        ([4.0, 1.0, INF], INF, True),
        ([NAN, NAN, NAN], INF, True),
    ],
)
def test_final_loss_and_divergence(curve, final, lost):
    losses = np.array(curve).reshape(-1, 1, 1)
    assert final_losses(losses, window=2).item() == pytest.approx(final)
    assert diverged(losses, window=2).item() is lost


def test_the_best_trial_has_the_lowest_seed_mean_and_has_lost_no_seed():
    assert best_trial(np.array([[3.0, 0.0, 2.0], [3.0, INF, 2.0]])) == 2


def test_a_score_is_that_of_the_best_trial_and_says_where_it_lies():
    train = np.array([[[9.0, 9.0, 9.0]], [[3.0, 1.0, 2.0]]])
    trials = Trials("three", (0.1, 1.0, 10.0), train, 10 * train[1:], [2], 0.0)
    best = score(trials, window=1)
    assert (best.rate, best.mean, best.valid.tolist(), best.trials, best.at_edge) == (1.0, 1.0, [10.0], 3, False)
    assert score(trials._replace(train=train[..., ::-1].cumsum(2)), window=1).at_edge


@pytest.mark.parametrize(
    ("candidate", "reference", "expected"),
    [
        ([4.0, 2.0, 1.0, 0.5], [4.0, 3.0, 2.0, 2.0], 2.0),
        ([4.0, 3.0, 2.5, 2.0], [4.0, 3.0, 2.0, 2.0], 1.0),
        ([4.0, 3.0, 2.5, 2.1], [4.0, 3.0, 2.0, 2.0], 0.0),
        ([4.0, NAN, NAN, NAN], [4.0, 3.0, 2.0, 2.0], 0.0),
        ([4.0, 3.0, 2.0, 2.0], [4.0, NAN, NAN, NAN], NAN),
    ],
)
def test_speed_up(candidate, reference, expected):
    ours, theirs = (score(trials_of(curve), window=1) for curve in (candidate, reference))
    assert speed_up(ours, theirs) == pytest.approx(expected, nan_ok=True)


def test_the_bootstrap_interval():
    values = np.random.default_rng(0).normal(5.0, 1.0, 400)
    low, high = bootstrap_interval(values)
    assert bootstrap_interval(values) == (low, high)
    standard_error = values.std() / math.sqrt(400)
    assert (values.mean() - low, high - values.mean()) == pytest.approx((1.96 * standard_error,) * 2, rel=0.1)
    assert bootstrap_interval(np.full(3, 2.0)) == (2.0, 2.0)
    assert bootstrap_interval(np.array([1.0, INF])) == (1.0, INF)


# Runs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("horizon", "points"), [(100, list(range(5, 101, 5))), (7, list(range(1, 8))), (1, [1]), (30, None)]
)
def test_validation_points_are_spread_over_the_run(horizon, points):
    found = evaluation_steps(horizon, 20)
    assert points is None or found == points
    assert found[-1] == horizon
    assert len(found) == min(20, horizon)
    assert max(np.diff([0, *found])) - min(np.diff([0, *found])) <= 1


def test_validation_does_not_touch_the_training_stream():
    theta = {"log_lr": torch.full((2,), -4.0)}
    runs = [run(SGD(), theta, NOISY.family, 9, torch.Generator().manual_seed(0), n) for n in (1, 9)]
    assert torch.equal(runs[0].train, runs[1].train)


def test_validation_losses_are_those_after_as_many_updates():
    theta = {"log_lr": torch.full((2,), -4.0)}
    curves = run(SGD(), theta, Quadratic(dim=3), 9, torch.Generator().manual_seed(0), 9)
    torch.testing.assert_close(curves.valid[:-1], curves.train[1:])  # training is noiseless here too
    assert curves.valid_steps == list(range(1, 10))
    assert (curves.valid[-1] < curves.valid[-2]).all()


class HostReads(TorchDispatchMode):
    """Counts reads of a tensor's value on the host, each of which would wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return func(*args, **(kwargs or {}))


def test_a_run_does_not_wait_for_the_device():
    baseline = BASELINES["adam_cosine"]
    theta = baseline.thetas(torch.Generator())
    with HostReads() as reads:
        family = Repeated(ImageMLP(width=4), len(baseline.grid))
        curves = run(baseline.scheduled_rule(), theta, family, 4, torch.Generator().manual_seed(0), 2)
        assert reads.count == 0
        curves.train[0, 0].item()
    assert reads.count == 1


@pytest.mark.parametrize(("horizon", "evaluations", "names"), [(0, 1, "horizon=0"), (1, 0, "evaluations=0")])
def test_a_run_needs_positive_numbers(horizon, evaluations, names):
    with pytest.raises(ConfigurationError, match=names):
        run(SGD(), {"log_lr": torch.zeros(1)}, NOISY.family, horizon, torch.Generator(), evaluations)


# Baselines ------------------------------------------------------------------------------------------------------------


def one_by_one(name: str, rate: float, seed: int) -> list[float]:
    """The losses of torch's optimizer on one problem of ``NOISY``, drawn as the vectorised run draws them."""
    generator = torch.Generator().manual_seed(NOISY.seed)
    data = NOISY.family.sample(generator, NOISY.seeds)
    x = nn.Parameter(NOISY.family.init(data, generator)[0]["x"][seed].clone())
    optimizer = TORCH[name]([x], lr=rate)
    losses = []
    for step in range(NOISY.steps):
        batch = NOISY.family.batch(data, "train", generator)
        loss, _ = NOISY.family.loss({"x": x}, {}, *({k: t[seed] for k, t in d.items()} for d in (data, batch)))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        if BASELINES[name].cosine:
            optimizer.param_groups[0]["lr"] = rate * l2o.meta.warmup_cosine(step, NOISY.steps, NOISY.steps // 20)
        optimizer.step()
    return losses


@pytest.mark.parametrize("name", BASELINES)
def test_the_lanes_of_a_grid_are_single_runs_of_torch(name):
    grid = (1e-3, 1e-2)
    trials = run_baseline(dataclasses.replace(BASELINES[name], grid=grid), NOISY)
    singly = [[one_by_one(name, rate, seed) for rate in grid] for seed in range(NOISY.seeds)]
    np.testing.assert_allclose(trials.train, np.array(singly).transpose(2, 0, 1), rtol=2e-5)


@pytest.mark.parametrize("family", [Quadratic(noise=0.1), ImageMLP(width=8, batch_size=16)], ids=["quadratic", "digits"])
@pytest.mark.parametrize("name", ["sgd", "adam", "adam_cosine"])
def test_a_learned_rule_meets_the_problems_of_the_baselines(family, name):
    setting = Setting("same", family, steps=12, seeds=3)
    baseline = BASELINES[name]
    grid = run_baseline(baseline, setting)
    rule = dataclasses.replace(baseline.rule, lr=baseline.grid[3])
    once = run_learned(rule, theta_of(rule), setting)
    assert once.train.shape == (12, 3, 1)
    for trial in range(len(baseline.grid)):
        np.testing.assert_array_equal(grid.train[0, :, trial], once.train[0, :, 0])
    if not baseline.cosine:
        np.testing.assert_allclose(grid.train[..., 3], once.train[..., 0], rtol=1e-4)
        np.testing.assert_allclose(grid.valid[..., 3], once.valid[..., 0], rtol=1e-4)


@pytest.mark.parametrize("total", [1, 10, 19, 20, 100, 137])
def test_the_schedule_is_that_of_the_outer_loop(total):
    clocks = [Clock(torch.tensor(step), torch.tensor(total)) for step in range(total)]
    expected = [l2o.meta.warmup_cosine(step, total, warmup=total // 20) for step in range(total)]
    assert [warmup_cosine(clock).item() for clock in clocks] == pytest.approx(expected, abs=1e-6)


def test_grids_have_at_least_eight_rates_half_a_decade_apart():
    for baseline in BASELINES.values():
        assert len(baseline.grid) >= 8
        np.testing.assert_allclose(np.diff(np.log10(baseline.grid)), 0.5)


def test_baselines_go_by_name():
    assert list(baselines(["adam", "sgd"])) == ["adam", "sgd"]
    with pytest.raises(UnknownNameError, match="'adma', did you mean 'adam'.*rmsprop, sgd"):
        baselines(["adma"])
    with pytest.raises(ConfigurationError, match=r"expected a list, such as \[adam\]"):
        baselines("adam")


# Reports --------------------------------------------------------------------------------------------------------------


def comparison(lr: float, grid: tuple[float, ...] = (1e-3, 1e-2, 1e-1), setting: Setting = NOISY) -> Comparison:
    return compare(setting, SGD(lr=lr), theta_of(SGD(lr=lr)), {"adam": Baseline("Adam", Adam(), grid)})


def report(*comparisons: Comparison) -> Report:
    facts = {"Hardware": "an abacus", "Command": "`evaluate`"}
    costs = step_cost({"learned": torch.optim.SGD, "AdamW (fused)": torch.optim.AdamW}, nn.Linear(3, 3), rounds=1)
    return Report("mine", comparisons, facts, costs)


def test_a_hit_and_a_miss_are_said_in_words():
    hit, miss = comparison(3e-2, grid=(1e-4, 1e-3)), comparison(1e-4)
    assert verdict(hit).startswith("Target reached: the learned optimizer ends at")
    assert verdict(miss).startswith("Target missed: the learned optimizer ends at")
    ratio = miss.scores[LEARNED].mean / miss.scores["adam"].mean
    assert f"above best-of-grid Adam's {miss.scores['adam'].mean:.3g} ({ratio:.3g} times it). No seed" in verdict(miss)
    assert table_row(miss, LEARNED)[-1] == "0 (miss)"
    assert "(edge of the grid)" in table_row(hit, "adam")[2]


def test_divergence_is_counted_and_written_down(tmp_path):
    lost = comparison(1e3, setting=dataclasses.replace(NOISY, steps=60))
    assert lost.scores[LEARNED].diverged.tolist() == [True] * 3
    assert "It diverged on 3 of 3 seeds." in verdict(lost)
    assert "not finite" in verdict(lost)
    assert table_row(lost, LEARNED)[-2] == "3 of 3"
    write(report(lost), tmp_path)
    learned = json.loads((tmp_path / "results.json").read_text())["settings"][0]["optimizers"][LEARNED]
    assert (learned["mean"], learned["diverged"], learned["interval"]) == (None, [True] * 3, [None, None])


def test_without_adam_nothing_is_claimed():
    alone = compare(NOISY, SGD(), theta_of(SGD()), {})
    assert verdict(alone).startswith("adam is not among the baselines")
    assert table_row(alone, LEARNED)[-1] == "no reference"


def test_a_report_states_seeds_trials_window_and_facts():
    text = as_markdown(report(comparison(1e-2), comparison(1e-3, setting=dataclasses.replace(NOISY, name="other"))))
    for part in (
        "`Quadratic(dim=3, noise=0.1, init_scale=0.01)`, 21 steps, 3 seeds",
        "over the last 1 steps",
        "- Adam: 3 trials a seed, learning rates 0.001, 0.01, 0.1.",
        "- Seeds of other: 3 problems, all drawn from a generator of seed 1000.",
        "- Hardware: an abacus",
        "| learned | ",
        "![smoothed training loss over steps](curves.png)",
    ):
        assert part in text


def test_every_run_is_in_the_results(tmp_path):
    result = comparison(1e-2)
    write(report(result), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "report.md", "curves.png"}
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    adam = json.loads((tmp_path / "results.json").read_text())["settings"][0]["optimizers"]["adam"]
    assert [(r["lr"], r["seed"]) for r in adam["runs"]] == [(lr, seed) for lr in (1e-3, 1e-2, 1e-1) for seed in range(3)]
    best = [r["final"] for r in adam["runs"] if r["trial"] == adam["best"]]
    assert best == adam["final"] == result.scores["adam"].final.tolist()


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="out=.*file/below.*name a folder"):
        prepare_folder(Path(tmp_path, "file", "below"))


@pytest.mark.parametrize(
    ("bad", "names"),
    [({"steps": 0}, "steps=0"), ({"seeds": 1.5}, "seeds=1.5"), ({"seed": -1}, "seed=-1"), ({"window": 22}, "window=22")],
)
def test_a_setting_that_makes_no_sense_is_refused(bad, names):
    with pytest.raises(ConfigurationError, match=names):
        dataclasses.replace(NOISY, **bad)


def test_the_cost_of_a_step():
    makers = {
        "plug-in": lambda params: LearnedOptimizer(params, (SGD(), theta_of(SGD())), total_steps=10),
        "Adam": torch.optim.Adam,
    }
    module = nn.Linear(30, 30)
    before = module.weight.detach().clone()
    costs = step_cost(makers, module, rounds=3)
    assert (costs["plug-in"].state_bytes, costs["Adam"].state_bytes) == (0.0, pytest.approx(8.0, abs=0.1))
    assert all(cost.seconds > 0 for cost in costs.values())
    assert torch.equal(module.weight, before)
