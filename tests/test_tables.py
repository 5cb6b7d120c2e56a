"""Families on tables: which rows are whose, and bad input; what they share with other families is tested with them."""

import sys

import pytest
import torch

from l2o.evaluation import Setting, run_learned
from l2o.rules import Adam
from l2o.tasks import DiabetesMLP, TableClassifier
from l2o.tasks.tables import classified_split, diabetes_split
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
    ("dataset", "rows", "columns", "classes"), [("breast_cancer", 569, 30, 2), ("wine", 178, 13, 3)]
)
def test_tables_with_classes_are_dealt_out_and_standardised(dataset, rows, columns, classes):
    parts = {part: classified_split(dataset, *part) for part in PARTS}
    assert sum(len(x) for x, _ in parts.values()) == rows
    assert all(x.shape == (len(y), columns) and set(y.tolist()) == set(range(classes)) for x, y in parts.values())
    for half in ("meta_train", "meta_test"):
        x, _ = parts[half, "train"]
        torch.testing.assert_close(x.mean(0), torch.zeros(columns), atol=1e-5, rtol=0.0)
        torch.testing.assert_close(x.std(0), torch.ones(columns))
    assert TableClassifier(dataset=dataset).outputs == classes


@pytest.mark.parametrize("half", ["meta_train", "meta_test"])
def test_all_rows_in_one_batch_are_the_table(half):
    family = TableClassifier(half=half, dataset="wine", batch_size=None, depth=0)
    generator = torch.Generator().manual_seed(0)
    data = family.sample(generator, 2)
    params, buffers = family.init(data, generator)
    batch = family.batch(data, "train", generator)
    x, y = classified_split("wine", half, "train")
    logits = x @ params["0.weight"][1].T + params["0.bias"][1]
    lane = ({k: t[1] for k, t in each.items()} for each in (params, buffers, data, batch))
    torch.testing.assert_close(family.loss(*lane)[0], torch.nn.functional.cross_entropy(logits, y))


def test_classes_of_a_table_are_learned_and_counted():
    rule = Adam(lr=3e-3)
    setting = Setting("", TableClassifier(), steps=100, seeds=2)
    trials = run_learned(rule, rule.init_theta(torch.Generator()), setting)
    assert (trials.accuracy[-1] > 0.9).all()
    assert (trials.train[-20:].mean(0) < 0.2).all()


@pytest.mark.parametrize("settings", [{"dataset": "win"}, {"criterion": "accuracy"}])
def test_unknown_names_are_refused(settings):
    ((name, value),) = settings.items()
    with pytest.raises(UnknownNameError, match=f"{name} '{value}'"):
        TableClassifier(**settings)


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
    with pytest.raises(DataError, match=r"pip install 'l2o\[train\]'"):
        diabetes_split.__wrapped__("meta_train", "train")
    with pytest.raises(DataError, match=r"pip install 'l2o\[train\]'"):
        classified_split.__wrapped__("wine", "meta_train", "train")
