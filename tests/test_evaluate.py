"""The command ``python -m meta_train.evaluate``: a whole small run, its settings, and bad input before any work."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import l2o.checkpoints.store
from l2o.evaluation import BASELINES, Setting, baselines, missing, run_entrant, suite
from l2o.rules import SGD
from l2o.tasks import Quadratic
from l2o.types import UnknownNameError
from meta_train import evaluate, optimizers, suites
from meta_train.config.compose import EXTRA

OWN = """
from dataclasses import dataclass

from l2o.rules import SGD
from l2o.tasks import Quadratic


@dataclass(frozen=True)
class Rule(SGD):
    width: int = 1


@dataclass(frozen=True)
class Task(Quadratic):
    dim: int = 2
"""
EXPERIMENTS = {
    folder: sorted(path.stem for path in (ROOT / "configs" / folder).glob("*.yaml"))
    for folder in ("experiment", "evaluate/experiment")
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder of its own for every test, but for a checkpoint."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    l2o.checkpoints.store.save("sgd", SGD(), SGD().init_theta(torch.Generator()))


@pytest.fixture
def command(monkeypatch):
    """The command in this process: its exit status."""

    def command(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["evaluate", "source=sgd", "out=out", *arguments])
        try:
            evaluate.main()
        except SystemExit as stopped:
            return int(stopped.code or 0)
        return 0

    return command


@pytest.fixture
def settings(monkeypatch, command):
    """The settings that a command line means."""

    def settings(*arguments: str):
        seen = []
        monkeypatch.setattr(
            evaluate, "evaluate", lambda config, line: seen.extend(suites.make_settings(config).values())
        )
        assert command(*arguments) == 0
        return {setting.name: setting for setting in seen}

    return settings


def test_a_small_run_leaves_its_report_and_nothing_else(command, capsys):
    assert command("task=quadratic", "task.dim=3", "steps=12", "seeds=3", "baselines=[sgd,adam]") == 0
    assert {path.name for path in Path().iterdir()} == {"sgd", "out"}
    assert {path.name for path in Path("out").iterdir()} == FILES
    results = json.loads(Path("out/results.json").read_text())
    (setting,) = results["settings"]
    assert (setting["steps"], setting["seeds"], list(setting["optimizers"])) == (12, 3, ["learned", "sgd", "adam"])
    assert len(setting["optimizers"]["adam"]["runs"]) == 3 * setting["optimizers"]["adam"]["trials"]
    assert set(results["costs"]) == {"learned", "AdamW (fused)", "Adam"}
    text = Path("out/report.md").read_text()
    for part in ("device cpu, ", f"torch {torch.__version__}", "Wall time", "task.dim=3 steps=12", "Date", "## Cost"):
        assert part in text
    shown = capsys.readouterr().out
    assert " sgd " in shown
    assert "out/report.md" in shown


FILES = {"results.json", "report.md", "report.html", "curves.png", "store"}
SMALL = ("task=quadratic", "steps=3", "seeds=2", "baselines=[adam,adamw]", "cost=false")


def test_several_learned_optimizers_stand_in_one_table(command):
    l2o.checkpoints.store.save("faster", SGD(lr=0.1), SGD(lr=0.1).init_theta(torch.Generator()))
    assert command("source=[sgd,faster]", *SMALL, "cost=true") == 0
    results = json.loads(Path("out/results.json").read_text())
    assert results["source"] == "sgd, faster"
    optimizers = results["settings"][0]["optimizers"]
    assert [(key, o["label"]) for key, o in optimizers.items()][:3] == [
        ("learned", "sgd"),
        ("learned faster", "faster"),
        ("adam", "Adam"),
    ]
    assert {"Learned optimizer sgd", "Learned optimizer faster"} <= results["facts"].keys()
    assert [found["name"] for found in results["overall"]] == ["learned", "learned faster"]
    assert list(results["costs"]) == ["learned", "learned faster", "AdamW (fused)", "Adam"]


def test_an_interrupted_evaluation_keeps_what_is_done_and_says_how_to_go_on(command, monkeypatch, capsys):
    def interrupted(entrant, setting, *arguments):
        if setting.name == "b":
            raise KeyboardInterrupt
        return run_entrant(entrant, setting, *arguments)

    settings = "settings={a: {seed: 1}, b: {seed: 2}, c: {seed: 3}}"
    run_entrant = suite.run_entrant
    monkeypatch.setattr(suite, "run_entrant", interrupted)
    assert command(*SMALL, settings) == 130
    results = json.loads(Path("out/results.json").read_text())
    assert [setting["name"] for setting in results["settings"]] == ["a"]
    assert results["facts"]["Settings done"] == "1 of 3"
    assert {path.name for path in Path("out").iterdir()} == FILES
    said = capsys.readouterr().err
    assert said.startswith("interrupted with 6 of 9 runs to do; the report of 1 of 3 settings is out/report.md; ")
    assert "store=out/store goes on" in said
    ran = []
    monkeypatch.setattr(suite, "run_entrant", lambda *a: ran.append(a[1].name) or run_entrant(*a))
    assert command(*SMALL, settings, "store=out/store", "out=rest") == 0
    assert ran == ["b"] * 3 + ["c"] * 3
    rest = json.loads(Path("rest/results.json").read_text())
    monkeypatch.setattr(suite, "run_entrant", run_entrant)
    assert command(*SMALL, settings, "out=whole") == 0
    whole = json.loads(Path("whole/results.json").read_text())
    assert without_times(rest) == without_times(whole)


def without_times(results):
    """A report's numbers without what differs from run to run."""
    for setting in results["settings"]:
        del setting["seconds"]
        for optimizer in setting["optimizers"].values():
            del optimizer["seconds"]
    for optimizer in results["optimizers"]:
        del optimizer["wall"]
    return results["settings"], results["overall"], results["optimizers"]


