"""What a command line of ``python -m meta_train.evaluate`` means; a bad one is one line before any work."""

import dataclasses
import errno
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from evaluating import command, configuration, settings

import l2o.checkpoints.store
from l2o.evaluation import BASELINES, Setting, baselines, missing, run_entrant
from l2o.tasks import Quadratic
from l2o.types import UnknownNameError
from meta_train import evaluate, optimizers, suites
from meta_train.config.compose import EXTRA

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
    assert {setting.split for setting in settings("experiment=demo").values()} == {"other"}


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


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["source=nowhere"], ["nowhere"]),
        (["task=digit_mlp"], ["unknown task 'digit_mlp'", "'digits_mlp'", "mnist_mlp", "quadratic"]),
        (["experiment=digit_demo"], ["'digit_demo'", "'digits_demo'", "l2l_quadratic"]),
        (["baselines=[sgdd]"], ["unknown baseline 'sgdd'", "'sgd'", "adam_cosine"]),
        (["stepz=3"], ["unknown setting 'stepz'", "'steps'"]),
        (["task.widht=3"], ["ImageMLP", "'widht'", "width"]),
        (["task.width=wide"], ["task: ImageMLP: width='wide'", "whole number"]),
        (["task.width=1.5"], ["task: ImageMLP: width=1.5", "whole number"]),
        (["task=quadratic", "task.dim=abc"], ["task: Quadratic: dim='abc'", "whole number"]),
        (["settings.wide.task.width=0"], ["settings.wide.task: ImageMLP: width=0"]),
        (["task._target_=l2o.tasks.ImageMPL"], ["task._target_", "'ImageMPL'", "did you mean 'ImageMLP'", "Quadratic"]),
        (["task.dataset=digit"], ["unknown dataset 'digit'", "mnist_t10k"]),
        (["task._target_=no_such.Task"], ["task", "no_such.Task"]),
        (["task._target_=l2o.rules.SGD"], ["expected a TaskFamily"]),
        (["rules=[no_such.Rule]"], ["rules", "no_such.Rule"]),
        (["rules=[l2o.rules.MLQ]"], ["rules: unknown name in l2o.rules 'MLQ'", "'MLP'", "RMSProp"]),
        (["rules=[l2o.tasks.Quadratic]"], ["Quadratic", "UpdateRule"]),
        (["settings.wide.stps=3"], ["settings.wide", "'stps'", "'steps'"]),
        (["settings=3"], ["settings=3", "mapping"]),
        (["settings.wide.task=3"], ["settings.wide.task=3", "{width: 128}"]),
        (["only=[wid]", "settings={wide: {}, long: {}}"], ["unknown setting 'wid'", "'wide'", "long"]),
        (["only=wide", "settings={wide: {}}"], ["only='wide'", "a list, such as [wide]"]),
        (["source=[sgd,sgd]"], ["source=['sgd', 'sgd']", "several different ones"]),
        (["source=3"], ["'3'"]),
        (["source=[]"], ["source=[]", "a name"]),
        (["source=[sgd,nowhere]"], ["nowhere"]),
        (["steps=0"], ["steps=0"]),
        (["timeout=0"], ["timeout=0", "over 0"]),
        (["timeout=soon"], ["timeout='soon'"]),
        (["suite=quik"], ["unknown suite 'quik'", "'quick'"]),
        (["jobs=0"], ["jobs=0"]),
        (["optimizers=[torch.optim.Adan]"], ["optimizer 'torch.optim.Adan' cannot be imported"]),
        (["optimizers=[{path:torch.optim.Adam,schedule:cosin}]"], ["unknown schedule 'cosin'", "'cosine'"]),
        (["optimizers=[{path:torch.optim.Adam,momentum:0.9}]"], ["torch.optim.Adam: ", "momentum", "its settings"]),
        (["optimizers=[{path:torch.optim.Adam,rate:[0.1]}]"], ["unexpected keyword argument 'rate'", "its settings"]),
        (["optimizers=[{path:torch.optim.Adam,rates:[]}]"], ["torch.optim.Adam: rates=[]", "leave rates out"]),
        (["optimizers=[MyOptimizer]"], ["unknown checkpoint 'MyOptimizer'", "goes by module:Class"]),
        (["optimizers=[torch.optim.LBFGS]"], ["torch.optim.LBFGS: ", "closure"]),
        (["settings.wide.split=larg"], ["unknown split 'larg'", "'larger'"]),
        (["seed=9223372036854775808"], ["seed=9223372036854775808: expected a seed of at most 63 bits"]),
        (["out=~nobody-of-this-name/x"], ["out='~nobody-of-this-name/x': there is no such user"]),
        (["device=gpu"], ["device='gpu'", "auto, cpu or cuda"]),
        (["out=sgd/card.json/x"], ["out='sgd/card.json/x'", "name a folder"]),
        (["steps"], ["'steps'"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_bad_input_is_one_line_before_any_work(capfd, monkeypatch, arguments, says):
    monkeypatch.setattr(evaluate, "run_jobs", lambda *_: pytest.fail("work was done"))
    assert command(*arguments) == 2
    out, error = capfd.readouterr()
    assert out == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for part in says:
        assert part in error
    assert {path.name for path in Path().iterdir()} == {"sgd"}


def test_missing_data_is_noticed_before_any_work(capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("L2O_DATA_DIR", str(tmp_path / "no_data"))
    assert command("task=mnist_mlp") == 2
    assert "no_data" in capfd.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize("package", ["hydra", "omegaconf", "matplotlib", "rich"])
def test_a_missing_extra_is_named_before_any_work(capfd, monkeypatch, package):
    monkeypatch.setattr(evaluate, "run_jobs", lambda *_: pytest.fail("work was done"))
    monkeypatch.setitem(sys.modules, package, None)
    assert command() == 2
    error = capfd.readouterr().err
    assert re.fullmatch(rf"error: {package} .*: pip install 'l2o\[train\]'\n", error)
    assert not Path("out").exists()


@pytest.mark.parametrize("package", EXTRA)
def test_a_package_that_is_missing_deeper_down_is_named_too(capfd, monkeypatch, package):
    def load(*_, **__):
        raise ModuleNotFoundError(name=f"{package}.part")

    monkeypatch.setattr(optimizers, "load", load)
    assert command() == 2
    assert capfd.readouterr().err.startswith(f"error: {package}.part is not installed; ")


def test_the_extra_has_what_hydra_brings_along():
    assert {"omegaconf", "yaml"} <= set(EXTRA)


def test_a_card_that_cannot_be_written_is_noticed_before_any_work(capfd, monkeypatch):
    monkeypatch.setattr(evaluate, "run_jobs", lambda *_: pytest.fail("work was done"))

    def refuse(folder):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(l2o.checkpoints.store, "try_folder", refuse)
    assert command("task=quadratic", "record=true") == 2
    assert capfd.readouterr().err.startswith(
        "error: source='sgd': its card in sgd cannot be written (Permission denied)"
    )
    assert not Path("out").exists()


def test_a_bug_keeps_its_trace(monkeypatch):
    monkeypatch.setattr(optimizers, "load", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command()


def test_a_trace_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(UnknownNameError):
        command("source=nowhere")
    assert os.environ["HYDRA_FULL_ERROR"] == "1"
