"""The command ``python -m meta_train.evaluate``: a whole small run, its settings, and bad input before any work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from evaluating import command

import l2o.checkpoints.store
from l2o.evaluation import suite
from l2o.rules import SGD

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


pytestmark = pytest.mark.usefixtures("sgd")


def test_a_small_run_leaves_its_report_and_nothing_else(capsys):
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


def test_several_learned_optimizers_stand_in_one_table():
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


def test_an_interrupted_evaluation_keeps_what_is_done_and_says_how_to_go_on(monkeypatch, capsys):
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


def test_an_evaluation_that_is_interrupted_at_once_says_so(monkeypatch, capsys):
    monkeypatch.setattr(suite, "run_entrant", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert command(*SMALL) == 130
    assert capsys.readouterr().err == (
        "interrupted with 3 of 3 runs to do; what is done is kept, and the same command with store=out/store goes on\n"
    )


def test_results_can_be_recorded_in_the_card():
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


def test_the_same_command_gives_the_same_numbers():
    numbers = []
    for _ in range(2):
        assert command("task.width=4", "steps=3", "seeds=2", "baselines=[adam]", "cost=false") == 0
        results = json.loads(Path("out/results.json").read_text())["settings"][0]["optimizers"]
        numbers.append([results[name]["runs"] for name in ("learned", "adam")])
    assert numbers[0] == numbers[1]


def test_own_rules_and_tasks_go_by_import_path(monkeypatch):
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


def test_a_whole_suite_in_short(capsys):
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
