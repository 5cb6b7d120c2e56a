"""Bad input of ``python -m meta_train.evaluate``: one line before any work, and a trace where it is a bug."""

from __future__ import annotations

import errno
import os
import re
import sys
from pathlib import Path

import pytest
from evaluating import command

import l2o.checkpoints.store
from l2o.types import UnknownNameError
from meta_train import evaluate, optimizers
from meta_train.config.compose import EXTRA

pytestmark = pytest.mark.usefixtures("sgd")


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
