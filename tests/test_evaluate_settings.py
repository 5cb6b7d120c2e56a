"""What a command line of ``python -m meta_train.evaluate`` means: settings, experiments, suites, shipped curves."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from evaluating import command, configuration, settings

from l2o.evaluation import BASELINES, Setting, baselines, missing, run_entrant
from l2o.tasks import Quadratic
from meta_train import suites

EXPERIMENTS = {
    folder: sorted(path.stem for path in (ROOT / "configs" / folder).glob("*.yaml"))
    for folder in ("experiment", "evaluate/experiment")
}

pytestmark = pytest.mark.usefixtures("sgd")


def test_the_default_is_the_meta_test_half_of_digits():
    (setting,) = settings().values()
    assert (setting.family.dataset, setting.family.half, setting.seeds) == ("digits", "meta_test", 5)


@pytest.mark.parametrize(
    ("arguments", "half"),
    [(["half=meta_train"], "meta_train"), (["half=meta_train", "task.half=meta_test"], "meta_test")],
)
def test_the_half_can_be_chosen(arguments, half):
    assert settings(*arguments)["ImageMLP"].family.half == half


@pytest.mark.parametrize(("own", "half"), [([], "meta_test"), (["task.family.family.half=meta_train"], "meta_train")])
def test_images_inside_augmentations_are_of_that_half_too(own, half):
    inner = "task.family.family._target_=l2o.tasks.ImageMLP"
    nested = ["task._target_=l2o.tasks.Reparametrized", "task.family._target_=l2o.tasks.GradientNoise", inner]
    assert settings(*nested, *own)["Reparametrized"].family.family.family.half == half


def test_settings_override_the_task_and_the_rest():
    found = settings("steps=30", "settings={a: {task: {width: 9}}, b: {steps: 40, seeds: 2}}", "settings.b.window=3")
    assert [(s.name, s.family.width, s.steps, s.seeds, s.window) for s in found.values()] == [
        ("a", 9, 30, 5, None),
        ("b", 32, 40, 2, 3),
    ]


def test_a_time_out_can_be_that_of_all_settings_or_of_one():
    found = settings("timeout=5", "settings={a: {}, b: {timeout: 90}, c: {timeout: null}}")
    assert [setting.timeout for setting in found.values()] == [5, 90, None]
    assert [setting.timeout for setting in settings().values()] == [None]


@pytest.mark.parametrize("name", EXPERIMENTS["evaluate/experiment"])
def test_every_experiment_makes_sense(name):
    for setting in settings(f"experiment={name}").values():
        assert setting.steps >= setting.smoothing
        half = "meta_train" if name == "meta_validation" else "meta_test"  # reports' own data choose nothing
        assert getattr(setting.family, "half", half) == half


def test_problems_are_unlike_those_of_meta_training_only_where_they_say_so():
    assert Setting("as it stands", Quadratic(), steps=9).split == "unmarked"
    demo = [setting.split for setting in settings("experiment=digits_demo").values()]
    assert demo == ["like", "like", "like", "other"]


SUITES = sorted(path.stem for path in (ROOT / "configs" / "evaluate" / "suite").glob("*.yaml"))


SPLITS = {"quick": {"like", "other"}, "standard": {"like", "larger", "longer", "other"}, "large": {"larger", "longer"}}


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_makes_sense(name):
    found = settings(f"suite={name}")
    assert len({setting.name for setting in found.values()}) == len(found)
    for setting in found.values():
        assert getattr(setting.family, "half", "meta_test") == "meta_test"  # which no meta-training sees
        assert (setting.seeds, setting.revision >= 1) == (3, True)
    assert {setting.split for setting in found.values()} == SPLITS[name]


def test_the_seeds_of_a_suite_are_its_own():
    """Not those of training, of held-out evaluation in its course, or of the experiments here."""
    seeds = [
        int(seed)
        for path in ROOT.glob("configs/**/*.yaml")
        for seed in re.findall(r"^ *seed: (\d+)", path.read_text(), re.M)
    ]
    files = {n: (ROOT / f"configs/evaluate/suite/{n}.yaml").read_text() for n in SUITES}
    ours = [int(re.search(r"^seed: (\d+)", text, re.M)[1]) for text in files.values()]
    assert len(set(ours)) == len(SUITES)
    assert all(seeds.count(seed) == 1 for seed in ours)


SHIPPED = sorted(path.name for path in (ROOT / "benchmarks" / "suite").iterdir())


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_curves_are_those_of_the_suite_as_it_is_now(name):
    """All of them are there, and begin where its problems begin today: else a revision has to be raised."""
    config = configuration(f"suite={name}")
    made, chosen = suites.make_suite(config), baselines(config.baselines, config.wider)
    store = suites.make_store(config, Path("out"))
    assert [str(job) for job in missing(made, chosen, store)] == []
    for setting in made.tasks:
        first = run_entrant(BASELINES["adamw"], dataclasses.replace(setting, steps=1, window=1)).train[0, :, 0]
        np.testing.assert_allclose(store.kept(name, setting, chosen["adam"]).train[0, :, 0], first, rtol=2e-3)


def test_packages_of_curves_that_are_there_need_not_be(monkeypatch):
    """Those of the extra ``baselines``: whose curves come with l2o, or were run before."""
    pytest.importorskip("prodigyopt")
    run = ("suite=quick", "steps=5", "seeds=1", "only=[quadratic]", "baselines=[adam,prodigy]", "store=curves")
    assert command(*run) == 0
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    assert command(*run) == 0
    assert command(*run, "store=other") == 2


@pytest.mark.parametrize(("shipped", "some"), [("true", True), ("false", False)])
def test_shipped_curves_are_taken_unless_they_are_not_wanted(shipped, some):
    config = configuration("suite=quick", f"shipped={shipped}")
    assert (len(suites.make_store(config, Path("out"))) > 0) == some


def test_shipped_curves_take_a_few_megabytes():
    assert 0 < sum(path.stat().st_size for path in (ROOT / "benchmarks" / "suite").rglob("*.npz")) < 12e6


def test_every_experiment_of_training_has_its_evaluation():
    assert EXPERIMENTS["experiment"]
    assert set(EXPERIMENTS["experiment"]) <= set(EXPERIMENTS["evaluate/experiment"])
