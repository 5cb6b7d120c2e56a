"""What a curve belongs to: anything else than what it was run with has curves of its own; names decide nothing."""

from __future__ import annotations

import dataclasses
import importlib
import linecache
import sys

import pytest
from suites import ADAMW, ENTRANTS, SUITE, TASKS, learned

from l2o.evaluation import (
    Store,
    TorchEntrant,
    comparisons,
    condense,
    run_entrant,
    run_suite,
)
from l2o.evaluation.identity import curve_key
from l2o.rules import SGD
from l2o.tasks import Quadratic
from l2o.types import ConfigurationError
from meta_train.optimizers import torch_entrant


def key(suite="tiny", setting=TASKS[1], entrant=ENTRANTS["learned"], rate=None, seed=0):
    return curve_key(suite, setting, entrant, rate, seed)


@dataclasses.dataclass(frozen=True)
class Own(SGD):
    """A user's rule."""


OTHER = {
    "suite": {"suite": "other"},
    "revision": {"setting": dataclasses.replace(TASKS[1], revision=1)},
    "task": {"setting": dataclasses.replace(TASKS[1], family=Quadratic(dim=3, noise=0.2))},
    "steps": {"setting": dataclasses.replace(TASKS[1], steps=13)},
    "window": {"setting": dataclasses.replace(TASKS[1], window=2)},
    "problems": {"setting": dataclasses.replace(TASKS[1], seed=7)},
    "theta": {"entrant": learned(0.1)},
    "rule": {"entrant": dataclasses.replace(learned(), rule=Own(lr=0.03))},
    "optimizer": {"entrant": ENTRANTS["adam"]},
    "schedule": {"entrant": TorchEntrant("AdamW", ADAMW)},
    "rate": {"rate": 0.1},
    "seed": {"seed": 1},
}


@pytest.mark.parametrize("change", OTHER.values(), ids=OTHER.keys())
def test_curves_of_anything_else_never_meet(change):
    assert key(**change) != key()


@pytest.mark.parametrize(
    "change",
    [
        {"setting": dataclasses.replace(TASKS[1], name="called otherwise", split="longer", seeds=9)},
        {"entrant": learned(label="called otherwise")},
    ],
)
def test_names_decide_nothing(change):
    assert key(**change) == key()


class Drawn(Quadratic):
    """A family that draws for all problems at once, as one of a user may."""

    keyed = False


def test_problems_that_are_drawn_together_are_known_by_their_number_too():
    few, many = (dataclasses.replace(TASKS[1], family=Drawn(dim=3), seeds=n) for n in (2, 9))
    assert key(setting=few) != key(setting=many)


OWN = """
import torch

RATE = 0.1


class Mine(torch.optim.SGD):
    def __init__(self, params):
        super().__init__(params, lr=RATE)
"""


def test_what_a_users_file_says_is_part_of_a_curve(tmp_path, monkeypatch):
    """Also beside the class: nobody is to see the curves of the file as it was yesterday."""
    monkeypatch.syspath_prepend(tmp_path)
    keys = []
    for rate in ("0.1", "0.2", "0.1"):
        (tmp_path / "own_optimizer.py").write_text(OWN.replace("0.1", rate))
        monkeypatch.delitem(sys.modules, "own_optimizer", raising=False)
        importlib.invalidate_caches()
        linecache.clearcache()
        keys.append(key(entrant=torch_entrant("mine", {"path": "own_optimizer:Mine"})))
    assert keys[0] == keys[2] != keys[1]


@dataclasses.dataclass(frozen=True)
class Before:
    lr: float = 0.1


@dataclasses.dataclass(frozen=True)
class After(Before):
    nesterov: bool = False


def test_a_new_setting_with_a_default_changes_no_curve():
    plain, changed = (key(entrant=each()) for each in (Before, After))
    assert plain == changed == key(entrant=After(lr=0.1, nesterov=False))
    assert key(entrant=After(nesterov=True)) != plain


def test_curves_of_a_problem_that_has_changed_are_refused(tmp_path):
    store = Store(tmp_path)
    run_suite(SUITE, {"adam": ENTRANTS["adam"]}, store)
    stale = store.kept("tiny", TASKS[0], ENTRANTS["adam"])
    store.add("tiny", TASKS[0], learned(), stale._replace(label="mine", rates=(None,), train=2 * stale.train[..., :1]))
    store.add("tiny", TASKS[1], learned(), condense(run_entrant(learned(), TASKS[1]), 1))
    with pytest.raises(
        ConfigurationError, match=r"small: the first losses of mine .* its task has changed; raise the ver"
    ):
        comparisons(SUITE, {"adam": ENTRANTS["adam"], "learned": learned()}, store)
