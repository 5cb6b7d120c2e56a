"""Bad input to the training command is one line on stderr, before anything is written."""

from __future__ import annotations

import pytest
import torch
from conftest import ROOT
from training import command, snapshot

import l2o
from l2o.rules import SGD

pytestmark = pytest.mark.usefixtures("here")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["rule=momentun"], "unknown rule 'momentun', did you mean 'momentum'"),
        (["task=quadratics"], "did you mean 'quadratic'"),
        (["estimator=tbpt"], "unknown estimator 'tbpt', did you mean 'tbptt' or 'bptt'?; valid: bptt, es,"),
        (["logger=[wandb,tensorbord]"], "unknown logger 'tensorbord'"),
        (["experiment=nothing"], "unknown experiment 'nothing'"),
        (["init_from=nothing"], "'nothing'"),
        (["rule._target_=nowhere.Rule"], "rule"),
        (["rule._target_=l2o.tasks.Quadratic"], "expected a UpdateRule"),
        (["task._target_=l2o.rules.SGD", "~task.dim"], "expected a TaskFamily"),
        (["rule.width=3"], "unexpected keyword argument 'width'"),
        (
            ["rule._target_=l2o.rules.MLQ"],
            "rule._target_: unknown name in l2o.rules 'MLQ', did you mean 'MLP'?; valid: Ada",
        ),
        (["rule=sgd", "rule.lr=abc"], "rule: SGD: lr='abc' (str): expected a finite number over 0"),
        (["rule=lstm", "rule.hidden=20"], "rule: LSTM: hidden=20 (int): expected a tuple or list, as in hidden=[20]"),
        (["rule=lstm", "rule.hidden=[0]"], "rule: LSTM: hidden[0]=0 (int): expected a whole number of at least 1"),
        (["rule=mlp", "rule.step_mult=nan"], "rule: MLP: step_mult=nan"),
        (["task=quadratic", "task.dim=2.5"], "task: Quadratic: dim=2.5"),
        (["estimator.lanez=3"], "unexpected keyword argument 'lanez'; it takes lanes, horizon"),
        (["estimator.lanes=many"], "estimator: Backprop: lanes='many' (str): expected a whole number"),
        (["estimator.lanes=0"], "lanes=0"),
        (["outer.lr=-1"], "outer: Adam: Invalid learning rate: -1"),
        (["outer.rate=1"], "unexpected keyword argument 'rate'"),
        (["schedule=warmup_cosine", "schedule.total=???"], "schedule.total has no default"),
        (["schedule=warmup_linear", "schedule.total=2", "steps=3"], "give schedule.total=3"),
        (["meta.clip=0"], "meta: clip=0 (int): expected a finite number over 0"),
        (["meta.average=1"], "meta: average=1 (int): expected a finite number over 0 and under 1"),
        (["meta.clips=1"], "unknown setting 'clips', did you mean 'clip'?"),
        (["outer._target_=torch.optim.LBFGS"], "LBFGS cannot move θ"),
        (["evaluation.best_by=adam_loss"], "evaluation.best_by='adam_loss': expected held_out_loss or held_out_valid"),
        (["schedule.total=3"], "unexpected keyword argument 'total'"),
        (["evaluation.seeds=0"], "seeds=0"),
        (["evaluation.task.width=3"], "evaluation.task"),
        (["steps=0"], "steps=0 (int): expected a whole number of at least 1"),
        (["steps=1.5"], "steps=1.5"),
        (["seed=true"], "seed=True"),
        (["seed=9223372036854775808"], "seed=9223372036854775808: expected a seed of at most 63 bits"),
        (["evaluation.seed=99999999999999999999"], "seed=99999999999999999999: expected a seed of at most 63 bits"),
        (["log_every=0"], "log_every=0"),
        (["device=tpu"], "device='tpu'"),
        (["step=3"], "unknown setting 'step', did you mean 'steps'?"),
        (["evaluation.seedz=3"], "'seedz'"),
        (["logger.wandb.project=mine"], "logger.wandb has settings but is not chosen"),
        (["run="], "run= is empty"),
        (
            ["run=a=b"],
            "'run=a=b' cannot be read (mismatched input '=' expecting <EOF>); expected key=value;",
        ),
        (["run=a=b"], """as in 'run="a=b"'"""),
        (["run=[a]"], "run= is ['a']; expected the path of a folder"),
        (["run='  '"], "run= is empty"),
        (["run=a b#c"], """as in 'run="a b#c"'"""),
        (["run"], """as in 'run="a name"'"""),
        (["run=~nobody-of-this-name/x"], "run='~nobody-of-this-name/x': there is no such user"),
        ([f"run={'x' * 300}"], "…: can be no path (File name too long)"),
        (["run=/dev/null/run"], "run=/dev/null/run cannot be written (Not a directory)"),
        (["run=/proc/run"], "run=/proc/run cannot be written"),
    ],
    ids=str,
)
def test_bad_input_is_one_error_before_anything_is_written(
    capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert command(*arguments) == 2
    err = capsys.readouterr().err
    assert expected in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert snapshot() == {}


def test_a_warm_start_from_another_rule_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    rule = SGD(lr=0.5)
    l2o.save("saved", rule, rule.init_theta(torch.Generator()))
    before = snapshot()
    for own in (["rule=momentum"], ["rule=sgd"]):
        assert command("init_from=saved", *own) == 2
        assert "init_from='saved' is of SGD(lr=0.5)" in capsys.readouterr().err
    assert snapshot() == before


def test_help_says_what_there_is_to_choose(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--help") == 0
    said = capsys.readouterr().out
    rules = sorted(path.stem for path in (ROOT / "configs" / "rule").glob("*.yaml"))
    assert f"rule: {', '.join(rules)}" in said
    assert "checkpoint_every" in said
    assert snapshot() == {}
