"""``python -m meta_train.sweep``: a number of θ at several values, beside tuned Adam on the same problems."""

import dataclasses
import json
import math

import pytest
import torch
from omegaconf import OmegaConf
from tables import generator, identical

from l2o import load
from l2o.errors import L2OError
from l2o.evaluation import RuleEntrant, baselines
from l2o.evaluation.trials import Setting, run_entrant
from l2o.rules import Adam, Steered
from l2o.tasks import ImageMLP
from l2o.types import UpdateRule
from meta_train.config.build import make
from meta_train.config.compose import composed
from meta_train.sweep import Swept, record, run

SETTINGS = ["--set", "experiment=default", "rule.controller=alignment"]
SHORT = ["--steps", "20", "--seeds", "2", "--only", "^(softmax|ravine)$"]


def test_the_experiment_makes_the_rule_of_steered_mlp_from_default():
    config = OmegaConf.to_container(composed("train", ["experiment=default"]), resolve=True)
    start, (by_hand, constants) = make(config["rule"], "rule", UpdateRule), load("default")
    rule, theta = load("steered-mlp")
    assert (start, dataclasses.replace(start, controller=by_hand.controller)) == (rule, by_hand)
    begun = start.init_theta(generator())
    assert begun.keys() == theta.keys()
    assert identical({name: begun[name] for name in constants}, constants)


def test_a_trial_is_what_the_rule_does_with_that_number():
    rule, setting = Steered(), Setting("mlp", ImageMLP(width=8, batch_size=4), 12, 3, seed=5)
    theta = rule.init_theta(generator())
    swept = run_entrant(Swept("", rule, theta, "log_lr", (0.5, -0.5)), setting).train
    for i, shift in enumerate((0.5, -0.5)):
        alone = run_entrant(RuleEntrant("", rule, theta | {"log_lr": theta["log_lr"] + shift}), setting).train
        torch.testing.assert_close(torch.tensor(swept[..., i]), torch.tensor(alone[..., 0]), rtol=1e-4, atol=1e-6)


def test_adam_at_its_own_rates_ends_where_adam_does_and_no_sooner():
    (adam,) = baselines(["adam"]).values()
    rule = Adam()
    shifts = tuple(math.log(rate / rule.lr) for rate in adam.rates)
    swept = Swept("", rule, rule.init_theta(generator()), "log_lr", shifts)
    made = record(Setting("softmax", ImageMLP(depth=0, batch_size=16), 40, 2), swept, adam)
    best = made["end"].index(min(made["end"]))
    assert made["end"][best] == pytest.approx(0.0, abs=1e-4)
    assert 1.0 <= made["speed_up"][best] < 1.5
    assert made["speed_up"][0] == 0.0  # the smallest rate does not get there
    assert made["end"][0] > 0.1


def test_the_command_prints_and_keeps_a_row_a_family(tmp_path, capsys):
    run(["log_lr", "-1.0", "0", *SHORT, "--out", str(tmp_path / "a" / "sweep.json"), *SETTINGS])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-4:]] == ["softmax", "ravine", "median", "reached"]
    about, *made = json.loads((tmp_path / "a" / "sweep.json").read_text())
    assert about["command"].startswith("python -m meta_train.sweep log_lr -1.0 0")
    assert [row["family"] for row in made] == ["softmax", "ravine"]
    assert made[0]["end"][0] > made[0]["end"][1] > 0.0  # twenty steps are few, and smaller ones go less far
    assert made[0]["speed_up"] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["log_rate", "0", *SHORT, *SETTINGS], "log_rate.*log_lr"),
        (["log_lr", "0", "--only", "nobody", *SETTINGS], "--only nobody: expected a part of one of mlp, wide"),
        (["log_lr", "0", "--seed", "-1", *SETTINGS], "--seed"),
    ],
)
def test_what_cannot_be_is_said(arguments, message):
    with pytest.raises(L2OError, match=message):
        run(arguments)