def test_an_evaluation_that_is_interrupted_at_once_says_so(command, monkeypatch, capsys):
    monkeypatch.setattr(suite, "run_entrant", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert command(*SMALL) == 130
    assert capsys.readouterr().err == (
        "interrupted with 3 of 3 runs to do; what is done is kept, and the same command with store=out/store goes on\n"
    )


def test_results_can_be_recorded_in_the_card(command):
    before = l2o.read_card("sgd")
    arguments = ["task=quadratic", "steps=12", "seeds=3", "baselines=[adam]", "cost=false"]
    assert command(*arguments) == 0
    assert l2o.read_card("sgd") == before
    assert command(*arguments, "record=true") == 0
    recorded = l2o.read_card("sgd").pop("results")
    assert "Command" in recorded["facts"]
    reported = json.loads(Path("out/results.json").read_text())["settings"][0]["optimizers"]["adam"]
    adam = recorded["settings"][0]["optimizers"]["adam"]
    for name in ("mean", "rate", "trials", "speed_up"):
        assert adam[name] == reported[name]
    assert adam["valid"] == pytest.approx(sum(reported["valid"]) / 3)
    assert adam["diverged"] == sum(reported["diverged"])
    assert l2o.load("sgd")[0] == SGD()


def test_it_runs_as_a_module():
    arguments = ["source=sgd", "task=quadratic", "steps=2", "seeds=1", "baselines=[]", "cost=false", "out='a b'"]
    module = [sys.executable, "-m", "meta_train.evaluate", *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(module, capture_output=True, text=True, check=False, env=env)
    assert (done.returncode, done.stderr) == (0, "meta_train.evaluate: loading\n")
    assert Path("a b/report.md").is_file()


def test_the_same_command_gives_the_same_numbers(command):
    numbers = []
    for _ in range(2):
        assert command("task.width=4", "steps=3", "seeds=2", "baselines=[adam]", "cost=false") == 0
        results = json.loads(Path("out/results.json").read_text())["settings"][0]["optimizers"]
        numbers.append([results[name]["runs"] for name in ("learned", "adam")])
    assert numbers[0] == numbers[1]


def test_own_rules_and_tasks_go_by_import_path(command, monkeypatch):
    Path("own_evaluated.py").write_text(OWN)
    monkeypatch.syspath_prepend(".")
    import own_evaluated

    l2o.checkpoints.store.save("mine", own_evaluated.Rule(), own_evaluated.Rule().init_theta(torch.Generator()))
    own = ["source=mine", "rules=[own_evaluated.Rule]", "task._target_=own_evaluated.Task", "task.noise=0.5"]
    assert command(*own, "steps=3", "seeds=2", "baselines=[adam]", "cost=false") == 0
    text = Path("out/report.md").read_text()
    assert "Task(dim=2, noise=0.5" in text
    assert "| mine |" in text
    assert "Rule(lr=" in text


# Settings -------------------------------------------------------------------------------------------------------------


def test_the_default_is_the_meta_test_half_of_digits(settings):
    (setting,) = settings().values()
    assert (setting.family.dataset, setting.family.half, setting.seeds) == ("digits", "meta_test", 5)


@pytest.mark.parametrize(
    ("arguments", "half"),
    [(["half=meta_train"], "meta_train"), (["half=meta_train", "task.half=meta_test"], "meta_test")],
)
def test_the_half_can_be_chosen(settings, arguments, half):
    assert settings(*arguments)["ImageMLP"].family.half == half


@pytest.mark.parametrize(("own", "half"), [([], "meta_test"), (["task.family.family.half=meta_train"], "meta_train")])
def test_images_inside_augmentations_are_of_that_half_too(settings, own, half):
    inner = "task.family.family._target_=l2o.tasks.ImageMLP"
    nested = ["task._target_=l2o.tasks.Reparametrized", "task.family._target_=l2o.tasks.GradientNoise", inner]
    assert settings(*nested, *own)["Reparametrized"].family.family.family.half == half


def test_settings_override_the_task_and_the_rest(settings):
    found = settings("steps=30", "settings={a: {task: {width: 9}}, b: {steps: 40, seeds: 2}}", "settings.b.window=3")
    assert [(s.name, s.family.width, s.steps, s.seeds, s.window) for s in found.values()] == [
        ("a", 9, 30, 5, None),
        ("b", 32, 40, 2, 3),
    ]


def test_a_time_out_can_be_that_of_all_settings_or_of_one(settings):
    found = settings("timeout=5", "settings={a: {}, b: {timeout: 90}, c: {timeout: null}}")
    assert [setting.timeout for setting in found.values()] == [5, 90, None]
    assert [setting.timeout for setting in settings().values()] == [None]


@pytest.mark.parametrize("name", EXPERIMENTS["evaluate/experiment"])
def test_every_experiment_makes_sense(settings, name):
    for setting in settings(f"experiment={name}").values():
        assert setting.steps >= setting.smoothing
        half = "meta_train" if name == "meta_validation" else "meta_test"  # reports' own data choose nothing
        assert getattr(setting.family, "half", half) == half


def test_problems_are_unlike_those_of_meta_training_only_where_they_say_so(settings):
    assert Setting("as it stands", Quadratic(), steps=9).split == "unmarked"
    demo = [setting.split for setting in settings("experiment=digits_demo").values()]
    assert demo == ["like", "like", "like", "other"]


SUITES = sorted(path.stem for path in (ROOT / "configs" / "evaluate" / "suite").glob("*.yaml"))


SPLITS = {"quick": {"like", "other"}, "standard": {"like", "larger", "longer", "other"}, "large": {"larger", "longer"}}


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_makes_sense(settings, name):
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
def test_shipped_curves_are_those_of_the_suite_as_it_is_now(command, monkeypatch, name):
    """All of them are there, and begin where its problems begin today: else a revision has to be raised."""
    seen = []
    monkeypatch.setattr(evaluate, "evaluate", lambda config, line: seen.append(config))
    assert command(f"suite={name}") == 0
    made, chosen = suites.make_suite(seen[0]), baselines(seen[0].baselines, seen[0].wider)
    store = suites.make_store(seen[0], Path("out"))
    assert [str(job) for job in missing(made, chosen, store)] == []
    for setting in made.tasks:
        first = run_entrant(BASELINES["adamw"], dataclasses.replace(setting, steps=1, window=1)).train[0, :, 0]
        np.testing.assert_allclose(store.kept(name, setting, chosen["adam"]).train[0, :, 0], first, rtol=2e-3)


def test_packages_of_curves_that_are_there_need_not_be(command, monkeypatch):
    """Those of the extra ``baselines``: whose curves come with l2o, or were run before."""
    pytest.importorskip("prodigyopt")
    run = ("suite=quick", "steps=5", "seeds=1", "only=[quadratic]", "baselines=[adam,prodigy]", "store=curves")
    assert command(*run) == 0
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    assert command(*run) == 0
    assert command(*run, "store=other") == 2


@pytest.mark.parametrize(("shipped", "some"), [("true", True), ("false", False)])
def test_shipped_curves_are_taken_unless_they_are_not_wanted(command, monkeypatch, shipped, some):
    seen = []
    monkeypatch.setattr(evaluate, "evaluate", lambda config, line: seen.append(config))
    assert command("suite=quick", f"shipped={shipped}") == 0
    assert (len(suites.make_store(seen[0], Path("out"))) > 0) == some


def test_shipped_curves_take_a_few_megabytes():
    assert 0 < sum(path.stat().st_size for path in (ROOT / "benchmarks" / "suite").rglob("*.npz")) < 12e6


def test_a_whole_suite_in_short(command, capsys):
    """The pipeline of suite=quick, with torch optimizers beside a learned one, over two processes, and again."""
    short = ["suite=quick", "steps=6", "seeds=2", "baselines=[adam,adamw]", "shipped=false", "store=curves"]
    judged = "optimizers=[sgd,torch.optim.RAdam,{path:torch.optim.AdamW,label:mine,rates:[0.01,0.1],clip:1.0}]"
    assert command(*short, judged, "jobs=2", "pack=packed") == 0
    results = json.loads(Path("out/results.json").read_text())
    assert len(results["settings"]) == 6
    assert [found["label"] for found in results["overall"]] == ["sgd", "torch.optim.RAdam", "mine"]
    assert {found["label"] for found in results["optimizers"]} == {
        "sgd",
        "torch.optim.RAdam",
        "mine",
        "Adam",
        "AdamW 0.001",
    }
    assert results["settings"][0]["optimizers"]["given mine"]["trials"] == 2
    assert results["facts"]["Suite"] == "quick, version 1"
    assert {path.name for path in Path("packed").iterdir()} == {"adam.npz", "adamw.npz"}
    assert (FILES | {"profile.png"}) - {"store"} == {path.name for path in Path("out").iterdir()}
    assert "report.html" in capsys.readouterr().out
    assert command(*short, judged, "out=again", "only=[perceptron]") == 0
    again = json.loads(Path("again/results.json").read_text())
    assert again["settings"] == [setting for setting in results["settings"] if setting["name"] == "perceptron"]
    assert "runs of" not in capsys.readouterr().out


def test_every_experiment_of_training_has_its_evaluation():
    assert EXPERIMENTS["experiment"]
    assert set(EXPERIMENTS["experiment"]) <= set(EXPERIMENTS["evaluate/experiment"])


# Bad input ------------------------------------------------------------------------------------------------------------


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
def test_bad_input_is_one_line_before_any_work(command, capfd, monkeypatch, arguments, says):
    monkeypatch.setattr(evaluate, "run_jobs", lambda *_: pytest.fail("work was done"))
    assert command(*arguments) == 2
    out, error = capfd.readouterr()
    assert out == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for part in says:
        assert part in error
    assert {path.name for path in Path().iterdir()} == {"sgd"}


def test_missing_data_is_noticed_before_any_work(command, capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("L2O_DATA_DIR", str(tmp_path / "no_data"))
    assert command("task=mnist_mlp") == 2
    assert "no_data" in capfd.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize("package", ["hydra", "omegaconf", "matplotlib", "rich"])
def test_a_missing_extra_is_named_before_any_work(command, capfd, monkeypatch, package):
    monkeypatch.setattr(evaluate, "run_jobs", lambda *_: pytest.fail("work was done"))
    monkeypatch.setitem(sys.modules, package, None)
    assert command() == 2
    error = capfd.readouterr().err
    assert re.fullmatch(rf"error: {package} .*: pip install 'l2o\[train\]'\n", error)
    assert not Path("out").exists()


@pytest.mark.parametrize("package", EXTRA)
def test_a_package_that_is_missing_deeper_down_is_named_too(command, capfd, monkeypatch, package):
    def load(*_, **__):
        raise ModuleNotFoundError(name=f"{package}.part")

    monkeypatch.setattr(optimizers, "load", load)
    assert command() == 2
    assert capfd.readouterr().err.startswith(f"error: {package}.part is not installed; ")


def test_the_extra_has_what_hydra_brings_along():
    assert {"omegaconf", "yaml"} <= set(EXTRA)


def test_a_card_that_cannot_be_written_is_noticed_before_any_work(command, capfd, monkeypatch):
    monkeypatch.setattr(evaluate, "run_jobs", lambda *_: pytest.fail("work was done"))

    def refuse(folder):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(l2o.checkpoints.store, "try_folder", refuse)
    assert command("task=quadratic", "record=true") == 2
    assert capfd.readouterr().err.startswith(
        "error: source='sgd': its card in sgd cannot be written (Permission denied)"
    )
    assert not Path("out").exists()


def test_a_bug_keeps_its_trace(command, monkeypatch):
    monkeypatch.setattr(optimizers, "load", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command()


def test_a_trace_can_be_asked_for(command, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(UnknownNameError):
        command("source=nowhere")
    assert os.environ["HYDRA_FULL_ERROR"] == "1"
