"""Families on tables: which rows are whose, and bad input; what they share with other families is tested with them."""

from __future__ import annotations

import sys

import pytest
import torch

from l2o.evaluation import Setting, run_learned
from l2o.rules import Adam
from l2o.tasks import DiabetesMLP
from l2o.tasks.tables import diabetes_split
from l2o.types import ConfigurationError, DataError, UnknownNameError

PARTS = [(half, split) for half in ("meta_train", "meta_test") for split in ("train", "valid")]


def test_the_parts_are_together_the_table():
    from sklearn.datasets import load_diabetes

    sizes = [len(diabetes_split(*part)[0]) for part in PARTS]
    assert sizes == [176, 45, 176, 45]
    assert sum(sizes) == len(load_diabetes().target)


@pytest.mark.parametrize("half", ["meta_train", "meta_test"])
def test_what_is_trained_on_is_standardised(half):
    for t in diabetes_split(half, "train"):
        torch.testing.assert_close(t.mean(0), torch.zeros(t.shape[1]), atol=1e-5, rtol=0.0)
        torch.testing.assert_close(t.std(0), torch.ones(t.shape[1]))


def test_a_run_learns_something_that_holds_for_others():
    rule = Adam(lr=3e-3)
    trials = run_learned(rule, rule.init_theta(torch.Generator()), Setting("", DiabetesMLP(), steps=100, seeds=2))
    assert (trials.train[-20:].mean(0) < 0.6).all()
    assert (trials.valid.min(0) < 0.8).all()


@pytest.mark.parametrize(
    ("settings", "error", "names"),
    [
        ({"half": "both"}, UnknownNameError, "half 'both'"),
        ({"width": 0}, ConfigurationError, "width=0"),
        ({"depth": -1}, ConfigurationError, "depth=-1"),
        ({"batch_size": 1.5}, ConfigurationError, "batch_size=1.5"),
    ],
)
def test_bad_settings_are_refused(settings, error, names):
    with pytest.raises(error, match=names):
        DiabetesMLP(**settings)


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"pip install l2o\[train\]"):
        diabetes_split.__wrapped__("meta_train", "train")
