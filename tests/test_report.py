"""Reports of settings say what happened: in words, tables, pictures, numbers, and at a terminal."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import rich.console
import torch
from suites import INF, NAN, NOISY, kept_of, learned
from torch import nn

from l2o.evaluation import (
    Baseline,
    Comparison,
    Report,
    Setting,
    compare,
    plots,
    print_tables,
    score_kept,
    step_cost,
    write,
)
from l2o.evaluation.compare import LEARNED
from l2o.evaluation.plots import curves_png
from l2o.evaluation.report import as_markdown, prepare_folder
from l2o.evaluation.verdicts import misses_first, overall, overall_text, summary_table, table_row, verdict
from l2o.rules import Adam
from l2o.types import ConfigurationError


def figure_of(result: Comparison) -> list:
    """The panels of its picture."""
    figure = plots.new_figure(7.0, 4.0)
    plots.draw_training(figure.subplots(), result, "loss")
    return figure.axes


def comparison(lr: float, grid: tuple[float, ...] = (1e-3, 1e-2, 1e-1), setting: Setting = NOISY) -> Comparison:
    return compare(setting, {LEARNED: learned(lr), "adam": Baseline("Adam", Adam(), grid)})


def report(*comparisons: Comparison) -> Report:
    facts = {"Hardware": "an abacus", "Command": "`evaluate`"}
    costs = step_cost({"learned": torch.optim.SGD, "AdamW (fused)": torch.optim.AdamW}, nn.Linear(3, 3), rounds=1)
    return Report("mine", comparisons, facts, costs)


def test_a_hit_and_a_miss_are_said_in_words():
    hit, miss = comparison(3e-2, grid=(1e-4, 1e-3)), comparison(1e-3)
    assert verdict(hit).startswith("Target reached: mine ends at")
    assert verdict(miss).startswith("Target missed: mine ends at")
    ratio = miss.scores[LEARNED].mean / miss.scores["adam"].mean
    said = f"above best-of-grid Adam's {miss.scores['adam'].mean:.3g} ({ratio:.3g} times it). Validation loss: "
    assert said in verdict(miss)
    valid = miss.scores["adam"].valid.mean()
    assert verdict(miss).endswith(f" against {valid:.3g}. No seed diverged.")
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
    alone = compare(NOISY, {LEARNED: learned(1e-2)})
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
        "AdamW without weight decay; warm-up over 5% of the run",
        "![smoothed training loss over steps](curves.png)",
    ):
        assert part in text


def test_every_run_is_in_the_results(tmp_path):
    result = comparison(1e-2)
    write(report(result), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "report.md", "report.html", "curves.png"}
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    adam = json.loads((tmp_path / "results.json").read_text())["settings"][0]["optimizers"]["adam"]
    assert [(r["lr"], r["seed"]) for r in adam["runs"]] == [
        (lr, seed) for lr in (1e-3, 1e-2, 1e-1) for seed in range(3)
    ]
    best = [r["final"] for r in adam["runs"] if r["trial"] == adam["best"]]
    assert best == adam["final"] == result.scores["adam"].final.tolist()


@pytest.mark.parametrize(
    ("shift", "scale"), [(0.0, "log"), (-1e3, "linear"), (-5.0, "linear"), (-math.inf, "log"), (math.nan, "log")]
)
def test_losses_of_any_sign_are_in_the_picture(shift, scale):
    result = comparison(1e-2)
    moved = {k: dataclasses.replace(s, curve=s.curve + shift) for k, s in result.scores.items()}
    (panel,) = figure_of(result._replace(scores=moved))
    assert panel.get_yscale() == scale
    low, high = panel.get_ylim()
    for line, s in zip(panel.lines, [moved["adam"], moved[LEARNED]], strict=True):
        seen = s.curve.mean(1)  # as the scores have it
        inside = np.isfinite(seen)
        np.testing.assert_allclose(line.get_ydata()[inside], seen[inside])
        assert ((low <= seen) & (seen <= high))[inside].all()


def test_one_lost_seed_is_a_lost_run_in_the_picture_too():
    result = comparison(1e-2)
    ours = result.scores[LEARNED]
    lost = dataclasses.replace(ours, curve=np.where(np.arange(3) == 1, np.array(ours.steps)[:, None] * INF, ours.curve))
    (panel,) = figure_of(result._replace(scores={**result.scores, LEARNED: lost}))
    assert (panel.lines[-1].get_ydata() > panel.get_ylim()[1]).all()
    assert (panel.lines[0].get_ydata() < panel.get_ylim()[1]).all()


@pytest.mark.parametrize("curve", [[0.0, 0.0, 0.0], [0.0, 0.1, 0.4], [-1.0, -1.0, -1.0]])
def test_a_loss_that_begins_at_its_lowest_is_in_the_picture(curve):
    made_up = score_kept(kept_of([curve]))
    setting = dataclasses.replace(NOISY, steps=3, seeds=1)
    (panel,) = figure_of(Comparison(setting, {}, {LEARNED: made_up, "adam": made_up}))
    low, high = panel.get_ylim()
    assert low <= min(curve) <= max(curve) <= high


def made(name: str, **finals: tuple[float, float]) -> Comparison:
    """A setting of 4 steps: final training and validation loss of each optimizer, to which it gets by halves of 8."""
    curves = {key: [8.0, max(4.0, train), max(2.0, train), train] for key, (train, _) in finals.items()}
    trials = {
        key.replace("_", " "): kept_of([curve], label=key)._replace(valid=np.full((1, 1, 1), finals[key][1]))
        for key, curve in curves.items()
    }
    setting = dataclasses.replace(NOISY, name=name, steps=4, seeds=1)
    return Comparison(setting, trials, {key: score_kept(t) for key, t in trials.items()})


SEVERAL = [
    made("hit", learned=(1.0, 1.0), learned_other=(2.0, 2.0), adam=(2.0, 1.0), adamw=(4.0, 2.0)),
    made("miss", learned=(4.0, 3.0), learned_other=(9.0, 9.0), adam=(2.0, 1.0), adamw=(2.0, 2.0)),
    made("overfits", learned=(2.0, 1.2), learned_other=(4.0, 0.5), adam=(2.0, 1.0), adamw=(8.0, 2.0)),
]


def test_several_settings_are_summed_up_misses_first():
    headings, *rows = summary_table(SEVERAL)
    assert headings == (
        *("task", "target", "speed-up", "validation", "learned", "learned_other", "adam", "adamw"),
        "seconds",
    )
    assert rows == [
        ("miss", "missed", "0×", "3/1", "4", "9 (1 lost)", "2", "2", "0"),
        ("overfits", "overfits", "1.33×", "1.2/1", "2", "4", "2", "8", "0"),
        ("hit", "reached", "1.33×", "1/1", "1", "2", "2", "4", "0"),
    ]


def test_each_learned_optimizer_is_judged_over_all_settings():
    first, other = overall(SEVERAL)
    assert (first.name, first.settings, first.reached, first.worst) == ("learned", 3, 2, (2.0, "miss"))
    assert (first.speed_up, first.overfitted, first.diverged) == (pytest.approx(4 / 3), ("overfits",), ())
    assert (other.name, other.reached, other.speed_up) == ("learned other", 1, 0.0)
    assert (other.worst, other.diverged) == ((4.5, "miss"), ("miss",))
    assert overall_text(first) == (
        "learned: at or under best-of-grid Adam's final training loss in 2 of 3 settings; median speed-up 1.33 (a miss "
        "counts 0). At worst 2 times the loss of untuned AdamW at 0.001 (miss). Overfitting: overfits. Diverged: never."
    )
    assert overall([]) == []


def test_two_lost_runs_are_not_hidden_by_having_no_ratio():
    lost = made("lost", learned=(NAN, NAN), adam=(1.0, 1.0), adamw=(NAN, NAN))
    assert overall([lost])[0].worst == (INF, "lost")


def test_where_adam_is_lost_there_is_nothing_to_reach_or_miss():
    lost = made("lost", learned=(1.0, 1.0), adam=(NAN, NAN), adamw=(NAN, NAN))
    assert verdict(lost) == "adam has no finite training loss at any rate, so there is nothing to compare with. " + (
        "No seed diverged."
    )
    assert summary_table([lost])[1][:3] == ("lost", "none", "none")
    assert [c.setting.name for c in misses_first([*SEVERAL, lost])][:2] == ["miss", "lost"]
    (found,) = overall([lost])
    assert (found.reached, found.speed_up) == (0, None)


def test_a_verdict_names_overfitting_and_the_usual_choice():
    hit, miss, overfits = map(verdict, SEVERAL)
    assert "Validation loss: 1.2 against 1, far above: overfitting. No seed" in overfits
    assert "Untuned AdamW at 0.001 ends at 8 (0.25 times it). Validation" in overfits
    assert "overfitting" not in hit + miss


@pytest.mark.parametrize("width", [80, 110])
def test_tables_fit_the_terminal(monkeypatch, capsys, width):
    console = partial(rich.console.Console, width=width)
    monkeypatch.setattr("rich.console.Console", lambda **_: console(highlight=False, force_terminal=False))
    print_tables(report(*SEVERAL))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    summed = lines[next(i for i, line in enumerate(lines) if "All settings" in line) :]
    assert any(line.split()[:5] == ["miss", "missed", "0×", "3/1", "4"] for line in summed)
    assert "…" not in "".join(summed)


def test_of_many_settings_the_terminal_shows_what_they_say_together(capsys):
    many = [made(f"task {i}", learned=(1.0, 1.0), adam=(2.0, 1.0)) for i in range(5)]
    print_tables(Report("mine", many, {}, {}))
    shown = capsys.readouterr().out
    assert "All optimizers" in shown
    assert "Tasks, misses first" in shown
    assert "best lr" not in shown
    print_tables(Report("mine", many[:4], {}, {}))
    assert "best lr" in capsys.readouterr().out


def test_the_summary_and_every_learned_optimizer_stand_at_the_head_of_a_report(tmp_path):
    write(report(*SEVERAL), tmp_path)
    head, _, _ = (tmp_path / "report.md").read_text().partition("curves.png")
    assert head.index("- learned: at or under") < head.index("- learned_other: ") < head.index("| miss | missed |")
    results = json.loads((tmp_path / "results.json").read_text())
    assert [found["reached"] for found in results["overall"]] == [2, 1]
    assert results["settings"][0]["seconds"] == 0.0


@pytest.mark.parametrize(("package", "function"), [("matplotlib", curves_png), ("rich", print_tables)])
def test_a_missing_package_names_its_extra(monkeypatch, package, function):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigurationError, match=rf"{package} cannot be imported .*pip install 'l2o\[train\]'"):
        function(None)


def test_the_numbers_are_on_disk_before_the_picture_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigurationError, match="matplotlib"):
        write(report(comparison(1e-2)), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "report.md"}
    assert json.loads((tmp_path / "results.json").read_text())["settings"]


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"out=.*file/below.*name a folder"):
        prepare_folder(Path(tmp_path, "file", "below"))
